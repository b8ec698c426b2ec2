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

    Args:
        segmenter: SAM 2.
        model: self-model of the robot.
        image: ``(height, width, 3)`` in [0, 1].
        q: ``(dof,)`` its joints, right within what the points allow [rad]/[m].
        camera: of the picture.

    Raises:
        InputError: the camera does not see the robot.
    """
    points, on = prompt_points(model, q, camera)
    return segmenter.mask(image, points, on)


@torch.no_grad()
def prompt_points(
    model: SelfModel, q: Float[Tensor, " dof"], camera: Camera
) -> tuple[Float[Tensor, "n 2"], Bool[Tensor, " n"]]:
    """Pixels deep inside the robot's silhouette, far from each other, then pixels well beside it.

    Raises:
        InputError: the camera does not see the robot.
    """
    device = model.parameters.means.device
    alpha = model.render(q.float().to(device), camera.to(device), outputs=("alpha",)).alpha
    assert alpha is not None
    alpha = alpha.cpu()
    inside = (alpha > 0.5).numpy()
    if not inside.any():
        raise InputError("the camera does not see the robot, so no point on it can be given")
    away = BESIDE_SHARE * max(camera.width, camera.height)
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
