"""Edges of photographs: how strong they are and which way they run, white before white included."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.inverse.observation import Observation

SMOOTH_PX = 1.0
FAINT, CLEAR = 0.02, 0.05


@dataclass(frozen=True)
class EdgePictures:
    """Photographs of one size and their edges.

    Attributes:
        rgb: ``(views, height, width, 3)`` in [0, 1].
        camera: batch ``(views,)``; contours take the intrinsics from it, never the place.
        squares: ``(views, 3, height, width)`` the structure tensor of the colours (Di Zenzo 1986) as its trace, and
            cosine and sine of twice the normal's angle times the difference of its eigenvalues: fit for interpolation.
    """

    rgb: Float[Tensor, "views height width 3"]
    camera: Camera
    squares: Float[Tensor, "views 3 height width"]

    @classmethod
    def of(cls, seen: Observation) -> "EdgePictures":
        """The edges of what was seen, at its size."""
        planes = seen.rgb.permute(0, 3, 1, 2)
        dx, dy = (filtered(planes, SMOOTH_PX, axis) for axis in (0, 1))
        xx, xy, yy = ((a * b).sum(dim=1) for a, b in ((dx, dx), (dx, dy), (dy, dy)))
        return cls(seen.rgb, seen.camera, torch.stack([xx + yy, xx - yy, 2.0 * xy], dim=1))

    @cached_property
    def oriented(self) -> Float[Tensor, "views 3 height width"]:
        """Strength of edges, and its products with cosine and sine of twice the normal's angle.

        The strength of an edge with gradient m, a colour per pixel, is ``m^2 / (m^2 + 3 FAINT^2)``.
        """
        turn = self.squares[:, 1:].norm(dim=1)
        largest = 0.5 * (self.squares[:, 0] + turn)
        strength = largest / (largest + 3.0 * FAINT**2)
        return torch.stack([strength, *(strength * self.squares[:, i] / turn.clamp(min=1e-12) for i in (1, 2))], dim=1)

    @cached_property
    def clear(self) -> Float[Tensor, "views height width"]:
        """Strength of edges that are more than shading: ``m^2 / (m^2 + 3 CLEAR^2)``."""
        largest = 0.5 * (self.squares[:, 0] + self.squares[:, 1:].norm(dim=1))
        return largest / (largest + 3.0 * CLEAR**2)


def sampled(planes: Float[Tensor, "c height width"], points: Float[Tensor, "*shape 2"]) -> Float[Tensor, "*shape c"]:
    """Bilinear values at points [px] (pixel centres at +0.5); beyond the border those of the border."""
    height, width = planes.shape[1:]
    grid = points.reshape(1, 1, -1, 2) / torch.tensor([width, height]).to(points) * 2.0 - 1.0
    values = torch.nn.functional.grid_sample(planes[None], grid, padding_mode="border", align_corners=False)
    return values[0, :, 0].mT.reshape(*points.shape[:-1], len(planes))


def filtered(planes: Float[Tensor, "n c h w"], sigma: float, axis: int) -> Float[Tensor, "n c h w"]:
    """Derivative of a Gaussian along x (axis 0) or y (axis 1), a Gaussian across; borders repeated."""
    radius, c = math.ceil(3.0 * sigma), planes.shape[1]
    t = torch.arange(-radius, radius + 1).to(planes)
    smooth = torch.exp(-0.5 * (t / sigma) ** 2)
    slope = t * smooth / (t * t * smooth).sum()
    along, across = (slope, smooth / smooth.sum()) if axis == 0 else (smooth / smooth.sum(), slope)
    padded = torch.nn.functional.pad(planes, (radius,) * 4, mode="replicate")
    rows = torch.nn.functional.conv2d(padded, along.view(1, 1, 1, -1).repeat(c, 1, 1, 1), groups=c)
    return torch.nn.functional.conv2d(rows, across.view(1, 1, -1, 1).repeat(c, 1, 1, 1), groups=c)
