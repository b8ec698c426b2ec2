"""The device on which tests of the CUDA backend run its kernels: a GPU, or the CPU through Triton's interpreter, which
conftest.py asks for."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from rasterizer_scenes import FIELDS, away_from_thresholds, in_dtype, relative_error
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer import OUTPUTS, Render, rasterize_links

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")

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


def errors(
    splats: Gaussians,
    Ts: Tensor,
    camera: Camera,
    background: Tensor,
    index: Tensor,
    mask: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    backend: str = "cuda",
    outputs: tuple[str, ...] = OUTPUTS,
) -> dict[str, float]:
    """How far `backend` in float32 is from the float64 reference at the pixels that `mask` keeps: images absolutely
    (contribution against its largest), gradients "d NAME" relatively."""
    truth, test = (Inputs(splats, Ts, camera, background, dtype) for dtype in (torch.float64, torch.float32))
    renders, links, pairs = [], [], {}
    for inputs, name in ((truth, "reference"), (test, backend)):
        device, dtype = inputs.Ts.device, inputs.Ts.dtype
        w = None if weights is None else weights.detach().to(device, dtype).clone().requires_grad_()
        links.append({} if w is None else {"weights": w})
        scene = inputs.splats, index.to(device), inputs.Ts, inputs.camera, inputs.background
        renders.append(rasterize_links(*scene, link_weights=w, backend=name, outputs=outputs))
    found = image_errors(*renders, outputs, mask)
    shapes = {o: getattr(renders[0], o).shape for o in ("rgb", "alpha", "depth") if o in outputs}
    factors = {o: torch.randn(shape, dtype=torch.float64) * masked(o, mask) for o, shape in shapes.items()}
    for render in renders:
        total = sum((getattr(render, o) * f.to(getattr(render, o))).sum() for o, f in factors.items())
        assert isinstance(total, Tensor)
        total.backward()
    exact = truth.leaves() | links[0]
    pairs = {name: (leaf.grad, exact[name].grad) for name, leaf in (test.leaves() | links[1]).items()}
    return found | {f"d {k}": relative_error(None if v is None else v.cpu(), e) for k, (v, e) in pairs.items()}


def compare(*scene: Tensor | Gaussians | Camera, bounds: tuple[float, float] = (1e-5, 1e-5), **options: Any) -> None:
    """`errors` of the scene are within bounds: of images, of gradients."""
    for name, error in errors(*scene, **options).items():
        bound = bounds[1] if name.startswith("d ") else bounds[0]
        assert error < bound, f"{name}: {error:.2e}"


def masked(output: str, mask: Tensor | None) -> Tensor | float:
    """`mask` as a factor of an output's values."""
    if mask is None or output == "contribution":
        return 1.0
    return mask[..., None] if output == "rgb" else mask


def image_errors(a: Render, b: Render, outputs: tuple[str, ...], mask: Tensor | None) -> dict[str, float]:
    """Largest differences from `a` of each output of `b`."""
    found = {}
    for name in outputs:
        exact, value = getattr(a, name).detach().double(), getattr(b, name).detach().cpu().double()
        assert value.shape == exact.shape
        assert torch.isfinite(value).all()
        scale = max(1.0, float(exact.abs().max())) if name == "contribution" else 1.0
        found[name] = float(((value - exact).abs() * masked(name, mask)).max()) / scale
    return found


__all__ = ["DEVICE", "GPU", "Inputs", "away_from_thresholds", "compare", "errors"]
