"""load_description: from a path, a name or a compiled model to a Robot."""

import os
from pathlib import Path

import mujoco
import mujoco_menagerie

from kinesplat.description.licence import licence_beside
from kinesplat.description.model import robot_from_model
from kinesplat.description.robot import Robot
from kinesplat.description.urdf import spec_of_urdf
from kinesplat.errors import DescriptionError, unknown

ROBOTS = Path(__file__).parents[1] / "robots"
MJCF_SUFFIXES = (".xml", ".mjcf")
_DEFAULT_FILES = {"shadow_hand": "right_hand.xml", "unitree_g1_37dof_2024": "g1.xml"}
"""Main file of folders that hold several robots, or that Menagerie's registry does not know."""


def load_description(source: str | Path | mujoco.MjModel | mujoco.MjSpec) -> Robot:
    """Load a robot.

    Args:
        source: a path to ``.xml`` or ``.mjcf``; the name of a packaged robot ("kinearm") or of a MuJoCo Menagerie
            robot ("franka_emika_panda", another file of the same robot as "franka_emika_panda/hand"); a compiled
            ``mujoco.MjModel``, or a ``mujoco.MjSpec``. Menagerie robots come from ``MENAGERIE_ROOT`` when it is set.

    Raises:
        DescriptionError: the file or name does not exist, or the description is broken; the message says where.
    """
    if isinstance(source, mujoco.MjModel):
        return robot_from_model(source, _model_name(source), "<MjModel>", "unknown")
    if isinstance(source, mujoco.MjSpec):
        model = compiled(source, "<MjSpec>")
        return robot_from_model(model, _model_name(model), "<MjSpec>", "unknown")
    path = Path(source)
    if _is_path(source, path):
        return _load_file(path, path.stem, str(path))
    name, _, variant = str(source).partition("/")
    file = named_file(name, variant)
    return _load_file(file, name if not variant else f"{name}/{file.stem}", str(source))


def names() -> list[str]:
    """Every name that `load_description` knows without a path; some may need a download."""
    packaged = [p.name for p in ROBOTS.iterdir() if (p / f"{p.name}.xml").is_file()] if ROBOTS.is_dir() else []
    return sorted({*packaged, *mujoco_menagerie.names(), *_local_menagerie()})


def named_file(name: str, variant: str = "") -> Path:
    """The MJCF file of a robot's name; `variant` picks another file of the same robot, with or without ``.xml``."""
    folder = ROBOTS / name
    if not (folder / f"{name}.xml").is_file():
        folder = _menagerie_folder(name)
    if not variant:
        return folder / _default_file(name, folder)
    files = {p.stem: p for p in sorted(folder.glob("*.xml"))}
    stem = variant.removesuffix(".xml")
    if stem not in files:
        raise DescriptionError(unknown(f"file of robot {name}", variant, files))
    return files[stem]


def compiled(spec: mujoco.MjSpec, source: str) -> mujoco.MjModel:
    """Compile `spec`, MuJoCo's complaint in one line."""
    try:
        return spec.compile()
    except (ValueError, mujoco.FatalError) as error:
        raise DescriptionError(f"{source}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Message of an exception without line breaks."""
    return " ".join(str(error).split())


def _is_path(source: str | Path, path: Path) -> bool:
    if isinstance(source, Path) or path.is_absolute() or path.exists():
        return True
    known = str(source).partition("/")[0] in names()
    return not known and (path.suffix != "" or str(source).startswith((".", "~")))


def _load_file(path: Path, name: str, source: str) -> Robot:
    path = path.expanduser()
    if not path.is_file():
        raise DescriptionError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    if path.suffix.lower() == ".urdf":
        spec, warnings = spec_of_urdf(path)
        return robot_from_model(compiled(spec, str(path)), name, source, licence_beside(path), tuple(warnings))
    if path.suffix.lower() not in MJCF_SUFFIXES:
        raise DescriptionError(f"{path}: unknown kind of file {path.suffix!r}; valid: {', '.join(MJCF_SUFFIXES)}")
    try:
        model = mujoco.MjModel.from_xml_path(str(path))
    except (ValueError, mujoco.FatalError) as error:
        raise DescriptionError(f"{path}: {one_line(error)}") from error
    return robot_from_model(model, name, source, licence_beside(path))


def _model_name(model: mujoco.MjModel) -> str:
    return model.names[: model.names.index(b"\0")].decode() or "robot"


def _local_menagerie() -> list[str]:
    root = os.environ.get("MENAGERIE_ROOT")
    if not root or not Path(root).is_dir():
        return []
    return [p.name for p in Path(root).iterdir() if any(p.glob("*.xml"))]


def _menagerie_folder(name: str) -> Path:
    if name in _local_menagerie():
        return Path(os.environ["MENAGERIE_ROOT"]) / name
    if name not in mujoco_menagerie.names():
        raise DescriptionError(unknown("robot", name, names()))
    try:
        return mujoco_menagerie.get(name).path()
    except mujoco_menagerie.MenagerieError as error:
        raise DescriptionError(f"robot {name}: {one_line(error)}") from error


def _default_file(name: str, folder: Path) -> str:
    if name in _DEFAULT_FILES:
        return _DEFAULT_FILES[name]
    if name in mujoco_menagerie.names():
        robot = mujoco_menagerie.get(name)
        file = robot.entry(robot.default_model).file
        if (folder / file).is_file():
            return file
    files = sorted(p.name for p in folder.glob("*.xml") if "scene" not in p.stem and "keyframe" not in p.stem)
    preferred = [f"{name}.xml", "robot.xml", f"{name.split('_')[-1]}.xml"]
    return next((f for f in preferred if f in files), files[0])
