"""Learning skinning weights: from moving point clouds (the paper), or from link labels (ours).

Both start from points on the links' surfaces. The paper's way sees two clouds without correspondences, the canonical
one and that of a configuration q, and asks that blending carries the first onto the second. It leaves open what
happens along axes of symmetry, and takes longer; labels are there whenever there are meshes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinesplat.kinematics import KinematicTree
from kinesplat.skinning import SkinningField, blend_points, link_motions
from kinesplat.training.chamfer import chamfer
from kinesplat.training.loop import Budget, Tick, decayed, run


@dataclass(frozen=True)
class LinkCloud:
    """Points on the surface of a robot.

    Attributes:
        points: ``(n, 3)`` in the frames of their links [m].
        link_index: ``(n,)`` the link of each.
    """

    points: Float[Tensor, "n 3"]
    link_index: Int[Tensor, " n"]

    def posed(self, tree: KinematicTree, q: Float[Tensor, " dof"]) -> Float[Tensor, "n 3"]:
        """The points in configuration `q`, in the world [m]."""
        Ts = tree.forward_kinematics(q).to(self.points)[self.link_index]
        return (Ts[:, :3, :3] @ self.points[:, :, None])[..., 0] + Ts[:, :3, 3]

    def some(self, count: int, generator: torch.Generator) -> "LinkCloud":
        """`count` of the points, drawn without replacement; all if there are fewer."""
        rows = torch.randperm(len(self.points), generator=generator)[:count].to(self.points.device)
        return LinkCloud(self.points[rows], self.link_index[rows])


def fit_by_chamfer(
    field: SkinningField,
    tree: KinematicTree,
    cloud: LinkCloud,
    budget: Budget,
    *,
    points: int = 2000,
    configurations: int = 2,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
) -> Iterator[Tick]:
    """The paper's way: the Chamfer distance between the canonical cloud, blended to q, and the cloud of q.

    Configurations are uniform within the joint limits. (Beginning near the canonical one, where nearest neighbours are
    the right ones, and going farther step by step does worse: the field settles on too few links.)

    Args:
        field: what learns; it must be scaled to the canonical cloud.
        tree: the robot.
        cloud: surface points; the two clouds of a step are drawn from them apart, so that no point has its twin.
        budget: when to stop.
        points: size of either cloud in a step.
        configurations: how many in a step.
        learning_rate: of Adam, decayed to a tenth.
        seed: of configurations and points.
        progress: show a bar.
    """
    optimizer = torch.optim.Adam(field.parameters(), lr=learning_rate)
    canonical = LinkCloud(cloud.posed(tree, tree.q_canonical), cloud.link_index)
    lower, upper = tree.q_lower, tree.q_upper

    def step(number: int, share: float) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + number)
        shares = torch.rand(configurations, tree.dof, generator=generator, dtype=torch.float64)
        qs = lower + shares * (upper - lower)
        here = canonical.some(points, generator).points
        with field.network.in_low_precision():
            logits = field.logits(here)
        moved = blend_points(here, logits.softmax(-1), link_motions(tree, qs).to(here))
        theres = [cloud.some(points, generator).posed(tree, q) for q in qs]
        loss = torch.stack([chamfer(a, b) for a, b in zip(moved, theres, strict=True)]).mean()
        _descend(optimizer, loss / field.radius.square(), decayed(learning_rate, 0.1 * learning_rate, share))
        return {"chamfer": loss.detach()}

    return run(step, budget, progress=progress, title="skinning by Chamfer")


def fit_by_labels(
    field: SkinningField,
    tree: KinematicTree,
    cloud: LinkCloud,
    budget: Budget,
    *,
    points: int = 4000,
    learning_rate: float = 2e-3,
    seed: int = 0,
    progress: bool = False,
) -> Iterator[Tick]:
    """Our way: cross-entropy of the weights against the link that each surface point belongs to.

    Args:
        field: what learns; it must be scaled to the canonical cloud.
        tree: the robot.
        cloud: surface points with the labels to learn.
        budget: when to stop.
        points: how many take part in a step.
        learning_rate: of Adam, decayed to a twentieth.
        seed: of the points.
        progress: show a bar.
    """
    optimizer = torch.optim.Adam(field.parameters(), lr=learning_rate)
    canonical = LinkCloud(cloud.posed(tree, tree.q_canonical), cloud.link_index)

    def step(number: int, share: float) -> dict[str, Tensor]:
        some = canonical.some(points, torch.Generator().manual_seed(1_000_003 * seed + number))
        with field.network.in_low_precision():
            logits = field.logits(some.points)
        loss = torch.nn.functional.cross_entropy(logits, some.link_index)
        _descend(optimizer, loss, decayed(learning_rate, 0.05 * learning_rate, share))
        return {"cross_entropy": loss.detach()}

    return run(step, budget, progress=progress, title="skinning by labels")


@torch.no_grad()
def skinning_error(
    weights_of: Callable[[Tensor], Tensor],
    tree: KinematicTree,
    cloud: LinkCloud,
    q: Float[Tensor, "b dof"],
) -> dict[str, float]:
    """How well weights carry the canonical cloud to the configurations `q`.

    Returns:
        ``chamfer_m2`` between halves of the cloud (one carried, the other posed exactly), and ``displacement_mm``, the
        mean distance of carried points from where their own link takes them.
    """
    order = torch.randperm(len(cloud.points), generator=torch.Generator().manual_seed(0))
    rows, others = order.tensor_split(2)
    carried, exact = (LinkCloud(cloud.points[r], cloud.link_index[r]) for r in (rows, others))
    canonical = carried.posed(tree, tree.q_canonical)
    weights = weights_of(canonical)
    distances, displacements = [], []
    for one in q:
        moved = blend_points(canonical, weights, link_motions(tree, one).to(canonical))
        distances.append(float(chamfer(moved, exact.posed(tree, one))))
        displacements.append(float((moved - carried.posed(tree, one)).norm(dim=-1).mean()))
    count = len(q)
    return {"chamfer_m2": sum(distances) / count, "displacement_mm": 1000.0 * sum(displacements) / count}


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()  # after, so that nothing is left for the stage that follows
