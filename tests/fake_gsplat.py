"""gsplat's public functions that we call, in plain torch on any device: the names, shapes and dtypes of versions 1.4.0,
1.5.0 and 1.5.3 are asserted as theirs do; results follow their kernels (keys of image, tile and depth; alpha limited at
0.999; stop before 1e-4)."""

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kinesplat.camera import Camera
from kinesplat.gaussians import Gaussians
from kinesplat.rasterizer import rasterize

VERSIONS = ("1.4.0", "1.5.0", "1.5.3")


def make(version: str) -> SimpleNamespace:
    """A stand-in for the package at `version`; others look like the last."""
    tiles = {"1.4.0": isect_tiles_1_4, "1.5.0": isect_tiles_1_5_0}.get(version, isect_tiles_1_5_3)
    offsets = isect_offset_encode_1_5_3 if tiles is isect_tiles_1_5_3 else isect_offset_encode_1_4
    return SimpleNamespace(
        __version__=version,
        isect_tiles=tiles,
        isect_offset_encode=offsets,
        rasterize_to_pixels=rasterize_to_pixels,
        rasterization=rasterization,
    )


def isect_tiles_1_4(
    means2d: Tensor, radii: Tensor, depths: Tensor, tile_size: int, tile_width: int, tile_height: int,
    sort: bool = True, packed: bool = False, n_cameras: int | None = None, camera_ids: Tensor | None = None,
    gaussian_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert sort
    assert not packed
    C, N, _ = means2d.shape
    assert radii.shape == (C, N)
    return _isect(means2d, radii[..., None].expand(C, N, 2), depths, tile_size, tile_width, tile_height)


def isect_tiles_1_5_0(
    means2d: Tensor, radii: Tensor, depths: Tensor, tile_size: int, tile_width: int, tile_height: int,
    sort: bool = True, packed: bool = False, n_cameras: int | None = None, camera_ids: Tensor | None = None,
    gaussian_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert sort
    assert not packed
    return _isect(means2d, radii, depths, tile_size, tile_width, tile_height)


def isect_tiles_1_5_3(
    means2d: Tensor, radii: Tensor, depths: Tensor, tile_size: int, tile_width: int, tile_height: int,
    sort: bool = True, segmented: bool = False, packed: bool = False, n_images: int | None = None,
    image_ids: Tensor | None = None, gaussian_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert sort
    assert not packed
    assert not segmented
    return _isect(means2d, radii, depths, tile_size, tile_width, tile_height)


def _isect(
    means2d: Tensor, radii: Tensor, depths: Tensor, tile_size: int, tile_width: int, tile_height: int
) -> tuple[Tensor, Tensor, Tensor]:
    C, N, _ = means2d.shape
    assert means2d.shape == (C, N, 2)
    assert radii.shape == (C, N, 2)
    assert radii.dtype == torch.int32
    assert depths.shape == (C, N)
    assert means2d.dtype == depths.dtype == torch.float32
    assert not means2d.requires_grad
    low = ((means2d - radii) / tile_size).floor()
    high = ((means2d + radii) / tile_size).ceil()
    most = torch.tensor([tile_width, tile_height])
    low, high = (torch.minimum(v.clamp(min=0), most).int() for v in (low, high))
    bits = tile_bits(tile_width, tile_height)
    assert math.floor(math.log2(C)) + 1 + bits <= 32
    keys, rows = [], []
    counts = torch.zeros(C, N, dtype=torch.int32)
    for c in range(C):
        for i in range(N):
            if (radii[c, i] <= 0).any():
                continue
            depth = int(depths[c, i].view(torch.int32))
            for y in range(int(low[c, i, 1]), int(high[c, i, 1])):
                for x in range(int(low[c, i, 0]), int(high[c, i, 0])):
                    keys.append((c << (32 + bits)) | ((y * tile_width + x) << 32) | depth)
                    rows.append(c * N + i)
                    counts[c, i] += 1
    ids, order = torch.sort(torch.tensor(keys, dtype=torch.int64), stable=True)
    return counts, ids, torch.tensor(rows, dtype=torch.int32)[order]


def isect_offset_encode_1_4(isect_ids: Tensor, n_cameras: int, tile_width: int, tile_height: int) -> Tensor:
    return _offsets(isect_ids, n_cameras, tile_width, tile_height)


def isect_offset_encode_1_5_3(isect_ids: Tensor, n_images: int, tile_width: int, tile_height: int) -> Tensor:
    return _offsets(isect_ids, n_images, tile_width, tile_height)


def _offsets(ids: Tensor, images: int, tile_width: int, tile_height: int) -> Tensor:
    assert ids.dtype == torch.int64
    bits = tile_bits(tile_width, tile_height)
    edges = (torch.arange(images)[:, None] << (32 + bits)) | (torch.arange(tile_width * tile_height) << 32)
    return torch.searchsorted(ids, edges.flatten()).int().view(images, tile_height, tile_width)


def tile_bits(tile_width: int, tile_height: int) -> int:
    """Bits of a key that number an image's tiles."""
    return math.floor(math.log2(tile_width * tile_height)) + 1


def rasterize_to_pixels(  # noqa: PLR0913
    means2d: Tensor, conics: Tensor, colors: Tensor, opacities: Tensor, image_width: int, image_height: int,
    tile_size: int, isect_offsets: Tensor, flatten_ids: Tensor, backgrounds: Tensor | None = None,
    masks: Tensor | None = None, packed: bool = False, absgrad: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    C, N, _ = means2d.shape
    channels = colors.shape[-1]
    assert not packed
    assert masks is None
    assert means2d.shape == (C, N, 2)
    assert conics.shape == (C, N, 3)
    assert colors.shape == (C, N, channels)
    assert opacities.shape == (C, N)
    assert backgrounds is None or backgrounds.shape == (C, channels)
    assert all(t.dtype == torch.float32 for t in (means2d, conics, colors, opacities))
    assert isect_offsets.dtype == flatten_ids.dtype == torch.int32
    _, lines, columns = isect_offsets.shape
    assert columns == math.ceil(image_width / tile_size)
    assert lines == math.ceil(image_height / tile_size)
    ends = torch.cat([isect_offsets.flatten()[1:], torch.tensor([len(flatten_ids)])]).view_as(isect_offsets)
    flat = means2d.reshape(-1, 2), conics.reshape(-1, 3), colors.reshape(C * N, channels), opacities.reshape(-1)
    values, alphas = [], []
    for c in range(C):
        rows = []
        for line in range(lines):
            row = []
            for column in range(columns):
                listed = flatten_ids[int(isect_offsets[c, line, column]) : int(ends[c, line, column])].long()
                row.append(_tile(*(t[listed] for t in flat), column * tile_size, line * tile_size, tile_size))
            rows.append(torch.cat(row, 1))
        image = torch.cat(rows, 0)[:image_height, :image_width]
        left = image[..., -1:]
        alphas.append(1.0 - left)
        values.append(image[..., :-1] + (0.0 if backgrounds is None else left * backgrounds[c]))
    reached = 0.0 * sum(t.sum() for t in flat)  # gradients of zero where nothing is seen: theirs is one function
    return torch.stack(values) + reached, torch.stack(alphas) + reached


def _tile(means: Tensor, conics: Tensor, colors: Tensor, opacities: Tensor, x0: int, y0: int, size: int) -> Tensor:
    """One tile's colours and remaining transmittance ``(size, size, channels + 1)``."""
    y, x = torch.meshgrid(torch.arange(size) + y0 + 0.5, torch.arange(size) + x0 + 0.5, indexing="ij")
    T, done = torch.ones(size, size), torch.zeros(size, size, dtype=torch.bool)
    out = torch.zeros(size, size, colors.shape[-1])
    for (mx, my), (a, b, c), colour, o in zip(means, conics, colors, opacities, strict=True):
        dx, dy = mx - x, my - y
        sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
        alpha = (o * torch.exp(-sigma)).clamp(max=0.999)
        alpha = torch.where((sigma >= 0) & (alpha >= 1 / 255), alpha, 0.0)
        after = T * (1 - alpha)
        done = done | (after <= 1e-4)
        out = out + torch.where(done, 0.0, alpha * T)[..., None] * colour
        T = torch.where(done, T, after)
    return torch.cat([out, T[..., None]], -1)


def rasterization(  # noqa: PLR0913
    means: Tensor, quats: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor, viewmats: Tensor, Ks: Tensor,
    width: int, height: int, near_plane: float = 0.01, far_plane: float = 1e10, radius_clip: float = 0.0,
    eps2d: float = 0.3, sh_degree: int | None = None, packed: bool = True, tile_size: int = 16,
    backgrounds: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict[str, Any]]:  # fmt: skip
    """The call that users make: one set of splats, many cameras; by our reference (alpha limited at 0.99)."""
    N, C = len(means), len(viewmats)
    assert means.shape == scales.shape == (N, 3)
    assert quats.shape == (N, 4)
    assert opacities.shape == (N,)
    assert sh_degree is not None
    assert (sh_degree + 1) ** 2 <= colors.shape[1]
    assert colors.shape == (N, colors.shape[1], 3)
    assert viewmats.shape == (C, 4, 4)
    assert Ks.shape == (C, 3, 3)
    assert backgrounds is not None
    assert backgrounds.shape == (C, 3)
    splats, camera = Gaussians(means, quats, scales, opacities, colors), Camera(Ks, viewmats, width, height)
    out = rasterize(splats, camera, backgrounds, eps2d=eps2d, backend="reference", outputs=("rgb", "alpha"))
    assert out.rgb is not None
    assert out.alpha is not None
    return out.rgb, out.alpha[..., None], {}
