"""From what a user names (a path, a name, a MuJoCo object) to a MuJoCo specification."""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import mujoco
import mujoco_menagerie

from kinesplat.description.licence import licence_beside
from kinesplat.description.urdf import spec_of_urdf
from kinesplat.description.xacro_input import expanded
from kinesplat.description.xml_input import parsed, read_text
from kinesplat.errors import DescriptionError, unknown

ROBOTS = Path(__file__).parents[1] / "robots"
SUFFIXES = (".xml", ".mjcf", ".urdf", ".xacro")
_DEFAULT_FILES = {"shadow_hand": "right_hand.xml", "unitree_g1_37dof_2024": "g1.xml"}
"""Main file of folders that hold several robots, or that Menagerie's registry does not know."""


@dataclass(frozen=True)
class Options:
    """How files are read: folders of ROS packages by name, and arguments of xacro files."""

    packages: Mapping[str, str | Path] = field(default_factory=dict)
    xacro_args: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """A specification that compiles, and where it came from."""

    spec: mujoco.MjSpec
    name: str
    source: str
    licence: str = "unknown"
    warnings: tuple[str, ...] = ()

    def compile(self) -> mujoco.MjModel:
        """The compiled model.

        Raises:
            DescriptionError: MuJoCo refuses the specification; its complaint, in one line.
        """
        with quiet_mujoco():
            try:
                return _compiled(self.spec)
            except (ValueError, RuntimeError, mujoco.FatalError) as error:
                raise DescriptionError(f"{self.source}: {one_line(error)}") from error


def loaded(source: str | Path | mujoco.MjSpec, options: Options) -> Loaded:
    """Find and read a description.

    Raises:
        DescriptionError: the file or name does not exist, or the description is broken; the message says where.
    """
    if not isinstance(source, str | Path):
        return Loaded(source.copy(), source.modelname or "robot", "<MjSpec>")
    path = Path(source)
    if _is_path(source, path):
        return _from_file(path.expanduser(), path.name.split(".")[0], str(path), options)
    name, _, variant = str(source).partition("/")
    if name.endswith("_description"):
        return _from_file(_robot_descriptions_file(name), name, name, options)
    file = named_file(name, variant)
    return _from_file(file, name if not variant else f"{name}/{file.stem}", str(source), options)


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


def _compiled(spec: mujoco.MjSpec) -> mujoco.MjModel:
    """Compile without collisions, and, where a mesh is too flat for it, without inertias: neither is of use here.

    Which geoms can collide stays written in the model's `geom_contype` and `geom_conaffinity`.
    """
    collides = [(geom, geom.contype, geom.conaffinity) for geom in spec.geoms]
    for geom in spec.geoms:
        geom.contype, geom.conaffinity = 0, 0
    model = _compiled_shapes(spec)
    for geom, contype, conaffinity in collides:
        geom.contype, geom.conaffinity = contype, conaffinity
        if geom.id >= 0:
            model.geom_contype[geom.id], model.geom_conaffinity[geom.id] = contype, conaffinity
    return model


def _compiled_shapes(spec: mujoco.MjSpec) -> mujoco.MjModel:
    try:
        return spec.compile()
    except ValueError as error:
        if "inertia" not in str(error) and "volume" not in str(error):
            raise
        for mesh in spec.meshes:
            mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL
        for geom in spec.geoms:
            geom.typeinertia = mujoco.mjtGeomInertia.mjINERTIA_VOLUME
        return spec.compile()


@contextmanager
def quiet_mujoco() -> Iterator[None]:
    """Keep MuJoCo from printing its warnings and from writing MUJOCO_LOG.TXT into the current folder.

    They are about physics and about saving, neither of which happens here.
    """
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(_ignore)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        mujoco.set_mju_user_warning(before)


def _ignore(message: str) -> None:
    """Takes MuJoCo's warnings."""


def one_line(error: BaseException) -> str:
    """Message of an exception without line breaks."""
    return " ".join(str(error).split())


def _is_path(source: str | Path, path: Path) -> bool:
    if isinstance(source, Path) or path.is_absolute() or path.exists():
        return True
    name = str(source).partition("/")[0]
    known = name in names() or name.endswith("_description")
    return not known and (path.suffix != "" or str(source).startswith((".", "~")))


def _from_file(path: Path, name: str, source: str, options: Options) -> Loaded:
    suffix = path.suffix.lower()
    text = read_text(path)
    if suffix not in SUFFIXES:
        raise DescriptionError(f"{path}: unknown kind of file {path.suffix!r}; valid: {', '.join(SUFFIXES)}")
    if suffix == ".xacro":
        text = expanded(path, options.packages, options.xacro_args)
    elif suffix != ".urdf" and _root_tag(text) != "robot":
        return Loaded(_mjcf_spec(path, text), name, source, licence_beside(path))
    spec, assumed = spec_of_urdf(path, options.packages, text)
    return Loaded(spec, name, source, licence_beside(path), tuple(assumed))


def _mjcf_spec(path: Path, text: bytes) -> mujoco.MjSpec:
    parsed(text, str(path), "mujoco" if _root_tag(text) != "mujocoinclude" else "mujocoinclude")
    with quiet_mujoco():
        try:
            return mujoco.MjSpec.from_file(str(path))
        except (ValueError, RuntimeError, mujoco.FatalError) as error:
            raise DescriptionError(f"{path}: {one_line(error)}") from error


def _root_tag(text: bytes) -> str:
    """Name of the first element, without parsing the rest."""
    rest = text
    while (start := rest.find(b"<")) >= 0:
        rest = rest[start:]
        if rest.startswith(b"<!--"):
            rest = rest.partition(b"-->")[2]
        elif rest.startswith((b"<?", b"<!")):
            rest = rest.partition(b">")[2]
        else:
            word = rest[1:200].replace(b">", b" ").replace(b"/", b" ").split()
            return word[0].decode(errors="replace") if word else ""
    return ""


def _robot_descriptions_file(name: str) -> Path:
    """The file of a ``robot_descriptions`` name, which that package downloads on first use."""
    if importlib.util.find_spec("robot_descriptions") is None:
        raise DescriptionError(f"robot {name!r} needs robot_descriptions: pip install 'kinesplat[descriptions]'")
    try:
        module = importlib.import_module(f"robot_descriptions.{name}")
    except ModuleNotFoundError as error:
        raise DescriptionError(unknown("robot of robot_descriptions", name, _robot_descriptions_names())) from error
    except (OSError, ImportError, RuntimeError, ValueError) as error:
        raise DescriptionError(f"robot {name!r}: {one_line(error)}") from error
    paths = (getattr(module, attribute, None) for attribute in ("URDF_PATH", "MJCF_PATH", "XACRO_PATH"))
    file = next((p for p in paths if p), None)
    if file is None:
        raise DescriptionError(f"robot {name!r}: robot_descriptions knows no URDF, MJCF or xacro file of it")
    return Path(file)


def _robot_descriptions_names() -> list[str]:
    spec = importlib.util.find_spec("robot_descriptions")
    folders = spec.submodule_search_locations if spec is not None else None
    return sorted(p.stem for folder in folders or [] for p in Path(folder).glob("*_description.py"))


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
