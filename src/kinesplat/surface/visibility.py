"""Which surface points an outside camera can see: z-buffers of the points themselves from all round."""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.spatial import KDTree

from kinesplat.kinematics import KinematicTree
from kinesplat.surface.points import SurfacePoints

CONFIGURATIONS = 5  # the canonical one and random ones
DIRECTIONS = 32
LEAST_FACING = 0.25  # cosine below which a view says nothing about a point
LEAST_SHARE = 0.02  # of the views that a point faces
POINTS_PER_PIXEL = 5.0
LAYER_GAP = 2e-4  # layers closer than this are one [m]
LAYER_REACH = 2.5  # in point spacings, how far above a point a covering layer is looked for


def seen_from_outside(points: SurfacePoints, tree: KinematicTree, rng: np.random.Generator) -> Bool[np.ndarray, " n"]:
    """Mask of the points that some distant camera sees in the canonical or a random configuration.

    Only the front of a triangle is seen and hides, as in the ground truth. A point counts as seen where it lies on the
    front surface in a fair share of the views towards which it faces, so gaps in the z-buffer do not save the inside;
    and where no second layer lies right above it, which the z-buffer is too coarse to tell.
    """
    Ts_world_link = tree.forward_kinematics(torch.from_numpy(_configurations(tree, rng))).numpy()
    pixel = math.sqrt(float(points.area.mean()) * POINTS_PER_PIXEL)
    faced, seen = np.zeros(len(points), dtype=np.int32), np.zeros(len(points), dtype=np.int32)
    for Ts in Ts_world_link:
        T = Ts[points.link].astype(np.float32)
        world = np.einsum("nij,nj->ni", T[:, :3, :3], points.positions.astype(np.float32)) + T[:, :3, 3]
        normal = np.einsum("nij,nj->ni", T[:, :3, :3], points.facing.astype(np.float32))
        for R_view_world in _views(DIRECTIONS, rng):
            _count_view(world, normal, R_view_world, pixel, faced, seen)
    mask = seen > LEAST_SHARE * faced
    for link in np.unique(points.link):
        members = np.flatnonzero(mask & (points.link == link))
        mask[members] &= ~covered(points.select(members))
    return mask


def covered(points: SurfacePoints) -> Bool[np.ndarray, " n"]:
    """Mask of the points that lie under another layer with the same facing, such as a cap on a body.

    Two points of one smooth surface see each other above and below, or the other way round; of two layers, the upper
    one is above by both its own and the lower one's normal. Three such neighbours make a cover.
    """
    if len(points) < 2:
        return np.zeros(len(points), dtype=bool)
    reach = LAYER_REACH * math.sqrt(float(points.area.mean()))
    pairs = KDTree(points.positions).query_pairs(reach, output_type="ndarray")
    first, second = np.concatenate([pairs, pairs[:, ::-1]]).T
    offset = points.positions[second] - points.positions[first]
    alike = np.einsum("ni,ni->n", points.facing[first], points.facing[second]) > 0.8
    by_own = np.einsum("ni,ni->n", offset, points.facing[first])
    by_other = np.einsum("ni,ni->n", offset, points.facing[second])
    above = alike & (np.minimum(by_own, by_other) > LAYER_GAP)
    return np.bincount(first[above], minlength=len(points)) >= 3


def _configurations(tree: KinematicTree, rng: np.random.Generator) -> Float[np.ndarray, "b dof"]:
    lower, upper = tree.q_lower.numpy(), tree.q_upper.numpy()
    random = lower + rng.random((CONFIGURATIONS - 1, tree.dof)) * (upper - lower)
    return np.concatenate([tree.q_canonical.numpy()[None], random])


def _views(count: int, rng: np.random.Generator) -> Float[np.ndarray, "count 3 3"]:
    """Rotations whose third rows, the view directions, form a Fibonacci lattice turned at random."""
    i = np.arange(count) + 0.5
    z, azimuth = 1.0 - 2.0 * i / count, i * math.pi * (3.0 - math.sqrt(5.0)) + rng.random() * 2.0 * math.pi
    rho = np.sqrt(1.0 - z**2)
    forward = np.stack([rho * np.cos(azimuth), rho * np.sin(azimuth), z], axis=-1)
    right = np.cross(forward, np.eye(3)[np.abs(forward).argmin(axis=-1)])
    right /= np.linalg.norm(right, axis=-1, keepdims=True)
    return np.stack([right, np.cross(forward, right), forward], axis=1).astype(np.float32)


def _count_view(
    world: Float[np.ndarray, "n 3"],
    normal: Float[np.ndarray, "n 3"],
    R_view_world: Float[np.ndarray, "3 3"],
    pixel: float,
    faced: np.ndarray,
    seen: np.ndarray,
) -> None:
    """Add one orthographic view to the counts of facing and of seen points, in place."""
    cosine = -(normal @ R_view_world[2])
    front = np.flatnonzero(cosine > 0.0)
    cosine = cosine[front]
    x, y, z = (world[front] @ row for row in R_view_world)
    columns = ((x - x.min(initial=np.inf)) / pixel).astype(np.int64)
    rows = ((y - y.min(initial=np.inf)) / pixel).astype(np.int64)
    index = rows * (columns.max(initial=0) + 1) + columns
    nearest = np.full(index.max(initial=0) + 1, np.inf, dtype=np.float32)
    np.minimum.at(nearest, index, z)
    slope = np.sqrt(np.maximum(1.0 - cosine**2, 0.0)) / cosine
    fair = cosine > LEAST_FACING
    faced[front[fair]] += 1
    seen[front[fair & (z <= nearest[index] + pixel * (0.5 + slope))]] += 1
