"""Robust losses: what a pixel that the model cannot explain may cost at most."""

import torch
from jaxtyping import Float
from torch import Tensor


def geman_mcclure(
    squared: Float[Tensor, "*shape"], scale: float | None
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Loss ``s^2 r^2 / (s^2 + r^2)`` of squared residuals, and the weight that makes it least squares.

    Reweighted least squares with these weights has the loss's exact gradient (Black & Rangarajan 1996, section 4).

    Args:
        squared: squared residuals r^2.
        scale: s, the residual at which the loss has half of its limit s^2; None for plain least squares.
    """
    if scale is None:
        return squared, torch.ones_like(squared)
    share = scale**2 / (scale**2 + squared)
    return squared * share, share**2
