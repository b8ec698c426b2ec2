"""xacro files as URDF text, through the xacro package, without a ROS installation."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.parsers.expat import ExpatError

from kinesplat.description.packages import PackageFinder
from kinesplat.errors import DescriptionError

_XACRO_ERRORS = (
    ExpatError, OSError, ValueError, KeyError, NameError, TypeError, AttributeError, SyntaxError, ArithmeticError,
    RuntimeError, IndexError,
)  # fmt: skip


def expanded(path: Path, packages: Mapping[str, str | Path], arguments: Mapping[str, str]) -> str:
    """URDF text of a xacro file; `arguments` are its ``name:=value`` pairs.

    ``$(find package)`` looks where `PackageFinder` does. A xacro file holds Python expressions: expand only files
    that you would run.

    Raises:
        DescriptionError: the xacro package is missing, or it refuses the file.
    """
    try:
        import xacro
    except ImportError as error:
        raise DescriptionError(f"{path}: xacro files need xacro: pip install 'kinesplat[descriptions]'") from error
    with _find_in(xacro, PackageFinder(path, packages)):
        try:
            document: Any = xacro.process_file(str(path), mappings=dict(arguments))
            return document.toxml()
        except (xacro.XacroException, *_XACRO_ERRORS) as error:
            raise DescriptionError(f"{path}: xacro: {' '.join(str(error).split())}") from error
        except SystemExit as error:
            raise DescriptionError(f"{path}: xacro gave up on the file") from error


@contextmanager
def _find_in(xacro: Any, finder: PackageFinder) -> Iterator[None]:
    """Have ``$(find name)`` answered by `finder`; the xacro package itself asks ROS."""
    from xacro import substitution_args

    original = substitution_args._eval_find
    substitution_args._eval_find = lambda package: str(finder.package(package))
    try:
        yield
    finally:
        substitution_args._eval_find = original
