"""Loading other people's libraries and weights: what is absent is named with the command that brings it.

Weights are never fetched unasked: `pretrained` reads folders and the local cache of the Hugging Face hub alone, and its
error holds the one command that fills that cache.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from kinesplat.errors import BackendError, InputError


def library(name: str, extra: str = "models") -> Any:
    """An optional package, or a module of one (``library("diffusers")``, ``library("transformers.models.clip")``).

    Args:
        name: what to import.
        extra: the extra of kinesplat that installs it.

    Raises:
        BackendError: it is not installed, or what it needs is not; says what to install.
    """
    try:
        return import_module(name)
    except ImportError as error:
        reason = "" if isinstance(error, ModuleNotFoundError) else f" ({error})"
        raise absent(f"{name.partition('.')[0]}{reason}", f'pip install "kinesplat[{extra}]"') from error


def pretrained(kind: Any, source: str | Path, *, files: Sequence[str] = (), **options: Any) -> Any:
    """``kind.from_pretrained(source)`` without network access, with errors that say what to do.

    Args:
        kind: a class with ``from_pretrained``, of transformers, diffusers, peft, ...
        source: a folder made by ``save_pretrained``, or the identifier of a model on the Hugging Face hub, fetched
            before.
        files: patterns of the files that are needed of a large repository, for the command in the error.
        options: passed on: ``dtype``, ``subfolder``, ``variant``, ...

    Raises:
        InputError: the folder does not exist, or does not hold a `kind` that can be read.
        BackendError: the weights are not in the cache, or are incomplete; says how to fetch them. Or a package that
            this model needs is not installed.
    """
    name, local = getattr(kind, "__name__", str(kind)), Path(source).expanduser()
    if not local.is_dir():
        if _is_path(str(source)):
            raise InputError(f"{source}: no such folder; give one made by save_pretrained, or a name like owner/model")
        local = _cached(str(source), files, options.pop("revision", None))
    try:
        return kind.from_pretrained(str(local), local_files_only=True, **options)
    except ImportError as error:  # it says itself which package its tokenizer, or the like, needs
        raise BackendError(f"{source}: {' '.join(str(error).split())}") from error
    except _broken() as error:
        reason = " ".join(str(error).split())[:300]
        if Path(source).expanduser().is_dir():
            raise InputError(f"{source}: holds no {name} that can be read ({reason})") from error
        raise absent(f"a complete {name} of {source} ({reason})", fetching(str(source), files)) from error


def fetching(identifier: str, files: Sequence[str] = ()) -> str:
    """The command that fetches a model of the Hugging Face hub into the local cache."""
    return f"hf download {identifier}" + "".join(f' --include "{pattern}"' for pattern in files)


def absent(what: str, command: str) -> BackendError:
    """The error for something that is not on this machine, with the command that brings it."""
    return BackendError(f"{what}: not on this machine; get it with: {command}")


def _is_path(source: str) -> bool:
    """Whether it cannot be an identifier ``owner/name``."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source


def _cached(identifier: str, files: Sequence[str], revision: str | None) -> Path:
    """The folder of the hub's cache with a model; from there no library asks the network anything.

    Raises:
        BackendError: it is not there; says how to fetch it.
    """
    try:
        found = library("huggingface_hub").snapshot_download(identifier, revision=revision, local_files_only=True)
    except (OSError, ValueError) as error:
        raise absent(f"the weights of {identifier}", fetching(identifier, files)) from error
    return Path(found)


def _broken() -> tuple[type[Exception], ...]:
    """What the libraries raise on files that are missing, cut short, or of another model."""
    return (OSError, ValueError, KeyError, RuntimeError, library("safetensors").SafetensorError)
