"""The native backend: float32 on the CPU, forward and backward in C++, on `torch.get_num_threads()` threads.

The environment variable KINESPLAT_SIMD names a level ("avx512", "avx2", "baseline"); unset, the best one is taken.
"""

import math
import os
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from kinesplat.errors import BackendError, InputError, unknown
from kinesplat.rasterizer.render import Render, Scene

_native: Any = None
_import_error: ImportError | None = None
try:
    _native = import_module("kinesplat.rasterizer._native")
except ImportError as error:
    _import_error = error


def native() -> Any:
    """The native module.

    Raises:
        BackendError: it was not built, or does not load.
    """
    if _native is None:
        raise BackendError(
            "the native rasteriser is not built for this Python; run 'pip install .' in the repository, "
            f"or pass backend='reference' ({_import_error})"
        )
    return _native


def simd_level() -> str:
    """Level named by KINESPLAT_SIMD, else the best that this machine runs.

    Raises:
        BackendError: the native module is missing.
        InputError: KINESPLAT_SIMD names a level that this machine does not have.
    """
    levels = native().levels()
    level = os.environ.get("KINESPLAT_SIMD") or levels[0]
    if level not in levels:
        raise InputError(unknown("SIMD level in KINESPLAT_SIMD", level, levels))
    return level


def render(scene: Scene) -> Render:
    """Render with the native kernel.

    Raises:
        BackendError: the native module is missing.
        InputError: tensors not on the CPU or not float32, NaN or infinity, zero quaternions.
    """
    g = scene.gaussians
    if g.means.device.type != "cpu" or g.means.dtype != torch.float32:
        raise InputError(
            f"backend 'cpu' computes in float32 on the CPU; the gaussians are {g.means.dtype} on {g.means.device} "
            "(cast them, or pass backend='reference')"
        )
    weights = scene.link_weights
    Ts, T, K = scene.Ts_world_link, scene.camera.T_cam_world, scene.camera.K
    splats = g.means, g.quats, g.scales, g.opacities, g.sh
    images = _Rasterize.apply(scene, *splats, weights, T, Ts, K, scene.background)
    return Render(**dict(zip(scene.outputs, images, strict=True)))


@dataclass
class _Plan:
    """A scene flattened for the native module, and what the backward pass needs of it."""

    native_scene: Any
    splat_batch: tuple[int, ...]
    T_cam_world: Float[Tensor, "*c 1 4 4"]
    Ts_world_link: Float[Tensor, "*t links 4 4"]
    level: str


def make_plan(scene: Scene) -> _Plan:
    """Flatten a scene for the native module, and check its values.

    Raises:
        InputError: naming the tensor with NaN, infinity, a zero quaternion or a focal length that is not positive.
    """
    module, level = native(), simd_level()
    g, weights = scene.gaussians, scene.link_weights
    shape = scene.batch_shape
    images, n, batch = math.prod(shape), len(g), g.batch_shape
    sets = math.prod(batch)
    T, Ts = scene.camera.T_cam_world.detach().double()[..., None, :, :], scene.Ts_world_link.detach().double()
    set_index = torch.zeros(images, dtype=torch.int32)
    if sets != 1:
        set_index = torch.arange(sets, dtype=torch.int32).reshape(batch).expand(shape).reshape(images).contiguous()
    splats = (t.detach() for t in (g.means, g.quats, g.scales, g.opacities, g.sh))
    flat = ((t.reshape(sets, n, *t.shape[len(batch) + 1 :]) if batch else t[None]).contiguous() for t in splats)
    try:
        native_scene = module.Scene(
            module.Splats(*(t.numpy() for t in flat)),
            module.Links(
                scene.link_index.int().contiguous().numpy(),
                as_array(None if weights is None else weights.detach().contiguous()),
                _flat(T @ Ts, shape, 3).numpy(),
            ),
            module.Views(
                _flat(scene.camera.K.detach().double(), shape, 2).numpy(),
                _flat(scene.background.detach(), shape, 1).numpy(),
                set_index.numpy(),
                scene.camera.width,
                scene.camera.height,
                scene.eps2d,
                g.sh_direction == "axis",
            ),
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    problem = module.bad_input(native_scene, torch.get_num_threads(), level)
    if problem:
        raise InputError(problem)
    return _Plan(native_scene, batch, T, Ts, level)


def as_array(value: Tensor | None) -> Any:
    """The same memory as a numpy array, which crosses into C++ faster than a tensor does; None stays None."""
    return None if value is None else value.numpy()


def _flat(value: Tensor, shape: tuple[int, ...], event_dims: int) -> Tensor:
    """`value` expanded to the batch `shape`, which becomes one leading dimension; contiguous."""
    event = value.shape[value.ndim - event_dims :]
    if value.ndim - event_dims != len(shape) or value.shape[: len(shape)] != shape:
        value = value.expand(*shape, *event)
    return value.reshape(math.prod(shape), *event).contiguous()


def _empty_outputs(scene: Scene) -> dict[str, Tensor]:
    images, height, width = math.prod(scene.batch_shape), scene.camera.height, scene.camera.width
    shapes = {"rgb": (images, height, width, 3), "contribution": (images, len(scene.gaussians))}
    return {
        name: torch.empty(
            shapes.get(name, (images, height, width)), dtype=torch.int32 if name == "link_id" else torch.float32
        )
        for name in scene.outputs
    }


class _Rasterize(torch.autograd.Function):
    """The native kernels in autograd's terms."""

    @staticmethod
    def forward(ctx: Any, scene: Scene, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The outputs of `scene`; the native frame is kept where a gradient is wanted."""
        plan = make_plan(scene)
        out = _empty_outputs(scene)
        needs_grad = any(ctx.needs_input_grad)
        wanted = dict(out)
        if needs_grad and tensors[-1] is not None and ctx.needs_input_grad[-1] and "alpha" not in wanted:
            wanted["alpha"] = torch.empty((math.prod(scene.batch_shape), scene.camera.height, scene.camera.width))
        images = [as_array(wanted.get(name)) for name in ("rgb", "alpha", "depth", "link_id", "contribution")]
        frame = native().forward(plan.native_scene, *images, torch.get_num_threads(), plan.level)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(out[name] for name in ("link_id", "contribution") if name in out))
        if needs_grad:
            ctx.scene, ctx.plan, ctx.frame = scene, plan, frame
            ctx.depth, ctx.alpha = out.get("depth"), wanted.get("alpha")
            ctx.save_for_backward(*tensors)
        shape = scene.batch_shape
        return tuple(value.view(*shape, *value.shape[1:]) for value in out.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of splats, link weights, transforms, intrinsics and background, as far as they are wanted."""
        means, quats, scales, opacities, sh, weights, T_cam_world, Ts_world_link, K, background = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        scene, plan = ctx.scene, ctx.plan
        images = math.prod(scene.batch_shape)
        given = {name: g for name, g in zip(scene.outputs, grads, strict=True) if g is not None}
        incoming = {
            name: given[name].reshape(images, *given[name].shape[len(scene.batch_shape) :]).contiguous()
            for name in ("rgb", "alpha", "depth")
            if name in given
        }
        out = [
            torch.empty(t.shape, dtype=torch.float32) if need else None
            for t, need in zip((means, quats, scales, opacities, sh, weights), needs[:6], strict=True)
        ]
        n, sets = len(scene.gaussians), math.prod(plan.splat_batch)
        flat = [None if v is None else v.view(sets, n, *v.shape[len(plan.splat_batch) + 1 :]) for v in out[:5]]
        links = plan.Ts_world_link.shape[-3]
        v_T = torch.empty(images, links, 4, 4, dtype=torch.float64) if needs[6] or needs[7] else None
        v_K = torch.empty(images, 3, 3, dtype=torch.float64) if needs[8] else None
        native().backward(
            plan.native_scene,
            ctx.frame,
            *(as_array(incoming.get(name)) for name in ("rgb", "alpha", "depth")),
            as_array(ctx.depth) if "depth" in incoming else None,
            native().Gradients(*(as_array(v) for v in (*flat, v_T, v_K, out[5]))),
            torch.get_num_threads(),
        )
        pose = _pose_gradients(plan, v_T, scene.batch_shape, T_cam_world, Ts_world_link, needs[6:8])
        v_background = None
        if needs[9]:
            behind = 1.0 - ctx.alpha[..., None]
            v_background = torch.zeros(background.shape)
            if "rgb" in incoming:
                v_background = (incoming["rgb"] * behind).sum((1, 2)).view(*scene.batch_shape, 3)
                v_background = v_background.sum_to_size(background.shape)
        if v_K is not None:
            v_K = v_K.view(*scene.batch_shape, 3, 3).sum_to_size(K.shape).to(K.dtype)
        return None, *out, *pose, v_K, v_background


def _pose_gradients(
    plan: _Plan, v_T: Tensor | None, shape: tuple[int, ...], T_cam_world: Tensor, Ts_world_link: Tensor, needs: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Through ``T_cam_link = T_cam_world @ T_world_link``."""
    v_camera = v_links = None
    if v_T is None:
        return v_camera, v_links
    v_T = v_T.view(*shape, *v_T.shape[1:])
    if needs[0]:
        v_camera = (v_T @ plan.Ts_world_link.mT).sum(-3).sum_to_size(T_cam_world.shape).to(T_cam_world.dtype)
    if needs[1]:
        v_links = (plan.T_cam_world.mT @ v_T).sum_to_size(Ts_world_link.shape).to(Ts_world_link.dtype)
    return v_camera, v_links
