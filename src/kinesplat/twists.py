"""Twists [v; w] and the rigid motions that they generate."""

import torch
from jaxtyping import Float
from torch import Tensor


def hat(twists: Float[Tensor, "*batch 6"]) -> Float[Tensor, "*batch 4 4"]:
    """``(*batch, 4, 4)`` matrix of twists [v; w] (Lynch & Park, Modern Robotics, eq. 3.85, with v first)."""
    vx, vy, vz, wx, wy, wz = twists.unbind(-1)
    zero = torch.zeros_like(vx)
    rows = [zero, -wz, wy, vx, wz, zero, -wx, vy, -wy, wx, zero, vz, zero, zero, zero, zero]
    return torch.stack(rows, dim=-1).unflatten(-1, (4, 4))


def exp_twist(twists: Float[Tensor, "*batch 6"]) -> Float[Tensor, "*batch 4 4"]:
    """``(*batch, 4, 4)`` rigid motions ``exp(hat(twist))`` [m], [rad]."""
    return torch.linalg.matrix_exp(hat(twists))


def adjoint(T: Float[Tensor, "*batch 4 4"]) -> Float[Tensor, "*batch 6 6"]:
    """``(*batch, 6, 6)`` with ``hat(adjoint(T) @ x) = T @ hat(x) @ inv(T)`` for rigid T and twists x."""
    R, t = T[..., :3, :3], T[..., :3, 3]
    t_hat = hat(torch.cat([torch.zeros_like(t), t], dim=-1))[..., :3, :3]
    top, bottom = torch.cat([R, t_hat @ R], dim=-1), torch.cat([torch.zeros_like(R), R], dim=-1)
    return torch.cat([top, bottom], dim=-2)
