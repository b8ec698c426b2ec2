"""What is behind the robot: learned from pictures of one camera in which the robot moves."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

FOREGROUND = 0.12
SPECK_PX = 128


def median_backdrop(
    rgb: Float[Tensor, "n height width 3"], covered: Bool[Tensor, "n height width"] | None = None
) -> Float[Tensor, "height width 3"]:
    """Median colour of every pixel over the pictures, without those in which the robot is known to cover it.

    Where the robot covers a pixel in every picture, the median is the robot; a fit loses nothing there.
    """
    if covered is None:
        return rgb.median(dim=0).values
    always = covered.all(dim=0)
    hidden = (covered & ~always)[..., None]
    return torch.where(hidden, torch.nan, rgb).nanmedian(dim=0).values


def moving_masks(
    rgb: Float[Tensor, "n height width 3"], backdrop: Float[Tensor, "*m height width 3"]
) -> Float[Tensor, "n height width"]:
    """1 where a picture differs from the backdrop, specks removed: the parts of the robot that move, roughly."""
    differs = ((rgb - backdrop).abs().amax(dim=-1) > FOREGROUND).float()[:, None]
    radius = max(1, round(max(rgb.shape[1:3]) / SPECK_PX))
    size = 2 * radius + 1
    smooth = torch.nn.functional.avg_pool2d(differs, size, stride=1, padding=radius, count_include_pad=False)
    return (smooth > 0.5)[:, 0].float()
