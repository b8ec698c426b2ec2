"""Laws of the solver, against scipy and closed forms."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from kinesplat.inverse.levenberg_marquardt import Linearization, damped_step, levenberg_marquardt


@dataclass(frozen=True)
class Box:
    """Points within bounds: the simplest state."""

    x: Tensor
    lower: Tensor
    upper: Tensor

    def retract(self, step: Tensor) -> Self:
        return replace(self, x=(self.x + step).clamp(self.lower, self.upper))

    def at_bound(self, gradient: Tensor) -> Tensor:
        return ((self.x <= self.lower) & (gradient > 0)) | ((self.x >= self.upper) & (gradient < 0))

    def where(self, accepted: Tensor, other: Self) -> Self:
        return replace(self, x=torch.where(accepted[:, None], other.x, self.x))


def linear(A: Tensor, b: Tensor):
    def linearize(state: Box) -> Linearization:
        r = state.x @ A.T - b
        return Linearization((r**2).sum(1), r @ A, (A.T @ A).expand(len(r), -1, -1))

    return linearize


def rosenbrock(state: Box) -> Linearization:
    x, y = state.x.unbind(-1)
    r = torch.stack([10 * (y - x**2), 1 - x], dim=-1)
    top = torch.stack([-20 * x, torch.full_like(x, 10.0)], -1)
    J = torch.stack([top, torch.tensor([[-1.0, 0.0]]).expand(len(x), -1)], 1)
    J = J.to(r)
    return Linearization((r**2).sum(1), (J.mT @ r[..., None])[..., 0], J.mT @ J)


@pytest.mark.parametrize("seed", range(5))
def test_bounded_linear_problems_agree_with_scipy(seed: int) -> None:
    g = np.random.default_rng(seed)
    A, b = g.normal(size=(12, 5)), g.normal(size=12) * 3
    expected = scipy.optimize.lsq_linear(A, b, bounds=(-0.3, 0.4)).x
    start = torch.from_numpy(g.uniform(-0.3, 0.4, size=(7, 5)))
    state = Box(start, torch.tensor(-0.3, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64))
    solution = levenberg_marquardt(
        linear(torch.from_numpy(A), torch.from_numpy(b)), state, iterations=60, tolerance=1e-14
    )
    np.testing.assert_allclose(solution.state.x.numpy(), np.tile(expected, (7, 1)), atol=1e-6)


def test_rosenbrock_valley_is_followed_to_its_end_from_every_start() -> None:
    start = torch.tensor([[-1.2, 1.0], [2.0, 2.0], [0.0, -3.0], [-2.0, 2.0]], dtype=torch.float64)
    bound = torch.tensor(10.0, dtype=torch.float64)
    solution = levenberg_marquardt(rosenbrock, Box(start, -bound, bound), iterations=100, tolerance=1e-12)
    torch.testing.assert_close(solution.state.x, torch.ones(4, 2, dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_loss_of_no_element_ever_rises() -> None:
    start = torch.randn(50, 2, dtype=torch.float64) * 3
    bound = torch.tensor(20.0, dtype=torch.float64)
    solution = levenberg_marquardt(rosenbrock, Box(start, -bound, bound), iterations=30)
    assert (solution.losses.diff(dim=0) <= 0).all()
    assert len(solution.path) == len(solution.losses)


def test_a_variable_that_no_residual_sees_stays_where_it_is() -> None:
    A = torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    bound = torch.tensor(10.0, dtype=torch.float64)
    state = Box(torch.tensor([[3.0, 0.7]], dtype=torch.float64), -bound, bound)
    solution = levenberg_marquardt(linear(A, torch.zeros(2, dtype=torch.float64)), state, iterations=20)
    torch.testing.assert_close(solution.state.x, torch.tensor([[0.0, 0.7]], dtype=torch.float64), atol=1e-6, rtol=0)


def test_batch_elements_do_not_touch_each_other() -> None:
    start = torch.randn(6, 2, dtype=torch.float64)
    bound = torch.tensor(20.0, dtype=torch.float64)
    together = levenberg_marquardt(rosenbrock, Box(start, -bound, bound), iterations=10, tolerance=0.0)
    for i in range(6):
        alone = levenberg_marquardt(rosenbrock, Box(start[i : i + 1], -bound, bound), iterations=10, tolerance=0.0)
        torch.testing.assert_close(alone.state.x[0], together.state.x[i], atol=1e-12, rtol=0)


def test_undamped_step_solves_the_normal_equations() -> None:
    J, r = torch.randn(3, 9, 4, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    at = Linearization((r**2).sum(1), (J.mT @ r[..., None])[..., 0], J.mT @ J)
    step = damped_step(at, torch.zeros(3, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.bool))
    expected = torch.linalg.lstsq(J, -r[..., None]).solution[..., 0]
    torch.testing.assert_close(step, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("start", [[-2.0, 2.0], [-1.2, 1.0]])
def test_rejected_steps_do_not_end_the_search(start: list[float]) -> None:
    bound = torch.tensor(10.0, dtype=torch.float64)
    alone = Box(torch.tensor([start], dtype=torch.float64), -bound, bound)
    solution = levenberg_marquardt(rosenbrock, alone, iterations=200)
    assert solution.linearization.loss.item() < 1e-10
