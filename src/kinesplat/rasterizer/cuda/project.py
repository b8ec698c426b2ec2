"""Projection of splats on links into images, forward and backward, as Triton kernels: one program per block of splats
and image. The mathematics is that of `kinesplat.rasterizer.projection`; derivatives by hand."""

from typing import no_type_check

import triton
import triton.language as tl

from kinesplat.rasterizer.cuda.splat import (
    ALPHA_MIN,
    NEAR,
    RECORD,
    SUMS,
    colour,
    dot3,
    eye,
    harmonic,
    inverse_length,
    load_transform,
    rotation,
    slope,
)


@triton.jit
@no_type_check
def project_forward(
    means, quats, scales, opacities, sh, index, weights, Ts, K, background, set_of_image,
    record, box, count, bad,
    n, links, width, height, eps2d,
    M: tl.constexpr, WEIGHTED: tl.constexpr, COEFFICIENTS: tl.constexpr, AXIS: tl.constexpr,
    TILE_X: tl.constexpr, TILE_Y: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes records, first tiles and tile counts of each (image, splat); `bad` counts values that are no input."""
    image, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    row = tl.load(set_of_image + image).to(tl.int64) * n + i
    fx, skew, cx = tl.load(K + image * 9), tl.load(K + image * 9 + 1), tl.load(K + image * 9 + 2)
    fy, cy = tl.load(K + image * 9 + 4), tl.load(K + image * 9 + 5)
    a00, a01, a02, t0, a10, a11, a12, t1, a20, a21, a22, t2, outside = load_transform(
        Ts, image, index, weights, i, mask, links, M, WEIGHTED
    )
    m0, m1, m2 = (
        tl.load(means + row * 3, mask=mask, other=0.0),
        tl.load(means + row * 3 + 1, mask=mask, other=0.0),
        tl.load(means + row * 3 + 2, mask=mask, other=0.0),
    )
    qw, qx, qy, qz = (
        tl.load(quats + row * 4, mask=mask, other=1.0),
        tl.load(quats + row * 4 + 1, mask=mask, other=0.0),
        tl.load(quats + row * 4 + 2, mask=mask, other=0.0),
        tl.load(quats + row * 4 + 3, mask=mask, other=0.0),
    )
    s0, s1, s2 = (
        tl.load(scales + row * 3, mask=mask, other=0.0),
        tl.load(scales + row * 3 + 1, mask=mask, other=0.0),
        tl.load(scales + row * 3 + 2, mask=mask, other=0.0),
    )
    o = tl.load(opacities + row, mask=mask, other=0.0)
    p0 = dot3(a00, a01, a02, m0, m1, m2) + t0
    p1 = dot3(a10, a11, a12, m0, m1, m2) + t1
    p2 = dot3(a20, a21, a22, m0, m1, m2) + t2
    near, z0, z1, z2 = eye(t0, t1, t2, AXIS)
    d0 = near * m0 + dot3(a00, a10, a20, z0, z1, z2)
    d1 = near * m1 + dot3(a01, a11, a21, z0, z1, z2)
    d2 = near * m2 + dot3(a02, a12, a22, z0, z1, z2)
    inverse = inverse_length(d0, d1, d2)
    red, green, blue = colour(sh, row, mask, d0 * inverse, d1 * inverse, d2 * inverse, COEFFICIENTS)

    length = tl.sqrt(qw * qw + dot3(qx, qy, qz, qx, qy, qz))
    R00, R01, R02, R10, R11, R12, R20, R21, R22 = rotation(qw / length, qx / length, qy / length, qz / length)
    behind = p2 < NEAR
    z = tl.where(behind, 1.0, p2)
    sx, _ = slope(p0, z, fx, cx, width)
    sy, _ = slope(p1, z, fy, cy, height)
    jx, jy, jxz, jyz = fx / z, fy / z, -fx * sx / z, -fy * sy / z
    u0, u1, u2 = jx * a00 + jxz * a20, jx * a01 + jxz * a21, jx * a02 + jxz * a22
    v0, v1, v2 = jy * a10 + jyz * a20, jy * a11 + jyz * a21, jy * a12 + jyz * a22
    ru0, ru1, ru2 = (
        s0 * dot3(u0, u1, u2, R00, R10, R20),
        s1 * dot3(u0, u1, u2, R01, R11, R21),
        s2 * dot3(u0, u1, u2, R02, R12, R22),
    )
    rv0, rv1, rv2 = (
        s0 * dot3(v0, v1, v2, R00, R10, R20),
        s1 * dot3(v0, v1, v2, R01, R11, R21),
        s2 * dot3(v0, v1, v2, R02, R12, R22),
    )
    Sxx = dot3(ru0, ru1, ru2, ru0, ru1, ru2) + eps2d
    Sxy = dot3(ru0, ru1, ru2, rv0, rv1, rv2)
    Syy = dot3(rv0, rv1, rv2, rv0, rv1, rv2) + eps2d
    # The determinant of J S J^T as a sum of squares: a needle's would cancel in Sxx Syy - Sxy Sxy.
    c0, c1, c2 = ru1 * rv2 - ru2 * rv1, ru2 * rv0 - ru0 * rv2, ru0 * rv1 - ru1 * rv0
    determinant = dot3(c0, c1, c2, c0, c1, c2) + eps2d * (Sxx + Syy - eps2d)
    x, y = fx * p0 / z + cx, fy * p1 / z + cy

    finite = (m0 - m0) + (m1 - m1) + (m2 - m2) + (s0 - s0) + (s1 - s1) + (s2 - s2) + (o - o)
    finite += (length - length) + (p0 - p0) + (p1 - p1) + (p2 - p2) + (fx - fx) + (fy - fy) + (cx - cx) + (cy - cy)
    finite += (red - red) + (green - green) + (blue - blue)
    for c in tl.static_range(3):
        tint = tl.load(background + image * 3 + c)
        finite += tint - tint
    lens = tl.where((fx > 0.0) & (fy > 0.0) & (skew == 0.0), 1.0, 0.0)
    known = (finite == 0.0) & (outside == 0) & (length * lens > 0.0)
    tl.store(bad + image * tl.num_programs(1) + block, tl.sum((mask & (known == 0)).to(tl.int32)))

    reach = 2.0 * tl.log(tl.maximum(o, ALPHA_MIN) / ALPHA_MIN) * 1.001 + 1e-3
    ex, ey = tl.sqrt(reach * Sxx), tl.sqrt(reach * Syy)
    placed = ((ex - ex) + (ey - ey) + (x - x) + (y - y)) == 0.0
    shown = mask & known & placed & (behind == 0) & (o >= ALPHA_MIN)
    x0 = tl.minimum(tl.maximum(tl.ceil(tl.where(shown, x - ex - 0.5, 0.0)), 0.0), width).to(tl.int32)
    x1 = tl.minimum(tl.maximum(tl.floor(tl.where(shown, x + ex - 0.5, 0.0)), -1.0), width - 1.0).to(tl.int32)
    y0 = tl.minimum(tl.maximum(tl.ceil(tl.where(shown, y - ey - 0.5, 0.0)), 0.0), height).to(tl.int32)
    y1 = tl.minimum(tl.maximum(tl.floor(tl.where(shown, y + ey - 0.5, 0.0)), -1.0), height - 1.0).to(tl.int32)
    shown = shown & (x0 <= x1) & (y0 <= y1)
    tiles_x, tiles_y = x1 // TILE_X - x0 // TILE_X + 1, y1 // TILE_Y - y0 // TILE_Y + 1

    out = image * n + i
    tl.store(count + out, tl.where(shown, tiles_x * tiles_y, 0), mask=mask)
    tl.store(box + out * 4, x0 // TILE_X, mask=mask)
    tl.store(box + out * 4 + 1, y0 // TILE_Y, mask=mask)
    tl.store(box + out * 4 + 2, tiles_x, mask=mask)
    base = record + out * RECORD
    tl.store(base, x, mask=mask)
    tl.store(base + 1, y, mask=mask)
    tl.store(base + 2, Syy / determinant, mask=mask)
    tl.store(base + 3, -Sxy / determinant, mask=mask)
    tl.store(base + 4, Sxx / determinant, mask=mask)
    tl.store(base + 5, o, mask=mask)
    tl.store(base + 6, tl.maximum(red, 0.0), mask=mask)
    tl.store(base + 7, tl.maximum(green, 0.0), mask=mask)
    tl.store(base + 8, tl.maximum(blue, 0.0), mask=mask)
    tl.store(base + 9, p2, mask=mask)


@triton.jit
@no_type_check
def project_backward(
    means, quats, scales, sh, index, weights, Ts, K, set_of_image,
    sums, v_means, v_quats, v_scales, v_opacities, v_sh, v_Ts, v_K,
    n, links, width, height,
    M: tl.constexpr, WEIGHTED: tl.constexpr, COEFFICIENTS: tl.constexpr, AXIS: tl.constexpr,
    MEANS: tl.constexpr, SHAPES: tl.constexpr, OPACITIES: tl.constexpr, SH: tl.constexpr,
    POSES: tl.constexpr, INTRINSICS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From `sums` (images, n, SUMS) to gradients per (image, splat); v_K per program: fx, fy, cx, cy."""
    image, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    out = image * n + i
    row = tl.load(set_of_image + image).to(tl.int64) * n + i
    grad = sums + out * SUMS
    mask = i < n
    fx, cx = tl.load(K + image * 9), tl.load(K + image * 9 + 2)
    fy, cy = tl.load(K + image * 9 + 4), tl.load(K + image * 9 + 5)
    a00, a01, a02, t0, a10, a11, a12, t1, a20, a21, a22, t2, _ = load_transform(
        Ts, image, index, weights, i, mask, links, M, WEIGHTED
    )
    m0, m1, m2 = (
        tl.load(means + row * 3, mask=mask, other=0.0),
        tl.load(means + row * 3 + 1, mask=mask, other=0.0),
        tl.load(means + row * 3 + 2, mask=mask, other=0.0),
    )
    g0, g1 = tl.load(grad, mask=mask, other=0.0), tl.load(grad + 1, mask=mask, other=0.0)
    gxx, gxy = tl.load(grad + 2, mask=mask, other=0.0), tl.load(grad + 3, mask=mask, other=0.0)
    gyy, go = tl.load(grad + 4, mask=mask, other=0.0), tl.load(grad + 5, mask=mask, other=0.0)
    gr, gg = tl.load(grad + 6, mask=mask, other=0.0), tl.load(grad + 7, mask=mask, other=0.0)
    gb, gz = tl.load(grad + 8, mask=mask, other=0.0), tl.load(grad + 9, mask=mask, other=0.0)
    if OPACITIES:
        tl.store(v_opacities + out, go, mask=mask)

    # Colour: through the clamp, the harmonics and the unit direction to the offset m + A^T t.
    near, z0, z1, z2 = eye(t0, t1, t2, AXIS)
    d0 = near * m0 + dot3(a00, a10, a20, z0, z1, z2)
    d1 = near * m1 + dot3(a01, a11, a21, z0, z1, z2)
    d2 = near * m2 + dot3(a02, a12, a22, z0, z1, z2)
    inverse = inverse_length(d0, d1, d2)
    d0, d1, d2 = d0 * inverse, d1 * inverse, d2 * inverse
    red, green, blue = colour(sh, row, mask, d0, d1, d2, COEFFICIENTS)
    gr, gg, gb = tl.where(red >= 0, gr, 0.0), tl.where(green >= 0, gg, 0.0), tl.where(blue >= 0, gb, 0.0)
    e0, e1, e2 = d0 * 0, d0 * 0, d0 * 0
    for k in tl.static_range(COEFFICIENTS):
        Y, h0, h1, h2 = harmonic(k, d0, d1, d2)
        if k > 0:
            base = sh + (row * COEFFICIENTS + k) * 3
            inner = gr * tl.load(base, mask=mask, other=0.0)
            inner += gg * tl.load(base + 1, mask=mask, other=0.0)
            inner += gb * tl.load(base + 2, mask=mask, other=0.0)
            e0 += h0 * inner
            e1 += h1 * inner
            e2 += h2 * inner
        if SH:
            base = v_sh + (out * COEFFICIENTS + k) * 3
            tl.store(base, Y * gr, mask=mask)
            tl.store(base + 1, Y * gg, mask=mask)
            tl.store(base + 2, Y * gb, mask=mask)
    along = dot3(d0, d1, d2, e0, e1, e2)
    e0, e1, e2 = (e0 - d0 * along) * inverse, (e1 - d1 * along) * inverse, (e2 - d2 * along) * inverse

    if MEANS | SHAPES | POSES | INTRINSICS:
        qw, qx, qy, qz = (
            tl.load(quats + row * 4, mask=mask, other=1.0),
            tl.load(quats + row * 4 + 1, mask=mask, other=0.0),
            tl.load(quats + row * 4 + 2, mask=mask, other=0.0),
            tl.load(quats + row * 4 + 3, mask=mask, other=0.0),
        )
        s0, s1, s2 = (
            tl.load(scales + row * 3, mask=mask, other=0.0),
            tl.load(scales + row * 3 + 1, mask=mask, other=0.0),
            tl.load(scales + row * 3 + 2, mask=mask, other=0.0),
        )
        shrink = 1.0 / tl.sqrt(qw * qw + dot3(qx, qy, qz, qx, qy, qz))
        qw, qx, qy, qz = qw * shrink, qx * shrink, qy * shrink, qz * shrink
        R00, R01, R02, R10, R11, R12, R20, R21, R22 = rotation(qw, qx, qy, qz)
        p0 = dot3(a00, a01, a02, m0, m1, m2) + t0
        p1 = dot3(a10, a11, a12, m0, m1, m2) + t1
        p2 = dot3(a20, a21, a22, m0, m1, m2) + t2
        z = tl.where(p2 < NEAR, 1.0, p2)
        sx, in_x = slope(p0, z, fx, cx, width)
        sy, in_y = slope(p1, z, fy, cy, height)
        jx, jy, jxz, jyz = fx / z, fy / z, -fx * sx / z, -fy * sy / z
        # Axes B = R S in the link frame, M = A B in the camera's; rows ru, rv of J M.
        b00, b01, b02, b10, b11, b12 = R00 * s0, R01 * s1, R02 * s2, R10 * s0, R11 * s1, R12 * s2
        b20, b21, b22 = R20 * s0, R21 * s1, R22 * s2
        M00, M01 = dot3(a00, a01, a02, b00, b10, b20), dot3(a00, a01, a02, b01, b11, b21)
        M02, M10 = dot3(a00, a01, a02, b02, b12, b22), dot3(a10, a11, a12, b00, b10, b20)
        M11, M12 = dot3(a10, a11, a12, b01, b11, b21), dot3(a10, a11, a12, b02, b12, b22)
        M20, M21 = dot3(a20, a21, a22, b00, b10, b20), dot3(a20, a21, a22, b01, b11, b21)
        M22 = dot3(a20, a21, a22, b02, b12, b22)
        ru0, ru1, ru2 = jx * M00 + jxz * M20, jx * M01 + jxz * M21, jx * M02 + jxz * M22
        rv0, rv1, rv2 = jy * M10 + jyz * M20, jy * M11 + jyz * M21, jy * M12 + jyz * M22
        gu0, gu1, gu2 = 2 * gxx * ru0 + gxy * rv0, 2 * gxx * ru1 + gxy * rv1, 2 * gxx * ru2 + gxy * rv2
        gv0, gv1, gv2 = 2 * gyy * rv0 + gxy * ru0, 2 * gyy * rv1 + gxy * ru1, 2 * gyy * rv2 + gxy * ru2
        gjx, gjxz = dot3(M00, M01, M02, gu0, gu1, gu2), dot3(M20, M21, M22, gu0, gu1, gu2)
        gjy, gjyz = dot3(M10, M11, M12, gv0, gv1, gv2), dot3(M20, M21, M22, gv0, gv1, gv2)
        gsx, gsy = -gjxz * jx, -gjyz * jy
        # jx = fx / z, jxz = -fx sx / z, sx = clamp(x / z), mean = fx x / z + cx; the same for y.
        gp0 = g0 * jx + tl.where(in_x, gsx / z, 0.0)
        gp1 = g1 * jy + tl.where(in_y, gsy / z, 0.0)
        gp2 = gz - (gjx * jx + gjxz * jxz + gjy * jy + gjyz * jyz) / z
        gp2 -= (g0 * jx + tl.where(in_x, gsx / z, 0.0)) * p0 / z + (g1 * jy + tl.where(in_y, gsy / z, 0.0)) * p1 / z
        if INTRINSICS:
            part = v_K + (image * tl.num_programs(1) + block) * 4
            v_fx = g0 * p0 / z + (gjx - gjxz * sx) / z + tl.where(in_x, 0.0, -gsx * sx / fx)
            v_fy = g1 * p1 / z + (gjy - gjyz * sy) / z + tl.where(in_y, 0.0, -gsy * sy / fy)
            tl.store(part, tl.sum(tl.where(mask, v_fx, 0.0)))
            tl.store(part + 1, tl.sum(tl.where(mask, v_fy, 0.0)))
            tl.store(part + 2, tl.sum(tl.where(mask, g0 + tl.where(in_x, 0.0, -gsx / fx), 0.0)))
            tl.store(part + 3, tl.sum(tl.where(mask, g1 + tl.where(in_y, 0.0, -gsy / fy), 0.0)))
        if MEANS:
            base = v_means + out * 3
            tl.store(base, dot3(a00, a10, a20, gp0, gp1, gp2) + near * e0, mask=mask)
            tl.store(base + 1, dot3(a01, a11, a21, gp0, gp1, gp2) + near * e1, mask=mask)
            tl.store(base + 2, dot3(a02, a12, a22, gp0, gp1, gp2) + near * e2, mask=mask)
        if POSES | SHAPES:
            gM00, gM01, gM02, gM10, gM11, gM12 = jx * gu0, jx * gu1, jx * gu2, jy * gv0, jy * gv1, jy * gv2
            gM20, gM21, gM22 = jxz * gu0 + jyz * gv0, jxz * gu1 + jyz * gv1, jxz * gu2 + jyz * gv2
        if POSES:
            base = v_Ts + out * 12
            tl.store(base, dot3(gM00, gM01, gM02, b00, b01, b02) + gp0 * m0 + z0 * e0, mask=mask)
            tl.store(base + 1, dot3(gM00, gM01, gM02, b10, b11, b12) + gp0 * m1 + z0 * e1, mask=mask)
            tl.store(base + 2, dot3(gM00, gM01, gM02, b20, b21, b22) + gp0 * m2 + z0 * e2, mask=mask)
            tl.store(base + 3, gp0 + near * dot3(a00, a01, a02, e0, e1, e2), mask=mask)
            tl.store(base + 4, dot3(gM10, gM11, gM12, b00, b01, b02) + gp1 * m0 + z1 * e0, mask=mask)
            tl.store(base + 5, dot3(gM10, gM11, gM12, b10, b11, b12) + gp1 * m1 + z1 * e1, mask=mask)
            tl.store(base + 6, dot3(gM10, gM11, gM12, b20, b21, b22) + gp1 * m2 + z1 * e2, mask=mask)
            tl.store(base + 7, gp1 + near * dot3(a10, a11, a12, e0, e1, e2), mask=mask)
            tl.store(base + 8, dot3(gM20, gM21, gM22, b00, b01, b02) + gp2 * m0 + z2 * e0, mask=mask)
            tl.store(base + 9, dot3(gM20, gM21, gM22, b10, b11, b12) + gp2 * m1 + z2 * e1, mask=mask)
            tl.store(base + 10, dot3(gM20, gM21, gM22, b20, b21, b22) + gp2 * m2 + z2 * e2, mask=mask)
            tl.store(base + 11, gp2 + near * dot3(a20, a21, a22, e0, e1, e2), mask=mask)
        if SHAPES:
            gb00, gb01 = dot3(a00, a10, a20, gM00, gM10, gM20), dot3(a00, a10, a20, gM01, gM11, gM21)
            gb02, gb10 = dot3(a00, a10, a20, gM02, gM12, gM22), dot3(a01, a11, a21, gM00, gM10, gM20)
            gb11, gb12 = dot3(a01, a11, a21, gM01, gM11, gM21), dot3(a01, a11, a21, gM02, gM12, gM22)
            gb20, gb21 = dot3(a02, a12, a22, gM00, gM10, gM20), dot3(a02, a12, a22, gM01, gM11, gM21)
            gb22 = dot3(a02, a12, a22, gM02, gM12, gM22)
            base = v_scales + out * 3
            tl.store(base, dot3(gb00, gb10, gb20, R00, R10, R20), mask=mask)
            tl.store(base + 1, dot3(gb01, gb11, gb21, R01, R11, R21), mask=mask)
            tl.store(base + 2, dot3(gb02, gb12, gb22, R02, R12, R22), mask=mask)
            gb00, gb01, gb02 = gb00 * s0, gb01 * s1, gb02 * s2
            gb10, gb11, gb12 = gb10 * s0, gb11 * s1, gb12 * s2
            gb20, gb21, gb22 = gb20 * s0, gb21 * s1, gb22 * s2
            gw = 2 * dot3(qx, qy, qz, gb21 - gb12, gb02 - gb20, gb10 - gb01)
            gx = 2 * (dot3(qy, qz, qw, gb01 + gb10, gb02 + gb20, gb21 - gb12) - 2 * qx * (gb11 + gb22))
            gy = 2 * (dot3(qx, qz, qw, gb01 + gb10, gb12 + gb21, gb02 - gb20) - 2 * qy * (gb00 + gb22))
            gq = 2 * (dot3(qx, qy, qw, gb02 + gb20, gb12 + gb21, gb10 - gb01) - 2 * qz * (gb00 + gb11))
            along = qw * gw + dot3(qx, qy, qz, gx, gy, gq)
            base = v_quats + out * 4
            tl.store(base, (gw - qw * along) * shrink, mask=mask)
            tl.store(base + 1, (gx - qx * along) * shrink, mask=mask)
            tl.store(base + 2, (gy - qy * along) * shrink, mask=mask)
            tl.store(base + 3, (gq - qz * along) * shrink, mask=mask)
