"""Random variations of rendered pictures, differentiable: what holds for all of them is no quirk of one encoder."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kinesplat.errors import InputError

BACKDROP_CELLS = 3


@dataclass(frozen=True)
class Augmentation:
    """How far pictures are varied before an encoder sees them.

    Attributes:
        copies: variations of every picture at every step.
        crop: least share of the picture's side that a random crop keeps.
        turn: largest rotation in the picture plane [rad].
        perspective: standard deviation of the tilt, in parts of the picture.
        colour: standard deviation of brightness, contrast and gain of every channel.
        backdrop: share of the copies before a random backdrop (one colour, or clouds of several); the others are white.
    """

    copies: int = 2
    crop: float = 0.8
    turn: float = 0.1
    perspective: float = 0.05
    colour: float = 0.05
    backdrop: float = 0.5

    def __post_init__(self) -> None:
        if self.copies < 1 or not 0.0 < self.crop <= 1.0 or not 0.0 <= self.backdrop <= 1.0:
            raise InputError(
                f"augmentation has copies {self.copies}, crop {self.crop}, backdrop {self.backdrop}; expected at least "
                "1 copy, a crop above 0 and up to 1, a share of backdrops from 0 to 1"
            )
        for name in ("turn", "perspective", "colour"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise InputError(f"augmentation {name} is {getattr(self, name)}; expected 0 or more")

    def __call__(
        self,
        rgb: Float[Tensor, "n height width 3"],
        alpha: Float[Tensor, "n height width"],
        generator: torch.Generator,
    ) -> Float[Tensor, "m height width 3"]:
        """Variations of pictures that were rendered before black, ``m = n * copies``, the copies of one in a row.

        Args:
            rgb: ``(n, height, width, 3)`` in [0, 1], multiplied with alpha.
            alpha: ``(n, height, width)``.
            generator: source of randomness, on the CPU.
        """
        count, (height, width) = len(rgb) * self.copies, rgb.shape[1:3]
        robot = torch.cat([rgb, alpha[..., None]], dim=-1).permute(0, 3, 1, 2).repeat_interleave(self.copies, dim=0)
        grid = self._grid(count, height, width, generator).to(rgb)
        robot = torch.nn.functional.grid_sample(robot, grid, mode="bilinear", align_corners=False)
        behind = self._backdrops(count, height, width, generator).to(rgb)
        seen = robot[:, :3] + (1.0 - robot[:, 3:]) * behind
        return self._coloured(seen, generator).permute(0, 2, 3, 1)

    def _grid(self, count: int, height: int, width: int, generator: torch.Generator) -> Float[Tensor, "n h w 2"]:
        """Where every pixel comes from: a homography near the identity that keeps most of the picture in view."""

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(count, generator=generator)

        zoom, angle, aspect = uniform(self.crop, 1.0), uniform(-self.turn, self.turn), width / height
        rest = 1.0 - zoom
        H = torch.zeros(count, 3, 3)
        H[:, 0, 0], H[:, 0, 1], H[:, 0, 2] = zoom * angle.cos(), -zoom * angle.sin() / aspect, rest * uniform(-1.0, 1.0)
        H[:, 1, 0], H[:, 1, 1], H[:, 1, 2] = aspect * zoom * angle.sin(), zoom * angle.cos(), rest * uniform(-1.0, 1.0)
        H[:, 2, :2] = (self.perspective * torch.randn(count, 2, generator=generator)).clamp(-0.3, 0.3)
        H[:, 2, 2] = 1.0
        y, x = ((2.0 * torch.arange(size) + 1.0) / size - 1.0 for size in (height, width))
        places = torch.stack([*torch.meshgrid(x, y, indexing="xy"), torch.ones(height, width)], dim=-1)
        mapped = torch.einsum("nij,hwj->nhwi", H, places)
        return mapped[..., :2] / mapped[..., 2:]

    def _backdrops(self, count: int, height: int, width: int, generator: torch.Generator) -> Float[Tensor, "n 3 h w"]:
        cells = torch.rand(count, 3, BACKDROP_CELLS, BACKDROP_CELLS, generator=generator)
        clouds = torch.nn.functional.interpolate(cells, (height, width), mode="bilinear", align_corners=True)
        kind = torch.rand(count, 1, 1, 1, generator=generator)
        plain = cells[:, :, :1, :1].expand_as(clouds)
        behind = torch.where(kind < 0.5 * self.backdrop, plain, clouds)
        return torch.where(kind < self.backdrop, behind, torch.ones_like(behind))

    def _coloured(self, pixels: Float[Tensor, "n 3 h w"], generator: torch.Generator) -> Float[Tensor, "n 3 h w"]:
        gain = 1.0 + self.colour * torch.randn(len(pixels), 3, 1, 1, generator=generator)
        shift, contrast = (self.colour * torch.randn(len(pixels), 1, 1, 1, generator=generator) for _ in range(2))
        gain, shift, contrast = gain.to(pixels), shift.to(pixels), 1.0 + contrast.to(pixels)
        return ((pixels * gain - 0.5) * contrast + 0.5 + shift).clamp(0.0, 1.0)
