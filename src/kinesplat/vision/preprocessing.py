"""What a model's own image processor does to a picture, differentiable."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinesplat.errors import InputError

RESAMPLING = {2: "bilinear", 3: "bicubic"}  # PIL's numbers; the others have no smooth counterpart in torch


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalise as an image processor of transformers does, with gradients.

    Attributes:
        shortest_edge: length to which the shorter side is resized [px]; None where `size` or `patch_px` says it. Where
            all three are None pictures keep their size.
        size: height and width to which a picture is stretched [px]; None where the aspect is kept.
        crop: height and width of the piece cut from the middle [px]; None to keep all.
        mean: ``(3,)`` subtracted.
        std: ``(3,)`` divided by.
        resampling: "bilinear" or "bicubic", both with antialiasing.
        patch_px: side of the patches into which SigLIP 2's NaFlex models want pictures cut, None for all others.
        max_patches: how many of those a picture may have.
    """

    shortest_edge: int | None
    size: tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: Float[Tensor, "3"]
    std: Float[Tensor, "3"]
    resampling: str
    patch_px: int | None = None
    max_patches: int = 256

    @classmethod
    def of(cls, processor: Any) -> "Preprocessing":
        """What an image processor of transformers is set to.

        Raises:
            InputError: it resamples in a way that has no gradient, or says no size.
        """
        said = processor.to_dict()
        resizes = bool(said.get("do_resize", True))
        resample = said.get("resample") if resizes else 3
        if resample is None:
            resample = processor.resample
        if int(resample) not in RESAMPLING:
            raise InputError(f"the image processor resamples by PIL's filter {int(resample)}; expected 2 or 3 (smooth)")
        patched, size = "max_num_patches" in said, said.get("size") or {}
        crop = said.get("crop_size") if said.get("do_center_crop") else None
        sized = (int(size["height"]), int(size["width"])) if size.get("height") else None
        if patched and not resizes:
            raise InputError("the image processor cuts pictures into patches without resizing them; expected do_resize")
        if resizes and not patched and sized is None and not size.get("shortest_edge"):
            raise InputError(f"the image processor has the size {size}; expected height and width, or shortest_edge")
        normalised = said.get("do_normalize", True)
        return cls(
            int(size["shortest_edge"]) if resizes and size.get("shortest_edge") and not patched else None,
            sized if resizes and not patched else None,
            None if crop is None else (int(crop["height"]), int(crop["width"])),
            torch.tensor(said["image_mean"] if normalised else [0.0] * 3),
            torch.tensor(said["image_std"] if normalised else [1.0] * 3),
            RESAMPLING[int(resample)],
            int(said["patch_size"]) if patched else None,
            int(said.get("max_num_patches", 256)),
        )

    def __call__(self, rgb: Float[Tensor, "n height width 3"]) -> dict[str, Tensor]:
        """Arguments of the model's `get_image_features` for pictures in [0, 1]."""
        pixels = self._resized(rgb.permute(0, 3, 1, 2))
        pixels = (pixels - self.mean.to(pixels)[:, None, None]) / self.std.to(pixels)[:, None, None]
        if self.patch_px is None:
            return {"pixel_values": pixels}
        return self._patches(pixels, self.patch_px)

    def _resized(self, pixels: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n 3 h w"]:
        height, width = pixels.shape[-2:]
        if self.patch_px is not None:
            size = patched_size(height, width, self.patch_px, self.max_patches)
        elif self.size is not None:
            size = self.size
        elif self.shortest_edge is None:
            size = (height, width)
        else:
            long = int(self.shortest_edge * max(height, width) / min(height, width))
            size = (self.shortest_edge, long) if height <= width else (long, self.shortest_edge)
        if size != (height, width):
            pixels = torch.nn.functional.interpolate(pixels, size, mode=self.resampling, antialias=True)
            pixels = pixels.clamp(0.0, 1.0)  # bicubic overshoots; 8-bit pictures cannot
        return pixels if self.crop is None else _cropped(pixels, self.crop)

    def _patches(self, pixels: Float[Tensor, "n 3 height width"], side: int) -> dict[str, Tensor]:
        """Rows of patches, padded to the same number for every picture (Siglip2ImageProcessor)."""
        n, channels, height, width = pixels.shape
        rows, columns = height // side, width // side
        patches = (
            pixels.reshape(n, channels, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        )
        missing = self.max_patches - rows * columns
        mask = torch.ones(n, rows * columns, dtype=torch.int64, device=pixels.device)
        shapes: Int[Tensor, "n 2"] = torch.tensor([[rows, columns]], device=pixels.device).expand(n, 2)
        return {
            "pixel_values": torch.nn.functional.pad(patches, (0, 0, 0, missing)),
            "pixel_attention_mask": torch.nn.functional.pad(mask, (0, missing)),
            "spatial_shapes": shapes,
        }


def patched_size(height: int, width: int, side: int, most: int) -> tuple[int, int]:
    """The largest picture of nearly the same aspect, in whole patches, that has at most `most` of them [px]."""

    def at(scale: float) -> tuple[int, int]:
        rows, columns = (max(1, math.ceil(length * scale / side)) for length in (height, width))
        return rows * side, columns * side

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = 0.5 * (low + high)
        tall, wide = at(middle)
        low, high = (middle, high) if tall * wide <= most * side * side else (low, middle)
    return at(low)


def _cropped(pixels: Float[Tensor, "n 3 height width"], crop: tuple[int, int]) -> Float[Tensor, "n 3 h w"]:
    """The middle of a picture, with black around where it is smaller."""
    height, width = pixels.shape[-2:]
    tall, wide = max(0, crop[0] - height), max(0, crop[1] - width)
    pixels = torch.nn.functional.pad(pixels, (wide // 2, (wide + 1) // 2, tall // 2, (tall + 1) // 2))
    top, left = (pixels.shape[-2] - crop[0]) // 2, (pixels.shape[-1] - crop[1]) // 2
    return pixels[..., top : top + crop[0], left : left + crop[1]]
