"""Lists of splats per tile, front to back: expanded by a Triton kernel, sorted by torch."""

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int, Int32, Int64
from torch import Tensor

from kinesplat.rasterizer.cuda.launch import BLOCK, blocks_of, launch
from kinesplat.rasterizer.cuda.splat import RECORD_FLOATS


@dataclass(frozen=True)
class Tiles:
    """Splats of each tile. A slot is the place of a (splat, tile) pair in order of splats: those of one splat are
    neighbours, so that sums over its tiles have a fixed order and need no atomics.

    Attributes:
        starts: ``(images * tiles + 1,)`` where each tile's list starts.
        rows: ``(pairs,)`` image * n + splat, tile by tile and front to back.
        slots: ``(pairs,)`` the slot of each.
        first: ``(images * n,)`` first slot of each splat.
        count: ``(images * n,)`` tiles of each splat.
        size: width and height of a tile [px].
        shape: columns and lines of tiles in an image.
    """

    starts: Int64[Tensor, " t"]
    rows: Int32[Tensor, " pairs"]
    slots: Int64[Tensor, " pairs"]
    first: Int64[Tensor, " rows"]
    count: Int32[Tensor, " rows"]
    size: tuple[int, int]
    shape: tuple[int, int]


@triton.jit
@no_type_check
def expand(record, box, first, count, keys, rows, total, n, tiles_x, tiles, RECORD: tl.constexpr, BLOCK: tl.constexpr):
    """Writes one key ``tile << 32 | bits of z`` for each tile of each splat: z > 0, so its bits sort as it does."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < total
    number = tl.load(count + row, mask=mask, other=0)
    slot = tl.load(first + row, mask=mask, other=0)
    x = tl.load(box + row * 4, mask=mask, other=0)
    y = tl.load(box + row * 4 + 1, mask=mask, other=0)
    across = tl.maximum(tl.load(box + row * 4 + 2, mask=mask, other=1), 1)
    z = tl.load(record + row * RECORD + 9, mask=mask, other=1.0).to(tl.int32, bitcast=True).to(tl.int64)
    image = row // n
    most = tl.max(number)
    j = 0
    while j < most:
        inside = j < number
        tile = image * tiles + (y + j // across) * tiles_x + x + j % across
        tl.store(keys + slot + j, (tile << 32) | z, mask=inside)
        tl.store(rows + slot + j, row.to(tl.int32), mask=inside)
        j += 1


@triton.jit
@no_type_check
def sum_slots(values, first, count, out, total, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of `values` (pairs, COLUMNS) over each splat's slots, in their order."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < total
    number = tl.load(count + row, mask=mask, other=0)
    slot = tl.load(first + row, mask=mask, other=0)
    most = tl.max(number)
    for c in tl.static_range(COLUMNS):
        total_c = tl.zeros((BLOCK,), tl.float32)
        j = 0
        while j < most:
            total_c += tl.load(values + (slot + j) * COLUMNS + c, mask=j < number, other=0.0)
            j += 1
        tl.store(out + row * COLUMNS + c, total_c, mask=mask)


def tile_shape(width: int, height: int, size: tuple[int, int]) -> tuple[int, int]:
    """Columns and lines of tiles that cover an image."""
    return -(-width // size[0]), -(-height // size[1])


def make_tiles(
    record: Tensor,
    box: Int[Tensor, "rows 4"],
    count: Int32[Tensor, " rows"],
    ends: Int64[Tensor, " rows"],
    pairs: int,
    images: int,
    size: tuple[int, int],
    shape: tuple[int, int],
) -> Tiles:
    """Sort the `pairs` (splat, tile) that `count` counts; ``ends = cumsum(count)``."""
    total, tiles = len(count), shape[0] * shape[1]
    first = ends - count
    keys = torch.empty(pairs, dtype=torch.int64, device=count.device)
    rows = torch.empty(pairs, dtype=torch.int32, device=count.device)
    launch(
        expand, (blocks_of(total),), record, box, first, count, keys, rows, total, total // max(images, 1), shape[0],
        tiles, RECORD=RECORD_FLOATS, BLOCK=BLOCK,
    )  # fmt: skip
    keys, slots = torch.sort(keys, stable=True)
    edges = torch.arange(images * tiles + 1, device=count.device) << 32
    return Tiles(torch.searchsorted(keys, edges), rows[slots], slots, first, count, size, shape)


def summed(values: Tensor, tiles: Tiles) -> Tensor:
    """Sums ``(rows, columns)`` over each splat's slots of `values` ``(pairs, columns)``."""
    total, columns = len(tiles.count), values.shape[-1]
    out = torch.empty(total, columns, dtype=torch.float32, device=values.device)
    launch(sum_slots, (blocks_of(total),), values, tiles.first, tiles.count, out, total, COLUMNS=columns, BLOCK=BLOCK)
    return out
