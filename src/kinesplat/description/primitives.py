"""Triangles of the geometric primitives, with the shading normals and texture coordinates that MuJoCo draws."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer

SEGMENTS = 48


@dataclass(frozen=True, eq=False)
class Patch:
    """Triangles with a normal and a texture coordinate at every corner, in the geom's frame."""

    vertices: Float[np.ndarray, "v 3"]
    faces: Integer[np.ndarray, "f 3"]
    normals: Float[np.ndarray, "f 3 3"]
    uv: Float[np.ndarray, "f 3 2"]


def sphere(radius: float) -> Patch:
    """Sphere about the origin, radius [m]."""
    return ellipsoid(np.full(3, radius))


def ellipsoid(radii: Float[np.ndarray, "3"]) -> Patch:
    """Ellipsoid about the origin with half-axes `radii` [m]."""
    angle = np.linspace(0.5 * np.pi, -0.5 * np.pi, SEGMENTS // 2 + 1)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    unit = _revolved(circle, circle, np.linspace(0.0, 1.0, len(angle)))
    normals = unit.normals / radii
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    return Patch(unit.vertices * radii, unit.faces, normals, unit.uv)


def capsule(radius: float, half_length: float) -> Patch:
    """Cylinder along z of half length `half_length` [m] between two half spheres."""
    angle = np.linspace(0.5 * np.pi, 0.0, SEGMENTS // 4 + 1)
    arc = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    mirrored = arc[::-1] * [1.0, -1.0]
    shift = np.array([0.0, half_length])
    top = _revolved(radius * arc + shift, arc, 1.0 - np.linspace(1.0, 0.0, len(arc)))
    side = _side(radius, half_length)
    bottom = _revolved(radius * mirrored - shift, mirrored, np.linspace(0.0, 1.0, len(arc)))
    return _joined([top, side, bottom])


def cylinder(radius: float, half_length: float) -> Patch:
    """Cylinder along z with flat caps, half length `half_length` [m]."""
    return _joined([_side(radius, half_length), _cap(radius, half_length, 1.0), _cap(radius, half_length, -1.0)])


def box(half_sizes: Float[np.ndarray, "3"]) -> Patch:
    """Box about the origin with half edges `half_sizes` [m]."""
    sides = []
    for axis in range(3):
        for sign in (1.0, -1.0):
            normal = np.zeros(3)
            normal[axis] = sign
            u, v = _box_axes(axis, sign)
            corners = np.array([normal + a * u + b * v for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))])
            faces = np.array([[0, 2, 1], [0, 3, 2]])  # v points down in the texture
            corner_uv = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])[faces]
            sides.append(Patch(corners * half_sizes, faces, np.broadcast_to(normal, (2, 3, 3)), corner_uv))
    return _joined(sides)


def _box_axes(axis: int, sign: float) -> tuple[np.ndarray, np.ndarray]:
    """Directions of u and v on a side of the box."""
    x, y, z = np.eye(3)
    if axis == 2:
        return x, -sign * y
    return (sign * y, -z) if axis == 0 else (-sign * x, -z)


def _side(radius: float, half_length: float) -> Patch:
    profile = np.array([[radius, half_length], [radius, -half_length]])
    return _revolved(profile, np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0.0, 1.0]))


def _cap(radius: float, half_length: float, sign: float) -> Patch:
    profile = np.array([[0.0, sign * half_length], [radius, sign * half_length]])[:: int(sign)]
    disc = _revolved(profile, np.array([[0.0, sign], [0.0, sign]]), np.zeros(2))
    uv = 0.5 + 0.5 * disc.vertices[disc.faces][..., :2] / radius
    return Patch(disc.vertices, disc.faces, disc.normals, uv)


def _revolved(
    profile: Float[np.ndarray, "k 2"], normals: Float[np.ndarray, "k 2"], v: Float[np.ndarray, " k"]
) -> Patch:
    """Profile of (distance from the z axis, z), from top to bottom, turned about z."""
    angle = np.linspace(0.0, 2.0 * np.pi, SEGMENTS + 1)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=-1)

    def turned(points: np.ndarray) -> np.ndarray:
        height = np.broadcast_to(points[:, None, 1:], (len(points), len(angle), 1))
        return np.concatenate([points[:, None, :1] * ring, height], axis=-1).reshape(-1, 3)

    uv = np.stack(np.broadcast_arrays(angle / (2.0 * np.pi), v[:, None]), axis=-1).reshape(-1, 2)
    row, column = np.meshgrid(np.arange(len(profile) - 1), np.arange(SEGMENTS), indexing="ij")
    upper = (row * (SEGMENTS + 1) + column).reshape(-1)
    lower = upper + SEGMENTS + 1
    quads = [np.stack([upper, lower, lower + 1], -1), np.stack([upper, lower + 1, upper + 1], -1)]
    faces = np.concatenate(quads)
    vertices = turned(profile)
    edges = vertices[faces[:, 1:]] - vertices[faces[:, :1]]
    faces = faces[np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=-1) > 1e-14]
    return Patch(vertices, faces, turned(normals)[faces], uv[faces])


def _joined(patches: list[Patch]) -> Patch:
    starts = np.cumsum([0, *(len(p.vertices) for p in patches)])
    return Patch(
        np.concatenate([p.vertices for p in patches]),
        np.concatenate([p.faces + start for p, start in zip(patches, starts, strict=False)]),
        np.concatenate([p.normals for p in patches]),
        np.concatenate([p.uv for p in patches]),
    )
