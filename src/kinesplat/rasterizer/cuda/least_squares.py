"""Normal equations of a photometric residual on the GPU; what `kinesplat.rasterizer.gauss_newton` documents."""

from dataclasses import replace

import torch
from torch import Tensor

from kinesplat.errors import InputError
from kinesplat.rasterizer.cuda.frame import Frame, along_axis, project
from kinesplat.rasterizer.cuda.function import blend
from kinesplat.rasterizer.cuda.launch import BLOCK, blocks_of, launch
from kinesplat.rasterizer.cuda.normal import (
    BLOCK_FLOATS,
    SLOPE_FLOATS,
    block_products,
    jacobian_blocks,
    twist_slopes,
)
from kinesplat.rasterizer.render import Scene

TILE = (8, 8)
STEP = 64  # columns of a block that meet in one product


def normal_equations(scene: Scene, targets: dict[str, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss ``(images,)``, J^T W r ``(images, p)`` and J^T W J ``(images, p, p)`` in float64, p = 6 links.

    Args:
        scene: what is rendered; one link per splat.
        targets: "rgb", "alpha", "rgb_weight", "alpha_weight", "backdrop"; ``(images, height, width, ...)`` or None.

    Raises:
        InputError: NaN or infinity.
    """
    frame = project(replace(scene, background=torch.zeros_like(scene.background)), TILE)
    images, _, links = frame.flat.counts
    out = blend(scene, frame, ("rgb", "alpha"), keep=True)
    roots, errors, behind, loss = _residuals(scene, out, targets)
    gradient = torch.zeros(images, 6 * links, dtype=torch.float64, device=loss.device)
    hessian = torch.zeros(images, links, links, 6, 6, dtype=torch.float64, device=loss.device)
    tile_of, link_of = _meetings(scene, frame)
    if len(tile_of):
        blocks, parts = _jacobian(scene, frame, tile_of, link_of, out, (roots, errors, behind))
        image_of = tile_of // (frame.tiles.shape[0] * frame.tiles.shape[1])
        gradient.view(images, links, 6).index_put_((image_of, link_of), parts.double(), accumulate=True)
        first, second = _pairs(tile_of)
        products = torch.empty(len(first), 36, device=loss.device)
        columns = blocks.shape[-1]
        launch(block_products, (len(first),), blocks, first, second, products, COLUMNS=columns, STEP=STEP)
        places = image_of[first], link_of[first], link_of[second]
        hessian.index_put_(places, products.view(-1, 6, 6).double(), accumulate=True)
    lower = hessian.permute(0, 1, 3, 2, 4).reshape(images, 6 * links, 6 * links).tril()
    return loss, gradient, lower + lower.tril(-1).mT


def _residuals(
    scene: Scene, out: dict[str, Tensor], targets: dict[str, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Roots of the weights ``(images, height, width, 2)``, weighted errors ``(..., 4)``, what is behind the robot
    ``(..., 3)``, and the loss."""
    rgb, backdrop = targets["rgb"], targets["backdrop"]
    assert rgb is not None
    if backdrop is None:
        flat = scene.background.expand(*scene.batch_shape, 3).reshape(-1, 1, 1, 3)
        backdrop = flat.expand(*rgb.shape)
    backdrop = backdrop.contiguous()
    difference = torch.empty(*rgb.shape[:-1], 4, device=rgb.device)
    difference[..., :3] = out["rgb"] + out["left"][..., None] * backdrop - rgb
    weights = torch.zeros(*rgb.shape[:-1], 2, device=rgb.device)
    rgb_weight, alpha, alpha_weight = (targets[name] for name in ("rgb_weight", "alpha", "alpha_weight"))
    weights[..., 0] = 1.0 if rgb_weight is None else rgb_weight
    difference[..., 3] = 0.0
    if alpha is not None:
        weights[..., 1] = 1.0 if alpha_weight is None else alpha_weight
        difference[..., 3] = out["alpha"] - alpha
    roots = weights.sqrt()
    errors = difference * roots[..., [0, 0, 0, 1]]
    loss = errors.double().square().sum((1, 2, 3))
    if not torch.isfinite(loss).all():
        named = {("target rgb" if k == "rgb" else k): v for k, v in targets.items() if v is not None}
        wrong = [name for name, value in named.items() if not torch.isfinite(value).all()]
        raise InputError(f"{wrong[0] if wrong else 'the loss'} contains NaN or infinity")
    return roots, errors, backdrop, loss


def _meetings(scene: Scene, frame: Frame) -> tuple[Tensor, Tensor]:
    """Tile and link of each (tile, link) that meet, in order."""
    tiles, (_, n, links) = frame.tiles, frame.flat.counts
    number = torch.arange(len(tiles.starts) - 1, device=tiles.starts.device)
    tile = number.repeat_interleave(tiles.starts.diff(), output_size=len(tiles.rows))
    link = frame.flat.link_index[:, 0].long()[(tiles.rows % max(n, 1)).long()]
    met = torch.unique(tile * links + link)
    return met // links, met % links


def _jacobian(
    scene: Scene,
    frame: Frame,
    tile_of: Tensor,
    link_of: Tensor,
    out: dict[str, Tensor],
    residuals: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Blocks ``(meetings, 6, 4 * pixels)`` of the Jacobian times root weights, and their shares of J^T W r."""
    flat, tiles, camera = frame.flat, frame.tiles, scene.camera
    (images, n, links), device = flat.counts, frame.record.device
    means, quats, scales, _, sh = flat.splats
    slopes = torch.empty(images * n, SLOPE_FLOATS, device=device)
    launch(
        twist_slopes, (images, blocks_of(n)),
        means, quats, scales, sh, flat.link_index, flat.Ts_cam_link, flat.K, flat.set_of_image, slopes,
        n, links, camera.width, camera.height, COEFFICIENTS=sh.shape[-2], AXIS=along_axis(scene),
        BLOCK=BLOCK,
    )  # fmt: skip
    pixels = tiles.size[0] * tiles.size[1]
    blocks = torch.empty(len(tile_of), 6, BLOCK_FLOATS // 6 * pixels, device=device)
    parts = torch.empty(len(tile_of), 6, device=device)
    roots, errors, behind = residuals
    launch(
        jacobian_blocks, (len(tile_of),),
        frame.record, slopes, flat.link_index, tiles.starts, tiles.rows, tile_of, link_of, behind, roots, errors,
        out["left"], out["last"], blocks, parts,
        n, tiles.shape[0], tiles.shape[0] * tiles.shape[1], camera.width, camera.height,
        AXIS=along_axis(scene), TILE_X=tiles.size[0], TILE_Y=tiles.size[1], num_warps=2,
    )  # fmt: skip
    return blocks, parts


def _pairs(tile_of: Tensor) -> tuple[Tensor, Tensor]:
    """Of meetings in order of tiles: each with itself and with all earlier ones of its tile."""
    place = torch.arange(len(tile_of), device=tile_of.device)
    start = torch.searchsorted(tile_of, tile_of)
    number = place - start + 1
    first = place.repeat_interleave(number)
    before = torch.cumsum(number, 0) - number
    second = torch.arange(len(first), device=tile_of.device) - before[first] + start[first]
    return first, second
