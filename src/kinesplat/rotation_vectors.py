"""Rotation vectors: axis times angle [rad], differentiable through zero."""

import torch
from jaxtyping import Float
from torch import Tensor


def rotation_matrix(vector: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3 3"]:
    """Rotation matrix of a rotation vector, ``(*batch, 3)`` [rad] to ``(*batch, 3, 3)`` (Rodrigues)."""
    sine, cosine, _ = _sinc_family(vector)
    K = cross_matrix(vector)
    return torch.eye(3, dtype=K.dtype, device=K.device) + sine * K + cosine * (K @ K)


def right_jacobian(vector: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3 3"]:
    """Angular velocity in the turned frame per velocity of the rotation vector (Chirikjian 2012, eq. 10.86)."""
    _, cosine, cubic = _sinc_family(vector)
    K = cross_matrix(vector)
    return torch.eye(3, dtype=K.dtype, device=K.device) - cosine * K + cubic * (K @ K)


def _sinc_family(vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sin(a)/a, (1 - cos a)/a^2, (a - sin a)/a^3 of the angle a, smooth at zero; ``(*batch, 1, 1)`` each."""
    squared = (vector * vector).sum(-1)[..., None, None]
    small = squared < 1e-4
    a = torch.where(small, torch.ones_like(squared), squared).sqrt()
    series = [
        1 - squared / 6 * (1 - squared / 20 * (1 - squared / 42)),
        0.5 - squared / 24 * (1 - squared / 30 * (1 - squared / 56)),
        1 / 6 - squared / 120 * (1 - squared / 42 * (1 - squared / 72)),
    ]
    exact = [a.sin() / a, 2 * ((0.5 * a).sin() / a) ** 2, (a - a.sin()) / a**3]
    sine, cosine, cubic = (torch.where(small, s, e) for s, e in zip(series, exact, strict=True))
    return sine, cosine, cubic


def cross_matrix(vector: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3 3"]:
    """Cross product matrix, ``(*batch, 3)`` to ``(*batch, 3, 3)``."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
