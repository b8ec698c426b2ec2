"""Twists against scipy and their defining laws."""

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from kinesplat.twists import adjoint, exp_twist, hat


def random_rigid(*batch: int) -> torch.Tensor:
    return exp_twist(torch.randn(*batch, 6, dtype=torch.float64))


def test_pure_rotations_are_scipys() -> None:
    w = torch.randn(50, 3, dtype=torch.float64) * torch.logspace(-9, 0.5, 50, dtype=torch.float64)[:, None]
    T = exp_twist(torch.cat([torch.zeros_like(w), w], dim=-1))
    np.testing.assert_allclose(T[:, :3, :3].numpy(), Rotation.from_rotvec(w.numpy()).as_matrix(), atol=1e-12)
    assert (T[:, :3, 3] == 0).all()


def test_pure_translations_move_by_v() -> None:
    v = torch.randn(3, 2, 3, dtype=torch.float64)
    T = exp_twist(torch.cat([v, torch.zeros_like(v)], dim=-1))
    torch.testing.assert_close(T[..., :3, 3], v)


def test_adjoint_carries_twists_between_frames() -> None:
    T, x = random_rigid(4, 3), torch.randn(4, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(hat((adjoint(T) @ x[..., None])[..., 0]), T @ hat(x) @ torch.linalg.inv(T))


def test_hat_is_the_derivative_of_exp_at_zero() -> None:
    x, h = torch.randn(6, dtype=torch.float64), 1e-6
    slope = (exp_twist(h * x) - exp_twist(-h * x)) / (2 * h)
    torch.testing.assert_close(slope, hat(x), atol=1e-8, rtol=1e-8)
