"""What the commands share: options, consoles, reading models, writing results."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from kinesplat import zoo
from kinesplat.devices import resolve_device
from kinesplat.errors import BackendError, InputError, unknown
from kinesplat.files import written_whole
from kinesplat.self_model import SelfModel

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)

Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
Output = Annotated[Path, tyro.conf.arg(aliases=["-o"])]


@dataclass(frozen=True)
class Common:
    """Options of every command."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; a device that is absent, or that the command cannot use, is an error, never a fall back."""
    seed: int = 0
    """Seed of everything random."""
    json: Path | None = None
    """Also write the machine-readable result to this file."""


CommonOptions = Annotated[Common, tyro.conf.OmitArgPrefixes]
DEFAULTS = Common()


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
    return resolve_device(common.device)


def cpu_of(common: Common) -> torch.device:
    """The CPU, for commands that compute nowhere else.

    Raises:
        BackendError: a GPU was asked for.
    """
    device_of(common)
    if common.device == "cuda":
        raise BackendError("--device cuda: this command computes on the CPU alone; choose cpu or auto")
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


def write_json(path: Path | None, data: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Write a result file whole, if one was asked for."""
    if path is not None:
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
