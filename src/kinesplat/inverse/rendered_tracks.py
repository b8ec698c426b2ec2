"""The paper's objective of retargeting: a tracker runs on our rendered frames, and gradients go through it."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.inverse.search import joint_scale
from kinesplat.inverse.surface_tracks import SurfaceTracks
from kinesplat.inverse.track_matching import mean_squared, track_pairs
from kinesplat.inverse.trajectory import Smoothness
from kinesplat.vision.point_tracks import PointTracker, PointTracks, spread_points

RENDERED_PX = 160
QUERIES = 600
STEPS = 80
RATE = 0.01
LAST_RATE = 0.1
NEAR_PX = 2.0
SEEN_SHARE = 0.5


def follow_rendered(
    surface: SurfaceTracks,
    shown: PointTracks,
    tracker: PointTracker,
    q: Float[Tensor, "frames dof"],
    ties: Smoothness,
    steps: int = STEPS,
) -> tuple[Float[Tensor, "frames dof"], list[float]]:
    """Minimise the distance of the demonstration's tracks from those that `tracker` finds in our frames.

    Which distance, and where it departs from the paper's, `rendered_distance` says.

    The tracker is asked for the same points of our surface in every step, where they are in our first frame by then:
    places in the picture that stay would say nothing of an error that all frames share, and places that are drawn anew
    make another loss of every step.

    Args:
        surface: the model, its camera, and points all over it.
        shown: the demonstration's tracks, in the pixels of that camera.
        tracker: its tracks must have gradients when frames or queries have.
        q: the start.
        ties: smoothness.
        steps: of Adam, with a rate that falls to a tenth [0.01 joint units at first].

    Every step ends within the joint limits.

    Returns:
        The motion of the lowest loss, and the loss before every step [px^2].

    Raises:
        InputError: the tracker gives no gradient, or finds nothing to follow on our robot.
    """
    tree, scale = surface.tree, joint_scale(surface.tree)
    camera, factor = small_camera(surface.camera)
    target, surface = shown.scaled(factor), replace(surface, camera=camera)
    points = queried(surface, tree.clamp(q[0]))
    u = (tree.clamp(q) / scale).clone().requires_grad_()
    adam = torch.optim.Adam([u], RATE)
    schedule = torch.optim.lr_scheduler.ExponentialLR(adam, LAST_RATE ** (1.0 / max(steps, 1)))
    best, losses = (torch.inf, q), []
    for _ in range(steps):
        motion = u * scale
        loss = rendered_distance(points, target, tracker, motion) / float(factor[0]) ** 2
        total = loss + _smooth(ties, motion)
        losses.append(float(total.detach()))
        best = min(best, (losses[-1], tree.clamp(motion.detach())), key=lambda pair: pair[0])
        adam.zero_grad()
        total.backward()
        adam.step()
        with torch.no_grad():
            u.copy_(tree.clamp(u * scale) / scale)  # outside of the graph, or a joint beyond its limit had no gradient
        schedule.step()
    return best[1], losses


@torch.no_grad()
def queried(surface: SurfaceTracks, q: Float[Tensor, " dof"]) -> SurfaceTracks:
    """The points that the tracker is asked for: of our surface, spread over the picture of the first frame.

    Raises:
        InputError: the robot is not in the picture.
    """
    first = _first(surface)
    out = surface.model.render(q, first.camera, outputs=("rgb", "alpha"))
    assert out.rgb is not None
    assert out.alpha is not None
    spacing = max(NEAR_PX, float((out.alpha > 0.5).sum() / QUERIES) ** 0.5)
    points, miss = first.under(q, spread_points(out.rgb, out.alpha, spacing))
    points = points.select(miss < NEAR_PX)
    if not len(points.links):
        raise InputError("no point to follow: the robot is not in the first rendered picture")
    return replace(points, camera=surface.camera)


def rendered_distance(
    points: SurfaceTracks, shown: PointTracks, tracker: PointTracker, q: Float[Tensor, "frames dof"]
) -> Float[Tensor, ""]:
    """Half of Liu et al. 2024, eq. 10, between whole tracks; differentiable in q through tracker and renderer [px^2].

    It is the mean squared distance of every demonstrated track from the one of ours that is nearest over all the frames
    it is seen in, added up. The Chamfer distance of eq. 10 looks for the nearest point in every frame by itself, and
    from ours to theirs as well: of a finger that is off by its width it takes the next one, and ours see what no
    demonstrated track may lie on. Our tracks that are seen in fewer than half of the frames are left out; when the
    others are hidden makes no difference.

    Args:
        points: of our surface; the tracker is asked for them in the first frame.
        shown: the demonstration's tracks.
        tracker: which one.
        q: the motion.

    Raises:
        InputError: the tracker gives no gradient, or finds nothing to follow on our robot.
    """
    ours = rendered_tracks(points, tracker, q)
    if not ours.points.requires_grad:
        raise InputError("the tracker gives tracks without gradients; the rendered objective needs them")
    kept = ours.visible.float().mean(dim=0) >= SEEN_SHARE
    if not bool(kept.any()):
        raise InputError("the tracker loses all points of our rendered frames")
    ours = ours.select(kept)
    pairs = track_pairs(shown, mean_squared(shown, ours.points.detach()))
    away = ours.points[pairs.frame, pairs.ours] - pairs.target
    return (pairs.weight * away.square().sum(dim=-1)).sum()


def rendered_tracks(points: SurfaceTracks, tracker: PointTracker, q: Float[Tensor, "frames dof"]) -> PointTracks:
    """What `tracker` says of a rendered motion, of points of our surface in its first frame."""
    rgb = points.model.render(q, points.camera, outputs=("rgb",)).rgb
    assert rgb is not None
    first = _first(points)
    places = first.pixels(first.in_camera(q[:1]))[0]
    return tracker(rgb, torch.nn.functional.pad(places, (1, 0)))


def _first(surface: SurfaceTracks) -> SurfaceTracks:
    """The surface seen by the camera of the first frame."""
    camera = surface.camera
    K, T = camera.K.reshape(-1, 3, 3)[0], camera.T_cam_world.reshape(-1, 4, 4)[0]
    return replace(surface, camera=replace(camera, K=K, T_cam_world=T))


def small_camera(camera: Camera) -> tuple[Camera, Float[Tensor, "2"]]:
    """The camera at the size that is rendered, and how many of its pixels are one of the camera's."""
    shrink = min(1.0, RENDERED_PX / max(camera.width, camera.height))
    width, height = (max(8, round(shrink * side)) for side in (camera.width, camera.height))
    return camera.resized(width, height), torch.tensor([width / camera.width, height / camera.height])


def _smooth(ties: Smoothness, q: Float[Tensor, "frames dof"]) -> Float[Tensor, ""]:
    bend = q[2:] - 2.0 * q[1:-1] + q[:-2]
    rest = (ties.rest * (q - ties.q_rest)).square().sum()
    return rest + (ties.acceleration * bend).square().sum()
