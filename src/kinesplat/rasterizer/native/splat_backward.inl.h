// Backward of the projection: sums over a splat's tiles to gradients of its parameters, its link and the camera.
// Formulas and their derivation: docs/derivations.md, section 4.
#pragma once
#include "splat.inl.h"

namespace {

struct SplatGradient {
    D mean[3], scale[3], quat[4];
    D T[12];  // splat frame to camera, rows of 3x4
    D K[4];   // fx fy cx cy
};

// Sums of sixteen records' slots; afterwards column j holds moment j, splats in the lanes.
KS_INLINE void load_moments(const ImageFrame &frame, uint32_t first, int count, F columns[16]) {
    for (int i = 0; i < 16; ++i) {
        columns[i] = set1(0.0f);
        if (i >= count) continue;
        if (frame.work.merged) {
            columns[i] = load(frame.work.slots[first + static_cast<uint32_t>(i)].sum);
            continue;
        }
        const Slot *slots = frame.work.slots.data() + frame.slot_begin[first + i];
        for (uint32_t j = 0; j < frame.slot_count[first + i]; ++j) columns[i] = columns[i] + load(slots[j].sum);
    }
    transpose(columns);
}

// From moments in the image to the mean in the camera (vpc), the axes N in the camera (vN) and the intrinsics.
KS_INLINE void image_vjp(const Scene &s, int image, const Geometry &o, const F *moments, D vpc[3], D vN[9], D vK[4]) {
    D inv_k2 = set1d(1.0 / kWhitening2), inv_k4 = set1d(1.0 / (kWhitening2 * kWhitening2));
    D gu = widen(moments[kGu]), gv = widen(moments[kGv]);
    D guu = widen(moments[kGuu]), guv = widen(moments[kGuv]), gvv = widen(moments[kGvv]);
    D vmean[2] = {inv_k2 * o.p * gu, inv_k2 * fma(o.q, gu, o.r * gv)}, vP[6];
    for (int k = 0; k < 3; ++k) {
        D w0 = fma(o.p, o.P[k], o.q * o.P[3 + k]), w1 = o.r * o.P[3 + k];
        D h0 = inv_k4 * fma(guu, w0, guv * w1), h1 = inv_k4 * fma(guv, w0, gvv * w1);
        vP[k] = o.p * h0;
        vP[3 + k] = fma(o.q, h0, o.r * h1);
    }
    D zero = set1d(0.0), vz = widen(moments[kZ]);
    for (int k = 0; k < 3; ++k) vN[6 + k] = zero;
    for (int axis = 0; axis < 2; ++axis) {
        D f_z = set1d(s.focal(image, axis)) * o.inv_z, inv_f = set1d(1.0 / s.focal(image, axis)), slope = o.slope[axis];
        const D *P = o.P + 3 * axis, *v = vP + 3 * axis;
        D vP_P = dot3(v[0], v[1], v[2], P[0], P[1], P[2]);
        D vslope = zero - f_z * dot3(v[0], v[1], v[2], o.N[6], o.N[7], o.N[8]);
        for (int k = 0; k < 3; ++k) {
            vN[3 * axis + k] = f_z * v[k];
            vN[6 + k] = fnma(f_z * slope, v[k], vN[6 + k]);
        }
        D free = select(o.guarded[axis], zero, vslope), held = select(o.guarded[axis], vslope, zero);
        D tangent = o.pc[axis] * o.inv_z, through = fma(vmean[axis], set1d(s.focal(image, axis)), free);
        vpc[axis] = through * o.inv_z;
        vz = vz - o.inv_z * fma(through, tangent, vP_P);
        vK[axis] = fma(vmean[axis], tangent, inv_f * fnma(held, slope, vP_P));
        vK[2 + axis] = fnma(held, inv_f, vmean[axis]);
    }
    vpc[2] = vz;
}

// From the colour to the vector whose direction the spherical harmonics see, in the splat's frame; adds to sh where asked.
template <int kCoefficients>
KS_INLINE void color_vjp(const Scene &s, int image, const Geometry &o, const Group &g, const F *moments, float *v_sh,
                         D voffset[3]) {
    size_t set = static_cast<size_t>(s.set_of_image[image]) * s.n;
    F sh[3 * kMaxCoefficients], rgb[3], v[3];
    load_columns(s.sh + set * 3 * kCoefficients, 3 * kCoefficients, g, sh);
    colors_of<kCoefficients>(sh, o.dir, rgb);
    for (int c = 0; c < 3; ++c) v[c] = zero_unless(set1(0.0f) <= rgb[c], moments[kRed + c]);
    F a[16], vdir[3];
    for (int k = 0; k < kCoefficients; ++k) a[k] = fma(sh[3 * k], v[0], fma(sh[3 * k + 1], v[1], sh[3 * k + 2] * v[2]));
    sh_basis_vjp(kCoefficients, o.dir[0], o.dir[1], o.dir[2], a, vdir);
    F along = fma(o.dir[0], vdir[0], fma(o.dir[1], vdir[1], o.dir[2] * vdir[2]));
    D inv = set1d(1.0) / o.offset_norm;
    for (int i = 0; i < 3; ++i) voffset[i] = widen(fnma(o.dir[i], along, vdir[i])) * inv;
    if (!v_sh) return;
    F Y[16], out[3 * kMaxCoefficients];
    sh_basis(kCoefficients, o.dir[0], o.dir[1], o.dir[2], Y);
    for (int k = 0; k < kCoefficients; ++k)
        for (int c = 0; c < 3; ++c) out[3 * k + c] = Y[k] * v[c];
    add_columns(v_sh + set * 3 * kCoefficients, 3 * kCoefficients, g, out);
}

KS_INLINE void transform_vjp(const Scene &s, const Geometry &o, const D vpc[3], const D vN[9], const D voffset[3], D vT[12]) {
    for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) {
            D axes = fma(vN[3 * i], o.s[0] * o.R[3 * j],
                         fma(vN[3 * i + 1], o.s[1] * o.R[3 * j + 1], vN[3 * i + 2] * (o.s[2] * o.R[3 * j + 2])));
            vT[4 * i + j] = fma(vpc[i], o.m[j], fma(eye(s, o, i), voffset[j], axes));
        }
        D moved = dot3(o.T[4 * i], o.T[4 * i + 1], o.T[4 * i + 2], voffset[0], voffset[1], voffset[2]);
        vT[4 * i + 3] = fma(mean_share(s), moved, vpc[i]);
    }
}

KS_INLINE void splat_vjp(const Scene &s, const Geometry &o, const D vpc[3], const D vN[9], const D voffset[3], SplatGradient &v) {
    const D *T = o.T, *R = o.R;
    D V[9], two = set1d(2.0);
    for (int j = 0; j < 3; ++j)
        v.mean[j] = fma(mean_share(s), voffset[j], dot3(T[j], T[4 + j], T[8 + j], vpc[0], vpc[1], vpc[2]));
    for (int k = 0; k < 3; ++k) {
        D a[3];
        for (int j = 0; j < 3; ++j) {
            a[j] = dot3(T[j], T[4 + j], T[8 + j], vN[k], vN[3 + k], vN[6 + k]);
            V[3 * j + k] = a[j] * o.s[k];
        }
        v.scale[k] = dot3(a[0], a[1], a[2], R[k], R[3 + k], R[6 + k]);
    }
    D w = o.quat[0], x = o.quat[1], y = o.quat[2], z = o.quat[3], u[4];
    u[0] = two * dot3(z, y, x, V[3] - V[1], V[2] - V[6], V[7] - V[5]);
    u[1] = two * fma(w, V[7] - V[5], dot3(y, z, x, V[1] + V[3], V[2] + V[6], set1d(-2.0) * (V[4] + V[8])));
    u[2] = two * fma(w, V[2] - V[6], dot3(x, z, y, V[1] + V[3], V[5] + V[7], set1d(-2.0) * (V[0] + V[8])));
    u[3] = two * fma(w, V[3] - V[1], dot3(x, y, z, V[2] + V[6], V[5] + V[7], set1d(-2.0) * (V[0] + V[4])));
    D along = fma(w, u[0], dot3(x, y, z, u[1], u[2], u[3])), inv = set1d(1.0) / o.quat_norm;
    for (int i = 0; i < 4; ++i) v.quat[i] = fnma(o.quat[i], along, u[i]) * inv;
}

// Running pose sums: vectors while consecutive splats share a link, flushed when the link changes.
struct PoseAccumulator {
    D T[12], K[4];
    int link = -1;
};

KS_INLINE void flush_pose(PoseAccumulator &a, const PoseSums &sums) {
    if (a.link >= 0)
        for (int j = 0; j < 12; ++j) sums.links[12 * a.link + j] += sum(a.T[j]);
    for (int j = 0; j < 12; ++j) a.T[j] = set1d(0.0);
    a.link = -1;
}

inline void scatter_pose(const Scene &s, int image, const Group &g, const D vT[12], const PoseSums &sums,
                         float *v_weights) {
    alignas(64) double rows[12][16];
    for (int j = 0; j < 12; ++j) store(rows[j], vT[j]);
    const double *Ts = s.Ts_cam_link + static_cast<size_t>(image) * s.links * 16;
    for (int i = 0; i < g.count; ++i)
        for (int l = 0; l < s.links_per_splat; ++l) {
            size_t at = static_cast<size_t>(g.id[i]) * static_cast<size_t>(s.links_per_splat) + l;
            int link = s.link_index[at];
            double weight = s.link_weights ? static_cast<double>(s.link_weights[at]) : 1.0, along = 0;
            for (int j = 0; j < 12; ++j) {
                if (sums.links) sums.links[12 * link + j] += weight * rows[j][i];
                along += rows[j][i] * Ts[16 * link + j];
            }
            if (v_weights) v_weights[at] += static_cast<float>(along);
        }
}

KS_INLINE void add_pose(const Scene &s, int image, const Group &g, const D vT[12], PoseAccumulator &a,
                        const PoseSums &sums, float *v_weights) {
    int link = s.link_index[static_cast<size_t>(g.id[0]) * static_cast<size_t>(s.links_per_splat)];
    bool uniform = !s.link_weights;
    for (int i = 1; uniform && i < g.count; ++i) uniform = s.link_index[g.id[i]] == link;
    if (!uniform) {
        scatter_pose(s, image, g, vT, sums, v_weights);
        return;
    }
    if (link != a.link) {
        flush_pose(a, sums);
        a.link = link;
    }
    for (int j = 0; j < 12; ++j) a.T[j] = a.T[j] + vT[j];
}

KS_INLINE void narrow_to(float *out, size_t set, int length, const Group &g, const D *values) {
    if (!out) return;
    F columns[4];
    for (int j = 0; j < length; ++j) columns[j] = narrow(values[j]);
    add_columns(out + set * static_cast<size_t>(length), length, g, columns);
}

template <int kCoefficients>
[[gnu::noinline]] void backward_splats_as(const Scene &s, const ImageFrame &frame, int image, uint32_t begin,
                                          uint32_t end, const Gradients &out, const PoseSums &pose) {
    size_t set = static_cast<size_t>(s.set_of_image[image]) * static_cast<size_t>(s.n);
    PoseAccumulator sums;
    flush_pose(sums, pose);
    for (int j = 0; j < 4; ++j) sums.K[j] = set1d(0.0);
    for (uint32_t first = begin; first < end; first += 16) {
        uint32_t ids[16];
        int count = end - first < 16 ? static_cast<int>(end - first) : 16;
        for (int i = 0; i < count; ++i) ids[i] = frame.records[first + i].splat;
        Group g = make_group(ids, count);
        Geometry o;
        SplatGradient v;
        F moments[16], opacity;
        D vpc[3], vN[9], voffset[3];
        compute_geometry(s, image, g, o);
        load_moments(frame, first, count, moments);
        image_vjp(s, image, o, moments, vpc, vN, v.K);
        color_vjp<kCoefficients>(s, image, o, g, moments, out.sh, voffset);
        if (pose.links || out.link_weights) {
            transform_vjp(s, o, vpc, vN, voffset, v.T);
            add_pose(s, image, g, v.T, sums, pose, out.link_weights);
        }
        for (int j = 0; j < 4; ++j) sums.K[j] = sums.K[j] + select(g.valid, v.K[j], set1d(0.0));
        if (!out.per_splat()) continue;
        splat_vjp(s, o, vpc, vN, voffset, v);
        narrow_to(out.means, set, 3, g, v.mean);
        narrow_to(out.scales, set, 3, g, v.scale);
        narrow_to(out.quats, set, 4, g, v.quat);
        if (out.opacities) {
            load_columns(s.opacities + set, 1, g, &opacity);
            F vopacity = moments[kG] / opacity;
            add_columns(out.opacities + set, 1, g, &vopacity);
        }
    }
    if (pose.links) flush_pose(sums, pose);
    if (pose.K)
        for (int j = 0; j < 4; ++j) pose.K[j] += sum(sums.K[j]);
}

void backward_splats(const Scene &s, const ImageFrame &frame, int image, uint32_t begin, uint32_t end,
                     const Gradients &out, const PoseSums &pose) {
    switch (s.coefficients) {
        case 1: return backward_splats_as<1>(s, frame, image, begin, end, out, pose);
        case 4: return backward_splats_as<4>(s, frame, image, begin, end, out, pose);
        case 9: return backward_splats_as<9>(s, frame, image, begin, end, out, pose);
        default: return backward_splats_as<16>(s, frame, image, begin, end, out, pose);
    }
}

}  // namespace
