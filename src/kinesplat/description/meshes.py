"""Mesh files (DAE, STL, OBJ, glTF, PLY) as coloured pieces."""

import hashlib
import io
import logging
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import collada
import numpy as np
import trimesh
from PIL import Image
from trimesh.resolvers import Resolver

from kinesplat.description.mesh_cache import Piece, Pieces, cached_pieces
from kinesplat.errors import DescriptionError

SUFFIXES = (".dae", ".stl", ".obj", ".gltf", ".glb", ".ply")
MAX_BYTES = 500_000_000
MAX_TEXTURE = 1024
"""Longest side of a texture [px]; larger ones are scaled down."""

_BESIDE = {".mtl", ".bin", ".png", ".jpg", ".jpeg", ".bmp", ".tga", ".tif", ".tiff", ".webp", ".gif"}
_LEVELS_UP = 3
_DAE_INSTANCE = re.compile(rb"<instance_geometry\b[^>]*?\burl=\"#([^\"]+)\"")
_DAE_TEXTURE = re.compile(rb"<texture\b[^>]*?(?:/>|>.*?</texture>)", re.DOTALL)
_DAE_SAMPLER = re.compile(rb"<newparam\b[^>]*>\s*<(?:surface|sampler2D)\b.*?</newparam>", re.DOTALL)
_DAE_GREY = b"<color>0.7 0.7 0.7 1</color>"
_LOADER_ERRORS = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, NotImplementedError, EOFError,
    OSError, SyntaxError, NameError, ArithmeticError, RuntimeError, struct.error, MemoryError,
    Image.DecompressionBombError, Image.DecompressionBombWarning, collada.DaeError,
)  # fmt: skip


def load_pieces(path: Path) -> Pieces:
    """Coloured triangles of a mesh file, in its own coordinates; a DAE's unit is applied, its up axis is not.

    (RViz and Gazebo read DAE files of URDFs that way: ROS has z up.)

    Raises:
        DescriptionError: the file is missing, broken, empty, absurdly large, or of an unknown kind.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DescriptionError(f"{path}: unknown kind of mesh {path.suffix!r}; valid: {', '.join(SUFFIXES)}")
    content = _content(path)
    beside = _FilesBeside(path)
    return cached_pieces(content, suffix, lambda: _read(path, content, suffix, beside), beside.digest)


def load_texture(path: Path) -> np.ndarray:
    """``(height, width, 3)`` picture, scaled down to `MAX_TEXTURE`.

    Raises:
        DescriptionError: the file is missing or no picture.
    """
    try:
        with _quiet_readers(), Image.open(path) as image:
            return _pixels(image)
    except _LOADER_ERRORS as error:
        raise DescriptionError(f"{path}: not a picture that can be read ({_one_line(error)})") from error


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DescriptionError(f"{path}: {path.stat().st_size:,} bytes; meshes end at {MAX_BYTES:,}")
        content = path.read_bytes()
    except OSError as error:
        raise DescriptionError(f"{path}: {error.strerror}") from error
    if content.startswith(b"version https://git-lfs"):
        raise DescriptionError(f"{path}: is a Git LFS pointer, not the mesh; run `git lfs pull`")
    return content


def _read(path: Path, content: bytes, suffix: str, beside: "_FilesBeside") -> Pieces:
    if suffix == ".dae" and (b"<!DOCTYPE" in content or b"<!ENTITY" in content or b"\0" in content[:64]):
        raise DescriptionError(f"{path}: XML with a document type, entities or a two-byte encoding is refused")
    try:
        with _quiet_readers():
            pieces, lost = _parsed(content, suffix, beside)
    except _LOADER_ERRORS as error:
        raise DescriptionError(f"{path}: broken {suffix[1:].upper()} mesh ({_one_line(error)})") from error
    if not pieces:
        raise DescriptionError(f"{path}: no triangle could be read; the mesh is empty or broken")
    for piece in pieces:
        if not np.isfinite(piece.vertices).all():
            raise DescriptionError(f"{path}: a vertex is NaN or infinite")
    missing = [f"{path.name} refers to {name!r}, which is missing" for name, d in beside.used.items() if d is None]
    broken = [f"{path.name} has broken references; left out: {', '.join(lost)}"] if lost else []
    y_up = suffix == ".dae" and b"<up_axis>Y_UP" in content
    return Pieces(pieces, dict(beside.used), (*missing, *broken), y_up)


def _parsed(content: bytes, suffix: str, beside: "_FilesBeside") -> tuple[tuple[Piece, ...], list[str]]:
    """Pieces of a mesh file, and what of it got lost to broken references."""
    lost: list[str] = []
    scene = _scene(content, suffix, beside)
    if suffix == ".dae" and (lost := _lost_geometries(content, scene)):
        plain = _DAE_TEXTURE.sub(_DAE_GREY, _DAE_SAMPLER.sub(b"", content))
        scene = _scene(plain, suffix, beside)
        lost = _lost_geometries(content, scene) or ["textures"]
    return tuple(_pieces_of(scene, suffix)), lost


@contextmanager
def _quiet_readers() -> Iterator[None]:
    """Keep the readers from logging and warning about files that are then refused, or repaired, in one line."""
    logger = logging.getLogger("trimesh")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        logger.setLevel(level)


def _scene(content: bytes, suffix: str, beside: "_FilesBeside") -> trimesh.Scene:
    return trimesh.load_scene(io.BytesIO(content), file_type=suffix[1:], resolver=beside, process=suffix == ".stl")


def _lost_geometries(content: bytes, scene: trimesh.Scene) -> list[str]:
    """Instanced geometries that the DAE reader dropped, which it does when a material of theirs is broken."""
    wanted = {name.decode(errors="replace") for name in _DAE_INSTANCE.findall(content)}
    empty = {name for name in wanted if not _has_triangles(content, name)}
    return sorted(w for w in wanted - empty if not any(g == w or g.startswith(f"{w}_") for g in scene.geometry))


def _has_triangles(content: bytes, geometry: str) -> bool:
    start = content.find(f'id="{geometry}"'.encode())
    end = content.find(b"</geometry>", max(start, 0))
    return start >= 0 and re.search(rb"<(triangles|polylist|polygons)[\s>]", content[start:end]) is not None


class _FilesBeside(Resolver):
    """Material and texture files around a mesh; remembers what was asked for."""

    def __init__(self, mesh: Path) -> None:
        self.folder = mesh.absolute().parent
        parents = [self.folder, *self.folder.parents]
        self.root = parents[min(_LEVELS_UP, len(parents) - 1)]
        self.used: dict[str, str | None] = {}

    def get(self, key: str) -> bytes:
        """A file's bytes; FileNotFoundError where there is none."""
        data = self._data(key)
        self.used[key] = None if data is None else hashlib.sha256(data).hexdigest()
        if data is None:
            raise FileNotFoundError(key)
        return data

    def digest(self, key: str) -> str | None:
        """SHA-256 of a file, None where there is none."""
        data = self._data(key)
        return None if data is None else hashlib.sha256(data).hexdigest()

    def _data(self, key: str) -> bytes | None:
        name = key.removeprefix("file://").replace("\\", "/")
        for path in (self.folder / name, self.folder / Path(name).name):
            path = path.resolve()
            inside = path.suffix.lower() in _BESIDE and path.is_relative_to(self.root)
            if inside and path.is_file() and path.stat().st_size <= MAX_BYTES:
                return path.read_bytes()
        return None

    def write(self, name: str, data: Any) -> None:
        """Refused."""
        raise NotImplementedError("descriptions are only read")

    def namespaced(self, namespace: str) -> "_FilesBeside":
        """Refused."""
        raise NotImplementedError("mesh archives are not read")

    def keys(self) -> list[str]:
        """Nothing: a mesh says itself which files it wants."""
        return []


def _pieces_of(scene: trimesh.Scene, suffix: str) -> Iterator[Piece]:
    for node in scene.graph.nodes_geometry:
        T, name = scene.graph[node]
        mesh = scene.geometry[name]
        if isinstance(mesh, trimesh.Trimesh) and len(mesh.faces):
            yield _piece(mesh, np.asarray(T, dtype=np.float64), suffix)


def _piece(mesh: trimesh.Trimesh, T: np.ndarray, suffix: str) -> Piece:
    unmerged = suffix != ".stl" and len(mesh.vertices) == 3 * len(mesh.faces)
    appearance: Any = mesh.visual
    if unmerged and appearance.kind not in ("vertex", "face"):
        mesh.merge_vertices()
    mirrored = np.linalg.det(T[:3, :3]) < 0
    faces = np.asarray(mesh.faces, dtype=np.int32)
    normals = None
    if suffix != ".stl":
        normals = mesh.vertex_normals @ np.linalg.inv(T[:3, :3])
        lengths = np.linalg.norm(normals, axis=-1, keepdims=True)
        normals = np.where(lengths > 1e-12, normals / np.maximum(lengths, 1e-12), [0.0, 0.0, 1.0])
    uv, texture, rgba, face_colors = _appearance(mesh, suffix)
    return Piece(
        vertices=(mesh.vertices @ T[:3, :3].T + T[:3, 3]) * _unit(mesh),
        faces=np.ascontiguousarray(faces[:, ::-1] if mirrored else faces),
        normals=normals,
        uv=uv,
        texture=texture,
        rgba=rgba,
        face_colors=face_colors,
    )


def _unit(mesh: trimesh.Trimesh) -> float:
    """Metres per unit, from what the DAE reader notes as ``"0.001 * meters"``."""
    amount, _, name = str(mesh.metadata.get("units", "")).partition(" * ")
    return float(amount) if name == "meters" else 1.0


def _appearance(mesh: trimesh.Trimesh, suffix: str) -> tuple[Any, Any, Any, Any]:
    """(uv, texture, rgba, face_colors) of a mesh, None where the file says nothing."""
    visual: Any = mesh.visual
    encode = _srgb if suffix in (".gltf", ".glb") else np.asarray
    if visual.kind in ("vertex", "face"):
        colours = encode(visual.face_colors[:, :3] / 255.0)
        return None, None, None, np.round(255.0 * colours).astype(np.uint8)
    if visual.kind != "texture" or visual.material is None:
        return None, None, None, None
    material, rgba = visual.material, _rgba(visual.material)
    if rgba is not None:
        rgba[:3] = encode(rgba[:3])
    image = getattr(material, "baseColorTexture", None) or getattr(material, "image", None)
    if image is not None and visual.uv is not None and len(visual.uv) == len(mesh.vertices):
        uv = np.stack([visual.uv[:, 0], 1.0 - visual.uv[:, 1]], axis=-1)
        tint = rgba if rgba is not None and hasattr(material, "baseColorTexture") else np.ones(4)
        return uv, _pixels(image), tint, None
    return None, None, rgba, None


def _rgba(material: Any) -> np.ndarray | None:
    """Colour of a material; an opacity of 0 counts as 1, it is a common slip of exporters."""
    colour = getattr(material, "baseColorFactor", None)
    colour = getattr(material, "diffuse", None) if colour is None else colour
    if colour is None or (type(material).__name__ == "SimpleMaterial" and material.name is None):
        return None
    rgba = np.append(np.asarray(colour, dtype=np.float64)[:4] / 255.0, np.ones(4))[:4]
    rgba[3] = rgba[3] if rgba[3] > 0 else 1.0
    return rgba


def _srgb(linear: np.ndarray) -> np.ndarray:
    """Display values of linear ones (IEC 61966-2-1): glTF gives its colours linear."""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0.0) ** (1 / 2.4) - 0.055)


def _pixels(image: Image.Image) -> np.ndarray:
    image = image.convert("RGB")
    image.thumbnail((MAX_TEXTURE, MAX_TEXTURE))
    return np.array(image, dtype=np.uint8)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
