"""Which surface points an outside camera can see: z-buffers of the points themselves from all round."""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kinesplat.kinematics import KinematicTree
from kinesplat.surface.points import SurfacePoints

CONFIGURATIONS = 5  # the canonical one and random ones
DIRECTIONS = 32
LEAST_FACING = 0.25  # cosine below which a view says nothing about a point
LEAST_SHARE = 0.02  # of the views that a point faces
POINTS_PER_PIXEL = 5.0


def seen_from_outside(points: SurfacePoints, tree: KinematicTree, rng: np.random.Generator) -> Bool[np.ndarray, " n"]:
    """Mask of the points that some distant camera sees in the canonical or a random configuration.

    Only the front of a triangle is seen and hides, as in the ground truth. A point counts as seen where it lies on the
    front surface in a fair share of the views towards which it faces, so gaps in the z-buffer do not save the inside.
    """
    q = _configurations(tree, rng)
    Ts_world_link = tree.forward_kinematics(q).float()
    positions, facing = (torch.from_numpy(a).float() for a in (points.positions, points.facing))
    link = torch.from_numpy(points.link)
    pixel = math.sqrt(float(points.area.mean()) * POINTS_PER_PIXEL)
    faced = torch.zeros(len(points))
    seen = torch.zeros(len(points))
    for Ts in Ts_world_link:
        R, t = Ts[link, :3, :3], Ts[link, :3, 3]
        world = torch.einsum("nij,nj->ni", R, positions) + t
        normal = torch.einsum("nij,nj->ni", R, facing)
        for R_view_world in _views(DIRECTIONS, rng):
            _count_view(world, normal, R_view_world, pixel, faced, seen)
    return (seen > LEAST_SHARE * faced).numpy()


def _configurations(tree: KinematicTree, rng: np.random.Generator) -> Float[Tensor, "b dof"]:
    share = torch.from_numpy(rng.random((CONFIGURATIONS - 1, tree.dof)))
    random = tree.q_lower + share * (tree.q_upper - tree.q_lower)
    return torch.cat([tree.q_canonical[None].double(), random.double()])


def _views(count: int, rng: np.random.Generator) -> Float[Tensor, "count 3 3"]:
    """Rotations whose third rows, the view directions, form a Fibonacci lattice turned at random."""
    i = np.arange(count) + 0.5
    z, azimuth = 1.0 - 2.0 * i / count, i * math.pi * (3.0 - math.sqrt(5.0)) + rng.random() * 2.0 * math.pi
    rho = np.sqrt(1.0 - z**2)
    forward = np.stack([rho * np.cos(azimuth), rho * np.sin(azimuth), z], axis=-1)
    right = np.cross(forward, np.eye(3)[np.abs(forward).argmin(axis=-1)])
    right /= np.linalg.norm(right, axis=-1, keepdims=True)
    return torch.from_numpy(np.stack([right, np.cross(forward, right), forward], axis=1)).float()


def _count_view(
    world: Float[Tensor, "n 3"],
    normal: Float[Tensor, "n 3"],
    R_view_world: Float[Tensor, "3 3"],
    pixel: float,
    faced: Float[Tensor, " n"],
    seen: Float[Tensor, " n"],
) -> None:
    """Add one orthographic view to the counts of facing and of seen points, in place."""
    cosine = -(normal @ R_view_world[2])
    front = torch.nonzero(cosine > 0.0)[:, 0]
    view = world[front] @ R_view_world.T
    cell = ((view[:, :2] - view[:, :2].amin(dim=0)) / pixel).long()
    index = cell[:, 1] * (int(cell[:, 0].max()) + 1) + cell[:, 0]
    nearest = torch.full((int(index.max()) + 1,), torch.inf).scatter_reduce_(0, index, view[:, 2], "amin")
    cosine = cosine[front]
    slope = torch.sqrt(1.0 - cosine.square().clamp(max=1.0)) / cosine
    fair = cosine > LEAST_FACING
    on_top = view[:, 2] <= nearest[index] + pixel * (0.5 + slope)
    faced.index_add_(0, front[fair], torch.ones(1).expand(int(fair.sum())))
    shown = front[fair & on_top]
    seen.index_add_(0, shown, torch.ones(1).expand(len(shown)))
