"""What both projection kernels share, for Triton: transforms, rotations, harmonics, constants.

`no_type_check` keeps the shape checks of the test run, which wrap functions, away from what Triton compiles.
"""

from typing import no_type_check

import triton
import triton.language as tl

from kinesplat.rasterizer import projection, reference
from kinesplat.rasterizer.spherical_harmonics import SH_C0, SH_C1, SH_C2, SH_C3

ALPHA_MAX = tl.constexpr(reference.ALPHA_MAX)
ALPHA_MIN = tl.constexpr(reference.ALPHA_MIN)
TRANSMITTANCE_MIN = tl.constexpr(reference.TRANSMITTANCE_MIN)
NEAR = tl.constexpr(reference.NEAR)
DEPTH_ALPHA_MIN = tl.constexpr(reference.DEPTH_ALPHA_MIN)
GUARD = tl.constexpr(0.5 * projection.JACOBIAN_GUARD)

C0, C1 = tl.constexpr(SH_C0), tl.constexpr(SH_C1)
C20, C21, C22, C23, C24 = (tl.constexpr(c) for c in SH_C2)
C30, C31, C32, C33, C34, C35, C36 = (tl.constexpr(c) for c in SH_C3)

RECORD_FLOATS = 12  # of a projected splat: mean 2, conic 3, opacity, rgb 3, z, 2 unused
SUM_FLOATS = 10  # of its gradient: mean 2, covariance 3, opacity, rgb 3, z
RECORD, SUMS = tl.constexpr(RECORD_FLOATS), tl.constexpr(SUM_FLOATS)


@triton.jit
@no_type_check
def dot3(ax, ay, az, bx, by, bz):
    """a . b"""
    return ax * bx + ay * by + az * bz


@triton.jit
@no_type_check
def times(a00, a01, a02, a10, a11, a12, a20, a21, a22, x, y, z):
    """A v, A given by rows; A^T v where its columns are given."""
    return dot3(a00, a01, a02, x, y, z), dot3(a10, a11, a12, x, y, z), dot3(a20, a21, a22, x, y, z)


@triton.jit
@no_type_check
def load3(values, row, mask):
    """Three floats of a row, zeros where masked."""
    at = values + row * 3
    x, y = tl.load(at, mask=mask, other=0.0), tl.load(at + 1, mask=mask, other=0.0)
    return x, y, tl.load(at + 2, mask=mask, other=0.0)


@triton.jit
@no_type_check
def load_quat(values, row, mask):
    """A quaternion as it is, the identity where masked."""
    at = values + row * 4
    w, x = tl.load(at, mask=mask, other=1.0), tl.load(at + 1, mask=mask, other=0.0)
    y, z = tl.load(at + 2, mask=mask, other=0.0), tl.load(at + 3, mask=mask, other=0.0)
    return w, x, y, z


@triton.jit
@no_type_check
def store3(values, row, mask, x, y, z):
    """Three floats of a row."""
    tl.store(values + row * 3, x, mask=mask)
    tl.store(values + row * 3 + 1, y, mask=mask)
    tl.store(values + row * 3 + 2, z, mask=mask)


@triton.jit
@no_type_check
def inverse_length(x, y, z):
    """1 / length, and 0 for the zero vector."""
    square = dot3(x, y, z, x, y, z)
    return tl.where(square > 0.0, 1.0 / tl.sqrt(tl.where(square > 0.0, square, 1.0)), 0.0)


@triton.jit
@no_type_check
def eye(t0, t1, t2, AXIS: tl.constexpr):
    """Harmonics are seen along ``near m + A^T e``: from the camera's centre (1, e = t), or along its axis (0, z)."""
    near = 1.0
    if AXIS:
        near, t0, t1, t2 = 0.0, t0 * 0, t1 * 0, t2 * 0 + 1
    return near, t0, t1, t2


@triton.jit
@no_type_check
def load_transform(Ts, image, index, weights, i, mask, links, M: tl.constexpr, WEIGHTED: tl.constexpr):
    """Rows of the 3x4 transform of splat `i` to the camera, and how many of its links do not exist."""
    a00, a01, a02, t0 = tl.zeros_like(i).to(tl.float32), 0.0, 0.0, 0.0
    a10, a11, a12, t1 = 0.0, 0.0, 0.0, 0.0
    a20, a21, a22, t2 = 0.0, 0.0, 0.0, 0.0
    outside = tl.zeros_like(i)
    for j in tl.static_range(M):
        link = tl.load(index + i * M + j, mask=mask, other=0)
        outside += ((link < 0) | (link >= links)).to(tl.int32)
        link = tl.minimum(tl.maximum(link, 0), links - 1)
        w = 1.0
        if WEIGHTED:
            w = tl.load(weights + i * M + j, mask=mask, other=0.0)
        T = Ts + (image * links + link) * 12
        a00 += w * tl.load(T)
        a01 += w * tl.load(T + 1)
        a02 += w * tl.load(T + 2)
        t0 += w * tl.load(T + 3)
        a10 += w * tl.load(T + 4)
        a11 += w * tl.load(T + 5)
        a12 += w * tl.load(T + 6)
        t1 += w * tl.load(T + 7)
        a20 += w * tl.load(T + 8)
        a21 += w * tl.load(T + 9)
        a22 += w * tl.load(T + 10)
        t2 += w * tl.load(T + 11)
    return a00, a01, a02, t0, a10, a11, a12, t1, a20, a21, a22, t2, outside


@triton.jit
@no_type_check
def rotation(w, x, y, z):
    """Rows of the rotation of a unit quaternion."""
    return (
        1 - 2 * (y * y + z * z),
        2 * (x * y - w * z),
        2 * (x * z + w * y),
        2 * (x * y + w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z - w * x),
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        1 - 2 * (x * x + y * y),
    )


@triton.jit
@no_type_check
def slope(value, z, focal, centre, extent):
    """value / z limited to the field of view plus a guard, and whether it lies within."""
    s = value / z
    lower, upper = -(centre + GUARD * extent) / focal, (extent - centre + GUARD * extent) / focal
    return tl.minimum(tl.maximum(s, lower), upper), (s >= lower) & (s <= upper)


@triton.jit
@no_type_check
def harmonic(k: tl.constexpr, x, y, z):
    """Y_k at a direction and its derivatives; the order and signs of `spherical_harmonics.sh_basis`."""
    value, gx, gy, gz = x * 0 + C0, x * 0, x * 0, x * 0
    if k == 1:
        value, gy = y * -C1, x * 0 - C1
    if k == 2:
        value, gz = z * C1, x * 0 + C1
    if k == 3:
        value, gx = x * -C1, x * 0 - C1
    if k == 4:
        value, gx, gy = x * y * C20, y * C20, x * C20
    if k == 5:
        value, gy, gz = y * z * C21, z * C21, y * C21
    if k == 6:
        value, gx, gy, gz = (2 * z * z - x * x - y * y) * C22, x * (-2 * C22), y * (-2 * C22), z * (4 * C22)
    if k == 7:
        value, gx, gz = x * z * C23, z * C23, x * C23
    if k == 8:
        value, gx, gy = (x * x - y * y) * C24, x * (2 * C24), y * (-2 * C24)
    if k == 9:
        value, gx, gy = y * (3 * x * x - y * y) * C30, x * y * (6 * C30), (x * x - y * y) * (3 * C30)
    if k == 10:
        value, gx, gy, gz = x * y * z * C31, y * z * C31, x * z * C31, x * y * C31
    if k == 11:
        value, gz = y * (4 * z * z - x * x - y * y) * C32, y * z * (8 * C32)
        gx, gy = x * y * (-2 * C32), (4 * z * z - x * x - 3 * y * y) * C32
    if k == 12:
        value, gz = z * (2 * z * z - 3 * x * x - 3 * y * y) * C33, (6 * z * z - 3 * x * x - 3 * y * y) * C33
        gx, gy = x * z * (-6 * C33), y * z * (-6 * C33)
    if k == 13:
        value, gz = x * (4 * z * z - x * x - y * y) * C34, x * z * (8 * C34)
        gx, gy = (4 * z * z - 3 * x * x - y * y) * C34, x * y * (-2 * C34)
    if k == 14:
        value, gx, gy, gz = z * (x * x - y * y) * C35, x * z * (2 * C35), y * z * (-2 * C35), (x * x - y * y) * C35
    if k == 15:
        value, gx, gy = x * (x * x - 3 * y * y) * C36, (x * x - y * y) * (3 * C36), x * y * (-6 * C36)
    return value, gx, gy, gz


@triton.jit
@no_type_check
def colour(sh, row, mask, x, y, z, COEFFICIENTS: tl.constexpr):
    """Colour before its clamp at zero, seen along a unit direction; `row` is that of the splat's coefficients."""
    r, g, b = x * 0 + 0.5, x * 0 + 0.5, x * 0 + 0.5
    for k in tl.static_range(COEFFICIENTS):
        Y, _, _, _ = harmonic(k, x, y, z)
        base = sh + (row * COEFFICIENTS + k) * 3
        r += Y * tl.load(base, mask=mask, other=0.0)
        g += Y * tl.load(base + 1, mask=mask, other=0.0)
        b += Y * tl.load(base + 2, mask=mask, other=0.0)
    return r, g, b
