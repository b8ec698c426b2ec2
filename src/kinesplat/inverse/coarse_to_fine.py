"""Coarse to fine: a population of starts, sharpened by least squares at growing image sizes until a few are left."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from kinesplat.inverse.levenberg_marquardt import Solution, levenberg_marquardt
from kinesplat.inverse.objective import Configurations, PhotometricObjective
from kinesplat.inverse.search import with_aliases

APART = 0.025


@dataclass(frozen=True)
class Level:
    """One image size.

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
    Level(128, 3_000, 8, 0.25),
    Level(128, 3_000, 6, 0.4, aliases=True),
    Level(256, 1_000_000, 10, 0.125),
)
GLOBAL_LEVELS = (
    Level(32, 1_000, 12, 1.0),
    Level(64, 3_000, 12, 0.35),
    Level(64, 3_000, 12, 0.5, aliases=True),
    Level(128, 3_000, 10, 0.25, aliases=True),
    Level(256, 1_000_000, 10, 0.1),
)


def levels_for(levels: Sequence[Level], long_side: int) -> list[Level]:
    """The stages that the size of the images allows; the last one is at full size, or 256 px, with the whole model."""
    *coarse, last = levels
    return [*(level for level in coarse if level.px < long_side), replace(last, px=min(last.px, long_side))]


@dataclass(frozen=True)
class Refinement:
    """The way of a population through all levels.

    Attributes:
        solutions: what least squares found at every level.
        parents: for every level but the first, the index of each start in the level before.
    """

    solutions: list[Solution[Configurations]]
    parents: list[Tensor]

    @property
    def last(self) -> Solution[Configurations]:
        """The finest level."""
        return self.solutions[-1]

    def path_to(self, index: int) -> tuple[tuple[float, ...], Float[Tensor, "iterations dof"], tuple[int, ...]]:
        """Losses and configurations on the way to a start of the finest level, and where each level begins."""
        losses, path = [], []
        for level in reversed(range(len(self.solutions))):
            losses.insert(0, self.solutions[level].losses[:, index])
            path.insert(0, torch.stack([state.q[index] for state in self.solutions[level].path]))
            index = int(self.parents[level - 1][index]) if level else index
        lengths = torch.tensor([0, *[len(level) for level in losses[:-1]]]).cumsum(0)
        return tuple(torch.cat(losses).tolist()), torch.cat(path), tuple(lengths.tolist())


def refine(
    levels: Sequence[Level],
    objectives: Sequence[PhotometricObjective],
    state: Configurations,
) -> Refinement:
    """Sharpen starts through all levels, fewer and fewer of them.

    Args:
        levels: coarse to fine.
        objectives: one per level.
        state: the starts of the first level.
    """
    starts, solutions, parents = len(state.q), [], []
    for level, objective in zip(levels, objectives, strict=True):
        if solutions:
            count = max(2, round(starts * level.kept))
            kept = survivors(solutions[-1], min(4, count) if level.aliases else count)
            state = solutions[-1].state.select(kept)
            if level.aliases:
                state, of = with_aliases(objective, state, max(4, count))
                kept = kept[of]
            parents.append(kept)
        solutions.append(levenberg_marquardt(objective.linearize, state, iterations=level.iterations))
    return Refinement(solutions, parents)


def survivors(solution: Solution[Configurations], count: int) -> Integer[Tensor, " kept"]:
    """Indices of the `count` best distinct configurations of a level (all distinct ones when there are fewer)."""
    kept: list[int] = []
    for i in solution.linearization.loss.argsort().tolist():
        if all(not same_place(solution.state, i, j, APART) for j in kept):
            kept.append(i)
    return torch.tensor(kept[:count])


def same_place(state: Configurations, i: int, j: int, apart: float) -> bool:
    """Whether two configurations differ by less than `apart` [rad]/[m] in every joint, and their free cameras alike.

    Full turns are no difference.
    """
    away = state.q[i] - state.q[j]
    hinge = torch.tensor([kind == "hinge" for kind in state.tree.joint_types])
    turned = torch.remainder(away + math.pi, 2.0 * math.pi) - math.pi
    joints = torch.where(hinge, turned, away).abs().max().item() <= apart
    cameras = (state.T_cam_world[i] - state.T_cam_world[j])[:, :3, :3].abs().max().item() <= apart
    return joints and (cameras or not state.camera_free)
