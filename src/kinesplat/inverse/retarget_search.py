"""From tracks alone to a few motions: starts of the outline's shape and random ones, level by level on key frames."""

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinesplat.inverse.key_frames import of_frame
from kinesplat.inverse.outline import outlined
from kinesplat.inverse.retarget_result import Motion
from kinesplat.inverse.retarget_stages import FINE, HOLD, JUDGE, LAST, NEAR, SEARCH, Stage
from kinesplat.inverse.retargeting import Answer, Retargeting, between
from kinesplat.inverse.trajectory import Trajectory
from kinesplat.kinematics import KinematicTree

KEY_FRAMES = 12
OUTLINED, OUTLINES = 5, 3
FEWEST_POINTS = 10
FINISHED = 3


def followed(work: Retargeting, starts: int, seed: int) -> list[Answer]:
    """Motions whose tracks are the demonstration's, by way of some key frames: one, or the best few of a search."""
    frames, every = len(work.every), work.every
    keys = torch.linspace(0, frames - 1, min(frames, KEY_FRAMES)).round().long().unique()
    if work.q_init is None and starts > 1:
        found = search(work, keys, starts, seed)
    else:
        found = [Answer(Trajectory(work.start(keys), work.nothing_shared()), math.inf, [])]
    ways: list[tuple[Stage, ...]] = [(*NEAR, FINE)]
    if work.align:
        ways = [(*SEARCH[1:], *NEAR, FINE)]
    elif work.q_init is not None:
        ways.append((HOLD, NEAR[-1], FINE))
    out = []
    for first in found:
        answer = min((work.along(first, way, keys) for way in ways), key=lambda a: a.loss)
        rivals = tuple(Motion(between(m.q, keys, frames), m.loss) for m in answer.rivals)
        at = Trajectory(between(answer.at.q, keys, frames), answer.at.shared)
        out.append(work.solve(replace(answer, at=at, rivals=rivals), LAST, every))
    return out


def search(work: Retargeting, keys: Int[Tensor, " keys"], starts: int, seed: int) -> list[Answer]:
    """The best of several starts, the first with the limbs of others where those are better.

    Unless the demonstration is aligned and may show something else, half of the starts and more fill the outlines that
    its points have in three frames. The canonical configuration is one, and the rest is drawn from the whole range of
    the joints; these stay as they are throughout.
    """
    tree = work.tree
    lower, upper = tree.q_lower.float(), tree.q_upper.float()
    shaped = [] if work.align else outlined_motions(work, keys, min(OUTLINED, starts - 1), seed)
    generator = torch.Generator().manual_seed(seed)
    rest = lower + (upper - lower) * torch.rand(starts - 1 - len(shaped), tree.dof, generator=generator)
    constant = [q.expand(len(keys), -1).clone() for q in (tree.q_canonical.float(), *rest)]
    found: list[Answer] = []
    for stages, motions in ((SEARCH[1:], shaped), (SEARCH, constant)):
        for q in motions:
            answer = Answer(Trajectory(q, work.nothing_shared()), math.inf, [])
            found.append(work.along(answer, (*stages, JUDGE), keys))
    found.sort(key=lambda answer: answer.loss)
    rivals = tuple(Motion(answer.at.q, answer.loss) for answer in found)
    best = recombined(work, found, keys)
    others = [a for a in found if not torch.equal(a.at.q, best.at.q)][: FINISHED - 1]
    return [replace(answer, rivals=rivals) for answer in (best, *others)]


def outlined_motions(
    work: Retargeting, keys: Int[Tensor, " keys"], count: int, seed: int
) -> list[Float[Tensor, "keys dof"]]:
    """Motions through configurations that fill the outline in three frames: the best of all, the second best of all.

    Every one but the first two stays, in turn, what it is in one of these frames.
    """
    frames = keys[torch.linspace(0, len(keys) - 1, min(OUTLINES, len(keys))).round().long()].unique()
    found: list[tuple[int, Tensor]] = []
    for frame in frames.tolist():
        camera = of_frame(work.camera, frame, work.camera)
        camera = replace(camera, K=camera.K[0], T_cam_world=camera.T_cam_world[0])
        points = work.shown.points[frame][work.shown.visible[frame]]
        shapes = outlined(work.model, points, camera, 2, seed) if len(points) >= FEWEST_POINTS else points[:0]
        found += [(frame, shapes)] * (len(shapes) > 0)
    if not found:
        return []
    known, shapes = torch.tensor([frame for frame, _ in found]), [q for _, q in found]
    ranked = [torch.stack([q[min(rank, len(q) - 1)] for q in shapes]) for rank in range(2)]
    out = [between(q, known, len(work.every))[keys] for q in ranked]
    return [*out, *(q[0].expand(len(keys), -1).clone() for q in shapes)][:count]


def recombined(work: Retargeting, found: list[Answer], keys: Int[Tensor, " keys"]) -> Answer:
    """The best answer with the limbs of others, one limb after the other, as long as that lowers the loss."""
    best = found[0]
    ties = work.ties(len(keys))
    for block in limbs(work.tree):
        for other in found[1:]:
            q = best.at.q.clone()
            q[:, block] = other.at.q[:, block]
            at = Trajectory(q, best.at.shared)
            loss = work.objective(at, JUDGE, keys).linearize(at).loss + ties.loss(q)
            if loss < best.loss:
                best = replace(best, at=at, loss=loss)
    return best


def limbs(tree: KinematicTree) -> list[list[int]]:
    """Joints by the limb that they move: those that move one leaf of the tree alone, leaf by leaf, and all others."""
    with torch.no_grad():
        moves = tree.link_jacobian(tree.q_canonical).abs().amax(dim=1) > 1e-9
    leaves = [link for link in range(len(tree.link_names)) if not bool((tree.parents == link).any())]
    moved = moves[leaves]
    single = moved.sum(dim=0) == 1
    blocks = [torch.nonzero(single & moved[leaf])[:, 0].tolist() for leaf in range(len(leaves))]
    return [block for block in [*blocks, torch.nonzero(~single)[:, 0].tolist()] if block]
