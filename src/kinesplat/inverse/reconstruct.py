"""From pixels to joints (and camera): many starts, coarse to fine, Levenberg-Marquardt at every image size."""

import time
from dataclasses import dataclass, replace

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
from kinesplat.inverse.search import search, with_aliases
from kinesplat.self_model import SelfModel


@dataclass(frozen=True)
class Level:
    """One stage of the coarse-to-fine search.

    Attributes:
        px: longer image side [px].
        splats: size of the model that is rendered.
        iterations: Levenberg-Marquardt steps at most.
        kept: share of the starts that enter this level.
        aliases: whether aliases of the best four fill it up.
    """

    px: int
    splats: int
    iterations: int
    kept: float
    aliases: bool = False


NEAR_LEVELS = (
    Level(32, 1_000, 12, 1.0),
    Level(64, 3_000, 12, 0.5),
    Level(128, 3_000, 10, 0.25),
    Level(256, 1_000_000, 10, 0.125),
)
GLOBAL_LEVELS = (
    Level(32, 1_000, 12, 1.0),
    Level(64, 3_000, 12, 0.35),
    Level(64, 3_000, 12, 0.5, aliases=True),
    Level(128, 3_000, 10, 0.125),
    Level(256, 1_000_000, 10, 0.065),
)
NEAR_STARTS, GLOBAL_STARTS = 16, 48
SCREENED = 1_024
SCREEN_CHUNK = 256
START_SPREAD_RAD = 0.45
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
    starts: int | None = None,
    colour_weight: float = 1.0,
    seed: int = 0,
    progress: bool = False,
) -> FitResult:
    """Recover the configuration (and, on request, the cameras) that explains the images (paper, eq. 8).

    With `q_init`: looks at it and a thousand random neighbours within 0.45 rad of it at 32 px and takes the best of
    them as starts. Without: searches the whole range of the joints (`kinesplat.inverse.search`), aliases included,
    which takes some twenty thousand small renderings. Either way the survivors are sharpened by Levenberg-Marquardt up
    to 256 px along the longer image side. Joint limits are respected.

    Args:
        model: self-model of the robot.
        images: ``(height, width, 3)`` or ``(views, height, width, 3)`` of ONE configuration; float in [0, 1] or uint8.
        camera: one camera or one per view; with `optimize_camera` it is the first guess.
        K: ``(3, 3)`` intrinsics [px] that replace those of `camera`.
        masks: ``(height, width)`` or ``(views, height, width)``, 1 on the robot. Without masks the background must be
            of one colour.
        q_init: ``(dof,)`` start, or ``(m, dof)`` several, which get no neighbours [rad]/[m]; default: no idea.
        optimize_camera: also move every camera, six numbers a view.
        starts: number of starts that are optimised; default 16, or 48 without `q_init`. With 1, `q_init` gets no
            neighbours.
        colour_weight: weight of the colours against the mask; 0.1 for photographs whose light is not a headlight.
        seed: of the random starts.
        progress: show a progress bar on the terminal.

    Raises:
        InputError: images, masks, camera or q of the wrong type, shape or range; a camera inside the robot.
    """
    began = time.perf_counter()
    observation = Observation.create(images, masks, _checked_camera(camera, K))
    near = q_init is not None
    starts = (NEAR_STARTS if near else GLOBAL_STARTS) if starts is None else starts
    state = initial_states(model, observation, q_init, starts, seed, optimize_camera)
    if near:
        model.check_camera(state.q[0], observation.camera)
    levels = _levels(near, observation)
    objectives = [
        PhotometricObjective(model.subsample(level.splats), observation.resized(level.px), colour_weight)
        for level in levels
    ]
    solutions: list[Solution[Configurations]] = []
    parents: list[Tensor] = []
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("looking for starts", total=len(levels))
        for level, objective in zip(levels, objectives, strict=True):
            if solutions:
                kept = survivors(solutions[-1], 4 if level.aliases else max(2, round(starts * level.kept)))
                state = solutions[-1].state.select(kept)
                if level.aliases:
                    state = with_aliases(objective, state, max(4, round(starts * level.kept)))
                    kept = torch.cat([kept, kept.new_zeros(len(state.q) - len(kept))])
                parents.append(kept)
            elif near:
                state = screened(objective, state, starts)
            else:
                state = search(objective, state, starts, torch.Generator().manual_seed(seed))
            bar.update(task, description=f"{level.px} px, {len(state.q)} starts")
            solutions.append(levenberg_marquardt(objective.linearize, state, iterations=level.iterations))
            bar.advance(task)
    fit = _result(objectives[-1], observation.camera, solutions, parents, time.perf_counter() - began)
    if not optimize_camera:
        model.check_camera(fit.q, fit.camera)
    return fit


def _levels(near: bool, observation: Observation) -> list[Level]:
    """The stages that the size of the images allows; the last one is at full size, or 256 px, with the whole model."""
    long_side = max(observation.rgb.shape[1:3])
    *coarse, last = NEAR_LEVELS if near else GLOBAL_LEVELS
    return [*(level for level in coarse if level.px < long_side), replace(last, px=min(last.px, long_side))]


def initial_states(
    model: SelfModel,
    observation: Observation,
    q_init: Float[Tensor, "*starts dof"] | None,
    starts: int,
    seed: int,
    camera_free: bool,
) -> Configurations:
    """The configurations to begin with: the canonical one, those given, or the given one and its neighbours.

    Raises:
        InputError: `starts` is below 1, or `q_init` has the wrong size or holds NaN.
    """
    if starts < 1:
        raise InputError(f"starts is {starts}; expected at least 1")
    tree = model.tree
    q = tree.q_canonical if q_init is None else torch.as_tensor(q_init)
    if q.dim() not in (1, 2) or not len(q):
        raise InputError(f"q_init has shape {tuple(q.shape)}; expected ({tree.dof},) or (starts, {tree.dof})")
    q = q.float()
    tree.coordinates(q)  # raises on a wrong size or NaN
    if q.dim() == 1 and q_init is None:
        q = q[None]
    elif q.dim() == 1:
        noise = torch.rand(SCREENED if starts > 1 else 1, tree.dof, generator=torch.Generator().manual_seed(seed))
        noise = 2.0 * noise - 1.0
        noise[0] = 0.0
        q = q + noise * START_SPREAD_RAD * torch.minimum(0.5 * (tree.q_upper - tree.q_lower), torch.tensor(1.0)).float()
    T = observation.camera.T_cam_world.expand(len(q), -1, 4, 4)
    return Configurations(tree, tree.clamp(q), T, camera_free)


def screened(objective: PhotometricObjective, state: Configurations, count: int) -> Configurations:
    """The first configuration and the best of the others by their loss, `count` in all."""
    if len(state.q) <= count:
        return state
    chunks = torch.arange(len(state.q)).split(SCREEN_CHUNK)
    losses = torch.cat([objective.residuals(state.select(c)).square().sum(dim=1) for c in chunks])
    losses[0] = -1.0
    return state.select(losses.argsort()[:count])


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
    camera: Camera,
    solutions: list[Solution[Configurations]],
    parents: list[Tensor],
    seconds: float,
) -> FitResult:
    last, seen = solutions[-1], objective.observation
    hypotheses = distinct_hypotheses(last, camera)
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
            view = view if len(camera.K) > 1 else replace(view, K=view.K[0], T_cam_world=view.T_cam_world[0])
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


def _verdict(objective: PhotometricObjective, hypotheses: tuple[Hypothesis, ...]) -> str:
    if hypotheses[0].loss > UNEXPLAINED_FAILURE * objective.empty_loss:
        return "failed"
    if len(hypotheses) > 1 and hypotheses[1].loss < AMBIGUOUS_RATIO * hypotheses[0].loss:
        return "ambiguous"
    return "converged"
