"""Forward and backward of the CUDA backend as one autograd function."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kinesplat.rasterizer.cuda.blend import blend_backward, blend_forward
from kinesplat.rasterizer.cuda.frame import Flat, Frame, along_axis, project
from kinesplat.rasterizer.cuda.launch import BLOCK, blocks_of, launch
from kinesplat.rasterizer.cuda.project import project_backward
from kinesplat.rasterizer.cuda.splat import SUM_FLOATS
from kinesplat.rasterizer.cuda.tiles import summed
from kinesplat.rasterizer.render import Render, Scene

TILE = (16, 8)  # pixels of a tile, all of them in one warp
UNROLL = 4
KEPT = ("alpha", "depth", "left", "last")
"""Images that the backward pass reads."""


def render(scene: Scene) -> Render:
    """Render a scene whose tensors are on the GPU."""
    g = scene.gaussians
    splats = g.means, g.quats, g.scales, g.opacities, g.sh
    poses = scene.camera.T_cam_world, scene.Ts_world_link
    recorded = torch.is_grad_enabled()  # within `apply` it never is
    images = _Rasterize.apply(scene, recorded, *splats, scene.link_weights, *poses, scene.camera.K, scene.background)
    return Render(**dict(zip(scene.outputs, images, strict=True)))


def blend(scene: Scene, frame: Frame, outputs: tuple[str, ...], keep: bool) -> dict[str, Tensor]:
    """Composite `outputs`, flat over images; with `keep` also what the backward pass reads: "left" and "last"."""
    images, n, _ = frame.flat.counts
    device, plane = frame.record.device, (images, scene.camera.height, scene.camera.width)
    tiles, pairs = frame.tiles, len(frame.tiles.rows)

    def empty(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        wanted = name in outputs or (keep and name in ("left", "last"))
        return torch.empty(shape if wanted else (1,), dtype=dtype, device=device)

    out = {name: empty(name, *plane) for name in ("alpha", "depth", "left")}
    out |= {"rgb": empty("rgb", *plane, 3), "contribution": empty("contribution", pairs).zero_()}
    out |= {"link_id": empty("link_id", *plane, dtype=torch.int32), "last": empty("last", *plane, dtype=torch.int64)}
    columns, lines = tiles.shape
    launch(
        blend_forward, (images * columns * lines,),
        frame.record, tiles.starts, tiles.rows, tiles.slots, frame.flat.background,
        out["rgb"], out["alpha"], out["depth"], out["link_id"], out["contribution"], out["left"], out["last"],
        columns, columns * lines, scene.camera.width, scene.camera.height,
        RGB="rgb" in outputs, ALPHA="alpha" in outputs, DEPTH="depth" in outputs, MEDIAN="link_id" in outputs,
        WEIGHTS="contribution" in outputs, KEEP=keep, TILE_X=tiles.size[0], TILE_Y=tiles.size[1],
        UNROLL=UNROLL, num_warps=1,
    )  # fmt: skip
    if "contribution" in outputs:
        out["contribution"] = summed(out["contribution"][:, None], tiles).view(images, n)
    if "link_id" in outputs:
        out["link_id"] = _links(scene, out["link_id"], n)
    return out


def _links(scene: Scene, rows: Tensor, n: int) -> Tensor:
    """Link (of largest weight) of the splats ``rows = image * n + splat``; -1 stays."""
    index, weights = scene.link_index.int(), scene.link_weights
    links = index[:, 0] if weights is None else index.gather(1, weights.argmax(1, keepdim=True))[:, 0]
    if not n:
        return rows
    return torch.where(rows >= 0, links[(rows % n).long()], -1)


class _Rasterize(torch.autograd.Function):
    """The kernels in autograd's terms."""

    @staticmethod
    def forward(ctx: Any, scene: Scene, recorded: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """The outputs of `scene`; what the backward pass needs is kept only where there can be one."""
        keep = recorded and any(ctx.needs_input_grad)
        frame = project(scene, TILE)
        wanted = scene.outputs
        if keep:
            behind = ("alpha",) if ctx.needs_input_grad[-1] or "depth" in wanted else ()
            wanted = tuple(dict.fromkeys((*wanted, *behind)))
        out = blend(scene, frame, wanted, keep)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(out[name] for name in ("link_id", "contribution") if name in scene.outputs))
        if keep:
            ctx.scene, ctx.frame = scene, frame
            ctx.save_for_backward(*tensors, *(out[name] for name in KEPT))  # all: none may be changed in place
        return tuple(out[name].view(*scene.batch_shape, *out[name].shape[1:]) for name in scene.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of splats, link weights, transforms, intrinsics and background, as far as they are wanted."""
        scene, flat = ctx.scene, ctx.frame.flat
        *_, K, background, alpha, depth, left, last = ctx.saved_tensors
        needs, shape = ctx.needs_input_grad[2:], scene.batch_shape
        given = {
            name: g.reshape(len(flat.K), *g.shape[len(shape) :]).contiguous()
            for name, g in zip(scene.outputs, grads, strict=True)
            if g is not None and name in ("rgb", "alpha", "depth")
        }
        images = {"alpha": alpha, "depth": depth, "left": left, "last": last}
        sums = summed(_blend_backward(scene, ctx.frame, images, given), ctx.frame.tiles)
        out = _project_backward(scene, flat, sums, needs)
        fields = (scene.gaussians.means, scene.gaussians.quats, scene.gaussians.scales, scene.gaussians.opacities)
        splats = [
            None if v is None else _over_sets(v, flat, shape, value.shape)
            for v, value in zip(out[:5], (*fields, scene.gaussians.sh), strict=True)
        ]
        v_weights, v_T, v_Ts = _pose_gradients(scene, flat, out[5], needs[5:8])
        v_K = None if out[6] is None else _intrinsics(out[6], shape, K)
        v_background = None
        if needs[9]:
            v_background = torch.zeros_like(background)
            if "rgb" in given:
                seen = (given["rgb"] * (1.0 - alpha[..., None])).sum((1, 2))
                v_background = seen.view(*shape, 3).sum_to_size(background.shape)
        return None, None, *splats, v_weights, v_T, v_Ts, v_K, v_background


def _blend_backward(scene: Scene, frame: Frame, images: dict[str, Tensor], given: dict[str, Tensor]) -> Tensor:
    """Gradient sums ``(pairs, SUMS)`` of each (splat, tile)."""
    tiles, (columns, lines) = frame.tiles, frame.tiles.shape
    sums = torch.zeros(len(tiles.rows), SUM_FLOATS, dtype=torch.float32, device=frame.record.device)
    if not given or not len(sums):
        return sums
    unused = frame.record
    launch(
        blend_backward, (len(frame.flat.K) * columns * lines,),
        frame.record, tiles.starts, tiles.rows, tiles.slots, frame.flat.background,
        given.get("rgb", unused), given.get("alpha", unused), given.get("depth", unused),
        images["alpha"], images["depth"], images["left"], images["last"], sums,
        columns, columns * lines, scene.camera.width, scene.camera.height,
        RGB="rgb" in given, ALPHA="alpha" in given, DEPTH="depth" in given,
        TILE_X=tiles.size[0], TILE_Y=tiles.size[1], num_warps=1,
    )  # fmt: skip
    return sums


def _project_backward(scene: Scene, flat: Flat, sums: Tensor, needs: Any) -> list[Tensor | None]:
    """Gradients per (image, splat) of means, quats, scales, opacities, sh, transforms ``(images, n, 12)``; then of
    fx, fy, cx, cy per (image, block). None where not needed."""
    (images, n, links), coefficients = flat.counts, flat.splats[4].shape[-2]
    poses, shapes = needs[5] or needs[6] or needs[7], needs[1] or needs[2]
    blocks = blocks_of(n)
    wanted = (needs[0], shapes, shapes, needs[3], needs[4], poses, needs[8])
    tails = (n, 3), (n, 4), (n, 3), (n,), (n, coefficients, 3), (n, 12), (blocks, 4)
    out = [torch.empty(images, *t, device=sums.device) if w else None for w, t in zip(wanted, tails, strict=True)]
    if any(wanted):
        means, quats, scales, _, sh = flat.splats
        launch(
            project_backward, (images, blocks),
            means, quats, scales, sh, flat.link_index, flat.link_weights, flat.Ts_cam_link, flat.K,
            flat.set_of_image, sums, *(sums if v is None else v for v in out),
            n, links, scene.camera.width, scene.camera.height,
            M=flat.link_index.shape[1], WEIGHTED=scene.link_weights is not None, COEFFICIENTS=coefficients,
            AXIS=along_axis(scene),
            MEANS=bool(wanted[0]), SHAPES=bool(shapes), OPACITIES=bool(wanted[3]), SH=bool(wanted[4]),
            POSES=bool(poses), INTRINSICS=bool(wanted[6]), BLOCK=BLOCK,
        )  # fmt: skip
    keep = (needs[0], needs[1], needs[2], needs[3], needs[4], poses, needs[8])
    return [v if k else None for v, k in zip(out, keep, strict=True)]


def _over_sets(value: Tensor, flat: Flat, shape: tuple[int, ...], target: torch.Size) -> Tensor:
    """Sum gradients ``(images, n, ...)`` over the images that share a set of splats."""
    return value.view(*shape, *value.shape[1:]).sum_to_size(target)


def _pose_gradients(scene: Scene, flat: Flat, v_splat: Tensor | None, needs: Any) -> tuple[Tensor | None, ...]:
    """From the splats' transforms ``(images, n, 12)`` to link weights, T_cam_world and Ts_world_link, by a product
    with the weights of splats on links: fixed order, no atomics."""
    if v_splat is None:
        return None, None, None
    (images, n, links), m = flat.counts, flat.link_index.shape[1]
    index = flat.link_index.long()
    weights = torch.ones_like(index, dtype=torch.float32) if scene.link_weights is None else flat.link_weights
    v_weights = v_T = v_Ts = None
    if needs[0]:
        products = torch.einsum("inc,ilc->nl", v_splat, flat.Ts_cam_link.view(images, links, 12))
        v_weights = products.gather(1, index)
    if needs[1] or needs[2]:
        on_link = torch.zeros(n, links, device=index.device)
        for j in range(m):
            on_link.scatter_add_(1, index[:, j : j + 1], weights[:, j : j + 1])
        v_link = torch.zeros(*scene.batch_shape, links, 4, 4, dtype=torch.float64, device=index.device)
        v_link[..., :3, :] = (on_link.T @ v_splat).view(*scene.batch_shape, links, 3, 4)
        if needs[1]:
            T = scene.camera.T_cam_world
            v_T = (v_link @ flat.Ts_world_link.mT).sum(-3).sum_to_size(T.shape).to(T.dtype)
        if needs[2]:
            v_Ts = (flat.T_cam_world.mT @ v_link).sum_to_size(scene.Ts_world_link.shape).to(torch.float32)
    return v_weights, v_T, v_Ts


def _intrinsics(parts: Tensor, shape: tuple[int, ...], K: Tensor) -> Tensor:
    """Gradient of K from fx, fy, cx, cy per (image, block)."""
    v_K = torch.zeros(*shape, 3, 3, device=parts.device)
    fx, fy, cx, cy = parts.sum(1).view(*shape, 4).unbind(-1)
    v_K[..., 0, 0], v_K[..., 1, 1], v_K[..., 0, 2], v_K[..., 1, 2] = fx, fy, cx, cy
    return v_K.sum_to_size(K.shape).to(K.dtype)
