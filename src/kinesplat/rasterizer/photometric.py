"""L1 + SSIM, the training loss of 3DGS: natively on the CPU, value and gradient in one pass; in torch on a GPU."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from kinesplat.errors import InputError
from kinesplat.rasterizer.cpu import native, simd_level

RADIUS, SIGMA = 5, 1.5
C1, C2 = 0.01**2, 0.03**2


def l1_ssim(
    rendered: Float[Tensor, "*batch height width 3"],
    truth: Float[Tensor, "*#batch height width 3"],
    weight: float = 0.2,
) -> Float[Tensor, "*batch"]:
    """``(1 - weight) L1 + weight (1 - SSIM)`` of each image (Kerbl et al. 2023, eq. 7), differentiable in `rendered`.

    SSIM as in Wang et al. 2004 for values in [0, 1]: an 11 x 11 Gaussian window of standard deviation 1.5 px, zero
    beyond the border, per channel, C1 = 0.01^2 and C2 = 0.03^2; both terms are means over pixels and channels.
    Computed from sum and difference of the images, so that equal images give exactly 0 and flat regions lose no
    digits. On the CPU it runs on `torch.get_num_threads()` threads; the result does not depend on their number. NaN
    gives NaN.

    Args:
        rendered: ``(*batch, height, width, 3)`` float32.
        truth: ``(*batch, height, width, 3)`` or a shape that broadcasts to it, on the same device; takes no gradient.
        weight: share of the SSIM term, 0 to 1.

    Returns:
        One loss per image; its mean is the mean over all pixels of the batch.

    Raises:
        InputError: shapes, dtypes or devices, a weight outside [0, 1], or a `truth` that requires grad.
        BackendError: the native module is missing.
    """
    for name, value in (("rendered", rendered), ("truth", truth)):
        if value.ndim < 3 or value.shape[-1] != 3:
            raise InputError(f"{name} has shape {tuple(value.shape)}; expected (*batch, height, width, 3)")
        if value.dtype != torch.float32 or value.device != rendered.device:
            raise InputError(f"{name} is {value.dtype} on {value.device}; expected torch.float32 on one device")
    if not 0.0 <= weight <= 1.0:
        raise InputError(f"weight is {weight}; expected a number from 0 to 1")
    if truth.requires_grad:
        raise InputError("truth requires grad; the loss is differentiable in rendered only")
    if 0 in rendered.shape[-3:-1]:
        raise InputError(f"rendered has shape {tuple(rendered.shape)}: no pixels")
    try:
        truth = truth.expand(rendered.shape)
    except RuntimeError as error:
        raise InputError(
            f"truth of shape {tuple(truth.shape)} does not broadcast to rendered, {tuple(rendered.shape)}"
        ) from error
    if rendered.device.type != "cpu":
        return in_torch(rendered, truth, weight)
    loss: Tensor = _L1Ssim.apply(rendered, truth, weight)
    return loss


def in_torch(
    rendered: Float[Tensor, "*batch height width 3"], truth: Float[Tensor, "*batch height width 3"], weight: float
) -> Float[Tensor, "*batch"]:
    """The same by torch's own operations, on any device.

    With s = x + y and d = x - y, 1 - SSIM of a pixel is ``p + q - p q``, where p is twice the share of ``mean(d)^2``
    in ``mean(s)^2 + mean(d)^2 + 2 C1`` and q twice that of ``var(d)`` in ``var(s) + var(d) + 2 C2``.
    """
    batch, (height, width) = rendered.shape[:-3], rendered.shape[-3:-1]
    x, y = (t.reshape(-1, *t.shape[-3:]).permute(0, 3, 1, 2) for t in (rendered, truth))
    down, across = (_window(size).to(x) for size in (height, width))

    def mean(values: Tensor) -> Tensor:
        return down @ values @ across.mT

    s, d = x + y, x - y
    mean_s, mean_d = mean(s), mean(d)
    var_s, var_d = mean(s * s) - mean_s.square(), mean(d * d) - mean_d.square()
    p = 2.0 * mean_d.square() / (mean_s.square() + mean_d.square() + 2.0 * C1)
    q = 2.0 * var_d / (var_s + var_d + 2.0 * C2)
    values = (1.0 - weight) * d.abs() + weight * (p + q - p * q)
    return values.reshape(math.prod(batch), -1).mean(dim=1).view(batch)


def _window(size: int) -> Float[Tensor, "size size"]:
    """Row i holds the weights of a line's pixels in the mean at pixel i (convolutions would round to TF32 on a GPU)."""
    away = torch.arange(size, dtype=torch.float64)[:, None] - torch.arange(size, dtype=torch.float64)
    weights = torch.exp(-0.5 * (torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float64) / SIGMA).square())
    rows = torch.exp(-0.5 * (away / SIGMA).square()) / weights.sum()
    return torch.where(away.abs() <= RADIUS, rows, 0.0)


class _L1Ssim(torch.autograd.Function):
    """The native loss."""

    @staticmethod
    def forward(ctx: Any, rendered: Tensor, truth: Tensor, weight: float) -> Tensor:
        """One loss per image; keeps its gradient where one is needed."""
        batch = rendered.shape[:-3]
        flat = [t.reshape(math.prod(batch), *t.shape[-3:]).contiguous() for t in (rendered.detach(), truth.detach())]
        loss = torch.empty(len(flat[0]), dtype=torch.float64)
        gradient = torch.empty_like(flat[0]) if ctx.needs_input_grad[0] else None
        native().photometric(
            *(t.numpy() for t in flat),
            weight,
            loss.numpy(),
            None if gradient is None else gradient.numpy(),
            torch.get_num_threads(),
            simd_level(),
        )
        if gradient is not None:
            ctx.save_for_backward(gradient.view(rendered.shape))
        return loss.to(torch.float32).view(batch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v_loss: Tensor) -> tuple[Tensor, None, None]:
        """The kept gradient times that of the losses."""
        (gradient,) = ctx.saved_tensors
        return gradient * v_loss[..., None, None, None], None, None
