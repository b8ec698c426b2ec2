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

from kinesplat.inverse.alignment import MaskBoxes
from kinesplat.inverse.levenberg_marquardt import levenberg_marquardt
from kinesplat.inverse.objective import Configurations, PhotometricObjective
from kinesplat.kinematics import KinematicTree
from kinesplat.self_model import SelfModel
from kinesplat.twists import exp_twist

POPULATION = 128
CHILDREN = 2_048
ROUNDS = ((0.8, 1.5), (0.6, 1.5), (0.5, 1.2), (0.4, 0.9), (0.3, 0.75), (0.25, 0.6), (0.2, 0.45), (0.15, 0.3))
MOVED_SHARE = 0.4
ALIAS_SHARE = 0.2
ALIAS_STEPS = 8
LEAST_INFLUENCE = 0.05
HELD_SHARE = 0.5
TURN_SHARE = 0.3
SHARPENING = 3
BLOCK_PX = 4
COLLINEAR, TWELVE = 0.15, 12
SHORT_RANGE = 1.0
CHUNK = 256


@dataclass(frozen=True)
class AliasMoves:
    """Moves ``q -> sign * q + offset`` that may leave the picture nearly as it is.

    Attributes:
        sign: ``(moves, dof)`` of +1 and -1; 0 where a joint is set to a value.
        offset: ``(moves, dof)`` [rad]/[m]; of turns in [0, 2 pi).
        lower: ``(dof,)`` the range into which full turns are taken out [rad]/[m].
        upper: ``(dof,)``.
    """

    sign: Float[Tensor, "moves dof"]
    offset: Float[Tensor, "moves dof"]
    lower: Float[Tensor, " dof"]
    upper: Float[Tensor, " dof"]

    @classmethod
    def of(cls, tree: KinematicTree, steps: int = 2) -> "AliasMoves":
        """Half turns of every hinge, and of every three successive hinges (q1 + pi, -q2, q3 + pi or q3).

        Grippers, in whose few pixels least squares goes astray, are shut, half open and open: joints of a short range.

        Args:
            tree: the robot's kinematics.
            steps: into how many a turn of a single hinge is divided; flanges look alike at many angles.
        """
        hinges = [i for i, kind in enumerate(tree.joint_types) if kind == "hinge"]
        rows = [({i}, set[int](), 2.0 * math.pi * step / steps) for i in hinges for step in range(1, steps)]
        for a, b, c in zip(hinges, hinges[1:], hinges[2:], strict=False):
            rows += [({a, c}, {b}, math.pi), ({a}, {b}, math.pi)]
        turns = len(rows)
        span = tree.q_upper - tree.q_lower
        short = [i for i in range(tree.dof) if tree.q_limited[i] and span[i] < SHORT_RANGE]
        rows += [({i}, set(), (tree.q_lower[i] + share * span[i]).item()) for i in short for share in (0.0, 0.5, 1.0)]
        sign, offset = torch.ones(len(rows), tree.dof), torch.zeros(len(rows), tree.dof)
        for row, (turned, mirrored, angle) in enumerate(rows):
            offset[row, list(turned)] = angle
            sign[row, list(mirrored)] = -1.0
            sign[row, list(turned) if row >= turns else []] = 0.0
        return cls(sign, offset, *one_turn(tree))

    def apply(self, q: Float[Tensor, "n dof"], move: Integer[Tensor, " n"]) -> Float[Tensor, "n dof"]:
        """Every configuration after its own move, without needless full turns."""
        moved = q * self.sign[move] + self.offset[move]
        return torch.where((moved > self.upper) & (moved - 2.0 * math.pi > self.lower), moved - 2.0 * math.pi, moved)

    def apply_all(self, q: Float[Tensor, "n dof"]) -> Float[Tensor, "m dof"]:
        """Every configuration after every move, ``m = n * moves``."""
        count = len(self.sign)
        return self.apply(q.repeat_interleave(count, dim=0), torch.arange(count).repeat(len(q)))


def collinear_turns(tree: KinematicTree, q: Float[Tensor, " dof"]) -> Float[Tensor, "n dof"]:
    """Turns of two hinges on nearly the same axis against each other: what they carry stays where it was.

    Eleven twelfths of a turn for every pair, once more with the hinges between them bent the other way, all without
    needless full turns; none where no two axes coincide.
    """
    hinges = torch.tensor([kind == "hinge" for kind in tree.joint_types])
    twists = tree.link_jacobian(q)[-1]
    same = [(twists[:, :, None] - sign * twists[:, None]).abs().amax(dim=0) < COLLINEAR for sign in (1.0, -1.0)]
    moving = hinges & (twists[3:].norm(dim=0) > 0.5)
    lower, upper = one_turn(tree)
    rows = []
    for sign, pairs in zip((-1.0, 1.0), same, strict=True):
        for a, b in torch.nonzero(torch.triu(pairs & moving & moving[:, None], diagonal=1)).tolist():
            for step in range(1, TWELVE):
                turned = q.clone()
                turned[a] += 2.0 * math.pi * step / TWELVE
                turned[b] += sign * 2.0 * math.pi * step / TWELVE
                bent = torch.where(
                    hinges & (torch.arange(tree.dof) > a) & (torch.arange(tree.dof) < b), -turned, turned
                )
                rows += [turned, bent]
    if not rows:
        return q.new_zeros(0, tree.dof)
    out = torch.stack(rows)
    over = torch.where(hinges & (out > upper), 2.0 * math.pi, 0.0)
    under = torch.where(hinges & (out < lower), 2.0 * math.pi, 0.0)
    return out - over + under


def one_turn(tree: KinematicTree) -> tuple[Float[Tensor, " dof"], Float[Tensor, " dof"]]:
    """The joint limits, hinges cut to the one turn around the canonical configuration: beyond it pictures repeat."""
    hinge = torch.tensor([kind == "hinge" for kind in tree.joint_types])
    reach = torch.where(hinge, math.pi, math.inf)
    lower = torch.maximum(tree.q_lower, tree.q_canonical - reach)
    return lower.float(), torch.minimum(tree.q_upper, tree.q_canonical + reach).float()


def joint_scale(tree: KinematicTree) -> Float[Tensor, " dof"]:
    """What counts as a unit step of every joint: 1 rad or m, or half the range where that is less."""
    return (0.5 * (tree.q_upper - tree.q_lower)).clamp(max=1.0).float()


def joint_influence(model: SelfModel) -> Float[Tensor, " dof"]:
    """How much a joint moves in the picture against the one that moves most: root of the ratio of mean surface speeds.

    A flange that turns on the spot must not fill a population with answers that look alike.
    """
    tree = model.tree
    q = tree.q_canonical.float()
    twists = tree.link_jacobian(q)[model.link_index].to(model.parameters.means)
    points = model.posed(q).means[..., None].expand(-1, -1, tree.dof)
    speeds = twists[:, :3] + torch.linalg.cross(twists[:, 3:], points, dim=1)
    speed = speeds.square().sum(dim=1).mean(dim=0).sqrt() * joint_scale(tree).to(speeds)
    return (speed / speed.max().clamp(min=1e-9)).sqrt().clamp(min=LEAST_INFLUENCE)


def search(
    objective: PhotometricObjective,
    population: Configurations,
    count: int,
    generator: torch.Generator,
    boxes: MaskBoxes | None = None,
    rounds: tuple[tuple[float, float], ...] = ROUNDS,
) -> Configurations:
    """The best distinct configurations of a population that evolves within the joint limits.

    Every round keeps the best distinct members, sharpens them by a few steps of least squares and adds their children.

    Args:
        objective: at the size at which to search; a few seconds at 32 px with a thousand splats.
        population: the first generation; where its cameras are free, they are searched as well.
        count: how many to return at most.
        generator: source of randomness.
        boxes: of the masks, for free cameras: every camera is moved so that the robot fills them.
        rounds: length of the random steps (in units of `joint_scale`) and blur [px] of every round.
    """
    moves = AliasMoves.of(population.tree)
    population = _kept(objective, population, rounds[0][1], 0.6 * rounds[0][0])
    for step, blur_px in rounds:
        young = children(population, moves, step, generator, boxes)
        population = _kept(objective, joined(population, young), blur_px, 0.5 * step)
    return population.select(torch.arange(min(count, len(population.q))))


def _kept(objective: PhotometricObjective, all_: Configurations, blur_px: float, apart: float) -> Configurations:
    """The best distinct ones of a generation, after a few steps of least squares."""
    losses = blurred_losses(objective, all_, blur_px)
    best = all_.select(best_distinct(all_, losses, POPULATION, apart, joint_influence(objective.model)))
    return levenberg_marquardt(objective.linearize, best, iterations=SHARPENING).state


def joined(a: Configurations, b: Configurations) -> Configurations:
    """One batch of two."""
    return replace(a, q=torch.cat([a.q, b.q]), T_cam_world=torch.cat([a.T_cam_world, b.T_cam_world]))


def with_aliases(
    objective: PhotometricObjective, state: Configurations, count: int
) -> tuple[Configurations, Integer[Tensor, " all"]]:
    """The given configurations and the most promising of their aliases, `count` in all; and of which each comes.

    Every move is made once, from the configuration that suits it best, for a few moves leave nearly the same picture. A
    free camera stays, or turns along so that the last link stays where it was in the picture.
    """
    moves, itself = AliasMoves.of(state.tree, ALIAS_STEPS), torch.arange(len(state.q))
    q = state.tree.clamp(moves.apply_all(state.q))
    if not len(q):
        return state, itself
    of = itself.repeat_interleave(len(moves.sign))
    move = torch.arange(len(moves.sign)).repeat(len(itself))
    aliases = replace(state, q=q, T_cam_world=state.T_cam_world[of])
    if state.camera_free:
        tip = torch.full((len(q),), len(state.tree.link_names) - 1)
        held = aliases.T_cam_world @ follow(state.tree, state.q[of], q, tip)
        aliases, of, move = joined(aliases, replace(aliases, T_cam_world=held)), of.repeat(2), move.repeat(2)
    best: dict[int, int] = {}
    for i in block_losses(objective, aliases).argsort().tolist():
        best.setdefault(int(move[i]), i)
    best_of_all = torch.tensor(list(best.values())[: max(0, count - len(state.q))], dtype=torch.long)
    return joined(state, aliases.select(best_of_all)), torch.cat([itself, of[best_of_all]])


def follow(
    tree: KinematicTree, before: Float[Tensor, "n dof"], after: Float[Tensor, "n dof"], link: Integer[Tensor, " n"]
) -> Float[Tensor, "n 1 4 4"]:
    """What `T_cam_world` is multiplied with on the right so that a link stays in place while q changes."""
    rows = torch.arange(len(link))
    old, new = (tree.forward_kinematics(q)[rows, link] for q in (before, after))
    return (old @ torch.linalg.inv(new))[:, None]


def children(
    parents: Configurations,
    moves: AliasMoves,
    step: float,
    generator: torch.Generator,
    boxes: MaskBoxes | None = None,
) -> Configurations:
    """Random variations: some joints of a parent moved by `step` (in units of `joint_scale`), or one alias move.

    A free camera turns along, half of the times so that some link (not the base) stays where it was in the picture.
    """
    tree = parents.tree
    parents = parents.select(torch.arange(CHILDREN) % len(parents.q))
    moved = (torch.rand(parents.q.shape, generator=generator) < MOVED_SHARE).float()
    q = parents.q + moved * torch.randn(parents.q.shape, generator=generator) * step * joint_scale(tree)
    if len(moves.sign):
        turned = moves.apply(parents.q, torch.randint(len(moves.sign), (CHILDREN,), generator=generator))
        q = torch.where(torch.rand(CHILDREN, 1, generator=generator) < ALIAS_SHARE, turned, q)
    q = tree.clamp(q)
    if not parents.camera_free:
        return replace(parents, q=q)
    link = torch.randint(len(tree.link_names), (CHILDREN,), generator=generator)
    held = torch.rand(CHILDREN, generator=generator) < HELD_SHARE
    shift = torch.where(held[:, None, None, None], follow(tree, parents.q, q, link), torch.eye(4))
    turn = torch.randn(*parents.T_cam_world.shape[:2], 6, generator=generator) * torch.tensor([0.0] * 3 + [1.0] * 3)
    T = exp_twist(TURN_SHARE * step * turn) @ parents.T_cam_world @ shift
    return replace(parents, q=q, T_cam_world=T if boxes is None else boxes.aligned(q, T))


def best_distinct(
    state: Configurations,
    losses: Float[Tensor, " n"],
    count: int,
    apart: float,
    influence: Float[Tensor, " dof"] | float = 1.0,
) -> Integer[Tensor, " kept"]:
    """Indices of the `count` lowest losses, best first, each `apart` from all better ones in some joint or direction.

    `apart` is in units of `joint_scale`, and in rad for the directions of free cameras. Full turns are no difference,
    and joints count by their `influence`.
    """
    order = losses.argsort()[: 4 * count]
    hinge = torch.tensor([kind == "hinge" for kind in state.tree.joint_types])
    q = state.q[order]
    places = torch.cat([torch.where(hinge, q.cos(), q), torch.where(hinge, q.sin(), 0.0)], dim=1)
    places = places * (influence / joint_scale(state.tree)).repeat(2)
    if state.camera_free:
        places = torch.cat([places, state.T_cam_world[order, :, :3, :3].flatten(1)], dim=1)
    far = torch.cdist(places, places, p=math.inf) > apart
    alive: Bool[Tensor, " n"] = torch.ones(len(order), dtype=torch.bool)
    kept: list[int] = []
    for i in range(len(order)):
        if alive[i] and len(kept) < count:
            kept.append(i)
            alive &= far[i]
    return order[kept]


def blurred_losses(objective: PhotometricObjective, state: Configurations, blur_px: float) -> Float[Tensor, " n"]:
    """Loss of every configuration after blurring the difference images with a Gaussian of `blur_px`."""
    parts = []
    for chunk in torch.arange(len(state.q)).split(CHUNK):
        difference = objective.difference(state.select(chunk))
        parts.append(blurred(difference, blur_px).square().sum(dim=-1).mean(dim=(1, 2, 3)))
    return torch.cat(parts).to(state.q.device)


def block_losses(objective: PhotometricObjective, state: Configurations) -> Float[Tensor, " n"]:
    """Loss of every configuration after averaging the difference images over blocks of 4 x 4 pixels."""
    parts = []
    for chunk in torch.arange(len(state.q)).split(CHUNK):
        planes = objective.difference(state.select(chunk)).flatten(0, 1).permute(0, 3, 1, 2)
        blocks = torch.nn.functional.avg_pool2d(planes, BLOCK_PX, ceil_mode=True)
        parts.append(blocks.square().sum(dim=1).mean(dim=(1, 2)).unflatten(0, (len(chunk), -1)).mean(dim=1))
    return torch.cat(parts).to(state.q.device)


def blurred(
    images: Float[Tensor, "n views height width c"], sigma_px: float
) -> Float[Tensor, "n views height width c"]:
    """Images convolved with a Gaussian, zero beyond the border."""
    across, down = (_gaussian_rows(size, sigma_px).to(images) for size in (images.shape[3], images.shape[2]))
    planes = images.permute(0, 1, 4, 2, 3)
    return (down @ planes @ across.mT).permute(0, 1, 3, 4, 2)


def _gaussian_rows(size: int, sigma_px: float) -> Float[Tensor, "size size"]:
    """Row i holds the weights of all pixels of a line in the blurred pixel i: small images blur fastest by matrices."""
    radius = max(1, math.ceil(2.5 * sigma_px))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma_px) ** 2)
    away = torch.arange(size)[:, None] - torch.arange(size)
    rows = torch.exp(-0.5 * (away / sigma_px) ** 2) / kernel.sum()
    return torch.where(away.abs() <= radius, rows, 0.0)
