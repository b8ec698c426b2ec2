"""Joints from photographs without masks, in front of anything: found along the chain by contours, sharpened by them."""

import time
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.inverse.coarse_to_fine import same_place
from kinesplat.inverse.contour_objective import CHANCE, Evidence
from kinesplat.inverse.contour_search import (
    SCREEN,
    SHARPEN,
    ContourLevel,
    along_chain,
    best_by_evidence,
    objective_at,
    sharpened,
)
from kinesplat.inverse.levenberg_marquardt import Solution, levenberg_marquardt
from kinesplat.inverse.objective import Configurations
from kinesplat.inverse.observation import Observation
from kinesplat.inverse.result import DISTINCT_RAD, FitResult, Hypothesis, covariance_of
from kinesplat.inverse.search import AliasMoves, collinear_turns, joined, joint_influence, joint_scale
from kinesplat.self_model import SelfModel

FINE = (ContourLevel(640, 1_000_000, 3.0, 8, 500), ContourLevel(640, 1_000_000, 1.5, 8, 800))
STARTS, PARENTS = 16, 4
NEIGHBOURS, NEIGHBOUR_SPREAD = 512, 0.45
EQUAL = 0.01
UNSEEN, RIVAL = 0.8, 0.08
SYSTEMATIC = 12.0


@dataclass(frozen=True)
class ContourEnds:
    """What was found: solutions of all levels of `FINE`, and what the pictures say about the last."""

    solutions: list[Solution[Configurations]]
    evidence: Evidence

    @property
    def losses(self) -> Float[Tensor, " n"]:
        """Share that is missing of the evidence that the contours of the best answer could give: 1 is mere chance."""
        most = CHANCE * self.evidence.length[self.evidence.total.argmax()].clamp(min=1.0)
        return 1.0 - self.evidence.total / most


def reconstruct_by_contours(
    model: SelfModel,
    seen: Observation,
    reference: Float[Tensor, "n dof"],
    near: bool,
    starts: int | None = None,
    seed: int = 0,
) -> FitResult:
    """The joints that explain the edges of pictures whose background is unknown; cameras known.

    Args:
        model: the robot.
        seen: pictures and cameras.
        reference: ``(n, dof)`` guesses, or the canonical configuration; the first decides among equal answers.
        near: whether they are guesses.
        starts: how many configurations are sharpened at the last image sizes; default 16.
        seed: of random neighbours of guesses.
    """
    began = time.perf_counter()
    ends = found_by_contours(model, seen, reference, near, starts or STARTS, seed)
    state, losses = ends.solutions[-1].state, ends.losses
    order = distinct(state, losses, reference[0])
    hypotheses = []
    for i in order:
        camera = seen.camera if len(seen.rgb) > 1 else replace(seen.camera, K=seen.camera.K[0], T_cam_world=seen.camera.T_cam_world[0])
        hypotheses.append(Hypothesis(state.q[i], camera, losses[i].item()))
    best, at = order[0], ends.solutions[-1].linearization
    points = int(ends.evidence.length[best].item())
    evidence = {
        "start": "contours",
        "unexplained": losses[best].item(),
        "gap": losses[order[1]].item() / losses[best].item() if len(order) > 1 else None,
        "edge_distance": ends.evidence.cost[best].item(),
        "contour_px": points,
    }
    lengths = torch.tensor([0, *(len(s.losses) for s in ends.solutions[:-1])]).cumsum(0)
    return FitResult(
        q=state.q[best],
        camera=hypotheses[0].camera,
        loss_history=tuple(torch.cat([s.losses[:, best] for s in ends.solutions]).tolist()),
        level_starts=tuple(lengths.tolist()),
        q_history=torch.stack([path.q[best] for s in ends.solutions for path in s.path]),
        covariance=SYSTEMATIC**2 * covariance_of(at.hessian[best], at.loss[best].item(), points),
        variable_names=tuple(model.tree.joint_names),
        hypotheses=tuple(hypotheses),
        verdict=verdict_of([losses[i].item() for i in order]),
        seconds=time.perf_counter() - began,
        evidence=evidence,
        joint_types=tuple(model.tree.joint_types),
    )


def verdict_of(losses: list[float]) -> str:
    """``failed`` where most of the evidence is missing, ``ambiguous`` where another answer has nearly as much of it."""
    if min(losses) > UNSEEN:
        return "failed"
    return "ambiguous" if len(losses) > 1 and sorted(losses)[1] < min(losses) + RIVAL else "converged"


def found_by_contours(
    model: SelfModel, seen: Observation, reference: Float[Tensor, "n dof"], near: bool, starts: int, seed: int
) -> ContourEnds:
    """The distinct configurations that explain the edges best; arguments as in `reconstruct_by_contours`."""
    influence = joint_influence(model)
    screen, *fine = (objective_at(model, seen, level) for level in (SCREEN, *SHARPEN))
    levels = list(zip(fine, SHARPEN, strict=True))
    state = along_chain(model, seen, reference[0])
    if near:
        around = best_by_evidence(screen, neighbours(state, reference, seed), starts, influence)
        state = joined(state, sharpened(levels, around))
    state = best_by_evidence(fine[-1], state, starts, influence)
    others = aliases(state.select(torch.arange(min(PARENTS, len(state.q)))))
    state = best_by_evidence(fine[-1], joined(state, sharpened(levels, others)), starts, influence)
    solutions = []
    for level in FINE:
        here = objective_at(model, seen, level)
        solutions.append(levenberg_marquardt(here.linearize, state, iterations=level.iterations))
        state = solutions[-1].state
    return ContourEnds(solutions, objective_at(model, seen, FINE[-1]).evidence(state))


def neighbours(like: Configurations, reference: Float[Tensor, "n dof"], seed: int) -> Configurations:
    """The guesses, and random configurations around them."""
    tree, count = like.tree, max(NEIGHBOURS, len(reference))
    noise = 2.0 * torch.rand(count, tree.dof, generator=torch.Generator().manual_seed(seed)) - 1.0
    noise[: len(reference)] = 0.0
    q = reference[torch.arange(count) % len(reference)] + NEIGHBOUR_SPREAD * joint_scale(tree) * noise
    return replace(like, q=tree.clamp(q), T_cam_world=like.T_cam_world[:1].expand(count, -1, -1, -1))


def aliases(state: Configurations) -> Configurations:
    """Half turns of joints and turns about common axes, of every configuration."""
    tree = state.tree
    rows = [AliasMoves.of(tree).apply_all(state.q), *(collinear_turns(tree, q) for q in state.q)]
    q = tree.clamp(torch.cat(rows))
    return replace(state, q=q, T_cam_world=state.T_cam_world[:1].expand(len(q), -1, -1, -1))


def distinct(state: Configurations, losses: Float[Tensor, " n"], reference: Float[Tensor, " dof"]) -> list[int]:
    """Indices of answers that differ by more than 0.1 rad (m) in some joint, best first.

    Those as good as the best go by their distance to `reference`.
    """
    found: list[int] = []
    for i in losses.argsort().tolist():
        if all(not same_place(state, i, j, DISTINCT_RAD) for j in found):
            found.append(i)
    equal = [i for i in found if losses[i] <= losses[found[0]] + EQUAL]
    away = ((state.q[equal] - reference) / joint_scale(state.tree)).abs().mean(dim=1)
    return [*(equal[i] for i in away.argsort().tolist()), *found[len(equal) :]]
