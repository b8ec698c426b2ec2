"""Training of self-models: train."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import tyro

from kinesplat.commands.common import DEFAULTS, CommonOptions, Output, device_of, err, out, packages_of, write_json
from kinesplat.commands.dataset import image_progress, image_reporter
from kinesplat.errors import InputError
from kinesplat.training.default import DefaultSettings
from kinesplat.training.recipes import TrainingOptions, images_of, make_work_folder, plan_of
from kinesplat.training.recipes import train as train_model


@dataclass(frozen=True)
class Splats:
    """Splats of recipe default; recipe paper grows them by itself."""

    gaussians: int | None = None
    """How many, 15000 unless given; more are sharper, and slower."""
    degree: Literal[0, 1, 2, 3] | None = None
    """Of their spherical harmonics, 3 unless given; 2 needs two thirds of the file."""


def train(
    robot: Annotated[str, tyro.conf.Positional],
    output: Output,
    recipe: Literal["default", "paper"] = "default",
    minutes: float | None = None,
    steps: int | None = None,
    configurations: int = 500,
    views: int = 3,
    skinning: Literal["links", "field"] | None = None,
    splats: Annotated[Splats, tyro.conf.OmitArgPrefixes] = Splats(),
    resume: bool = False,
    package: tuple[str, ...] = (),
    *,
    common: CommonOptions = DEFAULTS,
) -> None:
    """Train a self-model on pictures of many configurations.

    Beside the model, the folder OUTPUT.training keeps the checkpoint, log.csv, TensorBoard events (with
    kinesplat[train]), and the pictures where no data set was given. A run that was stopped or killed at any moment goes
    on with --resume. Training stops early when the validation pictures improve no more.

    Args:
        robot: folder made by kinesplat dataset; or a robot as in kinesplat build, whose pictures are rendered first.
        output: the model file to write (.safetensors).
        recipe: default (from the meshes, minutes), or paper (Liu et al. 2024: three stages, two networks).
        minutes: wall clock of the training; default 5, unless steps are given.
        steps: number of steps.
        configurations: how many to render where a robot is given.
        views: pictures of each of them.
        skinning: links binds every splat to one link; field blends links by a field of weights, learnt from the links
            of the meshes and then from the pictures, for bodies that do not come in rigid pieces. By default links,
            and field with recipe paper.
        splats: how many, and how their colours change with the direction.
        resume: go on from the checkpoint in OUTPUT.training; starts afresh where there is none.
        package: NAME=FOLDER of ROS packages that package:// refers to.
    """
    device_of(common)
    options = TrainingOptions(steps, minutes, configurations, views, skinning)
    options = replace(options, default=_sized(options.default, splats, recipe))
    _ = options.budget  # refuses one without end before anything is rendered
    packages = packages_of(package)
    total = sum(shard.images for shard in plan_of(robot, options, packages, common.seed).shards())
    folder = make_work_folder(output)
    with image_progress(total) as images:
        data = images_of(robot, folder, options, packages, common.seed, image_reporter(images, total), common.device)
    model = train_model(
        data.directory,
        recipe,
        output,
        options=options,
        seed=common.seed,
        resume=resume,
        device=common.device,
        progress=err.is_terminal,
    )
    made = model.provenance
    out.print(
        f"wrote {output}: {len(model.parameters)} Gaussians, {made.get('steps', '?')} steps, "
        f"validation PSNR {made.get('validation_psnr_db', '?')} dB; log and checkpoint in {folder}"
    )
    write_json(common.json, {"model": str(output), "training": str(folder), **made})


def _sized(settings: DefaultSettings, splats: Splats, recipe: str) -> DefaultSettings:
    """The recipe with another number of splats, or another degree.

    Raises:
        InputError: fewer than one splat, or splats for another recipe.
    """
    if recipe != "default" and splats != Splats():
        raise InputError(f"--gaussians and --degree are for recipe default; recipe {recipe} grows its splats by itself")
    if splats.gaussians is not None:
        if splats.gaussians < 1:
            raise InputError(f"--gaussians is {splats.gaussians}; expected at least 1")
        settings = replace(settings, start=splats.gaussians, gaussians=splats.gaussians)
    return settings if splats.degree is None else replace(settings, degree=splats.degree)
