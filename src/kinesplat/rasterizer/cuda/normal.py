"""Kernels of the normal equations over link twists. A Jacobian exists only where a link is seen: one block of
(twist, channel, pixel) for each (tile, link) that meet."""

from typing import no_type_check

import triton
import triton.language as tl

from kinesplat.rasterizer.cuda.blend import coverage, tile_pixels
from kinesplat.rasterizer.cuda.splat import (
    ALPHA_MAX,
    ALPHA_MIN,
    NEAR,
    RECORD,
    colour,
    dot3,
    eye,
    harmonic,
    inverse_length,
    load3,
    load_quat,
    load_transform,
    rotation,
    slope,
    store3,
    times,
)

SLOPE_FLOATS = 40  # of a splat: mean 2 x 6, covariance 3 x 6, colour 3 x 3 (by v, or by w along the axis), 1 unused
BLOCK_FLOATS = 24  # of a pixel in a block: 6 twist components x 4 channels
SLOPES = tl.constexpr(SLOPE_FLOATS)


@triton.jit
@no_type_check
def store_row(to, mask, g0, g1, g2, p0, p1, p2, c0, c1, c2):
    """A derivative with respect to p, and what a turn adds: dp = v + w x p, so (g, p x g + c)."""
    tl.store(to, g0, mask=mask)
    tl.store(to + 1, g1, mask=mask)
    tl.store(to + 2, g2, mask=mask)
    tl.store(to + 3, p1 * g2 - p2 * g1 + c0, mask=mask)
    tl.store(to + 4, p2 * g0 - p0 * g2 + c1, mask=mask)
    tl.store(to + 5, p0 * g1 - p1 * g0 + c2, mask=mask)


@triton.jit
@no_type_check
def channel_slope(sh, row, channel, mask, d0, d1, d2, COEFFICIENTS: tl.constexpr):
    """Derivative of one colour channel by its unit direction, across it."""
    g0, g1, g2 = d0 * 0, d0 * 0, d0 * 0
    for k in tl.static_range(1, COEFFICIENTS):
        _value, h0, h1, h2 = harmonic(k, d0, d1, d2)
        value = tl.load(sh + (row * COEFFICIENTS + k) * 3 + channel, mask=mask, other=0.0)
        g0 += h0 * value
        g1 += h1 * value
        g2 += h2 * value
    along = dot3(d0, d1, d2, g0, g1, g2)
    return g0 - d0 * along, g1 - d1 * along, g2 - d2 * along


@triton.jit
@no_type_check
def twist_slopes(
    means, quats, scales, sh, index, Ts, K, set_of_image, slopes, n, links, width, height,
    COEFFICIENTS: tl.constexpr, AXIS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Derivatives of each (image, splat) by a twist [v; w] in the camera frame: screen mean, covariance, colour."""
    image, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    row = tl.load(set_of_image + image).to(tl.int64) * n + i
    fx, cx = tl.load(K + image * 9), tl.load(K + image * 9 + 2)
    fy, cy = tl.load(K + image * 9 + 4), tl.load(K + image * 9 + 5)
    a00, a01, a02, t0, a10, a11, a12, t1, a20, a21, a22, t2, _ = load_transform(
        Ts, image, index, index, i, mask, links, 1, False
    )
    m0, m1, m2 = load3(means, row, mask)
    qw, qx, qy, qz = load_quat(quats, row, mask)
    s0, s1, s2 = load3(scales, row, mask)
    p0, p1, p2 = times(a00, a01, a02, a10, a11, a12, a20, a21, a22, m0, m1, m2)
    p0, p1, p2 = p0 + t0, p1 + t1, p2 + t2
    z = tl.where(p2 < NEAR, 1.0, p2)
    sx, in_x = slope(p0, z, fx, cx, width)
    sy, in_y = slope(p1, z, fy, cy, height)
    jx, jy, jxz, jyz = fx / z, fy / z, -fx * sx / z, -fy * sy / z
    shrink = 1.0 / tl.sqrt(qw * qw + dot3(qx, qy, qz, qx, qy, qz))
    R00, R01, R02, R10, R11, R12, R20, R21, R22 = rotation(qw * shrink, qx * shrink, qy * shrink, qz * shrink)
    b00, b01, b02, b10, b11, b12 = R00 * s0, R01 * s1, R02 * s2, R10 * s0, R11 * s1, R12 * s2
    b20, b21, b22 = R20 * s0, R21 * s1, R22 * s2
    M00, M10, M20 = times(a00, a01, a02, a10, a11, a12, a20, a21, a22, b00, b10, b20)
    M01, M11, M21 = times(a00, a01, a02, a10, a11, a12, a20, a21, a22, b01, b11, b21)
    M02, M12, M22 = times(a00, a01, a02, a10, a11, a12, a20, a21, a22, b02, b12, b22)
    # Rows e, f of J M; u = M e^T and w = M f^T are the columns of S J^T.
    e0, e1, e2 = jx * M00 + jxz * M20, jx * M01 + jxz * M21, jx * M02 + jxz * M22
    f0, f1, f2 = jy * M10 + jyz * M20, jy * M11 + jyz * M21, jy * M12 + jyz * M22
    u0, u1, u2 = times(M00, M01, M02, M10, M11, M12, M20, M21, M22, e0, e1, e2)
    w0, w1, w2 = times(M00, M01, M02, M10, M11, M12, M20, M21, M22, f0, f1, f2)
    # d(row of J)/dp . vector: first row (x) with u and w, second row (y) likewise; only p_x, p_z and p_y, p_z enter.
    kx, ky = tl.where(in_x, jx / z, 0.0), tl.where(in_y, jy / z, 0.0)
    xu_x, xw_x, yu_y, yw_y = -kx * u2, -kx * w2, -ky * u2, -ky * w2
    xu_z, xw_z = -(jx * u0 + jxz * u2) / z + kx * p0 / z * u2, -(jx * w0 + jxz * w2) / z + kx * p0 / z * w2
    yu_z, yw_z = -(jy * u1 + jyz * u2) / z + ky * p1 / z * u2, -(jy * w1 + jyz * w2) / z + ky * p1 / z * w2
    none = p0 * 0
    to = slopes + (image * n + i) * SLOPES
    store_row(to, mask, jx, none, -jx * p0 / z, p0, p1, p2, none, none, none)
    store_row(to + 6, mask, none, jy, -jy * p1 / z, p0, p1, p2, none, none, none)
    # J dS J^T (a, b) = w . (u_b x j_a + u_a x j_b), with j = (jx, 0, jxz) and (0, jy, jyz).
    store_row(to + 12, mask, 2 * xu_x, none, 2 * xu_z, p0, p1, p2, 2 * u1 * jxz, 2 * (u2 * jx - u0 * jxz), -2 * u1 * jx)
    store_row(
        to + 18, mask, xw_x, yu_y, xw_z + yu_z, p0, p1, p2,
        w1 * jxz + u1 * jyz - u2 * jy, w2 * jx - w0 * jxz - u0 * jyz, u0 * jy - w1 * jx,
    )  # fmt: skip
    store_row(to + 24, mask, none, 2 * yw_y, 2 * yw_z, p0, p1, p2, 2 * (w1 * jyz - w2 * jy), -2 * w0 * jyz, 2 * w0 * jy)
    # From the camera's centre, colours see m + A^T t, which a turn leaves alone and a shift v moves by A^T v; along its
    # axis, A^T z, which a shift leaves alone and a turn w moves by A^T (z x w).
    near, z0, z1, z2 = eye(t0, t1, t2, AXIS)
    d0, d1, d2 = times(a00, a10, a20, a01, a11, a21, a02, a12, a22, z0, z1, z2)
    d0, d1, d2 = near * m0 + d0, near * m1 + d1, near * m2 + d2
    inverse = inverse_length(d0, d1, d2)
    d0, d1, d2 = d0 * inverse, d1 * inverse, d2 * inverse
    red, green, blue = colour(sh, row, mask, d0, d1, d2, COEFFICIENTS)
    for channel in tl.static_range(3):
        g0, g1, g2 = channel_slope(sh, row, channel, mask, d0, d1, d2, COEFFICIENTS)
        shade = red
        if channel == 1:
            shade = green
        if channel == 2:
            shade = blue
        factor = tl.where(shade >= 0, inverse, 0.0)
        v0, v1, v2 = times(a00, a01, a02, a10, a11, a12, a20, a21, a22, g0 * factor, g1 * factor, g2 * factor)
        if AXIS:
            v0, v1, v2 = v1, -v0, none
        store3(to + 30 + 3 * channel, 0, mask, v0, v1, v2)


@triton.jit
@no_type_check
def falloff_slope(to, k: tl.constexpr, cx, cy):
    """Derivative of sigma by twist component k."""
    screen = cx * tl.load(to + k) + cy * tl.load(to + 6 + k)
    spread = cx * cx * tl.load(to + 12 + k) + 2 * cx * cy * tl.load(to + 18 + k) + cy * cy * tl.load(to + 24 + k)
    return screen - 0.5 * spread


@triton.jit
@no_type_check
def write_block(to, lane, root, error, J0, J1, J2, J3, J4, J5, g0, g1, g2, g3, g4, g5, P: tl.constexpr):
    """Store one channel of a block, times the root of its weight; add its share of J^T W r."""
    J0, J1, J2, J3, J4, J5 = J0 * root, J1 * root, J2 * root, J3 * root, J4 * root, J5 * root
    tl.store(to + lane, J0)
    tl.store(to + 4 * P + lane, J1)
    tl.store(to + 8 * P + lane, J2)
    tl.store(to + 12 * P + lane, J3)
    tl.store(to + 16 * P + lane, J4)
    tl.store(to + 20 * P + lane, J5)
    return g0 + J0 * error, g1 + J1 * error, g2 + J2 * error, g3 + J3 * error, g4 + J4 * error, g5 + J5 * error


@triton.jit
@no_type_check
def jacobian_blocks(
    record, slopes, index, starts, rows, tile_of, link_of, behind, roots, errors, left, last, blocks, gradients,
    n, tiles_x, tiles, width, height, AXIS: tl.constexpr, TILE_X: tl.constexpr, TILE_Y: tl.constexpr,
):  # fmt: skip
    """One (tile, link): its block (6, 4, pixels) and its share (6,) of J^T W r. Back to front as `blend_backward`:
    a channel changes by ``(T_k c_k - sum_(j>k) w_j c_j / (1 - alpha_k)) dalpha_k + w_k dc_k``, c over the backdrop."""
    program = tl.program_id(0).to(tl.int64)
    number, link = tl.load(tile_of + program), tl.load(link_of + program)
    _image, pixel, inside, x, y = tile_pixels(number, tiles_x, tiles, width, height, TILE_X, TILE_Y)
    start = tl.load(starts + number)
    T = tl.load(left + pixel, mask=inside, other=1.0)
    final = tl.load(last + pixel, mask=inside, other=-1)
    tint_r, tint_g, tint_b = load3(behind, pixel, inside)
    z = T * 0
    sum_r, sum_g, sum_b, sum_a = z, z, z, z
    r0, r1, r2, r3, r4, r5 = z, z, z, z, z, z
    g0, g1, g2, g3, g4, g5 = z, z, z, z, z, z
    b0, b1, b2, b3, b4, b5 = z, z, z, z, z, z
    a0, a1, a2, a3, a4, a5 = z, z, z, z, z, z
    k = tl.max(final)
    while k >= start:
        row = tl.load(rows + k).to(tl.int64)
        raw, _, cx, cy = coverage(record, row, x, y)
        hit = (raw >= ALPHA_MIN) & (k <= final)
        if tl.max(hit.to(tl.int32)) > 0:
            base = record + row * RECORD
            alpha = tl.where(hit, tl.minimum(raw, ALPHA_MAX), 0.0)
            share = 1.0 / (1.0 - alpha)
            T = T * share
            weight = alpha * T
            red, green, blue = tl.load(base + 6) - tint_r, tl.load(base + 7) - tint_g, tl.load(base + 8) - tint_b
            if tl.load(index + row % n) == link:
                to = slopes + row * SLOPES
                moved = tl.where(hit & (raw <= ALPHA_MAX), -raw, 0.0)
                v_r, v_g = (T * red - sum_r * share) * moved, (T * green - sum_g * share) * moved
                v_b, v_a = (T * blue - sum_b * share) * moved, (T - sum_a * share) * moved
                h = falloff_slope(to, 0, cx, cy)
                r0, g0, b0, a0 = r0 + v_r * h, g0 + v_g * h, b0 + v_b * h, a0 + v_a * h
                h = falloff_slope(to, 1, cx, cy)
                r1, g1, b1, a1 = r1 + v_r * h, g1 + v_g * h, b1 + v_b * h, a1 + v_a * h
                h = falloff_slope(to, 2, cx, cy)
                r2, g2, b2, a2 = r2 + v_r * h, g2 + v_g * h, b2 + v_b * h, a2 + v_a * h
                h = falloff_slope(to, 3, cx, cy)
                r3, g3, b3, a3 = r3 + v_r * h, g3 + v_g * h, b3 + v_b * h, a3 + v_a * h
                h = falloff_slope(to, 4, cx, cy)
                r4, g4, b4, a4 = r4 + v_r * h, g4 + v_g * h, b4 + v_b * h, a4 + v_a * h
                h = falloff_slope(to, 5, cx, cy)
                r5, g5, b5, a5 = r5 + v_r * h, g5 + v_g * h, b5 + v_b * h, a5 + v_a * h
                c0, c1, c2 = weight * tl.load(to + 30), weight * tl.load(to + 31), weight * tl.load(to + 32)
                d0, d1, d2 = weight * tl.load(to + 33), weight * tl.load(to + 34), weight * tl.load(to + 35)
                e0, e1, e2 = weight * tl.load(to + 36), weight * tl.load(to + 37), weight * tl.load(to + 38)
                if AXIS:
                    r3, r4, r5, g3, g4, g5 = r3 + c0, r4 + c1, r5 + c2, g3 + d0, g4 + d1, g5 + d2
                    b3, b4, b5 = b3 + e0, b4 + e1, b5 + e2
                else:
                    r0, r1, r2, g0, g1, g2 = r0 + c0, r1 + c1, r2 + c2, g0 + d0, g1 + d1, g2 + d2
                    b0, b1, b2 = b0 + e0, b1 + e1, b2 + e2
            sum_r += weight * red
            sum_g += weight * green
            sum_b += weight * blue
            sum_a += weight
        k -= 1
    P: tl.constexpr = TILE_X * TILE_Y
    lane = tl.arange(0, P)
    to = blocks + program * (24 * P)
    root = tl.load(roots + pixel * 2, mask=inside, other=0.0)
    e_r = tl.load(errors + pixel * 4, mask=inside, other=0.0)
    e_g = tl.load(errors + pixel * 4 + 1, mask=inside, other=0.0)
    e_b = tl.load(errors + pixel * 4 + 2, mask=inside, other=0.0)
    e_a = tl.load(errors + pixel * 4 + 3, mask=inside, other=0.0)
    s0, s1, s2, s3, s4, s5 = write_block(to, lane, root, e_r, r0, r1, r2, r3, r4, r5, z, z, z, z, z, z, P)
    s0, s1, s2, s3, s4, s5 = write_block(to + P, lane, root, e_g, g0, g1, g2, g3, g4, g5, s0, s1, s2, s3, s4, s5, P)
    s0, s1, s2, s3, s4, s5 = write_block(to + 2 * P, lane, root, e_b, b0, b1, b2, b3, b4, b5, s0, s1, s2, s3, s4, s5, P)
    root = tl.load(roots + pixel * 2 + 1, mask=inside, other=0.0)
    s0, s1, s2, s3, s4, s5 = write_block(to + 3 * P, lane, root, e_a, a0, a1, a2, a3, a4, a5, s0, s1, s2, s3, s4, s5, P)
    store3(gradients, program * 2, True, tl.sum(s0), tl.sum(s1), tl.sum(s2))
    store3(gradients, program * 2 + 1, True, tl.sum(s3), tl.sum(s4), tl.sum(s5))


@triton.jit
@no_type_check
def block_products(blocks, first_of, second_of, products, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    """J_a J_b^T of two blocks ``(6, COLUMNS)`` of one tile, into ``(16, 16)`` of which 6 x 6 count."""
    program = tl.program_id(0).to(tl.int64)
    line, column = tl.arange(0, 16), tl.arange(0, STEP)
    mask = (line < 6)[:, None] & (column < STEP)[None, :]
    place = line[:, None] * COLUMNS + column[None, :]
    a = blocks + tl.load(first_of + program) * (6 * COLUMNS) + place
    b = blocks + tl.load(second_of + program) * (6 * COLUMNS) + place
    total = tl.zeros((16, 16), tl.float32)
    for j in tl.static_range(0, COLUMNS, STEP):
        left, right = tl.load(a + j, mask=mask, other=0.0), tl.load(b + j, mask=mask, other=0.0)
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
    out = products + program * 36 + line[:, None] * 6 + line[None, :]
    tl.store(out, total, mask=(line < 6)[:, None] & (line < 6)[None, :])
