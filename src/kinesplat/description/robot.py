"""What a description is turned into: a kinematic tree, and what every link looks like."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, UInt8

from kinesplat.kinematics import KinematicTree


@dataclass(frozen=True, eq=False)
class LinkMesh:
    """One piece of a link's visible surface, in one material.

    Attributes:
        link: index of the link in ``tree.link_names``.
        vertices: ``(v, 3)`` in the link frame [m].
        faces: ``(f, 3)`` vertex indices, counter-clockwise seen from outside.
        normals: ``(f, 3, 3)`` unit shading normal of every corner, in the link frame.
        uv: ``(f, 3, 2)`` texture coordinate of every corner, or None; u along the texture's rows, v downwards from the
            first row, both in units of the texture's size and repeating.
        texture: ``(height, width, 3)`` sRGB, or None; multiplied with `rgba`.
        rgba: ``(4,)`` colour and opacity in [0, 1].
        colors: ``(v, 3)`` colour of every vertex in [0, 1], multiplied with `rgba`, or None.
    """

    link: int
    vertices: Float[np.ndarray, "v 3"]
    faces: Integer[np.ndarray, "f 3"]
    normals: Float[np.ndarray, "f 3 3"]
    uv: Float[np.ndarray, "f 3 2"] | None
    texture: UInt8[np.ndarray, "h w 3"] | None
    rgba: Float[np.ndarray, "4"]
    colors: Float[np.ndarray, "v 3"] | None


@dataclass(frozen=True, eq=False)
class Robot:
    """A loaded description.

    Attributes:
        name: short name, from the description.
        tree: its kinematics.
        link_meshes: its visible surfaces.
        licence: name of the description's licence and the licence file's first lines, or "unknown".
        source: where the description came from: a path, or a name.
        mj_model: compiled ``mujoco.MjModel`` whose visible geoms, and only those, are in geom group 2.
        coordinate_qpos: ``(coordinates,)`` address in MuJoCo's qpos of every coordinate of the tree; of the first of
            four quaternion entries for a ball joint.
        base_qpos: address of the free base's seven entries in qpos, or -1 for a fixed base.
        warnings: what of the description is left out or had to be assumed, one sentence each.
    """

    name: str
    tree: KinematicTree
    link_meshes: tuple[LinkMesh, ...]
    licence: str
    source: str
    mj_model: Any
    coordinate_qpos: Integer[np.ndarray, " coordinates"]
    base_qpos: int
    warnings: tuple[str, ...] = ()
