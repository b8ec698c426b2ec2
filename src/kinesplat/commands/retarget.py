"""From a demonstration's video to our joints over time: retarget."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.commands.common import (
    DEFAULTS,
    EXIT_FAILED,
    CommonOptions,
    Model,
    cpu_of,
    err,
    load_model,
    out,
    write_json,
)
from kinesplat.commands.track import check_output, read_masks, write_columns
from kinesplat.errors import InputError
from kinesplat.files import colours_of, side_by_side
from kinesplat.inverse.retarget import retarget as follow
from kinesplat.inverse.retarget_result import RetargetResult
from kinesplat.report import overlay
from kinesplat.self_model import SelfModel
from kinesplat.video import DEFAULT_RATE, check_video, frame_rate, read_frames, write_video
from kinesplat.vision.point_tracks import PointTracks
from kinesplat.vision.track_networks import load_tracker

TRAIL = 8
Picture = Float[Tensor, "height width 3"]


@dataclass(frozen=True)
class Following:
    """How points are followed and compared."""

    tracker: Literal["lucas-kanade", "correlation", "tapir", "tapnext", "alltracker", "cotracker3"] = "lucas-kanade"
    """Which tracker; the last four need their packages and weights, and cotracker3 is not for commercial use."""
    weights: Path | None = None
    """File of the tracker's weights; default: the cache of torch.hub."""
    objective: Literal["tracks", "frames", "rendered"] = "tracks"
    """Whole tracks of our surface by kinematics; Chamfer distances frame by frame; or the tracker on our renderings."""
    align: bool = False
    """Scale, turn and move the demonstration in the picture: for another robot or a hand."""
    starts: int | None = None
    """How many starts to try in a search, without asking the video's pixels; default 8, or 1 with --align."""
    smoothness: float = 0.5
    """Cost of accelerations [px^2 for a joint's unit step per frame^2]."""
    self_collision: float = 0.0
    """Weight of links that pass through each other; 1 is firm."""


FOLLOWING = Following()


def retarget(
    model: Model,
    video: Annotated[Path, tyro.conf.Positional],
    camera: Path | None = None,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("retarget.csv"),
    film: Path | None = None,
    masks: Path | None = None,
    save_tracks: Path | None = None,
    q_init: tuple[float, ...] | None = None,
    this_robot: bool = False,
    *,
    following: Annotated[Following, tyro.conf.OmitArgPrefixes] = FOLLOWING,
    common: CommonOptions = DEFAULTS,
) -> None:
    """Make our robot move as a video shows: joint values of every frame.

    The video shows this robot, another one, or a hand. Points are followed through it, and joints are sought whose
    surface points move alike in the picture. Writes a table with the columns frame, time_s, residual_px, the joints
    [rad]/[m] and their standard deviations. Exits with 1 when most points are not followed.

    Args:
        model: model file, or the name of a packaged model.
        video: video file (needs PyAV: kinesplat[video]), GIF, folder of pictures, or .npz of tracks, with the arrays
            points (frames, n, 2) in pixels and visible (frames, n).
        camera: JSON file with K, T_cam_world, width, height, through which our robot is to be seen; default: one that
            frames it in its canonical configuration.
        output: the table, .csv or .parquet (needs pyarrow).
        film: also write a video: the demonstration with its tracks, our robot with them, and both (.mp4 or .gif).
        masks: folder or video of masks, white on what moves.
        save_tracks: also write the tracks of the video (.npz).
        q_init: joint values of the first frame, right within about 0.1 rad.
        this_robot: the video shows this very robot through this camera: begin with what `reconstruct` finds in some
            frames, or fail. Without --align, --starts and --q-init that is tried anyway.
    """
    cpu_of(common)
    check_paths(output, film, save_tracks, common.json)
    loaded = load_model(model)
    tracker = load_tracker(following.tracker, following.weights)
    tracks = PointTracks.load(video) if video.suffix == ".npz" else None
    if tracks is not None and (this_robot or film or save_tracks):
        raise InputError(f"{video} holds tracks, no pictures: no --this-robot, --film or --save-tracks")
    if q_init is not None and this_robot:
        raise InputError("--q-init and --this-robot both say where the first frame begins; give one of them")
    seen_by = camera_of(loaded, camera, video)
    with err.status("finding the motion"):
        result = follow(
            loaded,
            read_frames(video) if tracks is None else tracks,
            seen_by,
            masks=None if masks is None else read_masks(masks),
            q_init="pixels" if this_robot else None if q_init is None else torch.tensor(q_init),
            objective=following.objective,
            tracker=tracker,
            align=following.align,
            starts=following.starts,
            smoothness=following.smoothness,
            self_collision=following.self_collision,
            seed=common.seed,
        )
    rate = DEFAULT_RATE if video.suffix == ".npz" else frame_rate(video)
    write_columns(output, columns_of(result, rate))
    write_json(common.json, result.to_json())
    if save_tracks is not None:
        result.shown.save(save_tracks)
    if film is not None:
        write_video(film, film_of(loaded, read_frames(video), result.shown, result), rate)
    out.print(result.report())
    written = [str(path) for path in (output, film, save_tracks) if path is not None]
    out.print(f"wrote {' and '.join(written)}")
    if result.verdict == "failed":
        sys.exit(EXIT_FAILED)


def check_paths(output: Path, film: Path | None, tracks: Path | None, json: Path | None) -> None:
    """Refuse, before any work, what could not be written in the end.

    Raises:
        InputError: another ending than the file's kind has, or a folder is missing.
        BackendError: a package that writes it is missing.
    """
    check_output(output)
    if film is not None:
        check_video(film)
    if tracks is not None and tracks.suffix != ".npz":
        raise InputError(f"{tracks}: tracks are written as .npz")
    for path in (tracks, json):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"{path.parent}: no such folder")


def camera_of(model: SelfModel, path: Path | None, video: Path) -> Camera:
    """The camera given, or one of the video's size that frames the robot.

    Raises:
        InputError: tracks without a camera: their picture size is unknown.
    """
    if path is not None:
        return Camera.from_json(path)
    if video.suffix == ".npz":
        raise InputError("tracks need --camera: the size of their pictures is not in the file")
    frame = next(read_frames(video), None)
    if frame is None:
        raise InputError(f"{video}: the video has no frame")
    points = model.posed(model.tree.q_canonical.float()).means.detach()
    return Camera.framing(points, width=frame.shape[1], height=frame.shape[0])


def columns_of(result: RetargetResult, rate: float) -> dict[str, list[Any]]:
    """The table of a result."""
    std = torch.full_like(result.q, torch.nan) if result.std is None else result.std
    return {
        "frame": list(range(len(result.q))),
        "time_s": [i / rate for i in range(len(result.q))],
        "residual_px": list(result.residuals_px),
        **{name: result.q[:, j].tolist() for j, name in enumerate(result.joint_names)},
        **{f"{name}_std": std[:, j].tolist() for j, name in enumerate(result.joint_names)},
    }


def film_of(
    model: SelfModel, frames: Iterator[Tensor], tracks: PointTracks, result: RetargetResult
) -> Iterator[Picture]:
    """The demonstration with its tracks, our robot with the same tracks where they were aligned to, and its overlay."""
    width, height = result.camera.width, result.camera.height
    moved = PointTracks(result.alignment.apply(tracks.points, width, height), tracks.visible)
    for i, frame in enumerate(frames):
        picture = frame.float() / 255.0 if frame.dtype == torch.uint8 else frame
        camera = result.camera
        if camera.batch_shape:
            K, T = camera.K.expand(len(result.q), 3, 3), camera.T_cam_world.expand(len(result.q), 4, 4)
            camera = replace(camera, K=K[i], T_cam_world=T[i])
        image = model.render(result.q[i], camera)
        assert image.rgb is not None
        assert image.alpha is not None
        rgb, alpha = image.rgb.detach().clamp(0.0, 1.0), image.alpha.detach()
        yield side_by_side([with_tracks(picture, tracks, i), with_tracks(rgb, moved, i), overlay(picture, rgb, alpha)])


def with_tracks(picture: Picture, tracks: PointTracks, index: int) -> Picture:
    """The picture with dots where tracks are, and faint ones where they have just been."""
    drawn = picture.clone()
    height, width = picture.shape[:2]
    colours = colours_of(torch.arange(tracks.points.shape[1])[None])[0]
    size = max(1, round(max(height, width) / 200))
    for i in range(max(0, index - TRAIL), index + 1):
        seen = tracks.visible[i] & tracks.visible[index]
        reach = torch.arange(-size, size + 1) if i == index else torch.zeros(1)
        around = torch.cartesian_prod(reach, reach).reshape(-1, 2)
        cells = (tracks.points[i][seen].detach()[:, None] + around).floor().long()
        inside = ((cells >= 0) & (cells < torch.tensor([width, height]))).all(dim=-1)
        x, y = cells[inside].unbind(-1)
        drawn[y, x] = colours[seen][:, None].expand(-1, len(around), 3)[inside]
    return drawn
