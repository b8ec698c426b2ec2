"""The self-models that come with the package. How each was made: ``docs/models.md``."""

from pathlib import Path
from typing import Any

from kinesplat.errors import InputError, unknown
from kinesplat.model_file import read_header
from kinesplat.self_model import SelfModel

FOLDER = Path(__file__).parent / "models"


def names() -> list[str]:
    """Names of the packaged self-models."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def load(name: str) -> SelfModel:
    """A packaged self-model.

    Raises:
        InputError: there is none of that name; lists the names that are near, then all.
        ModelFileError: its file is damaged.
    """
    return SelfModel.load(_path(name))


def card(name: str) -> dict[str, Any]:
    """Provenance of a packaged self-model: robot, dof, gaussians, licence of the description, recipe, seed.

    Raises:
        InputError: there is none of that name.
        ModelFileError: its file is damaged.
    """
    return read_header(_path(name))["provenance"]


def _path(name: str) -> Path:
    if name not in names():
        raise InputError(unknown("packaged model", name, names()))
    return FOLDER / f"{name}.safetensors"
