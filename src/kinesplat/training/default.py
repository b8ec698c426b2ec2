"""The default recipe: a mesh-bound self-model, refined on pictures of many configurations.

What it stands on, each measured (docs/training.md): splats bound to links, spherical harmonics in link frames and along
the optical axis; a start from the meshes; small steps, small batches, Adam; splats that nobody sees dropped, and cut in
two where the pictures are most wrong.
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.appearance.shader import Shader, lit, split_headlight
from kinesplat.dataset.frames import Frames
from kinesplat.dataset.lights import HEADLIGHT_AMBIENT, HEADLIGHT_DIFFUSE
from kinesplat.gaussians import Parameters
from kinesplat.rasterizer import rasterize_links
from kinesplat.rasterizer.projection import quats_to_rotations
from kinesplat.self_model import SelfModel
from kinesplat.training.checkpoint import read_checkpoint, write_checkpoint
from kinesplat.training.density import choose, halves, worth_of
from kinesplat.training.loop import Budget, EarlyStop, Log, batch_rows, decayed, every_seconds, psnr, run
from kinesplat.training.splat_optimizer import Rates, SplatOptimizer

CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_SECONDS = 20.0
SHADOW_RATE = 1e-2
"""Of the two numbers that say where shadows begin."""


@dataclass(frozen=True)
class DefaultSettings:
    """How the default recipe learns.

    Attributes:
        start: splats at the start.
        gaussians: splats at the end.
        degree: of the spherical harmonics.
        square: weight of the mean squared difference beside the mean absolute one.
        rates: of Adam; that of the means in units of the median splat's scale.
        last_share: of the rates at the end.
        batch: pictures a step.
        eps2d: screen dilation [px^2].
        anchor: pull of each splat towards where it started, which keeps those in place that are hardly ever seen; in
            units of the median splat's scale.
        densify_from: share of the budget after which splats are first added and dropped, ...
        densify_until: ... and last.
        rounds: how often in between.
        pictures: how many each round looks at.
        least_contribution: splats that fill less in each of them are dropped [px].
        validate_every: steps between two looks at the validation pictures.
        patience: looks without improvement after which training stops.
    """

    start: int = 15_000
    gaussians: int = 15_000
    degree: int = 3
    square: float = 20.0
    rates: Rates = field(default_factory=lambda: Rates(0.1, 3e-3, 1.2e-2, 1e-2, 8e-3))
    last_share: float = 0.05
    batch: int = 1
    eps2d: float = 0.01
    anchor: float = 3e-4
    densify_from: float = 0.1
    densify_until: float = 0.1
    rounds: int = 1
    pictures: int = 60
    least_contribution: float = 0.05
    validate_every: int = 1000
    patience: int = 10


class DefaultFit:
    """A model under training: `step` moves it once, `densify` changes its splats, `model` is what it has become."""

    def __init__(self, model: SelfModel, frames: Frames, settings: DefaultSettings, seed: int) -> None:
        """Nothing happens yet.

        Args:
            model: mesh-bound, where to start.
            frames: pictures to train on.
            settings: how to learn.
            seed: of the order of pictures.
        """
        self.settings, self._model, self._frames, self._seed = settings, model, frames, seed
        self._device = model.parameters.means.device
        self._Ts = link_poses(model, frames)
        self.link_index = model.link_index.int()
        scale = float(model.parameters.log_scales.amax(-1).median().exp())
        self._scale = scale
        self._splats = SplatOptimizer(model.parameters, settings.rates, scale)
        self._anchors = model.parameters.means.clone()
        self._many_lights = has_many_lights(frames)
        self._shader, self._shader_adam = model.shader, None
        self._train_shader()

    @property
    def parameters(self) -> Parameters:
        """The splats as they are."""
        return self._splats.parameters

    @property
    def model(self) -> SelfModel:
        """The model with its present splats, detached."""
        splats = self.parameters
        detached = replace(splats, **{name: value.detach().clone() for name, value in splats.tensors().items()})
        shader, index = deepcopy(self._shader), self.link_index.long()
        return replace(self._model, parameters=detached, link_index=index, eps2d=self.settings.eps2d, shader=shader)

    def _train_shader(self) -> None:
        """A fresh optimiser for the world's light, where there is one."""
        if self._shader is None:
            return
        rates = {"sh": self.settings.rates.sh, "log_bias": SHADOW_RATE, "log_blur": SHADOW_RATE}
        groups = [{"params": [value], "rate": rates[name]} for name, value in self._shader.named_parameters()]
        self._shader_adam = torch.optim.Adam(groups, lr=0.0, eps=1e-15, fused=True)

    def step(self, number: int, share: float) -> Mapping[str, Tensor]:
        """Move once, on the pictures of step `number`."""
        rows = batch_rows(len(self._frames), self.settings.batch, number, self._seed)
        frames, splats = self._frames.select(rows), self.parameters
        difference = self._rendered(frames, self._Ts[rows]) - frames.rgb.to(self._device) / 255.0
        l1 = difference.abs().mean()
        loss = l1 + self.settings.square * difference.square().mean()
        values = {"l1": l1.detach()}
        if self.settings.anchor:
            loss = loss + self.settings.anchor * ((splats.means - self._anchors) / self._scale).square().sum(-1).mean()
        loss.backward()
        decay = decayed(1.0, self.settings.last_share, share)
        self._splats.step(decay)
        if self._shader_adam is not None:
            for group in self._shader_adam.param_groups:
                group["lr"] = decay * group["rate"]
            self._shader_adam.step()
            self._shader_adam.zero_grad()
        return values

    def _rendered(self, frames: Frames, Ts_world_link: Float[Tensor, "m links 4 4"]) -> Float[Tensor, "m h w 3"]:
        """The splats from the cameras of `frames`, under their lights."""
        if self._many_lights and len(frames) > 1:
            one_by_one = [self._rendered(frames.select([i]), Ts_world_link[i : i + 1]) for i in range(len(frames))]
            return torch.cat(one_by_one)
        gaussians, shader, Ts = self.parameters.activate(), self._shader, Ts_world_link
        if shader is not None:
            if self._many_lights and frames.light is not None:
                sh, shader = shader.relit(gaussians.sh, frames.light[0])
                gaussians = replace(gaussians, sh=sh)
            gaussians = lit(gaussians, shader(gaussians, self.link_index, Ts))
        camera = frames.camera.to(self._device)
        rgb = rasterize_links(gaussians, self.link_index, Ts, camera, eps2d=self.settings.eps2d, outputs=("rgb",)).rgb
        assert rgb is not None
        return rgb

    def densify(self, wanted: int, number: int) -> None:
        """Drop splats that are not seen, and cut in two where the pictures are most wrong; the `number`-th time."""
        generator = torch.Generator().manual_seed(1_000 * self._seed + number)
        rows = torch.randperm(len(self._frames), generator=generator)[: self.settings.pictures]
        worth = worth_of(
            self.parameters, self.link_index, self._Ts[rows], self._frames.select(rows), self.settings.eps2d
        )
        keep, cut = choose(worth, wanted, self.settings.least_contribution, 0.5)
        new = halves(self.parameters.select(cut))
        keep[cut] = False
        self.link_index = torch.cat([self.link_index[keep], self.link_index[cut].repeat(2)])
        self._anchors = torch.cat([self._anchors[keep], new.means])
        self._splats.rearrange(keep, new)
        if self._shader is not None:
            rows = torch.cat([torch.nonzero(keep)[:, 0], cut.repeat(2)])
            self._shader = self._shader.select(rows)
            self._train_shader()

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that moves."""
        state = {"splats": self._splats.state_dict(), "link_index": self.link_index, "anchors": self._anchors}
        if self._shader is not None and self._shader_adam is not None:
            state["shader"] = {"shader": self._shader.state_dict(), "adam": self._shader_adam.state_dict()}
        return deepcopy(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._splats.load_state_dict(state["splats"])
        self.link_index, self._anchors = (state[name].to(self._device) for name in ("link_index", "anchors"))
        if "shader" in state:
            self._shader = Shader.like(state["shader"]["shader"]).to(self._device)
            self._train_shader()
            assert self._shader_adam is not None
            self._shader_adam.load_state_dict(state["shader"]["adam"])


def prepared(model: SelfModel, settings: DefaultSettings, light: Float[Tensor, "7"] | None) -> SelfModel:
    """Where training starts: a mesh-bound model with harmonics of the degree wanted, and lit as the pictures are.

    Args:
        model: as `SelfModel.from_description` makes it, for a headlight.
        settings: of the recipe.
        light: the world's light to make the model for, see `kinesplat.dataset.lights`; None for the headlight.
    """
    splats = model.parameters
    more = (settings.degree + 1) ** 2 - splats.sh.shape[1]
    sh = torch.nn.functional.pad(splats.sh, (0, 0, 0, more))  # a negative pad crops
    shader = None
    if light is not None:
        normals = quats_to_rotations(splats.quats)[..., 2]
        sh, world = split_headlight(sh, normals, light, HEADLIGHT_AMBIENT, HEADLIGHT_DIFFUSE)
        reach = float(splats.log_scales.amax(-1).median().exp())
        shader = Shader(light[:3].to(sh), world, 2.0 * reach, light[3:6])
    return replace(model, parameters=replace(splats, sh=sh), shader=shader)


def fit_splats(
    model: SelfModel,
    frames: Frames,
    validation: Frames,
    budget: Budget,
    settings: DefaultSettings,
    *,
    seed: int = 0,
    folder: Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> SelfModel:
    """Refine a mesh-bound model on pictures.

    Args:
        model: where to start.
        frames: pictures to train on; of another light than the headlight for a model with a shader (`prepared`), which
            is relit for each picture where their lights differ.
        validation: pictures of other configurations, to know when to stop.
        budget: when to end at the latest.
        settings: how to learn.
        seed: of the order of pictures.
        folder: for the checkpoint and the log; None: nowhere.
        resume: go on from the checkpoint in `folder`.
        progress: show a bar.

    Returns:
        the model that did best on the validation pictures.

    Raises:
        TrainingError: the loss became NaN; names the step.
        ModelFileError: there is no checkpoint to resume from, or it is broken.
    """
    fit, stop = DefaultFit(model, frames, settings, seed), EarlyStop(settings.patience)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "rounds": 0, "best": math.inf, "waited": 0, "best_fit": None}
    if resume and folder is not None:
        state = read_checkpoint(folder / CHECKPOINT)
        fit.load_state_dict(state["fit"])
        stop.best, stop.waited = state["best"], state["waited"]
    save_due = every_seconds(CHECKPOINT_SECONDS)
    with Log(folder, state["step"]) as log:
        for tick in run(fit.step, budget, done=state["step"], seconds=state["seconds"], progress=progress):
            state |= {"step": tick.step, "seconds": tick.seconds}
            if state["rounds"] < round_of(tick.share, settings):
                state["rounds"] += 1
                fit.densify(splats_after(state["rounds"], settings), state["rounds"])
            if tick.due(settings.validate_every):
                value = validate(fit.model, validation)
                log.write(tick.step, {"psnr_db": value, "splats": len(fit.parameters), **tick.values})
                if stop.improved(10.0 ** (-0.1 * value)):
                    state["best_fit"] = fit.state_dict()
            if folder is not None and (save_due() or tick.share >= 1.0 or stop.stop):
                state |= {"fit": fit.state_dict(), "best": stop.best, "waited": stop.waited}
                write_checkpoint(folder / CHECKPOINT, state)
            if stop.stop:
                break
    if state["best_fit"] is not None:
        fit.load_state_dict(state["best_fit"])
    made = {"steps": state["step"], "training_seconds": round(state["seconds"], 1)}
    if math.isfinite(stop.best):
        made["validation_psnr_db"] = round(-10.0 * math.log10(stop.best), 2)
    return replace(fit.model, provenance={**model.provenance, **made})


def round_of(share: float, settings: DefaultSettings) -> int:
    """How many rounds of densification are due after this share of the budget."""
    span = (share - settings.densify_from) / max(settings.densify_until - settings.densify_from, 1e-9)
    return 0 if span < 0.0 else min(settings.rounds, 1 + int(span * (settings.rounds - 1)))


def splats_after(rounds: int, settings: DefaultSettings) -> int:
    """How many splats there should be after so many rounds: a geometric rise from start to end."""
    share = rounds / max(settings.rounds, 1)
    return round(settings.start * (settings.gaussians / settings.start) ** share)


@torch.no_grad()
def validate(model: SelfModel, frames: Frames) -> float:
    """Mean PSNR over the pictures of `frames` [dB]."""
    values, many = [], has_many_lights(frames)
    for rows in torch.arange(len(frames)).split(1 if many else 16):
        part = frames.select(rows)
        device = model.parameters.means.device
        under = model if part.light is None or not many else model.relit(part.light[0])
        out = under.render(part.q.float().to(device), part.camera.to(device), outputs=("rgb",))
        assert out.rgb is not None
        values.append(psnr(out.rgb, part.rgb.to(device) / 255.0))
    return float(torch.cat(values).mean())


def has_many_lights(frames: Frames) -> bool:
    """Whether the pictures were taken under different lights."""
    return frames.light is not None and bool((frames.light != frames.light[0]).any())


def link_poses(model: SelfModel, frames: Frames) -> Float[Tensor, "n links 4 4"]:
    """``Ts_world_link`` of every picture, float32, on the model's device [m]."""
    Ts = torch.cat([model.tree.forward_kinematics(q).float() for q in frames.q.split(256)])
    return Ts.to(model.parameters.means.device)
