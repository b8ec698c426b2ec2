"""Pieces of mesh files, kept in the user's cache folder by the hash of what they were read from."""

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float, Integer, UInt8
from platformdirs import user_cache_path

FORMAT = b"kinesplat mesh pieces 4"
_ARRAYS = ("vertices", "faces", "normals", "uv", "texture", "rgba", "face_colors")


@dataclass(frozen=True, eq=False)
class Piece:
    """Triangles in one material.

    Attributes:
        vertices: ``(v, 3)`` [m, before the URDF's scale].
        faces: ``(f, 3)`` vertex indices.
        normals: ``(v, 3)`` unit normals from the file, or None to have them computed.
        uv: ``(v, 2)`` texture coordinates, v downwards from the first row, or None.
        texture: ``(height, width, 3)`` or None.
        rgba: ``(4,)`` in [0, 1], or None where the file gives no colour.
        face_colors: ``(f, 3)`` in [0, 255], or None.
    """

    vertices: Float[np.ndarray, "v 3"]
    faces: Integer[np.ndarray, "f 3"]
    normals: Float[np.ndarray, "v 3"] | None = None
    uv: Float[np.ndarray, "v 2"] | None = None
    texture: UInt8[np.ndarray, "h w 3"] | None = None
    rgba: Float[np.ndarray, "4"] | None = None
    face_colors: UInt8[np.ndarray, "f 3"] | None = None


@dataclass(frozen=True, eq=False)
class Pieces:
    """What a mesh file holds.

    Attributes:
        pieces: one per material and object.
        beside: names of further files that it refers to, with the SHA-256 of each, None where it is missing.
        warnings: what could not be read.
        y_up: whether a DAE file says that y points up, which is ignored.
    """

    pieces: tuple[Piece, ...]
    beside: dict[str, str | None] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    y_up: bool = False


def cache_folder() -> Path:
    """``KINESPLAT_CACHE``, or the platform's cache folder for this package."""
    return Path(os.environ["KINESPLAT_CACHE"]) if "KINESPLAT_CACHE" in os.environ else user_cache_path("kinesplat")


def cached_pieces(
    content: bytes, suffix: str, read: Callable[[], Pieces], digest_beside: Callable[[str], str | None]
) -> Pieces:
    """What `read` makes of a mesh file, from the cache where its content and the files beside it are unchanged.

    A broken or unwritable cache costs time, nothing else.
    """
    key = hashlib.sha256(FORMAT + suffix.encode() + b"\0" + content).hexdigest()
    entry = cache_folder() / "meshes" / f"{key}.npz"
    found = _load(entry)
    if found is not None and all(digest_beside(name) == digest for name, digest in found.beside.items()):
        return found
    pieces = read()
    with contextlib.suppress(OSError):
        _save(entry, pieces)
    return pieces


def _save(entry: Path, pieces: Pieces) -> None:
    arrays = {
        f"{name}_{index}": value
        for index, piece in enumerate(pieces.pieces)
        for name in _ARRAYS
        if (value := getattr(piece, name)) is not None
    }
    header = {"count": len(pieces.pieces), "beside": pieces.beside, "warnings": pieces.warnings, "y_up": pieces.y_up}
    entry.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=entry.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8), **arrays)
        os.replace(name, entry)
    finally:
        Path(name).unlink(missing_ok=True)


def _load(entry: Path) -> Pieces | None:
    """The entry's content; None when there is none or it is broken."""
    try:
        with entry.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            header = json.loads(arrays["header"].tobytes())
            pieces = tuple(
                Piece(**{name: arrays[f"{name}_{i}"] for name in _ARRAYS if f"{name}_{i}" in arrays})
                for i in range(header["count"])
            )
            return Pieces(pieces, header["beside"], tuple(header["warnings"]), header["y_up"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
