"""What is behind the robot in a video of a camera that stands still, from the pictures and where the robot is."""

import torch
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import InputError
from kinesplat.self_model import SelfModel

RIM_SHARE = 1 / 64
"""Width of the rim around the robot that is not trusted, as a share of the picture's longer side."""


def behind_robot(
    model: SelfModel, frames: Float[Tensor, "frames height width 3"], q: Float[Tensor, "frames dof"], camera: Camera
) -> Float[Tensor, "height width 3"]:
    """The scene without the robot: the median over the frames in which it does not hide a pixel.

    What it always hides is filled from the nearest pixel that it does not: a guess, right before a plain table, and
    replaced once the robot has moved away.

    Args:
        model: self-model of the robot.
        frames: ``(frames, height, width, 3)`` in [0, 1].
        q: ``(frames, dof)`` their joints [rad]/[m].
        camera: the camera of all frames.

    Raises:
        InputError: the robot fills the picture.
    """
    return uncovered(frames, ~silhouettes(model, q, camera))


def uncovered(
    frames: Float[Tensor, "frames height width 3"], free: Bool[Tensor, "frames height width"]
) -> Float[Tensor, "height width 3"]:
    """Median of the pixels where they are free; from the nearest such pixel where they never are.

    Raises:
        InputError: none is.
    """
    ever = free.any(dim=0)
    if not ever.any():
        raise InputError("the robot fills the whole picture: nothing behind it can be seen")
    seen = torch.where(free[..., None], frames, torch.nan).nanmedian(dim=0).values
    nearest = ndimage.distance_transform_edt(~ever.numpy(), return_distances=False, return_indices=True)
    rows, columns = torch.from_numpy(nearest).long()
    return seen[rows, columns]


def silhouettes(model: SelfModel, q: Float[Tensor, "some dof"], camera: Camera) -> Bool[Tensor, "some height width"]:
    """Where the robot is in pictures of known joints, a thin rim around it included; on the CPU."""
    device = model.parameters.means.device
    with torch.no_grad():
        alpha = model.render(q.float().to(device), camera.to(device), outputs=("alpha",)).alpha
    assert alpha is not None
    alpha = alpha.cpu()
    rim = max(1, round(RIM_SHARE * max(camera.width, camera.height)))
    return torch.nn.functional.max_pool2d(alpha[:, None], 2 * rim + 1, stride=1, padding=rim)[:, 0] > 0.05
