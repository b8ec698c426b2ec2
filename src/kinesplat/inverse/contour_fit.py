"""Joints from photographs without masks, in front of anything: found along the chain by contours, sharpened by them."""

import math
import time
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.inverse.coarse_to_fine import same_place
from kinesplat.inverse.contour_objective import ContourObjective, Evidence
from kinesplat.inverse.contour_search import (
    SCREEN,
    SHARPEN,
    STEP,
    ContourLevel,
    along_chain,
    best_by_evidence,
    grid,
    objective_at,
    sharpened,
)
from kinesplat.inverse.contour_verdict import rival_loss, verdict_of
from kinesplat.inverse.levenberg_marquardt import Solution, levenberg_marquardt
from kinesplat.inverse.objective import Configurations
from kinesplat.inverse.observation import Observation
from kinesplat.inverse.result import DISTINCT_RAD, FitResult, Hypothesis, covariance_of
from kinesplat.inverse.search import AliasMoves, collinear_turns, joined, joint_influence, joint_scale, one_turn
from kinesplat.self_model import SelfModel

FINE = (ContourLevel(640, 1_000_000, 3.0, 8, 500), ContourLevel(640, 1_000_000, 1.5, 8, 800))
STARTS, PARENTS, RESTED = 16, 4, 2
NEIGHBOURS, NEIGHBOUR_SPREAD = 512, 0.45
VARIED, RANDOM, LAST_JOINTS, LAST_STEP = 128, 512, 4, 0.6
EQUAL = 0.01
UNNOTICED = 0.8
SYSTEMATIC = 6.0  # of standard deviations: as far as fits of a real xArm7 are off its joint readings


def reconstruct_by_contours(
    model: SelfModel,
    seen: Observation,
    reference: Float[Tensor, "n dof"],
    around: int,
    starts: int | None = None,
    seed: int = 0,
) -> FitResult:
    """The joints that explain the edges of pictures whose background is unknown; cameras known.

    Args:
        model: the robot.
        seen: pictures and cameras.
        reference: ``(n, dof)`` guesses, or the canonical configuration; the first decides among equal answers.
        around: how many configurations around the guesses are looked at beside the whole chain; as many as there are
            guesses: these alone; 0: there are none.
        starts: how many configurations are sharpened at the last image sizes, at least 4, for the verdict needs rivals;
            default 16.
        seed: of random neighbours of guesses.
    """
    began = time.perf_counter()
    solutions, here = found_by_contours(model, seen, reference, around, max(starts or STARTS, PARENTS), seed)
    state, proof = with_turns(model, seen, here, solutions[-1].state)
    losses = proof.losses
    count = len(solutions[-1].state.q)
    order = distinct(state, losses[:count], reference[0])
    turns = [i for i in range(count, len(losses)) if all(not same_place(state, i, j, DISTINCT_RAD) for j in order)]
    order = [order[0], *sorted([*order[1:], *turns], key=lambda i: losses[i].item())]
    hypotheses = []
    for i in order:
        camera = (
            seen.camera
            if len(seen.rgb) > 1
            else replace(seen.camera, K=seen.camera.K[0], T_cam_world=seen.camera.T_cam_world[0])
        )
        hypotheses.append(Hypothesis(state.q[i], camera, losses[i].item()))
    best, at = order[0], solutions[-1].linearization
    points = int(proof.length[best].item())
    evidence = {
        "start": "contours",
        "unexplained": losses[best].item(),
        "rival": (1.0 - losses[order[1:]].min().item()) / max(1.0 - losses[best].item(), 1e-30) if order[1:] else None,
        "rendered_on": "cpu",
        "edge_distance": proof.cost[best].item(),
        "contour_px": points,
    }
    lengths = torch.tensor([0, *(len(s.losses) for s in solutions[:-1])]).cumsum(0)
    return FitResult(
        q=state.q[best],
        camera=hypotheses[0].camera,
        loss_history=tuple(torch.cat([s.losses[:, best] for s in solutions]).tolist()),
        level_starts=tuple(lengths.tolist()),
        q_history=torch.stack([path.q[best] for s in solutions for path in s.path]),
        covariance=SYSTEMATIC**2 * covariance_of(at.hessian[best], at.loss[best].item(), points),
        variable_names=tuple(model.tree.joint_names),
        hypotheses=tuple(hypotheses),
        verdict=verdict_of([losses[i].item() for i in order]),
        seconds=time.perf_counter() - began,
        evidence=evidence,
        joint_types=tuple(model.tree.joint_types),
        rival_loss=rival_loss(losses.min().item()),
    )


def found_by_contours(
    model: SelfModel, seen: Observation, reference: Float[Tensor, "n dof"], around: int, starts: int, seed: int
) -> tuple[list[Solution[Configurations]], ContourObjective]:
    """The configurations that explain the edges best, level by level, and the objective of the last level.

    Arguments as in `reconstruct_by_contours`.
    """
    influence = joint_influence(model)
    screen, fine = (objective_at(model, seen, level) for level in (SCREEN, SHARPEN))
    levels = [(replace(screen, sigma_px=4.0), SCREEN), (screen, SCREEN), (fine, SHARPEN)]
    state = along_chain(model, seen, reference[0])
    if around:
        near = best_by_evidence(screen, neighbours(state, reference, around, seed), starts, influence)
        state = joined(state, sharpened(levels, near))
    state = best_by_evidence(fine, state, starts, influence)
    parents = state.select(torch.arange(min(PARENTS, len(state.q))))
    others = best_by_evidence(screen, variations(parents, seed), VARIED, influence)
    state = best_by_evidence(fine, joined(state, sharpened(levels, others)), starts, influence)
    state = joined(state, rested(state.select(torch.arange(min(RESTED, len(state.q)))), reference[0]))
    solutions = []
    for level in FINE:
        here = objective_at(model, seen, level)
        solutions.append(levenberg_marquardt(here.linearize, state, iterations=level.iterations))
        state = solutions[-1].state
    return solutions, here


def with_turns(
    model: SelfModel, seen: Observation, objective: ContourObjective, state: Configurations
) -> tuple[Configurations, Evidence]:
    """The configurations, and the best with single joints elsewhere where contours hardly tell; the evidence of all.

    Turns of a round flange are no minima of their own, so the search need not have come upon them.
    """
    proof = objective.evidence(state)
    best, coarse = state.select(proof.total.argmax()[None]), objective_at(model, seen, SHARPEN)
    turns = turned(best)
    if not len(turns.q):
        return state, proof
    moved = (turns.q != best.q).int().argmax(dim=1)
    told = coarse.evidence(turns).total
    picks = torch.tensor([torch.where(moved == j, told, -torch.inf).argmax().item() for j in moved.unique()])
    turns = turns.select(picks)
    unnoticed = objective.evidence(turns).total >= UNNOTICED * proof.total.max()
    state = joined(state, turns.select(torch.nonzero(unnoticed)[:, 0]))
    return state, objective.evidence(state)


def turned(best: Configurations) -> Configurations:
    """A configuration with each of its joints all over its range, 0.2 rad (m) or more from where it is."""
    tree = best.tree
    lower, upper = one_turn(tree)
    rows = [best.q[:0]]
    for joint in range(tree.dof):
        step = STEP * joint_scale(tree)[joint].item()
        values = grid(lower[joint].item(), upper[joint].item(), step).to(best.q)
        away = values - best.q[0, joint]
        if tree.joint_types[joint] == "hinge":
            away = torch.remainder(away + math.pi, 2.0 * math.pi) - math.pi
        values = values[away.abs() > 2.0 * DISTINCT_RAD]
        q = best.q.repeat(len(values), 1)
        q[:, joint] = values
        rows.append(q)
    q = torch.cat(rows)
    return replace(best, q=q, T_cam_world=best.T_cam_world.expand(len(q), -1, -1, -1))


def neighbours(like: Configurations, reference: Float[Tensor, "n dof"], count: int, seed: int) -> Configurations:
    """The guesses, and random configurations around them, `count` in all."""
    tree = like.tree
    noise = 2.0 * torch.rand(count, tree.dof, generator=torch.Generator().manual_seed(seed)) - 1.0
    noise[: len(reference)] = 0.0
    q = reference[torch.arange(count) % len(reference)] + NEIGHBOUR_SPREAD * joint_scale(tree) * noise
    return replace(like, q=tree.clamp(q), T_cam_world=like.T_cam_world[:1].expand(count, -1, -1, -1))


def variations(parents: Configurations, seed: int) -> Configurations:
    """Half turns of joints, turns about common axes, and random variations of the last joints."""
    tree = parents.tree
    rows = [AliasMoves.of(tree).apply_all(parents.q), *(collinear_turns(tree, q) for q in parents.q)]
    noise = torch.randn(RANDOM, tree.dof, generator=torch.Generator().manual_seed(seed)) * joint_scale(tree)
    noise[:, : max(0, tree.dof - LAST_JOINTS)] = 0.0
    q = tree.clamp(torch.cat([*rows, parents.q.repeat(RANDOM, 1)[:RANDOM] + LAST_STEP * noise]))
    return replace(parents, q=q, T_cam_world=parents.T_cam_world[:1].expand(len(q), -1, -1, -1))


def rested(parents: Configurations, reference: Float[Tensor, " dof"]) -> Configurations:
    """Every configuration with its last joint, its last two, ... at the reference: perhaps no pixel shows them."""
    dof = parents.tree.dof
    rows = []
    for first in range(max(1, dof - LAST_JOINTS), dof):
        rows.append(torch.cat([parents.q[:, :first], reference[first:].expand(len(parents.q), -1)], dim=1))
    q = torch.cat(rows) if rows else parents.q[:0]
    return replace(parents, q=q, T_cam_world=parents.T_cam_world[:1].expand(len(q), -1, -1, -1))


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
