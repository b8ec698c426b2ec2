"""The robot's mask in a picture whose joints are known: points that its self-model gives, to a model that segments."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.self_model import SelfModel
from kinesplat.vision.segment import Segmenter

POINTS = 12
LEAST_SHARE = 0.7
"""Of the robot's silhouette, that a mask must cover to be the robot's."""
MOST_AREA = 3.0
"""Of a mask, as a multiple of the silhouette's: cables and tools are that much at most, a table is more."""
BESIDE_SHARE = 0.06
"""How far from the robot points count as beside it, as a share of the picture's longer side."""


def robot_mask(
    segmenter: Segmenter,
    model: SelfModel,
    image: Float[Tensor, "height width 3"],
    q: Float[Tensor, " dof"],
    camera: Camera,
) -> Float[Tensor, "height width"]:
    """1 on the robot, with what hangs on it and the self-model does not know: cables, tools, stickers.

    That is the mask and the self-model's silhouette together, once the mask is seen to be about the robot.

    Args:
        segmenter: SAM 2.
        model: self-model of the robot.
        image: ``(height, width, 3)`` in [0, 1].
        q: ``(dof,)`` its joints, right within what the points allow [rad]/[m].
        camera: of the picture.

    Raises:
        InputError: the camera does not see the robot, or the mask leaves out much of the silhouette, or is much larger.
    """
    inside = _silhouette(model, q, camera)
    mask = segmenter.mask(image, *_points(inside)).cpu()
    share = float(mask[inside].mean())
    area = float(mask.sum() / inside.sum())
    if share < LEAST_SHARE or area > MOST_AREA:
        raise InputError(
            f"the segmenter's mask is not the robot's: it covers {share:.0%} of the self-model's silhouette (expected "
            f"{LEAST_SHARE:.0%} or more) and {area:.1f} times its area (expected {MOST_AREA:g} at most); are q and the "
            "camera right? Another segmenter, or a picture of the scene without the robot, also helps"
        )
    return torch.maximum(mask, inside.to(mask.dtype))


def prompt_points(
    model: SelfModel, q: Float[Tensor, " dof"], camera: Camera
) -> tuple[Float[Tensor, "n 2"], Bool[Tensor, " n"]]:
    """Pixels deep inside the robot's silhouette, far from each other, then pixels well beside it.

    Raises:
        InputError: the camera does not see the robot.
    """
    return _points(_silhouette(model, q, camera))


@torch.no_grad()
def _silhouette(model: SelfModel, q: Tensor, camera: Camera) -> Bool[Tensor, "height width"]:
    device = model.parameters.means.device
    alpha = model.render(q.float().to(device), camera.to(device), outputs=("alpha",)).alpha
    assert alpha is not None
    inside = alpha.cpu() > 0.5
    if not inside.any():
        raise InputError("the camera does not see the robot, so no point on it can be given")
    return inside


def _points(silhouette: Bool[Tensor, "height width"]) -> tuple[Float[Tensor, "n 2"], Bool[Tensor, " n"]]:
    inside, away = silhouette.numpy(), BESIDE_SHARE * max(silhouette.shape)
    depth, distance = (np.asarray(ndimage.distance_transform_edt(part)) for part in (inside, ~inside))
    core = torch.from_numpy((depth >= 0.5 * depth.max()) | (depth == ndimage.maximum_filter(depth, 5)) & inside)
    beside = torch.from_numpy((distance >= away) & (distance <= 2.0 * away))
    on = _spread(core.nonzero(), POINTS)
    off = _spread(beside.nonzero(), POINTS)
    labels = torch.cat([torch.ones(len(on)), torch.zeros(len(off))]).bool()
    return torch.cat([on, off]).flip(-1).float() + 0.5, labels


def _spread(pixels: Tensor, count: int) -> Tensor:
    """At most `count` of the pixels, each as far as can be from those before it."""
    if not len(pixels):
        return pixels
    chosen = [pixels[0]]
    nearest = (pixels - chosen[0]).float().norm(dim=-1)
    for _ in range(min(count, len(pixels)) - 1):
        chosen.append(pixels[nearest.argmax()])
        nearest = torch.minimum(nearest, (pixels - chosen[-1]).float().norm(dim=-1))
    return torch.stack(chosen)
