"""The gsplat backend: projection by our torch code, binning and compositing by gsplat's CUDA kernels (Ye et al. 2024).

For comparison with the `cuda` backend, and where Triton is missing. Both gsplat 1.4 and 1.5 take any number of images,
each with its own projected splats, so a batch needs no loop and neither version's batch dimensions. Two differences
remain: gsplat limits alpha at 0.999 where 3DGS and every other backend do at 0.99, so the images agree only where no
opacity exceeds 0.99; and it gives no link ids. gsplat compiles its kernels with nvcc at its first use.
"""

import math
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kinesplat.errors import BackendError, InputError
from kinesplat.rasterizer.projection import Projection, project
from kinesplat.rasterizer.reference import ALPHA_MIN, DEPTH_ALPHA_MIN, NEAR
from kinesplat.rasterizer.render import Render, Scene, check_values

TILE = 16
VERSIONS = ((1, 4), (1, 5))


def render(scene: Scene) -> Render:
    """Render with gsplat's kernels.

    Raises:
        BackendError: gsplat is missing, or of a version that was not tried.
        InputError: tensors not on a GPU or not float32, NaN or infinity, or link ids asked for.
    """
    if "link_id" in scene.outputs:
        raise InputError("backend 'gsplat' gives no link_id; pass backend='cuda' or 'reference'")
    means = scene.gaussians.means
    if means.dtype != torch.float32:
        raise InputError(f"backend 'gsplat' computes in float32; the gaussians are {means.dtype}")
    gsplat = load(means.device)
    check_values(scene)
    lists = _Lists(gsplat, scene)
    out: dict[str, Tensor] = {}
    if {"rgb", "alpha", "depth"} & set(scene.outputs):
        colours, behind = lists.colors, scene.background.expand(*scene.batch_shape, 3).reshape(-1, 3)
        if "depth" in scene.outputs:
            colours = torch.cat([colours, lists.depths[..., None]], -1)
            behind = torch.nn.functional.pad(behind, (0, 1))
        values, alphas = lists.composite(colours, behind)
        out = {"rgb": values[..., :3], "alpha": alphas[..., 0]}
        if "depth" in scene.outputs:
            out["depth"] = values[..., 3] / out["alpha"].clamp(min=DEPTH_ALPHA_MIN)
    if "contribution" in scene.outputs:
        out["contribution"] = lists.contribution()
    return Render(**{name: out[name].reshape(*scene.batch_shape, *out[name].shape[1:]) for name in scene.outputs})


def load(device: torch.device) -> Any:
    """The gsplat package.

    Raises:
        BackendError: it is missing, or of a version that was not tried.
        InputError: `device` is no GPU.
    """
    if device.type != "cuda":
        raise InputError(f"backend 'gsplat' computes on a GPU; the gaussians are on {device}")
    try:
        gsplat = import_module("gsplat")
    except ImportError as error:
        raise BackendError(f"backend 'gsplat': pip install 'gsplat>=1.4,<1.6' ({error})") from error
    if version_of(gsplat) not in VERSIONS:
        raise BackendError(f"backend 'gsplat' knows gsplat 1.4 and 1.5; this is {gsplat.__version__}")
    return gsplat


def version_of(gsplat: Any) -> tuple[int, int]:
    """Major and minor version."""
    major, minor = str(gsplat.__version__).split(".")[:2]
    return int(major), int(minor)


class _Lists:
    """Projected splats of every image, and gsplat's lists of them per tile."""

    def __init__(self, gsplat: Any, scene: Scene) -> None:
        self.gsplat, self.size = gsplat, (scene.camera.width, scene.camera.height)
        images, n = math.prod(scene.batch_shape), len(scene.gaussians)
        splats, front = _projected(scene)
        flat = [t.expand(*scene.batch_shape, *t.shape[len(scene.batch_shape) :]) for t in vars(splats).values()]
        shaped = (t.reshape(images, n, *t.shape[t.ndim - e :]) for t, e in zip(flat, (1, 2, 0, 1), strict=True))
        self.means, S, self.depths, self.colors = shaped
        self.opacities = scene.gaussians.opacities.expand(*scene.batch_shape, n).reshape(images, n)
        Sxx, Sxy, Syy = S[..., 0, 0], S[..., 0, 1], S[..., 1, 1]
        self.conics = torch.stack([Syy, -Sxy, Sxx], -1) / (Sxx * Syy - Sxy * Sxy)[..., None]
        visible = front.expand(*scene.batch_shape, n).reshape(images, n) & (self.opacities >= ALPHA_MIN)
        reach = 2.0 * torch.log(self.opacities.detach().clamp(min=ALPHA_MIN) / ALPHA_MIN) * 1.001 + 1e-3
        extents = (reach[..., None] * torch.stack([Sxx, Syy], -1).detach()).sqrt().ceil().clamp(max=1e6)
        radii = torch.where(visible[..., None], extents, 0.0).to(torch.int32)
        if version_of(gsplat) < (1, 5):
            radii = radii.amax(-1)
        tiles = [-(-s // TILE) for s in self.size]
        means, depths = self.means.detach(), self.depths.detach()
        _, ids, self.order = gsplat.isect_tiles(means, radii, depths, TILE, tiles[0], tiles[1])
        self.offsets = gsplat.isect_offset_encode(ids, images, tiles[0], tiles[1])

    def composite(self, colors: Tensor, background: Tensor | None) -> tuple[Tensor, Tensor]:
        """Images ``(images, height, width, channels)`` and alphas ``(images, height, width, 1)``."""
        return self.gsplat.rasterize_to_pixels(
            self.means, self.conics, colors, self.opacities, *self.size, TILE, self.offsets, self.order,
            backgrounds=background,
        )  # fmt: skip

    def contribution(self) -> Tensor:
        """Sums of blending weights ``(images, n)``: how the sum of an image changes with the colour of each splat."""
        with torch.enable_grad():
            ones = torch.ones_like(self.depths)[..., None].requires_grad_()
            values, _ = self.composite(ones, None)
            return torch.autograd.grad(values.sum(), ones)[0][..., 0]


def _projected(scene: Scene) -> tuple[Projection, Tensor]:
    """Splats projected into every image, and which of them lie in front of the near plane; the others are parked
    where nothing is singular."""
    g, T = scene.gaussians, scene.camera.T_cam_world
    Ts = (T[..., None, :, :] @ scene.Ts_world_link)[..., scene.link_index.long(), :, :]
    weights = scene.link_weights
    Ts = Ts[..., 0, :, :] if weights is None else (weights[..., None, None] * Ts).sum(-3)
    z = (Ts[..., 2, :3] * g.means).sum(-1) + Ts[..., 2, 3]
    front = (z >= NEAR).detach()
    parked = torch.zeros(4, 4, dtype=Ts.dtype, device=Ts.device)
    parked[2, 3] = parked[3, 3] = 1.0
    Ts = torch.where(front[..., None, None], Ts, parked)
    batch = front.shape[:-1]
    fields = {name: getattr(g, name) for name in ("means", "quats", "scales", "opacities", "sh")}
    wide = replace(g, **{k: t.expand(*batch, *t.shape[len(g.batch_shape) :]) for k, t in fields.items()})
    K = scene.camera.K
    return project(wide, Ts, K, (scene.camera.width, scene.camera.height), scene.eps2d), front
