"""Checkpoints: the whole state of a run in one file, written atomically, so that a run killed at any moment resumes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinesplat.errors import ModelFileError, TrainingError
from kinesplat.model_file import read_model_file, write_model_file

_KIND = "checkpoint"
_TENSOR = "tensor:"


def write_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a state: dictionaries and lists, nested, of tensors, numbers, strings, booleans and None.

    An optimiser's ``state_dict()`` is such a thing. Tuples come back as lists, integer keys as integers.

    Raises:
        InputError: the file cannot be written; the former checkpoint is still there.
        TrainingError: a tensor holds NaN or infinity; the former checkpoint is still there.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "", tensors)
    write_model_file(path, tensors, {"kind": _KIND, "state": tree})


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state that `write_checkpoint` wrote.

    Raises:
        ModelFileError: the file is missing, cut short, corrupt, or no checkpoint.
    """
    tensors, header = read_model_file(path)
    if header.get("kind") != _KIND:
        raise ModelFileError(f"{path}: a self-model, not a checkpoint of a training run")
    return _unpack(header["state"], tensors)


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """JSON-able image of `value`; tensors go into `tensors`, under their place in it."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise TrainingError(f"{name} holds NaN or infinity; the last checkpoint before it is kept")
        tensors[name] = value.detach().clone()  # safetensors takes no shared memory
        return _TENSOR + name
    if isinstance(value, Mapping):
        return {_key(k): _pack(v, f"{name}.{k}" if name else str(k), tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
    return value


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, str) and value.startswith(_TENSOR):
        return tensors[value.removeprefix(_TENSOR)]
    if isinstance(value, dict):
        return {int(k[1:]) if k.startswith("#") else k: _unpack(v, tensors) for k, v in value.items()}
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    return value


def _key(key: str | int) -> str:
    return f"#{key}" if isinstance(key, int) else key
