"""Where fits begin: attempts of growing effort, and the configurations (and cameras) that each of them starts from."""

import functools
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.errors import InputError
from kinesplat.inverse.alignment import MaskBoxes, random_views
from kinesplat.inverse.coarse_to_fine import GLOBAL_LEVELS, NEAR_LEVELS, Level
from kinesplat.inverse.initializer import Initializer
from kinesplat.inverse.levenberg_marquardt import levenberg_marquardt
from kinesplat.inverse.objective import CPU, Configurations, PhotometricObjective
from kinesplat.inverse.observation import Observation
from kinesplat.inverse.priors import Priors
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
from kinesplat.inverse.silhouette import SilhouettePull
from kinesplat.self_model import SelfModel
from kinesplat.twists import exp_twist

NEAR_STARTS, GLOBAL_STARTS = 32, 48
START_SPREAD_RAD = 0.45
CAMERA_SPREAD_RAD = 0.1
PROPOSED_APART = 0.1
PULL_STEPS = 30


@dataclass(frozen=True)
class Attempt:
    """One way to look for starts: a first generation, and the rounds in which it evolves.

    Attributes:
        drawn: size of the first generation.
        rounds: length of the random steps and blur [px] of every round; without rounds the best drawn are the starts.
        starts: how many are optimised.
        levels: the image sizes.
        near: whether the first generation is drawn around `q_init`; else from everywhere.
        learned: whether an initializer proposes the starts.
    """

    drawn: int
    rounds: tuple[tuple[float, float], ...]
    starts: int
    levels: tuple[Level, ...]
    near: bool = False
    learned: bool = False


NEAR_ROUNDS = ((0.4, 0.9), (0.3, 0.75), (0.2, 0.45), (0.15, 0.3))
NEAR_ATTEMPTS = (
    Attempt(1_024, (), NEAR_STARTS, NEAR_LEVELS, near=True),
    Attempt(2_048, NEAR_ROUNDS, GLOBAL_STARTS, GLOBAL_LEVELS, near=True),
)
GLOBAL_ATTEMPT = Attempt(4_096, ROUNDS, GLOBAL_STARTS, GLOBAL_LEVELS)
LEARNED_ATTEMPT = Attempt(4_096, (), GLOBAL_STARTS, GLOBAL_LEVELS, learned=True)


def planned(q_init: Float[Tensor, "*starts dof"] | None, starts: int | None, learned: bool) -> list[Attempt]:
    """The attempts that are made until one converges; a single one where the caller sets the starts.

    Raises:
        InputError: `starts` is below 1.
    """
    if starts is not None and starts < 1:
        raise InputError(f"starts is {starts}; expected at least 1")
    anywhere = [LEARNED_ATTEMPT] * learned
    attempts = [*anywhere, *[GLOBAL_ATTEMPT] * 3] if q_init is None else [*NEAR_ATTEMPTS, *anywhere, GLOBAL_ATTEMPT]
    if starts is not None:
        return [replace(attempts[0], starts=starts)]
    if q_init is not None and torch.as_tensor(q_init).dim() > 1:
        return [attempts[0]]
    return attempts


@dataclass(frozen=True)
class Problem:
    """What is known when a fit begins: the model, the pictures, and first guesses of joints and cameras, or none.

    Attributes are arguments of `reconstruct`; `camera_known` says whether there is a guess of the cameras.
    """

    model: SelfModel
    observation: Observation
    q_init: Float[Tensor, "*starts dof"] | None
    seed: int
    camera_free: bool
    camera_known: bool
    initializer: Initializer | None
    colour_weight: float = 1.0
    priors: Priors | None = None
    device: torch.device = CPU

    def objective(self, px: int, splats: int) -> PhotometricObjective:
        """The objective at an image size [px], with a model of at most so many splats."""
        seen, coarse = self.observation.resized(px), self.model.subsample(splats)
        return PhotometricObjective(coarse, seen, self.colour_weight, device=self.device, priors=self.priors)

    def starts(self, attempt: Attempt, number: int, objective: PhotometricObjective) -> Configurations:
        """The configurations that least squares begins with; those around a guess drawn to the silhouette first."""
        state = self.chosen(attempt, number, objective)
        sharp = attempt.near and self.observation.backdrop is None and self.model.skinning is None
        return drawn_to_silhouette(objective, state) if sharp else state

    def chosen(self, attempt: Attempt, number: int, objective: PhotometricObjective) -> Configurations:
        """The most promising configurations of a first generation that evolves as the attempt says."""
        state = self.first_generation(attempt, number)
        if len(state.q) <= attempt.starts:
            return state
        if self.initializer is not None and not attempt.near:
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

    @functools.cached_property
    def reference(self) -> Float[Tensor, "_ dof"]:
        """The guesses of the joints, or the canonical configuration.

        Raises:
            InputError: `q_init` has the wrong size or holds NaN.
        """
        tree = self.model.tree
        q = (tree.q_canonical if self.q_init is None else torch.as_tensor(self.q_init).cpu()).float()
        if q.dim() not in (1, 2) or not len(q):
            raise InputError(f"q_init has shape {tuple(q.shape)}; expected ({tree.dof},) or (starts, {tree.dof})")
        tree.coordinates(q)  # raises on a wrong size or NaN
        return tree.clamp(q.reshape(-1, tree.dof))

    def _joints(self, attempt: Attempt, generator: torch.Generator) -> Float[Tensor, "n dof"]:
        tree, q = self.model.tree, self.reference
        if self.q_init is not None and torch.as_tensor(self.q_init).dim() > 1:
            return q
        share = torch.rand(attempt.drawn if attempt.starts > 1 else 1, tree.dof, generator=generator)
        if attempt.near:
            draws = q + (2.0 * share - 1.0) * START_SPREAD_RAD * joint_scale(tree)
        else:
            lower, upper = one_turn(tree)
            draws = lower + (upper - lower) * share
        draws[0] = q[0]
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


def drawn_to_silhouette(objective: PhotometricObjective, state: Configurations) -> Configurations:
    """Configurations after least squares of the distances to the silhouette, where that makes better pictures.

    Pixels say nothing about a link beside its mask; the distances do, see `SilhouettePull`.
    """
    pull = SilhouettePull.of(objective.model, objective.observation)
    if pull is None:
        return state
    drawn = levenberg_marquardt(pull.linearize, state, iterations=PULL_STEPS).state
    before, after = (objective.residuals(some).square().sum(dim=1).to(state.q) for some in (state, drawn))
    return state.where(after < before, drawn)


def screened(objective: PhotometricObjective, state: Configurations, count: int) -> Configurations:
    """The first configuration and the best of the others by their loss, `count` in all."""
    chunks = torch.arange(len(state.q)).split(CHUNK)
    losses = torch.cat([objective.residuals(state.select(c)).square().sum(dim=1) for c in chunks]).to(state.q.device)
    losses[0] = -1.0
    return state.select(losses.argsort()[:count])
