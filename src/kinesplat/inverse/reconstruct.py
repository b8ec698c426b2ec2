"""From pixels to joints (and camera): many starts, coarse to fine, Levenberg-Marquardt at every image size."""

import functools
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.inverse.alignment import MaskBoxes, random_views
from kinesplat.inverse.coarse_to_fine import (
    GLOBAL_LEVELS,
    NEAR_LEVELS,
    Level,
    Refinement,
    levels_for,
    refine,
    same_place,
)
from kinesplat.inverse.initializer import Initializer
from kinesplat.inverse.levenberg_marquardt import Solution
from kinesplat.inverse.objective import Configurations, PhotometricObjective
from kinesplat.inverse.observation import ImageLike, Observation, image_shape
from kinesplat.inverse.photograph import light_of, seen_again
from kinesplat.inverse.priors import Priors
from kinesplat.inverse.result import FitResult, Hypothesis, covariance_of
from kinesplat.inverse.search import (
    CHUNK,
    ROUNDS,
    best_distinct,
    joined,
    joint_influence,
    joint_scale,
    one_turn,
    search,
)
from kinesplat.inverse.verdict import evidence_of, settled, verdict
from kinesplat.self_model import SelfModel
from kinesplat.twists import exp_twist

NEAR_STARTS, GLOBAL_STARTS = 32, 48
START_SPREAD_RAD = 0.45
CAMERA_SPREAD_RAD = 0.1
DISTINCT_RAD = 0.1


@dataclass(frozen=True)
class Attempt:
    """One way to look for starts: a first generation, and the rounds in which it evolves.

    Attributes:
        drawn: size of the first generation.
        rounds: length of the random steps and blur [px] of every round; without rounds the best drawn are the starts.
        starts: how many are optimised.
        levels: the image sizes.
        learned: whether an initializer proposes the starts.
    """

    drawn: int
    rounds: tuple[tuple[float, float], ...]
    starts: int
    levels: tuple[Level, ...]
    learned: bool = False


NEAR_ROUNDS = ((0.4, 0.9), (0.3, 0.75), (0.2, 0.45), (0.15, 0.3))
NEAR_ATTEMPTS = (
    Attempt(1_024, (), NEAR_STARTS, NEAR_LEVELS),
    Attempt(2_048, NEAR_ROUNDS, GLOBAL_STARTS, GLOBAL_LEVELS),
    Attempt(2_048, ROUNDS, GLOBAL_STARTS, GLOBAL_LEVELS),
)
GLOBAL_ATTEMPTS = (Attempt(4_096, ROUNDS, GLOBAL_STARTS, GLOBAL_LEVELS),) * 3
LEARNED_ATTEMPT = Attempt(4_096, (), GLOBAL_STARTS, GLOBAL_LEVELS, learned=True)
PROPOSED_APART = 0.1
DIM_WEIGHT = 0.1
EXPLAINED = 0.01  # less is left over than any photograph leaves: no need for a second look


@torch.no_grad()
def reconstruct(
    model: SelfModel,
    images: ImageLike | Observation,
    camera: Camera | None = None,
    *,
    K: Float[Tensor, "*batch 3 3"] | None = None,
    masks: ImageLike | None = None,
    q_init: Float[Tensor, "*starts dof"] | None = None,
    optimize_camera: bool = False,
    starts: int | None = None,
    colour_weight: float = 1.0,
    initializer: Initializer | Literal[False] | None = None,
    priors: Priors | None = None,
    seed: int = 0,
) -> FitResult:
    """Recover the configuration (and, on request, the cameras) that explains the images (paper, eq. 8).

    With `q_init`: looks at it and a thousand random neighbours within 0.45 rad of it at 32 px and takes the best of
    them as starts. Without: searches the whole range of the joints (`kinesplat.inverse.search`), aliases included,
    which takes some twenty thousand small renderings. Either way the survivors are sharpened by Levenberg-Marquardt up
    to 256 px along the longer image side. Where the verdict is not "converged", further attempts follow that search
    harder, until two agree or three (with an initializer four) are made. Joint limits are respected. Pictures are
    rendered on the model's device; the result is on the CPU.

    A photograph, whose colours another light made, gets a second look in that light, up to 512 px
    (`kinesplat.inverse.photograph`); it is known by its mask and by colours that an estimated light explains better.

    Args:
        model: self-model of the robot.
        images: ``(height, width, 3)`` or ``(views, height, width, 3)`` of ONE configuration; float in [0, 1] or uint8.
            Or an `Observation`, which brings masks or a backdrop along, and K.
        camera: one camera or one per view; with `optimize_camera` it is the first guess, right within about 0.1 rad and
            5 % of the distance, or None: then every direction is tried, and the distance follows from the mask.
        K: ``(3, 3)`` intrinsics [px] that replace those of `camera`; needed where `camera` is None.
        masks: ``(height, width)`` or ``(views, height, width)``, 1 on the robot. Without masks the background must be
            of one colour.
        q_init: ``(dof,)`` start, or ``(m, dof)`` several, which get no neighbours [rad]/[m]; default: no idea.
        optimize_camera: also move every camera, six numbers a view.
        starts: number of starts that are optimised, in a single attempt; default 32, or 48 without `q_init`, in up to
            three attempts. With 1, `q_init` gets no
            neighbours.
        colour_weight: weight of the colours against the mask; 0.1 for photographs whose light is not a headlight.
        initializer: a learned start, which is tried before the search where there is no `q_init`; default: the one that
            comes with the package for this robot, if there is one. False: none.
        priors: soft terms beside the pixels: links that must not pass through each other, joints off their limits.
        seed: of the random starts.

    Raises:
        InputError: images, masks, camera or q of the wrong type, shape or range; a camera inside the robot.
    """
    began = time.perf_counter()
    known, device, model = camera is not None, model.parameters.means.device, model.to("cpu")
    if isinstance(images, Observation):
        observation = images
    else:
        observation = Observation.create(images, masks, _checked_camera(camera, K, images, optimize_camera))
    learned = (initializer or None) if q_init is not None or initializer is not None else Initializer.packaged(model)
    if learned is not None:
        learned.check_fits(model)
    attempts = planned(q_init, starts, learned is not None)
    problem = Problem(model, observation, q_init, seed, optimize_camera, known, learned)
    if q_init is not None and known:
        model.check_camera(problem.first_generation(attempts[0], 0).q[0], observation.camera)

    @functools.cache
    def objective(px: int, splats: int) -> PhotometricObjective:
        seen = observation.resized(px)
        return PhotometricObjective(model.subsample(splats), seen, colour_weight, device=device, priors=priors)

    found: list[Refinement] = []
    for number, attempt in enumerate(attempts):
        levels = levels_for(attempt.levels, max(observation.rgb.shape[1:3]))
        objectives = [objective(level.px, level.splats) for level in levels]
        found.append(refine(levels, objectives, problem.starts(attempt, number, objectives[0])))
        fit = _result(objectives[-1], observation.camera, found, time.perf_counter() - began)
        fit = replace(fit, evidence={**fit.evidence, "start": origin(attempts, found, q_init is None)})
        if settled(fit.evidence):
            break
        if fit.verdict == "failed" and not number and observation.mask is not None and colour_weight > DIM_WEIGHT:
            # a photograph? its colours, taken at face value, lead astray
            free, dim = optimize_camera, DIM_WEIGHT
            again = reconstruct(
                model.to(device),
                observation,
                camera,
                K=K,
                q_init=q_init,
                optimize_camera=free,
                colour_weight=dim,
                starts=starts,
                initializer=initializer,
                priors=priors,
                seed=seed,
            )
            if "light" in again.evidence:
                return replace(again, seconds=time.perf_counter() - began)
    light = None if fit.evidence["unexplained"] < EXPLAINED else light_of(model, observation, fit)
    if light is not None:
        fit = replace(seen_again(model, observation, fit, light, seed, device), seconds=time.perf_counter() - began)
    if not optimize_camera:
        model.check_camera(fit.q, fit.camera)
    return fit


def planned(q_init: Float[Tensor, "*starts dof"] | None, starts: int | None, learned: bool) -> list[Attempt]:
    """The attempts that are made until one converges; a single one where the caller sets the starts.

    Raises:
        InputError: `starts` is below 1.
    """
    if starts is not None and starts < 1:
        raise InputError(f"starts is {starts}; expected at least 1")
    attempts = NEAR_ATTEMPTS
    if q_init is None:
        attempts = (LEARNED_ATTEMPT, *GLOBAL_ATTEMPTS) if learned else GLOBAL_ATTEMPTS
    if starts is not None:
        return [replace(attempts[0], starts=starts)]
    if q_init is not None and torch.as_tensor(q_init).dim() > 1:
        return [attempts[0]]
    return list(attempts)


def origin(attempts: list[Attempt], found: list[Refinement], global_: bool) -> str:
    """Where the answer began: "initializer", "search", or "q_init"."""
    losses = [f.last.linearization.loss.min().item() for f in found]
    attempt = attempts[losses.index(min(losses))]
    return ("initializer" if attempt.learned else "search") if global_ else "q_init"


@dataclass(frozen=True)
class Problem:
    """What is known when a fit begins: the model, the pictures, and first guesses of joints and cameras, or none."""

    model: SelfModel
    observation: Observation
    q_init: Float[Tensor, "*starts dof"] | None
    seed: int
    camera_free: bool
    camera_known: bool
    initializer: Initializer | None

    def starts(self, attempt: Attempt, number: int, objective: PhotometricObjective) -> Configurations:
        """The configurations that least squares begins with."""
        state = self.first_generation(attempt, number)
        if len(state.q) <= attempt.starts:
            return state
        if self.initializer is not None and self.q_init is None:
            proposed = self.initializer.propose(self.observation, state)
            rank, influence = torch.arange(float(len(proposed.q))), joint_influence(objective.model)
            kept = best_distinct(proposed, rank, attempt.starts, PROPOSED_APART, influence)
            if attempt.learned:
                return proposed.select(kept)
            state = joined(proposed.select(kept), state)
        if not attempt.rounds:
            return screened(objective, state, attempt.starts)
        return search(objective, state, attempt.starts, self._generator(number, 1), self._boxes, attempt.rounds)

    def first_generation(self, attempt: Attempt, number: int) -> Configurations:
        """The guess first, where there is one, then random configurations and cameras around it, or from everywhere.

        Raises:
            InputError: `q_init` has the wrong size or holds NaN.
        """
        generator, boxes = self._generator(number, 0), self._boxes
        q = self._joints(attempt, generator)
        T = self.observation.camera.T_cam_world.expand(len(q), -1, 4, 4)
        if not self.camera_free or (len(q) == 1 and self.camera_known):
            return Configurations(self.model.tree, q, T, self.camera_free)
        if self.camera_known:
            turn = CAMERA_SPREAD_RAD * (2.0 * torch.rand(*T.shape[:2], 3, generator=generator) - 1.0)
            turn[0] = 0.0
            moved = exp_twist(torch.cat([torch.zeros_like(turn), turn], dim=-1)) @ T
            if boxes is not None:
                moved[1:] = boxes.aligned(q, moved)[1:]
        else:
            views = T.shape[1]
            moved = random_views(len(q) * views, generator).view(len(q), views, 4, 4)
            moved = boxes.aligned(q, moved) if boxes is not None else moved
        return Configurations(self.model.tree, q, moved, True)

    def _joints(self, attempt: Attempt, generator: torch.Generator) -> Float[Tensor, "n dof"]:
        tree = self.model.tree
        q = (tree.q_canonical if self.q_init is None else torch.as_tensor(self.q_init).cpu()).float()
        if q.dim() not in (1, 2) or not len(q):
            raise InputError(f"q_init has shape {tuple(q.shape)}; expected ({tree.dof},) or (starts, {tree.dof})")
        tree.coordinates(q)  # raises on a wrong size or NaN
        if q.dim() == 2:
            return tree.clamp(q)
        share = torch.rand(attempt.drawn if attempt.starts > 1 else 1, tree.dof, generator=generator)
        if self.q_init is None:
            lower, upper = one_turn(tree)
            draws = lower + (upper - lower) * share
        else:
            draws = q + (2.0 * share - 1.0) * START_SPREAD_RAD * joint_scale(tree)
        draws[0] = q
        return tree.clamp(draws)

    @functools.cached_property
    def _boxes(self) -> MaskBoxes | None:
        """Where free cameras stand; None where they are known, or guessed and a mask touches the border."""
        if not self.camera_free:
            return None
        border = [self.observation.silhouette()[:, edge] for edge in (0, -1)]
        border += [self.observation.silhouette()[:, :, edge] for edge in (0, -1)]
        if self.camera_known and any(bool((line > 0.5).any()) for line in border):
            return None
        return MaskBoxes.of(self.model, self.observation)

    def _generator(self, number: int, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 7_919 * (2 * number + purpose))


def screened(objective: PhotometricObjective, state: Configurations, count: int) -> Configurations:
    """The first configuration and the best of the others by their loss, `count` in all."""
    chunks = torch.arange(len(state.q)).split(CHUNK)
    losses = torch.cat([objective.residuals(state.select(c)).square().sum(dim=1) for c in chunks]).to(state.q.device)
    losses[0] = -1.0
    return state.select(losses.argsort()[:count])


def _checked_camera(camera: Camera | None, K: Tensor | None, images: ImageLike, free: bool) -> Camera:
    if camera is not None:
        return camera if K is None else replace(camera, K=K)
    if K is None or not free:
        raise InputError(
            "camera is None; give the camera, or a first guess of it with optimize_camera=True, or K with "
            "optimize_camera=True where nothing else is known"
        )
    views, height, width = image_shape(images)
    return Camera(torch.as_tensor(K).float().expand(views, 3, 3), torch.eye(4).expand(views, 4, 4), width, height)


def _result(objective: PhotometricObjective, camera: Camera, found: list[Refinement], seconds: float) -> FitResult:
    hypotheses, seen = distinct_hypotheses([f.last for f in found], camera), objective.observation
    winner = min(found, key=lambda f: f.last.linearization.loss.min().item())
    losses, path, level_starts = winner.winning_path()
    last = winner.last
    names = list(objective.model.tree.joint_names)
    if last.state.camera_free:
        names += [f"camera{v}.{axis}" for v in range(len(seen.rgb)) for axis in ("vx", "vy", "vz", "wx", "wy", "wz")]
    hessian = last.linearization.hessian[last.linearization.loss.argmin()]
    evidence = evidence_of(objective, hypotheses, found)
    return FitResult(
        q=hypotheses[0].q,
        camera=hypotheses[0].camera,
        loss_history=losses,
        level_starts=level_starts,
        q_history=path,
        covariance=covariance_of(hessian, hypotheses[0].loss, objective.residual_count),
        variable_names=tuple(names),
        hypotheses=hypotheses,
        verdict=verdict(evidence),
        seconds=seconds,
        evidence=evidence,
    )


def distinct_hypotheses(solutions: list[Solution[Configurations]], camera: Camera) -> tuple[Hypothesis, ...]:
    """The end points that differ by more than 0.1 rad (m) in some joint or camera direction, best first."""
    pool = functools.reduce(joined, [s.state for s in solutions])
    losses = torch.cat([s.linearization.loss for s in solutions])
    found: list[int] = []
    for i in losses.argsort().tolist():
        if all(not same_place(pool, i, j, DISTINCT_RAD) for j in found):
            found.append(i)
    hypotheses = []
    for i in found:
        view = replace(camera, T_cam_world=pool.T_cam_world[i])
        view = view if len(camera.K) > 1 else replace(view, K=view.K[0], T_cam_world=view.T_cam_world[0])
        hypotheses.append(Hypothesis(pool.q[i], view, losses[i].item()))
    return tuple(hypotheses)
