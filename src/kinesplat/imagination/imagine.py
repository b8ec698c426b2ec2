"""A picture, a sentence, and what the robot then does (Liu et al. 2024, section 3.3.2)."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mujoco
import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.description import Robot
from kinesplat.errors import InputError
from kinesplat.imagination.execution import Execution, TrajectoryCheck, check_trajectory, execute
from kinesplat.imagination.following import follow
from kinesplat.inverse.observation import ImageLike, image_shape
from kinesplat.inverse.track import track
from kinesplat.inverse.track_result import TrackResult
from kinesplat.self_model import SelfModel
from kinesplat.vision.video_diffusion import load_video_model
from kinesplat.vision.video_pipelines import SVD_XT, VideoModel, resized

FPS = 7.0
"""Rate of videos whose own is unknown."""


@dataclass(frozen=True)
class Imagination:
    """Result of `imagine`.

    Attributes:
        prompt: the sentence.
        video: ``(frames, height, width, 3)`` in [0, 1]; the first frame is the picture.
        track: joints of every frame.
        seconds: time from one frame to the next.
        check: what is wrong with the motion; None where no robot was given.
        execution: how it went in MuJoCo; None where no scene was given.
    """

    prompt: str
    video: Float[Tensor, "frames height width 3"]
    track: TrackResult
    seconds: float
    check: TrajectoryCheck | None
    execution: Execution | None

    @property
    def q(self) -> Float[Tensor, "frames dof"]:
        """``(frames, dof)`` the motion [rad]/[m]."""
        return self.track.q

    def report(self) -> str:
        """A few lines for a person."""
        parts = [part.report() for part in (self.track, self.check, self.execution) if part is not None]
        return "\n".join([f"{self.prompt!r}: {len(self.video)} frames", *parts])

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary; units in the key names."""
        return {
            "prompt": self.prompt,
            "seconds_per_frame": self.seconds,
            "track": self.track.to_json(),
            "check": None if self.check is None else self.check.to_json(),
            "execution": None if self.execution is None else self.execution.to_json(),
        }


def imagine(
    model: SelfModel,
    image: ImageLike,
    prompt: str,
    camera: Camera,
    *,
    video_model: VideoModel | str | Path = SVD_XT,
    video: Iterable[ImageLike] | None = None,
    q_init: Float[Tensor, " dof"] | None = None,
    backdrop: ImageLike | None = None,
    robot: Robot | None = None,
    state: mujoco.MjData | None = None,
    fps: float | None = None,
    seed: int = 0,
) -> Imagination:
    """Let a video model show how a sentence is carried out, and find the joints that do it.

    The robot is followed through the video. With its joints in the picture known (`q_init`), every frame is looked at
    several times, as short videos of few pixels need; without, the first frame is solved as by `reconstruct`.

    Args:
        model: self-model of the robot.
        image: ``(height, width, 3)`` the scene now; float in [0, 1] or uint8.
        prompt: what the robot should do.
        camera: that took the picture; it stands still.
        video_model: an object with ``generate``, or a folder or name for `kinesplat.vision.load_video_model`.
        video: frames to use instead of a model's, the first of which is the picture.
        q_init: ``(dof,)`` joints in the picture [rad]/[m].
        backdrop: ``(height, width, 3)`` the scene without the robot, as large as the picture.
        robot: description of the robot; then the motion is checked.
        state: of a MuJoCo world with the robot in it and position actuators, things where they are now; then the motion
            is executed in it, and it moves along (see `kinesplat.imagination.joints.start_state`).
        fps: frames per second of the motion (of a `video`: its own, which the frames alone do not tell); default: the
            rate of the clips that the video model was trained on, where it tells one (``fps``), else 7.
        seed: of the video and of the random starts of tracking.

    The self-model renders on its device; pictures and the result are on the CPU.

    Raises:
        InputError: picture, video, camera, q or prompt are refused; or a state without a robot.
        BackendError: the video model's library or weights are absent; says how to get them.
    """
    if state is not None and robot is None:
        raise InputError("the state of a world was given, but not the robot in it: give robot=load_description(...)")
    if fps is not None and not fps > 0.0:
        raise InputError(f"fps is {fps}; expected a positive number")
    picture, maker = picture_of(image, camera), None
    if video is None:
        maker = load_video_model(video_model) if isinstance(video_model, str | Path) else video_model
        made = maker.generate(picture, prompt, seed=seed).cpu()
        frames = torch.cat([resized(picture, *made.shape[1:3])[None], made[1:]])
    else:
        frames = frames_of(video)
    view = camera.resized(frames.shape[2], frames.shape[1])
    behind = None if backdrop is None else resized(_as_float(backdrop), *frames.shape[1:3])
    if q_init is None:
        found = track(model, frames, view, backdrop=behind, seed=seed)
    else:
        found = follow(model, frames, view, q_init, behind, seed=seed)
    seconds = 1.0 / (fps or getattr(maker, "fps", None) or FPS)
    check = None if robot is None else check_trajectory(robot, found.q, seconds, state)
    execution = None if robot is None or state is None else execute(robot, found.q, seconds, state)
    return Imagination(prompt, frames, found, seconds, check, execution)


def picture_of(image: ImageLike, camera: Camera) -> Float[Tensor, "height width 3"]:
    """The picture as float, once it is sure that the camera fits it.

    Raises:
        InputError: it is no single picture, or of another size than the camera's.
    """
    if camera.batch_shape:
        raise InputError(f"camera is a batch {camera.batch_shape}; one picture has one camera")
    picture = _as_float(image)
    if tuple(picture.shape[:2]) != (camera.height, camera.width):
        height, width = picture.shape[:2]
        raise InputError(f"the picture is {width} x {height} px, its camera {camera.width} x {camera.height} px")
    return picture


def frames_of(video: Iterable[ImageLike]) -> Float[Tensor, "frames height width 3"]:
    """Frames of one size as float.

    Raises:
        InputError: there is none, or one of them is no picture or of another size than the first; says which.
    """
    frames: list[Tensor] = []
    for index, given in enumerate(video):
        try:
            frame = _as_float(given)
        except InputError as error:
            raise InputError(f"frame {index} of the video: {error}") from error
        if frames and frame.shape != frames[0].shape:
            (height, width), (h, w) = frame.shape[:2], frames[0].shape[:2]
            raise InputError(f"frame {index} of the video is {width} x {height} px, the first {w} x {h} px")
        frames.append(frame)
    if not frames:
        raise InputError("the video has no frame")
    return torch.stack(frames)


def _as_float(image: ImageLike) -> Float[Tensor, "height width 3"]:
    image_shape(image)  # raises on what is no picture
    values = torch.as_tensor(image)
    if values.dim() != 3:
        raise InputError(f"the picture has shape {tuple(values.shape)}; expected (height, width, 3)")
    values = values.float() / 255.0 if values.dtype == torch.uint8 else values.float()
    return values.cpu()
