"""Compositing as Triton kernels: one program per tile, all its pixels in one warp, so that sums over pixels are
shuffles. Forward front to back; backward back to front, from the transmittance that the forward pass left."""

from typing import no_type_check

import triton
import triton.language as tl

from kinesplat.rasterizer.cuda.splat import (
    ALPHA_MAX,
    ALPHA_MIN,
    DEPTH_ALPHA_MIN,
    RECORD,
    SUMS,
    TRANSMITTANCE_MIN,
)


@triton.jit
@no_type_check
def tile_pixels(number, tiles_x, tiles, width, height, TILE_X: tl.constexpr, TILE_Y: tl.constexpr):
    """Image of a tile, index of its pixels in the batch of images, whether they exist, and their centres."""
    image, tile = number // tiles, number % tiles
    lane = tl.arange(0, TILE_X * TILE_Y)
    column = (tile % tiles_x) * TILE_X + lane % TILE_X
    line = (tile // tiles_x) * TILE_Y + lane // TILE_X
    inside = (column < width) & (line < height)
    pixel = (image * height + line) * width + column
    return image, pixel, inside, column.to(tl.float32) + 0.5, line.to(tl.float32) + 0.5


@triton.jit
@no_type_check
def coverage(record, row, x, y):
    """Of the record of a splat at pixels: opacity * falloff, the falloff, and the conic times the offset."""
    base = record + row.to(tl.int64) * RECORD
    dx, dy = tl.load(base) - x, tl.load(base + 1) - y
    b = tl.load(base + 3)
    cx, cy = tl.load(base + 2) * dx + b * dy, b * dx + tl.load(base + 4) * dy
    falloff = tl.exp(-0.5 * (dx * cx + dy * cy))
    return tl.load(base + 5) * falloff, falloff, cx, cy


@triton.jit
@no_type_check
def blend_forward(
    record, starts, rows, slots, background, out_rgb, out_alpha, out_depth, out_median, out_weights, left, last,
    tiles_x, tiles, width, height,
    RGB: tl.constexpr, ALPHA: tl.constexpr, DEPTH: tl.constexpr, MEDIAN: tl.constexpr, WEIGHTS: tl.constexpr,
    KEEP: tl.constexpr, TILE_X: tl.constexpr, TILE_Y: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """`left` and `last` keep transmittance and last composited place of each pixel for the backward pass."""
    number = tl.program_id(0).to(tl.int64)
    image, pixel, inside, x, y = tile_pixels(number, tiles_x, tiles, width, height, TILE_X, TILE_Y)
    start, end = tl.load(starts + number), tl.load(starts + number + 1)
    T = tl.where(inside, 1.0, 0.0)
    alive = inside
    red, green, blue, total, depth = T * 0, T * 0, T * 0, T * 0, T * 0
    median = tl.full((TILE_X * TILE_Y,), -1, tl.int32)
    final = tl.zeros((TILE_X * TILE_Y,), tl.int64) + start - 1
    k = start
    going = 1
    while (k < end) & (going > 0):
        for u in tl.static_range(UNROLL):
            place = tl.minimum(k + u, end - 1)
            row = tl.load(rows + place)
            raw, _, _, _ = coverage(record, row, x, y)
            raw = raw * tl.where(k + u < end, 1.0, 0.0)
            alpha = tl.where(raw >= ALPHA_MIN, tl.minimum(raw, ALPHA_MAX), 0.0)
            after = T * (1.0 - alpha)
            alive = alive & (after >= TRANSMITTANCE_MIN)
            weight = tl.where(alive, alpha * T, 0.0)
            base = record + row.to(tl.int64) * RECORD
            if RGB:
                red += weight * tl.load(base + 6)
                green += weight * tl.load(base + 7)
                blue += weight * tl.load(base + 8)
            if DEPTH:
                depth += weight * tl.load(base + 9)
            if MEDIAN:
                median = tl.where((median < 0) & alive & (after < 0.5), row, median)
            if WEIGHTS:
                if k + u < end:
                    tl.store(out_weights + tl.load(slots + place), tl.sum(weight))
            total += weight
            T = tl.where(alive, after, T)
            final = tl.where(weight > 0.0, place, final)
        k += UNROLL
        going = tl.sum(alive.to(tl.int32))
    if RGB:
        tint = background + image * 3
        tl.store(out_rgb + pixel * 3, red + T * tl.load(tint), mask=inside)
        tl.store(out_rgb + pixel * 3 + 1, green + T * tl.load(tint + 1), mask=inside)
        tl.store(out_rgb + pixel * 3 + 2, blue + T * tl.load(tint + 2), mask=inside)
    if ALPHA:
        tl.store(out_alpha + pixel, total, mask=inside)
    if DEPTH:
        tl.store(out_depth + pixel, depth / tl.maximum(total, DEPTH_ALPHA_MIN), mask=inside)
    if MEDIAN:
        tl.store(out_median + pixel, median, mask=inside)
    if KEEP:
        tl.store(left + pixel, T, mask=inside)
        tl.store(last + pixel, final, mask=inside)


@triton.jit
@no_type_check
def blend_backward(
    record, starts, rows, slots, background, v_rgb, v_alpha, v_depth, alphas, depths, left, last, sums,
    tiles_x, tiles, width, height,
    RGB: tl.constexpr, ALPHA: tl.constexpr, DEPTH: tl.constexpr, TILE_X: tl.constexpr, TILE_Y: tl.constexpr,
):  # fmt: skip
    """Gradient sums of each (splat, tile) into its slot of `sums` (pairs, SUMS), which holds zeros.

    A pixel is ``sum_k w_k q_k`` with ``q = (rgb - background) . v_rgb + z v_z + v_one``, so that
    ``dL/dalpha_k = T_k q_k - sum_(j>k) w_j q_j / (1 - alpha_k)``.
    """
    number = tl.program_id(0).to(tl.int64)
    image, pixel, inside, x, y = tile_pixels(number, tiles_x, tiles, width, height, TILE_X, TILE_Y)
    start = tl.load(starts + number)
    T = tl.load(left + pixel, mask=inside, other=1.0)
    final = tl.load(last + pixel, mask=inside, other=-1)
    gr, gg, gb, gz, one = T * 0, T * 0, T * 0, T * 0, T * 0
    if RGB:
        gr = tl.load(v_rgb + pixel * 3, mask=inside, other=0.0)
        gg = tl.load(v_rgb + pixel * 3 + 1, mask=inside, other=0.0)
        gb = tl.load(v_rgb + pixel * 3 + 2, mask=inside, other=0.0)
        tint = background + image * 3
        one -= gr * tl.load(tint) + gg * tl.load(tint + 1) + gb * tl.load(tint + 2)
    if ALPHA:
        one += tl.load(v_alpha + pixel, mask=inside, other=0.0)
    if DEPTH:
        alpha = tl.load(alphas + pixel, mask=inside, other=1.0)
        gz = tl.load(v_depth + pixel, mask=inside, other=0.0) / tl.maximum(alpha, DEPTH_ALPHA_MIN)
        one -= tl.where(alpha > DEPTH_ALPHA_MIN, gz * tl.load(depths + pixel, mask=inside, other=0.0), 0.0)
    behind = T * 0
    k = tl.max(final)
    while k >= start:
        row = tl.load(rows + k)
        raw, falloff, cx, cy = coverage(record, row, x, y)
        hit = (raw >= ALPHA_MIN) & (k <= final)
        if tl.max(hit.to(tl.int32)) > 0:
            base = record + row.to(tl.int64) * RECORD
            alpha = tl.where(hit, tl.minimum(raw, ALPHA_MAX), 0.0)
            share = 1.0 / (1.0 - alpha)
            T = T * share
            weight = alpha * T
            q = one + gz * tl.load(base + 9)
            q += gr * tl.load(base + 6) + gg * tl.load(base + 7) + gb * tl.load(base + 8)
            v = tl.where(hit & (raw <= ALPHA_MAX), T * q - behind * share, 0.0)
            behind += weight * q
            g = -raw * v
            out = sums + tl.load(slots + k) * SUMS
            tl.store(out, tl.sum(g * cx))
            tl.store(out + 1, tl.sum(g * cy))
            tl.store(out + 2, -0.5 * tl.sum(g * cx * cx))
            tl.store(out + 3, -tl.sum(g * cx * cy))
            tl.store(out + 4, -0.5 * tl.sum(g * cy * cy))
            tl.store(out + 5, tl.sum(falloff * v))
            tl.store(out + 6, tl.sum(weight * gr))
            tl.store(out + 7, tl.sum(weight * gg))
            tl.store(out + 8, tl.sum(weight * gb))
            tl.store(out + 9, tl.sum(weight * gz))
        k -= 1
