"""Joints over time: bands against dense algebra, smoothness against its own derivatives."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kinesplat.inverse.trajectory import FrameBlocks, Smoothness, band_matrix, band_step, covariances


def dense(blocks: FrameBlocks, ties: Smoothness) -> Tensor:
    """The whole matrix of joints, shared variables left out, from what its parts say."""
    frames, dof = blocks.gradient.shape
    H = torch.block_diag(*blocks.hessian.double())
    bend = torch.zeros((frames - 2) * dof, frames * dof, dtype=torch.float64)
    for t in range(frames - 2):
        for i, c in enumerate((1.0, -2.0, 1.0)):
            rows, columns = slice(t * dof, (t + 1) * dof), slice((t + i) * dof, (t + i + 1) * dof)
            bend[rows, columns] += c * torch.diag(ties.acceleration.double())
    return H + bend.T @ bend + torch.diag(ties.rest.double().square().repeat(frames))


def random_problem() -> tuple[FrameBlocks, Smoothness]:
    generator = torch.Generator().manual_seed(4)
    frames, dof, p = 6, 3, 2
    J, S = torch.randn(frames, 20, dof, generator=generator), torch.randn(frames, 20, p, generator=generator)
    blocks = FrameBlocks(
        loss=1.0,
        gradient=torch.randn(frames, dof, generator=generator),
        hessian=J.mT @ J,
        shared_gradient=torch.randn(p, generator=generator),
        shared_hessian=(S.mT @ S).sum(dim=0),
        mixed=J.mT @ S,
    )
    rest = torch.randn(dof, generator=generator)
    return blocks, Smoothness(torch.rand(dof, generator=generator) + 0.5, torch.rand(dof, generator=generator), rest)


def test_band_step_is_the_dense_solution() -> None:
    blocks, ties = random_problem()
    frames, dof = blocks.gradient.shape
    held = torch.zeros(frames, dof, dtype=torch.bool)
    held[2, 1] = True
    step, shared = band_step(blocks, ties, blocks.gradient, held, 0.0)
    right = -torch.cat([blocks.gradient.flatten(), blocks.shared_gradient]).double()
    free = torch.cat([~held.flatten(), torch.ones(len(shared), dtype=torch.bool)])
    expected = torch.zeros_like(right)
    expected[free] = torch.linalg.solve(whole(blocks, ties)[free][:, free], right[free])
    assert torch.allclose(torch.cat([step.flatten(), shared]).double(), expected, atol=1e-5)


def whole(blocks: FrameBlocks, ties: Smoothness) -> Tensor:
    """The matrix of joints and shared variables."""
    mixed = blocks.mixed.flatten(0, 1).double()
    top = torch.cat([dense(blocks, ties), mixed], dim=1)
    return torch.cat([top, torch.cat([mixed.T, blocks.shared_hessian.double()], dim=1)])


@pytest.mark.parametrize("shared", [0, 2])
def test_covariances_are_blocks_of_the_dense_inverse(shared: int) -> None:
    blocks, ties = random_problem()
    blocks = replace(
        blocks,
        shared_gradient=blocks.shared_gradient[:shared],
        shared_hessian=blocks.shared_hessian[:shared, :shared],
        mixed=blocks.mixed[..., :shared],
    )
    frames, dof = blocks.gradient.shape
    scaled = {name: getattr(blocks, name) / 0.3 for name in ("hessian", "shared_hessian", "mixed")}
    inverse = torch.linalg.inv(whole(replace(blocks, **scaled), ties))[: frames * dof, : frames * dof]
    expected = torch.stack([inverse[i : i + dof, i : i + dof] for i in range(0, frames * dof, dof)])
    found = covariances(blocks, ties, 0.3, torch.full((3,), 1e3))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.linalg.eigvalsh(found).min() > 0.0


def test_a_joint_of_which_nothing_was_seen_has_an_infinite_variance() -> None:
    blocks, ties = random_problem()
    blocks.hessian[:, 1], blocks.hessian[:, :, 1], blocks.mixed[:, 1] = 0.0, 0.0, 0.0
    ties.acceleration[1] = 0.0
    ties.rest[1] = 1e-6
    found = covariances(blocks, ties, 0.3, torch.full((3,), 1e3))
    assert torch.isinf(found[:, 1, 1]).all()
    assert (found[:, 1, [0, 2]] == 0.0).all()
    assert torch.isfinite(found[:, [0, 2]]).all()


def test_smoothness_agrees_with_itself() -> None:
    _, ties = random_problem()
    q = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    double = Smoothness(ties.acceleration.double(), ties.rest.double(), ties.q_rest.double())
    bend = q[2:] - 2.0 * q[1:-1] + q[:-2]
    loss = (double.acceleration * bend).square().sum() + (double.rest * (q - double.q_rest)).square().sum()
    (slope,) = torch.autograd.grad(loss, q)
    assert double.loss(q.detach()) == pytest.approx(loss.item())
    assert torch.allclose(2.0 * double.gradient(q.detach()), slope)
    empty = FrameBlocks(0.0, q.detach(), torch.zeros(6, 3, 3), torch.zeros(0), torch.zeros(0, 0), torch.zeros(6, 3, 0))
    bands = band_matrix(empty, double, torch.ones(6, 3, dtype=torch.float64), 0.0)
    hessian = torch.autograd.functional.hessian(lambda x: double_loss(double, x), q.detach()).reshape(18, 18)
    for k in range(7):
        assert np.allclose(bands[6 - k, k:], 0.5 * hessian.diagonal(offset=k).numpy(), atol=1e-6)


def double_loss(ties: Smoothness, q: Tensor) -> Tensor:
    bend = q[2:] - 2.0 * q[1:-1] + q[:-2]
    return (ties.acceleration * bend).square().sum() + (ties.rest * (q - ties.q_rest)).square().sum()
