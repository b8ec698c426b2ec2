"""Distances between a robot's surface and its silhouette: they pull starts whose pictures hardly overlap the robot's.

Pixels compare brightness in place, so that a link beside its mask feels nothing of it. Distances reach further: surface
points that appear outside the mask are drawn to it, and pixels of the mask without a point near draw the nearest one
(a Chamfer distance of silhouettes, both ways). Within the distance between neighbours they vanish.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kinesplat.inverse.levenberg_marquardt import Linearization
from kinesplat.inverse.objective import Configurations
from kinesplat.inverse.observation import Observation
from kinesplat.self_model import SelfModel
from kinesplat.twists import adjoint

POINTS, PIXELS = 192, 192
NEAREST_M = 0.02
UNCOVERED = 2.0
FAR = 0.25


@dataclass(frozen=True)
class SilhouettePull:
    """Mean squared distances of surface points to the mask and of mask pixels to the surface, in image sides.

    Distances up to the spacing of the pixels (of uncovered pixels: twice that) count as none; beyond a quarter of the
    image they count linearly (Huber).

    Attributes:
        links: ``(n,)`` the link of every surface point.
        points: ``(n, 3)`` in the frames of the links [m].
        pixels: ``(views, m, 2)`` pixels spread over the masks, divided by the longer image side.
        spacing: ``(views,)`` between neighbouring ones of them.
        K: ``(views, 3, 3)`` intrinsics, divided by the longer image side.
        size: width and height, divided by the longer one.
        cut: ``(views,)`` whether the mask reaches the image border: then points beyond it may be right.
    """

    links: Int[Tensor, " n"]
    points: Float[Tensor, "n 3"]
    pixels: Float[Tensor, "views m 2"]
    spacing: Float[Tensor, " views"]
    K: Float[Tensor, "views 3 3"]
    size: tuple[float, float]
    cut: Bool[Tensor, " views"]

    @classmethod
    def of(cls, model: SelfModel, observation: Observation) -> "SilhouettePull | None":
        """Points of the model, evenly in the order of its splats, and pixels of the silhouettes; None if one is empty.

        Args:
            model: whose splats ride on one link each.
            observation: with masks, or before a background of one colour.
        """
        silhouette = observation.silhouette() > 0.5
        if not bool(silhouette.flatten(1).any(dim=1).all()):
            return None
        height, width = silhouette.shape[1:]
        side = max(height, width)
        chosen = torch.linspace(0, len(model.link_index) - 1, min(POINTS, len(model.link_index))).round().long()
        border = torch.ones(height, width, dtype=torch.bool)
        border[1:-1, 1:-1] = False
        spread = [_spread(view) for view in silhouette]
        return cls(
            model.link_index[chosen],
            model.parameters.means.detach()[chosen],
            torch.stack([pixels for pixels, _ in spread]) / side,
            torch.tensor([spacing for _, spacing in spread]) / side,
            observation.camera.K * torch.tensor([1.0 / side, 1.0 / side, 1.0])[:, None],
            (width / side, height / side),
            (silhouette & border).flatten(1).any(dim=1),
        )

    def linearize(self, at: Configurations) -> Linearization:
        """Loss, gradient and Gauss-Newton Hessian; which are nearest neighbours counts as constant."""
        Ts = at.T_cam_world[:, :, None] @ at.tree.forward_kinematics(at.q)[:, None, self.links]
        p = (Ts[..., :3, :3] @ self.points[:, :, None].to(at.q))[..., 0] + Ts[..., :3, 3]
        image = p[..., :2] / p[..., 2:].clamp(min=NEAREST_M)
        where = image @ self.K[:, :2, :2].mT + self.K[:, None, :2, 2]
        away = torch.cdist(where, self.pixels.to(where))
        (to_mask, pixel), (to_point, point) = away.min(dim=3), away.min(dim=2)
        views, rows = torch.arange(where.shape[1])[:, None], torch.arange(len(where))[:, None, None]
        outside = (to_mask - self.spacing[:, None]).clamp(min=0.0) * self._counts(where, p[..., 2])
        uncovered = (to_point - UNCOVERED * self.spacing[:, None]).clamp(min=0.0)
        J = self._jacobian(at, p)
        slopes = [
            _along(where - self.pixels[views, pixel], to_mask, J, outside),
            _along(where[rows, views, point] - self.pixels, to_point, J[rows, views, point], uncovered),
        ]
        residual, slope = torch.cat([outside, uncovered], dim=2).flatten(1), torch.cat(slopes, dim=2).flatten(1, 2)
        share = FAR / residual.clamp(min=FAR)
        counts = [part[0].numel() * torch.ones_like(part[0]) for part in (outside, uncovered)]
        weight = share / torch.cat(counts, dim=1).flatten()
        weighted = weight[..., None] * slope
        return Linearization(
            (weight * residual.square() * (2.0 - share)).sum(dim=1),
            (weighted.mT @ residual[..., None])[..., 0],
            weighted.mT @ slope,
        )

    def _counts(
        self, where: Float[Tensor, "batch views n 2"], depth: Float[Tensor, "batch views n"]
    ) -> Bool[Tensor, "batch views n"]:
        """Points before the camera; where the mask is cut off at the border, those within the picture alone."""
        inside = ((where >= 0.0) & (where <= torch.tensor(self.size))).all(dim=-1)
        return (depth > NEAREST_M) & (inside | ~self.cut[:, None])

    def _jacobian(self, at: Configurations, p: Float[Tensor, "batch views n 3"]) -> Float[Tensor, "batch views n 2 p"]:
        """How the points move in the pictures with every variable of `Configurations`."""
        depth = p[..., 2].clamp(min=NEAREST_M)
        slope = torch.zeros(*p.shape[:-1], 2, 3).to(p)
        slope[..., 0, 0] = slope[..., 1, 1] = 1.0 / depth
        slope[..., 2] = -p[..., :2] / depth.square()[..., None]
        slope = self.K[:, None, :2, :2] @ slope
        x, y, z = p.unbind(-1)
        nought = torch.zeros_like(x)
        cross = torch.stack([nought, z, -y, -z, nought, x, y, -x, nought], dim=-1).unflatten(-1, (3, 3))
        camera = slope @ torch.cat([torch.eye(3).to(p).expand_as(cross), cross], dim=-1)
        twists = adjoint(at.T_cam_world)[:, :, None] @ at.tree.link_jacobian(at.q)[:, None]
        moved = camera @ twists[:, :, self.links]
        if not at.camera_free:
            return moved
        own = torch.eye(p.shape[1]).to(p)[:, None, None, :, None] * camera[..., None, :]
        return torch.cat([moved, own.flatten(4)], dim=-1)


def _along(away: Tensor, length: Tensor, J: Tensor, residual: Tensor) -> Float[Tensor, "batch views m p"]:
    """Slope of the lengths; nought where they do not count."""
    direction = away / length.clamp(min=1e-6)[..., None]
    return (direction[..., None, :] @ J)[..., 0, :] * (residual > 0.0)[..., None]


def _spread(mask: Bool[Tensor, "height width"]) -> tuple[Float[Tensor, "m 2"], float]:
    """Centres of pixels spread evenly over a mask [px], and about how far apart they are."""
    found = torch.nonzero(mask)
    chosen = torch.linspace(0, len(found) - 1, PIXELS).round().long()
    return found[chosen].flip(-1) + 0.5, max(1.0, (len(found) / PIXELS) ** 0.5)
