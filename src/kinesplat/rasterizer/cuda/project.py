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
    load3,
    load_quat,
    load_transform,
    rotation,
    slope,
    store3,
    times,
)


@triton.jit
@no_type_check
def span(centre, reach, shown, limit):
    """First and last pixel whose centre is within reach, cut to the image; the last is before the first where none."""
    first = tl.ceil(tl.where(shown, centre - reach - 0.5, 0.0))
    last = tl.floor(tl.where(shown, centre + reach - 0.5, 0.0))
    first = tl.minimum(tl.maximum(first, 0.0), limit).to(tl.int32)
    return first, tl.minimum(tl.maximum(last, -1.0), limit - 1.0).to(tl.int32)


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
    m0, m1, m2 = load3(means, row, mask)
    qw, qx, qy, qz = load_quat(quats, row, mask)
    s0, s1, s2 = load3(scales, row, mask)
    o = tl.load(opacities + row, mask=mask, other=0.0)
    p0, p1, p2 = times(a00, a01, a02, a10, a11, a12, a20, a21, a22, m0, m1, m2)
    p0, p1, p2 = p0 + t0, p1 + t1, p2 + t2
    near, z0, z1, z2 = eye(t0, t1, t2, AXIS)
    d0, d1, d2 = times(a00, a10, a20, a01, a11, a21, a02, a12, a22, z0, z1, z2)
    d0, d1, d2 = near * m0 + d0, near * m1 + d1, near * m2 + d2
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
    u0, u1, u2 = times(R00, R10, R20, R01, R11, R21, R02, R12, R22, u0, u1, u2)
    v0, v1, v2 = times(R00, R10, R20, R01, R11, R21, R02, R12, R22, v0, v1, v2)
    ru0, ru1, ru2, rv0, rv1, rv2 = s0 * u0, s1 * u1, s2 * u2, s0 * v0, s1 * v1, s2 * v2
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
    x0, x1 = span(x, ex, shown, width)
    y0, y1 = span(y, ey, shown, height)
    shown = shown & (x0 <= x1) & (y0 <= y1)
    tiles_x, tiles_y = x1 // TILE_X - x0 // TILE_X + 1, y1 // TILE_Y - y0 // TILE_Y + 1

    out = image * n + i
    tl.store(count + out, tl.where(shown, tiles_x * tiles_y, 0), mask=mask)
    tl.store(box + out * 4, x0 // TILE_X, mask=mask)
    tl.store(box + out * 4 + 1, y0 // TILE_Y, mask=mask)
    tl.store(box + out * 4 + 2, tiles_x, mask=mask)
    base = record + out * RECORD  # rows of 12: mean 2, conic 3, opacity, rgb 3, z
    tl.store(base, x, mask=mask)
    tl.store(base + 1, y, mask=mask)
    store3(base + 2, 0, mask, Syy / determinant, -Sxy / determinant, Sxx / determinant)
    tl.store(base + 5, o, mask=mask)
    store3(base + 6, 0, mask, tl.maximum(red, 0.0), tl.maximum(green, 0.0), tl.maximum(blue, 0.0))
    tl.store(base + 9, p2, mask=mask)


@triton.jit
@no_type_check
def view_backward(
    sh, v_sh, row, out, mask, d0, d1, d2, inverse, gr, gg, gb, SH: tl.constexpr, COEFFICIENTS: tl.constexpr
):
    """From a colour's gradient to that of the vector whose direction and 1 / length are given; stores that of sh."""
    e0, e1, e2 = d0 * 0, d0 * 0, d0 * 0
    for k in tl.static_range(COEFFICIENTS):
        Y, h0, h1, h2 = harmonic(k, d0, d1, d2)
        if k > 0:
            red, green, blue = load3(sh, row * COEFFICIENTS + k, mask)
            inner = dot3(gr, gg, gb, red, green, blue)
            e0 += h0 * inner
            e1 += h1 * inner
            e2 += h2 * inner
        if SH:
            store3(v_sh, out * COEFFICIENTS + k, mask, Y * gr, Y * gg, Y * gb)
    along = dot3(d0, d1, d2, e0, e1, e2)
    return (e0 - d0 * along) * inverse, (e1 - d1 * along) * inverse, (e2 - d2 * along) * inverse


@triton.jit
@no_type_check
def focal_backward(to_focal, to_centre, mask, g, ratio, gj, gjz, z, s, inside, gs, focal):
    """One axis's share of a block in the gradients of focal length and centre; a limited slope depends on both."""
    v_focal = g * ratio + (gj - gjz * s) / z + tl.where(inside, 0.0, -gs * s / focal)
    tl.store(to_focal, tl.sum(tl.where(mask, v_focal, 0.0)))
    tl.store(to_centre, tl.sum(tl.where(mask, g + tl.where(inside, 0.0, -gs / focal), 0.0)))


@triton.jit
@no_type_check
def quat_backward(v_quats, out, mask, w, x, y, z, shrink, g00, g01, g02, g10, g11, g12, g20, g21, g22):
    """From a rotation's gradient to that of the quaternion whose unit (w, x, y, z) and 1 / length are given."""
    gw = 2 * dot3(x, y, z, g21 - g12, g02 - g20, g10 - g01)
    gx = 2 * (dot3(y, z, w, g01 + g10, g02 + g20, g21 - g12) - 2 * x * (g11 + g22))
    gy = 2 * (dot3(x, z, w, g01 + g10, g12 + g21, g02 - g20) - 2 * y * (g00 + g22))
    gz = 2 * (dot3(x, y, w, g02 + g20, g12 + g21, g10 - g01) - 2 * z * (g00 + g11))
    along = w * gw + dot3(x, y, z, gx, gy, gz)
    to = v_quats + out * 4
    tl.store(to, (gw - w * along) * shrink, mask=mask)
    tl.store(to + 1, (gx - x * along) * shrink, mask=mask)
    tl.store(to + 2, (gy - y * along) * shrink, mask=mask)
    tl.store(to + 3, (gz - z * along) * shrink, mask=mask)


@triton.jit
@no_type_check
def row_backward(M0, M1, M2, Z0, Z1, Z2, g_own, g_cross, r0, r1, r2, o0, o1, o2):
    """From the covariance's gradients to that of row r of J M (o is the other row), and those of J's two entries."""
    v0, v1, v2 = 2 * g_own * r0 + g_cross * o0, 2 * g_own * r1 + g_cross * o1, 2 * g_own * r2 + g_cross * o2
    return v0, v1, v2, dot3(M0, M1, M2, v0, v1, v2), dot3(Z0, Z1, Z2, v0, v1, v2)


@triton.jit
@no_type_check
def store_row4(to, mask, c0, c1, c2, g, z, h, m0, m1, m2, e0, e1, e2):
    """A row of a transform's gradient: of A from axes, mean and view, of t from mean and view."""
    tl.store(to, c0 + g * m0 + z * e0, mask=mask)
    tl.store(to + 1, c1 + g * m1 + z * e1, mask=mask)
    tl.store(to + 2, c2 + g * m2 + z * e2, mask=mask)
    tl.store(to + 3, g + h, mask=mask)


@triton.jit
@no_type_check
def axes_backward(
    v_Ts, v_scales, v_quats, out, mask, jx, jxz, jy, jyz, gu0, gu1, gu2, gv0, gv1, gv2, gp0, gp1, gp2, near, z0, z1, z2,
    e0, e1, e2, m0, m1, m2, a00, a01, a02, a10, a11, a12, a20, a21, a22, qw, qx, qy, qz, shrink, s0, s1, s2,
    POSES: tl.constexpr, SHAPES: tl.constexpr,
):  # fmt: skip
    """From the rows of J M, M = A B, to the transform A, t and to the axes B = R S."""
    R00, R01, R02, R10, R11, R12, R20, R21, R22 = rotation(qw, qx, qy, qz)
    b00, b01, b02, b10, b11, b12 = R00 * s0, R01 * s1, R02 * s2, R10 * s0, R11 * s1, R12 * s2
    b20, b21, b22 = R20 * s0, R21 * s1, R22 * s2
    gM00, gM01, gM02, gM10, gM11, gM12 = jx * gu0, jx * gu1, jx * gu2, jy * gv0, jy * gv1, jy * gv2
    gM20, gM21, gM22 = jxz * gu0 + jyz * gv0, jxz * gu1 + jyz * gv1, jxz * gu2 + jyz * gv2
    if POSES:
        base, h0, h1, h2 = v_Ts + out * 12, near * e0, near * e1, near * e2
        h0, h1, h2 = times(a00, a01, a02, a10, a11, a12, a20, a21, a22, h0, h1, h2)
        c0, c1, c2 = times(b00, b01, b02, b10, b11, b12, b20, b21, b22, gM00, gM01, gM02)
        store_row4(base + 0, mask, c0, c1, c2, gp0, z0, h0, m0, m1, m2, e0, e1, e2)
        c0, c1, c2 = times(b00, b01, b02, b10, b11, b12, b20, b21, b22, gM10, gM11, gM12)
        store_row4(base + 4, mask, c0, c1, c2, gp1, z1, h1, m0, m1, m2, e0, e1, e2)
        c0, c1, c2 = times(b00, b01, b02, b10, b11, b12, b20, b21, b22, gM20, gM21, gM22)
        store_row4(base + 8, mask, c0, c1, c2, gp2, z2, h2, m0, m1, m2, e0, e1, e2)
    if SHAPES:
        gb00, gb10, gb20 = times(a00, a10, a20, a01, a11, a21, a02, a12, a22, gM00, gM10, gM20)
        gb01, gb11, gb21 = times(a00, a10, a20, a01, a11, a21, a02, a12, a22, gM01, gM11, gM21)
        gb02, gb12, gb22 = times(a00, a10, a20, a01, a11, a21, a02, a12, a22, gM02, gM12, gM22)
        x0, x1 = dot3(gb00, gb10, gb20, R00, R10, R20), dot3(gb01, gb11, gb21, R01, R11, R21)
        store3(v_scales, out, mask, x0, x1, dot3(gb02, gb12, gb22, R02, R12, R22))
        quat_backward(
            v_quats, out, mask, qw, qx, qy, qz, shrink, gb00 * s0, gb01 * s1, gb02 * s2,
            gb10 * s0, gb11 * s1, gb12 * s2, gb20 * s0, gb21 * s1, gb22 * s2,
        )  # fmt: skip


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
    m0, m1, m2 = load3(means, row, mask)
    g0, g1, gxx = load3(grad, 0, mask)
    gxy, gyy, go = load3(grad, 1, mask)
    gr, gg, gb = load3(grad, 2, mask)
    gz = tl.load(grad + 9, mask=mask, other=0.0)
    if OPACITIES:
        tl.store(v_opacities + out, go, mask=mask)

    # Colour: through the clamp, the harmonics and the unit direction to the offset m + A^T t.
    near, z0, z1, z2 = eye(t0, t1, t2, AXIS)
    d0, d1, d2 = times(a00, a10, a20, a01, a11, a21, a02, a12, a22, z0, z1, z2)
    d0, d1, d2 = near * m0 + d0, near * m1 + d1, near * m2 + d2
    inverse = inverse_length(d0, d1, d2)
    d0, d1, d2 = d0 * inverse, d1 * inverse, d2 * inverse
    red, green, blue = colour(sh, row, mask, d0, d1, d2, COEFFICIENTS)
    gr, gg, gb = tl.where(red >= 0, gr, 0.0), tl.where(green >= 0, gg, 0.0), tl.where(blue >= 0, gb, 0.0)
    e0, e1, e2 = view_backward(sh, v_sh, row, out, mask, d0, d1, d2, inverse, gr, gg, gb, SH, COEFFICIENTS)

    if MEANS | SHAPES | POSES | INTRINSICS:
        qw, qx, qy, qz = load_quat(quats, row, mask)
        s0, s1, s2 = load3(scales, row, mask)
        shrink = 1.0 / tl.sqrt(qw * qw + dot3(qx, qy, qz, qx, qy, qz))
        qw, qx, qy, qz = qw * shrink, qx * shrink, qy * shrink, qz * shrink
        R00, R01, R02, R10, R11, R12, R20, R21, R22 = rotation(qw, qx, qy, qz)
        p0, p1, p2 = times(a00, a01, a02, a10, a11, a12, a20, a21, a22, m0, m1, m2)
        p0, p1, p2 = p0 + t0, p1 + t1, p2 + t2
        z = tl.where(p2 < NEAR, 1.0, p2)
        sx, in_x = slope(p0, z, fx, cx, width)
        sy, in_y = slope(p1, z, fy, cy, height)
        jx, jy, jxz, jyz = fx / z, fy / z, -fx * sx / z, -fy * sy / z
        # Axes B = R S in the link frame, M = A B in the camera's; rows ru, rv of J M.
        b00, b01, b02, b10, b11, b12 = R00 * s0, R01 * s1, R02 * s2, R10 * s0, R11 * s1, R12 * s2
        b20, b21, b22 = R20 * s0, R21 * s1, R22 * s2
        M00, M10, M20 = times(a00, a01, a02, a10, a11, a12, a20, a21, a22, b00, b10, b20)
        M01, M11, M21 = times(a00, a01, a02, a10, a11, a12, a20, a21, a22, b01, b11, b21)
        M02, M12, M22 = times(a00, a01, a02, a10, a11, a12, a20, a21, a22, b02, b12, b22)
        ru0, ru1, ru2 = jx * M00 + jxz * M20, jx * M01 + jxz * M21, jx * M02 + jxz * M22
        rv0, rv1, rv2 = jy * M10 + jyz * M20, jy * M11 + jyz * M21, jy * M12 + jyz * M22
        gu0, gu1, gu2, gjx, gjxz = row_backward(M00, M01, M02, M20, M21, M22, gxx, gxy, ru0, ru1, ru2, rv0, rv1, rv2)
        gv0, gv1, gv2, gjy, gjyz = row_backward(M10, M11, M12, M20, M21, M22, gyy, gxy, rv0, rv1, rv2, ru0, ru1, ru2)
        gsx, gsy = -gjxz * jx, -gjyz * jy
        # jx = fx / z, jxz = -fx sx / z, sx = clamp(x / z), mean = fx x / z + cx; the same for y.
        gp0 = g0 * jx + tl.where(in_x, gsx / z, 0.0)
        gp1 = g1 * jy + tl.where(in_y, gsy / z, 0.0)
        gp2 = gz - (gjx * jx + gjxz * jxz + gjy * jy + gjyz * jyz + gp0 * p0 + gp1 * p1) / z
        if INTRINSICS:
            part = v_K + (image * tl.num_programs(1) + block) * 4
            focal_backward(part, part + 2, mask, g0, p0 / z, gjx, gjxz, z, sx, in_x, gsx, fx)
            focal_backward(part + 1, part + 3, mask, g1, p1 / z, gjy, gjyz, z, sy, in_y, gsy, fy)
        if MEANS:
            x0, x1, x2 = times(a00, a10, a20, a01, a11, a21, a02, a12, a22, gp0, gp1, gp2)
            store3(v_means, out, mask, x0 + near * e0, x1 + near * e1, x2 + near * e2)
        if POSES | SHAPES:
            axes_backward(
                v_Ts, v_scales, v_quats, out, mask, jx, jxz, jy, jyz, gu0, gu1, gu2, gv0, gv1, gv2, gp0, gp1, gp2,
                near, z0, z1, z2, e0, e1, e2, m0, m1, m2, a00, a01, a02, a10, a11, a12, a20, a21, a22,
                qw, qx, qy, qz, shrink, s0, s1, s2, POSES, SHAPES,
            )  # fmt: skip
