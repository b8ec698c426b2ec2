"""One file of a data set: a ZIP archive of PNG pictures and NumPy arrays, with a checksum for every member.

`docs/dataset.md` describes the members. ZIP stores a CRC-32 of each, which reading checks.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.dataset.frames import Frames
from kinesplat.errors import DatasetError
from kinesplat.files import written_whole

MAX_DEPTH_STEP = 65535
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    KeyError,
    ValueError,
    TypeError,
    EOFError,
    UnidentifiedImageError,
    SyntaxError,
)
_EARLIEST = (1980, 1, 1, 0, 0, 0)  # members carry no time, so equal data are equal files


def write_shard(path: Path, frames: Frames, extra: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
    """Write the images with their cameras, joint values and lights, whole or not at all.

    Args:
        path: the file.
        frames: images; depth and link ids must be there.
        extra: further arrays, one member each.
        header: JSON-able facts about the shard.

    Raises:
        InputError: the file cannot be written.
    """
    assert frames.depth is not None
    assert frames.link_id is not None
    step = (frames.depth.double().flatten(1).amax(dim=1) / MAX_DEPTH_STEP).clamp(min=1e-9)
    steps = (frames.depth.double() / step[:, None, None]).round()
    steps = torch.where(frames.depth > 0, steps.clamp(1, MAX_DEPTH_STEP), 0.0)
    pictures = {
        "rgb": frames.rgb.numpy(),
        "alpha": frames.alpha.numpy(),
        "depth": steps.numpy().astype(np.uint16),
        "link_id": (frames.link_id.numpy() + 1).astype(np.uint16 if int(frames.link_id.max()) > 253 else np.uint8),
    }
    camera = frames.camera
    arrays = {
        "q": frames.q.numpy(),
        "K": camera.K.expand(len(frames), 3, 3).numpy(),
        "T_cam_world": camera.T_cam_world.expand(len(frames), 4, 4).numpy(),
        "depth_step_m": step.numpy(),
        **({} if frames.light is None else {"light": frames.light.numpy()}),
        **extra,
    }
    with written_whole(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        _add(archive, "shard.json", json.dumps({**header, "images": len(frames)}, indent=1).encode())
        for name, values in arrays.items():
            _add(archive, f"{name}.npy", _npy(values))
        for name, images in pictures.items():
            for row, image in enumerate(images):
                _add(archive, f"{name}/{row:03d}.png", _png(image))


def read_shard(path: Path, geometry: bool = True) -> tuple[Frames, dict[str, Any]]:
    """Images and header that `write_shard` wrote; without `geometry` neither depth nor link ids.

    Raises:
        DatasetError: the file is missing, cut short, corrupt, or no shard.
    """
    with _opened(path) as archive:
        header = json.loads(archive.read("shard.json"))
        kinds = ("rgb", "alpha", "depth", "link_id") if geometry else ("rgb", "alpha")
        images = {kind: _pictures(archive, kind, int(header["images"])) for kind in kinds}
        names = ["q", "K", "T_cam_world", "depth_step_m", *(["light"] if "light.npy" in archive.namelist() else [])]
        return _frames(images, {name: torch.from_numpy(_array(archive, name)) for name in names}), header


def read_array(path: Path, name: str) -> np.ndarray:
    """One array of a shard, without decoding its pictures.

    Raises:
        DatasetError: the file is missing, cut short, corrupt, or has no such array.
    """
    with _opened(path) as archive:
        return _array(archive, name)


def read_shard_header(path: Path) -> dict[str, Any]:
    """The header alone.

    Raises:
        DatasetError: the file is missing, cut short, corrupt, or no shard.
    """
    with _opened(path) as archive:
        return json.loads(archive.read("shard.json"))


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; whatever goes wrong while it is read names the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: no such shard") from error
    except _BROKEN as error:
        raise DatasetError(f"{path}: corrupt shard ({error}); delete it and run kinesplat dataset again") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error})") from error


def _frames(images: dict[str, np.ndarray], arrays: dict[str, Tensor]) -> Frames:
    rgb, alpha = torch.from_numpy(images["rgb"]), torch.from_numpy(images["alpha"])
    camera = Camera(arrays["K"], arrays["T_cam_world"], rgb.shape[2], rgb.shape[1])
    depth = link_id = None
    if "depth" in images:
        depth = _metres(torch.from_numpy(images["depth"].astype(np.int32)), arrays["depth_step_m"])
        link_id = torch.from_numpy(images["link_id"].astype(np.int16) - np.int16(1))
    return Frames(arrays["q"], camera, rgb, alpha, depth, link_id, arrays.get("light"))


def _metres(steps: Shaped[Tensor, "n h w"], step: Float[Tensor, " n"]) -> Float[Tensor, "n h w"]:
    return (steps * step[:, None, None]).float()


def _pictures(archive: zipfile.ZipFile, kind: str, count: int) -> np.ndarray:
    images = []
    for row in range(count):
        with Image.open(io.BytesIO(archive.read(f"{kind}/{row:03d}.png"))) as image:
            images.append(np.array(image))
    return np.stack(images)


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    return np.load(io.BytesIO(archive.read(f"{name}.npy")), allow_pickle=False)


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, _EARLIEST), data)


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(values), allow_pickle=False)
    return buffer.getvalue()


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
