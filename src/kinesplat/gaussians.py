"""Gaussians: what a rasteriser eats (activated values); Parameters: what an optimiser moves."""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

ShDirection = Literal["splat", "axis"]
GAUSSIANS = ("means", "quats", "scales", "opacities", "sh")
PARAMETERS = ("means", "quats", "log_scales", "logit_opacities", "sh")
"""Names of their tensors."""


@dataclass(frozen=True)
class Gaussians:
    """3D Gaussians with activated values, any leading batch dimensions.

    Attributes:
        means: ``(*batch, n, 3)`` centres [m].
        quats: ``(*batch, n, 4)`` rotations, wxyz; normalised by the rasteriser.
        scales: ``(*batch, n, 3)`` standard deviations along the rotated axes [m].
        opacities: ``(*batch, n)`` in [0, 1].
        sh: ``(*batch, n, k, 3)`` spherical-harmonic coefficients, ``k = (degree + 1)^2``, degree 0 to 3;
            colour = max(0, 0.5 + sum_k Y_k(d) sh_k) with d the unit direction from the camera centre to the mean
            (convention of Kerbl et al. 2023).
        sh_direction: "splat" for the d above; "axis" for d along the camera's optical axis, the same for all splats:
            shading by a light that shines along the view axis, such as MuJoCo's headlight.
    """

    means: Float[Tensor, "*batch n 3"]
    quats: Float[Tensor, "*batch n 4"]
    scales: Float[Tensor, "*batch n 3"]
    opacities: Float[Tensor, "*batch n"]
    sh: Float[Tensor, "*batch n k 3"]
    sh_direction: ShDirection = "splat"

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading dimensions, the same for every field."""
        return tuple(self.means.shape[:-2])

    def __len__(self) -> int:
        return self.means.shape[-2]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Gaussians":
        """The same Gaussians on another device or in another dtype."""
        return replace(self, **{name: getattr(self, name).to(device, dtype) for name in GAUSSIANS})


@dataclass(frozen=True)
class Parameters:
    """The unconstrained values behind `Gaussians`, for optimisers and model files.

    Attributes:
        means: ``(n, 3)`` centres, in link frames for a self-model [m].
        quats: ``(n, 4)`` rotations, wxyz, any length but zero.
        log_scales: ``(n, 3)`` natural logarithm of the standard deviations [log m].
        logit_opacities: ``(n,)`` logit of the opacities.
        sh: ``(n, k, 3)`` spherical-harmonic coefficients as in `Gaussians`.
        sh_direction: as in `Gaussians`.
    """

    means: Float[Tensor, "n 3"]
    quats: Float[Tensor, "n 4"]
    log_scales: Float[Tensor, "n 3"]
    logit_opacities: Float[Tensor, " n"]
    sh: Float[Tensor, "n k 3"]
    sh_direction: ShDirection = field(default="splat", kw_only=True)

    def __len__(self) -> int:
        return self.means.shape[0]

    def activate(self) -> Gaussians:
        """Gaussians with unit quats, ``scales = exp(log_scales)`` and ``opacities = sigmoid(logit_opacities)``."""
        return Gaussians(
            means=self.means,
            quats=torch.nn.functional.normalize(self.quats, dim=-1),
            scales=self.log_scales.exp(),
            opacities=self.logit_opacities.sigmoid(),
            sh=self.sh,
            sh_direction=self.sh_direction,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: getattr(self, name) for name in PARAMETERS}

    def select(self, index: Tensor) -> "Parameters":
        """The rows that a boolean mask ``(n,)`` or an index tensor picks."""
        return replace(self, **{name: value[index] for name, value in self.tensors().items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Parameters":
        """The same parameters on another device or in another dtype."""
        return replace(self, **{name: value.to(device, dtype) for name, value in self.tensors().items()})
