"""The command line: `kinesplat COMMAND --help` is a manual in itself."""

import functools
import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from kinesplat import benchmark as benchmark_module
from kinesplat import demo as demo_module
from kinesplat import zoo
from kinesplat.camera import Camera
from kinesplat.description import inspect as inspect_description
from kinesplat.description import inspection_text, load_description
from kinesplat.errors import BackendError, InputError, KinesplatError, unknown
from kinesplat.files import colours_of, read_image, read_mask, write_png, written_whole
from kinesplat.inverse import reconstruct as reconstruct_q
from kinesplat.report import write_fit_pictures
from kinesplat.self_model import SelfModel

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
app = tyro.extras.SubcommandApp()
out, err = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)

Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
Output = Annotated[Path, tyro.conf.arg(aliases=["-o"])]


@dataclass(frozen=True)
class Common:
    """Options of every command."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; a device that is absent is an error, never a fall back."""
    seed: int = 0
    """Seed of everything random."""
    json: Path | None = None
    """Also write the machine-readable result to this file."""


CommonOptions = Annotated[Common, tyro.conf.OmitArgPrefixes]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command. Parsing only binds its arguments, so that usage errors are told from its own."""

    @functools.wraps(function)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(function, *args, **kwargs)

    app.command(bind)
    return function


@command
def demo(
    output: Annotated[Path, tyro.conf.arg(name="out")] = Path("demo"), *, common: CommonOptions = Common()
) -> None:
    """Recover a real robot's joints (and camera) from packaged pictures, on a CPU, without network or GL.

    Writes pictures, films, report.html and report.json into the output folder.

    Args:
        output: folder for the results; created if needed.
    """
    device_of(common)
    report = demo_module.run(output, seed=common.seed, console=out)
    write_json(common.json, report)


@command
def build(
    robot: Annotated[str, tyro.conf.Positional],
    output: Output,
    n: int = 10_000,
    package: tuple[str, ...] = (),
    *,
    common: CommonOptions = Common(),
) -> None:
    """Make a self-model from a robot's meshes, without training.

    Args:
        robot: path to a URDF, xacro or MJCF file, or a name (kinearm, a Menagerie or robot_descriptions name).
        output: the model file to write (.safetensors).
        n: number of Gaussians.
        package: NAME=FOLDER of ROS packages that package:// refers to.
    """
    device_of(common)
    model = SelfModel.from_description(load_description(robot, packages=packages_of(package)), n=n, seed=common.seed)
    model.save(output)
    out.print(
        f"wrote {output}: {len(model.parameters)} Gaussians on {len(model.tree.link_names)} links, dof {model.tree.dof}"
    )
    write_json(common.json, {"model": str(output), "gaussians": len(model.parameters), "dof": model.tree.dof})


@command
def inspect(
    robot: Annotated[str, tyro.conf.Positional],
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    package: tuple[str, ...] = (),
    *,
    common: CommonOptions = Common(),
) -> None:
    """Show what a description contains: links, joints with limits, couplings, meshes, colours, warnings.

    Args:
        robot: path to a URDF, xacro or MJCF file, or a name (kinearm, a Menagerie or robot_descriptions name).
        output: also write a picture of the robot (.png).
        package: NAME=FOLDER of ROS packages that package:// refers to.
    """
    device_of(common)
    loaded = load_description(robot, packages=packages_of(package))
    out.print(inspection_text(loaded), markup=False)
    if output is not None:
        model = SelfModel.from_description(loaded, n=20_000, seed=common.seed)
        q = model.tree.q_canonical.float()
        picture = model.render(q, Camera.framing(model.posed(q).means, width=768, height=768)).rgb
        assert picture is not None
        write_png(output, picture)
        out.print(f"wrote {output}")
    write_json(common.json, inspect_description(loaded))


@command
def benchmark(seconds: float = 1.0, threads: tuple[int, ...] = (1, 2), *, common: CommonOptions = Common()) -> None:
    """Measure the rasteriser on this machine: forward, backward, pose-only steps, share of peak, against the reference.

    Args:
        seconds: time for each figure [s].
        threads: thread counts to measure with.
    """
    device_of(common)
    report = benchmark_module.run(seconds=seconds, threads=threads, progress=err.print)
    out.print(benchmark_module.table(report), markup=False)
    write_json(common.json, report)


@command
def render(
    model: Model,
    output: Output,
    q: tuple[float, ...] | None = None,
    camera: Path | None = None,
    size: int = 512,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
    mask: bool = False,
    depth: bool = False,
    link_id: bool = False,
    *,
    common: CommonOptions = Common(),
) -> None:
    """Render a self-model to a PNG.

    Args:
        model: model file, or the name of a packaged model.
        output: the picture to write (.png); masks and the like stand beside it as NAME_mask.png, ...
        q: joint values [rad]/[m] in the order of `kinesplat models NAME`; default: the canonical configuration.
        camera: JSON file with K, T_cam_world, width, height; default: a camera that frames the robot.
        size: image size [px] of the default camera.
        background: RGB in [0, 1].
        mask: also write the alpha channel.
        depth: also write the depth in millimetres, 16 bit.
        link_id: also write the link ids as colours.
    """
    device_of(common)
    loaded = load_model(model)
    joints = loaded.tree.q_canonical.float() if q is None else torch.tensor(q)
    view = (
        Camera.framing(loaded.posed(joints).means, width=size, height=size)
        if camera is None
        else Camera.from_json(camera)
    )
    if view.batch_shape:
        raise InputError(f"{camera} holds a batch of cameras {view.batch_shape}; render takes one")
    loaded.check_camera(joints, view)
    image = loaded.render(joints, view, background, outputs=("rgb", "alpha", "depth", "link_id"))
    assert image.rgb is not None
    written = [write_png(output, image.rgb)]
    if mask and image.alpha is not None:
        written.append(write_png(output.with_name(f"{output.stem}_mask.png"), image.alpha))
    if depth and image.depth is not None:
        millimetres = (image.depth * 1000.0).round().clamp(0, 65535).to(torch.int32)
        written.append(write_png(output.with_name(f"{output.stem}_depth.png"), millimetres))
    if link_id and image.link_id is not None:
        written.append(write_png(output.with_name(f"{output.stem}_link_id.png"), colours_of(image.link_id)))
    for path in written:
        out.print(f"wrote {path}")
    write_json(common.json, {"q": joints.tolist(), "camera": view.to_json(), "files": [str(p) for p in written]})


@command
def reconstruct(
    model: Model,
    images: Annotated[tuple[Path, ...], tyro.conf.Positional],
    camera: Path,
    mask: tuple[Path, ...] = (),
    q_init: tuple[float, ...] | None = None,
    optimize_camera: bool = False,
    starts: int | None = None,
    colour_weight: float = 1.0,
    output: Output = Path("reconstruct"),
    *,
    common: CommonOptions = Common(),
) -> None:
    """Recover joint values (and the camera) from one picture, or several views of ONE configuration.

    Writes fit.json, overlay pictures and a film into the output folder. Exits with 1 when the fit failed.

    Args:
        model: model file, or the name of a packaged model.
        images: picture files.
        camera: JSON file with K, T_cam_world, width, height, or a list of such, one per picture.
        mask: one mask per picture, white on the robot; without masks the background must be of one colour.
        q_init: joint values to start from, right within about 0.3 rad; default: search all configurations.
        optimize_camera: also move the camera, starting from the given one.
        starts: number of starts that are optimised; default 16, or 48 without q_init.
        colour_weight: weight of the colours against the mask; 0.1 for photographs whose light is not a headlight.
        output: folder for the results; created if needed.
    """
    device_of(common)
    loaded = load_model(model)
    if not images:
        raise InputError("no picture given: kinesplat reconstruct MODEL IMAGE... --camera FILE")
    pictures = torch.stack(same_size([read_image(p) for p in images], images))
    masks = torch.stack(same_size([read_mask(p) for p in mask], mask)) if mask else None
    make_folder(output)
    fit = reconstruct_q(
        loaded,
        pictures,
        Camera.from_json(camera),
        masks=masks,
        optimize_camera=optimize_camera,
        starts=starts,
        colour_weight=colour_weight,
        q_init=None if q_init is None else torch.tensor(q_init),
        seed=common.seed,
        progress=err.is_terminal,
    )
    for view, path in enumerate(images):
        write_fit_pictures(loaded, pictures[view], fit, output, f"{view}_{path.stem}", view)
    write_json(output / "fit.json", fit.to_json())
    out.print(fit.report())
    out.print(f"wrote {output / 'fit.json'} and pictures in {output}")
    write_json(common.json, fit.to_json())
    if fit.verdict == "failed":
        sys.exit(EXIT_FAILED)


@command
def models(name: Annotated[str | None, tyro.conf.Positional] = None, *, common: CommonOptions = Common()) -> None:
    """List the packaged self-models, or the joints of one model.

    Args:
        name: packaged model or model file; default: list all packaged ones.
    """
    device_of(common)
    if name is not None:
        return describe(load_model(name), name, common)
    rows = [{"name": n, **zoo.card(n)} for n in zoo.names()]
    table = Table("name", "dof", "Gaussians", "licence of the description")
    for row in rows:
        table.add_row(row["name"], str(row["dof"]), str(row["gaussians"]), row["licence"])
    out.print(table)
    write_json(common.json, {"models": rows})


def describe(model: SelfModel, name: str, common: Common) -> None:
    """Print the joints of a model with their limits."""
    tree = model.tree
    table = Table("joint", "lower", "upper", "canonical", title=name)
    rows = list(
        zip(tree.joint_names, tree.q_lower.tolist(), tree.q_upper.tolist(), tree.q_canonical.tolist(), strict=True)
    )
    for joint, *values in rows:
        table.add_row(joint, *(f"{v:+.4f}" for v in values))
    out.print(table)
    keys = ("joint", "lower", "upper", "canonical")
    write_json(common.json, {"joints": [dict(zip(keys, row, strict=True)) for row in rows]})


def load_model(name: str) -> SelfModel:
    """A model file, or a packaged model by name.

    Raises:
        KinesplatError: neither exists, or the file is broken.
    """
    if Path(name).suffix or Path(name).is_file():
        return SelfModel.load(name)
    if name not in zoo.names():
        raise InputError(unknown("model", name, zoo.names()) + "; or give a .safetensors file made by kinesplat build")
    return zoo.load(name)


def device_of(common: Common) -> torch.device:
    """The device asked for.

    Raises:
        BackendError: it is not there.
    """
    if not 0 <= common.seed < 2**31:
        raise InputError(f"--seed {common.seed}: expected 0 to {2**31 - 1}")
    torch.manual_seed(common.seed)
    if common.device == "cuda":
        raise BackendError("--device cuda: this version has no CUDA backend yet; choose cpu or auto")
    return torch.device("cpu")


def same_size(pictures: list[torch.Tensor], paths: tuple[Path, ...]) -> list[torch.Tensor]:
    """The pictures, once it is sure that they have one size."""
    for picture, path in zip(pictures, paths, strict=True):
        if picture.shape[:2] != pictures[0].shape[:2]:
            sizes = [f"{p.shape[1]} x {p.shape[0]} px" for p in (picture, pictures[0])]
            raise InputError(f"{path} is {sizes[0]}, but {paths[0]} is {sizes[1]}; views need one size")
    return pictures


def packages_of(options: tuple[str, ...]) -> dict[str, str]:
    """ROS packages given as NAME=FOLDER.

    Raises:
        InputError: an entry has another form.
    """
    pairs = [option.partition("=") for option in options]
    wrong = [option for option, (name, _, folder) in zip(options, pairs, strict=True) if not (name and folder)]
    if wrong:
        raise InputError(f"--package {wrong[0]!r}: expected NAME=FOLDER")
    return {name: folder for name, _, folder in pairs}


def make_folder(path: Path) -> None:
    """Create an output folder.

    Raises:
        InputError: it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the folder {path}: {error.strerror}") from error


def write_json(path: Path | None, data: dict[str, Any]) -> None:
    """Write a result file whole, if one was asked for."""
    if path is not None:
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def main() -> None:
    """Entry point: 0 on success, 2 with one line on bad usage or input, 130 when interrupted."""
    usage = io.StringIO()
    try:
        with redirect_stderr(usage):
            run = app.cli(
                prog="kinesplat", description="A robot's picture, differentiable: build, render, reconstruct."
            )
    except SystemExit as end:
        if end.code:
            words = " ".join(word for word in usage.getvalue().split() if not set(word) <= set("─━-╭╮╰╯│|"))
            err.print(f"kinesplat: {words}", markup=False)
        raise
    try:
        run()
    except KinesplatError as error:
        err.print(f"kinesplat: {error}", markup=False)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        err.print("kinesplat: interrupted")
        sys.exit(EXIT_INTERRUPTED)
