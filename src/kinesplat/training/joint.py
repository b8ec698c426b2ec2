"""Fitting a model's splats and networks to pictures of many configurations, all at once (Liu et al. 2024, eq. 7)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.dataset.frames import Frames
from kinesplat.fourier_mlp import FourierMlp
from kinesplat.gaussians import Parameters
from kinesplat.rasterizer import Render
from kinesplat.rasterizer.render import Background
from kinesplat.self_model import SelfModel
from kinesplat.training.canonical import scene_size
from kinesplat.training.loop import Budget, EarlyStop, Tick, batch_rows, decayed, psnr, run
from kinesplat.training.splat_optimizer import Rates, SplatOptimizer


@runtime_checkable
class Trainable(Protocol):
    """What `fit_jointly` can train: a frozen dataclass with splats and networks that renders configurations."""

    @property
    def parameters(self) -> Parameters:
        """The splats that learn."""
        ...

    @property
    def networks(self) -> Mapping[str, torch.nn.Module]:
        """What learns beside them, by name; trained in place."""
        ...

    def render(
        self, q: Float[Tensor, "*#batch dof"], camera: Camera, background: Background = ..., *, outputs: Sequence[str]
    ) -> Render:
        """Images of configurations `q` [rad or m], differentiable in splats and networks."""
        ...


Model = TypeVar("Model", bound=Trainable)


@dataclass(frozen=True)
class JointSettings:
    """How splats and networks learn together.

    Attributes:
        rates: of the splats; everything decays to `last_share` over the budget.
        network_rates: of Adam for each network of the model, by its name.
        last_share: of the rates at the end.
        validate_every: steps between two looks at the validation pictures.
        patience: looks without improvement (of 0.1 %) after which training counts as converged.
        low_precision: run the networks' layers in bfloat16 while training.
    """

    rates: Rates
    network_rates: Mapping[str, float]
    last_share: float = 0.05
    validate_every: int = 250
    patience: int = 8
    low_precision: bool = True


class JointFit:
    """A model being fitted: `steps` moves it, `model` is what it has become, `state_dict` what a checkpoint needs."""

    def __init__(self, model: Trainable, frames: Frames, settings: JointSettings, seed: int = 0) -> None:
        """Nothing happens yet.

        Args:
            model: where to start; its networks are trained in place.
            frames: pictures of many configurations; those of one configuration make one step.
            settings: how to learn.
            seed: of the order of configurations.
        """
        self._model, self._frames, self._settings, self._seed = model, frames, settings, seed
        self._views = views_by_configuration(frames)
        self._splats = SplatOptimizer(model.parameters, settings.rates, scene_size(frames.camera))
        modules = [module for network in model.networks.values() for module in network.modules()]
        self._fields = [m for m in modules if isinstance(m, FourierMlp) and settings.low_precision]
        for network in model.networks.values():
            network.zero_grad()
        groups = [
            {"params": list(network.parameters()), "name": name, "lr": settings.network_rates[name]}
            for name, network in model.networks.items()
        ]
        self._adam = torch.optim.Adam(groups, fused=True) if groups else None

    @property
    def model(self) -> Any:
        """The model with its present splats, detached; the networks are shared."""
        return replace(self._model, parameters=self._splats.detached())  # pyright: ignore[reportArgumentType]

    def steps(self, budget: Budget, *, done: int = 0, seconds: float = 0.0, progress: bool = False) -> Iterator[Tick]:
        """Step until the budget is spent.

        Raises:
            TrainingError: the loss became NaN; names the step.
        """
        return run(self._step, budget, done=done, seconds=seconds, progress=progress, title="joint training")

    def _step(self, number: int, share: float) -> dict[str, Tensor]:
        (which,) = batch_rows(len(self._views), 1, number, self._seed).tolist()
        frames = self._frames.select(self._views[which])
        parameters = self._splats.parameters
        device, dtype = parameters.means.device, parameters.means.dtype
        model = replace(self._model, parameters=parameters)  # pyright: ignore[reportArgumentType]
        with ExitStack() as stack:
            for network in self._fields:
                stack.enter_context(network.in_low_precision())
            out = model.render(frames.q[0].to(device, dtype), frames.camera.to(device, dtype), outputs=("rgb",))
        truth = frames.rgb.to(device) / 255.0
        loss = (out.rgb - truth).abs().mean()  # eq. 7: min || I - I_observed ||, in L1 as in the canonical stage
        loss.backward()
        decay = decayed(1.0, self._settings.last_share, share)
        self._splats.step(decay)
        if self._adam is not None:
            for group in self._adam.param_groups:
                group["lr"] = decay * self._settings.network_rates[group["name"]]
            self._adam.step()
            self._adam.zero_grad()
        return {"l1": loss.detach()}

    def state_dict(self) -> dict[str, Any]:
        """Splats, networks and optimisers."""
        networks = {name: network.state_dict() for name, network in self._model.networks.items()}
        adam = {} if self._adam is None else self._adam.state_dict()
        return {"splats": self._splats.state_dict(), "networks": networks, "adam": adam}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._splats.load_state_dict(state["splats"])
        for name, network in self._model.networks.items():
            network.load_state_dict(state["networks"][name])
        if self._adam is not None:
            self._adam.load_state_dict(deepcopy(dict(state["adam"])))


def views_by_configuration(frames: Frames) -> list[list[int]]:
    """Rows of the pictures of each configuration."""
    _, which = torch.unique(frames.q, dim=0, return_inverse=True)
    return [torch.nonzero(which == i)[:, 0].tolist() for i in range(int(which.max()) + 1)]


@torch.no_grad()
def mean_psnr(model: Trainable, frames: Frames) -> float:
    """Mean over the pictures of `frames` [dB]."""
    device, dtype = model.parameters.means.device, model.parameters.means.dtype
    values = []
    for rows in views_by_configuration(frames):
        part = frames.select(rows)
        out = model.render(part.q[0].to(device, dtype), part.camera.to(device, dtype), outputs=("rgb",))
        assert out.rgb is not None
        values.append(psnr(out.rgb, part.rgb.to(device) / 255.0))
    return float(torch.cat(values).mean())


def fit_jointly(
    model: Model,
    frames: Frames,
    validation: Frames,
    budget: Budget,
    settings: JointSettings,
    *,
    seed: int = 0,
    progress: bool = False,
    resume: Mapping[str, Any] | None = None,
    checkpoint: Callable[[Mapping[str, Any]], None] | None = None,
    log: Callable[[int, Mapping[str, float]], None] | None = None,
) -> tuple[Model, dict[str, int | float]]:
    """Splats and networks against the pictures until the validation pictures improve no more, or the budget ends.

    Args:
        model: where to start; its networks are trained in place.
        frames: pictures of many configurations.
        validation: pictures of others.
        budget: when to stop at the latest.
        settings: how to learn.
        seed: of the order of configurations.
        progress: show a bar.
        resume: what `checkpoint` was last given.
        checkpoint: called with the whole state at every look at the validation pictures.
        log: called with the step and scalars then.

    Returns:
        The model that did best on the validation pictures; and ``steps``, ``training_seconds``, and its
        ``validation_psnr_db``.

    Raises:
        TrainingError: the loss became NaN; names the step.
    """
    fit, stop = JointFit(model, frames, settings, seed), EarlyStop(settings.patience)
    done, seconds = 0, 0.0
    if resume is not None:
        fit.load_state_dict(resume["fit"])
        done, seconds = resume["step"], resume["seconds"]
        stop.best, stop.waited = resume["best"], resume["waited"]
    best = resume["best_state"] if resume is not None else deepcopy(fit.state_dict())
    for tick in fit.steps(budget, done=done, seconds=seconds, progress=progress):
        done, seconds = tick.step, tick.seconds
        if not tick.due(settings.validate_every):
            continue
        value = mean_psnr(fit.model, validation)
        if stop.improved(10.0 ** (-0.1 * value)):
            best = deepcopy(fit.state_dict())
        if log is not None:
            log(tick.step, {"joint/l1": tick.values["l1"], "joint/psnr_db": value})
        if checkpoint is not None:
            state = {"fit": fit.state_dict(), "best_state": best, "best": stop.best, "waited": stop.waited}
            checkpoint({**state, "step": tick.step, "seconds": tick.seconds})
        if stop.stop:
            break
    fit.load_state_dict(best)
    made: dict[str, int | float] = {"steps": done, "training_seconds": round(seconds, 1)}
    if math.isfinite(stop.best):
        made["validation_psnr_db"] = round(-10.0 * math.log10(stop.best), 2)
    return fit.model, made


@torch.no_grad()
def bound_to_heaviest(model: SelfModel) -> SelfModel:
    """The model with the present heaviest link of every splat as its `link_index`."""
    if model.skinning is None:
        return model
    return replace(model, link_index=model.skinning(model.parameters.means).argmax(dim=-1))
