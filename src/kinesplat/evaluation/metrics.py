"""Measures of one image against its truth, and of splats against a surface."""

import torch
from jaxtyping import Bool, Float
from scipy.spatial import KDTree
from torch import Tensor

from kinesplat.errors import InputError
from kinesplat.rasterizer.photometric import l1_ssim

LEAST_MSE = 1e-12
"""Mean squared error that counts as none: 120 dB."""


def psnr(
    rendered: Float[Tensor, "*batch height width 3"],
    truth: Float[Tensor, "*batch height width 3"],
    where: Bool[Tensor, "*batch height width"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Peak signal-to-noise ratio of each image [dB], of values in [0, 1]; over the pixels `where` alone if given."""
    squared = (rendered.clamp(0.0, 1.0) - truth).square().mean(dim=-1).double()
    if where is None:
        mse = squared.mean((-1, -2))
    else:
        mse = (squared * where).sum((-1, -2)) / where.sum((-1, -2)).clamp(min=1)
    return -10.0 * mse.clamp(min=LEAST_MSE).log10()


def ssim(
    rendered: Float[Tensor, "*batch height width 3"], truth: Float[Tensor, "*batch height width 3"]
) -> Float[Tensor, "*batch"]:
    """Structural similarity of each image (Wang et al. 2004): Gaussian window of 11 px, sigma 1.5 px, per channel."""
    return 1.0 - l1_ssim(rendered.clamp(0.0, 1.0).float(), truth.float(), 1.0)


def mask_iou(
    rendered: Float[Tensor, "*batch height width"], truth: Float[Tensor, "*batch height width"]
) -> Float[Tensor, "*batch"]:
    """Intersection over union of the pixels of which at least half is covered; 1 where neither covers any."""
    a, b = rendered >= 0.5, truth >= 0.5
    union = (a | b).sum((-1, -2))
    return torch.where(union > 0, (a & b).sum((-1, -2)) / union.clamp(min=1), 1.0)


def chamfer(points: Float[Tensor, "n 3"], surface: Float[Tensor, "m 3"]) -> float:
    """Chamfer distance [m^2]: mean squared distance to the nearest neighbour, there plus back.

    ``mean_i min_j |x_i - y_j|^2 + mean_j min_i |x_i - y_j|^2``. It never reaches zero: two even samples of one surface
    of area A by n and m points are about ``A / (pi n) + A / (pi m)`` apart.

    Raises:
        InputError: one of the clouds is empty.
    """
    if not len(points) or not len(surface):
        raise InputError(f"Chamfer distance of {len(points)} and {len(surface)} points; both clouds must hold some")
    clouds = [cloud.detach().double().cpu().numpy() for cloud in (points, surface)]
    there, _ = KDTree(clouds[1]).query(clouds[0])
    back, _ = KDTree(clouds[0]).query(clouds[1])
    return float((there**2).mean() + (back**2).mean())
