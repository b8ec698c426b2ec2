"""Points spread over link meshes in proportion to area, with normals and colours."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from kinesplat.description import LinkMesh
from kinesplat.errors import InputError
from kinesplat.surface.points import SurfacePoints

MIN_POINTS_PER_MESH = 64


def sample_meshes(link_meshes: Sequence[LinkMesh], count: int, rng: np.random.Generator) -> SurfacePoints:
    """About `count` points over all meshes, in proportion to area but at least a few on each.

    Raises:
        InputError: the meshes have no area.
    """
    areas = [_triangle_areas(mesh) for mesh in link_meshes]
    total = float(sum(a.sum() for a in areas))
    if not total > 0.0:
        raise InputError(f"{len(link_meshes)} visual meshes with a total area of {total} m^2; nothing to sample")
    parts = [
        _sample_mesh(mesh, area, max(MIN_POINTS_PER_MESH, round(count * float(area.sum()) / total)), rng)
        for mesh, area in zip(link_meshes, areas, strict=True)
        if area.sum() > 0.0
    ]
    return SurfacePoints.concatenate(parts)


def _sample_mesh(mesh: LinkMesh, areas: Float[np.ndarray, " f"], count: int, rng: np.random.Generator) -> SurfacePoints:
    """Triangles stratified by area, barycentric coordinates uniform."""
    cumulative = np.cumsum(areas)
    strata = (np.arange(count) + rng.random(count)) / count
    face = np.minimum(np.searchsorted(cumulative, strata * cumulative[-1]), len(areas) - 1)
    root, v = np.sqrt(rng.random(count)), rng.random(count)
    weights = np.stack([1.0 - root, root * (1.0 - v), root * v], axis=-1)
    corners = mesh.vertices[mesh.faces[face]].astype(float)
    return SurfacePoints(
        positions=np.einsum("nc,ncd->nd", weights, corners),
        normals=_unit(np.einsum("nc,ncd->nd", weights, mesh.normals[face].astype(float))),
        facing=_unit(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])),
        albedo=_albedo(mesh, face, weights),
        area=np.full(count, cumulative[-1] / count),
        link=np.full(count, mesh.link),
    )


def _triangle_areas(mesh: LinkMesh) -> Float[np.ndarray, " f"]:
    a, b, c = (mesh.vertices[mesh.faces[:, i]].astype(float) for i in range(3))
    return 0.5 * np.linalg.norm(np.cross(b - a, c - a), axis=-1)


def _unit(vectors: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-20)


def _albedo(mesh: LinkMesh, face: Int[np.ndarray, " n"], weights: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """Material colour, times the texture or the vertex colours where there are any."""
    albedo = np.repeat(np.asarray(mesh.rgba, dtype=float)[None, :3], len(face), axis=0)
    if mesh.texture is not None and mesh.uv is not None:
        return albedo * _bilinear(mesh.texture, np.einsum("nc,ncd->nd", weights, mesh.uv[face].astype(float)))
    if mesh.colors is not None:
        return albedo * np.einsum("nc,ncd->nd", weights, mesh.colors[mesh.faces[face]][..., :3].astype(float))
    return albedo


def _bilinear(texture: np.ndarray, uv: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 3"]:
    """Repeating texture lookup; texel centres lie at +0.5, row 0 at v = 0."""
    height, width = texture.shape[:2]
    position = (uv % 1.0) * (width, height) - 0.5
    low = np.floor(position).astype(int)
    fraction = position - low
    colour = np.zeros((len(uv), 3))
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        weight = np.abs(1 - dx - fraction[:, 0]) * np.abs(1 - dy - fraction[:, 1])
        texel = texture[(low[:, 1] + dy) % height, (low[:, 0] + dx) % width, :3]
        colour += weight[:, None] * (texel / 255.0)
    return colour
