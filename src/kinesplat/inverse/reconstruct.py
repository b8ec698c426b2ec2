"""From pixels to joints (and camera): several starts, coarse to fine, Levenberg-Marquardt at every image size."""

import time
from dataclasses import replace

import torch
from jaxtyping import Float, Integer
from rich.progress import Progress
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.inverse.levenberg_marquardt import Solution, levenberg_marquardt
from kinesplat.inverse.objective import Configurations, PhotometricObjective
from kinesplat.inverse.observation import ImageLike, Observation
from kinesplat.inverse.result import FitResult, Hypothesis, covariance_of
from kinesplat.self_model import SelfModel

LEVELS_PX = (32, 64, 128, 256)
SURVIVORS = (1.0, 0.5, 0.25, 0.25)
COARSE_SPLATS = 3_000
START_SPREAD_RAD = 0.3
DISTINCT_RAD = 0.1
AMBIGUOUS_RATIO = 1.3
UNEXPLAINED_FAILURE = 0.25


@torch.no_grad()
def reconstruct(
    model: SelfModel,
    images: ImageLike,
    camera: Camera | None = None,
    *,
    K: Float[Tensor, "*batch 3 3"] | None = None,
    masks: ImageLike | None = None,
    q_init: Float[Tensor, "*starts dof"] | None = None,
    optimize_camera: bool = False,
    starts: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> FitResult:
    """Recover the configuration (and, on request, the cameras) that explains the images (paper, eq. 8).

    Starts from `q_init` and from `starts - 1` random neighbours within 0.3 rad of it, and sharpens the survivors from
    32 px up to 256 px along the longer image side. Joint limits are respected.

    Args:
        model: self-model of the robot.
        images: ``(height, width, 3)`` or ``(views, height, width, 3)`` of ONE configuration; float in [0, 1] or uint8.
        camera: one camera or one per view; with `optimize_camera` it is the first guess.
        K: ``(3, 3)`` intrinsics [px] that replace those of `camera`.
        masks: ``(height, width)`` or ``(views, height, width)``, 1 on the robot. Without masks the background must be
            of one colour.
        q_init: ``(dof,)`` start, or ``(starts, dof)`` several [rad]/[m]; default: the canonical configuration.
        optimize_camera: also move every camera, six numbers a view.
        starts: number of starts when `q_init` is one configuration.
        seed: of the random neighbours.
        progress: show a progress bar on the terminal.

    Raises:
        InputError: images, masks, camera or q of the wrong type, shape or range; a camera inside the robot.
    """
    began = time.perf_counter()
    observation = Observation.create(images, masks, _checked_camera(camera, K))
    state = initial_states(model, observation, q_init, starts, seed, optimize_camera)
    model.check_camera(state.q[0], observation.camera)
    levels = [px for px in LEVELS_PX if px <= max(observation.rgb.shape[1:3])] or [max(observation.rgb.shape[1:3])]
    solutions: list[Solution[Configurations]] = []
    parents: list[Tensor] = []
    coarse = model.subsample(COARSE_SPLATS)
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("reconstruct", total=len(levels))
        for px, fraction in zip(levels, SURVIVORS, strict=False):
            if solutions:
                parents.append(survivors(solutions[-1], max(2, round(starts * fraction))))
                state = solutions[-1].state.select(parents[-1])
            bar.update(task, description=f"{px} px, {len(state.q)} starts")
            objective = PhotometricObjective(model if px == levels[-1] else coarse, observation.resized(px))
            solutions.append(levenberg_marquardt(objective.linearize, state, iterations=20 if px < 256 else 12))
            bar.advance(task)
    return _result(objective, solutions, parents, time.perf_counter() - began)


def initial_states(
    model: SelfModel,
    observation: Observation,
    q_init: Float[Tensor, "*starts dof"] | None,
    starts: int,
    seed: int,
    camera_free: bool,
) -> Configurations:
    """The starting configurations: those given, or one and its random neighbours.

    Raises:
        InputError: `starts` is below 1, or `q_init` has the wrong size or holds NaN.
    """
    if starts < 1:
        raise InputError(f"starts is {starts}; expected at least 1")
    tree = model.tree
    q = tree.q_canonical if q_init is None else torch.as_tensor(q_init)
    if q.dim() not in (1, 2):
        raise InputError(f"q_init has shape {tuple(q.shape)}; expected ({tree.dof},) or (starts, {tree.dof})")
    q = q.float()
    tree.coordinates(q)  # raises on a wrong size or NaN
    if q.dim() == 1:
        noise = torch.rand(starts, tree.dof, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1.0
        spread = torch.minimum(tree.q_upper - tree.q_lower, torch.tensor(2.0)).float() * (START_SPREAD_RAD / 2.0)
        noise[0] = 0.0
        q = q + noise * spread
    T = observation.camera.T_cam_world.expand(len(q), -1, 4, 4)
    return Configurations(tree, tree.clamp(q), T, camera_free)


def survivors(solution: Solution[Configurations], count: int) -> Integer[Tensor, " kept"]:
    """Indices of the `count` best distinct configurations of a level (all distinct ones when there are fewer)."""
    kept: list[int] = []
    for i in solution.linearization.loss.argsort().tolist():
        if all((solution.state.q[j] - solution.state.q[i]).abs().max() > DISTINCT_RAD / 4 for j in kept):
            kept.append(i)
    return torch.tensor(kept[:count])


def _checked_camera(camera: Camera | None, K: Tensor | None) -> Camera:
    if camera is None:
        raise InputError("camera is None; give the camera, or a first guess of it with optimize_camera=True")
    return camera if K is None else replace(camera, K=K)


def _result(
    objective: PhotometricObjective,
    solutions: list[Solution[Configurations]],
    parents: list[Tensor],
    seconds: float,
) -> FitResult:
    last, seen = solutions[-1], objective.observation
    hypotheses = distinct_hypotheses(last, seen.camera)
    best = int(last.linearization.loss.argmin())
    losses, path, level_starts = winning_path(solutions, parents, best)
    names = list(objective.model.tree.joint_names)
    if last.state.camera_free:
        names += [f"camera{v}.{axis}" for v in range(len(seen.rgb)) for axis in ("vx", "vy", "vz", "wx", "wy", "wz")]
    hessian = last.linearization.hessian[best]
    return FitResult(
        q=hypotheses[0].q,
        camera=hypotheses[0].camera,
        loss_history=losses,
        level_starts=level_starts,
        q_history=path,
        covariance=covariance_of(hessian, hypotheses[0].loss, objective.residual_count),
        variable_names=tuple(names),
        hypotheses=hypotheses,
        verdict=_verdict(objective, hypotheses),
        seconds=seconds,
    )


def distinct_hypotheses(solution: Solution[Configurations], camera: Camera) -> tuple[Hypothesis, ...]:
    """The end points that differ by more than 0.1 rad (m) in some joint, best first."""
    found: list[Hypothesis] = []
    for i in solution.linearization.loss.argsort().tolist():
        q = solution.state.q[i]
        if all((h.q - q).abs().max() > DISTINCT_RAD for h in found):
            view = replace(camera, T_cam_world=solution.state.T_cam_world[i])
            found.append(Hypothesis(q, view, solution.linearization.loss[i].item()))
    return tuple(found)


def winning_path(
    solutions: list[Solution[Configurations]], parents: list[Tensor], best: int
) -> tuple[tuple[float, ...], Float[Tensor, "iterations dof"], tuple[int, ...]]:
    """Losses and configurations of the start that won, over all levels, and where each level begins."""
    index, losses, path = best, [], []
    for level in reversed(range(len(solutions))):
        losses.insert(0, solutions[level].losses[:, index])
        path.insert(0, torch.stack([state.q[index] for state in solutions[level].path]))
        index = int(parents[level - 1][index]) if level else index
    lengths = torch.tensor([0, *[len(level) for level in losses[:-1]]]).cumsum(0)
    return tuple(torch.cat(losses).tolist()), torch.cat(path), tuple(lengths.tolist())


def _verdict(objective: PhotometricObjective, hypotheses: list[Hypothesis]) -> str:
    if hypotheses[0].loss > UNEXPLAINED_FAILURE * objective.empty_loss:
        return "failed"
    if len(hypotheses) > 1 and hypotheses[1].loss < AMBIGUOUS_RATIO * hypotheses[0].loss:
        return "ambiguous"
    return "converged"
