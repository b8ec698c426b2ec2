"""Which point belongs to which: Chamfer distances between sets of tracks, in every frame or through time."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinesplat.vision.point_tracks import PointTracks

CHUNK_FRAMES = 16
LEAST_WEIGHT = 1e-7


@dataclass(frozen=True)
class Pairs:
    """Points of ours, each in one frame, and where the demonstration wants them.

    Attributes:
        frame: ``(k,)``.
        ours: ``(k,)`` index of our point.
        target: ``(k, 2)`` [px].
        weight: ``(k,)`` of the squared distance.
    """

    frame: Int[Tensor, " k"]
    ours: Int[Tensor, " k"]
    target: Float[Tensor, "k 2"]
    weight: Float[Tensor, " k"]

    @classmethod
    def joined(cls, parts: "list[Pairs]") -> "Pairs":
        """All pairs of several."""
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in ("frame", "ours", "target", "weight")))


@torch.no_grad()
def frame_pairs(shown: PointTracks, ours: PointTracks, backward: float = 1.0) -> Pairs:
    """The nearest visible point in every frame, both ways: the pairs of Liu et al. 2024, eq. 10.

    With their weights the squared distances add up to the sum over time of Chamfer distances: in every frame the mean
    over the points that the demonstration shows, plus `backward` times the mean over ours the other way round.
    """
    parts = []
    for start in range(0, len(shown.points), CHUNK_FRAMES):
        rows = slice(start, start + CHUNK_FRAMES)
        seen, own, places = shown.visible[rows], ours.visible[rows], shown.points[rows]
        distance = torch.cdist(places, ours.points[rows].to(places))
        nearest = torch.where(own[:, None, :], distance, torch.inf).argmin(dim=2)
        frame, index = torch.nonzero(seen & own.any(dim=1, keepdim=True), as_tuple=True)
        weight = 1.0 / seen.sum(dim=1).clamp(min=1)[frame].to(places)
        parts.append(Pairs(frame + start, nearest[frame, index], places[frame, index], weight))
        if backward:
            nearest = torch.where(seen[:, :, None], distance, torch.inf).argmin(dim=1)
            frame, index = torch.nonzero(own & seen.any(dim=1, keepdim=True), as_tuple=True)
            weight = backward / own.sum(dim=1).clamp(min=1)[frame].to(places)
            parts.append(Pairs(frame + start, index, places[frame, nearest[frame, index]], weight))
    return Pairs.joined(parts)


@torch.no_grad()
def track_pairs(shown: PointTracks, distance: Float[Tensor, "n m"], width: float | None = None) -> Pairs:
    """Partners for whole tracks: a point stays the same point, so one partner serves all the frames it is seen in.

    Whether ours can be seen does not matter here: while a motion is still wrong, the right point is often hidden.

    Args:
        shown: the demonstration's.
        distance: squared, of every track from every point of ours [px^2]; infinite where they cannot be partners.
        width: None for the nearest; otherwise every track has many partners, whose shares fall off as a Gaussian of
            this width [px], as in coherent point drift (Myronenko & Song 2010, eq. 6), but between tracks. All targets
            of one of our points in one frame are then replaced by their mean, which leaves the derivatives as they are.
    """
    w = shown.visible.to(distance)
    matched = torch.isfinite(distance.amin(dim=1))
    each = (w * matched) / (w * matched).sum(dim=1, keepdim=True).clamp(min=1.0)
    if width is None:
        frame, index = torch.nonzero(each, as_tuple=True)
        return Pairs(frame, distance.argmin(dim=1)[index], shown.points[frame, index].to(distance), each[frame, index])
    share = torch.nan_to_num(torch.softmax(-distance / (2.0 * width**2), dim=1))
    places = torch.where(shown.visible[..., None], shown.points.to(distance), 0.0)
    weight = each @ share
    moment = torch.stack([(each * places[..., i]) @ share for i in (0, 1)], dim=-1)
    frame, index = torch.nonzero(weight > LEAST_WEIGHT, as_tuple=True)
    kept = weight[frame, index]
    return Pairs(frame, index, moment[frame, index] / kept[:, None], kept)


@torch.no_grad()
def nearest_tracks(distance: Float[Tensor, "n m"]) -> Int[Tensor, " n"]:
    """The partner of every track, -1 for those that have none."""
    nearest = distance.min(dim=1)
    return torch.where(torch.isfinite(nearest.values), nearest.indices, -1)


@torch.no_grad()
def equal_pairs(shown: PointTracks) -> Pairs:
    """Pairs of tracks with our points of the same index."""
    frame, index = torch.nonzero(shown.visible, as_tuple=True)
    weight = 1.0 / shown.visible.sum(dim=1).clamp(min=1)[frame].to(shown.points)
    return Pairs(frame, index, shown.points[frame, index], weight)


@torch.no_grad()
def first_distances(
    shown: PointTracks, ours: PointTracks, reach: float, anchor: Int[Tensor, " n"] | None = None
) -> Float[Tensor, "n m"]:
    """Squared distance [px^2] of every track from the points of ours that are seen near it in its first frame.

    Args:
        shown: the demonstration's.
        ours: ours.
        reach: what is near [px]; all else is infinitely far.
        anchor: the frame to look at, by default that in which each track is first seen.
    """
    anchor = shown.visible.float().argmax(dim=0) if anchor is None else anchor
    n = torch.arange(len(anchor))
    own = ours.points.to(shown.points)[anchor]
    away = (own - shown.points[anchor, n][:, None]).norm(dim=-1)
    near = (away < reach) & ours.visible[anchor] & shown.visible[anchor, n][:, None]
    return torch.where(near, away.square(), torch.inf)


@torch.no_grad()
def mean_squared(shown: PointTracks, ours: Float[Tensor, "frames m 2"]) -> Float[Tensor, "n m"]:
    """Mean squared distance [px^2] of every two tracks over the frames in which the demonstration's is seen."""
    w = shown.visible.to(ours)
    x = torch.where(shown.visible[..., None], shown.points.to(ours), 0.0)
    centre = x.sum(dim=(0, 1)) / w.sum().clamp(min=1.0)
    x, y = torch.where(shown.visible[..., None], x - centre, 0.0), ours - centre
    squared = x.square().sum(dim=(0, 2))[:, None] + w.T @ y.square().sum(dim=-1)
    squared = squared - 2.0 * (x[..., 0].T @ y[..., 0] + x[..., 1].T @ y[..., 1])
    return squared.clamp(min=0.0) / w.sum(dim=0).clamp(min=1.0)[:, None]
