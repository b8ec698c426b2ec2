"""Where a camera stands, once its direction is known: the robot's outermost points must fill the box of its mask."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinesplat.inverse.observation import Observation
from kinesplat.kinematics import KinematicTree
from kinesplat.self_model import SelfModel

EXTREMES = 26
STEPS = 4
CLEARANCE = 0.2
UPRIGHT_SHARE = 0.75
UPRIGHT_ROLL_RAD = 0.15
LOWEST_RAD, HIGHEST_RAD = -0.35, 1.4


@dataclass(frozen=True)
class MaskBoxes:
    """The outermost surface points of every link, and the bounding boxes of the masks.

    Attributes:
        tree: the robot's kinematics.
        points: ``(seen, 4, k)`` of every link that has splats, in its frame, homogeneous [m].
        links: ``(seen,)`` which links those are.
        boxes: ``(views, 4)`` left, top, right, bottom of every mask on the image plane at depth 1.
    """

    tree: KinematicTree
    points: Float[Tensor, "seen 4 k"]
    links: Int[Tensor, " seen"]
    boxes: Float[Tensor, "views 4"]

    @classmethod
    def of(cls, model: SelfModel, observation: Observation) -> "MaskBoxes":
        """Points of the model that are extreme in one of 26 directions; boxes where the mask is above one half."""
        links = model.link_index.unique()
        steps = torch.tensor([-1.0, 0.0, 1.0])
        directions = torch.cartesian_prod(steps, steps, steps)
        directions = torch.nn.functional.normalize(directions[directions.norm(dim=-1) > 0], dim=-1)
        owns = [model.parameters.means[model.link_index == link] for link in links]
        points = torch.stack([own[(own @ directions.T).argmax(dim=0)] for own in owns]).mT
        boxes = [_box(mask, K) for mask, K in zip(observation.silhouette(), observation.camera.K, strict=True)]
        return cls(model.tree, torch.cat([points, torch.ones_like(points[:, :1])], dim=1), links, torch.stack(boxes))

    def aligned(
        self, q: Float[Tensor, "n dof"], T_cam_world: Float[Tensor, "n views 4 4"]
    ) -> Float[Tensor, "n views 4 4"]:
        """The cameras moved, not turned, so that the points' bounding boxes have the masks' centre and diagonal.

        A fixed point: the distance that gives the diagonal, then the shift that gives the centre. The camera keeps a
        distance of a fifth of the robot's width.
        """
        T = T_cam_world.clone()
        T[..., :3, 3] = 0.0
        Ts = T[:, :, None] @ self.tree.forward_kinematics(q)[:, None, self.links]
        p = (Ts[..., :3, :] @ self.points).transpose(2, 3).flatten(3)
        low, high = p.amin(dim=-1), p.amax(dim=-1)
        middle = 0.5 * (low + high)
        p = p - middle[..., None]
        size = (self.boxes[:, 2:] - self.boxes[:, :2]).norm(dim=-1)
        centre = 0.5 * (self.boxes[:, :2] + self.boxes[:, 2:])
        across = (high - low)[..., :2].norm(dim=-1)
        nearest = CLEARANCE * across - p[..., 2, :].amin(dim=-1)
        z = torch.maximum(across / size, nearest)
        xy = centre * z[..., None]
        for _ in range(STEPS):
            image = (p[..., :2, :] + xy[..., None]) / (p[..., 2, :] + z[..., None])[..., None, :]
            seen_low, seen_high = image.amin(dim=-1), image.amax(dim=-1)
            grown = torch.maximum(z * (seen_high - seen_low).norm(dim=-1) / size, nearest)
            xy = xy * (grown / z)[..., None] + (centre - 0.5 * (seen_low + seen_high)) * grown[..., None]
            z = grown
        T[..., :3, 3] = torch.cat([xy, z[..., None]], dim=-1) - middle
        return T


def random_views(count: int, generator: torch.Generator) -> Float[Tensor, "count 4 4"]:
    """Camera directions from all round, most of them upright, as ``T_cam_world`` without translation."""
    azimuth = 2.0 * math.pi * torch.rand(count, generator=generator)
    sines = math.sin(LOWEST_RAD), math.sin(HIGHEST_RAD)
    z = sines[0] + (sines[1] - sines[0]) * torch.rand(count, generator=generator)
    roll = UPRIGHT_ROLL_RAD * torch.randn(count, generator=generator)
    any_roll = math.pi * (2.0 * torch.rand(count, generator=generator) - 1.0)
    roll = torch.where(torch.rand(count, generator=generator) < UPRIGHT_SHARE, roll, any_roll)
    rho = (1.0 - z.square()).sqrt()
    forward = -torch.stack([rho * azimuth.cos(), rho * azimuth.sin(), z], dim=-1)
    right = torch.stack([-azimuth.sin(), azimuth.cos(), torch.zeros(count)], dim=-1)
    down = torch.linalg.cross(forward, right)
    c, s = roll.cos()[:, None], roll.sin()[:, None]
    T = torch.eye(4).repeat(count, 1, 1)
    T[:, :3, :3] = torch.stack([c * right + s * down, c * down - s * right, forward], dim=1)
    return T


def _box(mask: Float[Tensor, "height width"], K: Float[Tensor, "3 3"]) -> Float[Tensor, "4"]:
    inside = mask > 0.5
    rows, columns = (torch.nonzero(inside.any(dim=d))[:, 0] for d in (1, 0))
    low = torch.stack([columns[0], rows[0]]).to(K)
    high = torch.stack([columns[-1], rows[-1]]).to(K) + 1.0
    return ((torch.stack([low, high]) - K[:2, 2]) / K[[0, 1], [0, 1]]).flatten()
