"""The device on which tests of the CUDA backend run its kernels: a GPU, or the CPU through Triton's interpreter.

Import this module before `kinesplat.rasterizer.cuda.*`: Triton looks at the variable when it meets a kernel.
"""

import os
from dataclasses import replace

import pytest
import torch
from rasterizer_scenes import FIELDS, away_from_thresholds, in_dtype, relative_error
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer import OUTPUTS, Render, rasterize_links

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA wheels; on a CPU: pip install triton (Linux)")


class Inputs:
    """Leaves of one scene in one dtype on one device."""

    def __init__(self, splats: Gaussians, Ts: Tensor, camera: Camera, background: Tensor, to: torch.dtype) -> None:
        device = DEVICE if to == torch.float32 else torch.device("cpu")
        self.splats = replace(in_dtype(splats.to(device=device), to), sh_direction=splats.sh_direction)
        self.Ts, self.T, self.K, self.background = (
            t.detach().to(device, to).clone().requires_grad_() for t in (Ts, camera.T_cam_world, camera.K, background)
        )
        self.camera = Camera(self.K, self.T, camera.width, camera.height)

    def leaves(self) -> dict[str, Tensor]:
        splats = {f: getattr(self.splats, f) for f in FIELDS}
        return splats | {"Ts": self.Ts, "T": self.T, "K": self.K, "background": self.background}


def compare(
    splats: Gaussians,
    Ts: Tensor,
    camera: Camera,
    background: Tensor,
    index: Tensor,
    *,
    weights: Tensor | None = None,
    backend: str = "cuda",
    outputs: tuple[str, ...] = OUTPUTS,
    mask: Tensor | None = None,
    bounds: tuple[float, float] = (1e-5, 1e-5),
) -> None:
    """Images (absolute) and gradients (relative) of `backend` in float32 against the float64 reference, at the pixels
    that `mask` keeps."""
    truth, test = (Inputs(splats, Ts, camera, background, dtype) for dtype in (torch.float64, torch.float32))
    losses = []
    factors: dict[str, Tensor] = {}
    for inputs, name in ((truth, "reference"), (test, backend)):
        device, dtype = inputs.Ts.device, inputs.Ts.dtype
        w = None if weights is None else weights.detach().to(device, dtype).clone().requires_grad_()
        render = rasterize_links(
            inputs.splats, index.to(device), inputs.Ts, inputs.camera, inputs.background,
            link_weights=w, backend=name, outputs=outputs,
        )  # fmt: skip
        losses.append((render, w))
        for output in {"rgb", "alpha", "depth"} & set(outputs):
            value = getattr(render, output)
            if output not in factors:
                keep = 1.0 if mask is None else mask[..., None] if output == "rgb" else mask
                factors[output] = keep * torch.randn(value.shape, dtype=torch.float64)
    (a, w_a), (b, w_b) = losses
    check_images(a, b, outputs, mask, bounds[0])
    for render in (a, b):
        total = sum((getattr(render, o) * f.to(getattr(render, o))).sum() for o, f in sorted(factors.items()))
        assert isinstance(total, Tensor)
        total.backward()
    pairs = {name: (leaf, truth.leaves()[name]) for name, leaf in test.leaves().items()}
    if w_a is not None and w_b is not None:
        pairs["weights"] = (w_b, w_a)
    for name, (value, exact) in pairs.items():
        assert value.grad is not None, name
        assert exact.grad is not None
        error = relative_error(value.grad.cpu(), exact.grad)
        assert error < bounds[1], f"gradient of {name}: {error:.2e}"


def check_images(a: Render, b: Render, outputs: tuple[str, ...], mask: Tensor | None, bound: float) -> None:
    """`b` equals `a` but for rounding, at the pixels that `mask` keeps."""
    for name in outputs:
        exact, value = getattr(a, name).detach().double(), getattr(b, name).detach().cpu().double()
        assert value.shape == exact.shape
        difference = (value - exact).abs()
        if mask is not None and name != "contribution":
            difference = difference * (mask[..., None] if name == "rgb" else mask)
        scale = max(1.0, float(exact.abs().max())) if name == "contribution" else 1.0
        assert float(difference.max()) < bound * scale, f"{name}: {float(difference.max()):.2e}"


__all__ = ["DEVICE", "GPU", "Inputs", "away_from_thresholds", "check_images", "compare"]
