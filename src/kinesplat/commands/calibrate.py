"""From a folder of pictures with known joints to cameras: calibrate."""

import csv
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

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
    same_size,
    write_json,
)
from kinesplat.errors import InputError
from kinesplat.files import read_image, read_mask, write_png
from kinesplat.inverse import CalibrationResult
from kinesplat.inverse import calibrate as calibrate_cameras
from kinesplat.kinematics import KinematicTree
from kinesplat.report import overlay
from kinesplat.self_model import SelfModel

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class CameraFolder:
    """What the folder of one camera holds: pictures, masks or none, readings, intrinsics and perhaps a first guess."""

    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    q: tuple[tuple[float, ...], ...]
    K: torch.Tensor
    T_init: torch.Tensor | None


def calibrate(
    model: Model,
    folder: Annotated[Path, tyro.conf.Positional],
    output: Output = Path("calibration"),
    mount: str | None = None,
    free: tuple[Literal["offsets", "focal"], ...] = (),
    backdrop: Path | None = None,
    *,
    common: CommonOptions = DEFAULTS,
) -> None:
    """Recover where cameras stand from pictures of the robot with known joint values.

    FOLDER holds images/ with the pictures; masks/ with a mask of the same name for each (white on the robot; may be
    absent if the background is plain, with --backdrop, learned from three pictures or more, or left to the robot's
    contours); the readings as q.csv (header "image" and the joint names; one row per picture) or q.json ({"NAME.png":
    [...], ...}), [rad]/[m]; and camera.json with "K" [px] and, if there is a first guess, "T_cam_base" (4 x 4; with
    --mount "T_cam_link"). Several cameras: one such folder for each inside FOLDER.
    Writes calibration.json, camera.json (for --camera of other commands) and an overlay of every picture. Exits with 1
    when the calibration failed.

    Args:
        model: model file, or the name of a packaged model.
        folder: the pictures and what belongs to them, see above.
        output: folder for the results; created if needed.
        mount: link that carries the cameras (eye in hand); default: they stand beside the robot.
        free: what else to estimate: a constant offset of every joint reading, the focal length.
        backdrop: picture of the scene without the robot.
    """
    device = device_of(common)
    loaded = load_model(model)
    cameras = read_cameras(folder, loaded.tree, "T_cam_base" if mount is None else "T_cam_link")
    paths = tuple(path for camera in cameras for path in camera.images)
    pictures = same_size([read_image(path) for path in paths], paths)
    mask_paths = tuple(path for camera in cameras for path in camera.masks)
    make_folder(output)
    guesses = [camera.T_init for camera in cameras if camera.T_init is not None]
    result = calibrate_cameras(
        loaded.to(device),
        pictures,
        torch.tensor([q for camera in cameras for q in camera.q]),
        torch.stack([camera.K for camera in cameras]),
        same_size([read_mask(path) for path in mask_paths], mask_paths) if mask_paths else None,
        torch.stack(guesses) if guesses else None,
        camera_of_image=[index for index, camera in enumerate(cameras) for _ in camera.images],
        mount=mount,
        free=free,
        backdrop=None if backdrop is None else read_image(backdrop),
        seed=common.seed,
        progress=err.is_terminal,
    )
    write_overlays(loaded, pictures, paths, [i for i, c in enumerate(cameras) for _ in c.images], result, output)
    data = {**result.to_json(), "files": [str(path) for path in paths]}
    entries = [{**result.camera.to_json(), "K": K, "T_cam_world": T} for K, T in _rows(result)]
    write_json(output / "calibration.json", data)
    write_json(output / "camera.json", entries[0] if len(entries) == 1 else entries)
    out.print(result.report())
    out.print(f"wrote {output / 'calibration.json'}, {output / 'camera.json'} and overlays in {output}")
    write_json(common.json, data)
    if result.verdict == "failed":
        sys.exit(EXIT_FAILED)


def read_cameras(folder: Path, tree: KinematicTree, guess: str) -> list[CameraFolder]:
    """The cameras of a folder: itself, or its subfolders.

    Raises:
        InputError: something is missing or does not fit; says what.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if (folder / "camera.json").is_file():
        return [read_camera(folder, tree, guess)]
    inside = sorted(path.parent for path in folder.glob("*/camera.json"))
    if not inside:
        raise InputError(f"{folder} holds no camera.json, nor do its subfolders")
    cameras = [read_camera(path, tree, guess) for path in inside]
    for name in ("masks", "T_init"):
        have = [getattr(camera, name) is not None and len(getattr(camera, name)) > 0 for camera in cameras]
        if any(have) != all(have):
            what = "masks" if name == "masks" else guess
            raise InputError(
                f"{inside[have.index(False)]} has no {what}, {inside[have.index(True)]} has; give all or none"
            )
    return cameras


def read_camera(folder: Path, tree: KinematicTree, guess: str) -> CameraFolder:
    """One camera's folder."""
    where = folder / "images" if (folder / "images").is_dir() else folder
    readings = read_readings(folder, tree)
    images = tuple(sorted(p for p in where.iterdir() if p.suffix.lower() in PICTURES and p.name in readings))
    missing = sorted(set(readings) - {p.name for p in images})
    if missing or not images:
        raise InputError(f"{where}: no picture {', '.join(missing[:3]) or 'at all'}, which the readings name")
    masks: tuple[Path, ...] = ()
    if (folder / "masks").is_dir():
        masks = tuple(folder / "masks" / path.name for path in images)
        masks = tuple(p if p.is_file() else p.with_suffix(".png") for p in masks)
    K, T_init = _intrinsics(folder / "camera.json", guess)
    return CameraFolder(images, masks, tuple(readings[path.name] for path in images), K, T_init)


def read_readings(folder: Path, tree: KinematicTree) -> dict[str, tuple[float, ...]]:
    """Joint values by the name of the picture, from q.csv or q.json.

    Raises:
        InputError: neither is there, or it cannot be read.
    """
    try:
        if (folder / "q.csv").is_file():
            with (folder / "q.csv").open(newline="") as file:
                rows = list(csv.DictReader(file))
            return {row["image"]: tuple(float(row[name]) for name in tree.joint_names) for row in rows}
        data = json.loads((folder / "q.json").read_text())
        readings = {str(name): tuple(float(v) for v in values) for name, values in data.items()}
    except OSError as error:
        raise InputError(f"{folder}: neither q.csv nor q.json can be read ({error.strerror})") from error
    except KeyError as error:
        expected = ", ".join(("image", *tree.joint_names))
        raise InputError(f"{folder / 'q.csv'}: no column {error}; expected {expected}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: the joint readings cannot be read: {error}") from error
    for name, values in readings.items():
        if len(values) != tree.dof:
            raise InputError(f"{folder / 'q.json'}: {name} has {len(values)} values; expected {tree.dof}")
    return readings


def write_overlays(
    model: SelfModel,
    pictures: list[torch.Tensor],
    paths: tuple[Path, ...],
    camera_of_image: list[int],
    result: CalibrationResult,
    folder: Path,
) -> None:
    """The rendered robot laid over every picture."""
    rows = list(_rows(result))
    for i, (picture, path) in enumerate(zip(pictures, paths, strict=True)):
        K, T = rows[0] if len(rows) == 1 else rows[i if result.mount else camera_of_image[i]]
        camera = replace(result.camera, K=torch.tensor(K), T_cam_world=torch.tensor(T))
        image = model.render(result.q[i], camera)
        assert image.rgb is not None
        assert image.alpha is not None
        write_png(folder / f"{i}_{path.stem}_overlay.png", overlay(picture, image.rgb, image.alpha))


def _rows(result: CalibrationResult) -> list[tuple[list[Any], list[Any]]]:
    """K and T_cam_world of every camera of the result, as lists."""
    camera = result.camera
    K = camera.K.expand(*camera.batch_shape, 3, 3).reshape(-1, 3, 3).tolist()
    return list(zip(K, camera.T_cam_world.reshape(-1, 4, 4).tolist(), strict=True))


def _intrinsics(path: Path, guess: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    try:
        data = json.loads(path.read_text())
        K = torch.tensor(data["K"], dtype=torch.float32)
        T = torch.tensor(data[guess], dtype=torch.float32) if guess in data else None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except KeyError as error:
        raise InputError(
            f"{path}: key {error} is missing; expected K, and {guess} if there is a first guess"
        ) from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: {error}") from error
    if tuple(K.shape) != (3, 3) or (T is not None and tuple(T.shape) != (4, 4)):
        raise InputError(f"{path}: K must be 3 x 3 and {guess} 4 x 4")
    return K, T
