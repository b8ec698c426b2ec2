"""Inverse dynamics of a short, coarse video whose first configuration is known: `track`, then each frame once more."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.imagination.behind import behind_robot
from kinesplat.inverse.search import joint_influence, joint_scale
from kinesplat.inverse.track import TrackOptions, collected, start_tracker
from kinesplat.inverse.track_result import TrackedFrame, TrackResult
from kinesplat.inverse.tracker import Tracker, predict
from kinesplat.self_model import SelfModel

Joints = Float[Tensor, " dof"]
COARSE_PX, COARSE_SPLATS = 128, 3_000
SWEEPS = 1
VARIED = 10
SPREAD, WIDEST = 0.08, 0.7
"""Standard deviation of the variations of the joint that moves most in the picture; joints that move less vary more."""


@torch.no_grad()
def follow(
    model: SelfModel,
    frames: Float[Tensor, "frames height width 3"],
    camera: Camera,
    q_init: Float[Tensor, " dof"],
    backdrop: Float[Tensor, "height width 3"] | None = None,
    *,
    sweeps: int = SWEEPS,
    seed: int = 0,
) -> TrackResult:
    """Joints of every frame of a video in which the robot begins at `q_init` and the camera stands still.

    The backdrop is what the first frame shows beside the robot. After tracking it is taken anew, with what the robot
    uncovered, and every frame is solved again from its own answer and from its neighbours', which leads out of the
    wrong minima that few pixels have. The first frame keeps `q_init`. A frame that the robot does not fit, the first
    one included, is marked as lost; it is not searched anew, its joints are the nearest explanation.

    Args:
        model: self-model of the robot.
        frames: ``(frames, height, width, 3)`` in [0, 1].
        camera: their camera.
        q_init: ``(dof,)`` joints of the first frame [rad]/[m].
        backdrop: ``(height, width, 3)`` the scene without the robot, where it is known.
        sweeps: how often every frame is solved again.
        seed: of the variations that are tried.

    Raises:
        InputError: frames, camera or q of the wrong type, shape or range.
    """
    began = time.perf_counter()
    model.tree.coordinates(q_init)  # raises on a wrong size or NaN
    q_init = q_init.float().cpu()
    model = model.subsample(COARSE_SPLATS) if max(frames.shape[1:3]) <= COARSE_PX else model
    behind = behind_robot(model, frames[:1], q_init[None], camera) if backdrop is None else backdrop
    tracker = start_tracker(model, frames, camera, TrackOptions(backdrop=behind, q_init=q_init, seed=seed))
    first = TrackedFrame(q_init, tracker.camera.T_cam_world, torch.zeros_like(q_init), 0.0, "tracked")
    first = replace(tracker.solve(0, [first], q_init, "tracked"), q=q_init)
    spread = (SPREAD / joint_influence(model.to("cpu")).clamp(min=1e-3)).clamp(max=WIDEST) * joint_scale(model.tree)
    found = [first]
    for index in range(1, len(frames)):
        found.append(best(tracker, index, [found[-1].q, predict(model, found)], found[-1].q, spread))
    for _ in range(sweeps):
        if backdrop is None:
            behind = behind_robot(model, frames, torch.stack([frame.q for frame in found]), camera)
            tracker = start_tracker(model, frames, camera, TrackOptions(backdrop=behind, q_init=q_init, seed=seed))
        found = swept(tracker, found, spread)
    if tracker.misfits(0, found[0]):
        found[0] = replace(found[0], state="lost")
    return collected(tracker, found, time.perf_counter() - began, 0.0)


def swept(tracker: Tracker, found: Sequence[TrackedFrame], spread: Joints) -> list[TrackedFrame]:
    """Every frame but the first solved again: from itself, the new answers before it, and the old one after it."""
    new = [found[0]]
    for index in range(1, len(found)):
        before, expected = new[-1].q, predict(tracker.model, new)
        middle = 0.5 * (before + found[index + 1].q) if index + 1 < len(found) else before
        new.append(best(tracker, index, [found[index].q, before, expected, middle], middle, spread))
    return new


def best(tracker: Tracker, index: int, starts: Sequence[Joints], expected: Joints, spread: Joints) -> TrackedFrame:
    """The best explanation of a frame near several configurations and variations of the expected one."""
    generator = torch.Generator().manual_seed(tracker.seed + index)
    variations = spread * torch.randn(VARIED, len(expected), generator=generator)
    T, none = tracker.camera.T_cam_world, torch.zeros_like(expected)
    tried = [TrackedFrame(q, T, none, 0.0, "tracked") for q in (*starts, *(expected + variations))]
    once = tracker.solve(index, tried, expected, "tracked")
    answer = tracker.solve(index, [once], expected, "tracked")
    return replace(answer, state="lost") if tracker.misfits(index, answer) else answer
