"""From a video to joint values over time: track."""

import csv
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.progress import Progress

from kinesplat.camera import Camera
from kinesplat.commands.common import (
    DEFAULTS,
    EXIT_FAILED,
    CommonOptions,
    Model,
    device_of,
    err,
    load_model,
    out,
    write_json,
)
from kinesplat.errors import BackendError, InputError
from kinesplat.files import read_image, read_mask, written_whole
from kinesplat.inverse.mending import mended
from kinesplat.inverse.track import TrackOptions, collected, start_tracker
from kinesplat.inverse.track_result import STATES, TrackedFrame, TrackResult
from kinesplat.inverse.tracker import Tracker
from kinesplat.model_file import checksum_of
from kinesplat.report import overlay
from kinesplat.self_model import SelfModel
from kinesplat.video import check_video, frame_rate, picture_files, read_frames, write_video


def track(
    model: Model,
    video: Annotated[Path, tyro.conf.Positional],
    camera: Path,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("track.csv"),
    overlay: Path | None = None,
    masks: Path | None = None,
    backdrop: Path | None = None,
    q_init: tuple[float, ...] | None = None,
    optimize_camera: bool = False,
    colour_weight: float = 1.0,
    resume: bool = False,
    *,
    common: CommonOptions = DEFAULTS,
) -> None:
    """Follow a robot through a video: joint values of every frame.

    Writes a table with the columns frame, time_s, state ("tracked", "searched" anew, "doubtful", or "lost": values of
    the frame before), loss, the joints [rad]/[m] and their standard deviations. While it runs, finished frames stand in
    OUTPUT.partial.jsonl, from which --resume goes on after an interruption. Exits with 1 when most frames were lost.

    Args:
        model: model file, or the name of a packaged model.
        video: video file (needs PyAV: kinesplat[video]), GIF, or folder of pictures.
        camera: JSON file with K, T_cam_world, width, height.
        output: the table, .csv or .parquet (needs pyarrow).
        overlay: also write the video with the robot laid over it (.mp4 or .gif).
        masks: folder or video of masks, white on the robot; without masks the background is learnt from the video.
        backdrop: picture of the scene without the robot.
        q_init: joint values of the first frame, right within about 0.3 rad; default: search all configurations.
        optimize_camera: also follow the camera, from the given one on; needs masks or a plain background.
        colour_weight: weight of the colours against the mask; 0.1 for photographs whose light is not a headlight.
        resume: go on where an interrupted run stopped; refused for another model, video, camera or other options.
    """
    device = device_of(common)
    check_output(output)
    if overlay is not None:
        check_video(overlay)
    loaded = load_model(model)
    began = time.perf_counter()
    options = TrackOptions(
        masks=None if masks is None else read_masks(masks),
        backdrop=None if backdrop is None else read_image(backdrop),
        q_init=None if q_init is None else torch.tensor(q_init),
        optimize_camera=optimize_camera,
        colour_weight=colour_weight,
        seed=common.seed,
    )
    tracker = start_tracker(loaded.to(device), read_frames(video), Camera.from_json(camera), options)
    partial = output.with_name(f"{output.name}.partial.jsonl")
    result = run(tracker, partial, resume, began)
    rate = frame_rate(video)
    write_table(output, result, rate)
    if overlay is not None:
        write_video(overlay, overlays(loaded, read_frames(video), result), rate)
    partial.unlink(missing_ok=True)
    out.print(result.report())
    out.print(f"wrote {output}" + ("" if overlay is None else f" and {overlay}"))
    write_json(common.json, result.to_json())
    if result.verdict == "failed":
        sys.exit(EXIT_FAILED)


def run(tracker: Tracker, partial: Path, resume: bool, began: float) -> TrackResult:
    """Track, with every finished frame on disk at once."""
    done = read_partial(partial, tracker) if resume and partial.is_file() else []
    found, first = list(done), 0.0
    try:
        with written_whole(partial) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in [json.dumps(origin(tracker)), *map(row_of, done)]))
        with partial.open("a") as file, Progress(disable=not err.is_terminal, transient=True) as bar:
            task = bar.add_task("tracking", total=len(tracker.clip.rgb), completed=len(done))
            for frame in tracker.frames(done):
                first = first or time.perf_counter() - began
                found.append(frame)
                file.write(row_of(frame) + "\n")
                file.flush()
                bar.advance(task)
    except OSError as error:
        raise InputError(f"cannot write {partial}: {error.strerror}") from error
    with err.status("second look at frames in doubt"):
        found = mended(tracker, found)
    return collected(tracker, found, time.perf_counter() - began, first)


def origin(tracker: Tracker) -> dict[str, str]:
    """What a run was asked for: a checksum of each of its inputs."""
    model, clip = tracker.model, tracker.clip
    splats = {**model.parameters.tensors(), **model.tree.to_tensors(), "link_index": model.link_index}
    networks = {f"{n}.{key}": v for n, network in model.networks.items() for key, v in network.state_dict().items()}
    video = {"rgb": clip.rgb, "masks": clip.masks, "backdrop": clip.backdrop}
    options = {name: getattr(tracker, name) for name in ("camera_free", "camera_known", "colour_weight", "seed")}
    parts: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("model", {**splats, **networks}, {}),
        ("video", video, {}),
        ("camera", {"K": tracker.camera.K, "T_cam_world": tracker.camera.T_cam_world}, {}),
        ("options", {"q_init": tracker.q_init}, options),
    ]
    return {
        name: checksum_of({key: v.detach().cpu() for key, v in tensors.items() if v is not None}, header)
        for name, tensors, header in parts
    }


def row_of(frame: TrackedFrame) -> str:
    """A finished frame as a line of JSON."""
    return json.dumps({k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in asdict(frame).items()})


def read_partial(path: Path, tracker: Tracker) -> list[TrackedFrame]:
    """The frames that an interrupted run left, up to a line that was cut off or is no frame.

    Raises:
        InputError: they are of another model, video, camera, or of other options.
    """
    try:
        first, *lines = path.read_text().splitlines() or ["{}"]
        known = json.loads(first)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not the frames of an interrupted run ({error}); run without --resume") from error
    for name, checksum in origin(tracker).items():
        if not isinstance(known, dict) or known.get(name) != checksum:
            what = "of other options" if name == "options" else f"of another {name}"
            raise InputError(f"{path} holds frames {what}; delete it, or run without --resume")
    found = []
    for line in lines[: len(tracker.clip.rgb)]:
        frame = _frame_of(line, tracker.model.tree.dof)
        if frame is None:
            break
        found.append(frame)
    return found


def _frame_of(line: str, dof: int) -> TrackedFrame | None:
    """A line of `row_of`; None for any other."""
    try:
        row = json.loads(line)
        q, T, std = (torch.tensor(row[name], dtype=torch.float32) for name in ("q", "T_cam_world", "std"))
        loss, state = float(row["loss"]), row["state"]
    except (ValueError, KeyError, TypeError):
        return None
    fits = q.shape == std.shape == (dof,) and T.shape == (4, 4) and state in STATES
    return TrackedFrame(q, T, std, loss, state) if fits else None


def read_masks(path: Path) -> Iterator[torch.Tensor]:
    """Masks from a folder of pictures, or a video of them."""
    if path.is_dir():
        return (read_mask(picture) for picture in picture_files(path))
    return (frame.float().mean(dim=-1) / (255.0 if frame.dtype == torch.uint8 else 1.0) for frame in read_frames(path))


def check_output(path: Path) -> None:
    """Refuse a table that could not be written in the end.

    Raises:
        InputError: neither .csv nor .parquet, or the folder is missing.
        BackendError: .parquet without pyarrow.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise InputError(f"{path}: tables are written as .csv or .parquet")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder")
    if path.suffix == ".parquet":
        try:
            import_module("pyarrow.parquet")
        except ImportError as error:
            raise BackendError("Parquet needs pyarrow: pip install pyarrow; or write a .csv") from error


def write_table(path: Path, result: TrackResult, rate: float) -> None:
    """Write one row a frame, whole or not at all."""
    columns: dict[str, list[Any]] = {
        "frame": list(range(len(result.q))),
        "time_s": [i / rate for i in range(len(result.q))],
        "state": list(result.states),
        "loss": list(result.losses),
        **{name: result.q[:, j].tolist() for j, name in enumerate(result.joint_names)},
        **{f"{name}_std": result.std[:, j].tolist() for j, name in enumerate(result.joint_names)},
    }
    write_columns(path, columns)


def write_columns(path: Path, columns: dict[str, list[Any]]) -> None:
    """Write a table as .csv or .parquet, whole or not at all."""
    with written_whole(path) as temporary:
        if path.suffix == ".parquet":
            table = import_module("pyarrow").table(columns)
            import_module("pyarrow.parquet").write_table(table, temporary)
            return
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))


def overlays(model: SelfModel, frames: Iterator[torch.Tensor], result: TrackResult) -> Iterator[torch.Tensor]:
    """The frames with the robot laid over them."""
    moving = bool(result.camera.batch_shape)
    for i, frame in enumerate(frames):
        T = result.camera.T_cam_world[i] if moving else result.camera.T_cam_world
        camera = replace(result.camera, K=result.camera.K[i] if moving else result.camera.K, T_cam_world=T)
        image = model.render(result.q[i], camera)
        assert image.rgb is not None
        assert image.alpha is not None
        picture = frame.float() / 255.0 if frame.dtype == torch.uint8 else frame
        yield overlay(picture, image.rgb, image.alpha)
