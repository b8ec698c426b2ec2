"""Splats that ride on links: the exact binding of a mesh-bound self-model, and its rotations of harmonics."""

import math
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinesplat.gaussians import Gaussians
from kinesplat.quaternions import quat_product, rotations_to_quats
from kinesplat.rasterizer.spherical_harmonics import sh_basis, sh_degree


def pose_gaussians(
    gaussians: Gaussians, link_index: Int[Tensor, " n"], Ts_world_link: Float[Tensor, "*batch links 4 4"]
) -> Gaussians:
    """Splats given in link frames, moved into the world; means, quats and spherical harmonics turn with their link.

    Args:
        gaussians: ``(n, ...)`` in link frames, or a batch of them that broadcasts to ``*batch``.
        link_index: ``(n,)`` link of each splat.
        Ts_world_link: ``(*batch, links, 4, 4)`` [m].

    Returns:
        Gaussians of batch ``*batch``; scales and opacities are expanded, not copied. Differentiable in everything.
    """
    batch = Ts_world_link.shape[:-3]
    R, t = Ts_world_link[..., :3, :3], Ts_world_link[..., :3, 3]
    means = (R[..., link_index, :, :] @ gaussians.means[..., None])[..., 0] + t[..., link_index, :]
    quats = quat_product(rotations_to_quats(R)[..., link_index, :], gaussians.quats)
    sh = sh_rotation(R, sh_degree(gaussians.sh.shape[-2]))[..., link_index, :, :] @ gaussians.sh
    scales = gaussians.scales.expand(*batch, len(gaussians), 3)
    opacities = gaussians.opacities.expand(*batch, len(gaussians))
    return Gaussians(means, quats, scales, opacities, sh, gaussians.sh_direction)


def sh_rotation(R: Float[Tensor, "*batch 3 3"], degree: int) -> Float[Tensor, "*batch k k"]:
    """Matrix that turns coefficients with the body they belong to: ``Y(d) @ (D sh) = Y(R^T d) @ sh`` for all d.

    The real Wigner matrix of all degrees up to `degree`, by solving for it at fixed directions (the basis spans a
    space that rotations keep, so the fit is exact).
    """
    directions, inverse = _fixed_directions(degree)
    return inverse.to(R) @ sh_basis(directions.to(R) @ R, degree)


@cache
def _fixed_directions(degree: int) -> tuple[Float[Tensor, "m 3"], Float[Tensor, "k m"]]:
    """A Fibonacci lattice of directions, and the pseudo-inverse of the basis there."""
    count = 2 * (degree + 1) ** 2
    i = torch.arange(count, dtype=torch.float64) + 0.5
    z, azimuth = 1.0 - 2.0 * i / count, i * math.pi * (3.0 - math.sqrt(5.0))
    rho = torch.sqrt(1.0 - z.square())
    directions = torch.stack([rho * azimuth.cos(), rho * azimuth.sin(), z], dim=-1)
    return directions, torch.linalg.pinv(sh_basis(directions, degree))
