"""Pairs of tracks and their distances, against plain loops."""

import math

import pytest
import torch

from kinesplat.inverse.track_matching import (
    first_distances,
    frame_pairs,
    mean_squared,
    nearest_tracks,
    track_pairs,
)
from kinesplat.vision.point_tracks import PointTracks


def random_tracks(n: int, seed: int) -> PointTracks:
    generator = torch.Generator().manual_seed(seed)
    visible = torch.rand(5, n, generator=generator) < 0.7
    return PointTracks(60.0 * torch.rand(5, n, 2, generator=generator), visible)


def summed(shown: PointTracks, ours: PointTracks, backward: float) -> float:
    """Weighted squared distances of the pairs in every frame."""
    pairs = frame_pairs(shown, ours, backward)
    away = ours.points[pairs.frame, pairs.ours] - pairs.target
    return (pairs.weight * away.square().sum(dim=-1)).sum().item()


def test_pairs_in_every_frame_are_the_nearest() -> None:
    """Eq. 10 by plain loops, with points that nobody sees far off and not chosen."""
    a, b = random_tracks(9, 0), random_tracks(7, 1)
    a = PointTracks(torch.where(a.visible[..., None], a.points, torch.nan), a.visible)
    total = 0.0
    for t in range(5):
        x, y = a.points[t][a.visible[t]], b.points[t][b.visible[t]]
        distance = torch.cdist(x, y).square()
        total += float(distance.amin(dim=1).mean() + 0.5 * distance.amin(dim=0).mean())
    assert summed(a, b, 0.5) == pytest.approx(total, rel=1e-4)
    assert summed(a, a, 1.0) == pytest.approx(0.0, abs=1e-3)
    assert len(frame_pairs(a, b, 0.0).frame) == int((a.visible & b.visible.any(dim=1, keepdim=True)).sum())


def test_pairs_of_whole_tracks() -> None:
    a, b = random_tracks(9, 0), random_tracks(7, 1)
    allowed = torch.rand(9, 7, generator=torch.Generator().manual_seed(2)) < 0.6
    allowed[3] = False
    away = (a.points[:, :, None] - b.points[:, None]).square().sum(dim=-1)
    mean = (away * a.visible[..., None]).sum(dim=0) / a.visible.sum(dim=0)[:, None]
    assert torch.allclose(mean_squared(a, b.points), mean, rtol=1e-3)
    partner = torch.where(allowed, mean, torch.inf).argmin(dim=1)
    distance = torch.where(allowed, mean_squared(a, b.points), torch.inf)
    index = nearest_tracks(distance)
    assert index[3] == -1
    others = torch.arange(9) != 3
    assert torch.equal(index[others], partner[others])
    hard = track_pairs(a, distance)
    loss = (hard.weight * (b.points[hard.frame, hard.ours] - hard.target).square().sum(dim=-1)).sum()
    n = (a.visible & others).sum(dim=1)
    expected = sum(away[t, i, partner[i]] / n[t] for t in range(5) for i in range(9) if a.visible[t, i] and i != 3)
    assert loss.item() == pytest.approx(float(expected), rel=1e-4)
    soft = track_pairs(a, distance, width=0.5)
    again = (soft.weight * (b.points[soft.frame, soft.ours] - soft.target).square().sum(dim=-1)).sum()
    assert again <= loss + 1e-3  # targets of one of our points are averaged
    assert soft.weight.sum().item() == pytest.approx(hard.weight.sum().item(), rel=1e-5)


def test_first_frames_tell_who_is_near_and_seen() -> None:
    a, b = random_tracks(9, 0), random_tracks(7, 1)
    distance = first_distances(a, b, 20.0)
    first = a.visible.float().argmax(dim=0)
    for i in range(9):
        for j in range(7):
            away = (a.points[first[i], i] - b.points[first[i], j]).norm()
            near = bool(away < 20.0 and b.visible[first[i], j])
            assert distance[i, j].item() == (pytest.approx(away.item() ** 2, rel=1e-4) if near else math.inf)
