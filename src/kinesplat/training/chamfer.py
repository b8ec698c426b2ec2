"""Chamfer distance of point clouds."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 2048


def chamfer(a: Float[Tensor, "n 3"], b: Float[Tensor, "m 3"]) -> Float[Tensor, ""]:
    """``mean_i min_j |a_i - b_j|^2 + mean_j min_i |a_i - b_j|^2`` [m^2]: squared distances, both ways, means.

    Differentiable in both clouds; memory grows with ``CHUNK * max(n, m)``.
    """
    with torch.no_grad():
        b_of_a, a_of_b = _nearest(a, b), _nearest(b, a)
    return (a - b[b_of_a]).square().sum(-1).mean() + (a[a_of_b] - b).square().sum(-1).mean()


def _nearest(a: Float[Tensor, "n 3"], b: Float[Tensor, "m 3"]) -> Int[Tensor, " n"]:
    """For every point of a, its nearest in b, which are compared in chunks of a."""
    half = 0.5 * b.square().sum(-1)
    return torch.cat([torch.addmm(half, part, b.T, alpha=-1.0).argmin(dim=1) for part in a.split(CHUNK)])
