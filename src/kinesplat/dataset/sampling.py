"""Random configurations and cameras for data sets and benchmarks."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.kinematics import KinematicTree

FOV_Y = math.radians(45.0)


def random_configurations(tree: KinematicTree, count: int, generator: torch.Generator) -> Float[Tensor, "count dof"]:
    """Uniform within the joint limits [rad or m], float64."""
    share = torch.rand(count, tree.dof, generator=generator, dtype=torch.float64)
    return tree.q_lower + share * (tree.q_upper - tree.q_lower)


def random_cameras(
    points: Float[Tensor, "*batch n 3"], generator: torch.Generator, fov_y: float = FOV_Y, size: int = 256
) -> Camera:
    """One camera per batch element, aimed at the points from any side (elevation above -30 deg).

    The picture of the points spans between the whole and half of the frame; the aim is off by up to 5 % of the frame.

    Args:
        points: ``(*batch, n, 3)`` what to look at, in the world [m].
        generator: source of randomness.
        fov_y: vertical field of view [rad].
        size: image width and height [px].
    """
    low, high = points.amin(dim=-2), points.amax(dim=-2)
    centre = 0.5 * (low + high)
    radius = (points - centre[..., None, :]).norm(dim=-1).amax(dim=-1)
    shape = centre.shape[:-1]

    def uniform(*tail: int) -> Tensor:
        return torch.rand(*shape, *tail, generator=generator, dtype=torch.float64).to(points)

    z, azimuth = 1.5 * uniform() - 0.5, 2.0 * math.pi * uniform()
    rho = torch.sqrt(1.0 - z.square())
    direction = torch.stack([rho * azimuth.cos(), rho * azimuth.sin(), z], dim=-1)
    span, jitter = 0.5 + 0.5 * uniform(), 2.0 * uniform(3) - 1.0
    distance = 2.0 * radius / math.sin(0.5 * fov_y)
    for _ in range(16):  # a fixed point: the distance at which the picture spans its share
        target = centre + 0.1 * (distance * math.tan(0.5 * fov_y))[..., None] * jitter
        camera = Camera.look_at(target + distance[..., None] * direction, target, fov_y, size, size)
        pixels, _ = camera.project(points)
        extent = ((pixels / (0.5 * size) - 1.0).abs().amax(dim=-1)).amax(dim=-1)
        distance = torch.maximum(distance * (extent / span).sqrt(), 1.1 * radius)
    return camera
