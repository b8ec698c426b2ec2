"""Files that are written whole or not at all, and pictures."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Integer
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from kinesplat.errors import InputError

MAX_IMAGE_PIXELS = 100_000_000


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Temporary file beside `path` that replaces it when the block ends well and vanishes when it does not.

    Raises:
        InputError: the folder does not exist or cannot be written, or the disk is full.
    """
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(path: str | Path) -> Iterator[Path]:
    """Temporary folder beside `path` that replaces it when the block ends well and vanishes when it does not.

    Raises:
        InputError: it cannot be written, or `path` is a file.
    """
    path = Path(path)
    try:
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    old = temporary / "old"
    new = temporary / "new"
    try:
        new.mkdir()
        yield new
        if path.exists():
            path.replace(old)
        new.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_image(path: str | Path) -> Float[Tensor, "height width 3"]:
    """RGB picture as float in [0, 1]; an alpha channel is refused, since its background is unknown.

    Raises:
        InputError: the file is missing, broken, no picture, absurdly large, or has an alpha channel.
    """
    with _opened(path) as image:
        if image.mode in ("RGBA", "LA", "PA"):
            raise InputError(f"{path}: has an alpha channel; flatten it to RGB and pass the mask as its own file")
        _refuse_16_bit(image, path)
        return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB"), dtype=np.float32) / 255.0)


def read_mask(path: str | Path) -> Float[Tensor, "height width"]:
    """Single-channel picture as float in [0, 1], 1 on the robot.

    Raises:
        InputError: the file is missing, broken, no picture or absurdly large.
    """
    with _opened(path) as image:
        _refuse_16_bit(image, path)
        if image.mode in ("RGBA", "LA", "PA"):
            raise InputError(f"{path}: has an alpha channel; a mask is one channel, white on the robot")
        return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("L"), dtype=np.float32) / 255.0)


def write_png(path: str | Path, pixels: Tensor) -> Path:
    """Write ``(height, width[, 3])``: float in [0, 1] as 8 bit, integers as 8 bit (uint8) or 16 bit (others)."""
    values = pixels.detach().cpu()
    if values.is_floating_point():
        values = (values.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    array = values.numpy()
    image = Image.fromarray(array if array.dtype == np.uint8 else array.astype(np.uint16))
    with written_whole(path) as temporary:
        image.save(temporary, format="PNG")
    return Path(path)


def write_gif(path: str | Path, frames: Sequence[Float[Tensor, "height width 3"]], seconds: float) -> Path:
    """Write an endless GIF that plays `frames` in `seconds`, with a pause at the end."""
    arrays = [(f.detach().clamp(0, 1) * 255.0).round().to(torch.uint8).cpu().numpy() for f in frames]
    images = [Image.fromarray(a) for a in arrays]
    durations = [max(20, round(1000 * seconds / len(images)))] * (len(images) - 1) + [1500]
    with written_whole(path) as temporary:
        images[0].save(temporary, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
    return Path(path)


def side_by_side(tiles: Sequence[Float[Tensor, "height width 3"]]) -> Float[Tensor, "height total 3"]:
    """Pictures of one height next to each other."""
    return torch.cat(list(tiles), dim=1)


def colours_of(ids: Integer[Tensor, "height width"]) -> Float[Tensor, "height width 3"]:
    """A distinct colour per id (golden-ratio hues), white where the id is -1."""
    hue = (ids.float() * 0.61803398875) % 1.0
    offsets = torch.tensor([0.0, 2.0 / 3.0, 1.0 / 3.0])
    rgb = (torch.abs(((hue[..., None] + offsets) % 1.0) * 6.0 - 3.0) - 1.0).clamp(0.0, 1.0) * 0.8 + 0.1
    return torch.where(ids[..., None] < 0, torch.ones(3), rgb)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise InputError(f"{path}: {image.width} x {image.height} px is more than {MAX_IMAGE_PIXELS:,} pixels")
            image.load()
            yield image
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a picture that can be read (PNG, JPEG, WebP, ...)") from error
    except (OSError, SyntaxError) as error:
        raise InputError(f"{path}: broken picture ({error})") from error


def _refuse_16_bit(image: Image.Image, path: str | Path) -> None:
    if image.mode.startswith(("I", "F")):
        raise InputError(f"{path}: has more than 8 bits a channel; convert it to 8 bits")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
