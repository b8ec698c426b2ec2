"""Images of a robot for training and evaluation: dataset."""

import time
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kinesplat.commands.common import DEFAULTS, CommonOptions, Output, device_of, err, out, packages_of, write_json
from kinesplat.dataset.container import Dataset
from kinesplat.dataset.device import Renderer
from kinesplat.dataset.generate import Report, write_dataset
from kinesplat.dataset.plan import Plan
from kinesplat.dataset.tracer import traced_on
from kinesplat.devices import DeviceName
from kinesplat.errors import BackendError

SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Contents:
    """What the data set holds."""

    configurations: int = 500
    """Number of configurations to train on."""
    views: int = 3
    """Images of each of them."""
    test_configurations: int | None = None
    """Number of configurations to test on; default: a tenth of those to train on."""
    test_views: int | None = None
    """Images of each of them; default: as many as in training."""
    canonical_views: int = 48
    """Images of the canonical configuration."""
    size: int = 256
    """Image width and height [px]."""
    light: Literal["headlight", "world", "random"] = "headlight"
    """A light at the camera, one fixed in the world with shadows, or another such for every image."""
    samples: int = 4
    """Rays a pixel; alpha is the share of them that hit."""
    span: tuple[float, float] = (0.5, 1.0)
    """Share of the frame that the robot spans, from and to."""
    near: float = 0.1
    """Share of the cameras that come nearer than that."""
    renderer: Literal["warp", "gl"] = "warp"
    """Ray traced by mujoco_warp, without GL; or MuJoCo's own OpenGL renderer (MUJOCO_GL=egl without a screen)."""
    allow_collisions: bool = False
    """Also keep configurations in which the robot runs into itself."""


def dataset(
    robot: Annotated[str, tyro.conf.Positional],
    output: Output,
    contents: Annotated[Contents, tyro.conf.OmitArgPrefixes] = Contents(),
    processes: int = 1,
    package: tuple[str, ...] = (),
    *,
    common: CommonOptions = DEFAULTS,
) -> None:
    """Render images of a robot with exact cameras, masks, depth and link ids, for training and evaluation.

    Configurations are uniform within the joint limits and free of collisions; every image has its own camera. A run
    that was stopped or killed goes on when the same command is given again. docs/dataset.md describes the files.

    Args:
        robot: path to a URDF, xacro or MJCF file, or a name (kinearm, a Menagerie or robot_descriptions name).
        output: folder for the data; created if needed.
        processes: how many processes render at a time.
        package: NAME=FOLDER of ROS packages that package:// refers to.
    """
    device_of(replace(common, device="cpu"))
    check_tracing(common.device, contents.renderer)
    plan = _plan(robot, contents, package, common.seed)
    total = sum(shard.images for shard in plan.shards())
    with image_progress(total) as progress:
        made = write_dataset(output, plan, processes, common.device, image_reporter(progress, total))
    result = _summary(made)
    megabytes, kilobytes = 1e-6 * result["bytes"], 1e-3 * result["bytes_per_image"]
    counts = f"{result['images']} images of {result['configurations']} configurations"
    out.print(f"wrote {output}: {counts} ({megabytes:.1f} MB, {kilobytes:.1f} kB an image)")
    out.print(_collisions_sentence(made, result["rejected"]))
    write_json(common.json, result)


def check_tracing(device: DeviceName, renderer: Renderer) -> None:
    """Refuse a GPU that is not there, or that OpenGL would not ask for.

    Raises:
        BackendError: says which.
    """
    if device == "cuda" and renderer == "gl":
        raise BackendError("--device cuda: --renderer gl draws where OpenGL's driver does; choose cpu or auto")
    if device == "cuda":
        traced_on(device)


def _plan(robot: str, contents: Contents, package: tuple[str, ...], seed: int) -> Plan:
    tests = contents.configurations // 10 if contents.test_configurations is None else contents.test_configurations
    return Plan(
        robot=robot,
        packages=tuple(sorted(packages_of(package).items())),
        configurations=contents.configurations,
        views=contents.views,
        test_configurations=tests,
        test_views=contents.views if contents.test_views is None else contents.test_views,
        canonical_views=contents.canonical_views,
        size=contents.size,
        light=contents.light,
        samples=contents.samples,
        span=contents.span,
        near=contents.near,
        collisions=contents.allow_collisions,
        renderer=contents.renderer,
        seed=seed,
    )


def _summary(made: Dataset) -> dict[str, Any]:
    """Counts and sizes of a finished data set."""
    shards = made.plan.shards()
    images = sum(shard.images for shard in shards)
    size = sum((made.directory / shard.file_name).stat().st_size for shard in shards)
    return {
        "directory": str(made.directory),
        "robot": str(made.manifest["robot"]),
        "configurations": sum(shard.configurations for shard in shards),
        "images": images,
        "shards": len(shards),
        "bytes": size,
        "bytes_per_image": size / images,
        "rejected": made.rejected(),
    }


def _collisions_sentence(made: Dataset, rejected: int) -> str:
    collisions = made.manifest["collisions"]
    if made.plan.collisions:
        return "collisions: not looked for, as asked"
    if not collisions["checked"]:
        return "collisions: not looked for, the description has no shapes that can collide"
    return f"collisions: {rejected} configurations rejected ({collisions['geom_pairs']} pairs of shapes looked at)"


def image_progress(total: int) -> Progress:
    """A bar with rate and time left, where somebody looks at it."""
    columns = (
        TextColumn("images"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    progress = Progress(*columns, console=err, disable=not err.is_terminal, transient=True, speed_estimate_period=120)
    progress.add_task("images", total=total, rate="")
    return progress


def image_reporter(progress: Progress, total: int) -> Report:
    """Moves the bar, or prints a line now and then where there is no terminal."""
    start, done, there, last = time.monotonic(), 0, 0, time.monotonic()

    def report(images: int) -> None:
        nonlocal done, there, last, start
        now, first = time.monotonic(), done == there == 0 and not progress.tasks[0].completed
        done += images
        if first:
            there, start = done, now
        rate = (done - there) / max(now - start, 1e-9)
        progress.update(progress.task_ids[0], completed=done, rate=f"{rate:.1f}/s" if done > there else "")
        if not err.is_terminal and rate > 0 and (now - last > SECONDS_BETWEEN_LINES or done == total):
            last = now
            err.print(f"{done} of {total} images, {rate:.1f} a second, {(total - done) / rate:.0f} s left")

    return report
