"""Table 1's baselines that have to be trained, "no deform" and K-planes, on the images of a data set.

Both begin where the recipe `paper` does: with the splats of its canonical stage, and no deform with its skinning field.
No deform is that recipe without an appearance field from the beginning, as a switch of the authors' published code
(`no_appearance_deformation`) has it; the table also shows a trained model with its field switched off.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kinesplat.dataset.container import Dataset
from kinesplat.dataset.frames import Frames
from kinesplat.dataset.generate import load_robot
from kinesplat.description import Robot
from kinesplat.errors import ModelFileError
from kinesplat.evaluation.kplanes import KPlanesModel, kplanes_settings
from kinesplat.gaussians import Parameters
from kinesplat.self_model import SelfModel
from kinesplat.training.checkpoint import read_checkpoint, write_checkpoint
from kinesplat.training.joint import fit_jointly
from kinesplat.training.loop import Budget, Log
from kinesplat.training.paper import CHECKPOINT, PaperSettings, first_stages, train_paper
from kinesplat.training.recipes import kept_on

NO_DEFORM = "no deform"
K_PLANES = "K-planes"


def train_baselines(
    data: Dataset,
    budget: Budget,
    folder: Path,
    *,
    settings: PaperSettings | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> dict[str, SelfModel | KPlanesModel]:
    """Both baselines, each with the same budget of joint training; what `folder` has of an earlier run is not repeated.

    Args:
        data: its "train" part is learnt from, its "validation" part says which state was best.
        budget: of the joint training of each; stages 1 and 2 have their own numbers of steps and are shared.
        folder: for checkpoints and logs; created if needed.
        settings: of the recipe `paper`.
        device: where splats and networks live.
        seed: of all randomness.
        progress: show bars.

    Returns:
        models by the names of their rows.

    Raises:
        DatasetError: a shard is missing or corrupt.
        ModelFileError: a checkpoint in `folder` is broken, or of something else.
        TrainingError: a loss became NaN; names the step.
    """
    robot, settings = load_robot(data.plan), settings or PaperSettings()
    more: dict[str, Any] = {"device": device, "seed": seed, "progress": progress}
    stages = shared_stages(robot, data.canonical, settings, folder / "stages", **more)
    parts = (data.frames(part, geometry=False) for part in ("train", "validation"))
    train, validation = (kept_on(torch.device(device), part) for part in parts)
    frames = train, validation
    return {
        NO_DEFORM: train_from(
            stages, robot, frames, budget, folder / "no_deform", replace(settings, appearance=False), **more
        ),
        K_PLANES: train_kplanes(stages, robot, frames, budget, folder / "k_planes", **more),
    }


def shared_stages(
    robot: Robot,
    canonical: Frames,
    settings: PaperSettings,
    folder: Path,
    *,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> Mapping[str, Any]:
    """Stages 1 and 2 of the recipe `paper`, from the checkpoint in `folder` as far as it goes; arguments as there."""
    path = folder / CHECKPOINT
    state: dict[str, Any] = read_checkpoint(path) if path.is_file() else {}

    def keep(**more: Any) -> None:
        state.update(more)
        folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(path, state)

    first_stages(robot, canonical, settings, state, keep, device=device, seed=seed, progress=progress)
    return state


def train_from(
    stages: Mapping[str, Any],
    robot: Robot,
    frames: tuple[Frames, Frames],
    budget: Budget,
    folder: Path,
    settings: PaperSettings,
    *,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> SelfModel:
    """Stage 3 of the recipe `paper` after `stages`; `frames` are those to train on and those to validate with."""
    if not (folder / CHECKPOINT).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(folder / CHECKPOINT, stages)
    canonical = frames[1]  # not looked at: the checkpoint has that stage behind it
    return train_paper(
        robot,
        canonical,
        *frames,
        budget,
        settings,
        folder=folder,
        resume=True,
        device=device,
        seed=seed,
        progress=progress,
    )


def train_kplanes(
    stages: Mapping[str, Any],
    robot: Robot,
    frames: tuple[Frames, Frames],
    budget: Budget,
    folder: Path,
    *,
    device: str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> KPlanesModel:
    """K-planes from the same canonical splats, in the same loop, resumed from the checkpoint in `folder`."""
    path = folder / CHECKPOINT
    start = KPlanesModel.around(Parameters(**stages["canonical"]).to(device), robot.tree, seed=seed)
    resume = read_checkpoint(path) if path.is_file() else None
    if resume is not None and "fit" not in resume:
        raise ModelFileError(f"{path}: no checkpoint of K-planes")
    folder.mkdir(parents=True, exist_ok=True)
    with Log(folder, 0 if resume is None else resume["step"]) as log:
        model, _ = fit_jointly(
            start,
            *frames,
            budget,
            kplanes_settings(start),
            seed=seed,
            progress=progress,
            resume=resume,
            checkpoint=lambda state: write_checkpoint(path, state),
            log=log.write,
        )
    return model
