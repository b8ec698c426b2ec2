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
    points: Float[Tensor, "*batch n 3"],
    generator: torch.Generator,
    fov_y: float = FOV_Y,
    size: int = 256,
    span: tuple[float, float] = (0.5, 1.0),
    near: float = 0.0,
) -> Camera:
    """One camera per batch element, aimed at the points from any side (elevation above -30 deg), outside their sphere.

    The aim is off by up to 5 % of the frame. No camera comes nearer than 1.03 times the radius of the sphere around
    the points' box, so none is ever inside what they belong to.

    Args:
        points: ``(*batch, n, 3)`` what to look at, in the world [m].
        generator: source of randomness.
        fov_y: vertical field of view [rad].
        size: image width and height [px].
        span: share of the frame that the picture of the points spans, from and to.
        near: share of the cameras that are nearer: their picture spans up to 1.6 times the frame's share `span[1]`.
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
    spans, jitter = span[0] + (span[1] - span[0]) * uniform(), 2.0 * uniform(3) - 1.0
    if near > 0.0:
        spans = torch.where(uniform() < near, span[1] * (1.0 + 0.6 * uniform()), spans)
    distance = 2.0 * radius / math.sin(0.5 * fov_y)
    for _ in range(16):  # a fixed point: the distance at which the picture spans its share
        target = centre + 0.1 * (distance * math.tan(0.5 * fov_y))[..., None] * jitter
        camera = Camera.look_at(target + distance[..., None] * direction, target, fov_y, size, size)
        pixels, _ = camera.project(points)
        extent = ((pixels / (0.5 * size) - 1.0).abs().amax(dim=-1)).amax(dim=-1)
        distance = torch.maximum(distance * (extent / spans).sqrt(), 1.1 * radius)
    return camera
