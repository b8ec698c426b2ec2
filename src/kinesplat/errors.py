"""Errors that Kinesplat raises on purpose: one base, one line each, built from data."""

import difflib
from collections.abc import Iterable


class KinesplatError(Exception):
    """Base of everything that Kinesplat raises on purpose."""


class InputError(KinesplatError, ValueError):
    """A value, shape or type that the called function cannot take."""


class UnseenError(InputError):
    """The robot cannot be seen: nothing of it is in the pictures, or a camera is inside it."""


class DescriptionError(KinesplatError):
    """A robot description (URDF, MJCF, name) that cannot be read or is not supported."""


class ModelFileError(KinesplatError):
    """A self-model file that is missing, broken, or of an unknown version."""


class TrainingError(KinesplatError):
    """A training run that cannot go on: a loss or a parameter that is no number."""


class DatasetError(KinesplatError):
    """A data set that is missing, unfinished, broken, or of an unknown version."""


class BackendError(KinesplatError):
    """A rasteriser backend, device, optional package or set of weights that is not there."""


def unknown(kind: str, name: object, choices: Iterable[str]) -> str:
    """Sentence for an unknown name: what it was, the nearest valid ones, then all of them.

    Example: ``unknown robot 'pandda': did you mean 'panda'? Valid: go1, panda``.
    """
    valid = sorted(choices)
    near = difflib.get_close_matches(str(name), valid, n=3, cutoff=0.5)
    hint = f": did you mean {' or '.join(repr(n) for n in near)}?" if near else "."
    shown = ", ".join(valid[:40]) + (f", ... ({len(valid)} in all)" if len(valid) > 40 else "")
    return f"unknown {kind} {str(name)!r}{hint} Valid: {shown or '(none)'}"
