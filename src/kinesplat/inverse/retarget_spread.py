"""How sure a retargeted motion is: what its tracks say of every joint, apart from what holds the motion together."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kinesplat.inverse.search import joint_scale
from kinesplat.inverse.surface_tracks import SurfaceTracks
from kinesplat.inverse.track_matching import equal_pairs
from kinesplat.inverse.track_objective import TrackObjective
from kinesplat.inverse.trajectory import Smoothness, Trajectory, covariances
from kinesplat.vision.point_tracks import PointTracks

LEAST_PX, ROBUST = 0.1, 3.0  # [px of a picture of 256 px]
LEAST_UNREST = 0.01
BARE = 0.25
EVEN = 12.0**0.5
ALL_ROUND = 2.0 * math.pi


def spread(
    ours: SurfaceTracks, shown: PointTracks, partners: SurfaceTracks, at: Trajectory, ties: Smoothness, unit: float
) -> Float[Tensor, "frames dof dof"]:
    """Covariances of the joints of every frame [rad^2]/[m^2].

    A track counts as one observation, since a partner that is off is off in all frames; its residual is a tenth of a
    pixel at least. Smoothness is taken for what it is, a guess: accelerations are as large as this motion's own. The
    pull towards the start is worth what it costs where a pixel of error is one standard deviation: 0.1 rad where the
    joints were known, and nearly nothing elsewhere. A partner beside a joint may as well lie on the other side, and
    says nothing here; nor do the few partners on a limb that is in sight and nearly bare of tracks, since these are of
    what is shown in its place.

    Args:
        ours: points all over our surface.
        shown: tracks that have a partner.
        partners: the points of ours, as many.
        at: the motion.
        ties: what held it together.
        unit: pixels of the camera in one of a picture of 256 px.

    Returns:
        With infinite variance where a joint is no better known than by its range.
    """
    tree = partners.tree
    sure = ~beside_a_joint(partners) & ~sparse(ours, partners, shown, at.q)
    told = shown.select(sure)
    blocks = TrackObjective(told, partners.select(sure), lambda s, o, q: equal_pairs(s), ROBUST * unit).linearize(
        Trajectory(at.q.double(), at.shared.double())
    )
    scale = joint_scale(tree)
    bend = (at.q[2:] - 2.0 * at.q[1:-1] + at.q[:-2]) / scale
    unrest = max(bend.square().mean().sqrt().item() if len(bend) else 0.0, LEAST_UNREST)
    guess = Smoothness(1.0 / (unrest * scale), ties.rest / unit, ties.q_rest)
    turns = torch.tensor([kind == "hinge" for kind in tree.joint_types])
    width = (tree.q_upper - tree.q_lower).float()
    width = torch.where(tree.q_limited | ~turns, width, ALL_ROUND)
    tracks = int(told.visible.any(dim=0).sum())
    variance = max(blocks.loss / tracks, (LEAST_PX * unit) ** 2) if tracks else math.inf
    return covariances(blocks, guess, variance, width / EVEN)


def beside_a_joint(points: SurfaceTracks) -> Bool[Tensor, " n"]:
    """Which points have surface of the link before or after theirs within a tolerance, in the canonical configuration.

    Links without surface are passed over.
    """
    model, tree = points.model, points.tree
    before = carriers(tree.parents, model.link_index)
    Ts = tree.forward_kinematics(tree.q_canonical.float())
    places = (Ts[points.links, :3, :3] @ points.points[..., None])[..., 0] + Ts[points.links, :3, 3]
    means = model.posed(tree.q_canonical.float()).means.detach()
    out = torch.zeros(len(points.links), dtype=torch.bool)
    for link in points.links.unique().tolist():
        mine = torch.nonzero(points.links == link)[:, 0]
        others = (model.link_index == before[link]) | (before[model.link_index] == link)
        if bool(others.any()):
            out[mine] = torch.cdist(places[mine], means[others]).amin(dim=1) < points.tolerance
    return out


def sparse(
    ours: SurfaceTracks, partners: SurfaceTracks, shown: PointTracks, q: Float[Tensor, "frames dof"]
) -> Bool[Tensor, " n"]:
    """Which partners lie beyond a link from which on there are far fewer tracks than its surface in sight would have.

    Tracks of what is shown find such partners where our robot hides what is shown.
    """
    tree = ours.tree
    seen = torch.zeros(len(tree.parents)).index_add(0, ours.links, ours.visible(q).sum(dim=0).float())
    told = torch.zeros(len(tree.parents)).index_add(0, partners.links, shown.visible.sum(dim=0).float())
    whole_seen, whole_told = seen.sum(), told.sum()
    parents = tree.parents.tolist()  # each comes before its children
    for link in reversed([link for link, parent in enumerate(parents) if parent >= 0]):
        seen[parents[link]] += seen[link]
        told[parents[link]] += told[link]
    bare = told * whole_seen < BARE * seen * whole_told
    for link, parent in enumerate(parents):
        bare[link] |= parent >= 0 and bool(bare[parent])
    return bare[partners.links]


def carriers(parents: Int[Tensor, " links"], link_index: Int[Tensor, " m"]) -> Int[Tensor, " links"]:
    """The nearest link before every link that has surface; -1 for none."""
    seen = set(link_index.unique().tolist())
    out = []
    for link in range(len(parents)):
        before = int(parents[link])
        while before >= 0 and before not in seen:
            before = int(parents[before])
        out.append(before)
    return torch.tensor(out)
