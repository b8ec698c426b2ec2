"""What was seen: images, masks and cameras of one configuration, checked once, at any resolution."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError, UnseenError
from kinesplat.inverse.backdrop import moving_masks

ImageLike = Any
MASK_FLOOR = 0.02
HIGHLIGHT = 1.5
BACKGROUND_TOLERANCE = 0.05


@dataclass(frozen=True)
class Observation:
    """Several views of one configuration; made on the CPU, wherever the pictures were.

    Attributes:
        rgb: ``(views, height, width, 3)`` in [0, 1], sRGB values as displayed.
        mask: ``(views, height, width)`` in [0, 1], 1 on the robot; None when unknown.
        camera: batch ``(views,)``.
        background: ``(3,)`` colour behind the robot: that of the image borders, or white where they have none and a
            mask tells the robot apart. Pixels off the mask are set to it.
        backdrop: ``(views, height, width, 3)`` what is behind the robot, pixel by pixel, in place of `background`; for
            pictures without a mask.
        unknown: whether nothing is known of what is behind the robot: neither masks nor a backdrop, nor one colour.
    """

    rgb: Float[Tensor, "views height width 3"]
    mask: Float[Tensor, "views height width"] | None
    camera: Camera
    background: Float[Tensor, "3"]
    backdrop: Float[Tensor, "views height width 3"] | None = None
    unknown: bool = False

    @classmethod
    def create(
        cls,
        images: ImageLike,
        masks: ImageLike | None,
        camera: Camera,
        backdrop: ImageLike | None = None,
        *,
        unknown: bool = False,
    ) -> "Observation":
        """Check and convert what a user passes.

        Args:
            images: ``(height, width, 3)`` or ``(views, height, width, 3)``; float in [0, 1] or uint8, torch or numpy;
                rendered highlights up to 1.5 are cut off at 1.
            masks: the same without the last axis; bool, float in [0, 1] or uint8; or None.
            camera: one camera per view.
            backdrop: the scene without the robot, one picture for all views or one each, instead of masks.
            unknown: whether pictures without masks may show the robot in front of anything.

        Raises:
            InputError: wrong type, shape, range, NaN, or an image size that is not the camera's.
            UnseenError: an empty mask, or images of one colour.
        """
        rgb = _as_float(images, "images")
        rgb = rgb[None] if rgb.dim() == 3 else rgb
        if rgb.dim() != 4 or rgb.shape[-1] != 3:
            raise InputError(
                f"images have shape {tuple(rgb.shape)}; expected (height, width, 3) or (views, height, width, 3)"
            )
        camera = _one_per_view(camera, rgb.shape[0])
        if tuple(rgb.shape[1:3]) != (camera.height, camera.width):
            raise InputError(
                f"images are {rgb.shape[2]} x {rgb.shape[1]} px; the camera says {camera.width} x {camera.height}"
            )
        if backdrop is not None:
            if masks is not None:
                raise InputError("masks and backdrop are both given; expected one of them")
            return cls(rgb, None, camera, torch.ones(3), _backdrop(backdrop, rgb))
        if masks is None:
            plain = plain_background(rgb)
            if plain is None and unknown:
                return cls(rgb, None, camera, torch.ones(3), unknown=True)
            if plain is None:
                raise InputError(
                    "the image borders are not of one colour, so the background is not plain: give masks or a backdrop"
                )
            if (rgb - plain).abs().amax().item() < 0.05:
                raise UnseenError("the images are of one colour: no robot to be seen")
            return cls(rgb, None, camera, plain)
        mask = _as_float(masks, "masks")
        mask = mask[None] if mask.dim() == 2 else mask
        if mask.shape != rgb.shape[:-1]:
            raise InputError(f"masks have shape {tuple(mask.shape)}; the images need {tuple(rgb.shape[:-1])}")
        if not bool((mask > 0.5).flatten(1).any(dim=1).all()):
            raise UnseenError("a mask is empty: no pixel of the robot in that view")
        plain = plain_background(torch.where(mask[..., None] > MASK_FLOOR, math.nan, rgb))
        background = torch.ones(3) if plain is None else plain
        return cls(torch.where(mask[..., None] > MASK_FLOOR, rgb, background), mask, camera, background)

    def silhouette(self) -> Float[Tensor, "views height width"]:
        """The masks, or what differs from the background; before a backdrop, what moves, specks removed."""
        if self.mask is not None:
            return self.mask
        if self.backdrop is not None:
            return moving_masks(self.rgb, self.backdrop)
        return ((self.rgb - self.background).abs().amax(dim=-1) > BACKGROUND_TOLERANCE).float()

    def resized(self, long_side: int) -> "Observation":
        """Area-averaged to at most `long_side` pixels along the longer image side (blurred, not decimated)."""
        height, width = self.rgb.shape[1:3]
        if long_side >= max(height, width):
            return self
        scale = long_side / max(height, width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        mask = None if self.mask is None else torch.nn.functional.adaptive_avg_pool2d(self.mask[:, None], size)[:, 0]
        backdrop = None if self.backdrop is None else shrunk(self.backdrop, *size)
        camera = self.camera.resized(size[1], size[0])
        return type(self)(shrunk(self.rgb, *size), mask, camera, self.background, backdrop, self.unknown)

    def to(self, device: torch.device) -> "Observation":
        """The same on another device."""
        mask, backdrop = (None if t is None else t.to(device) for t in (self.mask, self.backdrop))
        moved = self.rgb.to(device), mask, self.camera.to(device), self.background.to(device), backdrop
        return type(self)(*moved, self.unknown)

    def behind(self) -> Float[Tensor, "*shape 3"]:
        """Colours where there is no robot: the backdrop, or the one background colour."""
        return self.background if self.backdrop is None else self.backdrop


def shrunk(rgb: Float[Tensor, "n height width 3"], height: int, width: int) -> Float[Tensor, "n h w 3"]:
    """Pictures area-averaged to ``height x width`` pixels."""
    planes = torch.nn.functional.adaptive_avg_pool2d(rgb.permute(0, 3, 1, 2), (height, width))
    return planes.permute(0, 2, 3, 1).contiguous()


def _backdrop(values: ImageLike, rgb: Float[Tensor, "views height width 3"]) -> Float[Tensor, "views height width 3"]:
    backdrop = _as_float(values, "backdrop")
    backdrop = backdrop[None] if backdrop.dim() == 3 else backdrop
    if backdrop.shape[1:] != rgb.shape[1:] or len(backdrop) not in (1, len(rgb)):
        raise InputError(
            f"backdrop has shape {tuple(backdrop.shape)}; the images need {tuple(rgb.shape)}, or one for all"
        )
    return backdrop.expand(rgb.shape)


def image_shape(images: ImageLike) -> tuple[int, int, int]:
    """Number of views, height and width of what `Observation.create` takes.

    Raises:
        InputError: it has another form.
    """
    rgb = _as_float(images, "images")
    if rgb.dim() not in (3, 4) or rgb.shape[-1] != 3:
        raise InputError(
            f"images have shape {tuple(rgb.shape)}; expected (height, width, 3) or (views, height, width, 3)"
        )
    height, width = rgb.shape[-3:-1]
    return (1 if rgb.dim() == 3 else len(rgb)), height, width


def given_camera(camera: Camera | None, K: Tensor | None, images: ImageLike, free: bool) -> Camera:
    """The camera that a caller gave, or one that stands anywhere, with intrinsics K.

    Raises:
        InputError: there is neither a camera, nor K with a camera that is `free`.
    """
    if camera is not None:
        return camera if K is None else replace(camera, K=K)
    if K is None or not free:
        raise InputError(
            "camera is None; give the camera, or a first guess of it with optimize_camera=True, or K with "
            "optimize_camera=True where nothing else is known"
        )
    views, height, width = image_shape(images)
    return Camera(torch.as_tensor(K).float().expand(views, 3, 3), torch.eye(4).expand(views, 4, 4), width, height)


def plain_background(rgb: Float[Tensor, "views height width 3"]) -> Float[Tensor, "3"] | None:
    """Colour of the image borders where it is one colour (robots may cross a third of them), else None.

    Pixels that are NaN do not count.
    """
    border = torch.cat([rgb[:, [0, -1]].reshape(-1, 3), rgb[:, :, [0, -1]].reshape(-1, 3)])
    border = border[torch.isfinite(border).all(dim=-1)]
    if not len(border):
        return None
    colour = border.median(dim=0).values
    outliers = ((border - colour).abs().amax(dim=-1) > 0.05).float().mean().item()
    return None if outliers > 0.35 else colour


def _one_per_view(camera: Camera, views: int) -> Camera:
    shape = camera.batch_shape
    if shape != (views,) and not (views == 1 and shape == ()):
        raise InputError(f"{views} view(s) but a camera batch of shape {shape}; expected one camera per view")
    return Camera(
        camera.K.expand(views, 3, 3).float().cpu(),
        camera.T_cam_world.expand(views, 4, 4).float().cpu(),
        camera.width,
        camera.height,
    )


def _as_float(values: ImageLike, name: str) -> Tensor:
    if isinstance(values, (list, tuple)) and values:
        return torch.stack([_as_float(v, name) for v in values])
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(np.ascontiguousarray(values))
    if not isinstance(values, Tensor):
        raise InputError(f"{name} are of type {type(values).__name__}; expected a torch tensor or numpy array")
    values = values.cpu()
    if values.dtype in (torch.uint8, torch.bool):
        return values.float() / (255.0 if values.dtype == torch.uint8 else 1.0)
    if not values.is_floating_point():
        raise InputError(f"{name} have dtype {values.dtype}; expected float in [0, 1] or uint8")
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"{name} contain NaN or infinity")
    if values.numel() and (values.min().item() < -1e-3 or values.max().item() > HIGHLIGHT):
        raise InputError(f"{name} range over [{values.min():.3g}, {values.max():.3g}]; expected [0, 1]")
    return values.float().clamp(0.0, 1.0)
