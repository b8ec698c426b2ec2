"""`train`: from a robot or a data set to a trained self-model, by one of two recipes."""

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kinesplat import __version__
from kinesplat.dataset.container import MANIFEST, Dataset
from kinesplat.dataset.frames import Frames
from kinesplat.dataset.generate import Report, load_robot, write_dataset
from kinesplat.dataset.lights import WORLD_LIGHT
from kinesplat.dataset.plan import Plan
from kinesplat.description import Robot
from kinesplat.devices import DeviceName, resolve_device
from kinesplat.errors import InputError, unknown
from kinesplat.self_model import SelfModel
from kinesplat.training.default import CHECKPOINT, DefaultSettings, fit_splats, has_many_lights, prepared
from kinesplat.training.field import train_with_field
from kinesplat.training.loop import Budget
from kinesplat.training.paper import PaperSettings, train_paper

Recipe = Literal["default", "paper"]
Skinning = Literal["links", "field"]
DEFAULT_MINUTES = 5.0
ON_THE_FLY = (500, 3)
"""Configurations and views that are rendered where no data set is given."""


@dataclass(frozen=True)
class TrainingOptions:
    """What both recipes share.

    Attributes:
        steps: number of steps, None: as many as `minutes` allow.
        minutes: wall clock of the training itself; `DEFAULT_MINUTES` where neither is given.
        configurations: rendered for training where no data set is given.
        views: of each of them.
        skinning: "links" binds every splat to its link, "field" blends links by a field of weights; None is the
            recipe's own way: links in "default", a field in "paper".
        default: settings of the default recipe.
        paper: settings of the paper's.
    """

    steps: int | None = None
    minutes: float | None = None
    configurations: int = ON_THE_FLY[0]
    views: int = ON_THE_FLY[1]
    skinning: Skinning | None = None
    default: DefaultSettings = field(default_factory=lambda: DefaultSettings())
    paper: PaperSettings = field(default_factory=PaperSettings)

    @property
    def budget(self) -> Budget:
        """When training ends."""
        minutes = DEFAULT_MINUTES if self.steps is None and self.minutes is None else self.minutes
        return Budget(self.steps, minutes)


def train(
    robot: Robot | str | Path,
    recipe: Recipe = "default",
    out: str | Path | None = None,
    *,
    options: TrainingOptions | None = None,
    seed: int = 0,
    resume: bool = False,
    device: DeviceName = "auto",
    packages: dict[str, str] | None = None,
    progress: bool = False,
) -> SelfModel:
    """Train a self-model.

    Beside `out`, the folder ``<out>.training`` keeps the checkpoint, ``log.csv`` and TensorBoard events, and, where no
    data set is given, the images. A run that was killed goes on with ``resume=True``.

    Args:
        robot: a loaded description, a name or path as `load_description` takes them, or the folder of a data set.
        recipe: "default" or "paper".
        out: model file to write; None: nothing is written.
        options: budget and settings.
        seed: of everything random.
        resume: go on from the checkpoint beside `out`; starts afresh where there is none.
        device: where to train.
        packages: folders of ROS packages by name, for descriptions that refer to them.
        progress: show a bar.

    Returns:
        the trained model, on the CPU; its `provenance` says how it was made.

    Raises:
        InputError: an unknown recipe; resuming without `out`; a file or folder that cannot be written.
        DescriptionError: the robot cannot be loaded.
        DatasetError: the data set is unfinished or broken.
        TrainingError: the loss became NaN; names the step.
    """
    if recipe not in get_args(Recipe):
        raise InputError(unknown("recipe", recipe, get_args(Recipe)))
    if resume and out is None:
        raise InputError("resume needs out: the checkpoint lies beside it")
    options = options or TrainingOptions()
    if options.skinning not in (None, *get_args(Skinning)):
        raise InputError(unknown("skinning", options.skinning, get_args(Skinning)))
    if (recipe, options.skinning) == ("paper", "links"):
        raise InputError("the recipe 'paper' learns a skinning field; it knows no skinning 'links'")
    budget = options.budget  # refuses one without end before anything is rendered
    with tempfile.TemporaryDirectory() if out is None else nullcontext(make_work_folder(out)) as name:
        folder = Path(name)
        data = images_of(robot, folder, options, packages or {}, seed, device=device)
        model = _by_recipe(recipe, data, options, budget, seed, folder, resume, device, progress)
        model = replace(
            model,
            provenance={
                **model.provenance,
                **_provenance(recipe, data, options, seed),
                "gaussians": len(model.parameters),
            },
        )
        if out is not None:
            model.save(out, half=recipe == "default")
    return model


def plan_of(robot: str, options: TrainingOptions, packages: dict[str, str], seed: int) -> Plan:
    """The pictures that are rendered where a robot is given instead of a data set."""
    return Plan(
        robot=robot,
        packages=tuple(sorted(packages.items())),
        configurations=options.configurations,
        views=options.views,
        test_configurations=0,
        seed=seed,
    )


def work_folder(out: str | Path) -> Path:
    """Where checkpoint, log and images of a model file lie."""
    return Path(f"{out}.training")


def make_work_folder(out: str | Path) -> Path:
    """Create it, so that a file that cannot be written is known before the work and not after.

    Raises:
        InputError: it cannot be created, or `out` is a folder.
    """
    folder = work_folder(out)
    if Path(out).is_dir():
        raise InputError(f"cannot write {out}: it is a folder")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the folder {folder}: {error.strerror}") from error
    return folder


def images_of(
    robot: Robot | str | Path,
    folder: Path,
    options: TrainingOptions,
    packages: dict[str, str],
    seed: int,
    report: Report | None = None,
    device: DeviceName = "auto",
) -> Dataset:
    """The data set given, or one rendered for the occasion into ``<folder>/images``, or what is missing of it.

    Args:
        robot: as in `train`.
        folder: of the run.
        options: how many configurations and views.
        packages: as in `train`.
        seed: of configurations and cameras.
        report: as in `write_dataset`.
        device: where rays are traced.
    """
    if not isinstance(robot, Robot) and (Path(robot) / MANIFEST).is_file():
        return Dataset.open(robot)
    if not isinstance(robot, Robot) and Path(robot).is_dir():
        raise InputError(f"{robot}: a folder without {MANIFEST}; expected a robot, or a folder of kinesplat dataset")
    source = robot.source if isinstance(robot, Robot) else str(robot)
    return write_dataset(folder / "images", plan_of(source, options, packages, seed), device=device, report=report)


def _by_recipe(
    recipe: Recipe,
    data: Dataset,
    options: TrainingOptions,
    budget: Budget,
    seed: int,
    folder: Path,
    resume: bool,
    device: DeviceName,
    progress: bool,
) -> SelfModel:
    robot, target = load_robot(data.plan), resolve_device(device)
    frames, validation = (data.frames(part, geometry=False) for part in ("train", "validation"))
    frames, validation = kept_on(target, frames), kept_on(target, validation)
    resume = resume and (folder / CHECKPOINT).is_file()
    if recipe == "paper":
        return train_paper(
            robot,
            data.canonical,
            frames,
            validation,
            budget,
            options.paper,
            folder=folder,
            resume=resume,
            device=str(target),
            seed=seed,
            progress=progress,
        ).to("cpu")
    start = SelfModel.from_description(robot, n=options.default.start, seed=seed).to(target)
    if options.skinning == "field":
        return train_with_field(
            start, frames, validation, budget, folder=folder, resume=resume, seed=seed, progress=progress
        ).to("cpu")
    start = prepared(start, options.default, _light_of(frames))
    return fit_splats(
        start,
        frames,
        validation,
        budget,
        options.default,
        seed=seed,
        folder=folder,
        resume=resume,
        progress=progress,
    ).to("cpu")


def kept_on(device: torch.device, frames: Frames) -> Frames:
    """The pictures on `device` if they take at most half of the memory that is free there; else where they are, and
    every step fetches its own."""
    if device.type != "cuda" or frames.nbytes > 0.5 * torch.cuda.mem_get_info(device)[0]:
        return frames
    return frames.to(device)


def _light_of(frames: Frames) -> Tensor | None:
    """The light that the model is made for: that of all pictures, or one of ours where they differ; None: headlight."""
    if frames.light is None:
        return None
    return torch.tensor(WORLD_LIGHT) if has_many_lights(frames) else frames.light[0]


def _provenance(recipe: Recipe, data: Dataset, options: TrainingOptions, seed: int) -> dict[str, Any]:
    plan, budget = data.plan, options.budget
    return {
        "recipe": recipe,
        "skinning": options.skinning or ("field" if recipe == "paper" else "links"),
        "budget": {"steps": budget.steps, "minutes": budget.minutes},
        "seed": seed,
        "light": plan.light,
        "images": plan.configurations * plan.views,
        "image_size": plan.size,
        "torch": torch.__version__,
        "kinesplat": __version__,
    }
