"""L1 + SSIM, the training loss of 3DGS, natively: value and gradient in one pass over the images."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from kinesplat.errors import InputError
from kinesplat.rasterizer.cpu import native, simd_level


def l1_ssim(
    rendered: Float[Tensor, "*batch height width 3"],
    truth: Float[Tensor, "*#batch height width 3"],
    weight: float = 0.2,
) -> Float[Tensor, "*batch"]:
    """``(1 - weight) L1 + weight (1 - SSIM)`` of each image (Kerbl et al. 2023, eq. 7), differentiable in `rendered`.

    SSIM as in Wang et al. 2004 for values in [0, 1]: an 11 x 11 Gaussian window of standard deviation 1.5 px, zero
    beyond the border, per channel, C1 = 0.01^2 and C2 = 0.03^2; both terms are means over pixels and channels.
    Computed from sum and difference of the images, so that equal images give exactly 0 and flat regions lose no
    digits. Runs on `torch.get_num_threads()` threads; the result does not depend on their number. NaN gives NaN.

    Args:
        rendered: ``(*batch, height, width, 3)`` float32 on the CPU.
        truth: ``(*batch, height, width, 3)`` or a shape that broadcasts to it; takes no gradient.
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
        if value.dtype != torch.float32 or value.device.type != "cpu":
            raise InputError(f"{name} is {value.dtype} on {value.device}; expected torch.float32 on the CPU")
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
    loss: Tensor = _L1Ssim.apply(rendered, truth, weight)
    return loss


class _L1Ssim(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rendered: Tensor, truth: Tensor, weight: float) -> Tensor:
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
        (gradient,) = ctx.saved_tensors
        return gradient * v_loss[..., None, None, None], None, None
