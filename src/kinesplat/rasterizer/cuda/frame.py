"""A scene flattened into one row of images, projected, and its splats sorted into tiles."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from kinesplat.errors import InputError
from kinesplat.rasterizer.cuda.launch import BLOCK, MAX_BLOCKS, blocks_of, launch
from kinesplat.rasterizer.cuda.project import project_forward
from kinesplat.rasterizer.cuda.splat import RECORD_FLOATS
from kinesplat.rasterizer.cuda.tiles import Tiles, make_tiles, tile_shape
from kinesplat.rasterizer.render import Scene, check_values


@dataclass(frozen=True)
class Flat:
    """A scene as the kernels read it: contiguous float32, batch dimensions in one.

    Attributes:
        splats: means, quats, scales, opacities, sh of ``(sets, n, ...)``.
        link_index: ``(n, m)``.
        link_weights: ``(n, m)``, or `link_index` again where m = 1 (a pointer that no kernel follows).
        Ts_cam_link: ``(images, links, 3, 4)``.
        T_cam_world: ``(*c, 1, 4, 4)`` float64.
        Ts_world_link: ``(*t, links, 4, 4)`` float64.
        K: ``(images, 3, 3)``.
        background: ``(images, 3)``.
        set_of_image: ``(images,)``.
    """

    splats: tuple[Tensor, ...]
    splat_batch: tuple[int, ...]
    link_index: Int32[Tensor, "n m"]
    link_weights: Tensor
    Ts_cam_link: Float32[Tensor, "images links 3 4"]
    T_cam_world: Float[Tensor, "*c 1 4 4"]
    Ts_world_link: Float[Tensor, "*t links 4 4"]
    K: Float32[Tensor, "images 3 3"]
    background: Float32[Tensor, "images 3"]
    set_of_image: Int32[Tensor, " images"]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Images, splats of a set, links."""
        return len(self.K), self.splats[0].shape[1], self.Ts_cam_link.shape[1]


@dataclass(frozen=True)
class Frame:
    """A projected scene.

    Attributes:
        record: ``(images * n, RECORD)`` projected splats.
    """

    flat: Flat
    record: Float32[Tensor, "rows 12"]
    tiles: Tiles


def along_axis(scene: Scene) -> bool:
    """Whether spherical harmonics are seen along the optical axis."""
    return scene.gaussians.sh_direction == "axis"


def flatten(scene: Scene) -> Flat:
    """Lay out a scene for the kernels; transforms are multiplied in float64 as on the CPU."""
    shape, g = scene.batch_shape, scene.gaussians
    images, n, batch = math.prod(shape), len(g), g.batch_shape
    sets = math.prod(batch)
    splats = (t.detach() for t in (g.means, g.quats, g.scales, g.opacities, g.sh))
    T, Ts = scene.camera.T_cam_world.detach().double()[..., None, :, :], scene.Ts_world_link.detach().double()
    index = scene.link_index.int().contiguous()
    weights = scene.link_weights
    set_index = torch.arange(sets, dtype=torch.int32, device=index.device).reshape(batch)
    return Flat(
        tuple(t.reshape(sets, n, *t.shape[len(batch) + 1 :]).contiguous() for t in splats),
        batch,
        index,
        index if weights is None else weights.detach().contiguous(),
        flat_batch((T @ Ts)[..., :3, :].float(), shape, 3),
        T,
        Ts,
        flat_batch(scene.camera.K.detach(), shape, 2),
        flat_batch(scene.background.detach(), shape, 1),
        set_index.expand(shape).reshape(images).contiguous(),
    )


def flat_batch(value: Tensor, shape: tuple[int, ...], event_dims: int) -> Tensor:
    """`value` expanded to the batch `shape`, which becomes one leading dimension; contiguous."""
    event = value.shape[value.ndim - event_dims :]
    return value.expand(*shape, *event).reshape(math.prod(shape), *event).contiguous()


def project(scene: Scene, size: tuple[int, int]) -> Frame:
    """Project `scene` and sort its splats into tiles of `size` pixels.

    One number crosses to the host: how many (splat, tile) pairs there are, together with the verdict on the input.

    Raises:
        InputError: naming the tensor whose values are no input; or more splats than 32 bits count.
    """
    flat = flatten(scene)
    images, n, links = flat.counts
    device, rows = flat.K.device, images * n
    blocks = blocks_of(n)
    if rows >= 2**31 or blocks > MAX_BLOCKS:
        raise InputError(f"{images} images of {n} splats are too many for one call; split the batch")
    record = torch.empty(rows, RECORD_FLOATS, dtype=torch.float32, device=device)
    box = torch.empty(rows, 4, dtype=torch.int32, device=device)
    count = torch.empty(rows, dtype=torch.int32, device=device)
    bad = torch.zeros(max(images * blocks, 1), dtype=torch.int32, device=device)
    camera, weighted = scene.camera, scene.link_weights is not None
    means, quats, scales, opacities, sh = flat.splats
    shape = tile_shape(camera.width, camera.height, size)
    launch(
        project_forward, (images, blocks),
        means, quats, scales, opacities, sh, flat.link_index, flat.link_weights, flat.Ts_cam_link, flat.K,
        flat.background, flat.set_of_image, record, box, count, bad,
        n, links, camera.width, camera.height, scene.eps2d,
        M=flat.link_index.shape[1], WEIGHTED=weighted, COEFFICIENTS=sh.shape[-2], AXIS=along_axis(scene),
        TILE_X=size[0], TILE_Y=size[1], BLOCK=BLOCK,
    )  # fmt: skip
    ends = torch.cumsum(count, 0, dtype=torch.int64)
    last = ends[-1:] if rows else ends.new_zeros(1)
    pairs, wrong = torch.cat([last, bad.sum(dtype=torch.int64)[None]]).tolist()
    if wrong or not rows:
        check_values(scene)
    if wrong:
        raise InputError("the scene holds values whose projection overflows float32")
    return Frame(flat, record, make_tiles(record, box, count, ends, pairs, images, size, shape))
