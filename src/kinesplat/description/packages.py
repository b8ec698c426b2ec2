"""From the file names in a URDF to files: package://, file:// and relative paths."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote, urlparse
from xml.etree.ElementTree import ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import parse

from kinesplat.errors import DescriptionError

_SCHEMES = ("package", "file", "model")
_LEVELS_UP = 2
_SEARCH_DEPTH = 3


class PackageFinder:
    """Resolves file names of one URDF.

    A package is looked for in `packages`, then in the folders around the URDF itself, then in ``ROS_PACKAGE_PATH``,
    then in ``share`` of every prefix in ``AMENT_PREFIX_PATH`` and ``CMAKE_PREFIX_PATH``.
    """

    def __init__(self, urdf: Path, packages: Mapping[str, str | Path] | None = None) -> None:
        """`urdf` is the description's file; `packages` maps package names to folders and wins."""
        self.urdf = urdf
        self.packages = {name: Path(folder).expanduser() for name, folder in (packages or {}).items()}

    def folders(self, name: str) -> Iterator[Path]:
        """Folders that may be package `name`, best first."""
        if name in self.packages:
            yield self.packages[name]
            return
        for folder in self.urdf.absolute().parents:
            if folder.name == name or package_name(folder) == name:
                yield folder
            yield from _existing(folder / name)
        for entry in _path_variable("ROS_PACKAGE_PATH"):
            if entry.name == name or package_name(entry) == name:
                yield entry
            yield from _existing(entry / name)
            yield from (p for p in _packages_below(entry) if package_name(p) == name)
        for variable in ("AMENT_PREFIX_PATH", "CMAKE_PREFIX_PATH"):
            for prefix in _path_variable(variable):
                yield from _existing(prefix / "share" / name)

    def package(self, name: str) -> Path:
        """The folder of a package.

        Raises:
            DescriptionError: it is nowhere to be found.
        """
        for folder in self.folders(name):
            if folder.is_dir():
                return folder
        raise DescriptionError(
            f"{self.urdf}: package {name!r} not found; give its folder as packages={{{name!r}: ...}} "
            f"(--package {name}=FOLDER), or set ROS_PACKAGE_PATH or AMENT_PREFIX_PATH"
        )

    def file(self, name: str, element: str) -> Path:
        """The file that `name` in `element` means.

        Raises:
            DescriptionError: it does not exist, leaves its package, or has an unknown scheme.
        """
        scheme = urlparse(name).scheme if "://" in name else ""
        if scheme in ("package", "model"):
            return self._in_package(name, element)
        if scheme == "file":
            return self._existing_file(Path(unquote(urlparse(name).path)), name, element)
        if scheme:
            valid = ", ".join(f"{s}://" for s in _SCHEMES)
            raise DescriptionError(f"{self.urdf}: {element}: {name!r} has scheme {scheme}://; valid: {valid} or a path")
        if Path(name).is_absolute():
            return self._existing_file(Path(name), name, element)
        root = self._own_root()
        path = _normal(self.urdf.absolute().parent / name)
        if not path.is_relative_to(root):
            raise DescriptionError(f"{self.urdf}: {element}: {name!r} leads out of the description's folder {root}")
        return self._existing_file(path, name, element)

    def _in_package(self, name: str, element: str) -> Path:
        package, _, rest = name.split("://", 1)[1].partition("/")
        for folder in [self.package(package), *self.folders(package)]:
            path = _normal(folder.absolute() / unquote(rest))
            if not path.is_relative_to(_normal(folder.absolute())):
                raise DescriptionError(f"{self.urdf}: {element}: {name!r} leads out of package {package!r}")
            if path.is_file():
                return path
        raise DescriptionError(f"{self.urdf}: {element}: no file {name!r} in package {package!r} at {folder}")

    def _existing_file(self, path: Path, name: str, element: str) -> Path:
        if not path.is_file():
            raise DescriptionError(f"{self.urdf}: {element}: no file {name!r} ({path})")
        return path

    def _own_root(self) -> Path:
        """Folder that relative names must not leave: the package around the URDF, else two folders up."""
        parents = list(self.urdf.absolute().parents)
        return next(
            (p for p in parents[:5] if (p / "package.xml").is_file()), parents[min(_LEVELS_UP, len(parents) - 1)]
        )


def package_name(folder: Path) -> str | None:
    """Name in the folder's ``package.xml``, None when there is none."""
    manifest = folder / "package.xml"
    if not manifest.is_file():
        return None
    try:
        return (parse(manifest).findtext("name") or "").strip()
    except (ParseError, DefusedXmlException):
        return None


def _existing(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield folder


def _path_variable(name: str) -> list[Path]:
    return [Path(entry) for entry in os.environ.get(name, "").split(os.pathsep) if entry]


def _packages_below(folder: Path) -> Iterator[Path]:
    pattern = ""
    for _ in range(_SEARCH_DEPTH):
        pattern += "*/"
        yield from (manifest.parent for manifest in folder.glob(f"{pattern}package.xml"))


def _normal(path: Path) -> Path:
    """Without "..", by the text alone: packages may consist of links."""
    return Path(os.path.normpath(path))
