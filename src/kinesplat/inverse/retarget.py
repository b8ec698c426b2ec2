"""From somebody else's motion to ours: joints over time whose point tracks are those of a demonstration."""

import math
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError, unknown
from kinesplat.inverse.anchoring import anchored, carried_on, misfit, through
from kinesplat.inverse.clip import Clip
from kinesplat.inverse.key_frames import KeyFrames, key_frames
from kinesplat.inverse.observation import ImageLike
from kinesplat.inverse.rendered_tracks import follow_rendered
from kinesplat.inverse.retarget_result import RetargetResult
from kinesplat.inverse.retarget_search import followed
from kinesplat.inverse.retargeting import Answer, Retargeting, between
from kinesplat.inverse.trajectory import Trajectory
from kinesplat.self_model import SelfModel
from kinesplat.vision.point_tracks import PointTracker, PointTracks, lucas_kanade, track_video

Objective = Literal["tracks", "frames", "rendered"]
OBJECTIVES = ("tracks", "frames", "rendered")
LONG_SIDE = 512
STARTS = 8


def retarget(
    model: SelfModel,
    demonstration: PointTracks | Iterable[ImageLike] | Float[Tensor, "frames n 2"],
    camera: Camera,
    *,
    masks: Iterable[ImageLike] | None = None,
    q_init: Float[Tensor, "*frames dof"] | Literal["pixels"] | None = None,
    objective: Objective = "tracks",
    tracker: PointTracker = lucas_kanade,
    align: bool = False,
    starts: int | None = None,
    self_collision: float = 0.0,
    smoothness: float = 0.5,
    seed: int = 0,
) -> RetargetResult:
    """Joints over time whose surface points move in the picture as the demonstration's do (paper, eq. 10).

    The demonstration is a video of this robot, of another one, or of a hand, or tracks of points in such a video. Which
    of its points belongs to which of ours is not given. Three objectives:

    - ``tracks`` (default): our tracks follow from kinematics alone. Whole tracks are compared: a point stays the same
      point through time, so its path says which one it is. Partners are soft at first and harden level by level; in the
      end they slide along the surface. Without `q_init`, several starts are tried on some of the frames, and limbs of
      one may be combined with those of another.
    - ``frames``: the same tracks, but the Chamfer distance of eq. 10 in every frame by itself, both ways. It needs a
      start that is near, or a demonstration that shows much.
    - ``rendered``: the paper's way: the tracker runs on our rendered frames, and gradients go through it (Adam). Slow.
      Its distance departs from eq. 10: whole tracks, and from the demonstration's to ours only.

    Args:
        model: self-model of our robot, its splats bound to links.
        demonstration: tracks in the pixels of `camera`, also as a tensor ``(frames, n, 2)`` with NaN where a point was
            not seen, or frames ``(height, width, 3)`` of its size.
        camera: through which our robot is to be seen: batch ``()``, or ``(frames,)`` where it moves.
        masks: of a video: 1 on what moves; without them what differs from a plain or the usual background.
        q_init: ``(dof,)`` our joints in the first frame, right within about 0.1 rad, or ``(frames, dof)`` a first guess
            of the motion [rad]/[m]. ``"pixels"``: the video shows this very robot through this camera, and what
            `reconstruct` finds in every twentieth frame or so is where it begins. Default: that is tried where frames
            are given, without `align` and `starts`; where the pixels show something else, or with tracks, a search.
        objective: see above.
        tracker: follows points through the video, and with ``rendered`` through ours too; `kinesplat.vision`.
        align: also scale, turn and move the demonstration in the picture: for another robot or a hand. Without
            `q_init` the robot begins in its canonical configuration then. Size, angle and place are sought together
            with the joints by ``tracks`` and ``frames``; ``rendered`` only brings box onto box at the start.
        starts: how many to try in the search; default 8, or 1 with `align`. If given, pixels are not asked. With
            ``tracks`` only.
        self_collision: weight of links that pass through each other, see `Priors`; 1 is firm. Not with ``rendered``.
        smoothness: cost of accelerations [px^2 for a joint's unit step per frame^2].
        seed: of the random starts.

    Raises:
        InputError: tracks, frames, camera or q of the wrong type, shape or range; nothing to follow; pixels that must
            tell the start and do not.
    """
    began = time.perf_counter()
    if objective not in OBJECTIVES:
        raise InputError(unknown("objective", objective, OBJECTIVES))
    if isinstance(q_init, str) and q_init != "pixels":
        raise InputError(f"q_init is {q_init!r}; expected a tensor, 'pixels', or None")
    if not 0.0 <= smoothness < math.inf or not 0.0 <= self_collision < math.inf:
        raise InputError(f"smoothness is {smoothness}, self_collision {self_collision}; expected 0 or more")
    if starts is not None and starts < 1:
        raise InputError(f"starts is {starts}; expected 1 or more")
    check_start(model, camera, None if isinstance(q_init, str) else q_init)
    if objective == "rendered" and self_collision:
        raise InputError("self_collision is no part of the rendered objective; use 'tracks' or 'frames', or leave it 0")
    if objective != "tracks" and starts is not None:
        raise InputError(
            f"starts is {starts}, but only the objective 'tracks' searches; {objective!r} begins at q_init"
        )
    seen = clip_of(demonstration, camera, masks)
    frames = len(seen.rgb if isinstance(seen, Clip) else seen.points)
    check_frames(frames, camera, None if isinstance(q_init, str) else q_init)
    shown, camera = demonstrated(seen, camera, None, tracker)
    with torch.no_grad():
        known, first = None, None if isinstance(q_init, str) else q_init
        if isinstance(q_init, str) or (q_init is None and starts is None and not align):
            known = pixels_of(model, seen, camera, q_init is not None, seed)
        if known is not None and (objective != "tracks" or align):
            first = between(known.q, known.frames, len(shown.points))
        work = Retargeting.create(model, shown, camera, first, align, smoothness, self_collision)
        answer = found(work, objective, starts or (1 if align else STARTS), seed, known)
    if objective == "rendered":
        ties = work.ties(len(work.every), held=False)
        q, losses = follow_rendered(work.everything(work.every), work.shown, tracker, answer.at.q, ties)
        answer = replace(answer, at=Trajectory(q, answer.at.shared), loss=min(losses), history=[losses])
    answer = replace(answer, ambiguous=known is not None and not bool(known.sure.any()))
    start = "pixels" if known is not None else "search" if q_init is None else "given"
    with torch.no_grad():
        return work.result(answer, start, objective != "rendered", time.perf_counter() - began)


def check_start(model: SelfModel, camera: Camera, q_init: Float[Tensor, "*frames dof"] | None) -> None:
    """What can be said of the arguments before a video is read and tracked.

    Raises:
        InputError: the model has a skinning field; joints of the wrong number, or no numbers; a camera in a grid.
    """
    if not isinstance(camera, Camera):
        raise InputError(f"camera is a {type(camera).__name__}; expected a kinesplat.Camera")
    if model.skinning is not None:
        raise InputError("retarget needs a model whose splats are bound to links; this one has a skinning field")
    if len(camera.batch_shape) > 1:
        raise InputError(f"camera has batch shape {camera.batch_shape}; expected () or (frames,)")
    if q_init is None:
        return
    model.tree.coordinates(q_init)
    if q_init.dim() > 2:
        raise InputError(f"q_init has shape {tuple(q_init.shape)}; expected (dof,) or (frames, dof)")


def check_frames(frames: int, camera: Camera, q_init: Float[Tensor, "*frames dof"] | None) -> None:
    """Whether camera and first guess are of as many frames as the demonstration.

    Raises:
        InputError: they are not.
    """
    if camera.batch_shape not in ((), (frames,)):
        raise InputError(f"camera has batch shape {camera.batch_shape}; expected () or ({frames},), one for each frame")
    if q_init is not None and q_init.dim() > 1 and len(q_init) != frames:
        raise InputError(f"q_init has shape {tuple(q_init.shape)}; expected (dof,) or ({frames}, dof)")


def pixels_of(
    model: SelfModel, demonstration: PointTracks | Clip, camera: Camera, insisting: bool, seed: int
) -> KeyFrames | None:
    """What the pixels of a video of this robot say of some of its frames.

    Raises:
        InputError: they must tell, and there are none, or they show something else.
    """
    if isinstance(demonstration, PointTracks):
        if insisting:
            raise InputError("q_init is 'pixels', but tracks have none; give the video's frames")
        return None
    known = key_frames(model, demonstration, camera, seed)
    if known is None and insisting:
        raise InputError(
            "no frame was explained as this robot before this camera (verdict failed); check the camera, give masks, "
            "or begin without q_init='pixels'"
        )
    return known


def found(work: Retargeting, objective: Objective, starts: int, seed: int, known: KeyFrames | None) -> Answer:
    """The motion by the analytic objectives; the rendered one begins with the first guess."""
    if objective != "tracks":
        return work.chamfer() if objective == "frames" else work.unmoved()
    if known is not None and not work.align:
        return through(work, known)
    answers = followed(work, starts, seed)
    if work.align:
        return work.polished(min(answers, key=lambda answer: answer.loss))
    rivals = [carried_on(work, answer) for answer in answers]
    if work.q_init is not None and work.q_init.dim() == 1:
        rivals.append(anchored(work, torch.zeros(1, dtype=torch.long), work.q_init[None]))
    return min(rivals, key=lambda rival: misfit(work, rival))


def clip_of(
    demonstration: PointTracks | Clip | Iterable[ImageLike] | Float[Tensor, "frames n 2"],
    camera: Camera,
    masks: Iterable[ImageLike] | None,
) -> PointTracks | Clip:
    """A video read to its end, or tracks as they are.

    Raises:
        InputError: see `retarget`.
    """
    if isinstance(demonstration, str | Path):
        raise InputError(
            f"the demonstration is {str(demonstration)!r}; read it first: kinesplat.video.read_frames for a video, "
            "kinesplat.vision.point_tracks.PointTracks.load for tracks"
        )
    if isinstance(demonstration, Tensor) and demonstration.dim() == 3 and demonstration.shape[-1] == 2:
        seen = torch.isfinite(demonstration).all(dim=-1)
        demonstration = PointTracks(demonstration.nan_to_num(0.0, 0.0, 0.0), seen)
    if isinstance(demonstration, PointTracks) and masks is not None:
        raise InputError("masks are given with tracks; they belong to a video")
    if isinstance(demonstration, PointTracks | Clip):
        return demonstration
    one = replace(camera, K=camera.K.reshape(-1, 3, 3)[0], T_cam_world=camera.T_cam_world.reshape(-1, 4, 4)[0])
    return Clip.read(demonstration, masks, None, one, LONG_SIDE)


def demonstrated(
    demonstration: PointTracks | Clip | Iterable[ImageLike] | Float[Tensor, "frames n 2"],
    camera: Camera,
    masks: Iterable[ImageLike] | None,
    tracker: PointTracker,
) -> tuple[PointTracks, Camera]:
    """The tracks of a demonstration in the pixels of the camera, which is checked against them.

    Raises:
        InputError: see `retarget`.
    """
    found = clip_of(demonstration, camera, masks)
    if isinstance(found, Clip):
        foreground = torch.cat([found.observation(i).silhouette() for i in range(len(found.rgb))])
        with torch.no_grad():
            small = track_video(found.rgb.float() / 255.0, foreground, tracker)
        found = small.scaled(torch.tensor([camera.width / found.camera.width, camera.height / found.camera.height]))
    shown = PointTracks(found.points.detach().float().cpu(), found.visible.cpu()).seen()
    frames, n = shown.visible.shape
    if frames < 2 or n < 1:
        raise InputError(f"{n} tracks are seen twice or more in {frames} frames; expected some, in two frames or more")
    points = torch.where(shown.visible[..., None], shown.points, 0.0)
    return PointTracks(points, shown.visible), camera.to("cpu", torch.float32)
