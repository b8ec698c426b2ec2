"""Videos: files, GIFs and folders of pictures in; MP4 and GIF out."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor

from kinesplat.errors import BackendError, InputError
from kinesplat.files import read_image, write_gif, written_whole

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
DEFAULT_RATE = 30.0


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder by name.

    Raises:
        InputError: it holds none.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not found:
        raise InputError(f"{folder} holds no picture ({', '.join(sorted(PICTURES))})")
    return found


def read_frames(path: Path) -> Iterator[Tensor]:
    """Frames ``(height, width, 3)``, one after the other, of a video file, a GIF, or a folder of pictures.

    Raises:
        InputError: it is missing, empty or no video.
        BackendError: a video file without PyAV installed.
    """
    if path.is_dir():
        return (read_image(picture) for picture in picture_files(path))
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    return _gif_frames(path) if path.suffix.lower() == ".gif" else _video_frames(path)


def frame_rate(path: Path) -> float:
    """Frames per second; 30 for a folder of pictures."""
    if path.is_dir():
        return DEFAULT_RATE
    if path.suffix.lower() == ".gif":
        with Image.open(path) as image:
            return 1000.0 / max(float(image.info.get("duration", 1000.0 / DEFAULT_RATE)), 1.0)
    with _opened(path) as container:
        return float(container.streams.video[0].average_rate or DEFAULT_RATE)


def read_clip(path: Path, start: float, count: int) -> UInt8[Tensor, "frames height width 3"]:
    """`count` frames of a video file from `start` [s] on.

    Raises:
        InputError: it is missing, no video, or ends before.
        BackendError: PyAV is not installed.
    """
    frames: list[Tensor] = []
    with _opened(path) as container:
        stream = container.streams.video[0]
        half = 0.5 / float(stream.average_rate or DEFAULT_RATE)
        try:
            container.seek(int(max(start - half, 0.0) / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.time is not None and frame.time >= start - half:
                    frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
                if len(frames) == count:
                    return torch.stack(frames)
        except _pyav().error.FFmpegError as error:
            raise InputError(f"{path}: broken video ({error.strerror})") from error
    raise InputError(f"{path}: has {len(frames)} frames from {start:g} s on, expected {count}")


def write_video(path: Path, frames: Iterable[Float[Tensor, "height width 3"]], rate: float) -> Path:
    """Write an MP4 (H.264) or, by its ending, a GIF; whole or not at all.

    Raises:
        InputError: another ending, or the file cannot be written.
        BackendError: an MP4 without PyAV installed.
    """
    check_video(path)
    if path.suffix.lower() == ".gif":
        pictures = list(frames)
        return write_gif(path, pictures, len(pictures) / rate)
    av = _pyav()
    with written_whole(path) as temporary, av.open(str(temporary), mode="w", format="mp4") as container:
        stream = None
        for frame in frames:
            array = np.ascontiguousarray(_even((frame.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)).numpy())
            if stream is None:
                stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1000))
                stream.height, stream.width = array.shape[:2]
                stream.pix_fmt = "yuv420p"
                stream.options = {"crf": "20"}
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        if stream is not None:
            container.mux(stream.encode(None))
    return path


def check_video(path: Path) -> None:
    """Refuse a video that could not be written in the end.

    Raises:
        InputError: neither .mp4 nor .gif, or the folder is missing.
        BackendError: an MP4 without PyAV installed.
    """
    if path.suffix.lower() not in (".mp4", ".gif"):
        raise InputError(f"{path}: videos are written as .mp4 or .gif")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder")
    if path.suffix.lower() == ".mp4":
        _pyav()


def _even(frame: UInt8[Tensor, "height width 3"]) -> UInt8[Tensor, "h w 3"]:
    """Without a last odd row or column, which H.264 cannot store."""
    return frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]


def _video_frames(path: Path) -> Iterator[Tensor]:
    with _opened(path) as container:
        try:
            for frame in container.decode(video=0):
                yield torch.from_numpy(frame.to_ndarray(format="rgb24"))
        except _pyav().error.FFmpegError as error:
            raise InputError(f"{path}: broken video ({error.strerror})") from error


def _gif_frames(path: Path) -> Iterator[Tensor]:
    try:
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                yield torch.from_numpy(np.array(frame.convert("RGB")))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise InputError(f"{path}: broken GIF ({error})") from error


def _opened(path: Path) -> Any:
    av = _pyav()
    try:
        container = av.open(str(path))
    except av.error.FFmpegError as error:
        raise InputError(f"{path}: not a video that can be read ({error.strerror})") from error
    if not container.streams.video:
        container.close()
        raise InputError(f"{path}: holds no video stream")
    return container


def _pyav() -> Any:
    try:
        return import_module("av")
    except ImportError as error:
        raise BackendError("video files need PyAV: pip install 'kinesplat[video]'; GIFs and folders do not") from error
