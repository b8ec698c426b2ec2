"""Differentiable Gaussian splatting: `rasterize` for splats in the world, `rasterize_links` for splats on links,
`normal_equations` for Gauss-Newton on them."""

from collections.abc import Sequence
from importlib import import_module

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.errors import BackendError, InputError, unknown
from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer.gauss_newton import NormalEquations, normal_equations
from kinesplat.rasterizer.render import OUTPUTS, Background, Render, Scene, make_scene

__all__ = ["BACKENDS", "OUTPUTS", "NormalEquations", "Render", "normal_equations", "rasterize", "rasterize_links"]

BACKENDS = ("cpu", "cuda", "gsplat", "reference")
DEFAULT_OUTPUTS = ("rgb", "alpha", "depth")
WHITE = (1.0, 1.0, 1.0)


def rasterize(
    gaussians: Gaussians,
    camera: Camera,
    background: Background = WHITE,
    *,
    eps2d: float = 0.3,
    backend: str | None = None,
    outputs: Sequence[str] = DEFAULT_OUTPUTS,
) -> Render:
    """Render splats given in the world frame; differentiable in every tensor.

    Batches broadcast: splats of batch ``*g``, cameras of batch ``*c`` and backgrounds of batch ``*k`` give images of
    batch ``broadcast(*g, *c, *k)``; B configurations x C cameras are splats ``(B, 1, n, ...)`` and cameras ``(C,)``.

    Args:
        gaussians: splats in the world frame; how their spherical harmonics are seen is their own `sh_direction`.
        camera: pinhole cameras without skew; cast to the splats' dtype.
        background: ``(3,)`` or ``(*k, 3)`` colour composited last.
        eps2d: screen dilation added to the covariances [px^2]; 0.3 in 3DGS files, smaller is sharper.
        backend: "cpu" (native, float32), "cuda" (Triton kernels, float32 on a GPU), "gsplat" (its CUDA kernels, for
            comparison), "reference" (plain torch, any dtype and device, slow), or None: "cpu" or "cuda", where the
            splats are, for float32 and "reference" for float64, which the others would round.
        outputs: which of "rgb", "alpha", "depth", "link_id" (0 where a splat is hit), "contribution" to compute.

    Raises:
        InputError: shapes, dtypes, devices, NaN or infinity, an unknown output or backend.
        BackendError: the native module, Triton or gsplat is missing, or no backend serves this device.
    """
    index = torch.zeros(len(gaussians), dtype=torch.int32, device=gaussians.means.device)
    identity = torch.eye(4, dtype=gaussians.means.dtype, device=gaussians.means.device)[None]
    scene = make_scene(gaussians, index, None, identity, camera, background, eps2d, outputs)
    return _render(scene, backend)


def rasterize_links(
    gaussians: Gaussians,
    link_index: Int[Tensor, " n"] | Int[Tensor, "n m"],
    Ts_world_link: Float[Tensor, "*t links 4 4"],
    camera: Camera,
    background: Background = WHITE,
    *,
    link_weights: Float[Tensor, "n m"] | None = None,
    eps2d: float = 0.3,
    backend: str | None = None,
    outputs: Sequence[str] = DEFAULT_OUTPUTS,
) -> Render:
    """Render splats that ride on links; gradients go straight to `Ts_world_link` and the camera.

    A splat with mean m and covariance S in its link's frame appears at ``T_cam_world @ T_world_link @ m`` with
    covariance ``A S A^T``, A the upper left 3x3 of the product; the view direction of its spherical harmonics is
    expressed in the link frame, from the camera centre ``-A^T t``. Where only `Ts_world_link` or the camera require
    grad, nothing else is computed.

    Args:
        gaussians: splats in link frames.
        link_index: ``(n,)`` link of each splat, or ``(n, m)`` with `link_weights`, m up to 4.
        Ts_world_link: ``(*t, links, 4, 4)`` from link frames to the world; takes part in the batch.
        camera: as in `rasterize`.
        background: as in `rasterize`.
        link_weights: ``(n, m)`` blend-skinning weights: the splat's transform is their weighted sum of link
            transforms (Liu et al. 2024, eq. 4).
        eps2d: as in `rasterize`.
        backend: as in `rasterize`.
        outputs: as in `rasterize`; "link_id" gives the link (of largest weight) of the splat hit.

    Raises:
        InputError: shapes, dtypes, devices, NaN or infinity, an index outside the links, an unknown output or backend.
        BackendError: the native module, Triton or gsplat is missing, or no backend serves this device.
    """
    scene = make_scene(gaussians, link_index, link_weights, Ts_world_link, camera, background, eps2d, outputs)
    return _render(scene, backend)


def _render(scene: Scene, backend: str | None) -> Render:
    if backend is not None and backend not in BACKENDS:
        raise InputError(unknown("backend", backend, BACKENDS))
    return import_module(f"kinesplat.rasterizer.{backend or default_backend(scene.gaussians.means)}").render(scene)


def default_backend(means: Tensor) -> str:
    """Name of the backend for splats of this dtype on this device.

    Raises:
        BackendError: the device is neither a CPU nor a CUDA GPU.
    """
    backends = {"cpu": "cpu", "cuda": "cuda"}
    if means.device.type not in backends:
        raise BackendError(f"no backend for device {means.device} but 'reference'; pass backend='reference'")
    return backends[means.device.type] if means.dtype == torch.float32 else "reference"
