"""The container of a self-model: one safetensors file with a JSON header, checked from end to end when read."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kinesplat.errors import InputError, ModelFileError
from kinesplat.files import written_whole

FORMAT_VERSION = 2
"""1: splats bound to links. 2: networks beside them."""
OLDEST_VERSION = 1
_KEY = "kinesplat"


def write_model_file(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write `tensors` and a JSON-able `header` atomically, with the format version and a checksum of both.

    Raises:
        InputError: the folder does not exist or cannot be written, or the disk is full.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    body = {**header, "format_version": FORMAT_VERSION}
    text = json.dumps({**body, "checksum": checksum_of(stored, body)}, sort_keys=True)
    with written_whole(path) as temporary:
        try:
            save_file(stored, temporary, metadata={_KEY: text})
        except SafetensorError as error:
            raise InputError(f"cannot write {path}: {error}") from error


def read_model_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file that `write_model_file` wrote.

    Raises:
        ModelFileError: the file is missing, cut short, corrupt, no self-model, or of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(f"{path}: no such model file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cut short, or no safetensors file ({error})") from error
    header = read_header_text(path, metadata)
    checksum = header.pop("checksum", None)
    if checksum != checksum_of(tensors, header):
        raise ModelFileError(f"{path}: corrupt, its checksum does not match its contents")
    return tensors, header


def read_header(path: str | Path) -> dict[str, Any]:
    """The header alone, without reading or checking the tensors.

    Raises:
        ModelFileError: as in `read_model_file`.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            return read_header_text(path, file.metadata() or {})
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: no such model file") from error
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path}: cut short, or no safetensors file ({error})") from error


def read_header_text(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Parse and check the JSON header.

    Raises:
        ModelFileError: there is none, it is no JSON, or its version is unknown.
    """
    if _KEY not in metadata:
        raise ModelFileError(f"{path}: a safetensors file, but not a Kinesplat self-model")
    try:
        header = json.loads(metadata[_KEY])
        version = int(header["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFileError(f"{path}: corrupt header ({error})") from error
    if not OLDEST_VERSION <= version <= FORMAT_VERSION:
        advice = "update kinesplat" if version > FORMAT_VERSION else "build the model again"
        known = f"{OLDEST_VERSION} to {FORMAT_VERSION}"
        raise ModelFileError(f"{path}: format version {version}, this kinesplat reads {known}; {advice}")
    return header


def checksum_of(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """SHA-256 over the header and over name, dtype, shape and bytes of every tensor, in the order of names."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
