// Sixteen splats at a time: loading rows, spherical harmonics, and the geometry from link frame to image.
#pragma once
#include "kernels.h"
#include "simd_math.h"

namespace {

using namespace kinesplat;

struct Group {  // sixteen splats; lanes from `count` on repeat the last one
    uint32_t id[16];
    int count;
    bool contiguous;  // sixteen of them in a row
    M valid;
};

KS_INLINE Group make_group(const uint32_t *ids, int count) {
    Group g;
    for (int i = 0; i < 16; ++i) g.id[i] = ids[i < count ? i : count - 1];
    g.count = count;
    g.contiguous = count == 16 && g.id[15] == g.id[0] + 15;  // ids ascend
    g.valid = from_bits(count == 16 ? 0xffffu : (1u << count) - 1u);
    return g;
}

// Columns of sixteen rows of `length` floats.
KS_INLINE void load_columns(const float *base, int length, const Group &g, F *columns) {
    if (g.contiguous && length == 3) return deinterleave3(base + static_cast<size_t>(g.id[0]) * 3, columns);
    if (g.contiguous && length == 4) return deinterleave4(base + static_cast<size_t>(g.id[0]) * 4, columns);
    if (g.contiguous && length == 1) {
        columns[0] = load(base + g.id[0]);
        return;
    }
    if (length < 16) {
        alignas(64) float rows[16][16];
        for (int i = 0; i < 16; ++i)
            for (int j = 0; j < length; ++j) rows[j][i] = base[static_cast<size_t>(g.id[i]) * length + j];
        for (int j = 0; j < length; ++j) columns[j] = load(rows[j]);
        return;
    }
    for (int first = 0; first < length; first += 16) {
        int start = first + 16 <= length ? first : length - 16;
        F rows[16];
        for (int i = 0; i < 16; ++i) rows[i] = load(base + static_cast<size_t>(g.id[i]) * length + start);
        transpose(rows);
        for (int j = first - start; j < 16; ++j) columns[start + j] = rows[j];
    }
}

// Adds columns to sixteen rows of `length` floats.
KS_INLINE void add_columns(float *base, int length, const Group &g, const F *columns) {
    for (int first = 0; first < length; first += 16) {
        int width = first + 16 <= length ? 16 : length - first;
        F rows[16];
        for (int j = 0; j < 16; ++j) rows[j] = j < width ? columns[first + j] : set1(0.0f);
        transpose(rows);
        for (int i = 0; i < g.count; ++i) {
            float *out = base + static_cast<size_t>(g.id[i]) * length + first;
            if (width == 16) {
                store(out, load(out) + rows[i]);
            } else {
                alignas(64) float row[16];
                store(row, rows[i]);
                for (int j = 0; j < width; ++j) out[j] += row[j];
            }
        }
    }
}

constexpr float kY0 = 0.28209479177387814f, kY1 = 0.4886025119029199f;
constexpr float kY2[5] = {1.0925484305920792f, -1.0925484305920792f, 0.31539156525252005f, -1.0925484305920792f,
                          0.5462742152960396f};
constexpr float kY3[7] = {-0.5900435899266435f, 2.890611442640554f, -0.4570457994644658f, 0.3731763325901154f,
                          -0.4570457994644658f, 1.445305721320277f, -0.5900435899266435f};

KS_INLINE void sh_basis(int coefficients, F x, F y, F z, F *Y) {
    Y[0] = set1(kY0);
    if (coefficients == 1) return;
    Y[1] = set1(-kY1) * y;
    Y[2] = set1(kY1) * z;
    Y[3] = set1(-kY1) * x;
    if (coefficients == 4) return;
    F xx = x * x, yy = y * y, zz = z * z, two = set1(2.0f), three = set1(3.0f), four = set1(4.0f);
    Y[4] = set1(kY2[0]) * (x * y);
    Y[5] = set1(kY2[1]) * (y * z);
    Y[6] = set1(kY2[2]) * (two * zz - xx - yy);
    Y[7] = set1(kY2[3]) * (x * z);
    Y[8] = set1(kY2[4]) * (xx - yy);
    if (coefficients == 9) return;
    Y[9] = set1(kY3[0]) * y * (three * xx - yy);
    Y[10] = set1(kY3[1]) * (x * y * z);
    Y[11] = set1(kY3[2]) * y * (four * zz - xx - yy);
    Y[12] = set1(kY3[3]) * z * (two * zz - three * (xx + yy));
    Y[13] = set1(kY3[4]) * x * (four * zz - xx - yy);
    Y[14] = set1(kY3[5]) * z * (xx - yy);
    Y[15] = set1(kY3[6]) * x * (xx - three * yy);
}

// Adds sum_k a_k dY_k/d(x, y, z) to v.
KS_INLINE void sh_basis_vjp(int coefficients, F x, F y, F z, const F *a, F v[3]) {
    v[0] = v[1] = v[2] = set1(0.0f);
    if (coefficients == 1) return;
    v[0] = set1(-kY1) * a[3];
    v[1] = set1(-kY1) * a[1];
    v[2] = set1(kY1) * a[2];
    if (coefficients == 4) return;
    F b4 = set1(kY2[0]) * a[4], b5 = set1(kY2[1]) * a[5], b6 = set1(2.0f * kY2[2]) * a[6];
    F b7 = set1(kY2[3]) * a[7], b8 = set1(2.0f * kY2[4]) * a[8];
    v[0] = v[0] + b4 * y - b6 * x + b7 * z + b8 * x;
    v[1] = v[1] + b4 * x + b5 * z - b6 * y - b8 * y;
    v[2] = v[2] + b5 * y + set1(2.0f) * b6 * z + b7 * x;
    if (coefficients == 9) return;
    F xx = x * x, yy = y * y, zz = z * z, xy = x * y, xz = x * z, yz = y * z;
    F two = set1(2.0f), three = set1(3.0f), four = set1(4.0f), six = set1(6.0f), eight = set1(8.0f);
    F c9 = set1(kY3[0]) * a[9], c10 = set1(kY3[1]) * a[10], c11 = set1(kY3[2]) * a[11], c12 = set1(kY3[3]) * a[12];
    F c13 = set1(kY3[4]) * a[13], c14 = set1(kY3[5]) * a[14], c15 = set1(kY3[6]) * a[15];
    v[0] = v[0] + c9 * six * xy + c10 * yz - c11 * two * xy - c12 * six * xz + c13 * (four * zz - three * xx - yy) +
           c14 * two * xz + c15 * three * (xx - yy);
    v[1] = v[1] + c9 * three * (xx - yy) + c10 * xz + c11 * (four * zz - xx - three * yy) - c12 * six * yz -
           c13 * two * xy - c14 * two * yz - c15 * six * xy;
    v[2] = v[2] + c10 * xy + c11 * eight * yz + c12 * (six * zz - three * (xx + yy)) + c13 * eight * xz +
           c14 * (xx - yy);
}

struct Geometry {
    D T[12];              // splat frame to camera, rows of 3x4
    D m[3], s[3];         // mean, scales
    D quat[4], quat_norm; // unit quaternion
    D R[9], N[9];         // rotation; A R diag(s)
    D pc[3], inv_z;       // mean in the camera
    D slope[2];           // x/z, y/z as the Jacobian sees them
    M guarded[2];         // where the guard replaced them
    D P[6];               // 2x3: Jacobian times N
    D p, q, r;            // whitening (scaled by sqrt of kWhitening2)
    D Sxx, Syy;
    D mean_x, mean_y;
    D offset_norm;
    F dir[3];             // unit, where the spherical harmonics are evaluated, in the splat's frame
    M in_front;
};

KS_INLINE void load_transforms(const Scene &s, int image, const Group &g, D *T) {
    const double *Ts = s.Ts_cam_link + static_cast<size_t>(image) * s.links * 16;
    int m = s.links_per_splat, first = s.link_index[static_cast<size_t>(g.id[0]) * m];
    bool uniform = !s.link_weights;
    for (int i = 1; uniform && i < 16; ++i) uniform = s.link_index[g.id[i]] == first;
    if (uniform) {
        for (int j = 0; j < 12; ++j) T[j] = set1d(Ts[first * 16 + j]);
        return;
    }
    alignas(64) double rows[12][16];
    for (int i = 0; i < 16; ++i) {
        const int32_t *index = s.link_index + static_cast<size_t>(g.id[i]) * m;
        for (int j = 0; j < 12; ++j) {
            double value = s.link_weights ? 0.0 : Ts[index[0] * 16 + j];
            for (int l = 0; s.link_weights && l < m; ++l)
                value += static_cast<double>(s.link_weights[static_cast<size_t>(g.id[i]) * m + l]) *
                         Ts[index[l] * 16 + j];
            rows[j][i] = value;
        }
    }
    for (int j = 0; j < 12; ++j) T[j] = load(rows[j]);
}

KS_INLINE void rotation(const D q[4], D R[9]) {
    D w = q[0], x = q[1], y = q[2], z = q[3], two = set1d(2.0), one = set1d(1.0);
    R[0] = fnma(two, fma(y, y, z * z), one);
    R[1] = two * fnma(w, z, x * y);
    R[2] = two * fma(w, y, x * z);
    R[3] = two * fma(w, z, x * y);
    R[4] = fnma(two, fma(x, x, z * z), one);
    R[5] = two * fnma(w, x, y * z);
    R[6] = two * fnma(w, y, x * z);
    R[7] = two * fma(w, x, y * z);
    R[8] = fnma(two, fma(x, x, y * y), one);
}

KS_INLINE D dot3(D a0, D a1, D a2, D b0, D b1, D b2) { return fma(a0, b0, fma(a1, b1, a2 * b2)); }

// The direction of the spherical harmonics is that of `mean_share * mean + A^T eye`: from the camera centre to the mean,
// or along the optical axis.
KS_INLINE D mean_share(const Scene &s) { return set1d(s.along_axis ? 0.0 : 1.0); }
KS_INLINE D eye(const Scene &s, const Geometry &o, int i) {
    return s.along_axis ? set1d(i == 2 ? 1.0 : 0.0) : o.T[4 * i + 3];
}

// From the link frame to the whitened ellipse in the image (docs/derivations.md, section 1).
inline void compute_geometry(const Scene &s, int image, const Group &g, Geometry &o) {
    size_t set = static_cast<size_t>(s.set_of_image[image]) * s.n;
    F columns[4];
    load_columns(s.means + set * 3, 3, g, columns);
    for (int i = 0; i < 3; ++i) o.m[i] = widen(columns[i]);
    load_columns(s.scales + set * 3, 3, g, columns);
    for (int i = 0; i < 3; ++i) o.s[i] = widen(columns[i]);
    load_columns(s.quats + set * 4, 4, g, columns);
    for (int i = 0; i < 4; ++i) o.quat[i] = widen(columns[i]);
    load_transforms(s, image, g, o.T);

    o.quat_norm = sqrt(fma(o.quat[0], o.quat[0], dot3(o.quat[1], o.quat[2], o.quat[3], o.quat[1], o.quat[2], o.quat[3])));
    D inv_norm = set1d(1.0) / o.quat_norm;
    for (int i = 0; i < 4; ++i) o.quat[i] = o.quat[i] * inv_norm;
    rotation(o.quat, o.R);
    const D *T = o.T;
    for (int i = 0; i < 3; ++i) {
        o.pc[i] = fma(T[4 * i], o.m[0], fma(T[4 * i + 1], o.m[1], fma(T[4 * i + 2], o.m[2], T[4 * i + 3])));
        for (int k = 0; k < 3; ++k)
            o.N[3 * i + k] = o.s[k] * dot3(T[4 * i], T[4 * i + 1], T[4 * i + 2], o.R[k], o.R[3 + k], o.R[6 + k]);
    }
    o.in_front = set1d(kNear) <= o.pc[2];
    o.inv_z = set1d(1.0) / select(o.in_front, o.pc[2], set1d(1.0));

    D mean[2];
    for (int axis = 0; axis < 2; ++axis) {
        double focal = s.focal(image, axis), centre = s.centre(image, axis), extent = axis ? s.height : s.width;
        double margin = kJacobianGuard * 0.5 * extent / focal;
        D slope = o.pc[axis] * o.inv_z, low = set1d(-centre / focal - margin);
        D high = set1d((extent - centre) / focal + margin);
        o.guarded[axis] = (slope < low) | (high < slope);
        o.slope[axis] = min(max(slope, low), high);
        mean[axis] = fma(set1d(focal), slope, set1d(centre));
        D f_z = set1d(focal) * o.inv_z;
        for (int k = 0; k < 3; ++k) o.P[3 * axis + k] = f_z * fnma(o.slope[axis], o.N[6 + k], o.N[3 * axis + k]);
    }
    o.mean_x = mean[0];
    o.mean_y = mean[1];

    const D *P = o.P;
    D xx = dot3(P[0], P[1], P[2], P[0], P[1], P[2]), yy = dot3(P[3], P[4], P[5], P[3], P[4], P[5]);
    D xy = dot3(P[0], P[1], P[2], P[3], P[4], P[5]), eps = set1d(s.eps2d);
    D c0 = fnma(P[2], P[4], P[1] * P[5]), c1 = fnma(P[0], P[5], P[2] * P[3]), c2 = fnma(P[1], P[3], P[0] * P[4]);
    D det = dot3(c0, c1, c2, c0, c1, c2) + eps * (xx + yy + eps);  // Cauchy-Binet: no cancellation for needles
    o.Sxx = xx + eps;
    o.Syy = yy + eps;
    D kappa2 = set1d(kWhitening2);
    o.p = sqrt(kappa2 * o.Syy / det);
    o.q = set1d(0.0) - o.p * xy / o.Syy;
    o.r = sqrt(kappa2 / o.Syy);

    D offset[3], near = mean_share(s), e[3] = {eye(s, o, 0), eye(s, o, 1), eye(s, o, 2)};
    for (int i = 0; i < 3; ++i) offset[i] = fma(near, o.m[i], dot3(T[i], T[4 + i], T[8 + i], e[0], e[1], e[2]));
    o.offset_norm = sqrt(dot3(offset[0], offset[1], offset[2], offset[0], offset[1], offset[2]));
    D inv = set1d(1.0) / o.offset_norm;
    for (int i = 0; i < 3; ++i) o.dir[i] = narrow(offset[i] * inv);
}

}  // namespace
