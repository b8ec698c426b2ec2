"""The paper's objective of retargeting: a tracker runs on our rendered frames, and gradients go through it."""

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.inverse.search import joint_scale
from kinesplat.inverse.surface_tracks import SurfaceTracks
from kinesplat.inverse.track_matching import chamfer
from kinesplat.inverse.trajectory import Smoothness
from kinesplat.self_model import SelfModel
from kinesplat.vision.point_tracks import PointTracker, PointTracks, spread_points

RENDERED_PX = 160
QUERIES = 150
STEPS = 80
RATE = 0.01
LAST_RATE = 0.1


def follow_rendered(
    surface: SurfaceTracks,
    shown: PointTracks,
    tracker: PointTracker,
    q: Float[Tensor, "frames dof"],
    ties: Smoothness,
    steps: int = STEPS,
) -> tuple[Float[Tensor, "frames dof"], list[float]]:
    """Minimise the Chamfer distance between the demonstration's tracks and those that `tracker` finds in our frames.

    Args:
        surface: the model and its camera.
        shown: the demonstration's tracks, in the pixels of that camera.
        tracker: its tracks must have gradients when frames have.
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
    target = shown.scaled(factor)
    u = (tree.clamp(q) / scale).clone().requires_grad_()
    adam = torch.optim.Adam([u], RATE)
    schedule = torch.optim.lr_scheduler.ExponentialLR(adam, LAST_RATE ** (1.0 / max(steps, 1)))
    best, losses = (torch.inf, q), []
    for _ in range(steps):
        motion = u * scale
        loss = rendered_chamfer(surface.model, camera, target, tracker, motion) / float(factor[0]) ** 2
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


def rendered_chamfer(
    model: SelfModel, camera: Camera, shown: PointTracks, tracker: PointTracker, q: Float[Tensor, "frames dof"]
) -> Float[Tensor, ""]:
    """Liu et al. 2024, eq. 10, with our tracks from a tracker on rendered frames; differentiable in q [px^2].

    Raises:
        InputError: the tracker gives no gradient, or finds nothing to follow on our robot.
    """
    ours = rendered_tracks(model, camera, tracker, q)
    if not ours.points.requires_grad:
        raise InputError("the tracker gives tracks without gradients; the rendered objective needs them")
    return chamfer(shown, ours)


def rendered_tracks(
    model: SelfModel,
    camera: Camera,
    tracker: PointTracker,
    q: Float[Tensor, "frames dof"],
    places: Float[Tensor, "n 2"] | None = None,
) -> PointTracks:
    """What `tracker` says of a rendered motion, of points in its first frame [px]: by default spread over the robot.

    Raises:
        InputError: the robot is not in the picture.
    """
    out = model.render(q, camera, outputs=("rgb", "alpha"))
    assert out.rgb is not None
    assert out.alpha is not None
    if places is None:
        mask = out.alpha[0].detach()
        places = spread_points(out.rgb[0].detach(), mask, max(2.0, float((mask > 0.5).sum() / QUERIES) ** 0.5))
    if not len(places):
        raise InputError("no point to follow: the robot is not in the first rendered picture")
    return tracker(out.rgb, torch.nn.functional.pad(places, (1, 0)))


def small_camera(camera: Camera) -> tuple[Camera, Float[Tensor, "2"]]:
    """The camera at the size that is rendered, and how many of its pixels are one of the camera's."""
    shrink = min(1.0, RENDERED_PX / max(camera.width, camera.height))
    width, height = (max(8, round(shrink * side)) for side in (camera.width, camera.height))
    return camera.resized(width, height), torch.tensor([width / camera.width, height / camera.height])


def _smooth(ties: Smoothness, q: Float[Tensor, "frames dof"]) -> Float[Tensor, ""]:
    bend = q[2:] - 2.0 * q[1:-1] + q[:-2]
    rest = (ties.rest * (q - ties.q_rest)).square().sum()
    return rest + (ties.acceleration * bend).square().sum()
