"""EWA projection of 3D Gaussians that sit on links: means, covariances and colours in image space.

Zwicker et al. 2001 as Kerbl et al. 2023 use it. The guard that limits x/z and y/z in the projection's Jacobian to the
field of view plus 30 % follows gsplat (`_persp_proj`).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer.spherical_harmonics import sh_to_rgb

JACOBIAN_GUARD = 0.3


@dataclass(frozen=True)
class Projection:
    """Splats of a batch of images.

    Attributes:
        means: ``(*batch, n, 2)`` centres [px].
        covariances: ``(*batch, n, 2, 2)`` with the screen dilation added [px^2].
        depths: ``(*batch, n)`` along the camera's +Z [m].
        colors: ``(*batch, n, 3)`` for the splats' direction, see `Gaussians.sh_direction`.
    """

    means: Float[Tensor, "*batch n 2"]
    covariances: Float[Tensor, "*batch n 2 2"]
    depths: Float[Tensor, "*batch n"]
    colors: Float[Tensor, "*batch n 3"]


def quats_to_rotations(quats: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 3 3"]:
    """Rotation matrices of quaternions wxyz of any length but zero."""
    w, x, y, z = (quats / quats.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def project(
    gaussians: Gaussians,
    Ts_cam_splat: Float[Tensor, "*b n 4 4"],
    K: Float[Tensor, "*c 3 3"],
    size: tuple[int, int],
    eps2d: float,
) -> Projection:
    """Project splats given in link frames.

    Args:
        gaussians: splats, each in the frame of its link.
        Ts_cam_splat: ``(*batch, n, 4, 4)`` from each splat's frame to the camera.
        K: ``(*batch, 3, 3)`` intrinsics without skew [px].
        size: width and height of the image [px].
        eps2d: dilation added to the diagonal of the covariance [px^2].
    """
    A, t = Ts_cam_splat[..., :3, :3], Ts_cam_splat[..., :3, 3]
    p_cam = (A @ gaussians.means[..., None])[..., 0] + t
    axes = A @ (quats_to_rotations(gaussians.quats) * gaussians.scales[..., None, :])
    J, means = _perspective(p_cam, K, size)
    M = J @ axes
    dilation = eps2d * torch.eye(2, dtype=M.dtype, device=M.device)
    offset = A[..., 2, :] if gaussians.sh_direction == "axis" else gaussians.means + (A.mT @ t[..., None])[..., 0]
    colors = sh_to_rgb(gaussians.sh, offset / offset.norm(dim=-1, keepdim=True))
    return Projection(means, M @ M.mT + dilation, p_cam[..., 2], colors)


def _perspective(p_cam: Tensor, K: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Jacobian ``(*b, n, 2, 3)`` with gsplat's guard, and pixels ``(*b, n, 2)``."""
    x, y, z = p_cam.unbind(-1)
    rows, pixels = [], []
    for axis, (value, extent) in enumerate(zip((x, y), size, strict=True)):
        focal, centre = K[..., None, axis, axis], K[..., None, axis, 2]
        margin = JACOBIAN_GUARD * 0.5 * extent / focal
        slope = torch.minimum(torch.maximum(value / z, -centre / focal - margin), (extent - centre) / focal + margin)
        entries = [torch.zeros_like(z), torch.zeros_like(z), -focal * slope / z]
        entries[axis] = focal / z
        rows.append(torch.stack(entries, dim=-1))
        pixels.append(focal * value / z + centre)
    return torch.stack(rows, dim=-2), torch.stack(pixels, dim=-1)
