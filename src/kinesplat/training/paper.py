"""The recipe of "Differentiable Robot Rendering" (Liu et al. 2024): three stages, one canonical configuration.

1. Splats of the canonical configuration, from random points on the meshes (`canonical`).
2. Weights of blend skinning, by the Chamfer distance between point clouds (`skinning`); eq. 2 to 4.
3. Splats, weights and appearance together, on pictures of many configurations (`joint`); eq. 5 to 7.

Where each equation stands: forward kinematics T_j(q), eq. 2, is `link_motions`; the weights, eq. 3,
`SkinningField.forward`; blending, eq. 4, `blend_points`; appearance, eq. 5, `AppearanceField.forward`; rendering,
eq. 6, `SelfModel.render`; the loss, eq. 7, `JointFit`. The canonical configuration is `tree.q_canonical` in all.

What the paper leaves open and we chose: rates (those of our own recipe for the splats), pictures of one configuration
make one step, layers in bfloat16 while training.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kinesplat import __version__
from kinesplat.appearance.field import AppearanceField
from kinesplat.dataset.frames import Frames
from kinesplat.description import Robot
from kinesplat.errors import ModelFileError
from kinesplat.gaussians import Parameters
from kinesplat.self_model import SelfModel
from kinesplat.skinning import SkinningField
from kinesplat.training.adaptive_control import Thresholds
from kinesplat.training.canonical import fit_canonical, mesh_cloud, round_splats
from kinesplat.training.checkpoint import read_checkpoint, write_checkpoint
from kinesplat.training.joint import JointSettings, bound_to_heaviest, fit_jointly
from kinesplat.training.loop import Budget, Log
from kinesplat.training.skinning import LinkCloud, fit_by_chamfer
from kinesplat.training.splat_optimizer import Rates

EPS2D = 0.3
CHECKPOINT = "checkpoint.safetensors"
CLOUD = 40_000


def _joint_settings() -> JointSettings:
    rates = Rates(means=4e-4, quats=3e-3, log_scales=1e-2, logit_opacities=2e-2, sh=5e-3)
    return JointSettings(rates, {"skinning": 3e-4, "appearance": 1e-3})


@dataclass(frozen=True)
class PaperSettings:
    """The paper's numbers, and ours where it names none.

    Attributes:
        gaussians: splats to begin with.
        canonical_steps: of stage 1.
        skinning_steps: of stage 2.
        thresholds: of the adaptive control in stage 1.
        layers: hidden layers of both networks.
        width: of the hidden layers.
        appearance: whether there is an appearance field; False is Table 1's "no deform" as we read it: the same
            model, blended by its skinning field, without eq. 5.
        joint: of stage 3.
    """

    gaussians: int = 10_000
    canonical_steps: int = 2000
    skinning_steps: int = 1500
    thresholds: Thresholds = field(default_factory=Thresholds)
    layers: int = 4
    width: int = 256
    appearance: bool = True
    joint: JointSettings = field(default_factory=_joint_settings)


def train_paper(
    robot: Robot,
    canonical: Frames,
    frames: Frames,
    validation: Frames,
    budget: Budget,
    settings: PaperSettings | None = None,
    *,
    folder: Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> SelfModel:
    """A self-model by the paper's recipe.

    Args:
        robot: whose meshes give the points.
        canonical: pictures of the canonical configuration.
        frames: pictures of many configurations.
        validation: pictures of others, for the early stop.
        budget: of stage 3; the first two have their numbers of steps.
        settings: the paper's by default.
        folder: where log and checkpoint go; nowhere without one.
        resume: go on from the checkpoint in `folder`, where there is one.
        device: where splats and networks live.
        seed: of all randomness.
        progress: show bars.

    Raises:
        ModelFileError: the checkpoint to resume from is broken.
        TrainingError: a loss became NaN; names the step.
    """
    settings = settings or PaperSettings()
    path = None if folder is None else folder / CHECKPOINT
    state: dict[str, Any] = read_checkpoint(path) if resume and path is not None and path.is_file() else {}

    def keep(**more: Any) -> None:
        state.update(more)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_checkpoint(path, state)

    first_stages(robot, canonical, settings, state, keep, device=device, seed=seed, progress=progress)
    model = _assembled(robot, state, settings, device, seed)
    with Log(folder, state.get("joint", {}).get("step", 0)) as log:
        trained, made = fit_jointly(
            model,
            frames,
            validation,
            budget,
            settings.joint,
            seed=seed,
            progress=progress,
            resume=state.get("joint"),
            checkpoint=lambda joint: keep(joint=joint),
            log=log.write,
        )
    return bound_to_heaviest(replace(trained, provenance={**model.provenance, **made}))


def first_stages(
    robot: Robot,
    canonical: Frames,
    settings: PaperSettings,
    state: Mapping[str, Any],
    keep: Callable[..., None],
    *,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Stages 1 and 2, or what is missing of them.

    Args:
        robot: whose meshes give the points.
        canonical: pictures of the canonical configuration.
        settings: the paper's.
        state: with "canonical", tensors of the splats, and "skinning", of the field, as far as they are known.
        keep: called with ``canonical=`` or ``skinning=`` once a stage is done.
        device: where splats and network live.
        seed: of all randomness.
        progress: show bars.

    Raises:
        TrainingError: a loss became NaN; names the step.
    """
    if "canonical" not in state:
        cloud, colours = mesh_cloud(robot, settings.gaussians, seed)
        splats = fit_canonical(
            round_splats(cloud.posed(robot.tree, robot.tree.q_canonical), colours).to(device),
            canonical,
            steps=settings.canonical_steps,
            eps2d=EPS2D,
            thresholds=settings.thresholds,
            seed=seed,
            progress=progress,
        )
        keep(canonical=splats.tensors())
    if "skinning" not in state:
        keep(skinning=_skinning(robot, settings, device, seed, progress).state_dict())


def _skinning(robot: Robot, settings: PaperSettings, device: str, seed: int, progress: bool) -> SkinningField:
    """Stage 2, from a denser cloud than the splats'."""
    cloud, _ = mesh_cloud(robot, CLOUD, seed + 1)
    cloud = LinkCloud(cloud.points.to(device), cloud.link_index.to(device))
    skinning = SkinningField.around(
        cloud.posed(robot.tree, robot.tree.q_canonical),
        len(robot.tree.link_names),
        layers=settings.layers,
        width=settings.width,
        seed=seed,
    )
    for _ in fit_by_chamfer(
        skinning, robot.tree, cloud, Budget(steps=settings.skinning_steps), seed=seed, progress=progress
    ):
        pass
    return skinning


def _assembled(robot: Robot, state: Mapping[str, Any], settings: PaperSettings, device: str, seed: int) -> SelfModel:
    """The model as the first two stages leave it, with an appearance field that changes nothing yet.

    Raises:
        ModelFileError: `state` is no state of this recipe.
    """
    try:
        parameters, skinning = Parameters(**state["canonical"]), SkinningField.like(state["skinning"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ModelFileError(f"the checkpoint is not one of the recipe 'paper': {error}") from error
    appearance = None
    if settings.appearance:
        k = parameters.sh.shape[1]
        appearance = AppearanceField.around(
            parameters.means, robot.tree, k, layers=settings.layers, width=settings.width, seed=seed + 2
        )
    provenance = {
        "robot": robot.name,
        "source": "/".join(Path(robot.source).parts[-2:]),
        "licence": robot.licence,
        "recipe": "paper" if settings.appearance else "paper, no deform",
        "gaussians": len(parameters),
        "dof": robot.tree.dof,
        "seed": seed,
        "kinesplat": __version__,
    }
    link_index = torch.zeros(len(parameters), dtype=torch.int64)
    model = SelfModel(robot.tree, parameters, link_index, EPS2D, provenance, skinning, appearance)
    return bound_to_heaviest(model.to(device))
