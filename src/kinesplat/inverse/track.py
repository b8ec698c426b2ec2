"""From a video to joints over time: the first frame from scratch, every other from the one before."""

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.inverse.clip import Clip
from kinesplat.inverse.mending import mended
from kinesplat.inverse.observation import ImageLike, given_camera
from kinesplat.inverse.track_result import TrackedFrame, TrackResult
from kinesplat.inverse.tracker import Tracker
from kinesplat.self_model import SelfModel

LONG_SIDE = 256


@dataclass(frozen=True)
class TrackOptions:
    """How a video is followed; every field as the argument of `track` with its name."""

    K: Float[Tensor, "3 3"] | None = None
    masks: Iterable[ImageLike] | None = None
    backdrop: ImageLike | None = None
    q_init: Float[Tensor, " dof"] | None = None
    optimize_camera: bool = False
    colour_weight: float = 1.0
    seed: int = 0


DEFAULTS = TrackOptions()


@torch.no_grad()
def track(
    model: SelfModel,
    frames: Iterable[ImageLike],
    camera: Camera | None = None,
    *,
    K: Float[Tensor, "3 3"] | None = None,
    masks: Iterable[ImageLike] | None = None,
    backdrop: ImageLike | None = None,
    q_init: Float[Tensor, " dof"] | None = None,
    optimize_camera: bool = False,
    colour_weight: float = 1.0,
    seed: int = 0,
    progress: bool = False,
) -> TrackResult:
    """Follow the robot through a video.

    The first frame is solved as by `reconstruct`. Every other starts from the joints before and from their
    constant-velocity prediction, and is sharpened up to 256 px along the longer side; a weak prior holds joints that
    the frame does not show near the prediction. A frame that is explained much worse than before is searched anew.
    Without masks, and unless the background is plain, what is behind the robot is the median of frames from all over
    the video; now and then it is taken again, without what the robot is known by then to hide. In the end frames that
    are explained much worse than others are solved again, from their neighbours on both sides and before the backdrop
    that the others uncover; what stays in doubt, and frames in which hardly any of the robot stands out from such a
    backdrop, are called doubtful. Pictures are rendered on the model's device; frames and the result are on the CPU.

    Args:
        model: self-model of the robot.
        frames: pictures ``(height, width, 3)`` of one size; float in [0, 1] or uint8.
        camera: the camera, which stands still unless `optimize_camera`; then a first guess of it, or None.
        K: ``(3, 3)`` intrinsics [px] that replace those of `camera`; needed where `camera` is None.
        masks: one mask per frame, 1 on the robot.
        backdrop: ``(height, width, 3)`` the scene without the robot.
        q_init: ``(dof,)`` joints of the first frame, right within about 0.3 rad [rad]/[m]; default: no idea.
        optimize_camera: also follow the camera; needs masks or a plain background.
        colour_weight: weight of the colours against the mask; 0.1 for photographs whose light is not a headlight.
        seed: of the random starts.
        progress: show a progress bar on the terminal.

    Raises:
        InputError: frames, masks, camera or q of the wrong type, shape or range.
    """
    began = time.perf_counter()
    options = TrackOptions(K, masks, backdrop, q_init, optimize_camera, colour_weight, seed)
    tracker = start_tracker(model, frames, camera, options)
    found: list[TrackedFrame] = []
    first = 0.0
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("tracking", total=len(tracker.clip.rgb))
        for frame in tracker.frames():
            first = first or time.perf_counter() - began
            found.append(frame)
            bar.advance(task)
        bar.add_task("second look", total=None)
        found = mended(tracker, found)
    return collected(tracker, found, time.perf_counter() - began, first)


def start_tracker(
    model: SelfModel, frames: Iterable[ImageLike], camera: Camera | None = None, options: TrackOptions = DEFAULTS
) -> Tracker:
    """Read a video and get ready to yield its frames one by one; arguments and errors are those of `track`."""
    rest = iter(frames)
    start = next(rest, None)
    if start is None:
        raise InputError("the video has no frame")
    free, q_init = options.optimize_camera, options.q_init
    given = _one_camera(camera, options.K, start, free)
    clip = Clip.read(itertools.chain([start], rest), options.masks, options.backdrop, given, LONG_SIDE)
    if free and clip.backdrop is not None:
        raise InputError("a moving camera needs masks or a plain background; this video has neither")
    if q_init is not None:
        model.tree.coordinates(q_init)  # raises on a wrong size or NaN
        q_init = q_init.cpu()
    return Tracker(model, clip, given, q_init, free, camera is not None, options.colour_weight, options.seed)


def collected(tracker: Tracker, found: Sequence[TrackedFrame], seconds: float, first: float) -> TrackResult:
    """The result of all frames."""
    camera = tracker.camera
    if tracker.camera_free:
        T = torch.stack([frame.T_cam_world for frame in found])
        camera = replace(camera, K=camera.K.expand(len(T), 3, 3), T_cam_world=T)
    return TrackResult(
        joint_names=tracker.model.tree.joint_names,
        q=torch.stack([frame.q for frame in found]),
        camera=camera,
        std=torch.stack([frame.std for frame in found]),
        losses=tuple(frame.loss for frame in found),
        states=tuple(frame.state for frame in found),
        seconds=seconds,
        first_seconds=first,
    )


def _one_camera(camera: Camera | None, K: Tensor | None, first: ImageLike, free: bool) -> Camera:
    if camera is not None and camera.batch_shape not in ((), (1,)):
        raise InputError(f"camera is a batch {camera.batch_shape}; a video has one camera")
    given = given_camera(camera, K, first, free)
    return replace(given, K=given.K.reshape(3, 3).cpu(), T_cam_world=given.T_cam_world.reshape(4, 4).cpu())
