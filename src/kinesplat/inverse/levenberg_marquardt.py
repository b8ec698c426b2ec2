"""Levenberg-Marquardt for a batch of small bounded least-squares problems, one step for all of them at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MAX_DAMPING = 1e3


@dataclass(frozen=True)
class Linearization:
    """Gauss-Newton model of ``loss(x) = sum of squared residuals`` at a batch of points.

    Attributes:
        loss: ``(batch,)`` sum of squared residuals.
        gradient: ``(batch, p)`` transposed Jacobian times residual (half the derivative of the loss).
        hessian: ``(batch, p, p)`` transposed Jacobian times Jacobian.
    """

    loss: Float[Tensor, " batch"]
    gradient: Float[Tensor, "batch p"]
    hessian: Float[Tensor, "batch p p"]


@runtime_checkable
class State(Protocol):
    """A batch of points that the solver can step, pick from and merge."""

    def retract(self: "S", step: Float[Tensor, "batch p"]) -> "S":
        """The points after `step`, kept within their bounds."""
        ...

    def at_bound(self, gradient: Float[Tensor, "batch p"]) -> Bool[Tensor, "batch p"]:
        """Entries that lie on a bound which a descent step would cross."""
        ...

    def where(self: "S", accepted: Bool[Tensor, " batch"], other: "S") -> "S":
        """`other` where `accepted`, self elsewhere."""
        ...


S = TypeVar("S", bound=State)


@dataclass(frozen=True)
class Solution(Generic[S]):
    """What the solver returns: the final points, their linearization, and the path of losses and points.

    Attributes:
        state: the final points.
        linearization: at the final points.
        losses: after each iteration, ``(iterations + 1, batch)``.
        path: the points after each iteration, ``iterations + 1`` of them.
    """

    state: S
    linearization: Linearization
    losses: Float[Tensor, "iterations batch"]
    path: list[S]


def levenberg_marquardt(
    linearize: Callable[[S], Linearization],
    state: S,
    *,
    iterations: int = 20,
    damping: float = 1e-2,
    tolerance: float = 1e-4,
) -> Solution[S]:
    """Minimise a sum of squares from every point of a batch (Nocedal & Wright, Numerical Optimization, section 10.3).

    Marquardt's scaling (the diagonal of the Hessian) makes rad and m comparable. Variables that press against a bound
    are held during the step; a step is kept only where it lowers the loss, so no element's loss ever rises.

    Args:
        linearize: loss, gradient and Gauss-Newton Hessian of a batch of points.
        state: the starting points.
        iterations: number of steps at most.
        damping: initial damping relative to the Hessian's diagonal.
        tolerance: stop when every element, twice in a row, lowered its loss by less than this fraction, or no step of
            any length lowers it.
    """
    current = linearize(state)
    factor = torch.full_like(current.loss, damping)
    losses, path, idle = [current.loss], [state], torch.zeros_like(current.loss)
    for _ in range(iterations):
        step = damped_step(current, factor, state.at_bound(current.gradient))
        candidate_state = state.retract(step)
        candidate = linearize(candidate_state)
        accepted = candidate.loss < current.loss
        gain = torch.where(accepted, 1.0 - candidate.loss / current.loss.clamp(min=1e-30), 0.0)
        state = state.where(accepted, candidate_state)
        current = _where(accepted, candidate, current)
        factor = torch.where(accepted, factor * 0.25, factor * 6.0).clamp(1e-7, MAX_DAMPING)
        losses.append(current.loss)
        path.append(state)
        stuck = torch.where(accepted, gain < tolerance, factor > MAX_DAMPING / 10.0)
        idle = torch.where(stuck, idle + 1, 0)
        if bool((idle >= 2).all()):
            break
    return Solution(state, current, torch.stack(losses), path)


def damped_step(
    at: Linearization, factor: Float[Tensor, " batch"], held: Bool[Tensor, "batch p"]
) -> Float[Tensor, "batch p"]:
    """Solve ``(H + factor * diag(H)) step = -gradient`` per batch element; `held` variables do not move.

    A variable that no pixel sees has an empty row; the smallest multiple of the largest diagonal entry keeps it still.
    """
    hessian, gradient = at.hessian.double(), at.gradient.double()
    free = (~held).double()
    hessian = hessian * free[:, :, None] * free[:, None, :]
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    floor = 1e-9 * diagonal.amax(dim=-1, keepdim=True).clamp(min=1e-20)
    extra = factor.double()[:, None] * diagonal + floor + held.double()
    step = torch.linalg.solve(hessian + torch.diag_embed(extra), -gradient * free)
    return step.to(at.gradient.dtype)


def _where(accepted: Bool[Tensor, " batch"], new: Linearization, old: Linearization) -> Linearization:
    return Linearization(
        torch.where(accepted, new.loss, old.loss),
        torch.where(accepted[:, None], new.gradient, old.gradient),
        torch.where(accepted[:, None, None], new.hessian, old.hessian),
    )
