"""A video of the robot itself: some of its frames say by their pixels where the joints are."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import UnseenError
from kinesplat.inverse.clip import Clip
from kinesplat.inverse.reconstruct import reconstruct
from kinesplat.self_model import SelfModel

APART_FRAMES = 20
FEWEST, MOST = 2, 6


@dataclass(frozen=True)
class KeyFrames:
    """Joints known in some frames.

    Attributes:
        frames: ``(k,)`` ascending.
        q: ``(k, dof)`` [rad]/[m].
    """

    frames: Int[Tensor, " k"]
    q: Float[Tensor, "k dof"]


def key_frames(model: SelfModel, clip: Clip, camera: Camera, seed: int) -> KeyFrames | None:
    """What `reconstruct` finds in every twentieth frame or so, in two to six of them, the middle one first.

    Frames that are not explained are left out; where neither the middle one nor the first is, the video shows something
    else, and the rest is not tried.

    Args:
        model: self-model of the robot.
        clip: the video.
        camera: batch ``()`` or ``(frames,)``.
        seed: of the random starts.

    Returns:
        None where no frame is explained.
    """
    count = len(clip.rgb)
    wanted = min(max(round(count / APART_FRAMES) + 1, FEWEST), MOST, count)
    frames = torch.linspace(0, count - 1, wanted).round().long().unique().tolist()
    middle = frames[len(frames) // 2]
    found: dict[int, Tensor] = {}
    for tried, frame in enumerate([middle, *(f for f in frames if f != middle)]):
        if tried == FEWEST and not found:
            return None
        try:
            seen = clip.observation(frame)
            seen = replace(seen, camera=of_frame(camera, frame, seen.camera))
            fit = reconstruct(model, seen, seen.camera, seed=seed)
        except UnseenError:  # a frame without the robot, or an answer with the camera inside it
            continue
        if fit.verdict != "failed":
            found[frame] = fit.q
    known = sorted(found)
    return KeyFrames(torch.tensor(known), torch.stack([found[f] for f in known])) if known else None


def of_frame(camera: Camera, frame: int, size: Camera) -> Camera:
    """The camera of one frame, of the size of another, as a batch of one view."""
    K, T = camera.K.reshape(-1, 3, 3), camera.T_cam_world.reshape(-1, 4, 4)
    one = replace(camera, K=K[min(frame, len(K) - 1)][None], T_cam_world=T[min(frame, len(T) - 1)][None])
    return one.resized(size.width, size.height)
