"""Global search: from no idea of q to a few good starts, by a population of configurations rendered at 32 px.

A start lies in the basin of least squares when every joint is within about 0.3 rad, which random sampling never meets
in seven joints. A population gets there: keep the best distinct configurations, move some of their joints at random,
with smaller steps every round. Many robots have discrete aliases (a wrist turned over, a shoulder turned by pi with the
elbow bent the other way); half turns and mirrored triples of joints are moves of their own.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from kinesplat.inverse.objective import Configurations, PhotometricObjective
from kinesplat.kinematics import KinematicTree

FIRST_DRAW = 4_096
POPULATION = 128
CHILDREN = 2_048
ROUNDS = ((0.8, 1.5), (0.6, 1.5), (0.5, 1.2), (0.4, 0.9), (0.3, 0.75), (0.25, 0.6), (0.2, 0.45), (0.15, 0.3))
MOVED_SHARE = 0.4
ALIAS_SHARE = 0.2
CHUNK = 256


@dataclass(frozen=True)
class AliasMoves:
    """Moves ``q -> sign * q + offset`` that may leave the picture nearly as it is.

    Attributes:
        sign: ``(moves, dof)`` of +1 and -1.
        offset: ``(moves, dof)`` of 0 and pi [rad].
        lower: ``(dof,)`` the range into which full turns are taken out [rad]/[m].
        upper: ``(dof,)``.
    """

    sign: Float[Tensor, "moves dof"]
    offset: Float[Tensor, "moves dof"]
    lower: Float[Tensor, " dof"]
    upper: Float[Tensor, " dof"]

    @classmethod
    def of(cls, tree: KinematicTree) -> "AliasMoves":
        """Half turns of every hinge, and of every three successive hinges (q1 + pi, -q2, q3 + pi or q3)."""
        hinges = [i for i, kind in enumerate(tree.joint_types) if kind == "hinge"]
        rows = [({i}, set[int]()) for i in hinges]
        for a, b, c in zip(hinges, hinges[1:], hinges[2:], strict=False):
            rows += [({a, c}, {b}), ({a}, {b})]
        sign, offset = torch.ones(len(rows), tree.dof), torch.zeros(len(rows), tree.dof)
        for row, (turned, mirrored) in enumerate(rows):
            offset[row, list(turned)] = math.pi
            sign[row, list(mirrored)] = -1.0
        return cls(sign, offset, *one_turn(tree))

    def apply(self, q: Float[Tensor, "n dof"], move: Integer[Tensor, " n"]) -> Float[Tensor, "n dof"]:
        """Every configuration after its own move, without needless full turns."""
        moved = q * self.sign[move] + self.offset[move]
        return torch.where((moved > self.upper) & (moved - 2.0 * math.pi > self.lower), moved - 2.0 * math.pi, moved)

    def apply_all(self, q: Float[Tensor, "n dof"]) -> Float[Tensor, "m dof"]:
        """Every configuration after every move, ``m = n * moves``."""
        count = len(self.sign)
        return self.apply(q.repeat_interleave(count, dim=0), torch.arange(count).repeat(len(q)))


def one_turn(tree: KinematicTree) -> tuple[Float[Tensor, " dof"], Float[Tensor, " dof"]]:
    """The joint limits, hinges cut to the one turn around the canonical configuration: beyond it pictures repeat."""
    hinge = torch.tensor([kind == "hinge" for kind in tree.joint_types])
    reach = torch.where(hinge, math.pi, math.inf)
    lower = torch.maximum(tree.q_lower, tree.q_canonical - reach)
    return lower.float(), torch.minimum(tree.q_upper, tree.q_canonical + reach).float()


def joint_scale(tree: KinematicTree) -> Float[Tensor, " dof"]:
    """What counts as a unit step of every joint: 1 rad or m, or half the range where that is less."""
    return (0.5 * (tree.q_upper - tree.q_lower)).clamp(max=1.0).float()


def search(
    objective: PhotometricObjective, start: Configurations, count: int, generator: torch.Generator
) -> Configurations:
    """The best distinct configurations of a population that evolves within the joint limits.

    Args:
        objective: at the size at which to search; a few seconds at 32 px with a thousand splats.
        start: one configuration, which is a member of the first generation, and whose cameras are used.
        count: how many to return at most.
        generator: source of randomness.
    """
    tree, moves = start.tree, AliasMoves.of(start.tree)
    q = moves.lower + (moves.upper - moves.lower) * torch.rand(FIRST_DRAW, tree.dof, generator=generator)
    q[0] = start.q[0]
    losses = blurred_losses(objective, start, q, ROUNDS[0][1])
    kept = best_distinct(q, losses, POPULATION, 0.3 * joint_scale(tree))
    q = q[kept]
    for step, blur_px in ROUNDS:
        q = torch.cat([q, children(q, tree, moves, step, generator)])
        losses = blurred_losses(objective, start, q, blur_px)
        kept = best_distinct(q, losses, POPULATION, 0.5 * step * joint_scale(tree))
        q = q[kept]
    return _with_q(start, q[:count])


def with_aliases(objective: PhotometricObjective, state: Configurations, count: int) -> Configurations:
    """The given configurations and the most promising of their aliases, `count` in all."""
    aliases = state.tree.clamp(AliasMoves.of(state.tree).apply_all(state.q))
    if not len(aliases):
        return state
    losses = blurred_losses(objective, state, aliases, 1.0)
    best = losses.argsort()[: max(0, count - len(state.q))]
    return _with_q(state, torch.cat([state.q, aliases[best]]))


def children(
    q: Float[Tensor, "n dof"], tree: KinematicTree, moves: AliasMoves, step: float, generator: torch.Generator
) -> Float[Tensor, "m dof"]:
    """Random variations: some joints of a parent moved by `step` (in units of `joint_scale`), or one alias move."""
    parents = q[torch.arange(CHILDREN) % len(q)]
    moved = (torch.rand(parents.shape, generator=generator) < MOVED_SHARE).float()
    steps = moved * torch.randn(parents.shape, generator=generator) * step * joint_scale(tree)
    if not len(moves.sign):
        return tree.clamp(parents + steps)
    turned = moves.apply(parents, torch.randint(len(moves.sign), (CHILDREN,), generator=generator))
    aliased = torch.rand(CHILDREN, 1, generator=generator) < ALIAS_SHARE
    return tree.clamp(torch.where(aliased, turned, parents + steps))


def best_distinct(
    q: Float[Tensor, "n dof"], losses: Float[Tensor, " n"], count: int, apart: Float[Tensor, " dof"]
) -> Integer[Tensor, " kept"]:
    """Indices of the `count` lowest losses, best first, each `apart` from all better ones in some joint."""
    order = losses.argsort()[: 4 * count]
    far = ((q[order][:, None] - q[order]).abs() > apart).any(dim=-1)
    alive: Bool[Tensor, " n"] = torch.ones(len(order), dtype=torch.bool)
    kept: list[int] = []
    for i in range(len(order)):
        if alive[i] and len(kept) < count:
            kept.append(i)
            alive &= far[i]
    return order[kept]


def blurred_losses(
    objective: PhotometricObjective, like: Configurations, q: Float[Tensor, "n dof"], blur_px: float
) -> Float[Tensor, " n"]:
    """Loss of every configuration after blurring the difference images with a Gaussian of `blur_px`."""
    parts = []
    for chunk in q.split(CHUNK):
        difference = objective.difference(_with_q(like, chunk))
        parts.append(blurred(difference, blur_px).square().sum(dim=-1).mean(dim=(1, 2, 3)))
    return torch.cat(parts)


def blurred(
    images: Float[Tensor, "n views height width c"], sigma_px: float
) -> Float[Tensor, "n views height width c"]:
    """Images convolved with a Gaussian, zero beyond the border."""
    radius = max(1, math.ceil(2.5 * sigma_px))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma_px) ** 2)
    kernel = (kernel / kernel.sum()).to(images)
    planes = images.permute(0, 1, 4, 2, 3)
    flat = planes.reshape(-1, 1, *planes.shape[-2:])
    flat = torch.nn.functional.conv2d(flat, kernel.view(1, 1, 1, -1), padding=(0, radius))
    flat = torch.nn.functional.conv2d(flat, kernel.view(1, 1, -1, 1), padding=(radius, 0))
    return flat.reshape(planes.shape).permute(0, 1, 3, 4, 2)


def _with_q(like: Configurations, q: Float[Tensor, "n dof"]) -> Configurations:
    return replace(like, q=q, T_cam_world=like.T_cam_world[:1].expand(len(q), -1, 4, 4))
