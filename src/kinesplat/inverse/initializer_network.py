"""A small convolutional network that says where keypoints are: one heat map each, and whether they are outside."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

CHANNELS = (32, 64, 96)
SIZE = 128
CELLS = 32


class Residual(nn.Module):
    """``x + relu(norm(conv(x)))``, 3 x 3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """See the class."""
        return x + torch.relu(self.norm(self.conv(x)))


class KeypointNetwork(nn.Module):
    """128 px in, 32 x 32 cells out, by way of 16 x 16 and 8 x 8 (an hourglass; Newell et al. 2016).

    The input has four channels: RGB and the mask, 1 on the robot, 0 off it, one half where there is none.
    """

    def __init__(self, keypoints: int, channels: tuple[int, int, int] = CHANNELS) -> None:
        super().__init__()
        a, b, c = channels
        self.stem = nn.Sequential(nn.Conv2d(4, a, 4, stride=4), nn.BatchNorm2d(a), nn.ReLU(), Residual(a))
        self.down = nn.Sequential(nn.Conv2d(a, b, 2, stride=2), *(Residual(b) for _ in range(3)))
        self.deep = nn.Sequential(nn.Conv2d(b, c, 2, stride=2), *(Residual(c) for _ in range(3)))
        self.deep_up, self.middle = nn.Conv2d(c, b, 1), Residual(b)
        self.middle_up, self.fine = nn.Conv2d(b, a, 1), nn.Sequential(Residual(a), Residual(a))
        self.heat = nn.Conv2d(a, keypoints, 1)
        self.outside = nn.Linear(c, keypoints)

    def forward(self, images: Float[Tensor, "n 4 128 128"]) -> Float[Tensor, "n k bins"]:
        """Logits over the ``32 * 32`` cells of every keypoint, row by row, and a last one for "outside"."""
        fine = self.stem(images)
        middle = self.down(fine)
        deep = self.deep(middle)
        middle = self.middle(middle + _doubled(self.deep_up(deep)))
        fine = self.fine(fine + _doubled(self.middle_up(middle)))
        outside = self.outside(deep.mean(dim=(2, 3)))
        return torch.cat([self.heat(fine).flatten(2), outside[..., None]], dim=-1)


def _doubled(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
    return nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
