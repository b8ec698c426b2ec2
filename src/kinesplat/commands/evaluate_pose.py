"""Pose-estimation benchmarks: evaluate-pose."""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from kinesplat.camera import Camera
from kinesplat.commands.common import (
    DEFAULTS,
    EXIT_FAILED,
    CommonOptions,
    Model,
    Output,
    device_of,
    err,
    load_model,
    make_folder,
    out,
    write_json,
)
from kinesplat.errors import InputError
from kinesplat.evaluation.pose import PoseErrors, PoseSequence, pose_errors
from kinesplat.files import read_image, read_mask, write_png, written_whole
from kinesplat.inverse import TrackResult
from kinesplat.inverse import track as track_frames
from kinesplat.report import overlay
from kinesplat.self_model import SelfModel

PICTURES = 4


@dataclass(frozen=True)
class Evaluated:
    """One folder, what was found in it, and how far it is off."""

    sequence: PoseSequence
    result: TrackResult
    errors: PoseErrors


def evaluate_pose(
    model: Model,
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional],
    camera: Literal["known", "free"] = "known",
    start: Literal["search", "annotation"] = "search",
    masks: bool = False,
    frames: int | None = None,
    colour_weight: float = 1.0,
    output: Output = Path("evaluate-pose"),
    *,
    common: CommonOptions = DEFAULTS,
) -> None:
    """Measure joints and keypoints on recordings in the DREAM (NDDS) format, such as Panda-3CAM.

    Every FOLDER is one video, followed with warm starts as by `kinesplat track`. It holds _camera_settings.json and,
    for each frame, NNNNNN.json and NNNNNN.rgb.jpg (or .png). Writes errors.json, errors.md and overlays: mean absolute
    error of every joint [rad], ADD [mm] and its area under the curve up to 100 mm, for each video and over all frames.
    Exits with 1 when most frames of a video were lost.

    Args:
        model: model file, or the name of a packaged model.
        folders: one or more videos.
        camera: "known": where the first frame's annotated keypoints put it; "free": estimated, only K is known.
        start: the first frame's joints: "search" for them, or begin at their "annotation".
        masks: use NNNNNN.mask.png beside each picture; without, the background is learnt from the video.
        frames: only that many frames of each video.
        colour_weight: weight of the colours against the mask; 0.1 for photographs whose light is not a headlight.
        output: folder for the results; created if needed.
    """
    device = device_of(common)
    loaded = load_model(model)
    if not folders:
        raise InputError("no folder given: kinesplat evaluate-pose MODEL FOLDER...")
    if frames is not None and frames < 1:
        raise InputError(f"--frames is {frames}; expected at least 1")
    names = distinct_names(folders)
    sequences = [
        replace(PoseSequence.read(folder, loaded.tree), name=name) for folder, name in zip(folders, names, strict=True)
    ]
    make_folder(output)
    found = []
    for sequence in sequences:
        found.append(evaluated(loaded.to(device), sequence, camera, start, masks, frames, colour_weight, common.seed))
        write_overlays(loaded, found[-1], output)
    table = markdown(found)
    data = summary(found)
    write_json(output / "errors.json", data)
    with written_whole(output / "errors.md") as temporary:
        temporary.write_text(table + "\n")
    out.print(table)
    out.print(f"wrote {output / 'errors.json'}, {output / 'errors.md'} and overlays in {output}")
    write_json(common.json, data)
    if any(e.result.verdict == "failed" for e in found):
        sys.exit(EXIT_FAILED)


def distinct_names(folders: tuple[Path, ...]) -> list[str]:
    """Names of the folders, with as many of the folders above as it takes to tell them apart.

    Raises:
        InputError: a folder is given twice.
    """
    paths = [folder.resolve() for folder in folders]
    twice = [folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1]
    if twice:
        raise InputError(f"{twice[0]} is given twice")
    for parts in range(1, max(len(path.parts) for path in paths)):
        names = ["_".join(path.parts[1:][-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name}_{number}" for number, path in enumerate(paths)]


def evaluated(
    model: SelfModel,
    sequence: PoseSequence,
    camera: str,
    start: str,
    masks: bool,
    frames: int | None,
    colour_weight: float,
    seed: int,
) -> Evaluated:
    """Follow the robot through one folder and compare."""
    images = sequence.images[:frames]
    known = sequence.camera(model.tree) if camera == "known" else None
    result = track_frames(
        model,
        (read_image(path) for path in images),
        known,
        K=sequence.K,
        masks=_masks(images) if masks else None,
        q_init=sequence.q[0] if start == "annotation" else None,
        optimize_camera=known is None,
        colour_weight=colour_weight,
        seed=seed,
        progress=err.is_terminal,
    )
    sequence = sequence.first(len(images))
    errors = pose_errors(model.tree, sequence, result.q.float(), result.camera.T_cam_world)
    return Evaluated(sequence, result, errors)


def summary(found: list[Evaluated]) -> dict[str, Any]:
    """Errors of every video and their mean, weighted by frames."""
    videos = [
        {
            "name": e.sequence.name,
            **asdict(e.errors),
            "lost_frames": e.result.states.count("lost"),
            "doubtful_frames": e.result.states.count("doubtful"),
            "seconds": e.result.seconds,
        }
        for e in found
    ]
    total = sum(e.errors.frames for e in found)
    keys = ("joint_error_mean_rad", "add_mm", "add_auc")
    mean = {key: sum(getattr(e.errors, key) * e.errors.frames for e in found) / total for key in keys}
    return {"videos": videos, "all": {**mean, "frames": total}}


def markdown(found: list[Evaluated]) -> str:
    """A table: one row per video, joints in columns, "-" where a video does not annotate one."""
    joints = list(dict.fromkeys(name for e in found for name in e.errors.joint_error_rad))
    head = ["video", "frames", "lost", "doubtful", *joints, "mean [rad]", "ADD [mm]", "ADD median [mm]", "ADD AUC"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for e in found:
        x = e.errors
        row = [e.sequence.name, str(x.frames), *(str(e.result.states.count(s)) for s in ("lost", "doubtful"))]
        row += [f"{x.joint_error_rad[name]:.4f}" if name in x.joint_error_rad else "-" for name in joints]
        row += [f"{x.joint_error_mean_rad:.4f}", f"{x.add_mm:.1f}", f"{x.add_median_mm:.1f}", f"{x.add_auc:.3f}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def write_overlays(model: SelfModel, e: Evaluated, folder: Path) -> None:
    """The robot laid over some frames of a video."""
    moving = bool(e.result.camera.batch_shape)
    for i in torch.linspace(0, len(e.sequence.images) - 1, PICTURES).long().unique().tolist():
        T = e.result.camera.T_cam_world[i] if moving else e.result.camera.T_cam_world
        image = model.render(e.result.q[i], Camera(e.sequence.K, T, e.sequence.width, e.sequence.height))
        assert image.rgb is not None
        assert image.alpha is not None
        picture = overlay(read_image(e.sequence.images[i]), image.rgb, image.alpha)
        write_png(folder / f"{e.sequence.name}_{e.sequence.images[i].name.split('.')[0]}.png", picture)


def _masks(images: tuple[Path, ...]) -> Iterator[torch.Tensor]:
    return (read_mask(path.with_name(path.name.split(".")[0] + ".mask.png")) for path in images)
