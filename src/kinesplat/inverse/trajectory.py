"""Levenberg-Marquardt for joints over time: blocks of frames that smoothness ties together, solved as a band matrix."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.kinematics import KinematicTree

MAX_DAMPING = 1e6
FIRST_DAMPING = 1e-2
SECOND_DIFFERENCE = (1.0, -2.0, 1.0)
SINGULAR = 1e-13


@dataclass(frozen=True)
class FrameBlocks:
    """Gauss-Newton model of a sum of squares over frames, with a few variables `a` that all frames share.

    Attributes:
        loss: sum of squared residuals.
        gradient: ``(frames, dof)`` transposed Jacobian times residual.
        hessian: ``(frames, dof, dof)``.
        shared_gradient: ``(p,)``.
        shared_hessian: ``(p, p)``.
        mixed: ``(frames, dof, p)``.
    """

    loss: float
    gradient: Float[Tensor, "frames dof"]
    hessian: Float[Tensor, "frames dof dof"]
    shared_gradient: Float[Tensor, " p"]
    shared_hessian: Float[Tensor, "p p"]
    mixed: Float[Tensor, "frames dof p"]


@dataclass(frozen=True)
class Trajectory:
    """Joints of every frame ``(frames, dof)`` and what the frames share ``(p,)``."""

    q: Float[Tensor, "frames dof"]
    shared: Float[Tensor, " p"]


@dataclass(frozen=True)
class Smoothness:
    """Cost of accelerations from frame to frame, and a weak pull towards a configuration.

    Attributes:
        acceleration: ``(dof,)`` root of the cost of one unit per frame^2.
        rest: ``(dof,)`` or ``(frames, dof)`` root of the cost of being one unit away from `q_rest`.
        q_rest: ``(frames, dof)`` or ``(dof,)``.
    """

    acceleration: Float[Tensor, " dof"]
    rest: Float[Tensor, "*#frames dof"]
    q_rest: Float[Tensor, "*#frames dof"]

    def loss(self, q: Float[Tensor, "frames dof"]) -> float:
        """The cost of a motion."""
        bend = self.acceleration * _bend(q)
        return (bend.square().sum() + (self.rest * (q - self.q_rest)).square().sum()).item()

    def gradient(self, q: Float[Tensor, "frames dof"]) -> Float[Tensor, "frames dof"]:
        """Half the derivative of the cost."""
        out = self.rest.square() * (q - self.q_rest)
        bend = self.acceleration.square() * _bend(q)
        for i, c in enumerate(SECOND_DIFFERENCE if len(bend) else ()):
            out[i : i + len(bend)] += c * bend
        return out

    def bands(self, frames: int) -> Float[Tensor, "3 frames dof"]:
        """Second derivative (half of it): of a frame's joints by those of the same, the next and the one after."""
        out = torch.zeros(3, frames, self.rest.shape[-1]).to(self.rest)
        out[0] += self.rest.square()
        bends = max(frames - 2, 0)
        for i, a in enumerate(SECOND_DIFFERENCE):
            for j, b in enumerate(SECOND_DIFFERENCE[i:], start=i):
                out[j - i, i : i + bends] += a * b * self.acceleration.square()
        return out


def solve_trajectory(
    linearize: Callable[[Trajectory], FrameBlocks],
    loss: Callable[[Trajectory], float],
    start: Trajectory,
    tree: KinematicTree,
    smoothness: Smoothness,
    iterations: int,
    tolerance: float = 1e-4,
) -> tuple[Trajectory, list[float]]:
    """Minimise ``loss + smoothness`` within the joint limits; a step is kept only where it lowers the sum.

    Args:
        linearize: the model of the loss at a trajectory; may also refresh what it depends on, such as visibility.
        loss: an upper bound of the loss that touches it where last linearized, such as the loss with the same pairs.
        start: where to begin.
        tree: for the limits.
        smoothness: of the joints over time.
        iterations: at most.
        tolerance: stop when a step lowers the sum by less than this share.

    Returns:
        The trajectory, and the sum before every iteration and at the end.
    """
    at, damping, history = start, FIRST_DAMPING, list[float]()
    for _ in range(iterations):
        blocks = linearize(at)
        current = blocks.loss + smoothness.loss(at.q)
        history.append(current)
        best = None
        while best is None and damping < MAX_DAMPING:
            candidate = _stepped(at, blocks, smoothness, tree, damping)
            value = loss(candidate) + smoothness.loss(candidate.q)
            best, damping = (candidate, damping * 0.3) if value < current else (None, damping * 5.0)
        if best is None:
            break
        at, damping = best, max(damping, 1e-8)
        if current - value < tolerance * current:
            break
    history.append(linearize(at).loss + smoothness.loss(at.q))
    return at, history


def _stepped(
    at: Trajectory, blocks: FrameBlocks, smoothness: Smoothness, tree: KinematicTree, damping: float
) -> Trajectory:
    gradient = blocks.gradient + smoothness.gradient(at.q)
    lower, upper = tree.q_lower.to(at.q), tree.q_upper.to(at.q)
    held = tree.q_limited & (((at.q <= lower) & (gradient > 0)) | ((at.q >= upper) & (gradient < 0)))
    step, shared = band_step(blocks, smoothness, gradient, held, damping)
    return Trajectory(tree.clamp(at.q + step), at.shared + shared)


def band_step(
    blocks: FrameBlocks, smoothness: Smoothness, gradient: Tensor, held: Tensor, damping: float
) -> tuple[Float[Tensor, "frames dof"], Float[Tensor, " p"]]:
    """Solve ``(H + damping diag(H)) step = -gradient``; joints that are `held` do not move.

    H is a band of two frames on either side, bordered by what the frames share: a banded Cholesky factorisation and a
    Schur complement (Golub & Van Loan, Matrix Computations, 4.3 and 3.2.11).
    """
    free = (~held).double()
    bands = band_matrix(blocks, smoothness, free, damping)
    mixed = (blocks.mixed.double() * free[..., None]).flatten(0, 1).numpy()
    right = -(gradient.double() * free).flatten().numpy()
    solved = scipy.linalg.solveh_banded(bands, np.column_stack([right, mixed]), check_finite=False)
    shared = np.zeros(mixed.shape[1])
    if len(shared):
        border = blocks.shared_hessian.double().numpy()
        border = border + damping * np.diag(border.diagonal()) + 1e-12 * np.eye(len(shared))
        rest = -blocks.shared_gradient.double().numpy() - mixed.T @ solved[:, 0]
        shared = np.linalg.solve(border - mixed.T @ solved[:, 1:], rest)
    step = solved[:, 0] - solved[:, 1:] @ shared
    return torch.from_numpy(step).reshape(gradient.shape).to(gradient), torch.from_numpy(shared).to(gradient)


def band_matrix(
    blocks: FrameBlocks, smoothness: Smoothness, free: Float[Tensor, "frames dof"], damping: float, floor: float = 1e-9
) -> Float[np.ndarray, "band total"]:
    """The upper bands of the joints' part of H, as LAPACK wants them: row ``band - k`` holds the k-th off-diagonal.

    The diagonal is raised by `floor` of its largest entry.
    """
    frames, dof = free.shape
    H = blocks.hessian.double() * free[:, :, None] * free[:, None, :]
    ties = smoothness.bands(frames).double()
    out = np.zeros((2 * dof + 1, frames * dof))
    place = np.arange(frames * dof).reshape(frames, dof)
    for k in range(1, dof):
        out[2 * dof - k, place[:, k:].ravel()] = H.diagonal(offset=k, dim1=1, dim2=2).numpy().ravel()
    diagonal = H.diagonal(dim1=1, dim2=2) + ties[0] * free
    raised = (1.0 + damping) * diagonal + floor * diagonal.amax().clamp(min=1e-20)
    out[2 * dof] = (raised + (1.0 - free)).numpy().ravel()
    for k in (1, 2):
        tied = ties[k, : frames - k] * free[: frames - k] * free[k:]
        out[2 * dof - k * dof, place[k:].ravel()] += tied.numpy().ravel()
    return out


def covariances(
    blocks: FrameBlocks, smoothness: Smoothness, variance: float, far: Float[Tensor, " dof"]
) -> Float[Tensor, "frames dof dof"]:
    """Every frame's block of ``(H / variance + smoothness)^-1``, what the frames share included.

    What the data say is as sure as their residuals are small; what smoothness says is not, its costs are inverse
    variances as they stand. A joint whose standard deviation is beyond `far` [rad]/[m] has an infinite variance, and no
    covariance with others.

    Args:
        blocks: the data's, in double precision.
        smoothness: `acceleration` one over a standard deviation of accelerations, `rest` one of joint values.
        variance: of the data's residuals.
        far: of every joint.
    """
    frames, dof = blocks.gradient.shape
    told = replace(blocks, hessian=blocks.hessian / variance, mixed=blocks.mixed / variance)
    bands = band_matrix(told, smoothness, torch.ones(frames, dof, dtype=torch.float64), 0.0, SINGULAR)
    factor = scipy.linalg.cholesky_banded(bands, check_finite=False)
    out = np.zeros((frames, dof, dof))
    for i in range(frames):
        place, columns = slice(i * dof, (i + 1) * dof), np.zeros((frames * dof, dof))
        columns[place] = np.eye(dof)
        out[i] = scipy.linalg.cho_solve_banded((factor, False), columns, check_finite=False)[place]
    if mixed := blocks.mixed.shape[-1]:
        border = told.mixed.double().reshape(frames * dof, mixed).numpy()
        solved = scipy.linalg.cho_solve_banded((factor, False), border, check_finite=False)
        schur = blocks.shared_hessian.double().numpy() / variance + 1e-12 * np.eye(mixed) - border.T @ solved
        parts = solved.reshape(frames, dof, mixed)
        out += parts @ np.linalg.inv(schur) @ parts.transpose(0, 2, 1)
    covariance = torch.from_numpy(0.5 * (out + out.transpose(0, 2, 1)))
    unknown = ~(covariance.diagonal(dim1=1, dim2=2) < far.double().square())
    covariance = covariance.masked_fill(unknown[:, :, None] | unknown[:, None, :], 0.0)
    return (covariance + torch.diag_embed(torch.where(unknown, torch.inf, 0.0))).float()


def _bend(q: Float[Tensor, "frames dof"]) -> Float[Tensor, "bends dof"]:
    return q[2:] - 2.0 * q[1:-1] + q[:-2] if len(q) > 2 else q[:0]
