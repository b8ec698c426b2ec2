"""The oracle: compositing in plain torch, any dtype and device, differentiable by autograd.

Semantics of 3DGS (Kerbl et al. 2023) and of gsplat's `classic` mode; the constants below are those of every backend.
Written to be read: one image and one tile of pixels at a time, all splats of the tile at once.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer.projection import Projection, project
from kinesplat.rasterizer.render import Render, Scene, check_values

ALPHA_MAX = 0.99
ALPHA_MIN = 1.0 / 255.0
TRANSMITTANCE_MIN = 1e-4
NEAR = 0.01
DEPTH_ALPHA_MIN = 1e-10
TILE = 32

_EVENT_DIMS = {"means": 2, "quats": 2, "scales": 2, "opacities": 1, "sh": 3}


def render(scene: Scene) -> Render:
    """Render every image of the batch in turn.

    Raises:
        InputError: a tensor holds NaN or infinity.
    """
    check_values(scene)
    shape, camera = scene.batch_shape, scene.camera
    K, background = _flat(camera.K, shape, 2), _flat(scene.background, shape, 1)
    Ts_cam_link = _flat(camera.T_cam_world[..., None, :, :] @ scene.Ts_world_link, shape, 3)
    splats = {name: _flat(getattr(scene.gaussians, name), shape, dims) for name, dims in _EVENT_DIMS.items()}
    images = [
        _render_image(
            scene, replace(scene.gaussians, **{k: v[i] for k, v in splats.items()}), Ts_cam_link[i], K[i], background[i]
        )
        for i in range(math.prod(shape))
    ]
    events = _event_shapes(scene)
    stacked = {name: [image[name] for image in images] for name in scene.outputs}
    return Render(
        **{
            name: torch.stack(values).reshape(*shape, *events[name]) if values else K.new_zeros(*shape, *events[name])
            for name, values in stacked.items()
        }
    )


def _flat(value: Tensor, shape: tuple[int, ...], event_dims: int) -> Tensor:
    """Expand the batch of `value` to `shape` and flatten it into one leading dimension."""
    event = value.shape[value.ndim - event_dims :]
    return value.expand(*shape, *event).reshape(math.prod(shape), *event)


def _event_shapes(scene: Scene) -> dict[str, tuple[int, ...]]:
    plane = (scene.camera.height, scene.camera.width)
    planes = {"alpha": plane, "depth": plane, "link_id": plane}
    return {"rgb": (*plane, 3), **planes, "contribution": (len(scene.gaussians),)}


def _render_image(
    scene: Scene, gaussians: Gaussians, Ts_cam_link: Tensor, K: Tensor, background: Tensor
) -> dict[str, Tensor]:
    """All outputs of one image, from splats in link frames."""
    size = scene.camera.width, scene.camera.height
    Ts_cam_splat = Ts_cam_link[scene.link_index]
    if scene.link_weights is None:
        Ts_cam_splat = Ts_cam_splat[:, 0]
    else:
        Ts_cam_splat = (scene.link_weights[..., None, None] * Ts_cam_splat).sum(1)
    z = (Ts_cam_splat[:, 2, :3] * gaussians.means).sum(-1) + Ts_cam_splat[:, 2, 3]
    kept = torch.nonzero((z >= NEAR) & (gaussians.opacities >= ALPHA_MIN))[:, 0]
    kept = kept[torch.argsort(z[kept], stable=True)]
    fields = {name: getattr(gaussians, name)[kept] for name in _EVENT_DIMS}
    splats = project(replace(gaussians, **fields), Ts_cam_splat[kept], K, size, scene.eps2d)
    tiles = [
        [_composite(splats, fields["opacities"], (x, y), size) for x in range(0, size[0], TILE)]
        for y in range(0, size[1], TILE)
    ]
    image = {k: torch.cat([torch.cat([t[k] for t in row], dim=1) for row in tiles]) for k in ("sums", "median")}
    rgb, alpha, weighted_z = image["sums"].split((3, 1, 1), dim=-1)
    links = (
        scene.link_index
        if scene.link_weights is None
        else scene.link_index.gather(1, scene.link_weights.argmax(1, keepdim=True))
    )
    links_or_none = torch.cat([links[kept, 0], links.new_full((1,), -1)])
    weights = torch.stack([t["weights"] for row in tiles for t in row]).sum(0)
    contribution = z.new_zeros(len(gaussians)).index_add(0, kept, weights)
    return {
        "rgb": rgb + (1.0 - alpha) * background,
        "alpha": alpha[..., 0],
        "depth": (weighted_z / alpha.clamp(min=DEPTH_ALPHA_MIN))[..., 0],
        "link_id": links_or_none[image["median"]],
        "contribution": contribution.detach(),
    }


def _composite(
    splats: Projection, opacities: Tensor, origin: tuple[int, int], size: tuple[int, int]
) -> dict[str, Tensor]:
    """One tile: sums of colour, weight and weighted z; index of the median splat (-1: none); weights per splat."""
    x, y = (
        torch.arange(o, min(o + TILE, s), dtype=opacities.dtype, device=opacities.device) + 0.5
        for o, s in zip(origin, size, strict=True)
    )
    hit = _meets(splats, opacities, (x, y))
    means, S = splats.means[hit], splats.covariances[hit]
    dx, dy = x - means[:, None, None, 0], y[:, None] - means[:, None, None, 1]
    Sxx, Sxy, Syy = (S[:, None, None, i, j] for i, j in ((0, 0), (0, 1), (1, 1)))
    sigma = 0.5 * ((Syy * dx * dx - 2.0 * Sxy * dx * dy + Sxx * dy * dy) / (Sxx * Syy - Sxy * Sxy))
    alpha = (opacities[hit, None, None] * torch.exp(-sigma)).clamp(max=ALPHA_MAX)
    alpha = torch.where(alpha >= ALPHA_MIN, alpha, 0.0)
    after = torch.cumprod(1.0 - alpha, dim=0)
    before = torch.cat([torch.ones_like(alpha[:1]) if len(hit) else alpha[:1], after[:-1]])
    weights = torch.where(after >= TRANSMITTANCE_MIN, alpha * before, 0.0)
    values = torch.cat([splats.colors[hit], torch.ones_like(means[:, :1]), splats.depths[hit, None]], dim=-1)
    crossed = (after < 0.5) & (after >= TRANSMITTANCE_MIN)
    crossed = torch.cat([crossed, torch.ones_like(crossed[:1]) if len(hit) else crossed.new_ones((1, len(y), len(x)))])
    return {
        "sums": torch.einsum("nhw,nc->hwc", weights, values),
        "median": torch.cat([hit, hit.new_full((1,), -1)])[crossed.to(torch.uint8).argmax(0)],
        "weights": torch.zeros_like(opacities).index_add(0, hit, weights.sum((1, 2))),
    }


def _meets(splats: Projection, opacities: Tensor, pixels: tuple[Tensor, Tensor]) -> Tensor:
    """Indices of the splats whose bounding box at alpha = 1/255 reaches a pixel centre of the tile."""
    with torch.no_grad():
        reach = (2.0 * torch.log(opacities / ALPHA_MIN)).clamp(min=0.0) * 1.001 + 1e-3
        inside = torch.ones_like(opacities, dtype=torch.bool)
        for axis, centres in enumerate(pixels):
            extent = (reach * splats.covariances[:, axis, axis]).sqrt()
            mean = splats.means[:, axis]
            inside &= (mean + extent >= centres[0]) & (mean - extent <= centres[-1])
        return torch.nonzero(inside)[:, 0]
