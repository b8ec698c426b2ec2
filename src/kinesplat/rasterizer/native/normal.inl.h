// Gauss-Newton normal equations of one tile: derivatives of every pixel with respect to the twists of the links in the
// camera frame, T_cam_link <- exp([v; w]^) T_cam_link, contracted on the spot. Derivation: docs/derivations.md, section 5.
#pragma once
#include "blend.inl.h"
#include "splat_backward.inl.h"

namespace {

// d(sigma)/d(twist) of sixteen splats as polynomials in u, v, u^2, u v, v^2.
KS_INLINE void twist_coefficients(const Scene &s, int image, const Geometry &o, int axis, F out[5]) {
    D zero = set1d(0.0), dp[3], dN[9];
    for (int i = 0; i < 9; ++i) dN[i] = zero;
    for (int i = 0; i < 3; ++i) dp[i] = zero;
    if (axis < 3) {
        dp[axis] = set1d(1.0);
    } else {  // e x p and e x N_j
        int e = axis - 3, a = (e + 1) % 3, b = (e + 2) % 3;
        dp[a] = zero - o.pc[b];
        dp[b] = o.pc[a];
        for (int j = 0; j < 3; ++j) {
            dN[3 * a + j] = zero - o.N[3 * b + j];
            dN[3 * b + j] = o.N[3 * a + j];
        }
    }
    D dmean[2], dP[6];
    for (int i = 0; i < 2; ++i) {
        D f_z = set1d(s.focal(image, i)) * o.inv_z, tangent = o.pc[i] * o.inv_z;
        dmean[i] = f_z * fnma(tangent, dp[2], dp[i]);
        D dslope = select(o.guarded[i], zero, o.inv_z * fnma(tangent, dp[2], dp[i]));
        D dlog_z = dp[2] * o.inv_z;
        for (int j = 0; j < 3; ++j) {
            D axes = fnma(dslope, o.N[6 + j], fnma(o.slope[i], dN[6 + j], dN[3 * i + j]));
            dP[3 * i + j] = fnma(dlog_z, o.P[3 * i + j], f_z * axes);
        }
    }
    D b00 = zero, b01 = zero, b11 = zero;
    for (int j = 0; j < 3; ++j) {
        D w0 = fma(o.p, dP[j], o.q * dP[3 + j]), w1 = o.r * dP[3 + j];
        D a0 = fma(o.p, o.P[j], o.q * o.P[3 + j]), a1 = o.r * o.P[3 + j];
        b00 = fma(w0, a0, b00);
        b01 = fma(w0, a1, fma(w1, a0, b01));
        b11 = fma(w1, a1, b11);
    }
    D k2 = set1d(-1.0 / kWhitening2), k4 = set1d(-1.0 / (kWhitening2 * kWhitening2));
    out[0] = narrow(k2 * fma(o.p, dmean[0], o.q * dmean[1]));
    out[1] = narrow(k2 * o.r * dmean[1]);
    out[2] = narrow(k4 * b00);
    out[3] = narrow(k4 * b01);
    out[4] = narrow(k4 * b11);
}

// d(colour)/d(v): rotating about the camera does not change the view direction in the link frame, moving does. Along the
// optical axis it is the other way round, and this is d(colour)/d(w).
template <int kCoefficients>
KS_INLINE void color_derivatives(const Scene &s, int image, const Geometry &o, const Group &g, F out[9]) {
    size_t set = static_cast<size_t>(s.set_of_image[image]) * s.n;
    F sh[3 * kMaxCoefficients], rgb[3];
    load_columns(s.sh + set * 3 * kCoefficients, 3 * kCoefficients, g, sh);
    colors_of<kCoefficients>(sh, o.dir, rgb);
    D inv = set1d(1.0) / o.offset_norm;
    for (int c = 0; c < 3; ++c) {
        F a[16], v[3];
        M lit = set1(0.0f) <= rgb[c];
        for (int k = 0; k < kCoefficients; ++k) a[k] = zero_unless(lit, sh[3 * k + c]);
        sh_basis_vjp(kCoefficients, o.dir[0], o.dir[1], o.dir[2], a, v);
        F along = fma(o.dir[0], v[0], fma(o.dir[1], v[1], o.dir[2] * v[2]));
        D w[3];
        for (int i = 0; i < 3; ++i) w[i] = widen(fnma(o.dir[i], along, v[i])) * inv;
        for (int i = 0; i < 3; ++i)
            out[3 * c + i] = narrow(dot3(o.T[4 * i], o.T[4 * i + 1], o.T[4 * i + 2], w[0], w[1], w[2]));
        if (!s.along_axis) continue;
        F x = out[3 * c];  // the cross product with the axis
        out[3 * c] = out[3 * c + 1];
        out[3 * c + 1] = set1(0.0f) - x;
        out[3 * c + 2] = set1(0.0f);
    }
}

template <int kCoefficients>
[[gnu::noinline]] void pose_records_as(const Scene &s, const ImageFrame &frame, int image, uint32_t begin,
                                       uint32_t end, PoseRecord *out) {
    for (uint32_t first = begin; first < end; first += 16) {
        uint32_t ids[16];
        int count = end - first < 16 ? static_cast<int>(end - first) : 16;
        for (int i = 0; i < count; ++i) ids[i] = frame.records[first + i].splat;
        Group g = make_group(ids, count);
        Geometry o;
        compute_geometry(s, image, g, o);
        F columns[48];
        for (int axis = 0; axis < 6; ++axis) twist_coefficients(s, image, o, axis, columns + 5 * axis);
        color_derivatives<kCoefficients>(s, image, o, g, columns + 30);
        for (int j = 39; j < 48; ++j) columns[j] = set1(0.0f);
        for (int part = 0; part < 3; ++part) transpose(columns + 16 * part);
        for (int i = 0; i < count; ++i) {
            for (int part = 0; part < 3; ++part) store(out[first + i].sigma[0] + 16 * part, columns[16 * part + i]);
            out[first + i].link = s.link_index[ids[i]];
        }
    }
}

void pose_records(const Scene &s, const ImageFrame &frame, int image, uint32_t begin, uint32_t end, PoseRecord *out) {
    switch (s.coefficients) {
        case 1: return pose_records_as<1>(s, frame, image, begin, end, out);
        case 4: return pose_records_as<4>(s, frame, image, begin, end, out);
        case 9: return pose_records_as<9>(s, frame, image, begin, end, out);
        default: return pose_records_as<16>(s, frame, image, begin, end, out);
    }
}

struct Pixels {  // one block: rendered values, residuals and their weights
    F value[4], residual[4], weight[4], background[3];
    bool any;
};

// Forward of a block that keeps alphas and weights; returns how many listed splats were composited.
[[gnu::noinline]] int composite_block(const Local *locals, const int32_t *list, int count, const Block &k,
                                      float *alphas, float *weights, F value[4]) {
    F T = zero_unless(from_bits(k.inside), set1(1.0f));
    F red = set1(0.0f), green = red, blue = red, last = set1(1.0f);
    const F x = k.local_x, y = k.local_y, floor_T = set1(kTransmittanceMin);
    int i = 0;
    while (i < count) {
        const Local &l = locals[list[i]];
        F alpha = alpha_of(l, x, y);
        F after = fnma(alpha, T, T);
        M live = floor_T <= after;
        F weight = zero_unless(live, alpha * T);
        store(alphas + 16 * i, zero_unless(live, alpha));
        store(weights + 16 * i, weight);
        red = fma(weight, set1(l.color[0]), red);
        green = fma(weight, set1(l.color[1]), green);
        blue = fma(weight, set1(l.color[2]), blue);
        last = select(live, after, last);
        T = after;
        ++i;
        if (!any(live)) break;
    }
    value[0] = red;
    value[1] = green;
    value[2] = blue;
    value[3] = last;
    return i;
}

KS_INLINE void load_pixels(const Scene &s, int image, const Block &k, const Target &t, Pixels &p) {
    size_t pixels = static_cast<size_t>(s.pixels());
    size_t at = static_cast<size_t>(t.target_of_image[image]) * pixels;
    F last = p.value[3], target[3], inside = zero_unless(from_bits(k.inside), set1(1.0f));
    load_rgb(t.rgb + 3 * at, s.width, k, target);
    for (int c = 0; c < 3; ++c) p.background[c] = set1(s.background[3 * image + c]);
    if (t.backdrop) load_rgb(t.backdrop + 3 * at, s.width, k, p.background);
    F weight = t.rgb_weight ? load_plane(t.rgb_weight + at, s.width, k) : inside;
    for (int c = 0; c < 3; ++c) {
        p.value[c] = fma(last, p.background[c], p.value[c]);
        p.residual[c] = p.value[c] - target[c];
        p.weight[c] = weight;
    }
    p.value[3] = set1(1.0f) - last;
    p.residual[3] = p.weight[3] = set1(0.0f);
    if (t.alpha) {
        p.residual[3] = p.value[3] - load_plane(t.alpha + at, s.width, k);
        p.weight[3] = t.alpha_weight ? load_plane(t.alpha_weight + at, s.width, k) : inside;
    }
    p.any = any((set1(0.0f) < p.weight[0]) | (set1(0.0f) < p.weight[3]));
}

// Back to front: per channel d(pixel)/d(sigma) of every listed splat, kChannels rows of sixteen lanes each.
template <int kChannels>
[[gnu::noinline]] void channel_slopes(const Local *locals, const int32_t *list, int count, const F *background,
                                      const float *alphas, const float *weights, float *slopes) {
    F behind[kChannels];
    for (int c = 0; c < kChannels; ++c) behind[c] = c < 3 ? background[c] : set1(0.0f);
    for (int i = count - 1; i >= 0; --i) {
        const Local &l = locals[list[i]];
        F alpha = load(alphas + 16 * i);
        F weight = zero_unless(alpha < set1(kAlphaMax), load(weights + 16 * i));
        for (int c = 0; c < kChannels; ++c) {
            F d = behind[c] - set1(c < 3 ? l.color[c] : 1.0f);
            store(slopes + (kChannels * i + c) * 16, weight * d);
            behind[c] = fnma(alpha, d, behind[c]);
        }
    }
}

// Rows of the Jacobian of one link over one block: J[channel * 6 + axis].
template <int kChannels>
[[gnu::noinline]] void link_rows(const Local *locals, const int32_t *list, const PoseRecord *poses,
                                 const int32_t *members, int count, int first_lit, const Block &k,
                                 const float *weights, const float *slopes, F *rows) {
    F J[kChannels * 6];
    for (int j = 0; j < kChannels * 6; ++j) J[j] = set1(0.0f);
    const F x = k.local_x, y = k.local_y;
    for (int m = 0; m < count; ++m) {
        int i = members[m];
        const Local &l = locals[list[i]];
        const PoseRecord &pose = poses[l.record];
        F u = fma(set1(l.p), x, fma(set1(l.q), y, set1(l.u))), v = fma(set1(l.r), y, set1(l.v));
        F weight = load(weights + 16 * i), slope[kChannels];
        for (int c = 0; c < kChannels; ++c) slope[c] = load(slopes + (kChannels * i + c) * 16);
        for (int axis = 0; axis < 6; ++axis) {
            const float *a = pose.sigma[axis];
            F inner = fma(u, fma(set1(a[2]), u, fma(set1(a[3]), v, set1(a[0]))), v * fma(set1(a[4]), v, set1(a[1])));
            for (int c = 0; c < kChannels; ++c) J[6 * c + axis] = fma(slope[c], inner, J[6 * c + axis]);
        }
        for (int i = 0; i < 3; ++i)
            for (int c = 0; c < 3; ++c) {
                F &row = J[6 * c + first_lit + i];
                row = fma(weight, set1(pose.color[c][i]), row);
            }
    }
    for (int j = 0; j < kChannels * 6; ++j) rows[j] = J[j];
}

// Adds sum over channels of A^T W B to 36 lane sums; of a link with itself only the upper triangle.
template <int kChannels, bool kSame>
[[gnu::noinline]] void rank_update(const F *weighted, const F *rows, F *sums) {
    for (int a = 0; a < 6; ++a)
        for (int b = kSame ? a : 0; b < 6; ++b) {
            F total = sums[6 * a + b];
            for (int c = 0; c < kChannels; ++c) total = fma(weighted[6 * c + a], rows[6 * c + b], total);
            sums[6 * a + b] = total;
        }
}

KS_INLINE int number_link(const int32_t *links, int count, int32_t link) {
    for (int i = 0; i < count; ++i)
        if (links[i] == link) return i;
    return count;
}

constexpr int kPairFloats = 36 * 16, kGradientFloats = 6 * 16;

struct NormalTile {
    const Scene &s;
    ImageFrame &frame;
    int image, tile;
    Scratch &scratch;
    const Target &target;
    uint32_t staged = 0;
    int links = 0, pairs = 0;
    double loss = 0;
};

KS_INLINE void stage_normal_tile(NormalTile &t) {
    uint32_t begin = t.frame.tile_begin[t.tile], count = t.frame.tile_begin[t.tile + 1] - begin;
    Local *locals = t.scratch.locals.ensure(count + 16);
    stage(t.frame, begin, count, locals, t.scratch.masks.ensure(count + 16));
    int32_t *links = t.scratch.links.ensure(static_cast<size_t>(t.s.links) + 1);
    int32_t *of_entry = t.scratch.link_of_entry.ensure(count + 1);
    for (uint32_t i = 0; i < count; ++i) {
        int32_t link = t.frame.work.poses[locals[i].record].link;
        int number = i && link == t.frame.work.poses[locals[i - 1].record].link ? of_entry[i - 1]
                                                                          : number_link(links, t.links, link);
        if (number == t.links) links[t.links++] = link;
        of_entry[i] = number;
    }
    size_t n = static_cast<size_t>(t.links);
    t.staged = count;
    int32_t *pair_of = t.scratch.pair_of.ensure(n * n + 1);
    for (size_t i = 0; i < n * n; ++i) pair_of[i] = -1;
    float *gradient = t.scratch.gradient.ensure(n * kGradientFloats + 16);
    std::memset(gradient, 0, n * kGradientFloats * sizeof(float));
    t.scratch.rows.ensure(n * 24 * 16 + 16);
    t.scratch.members.ensure((n + 1) * (count + 16));
    t.scratch.member_counts.ensure(n + 1);
}

// Lane sums of the pair (a, b), a <= b, made on first use.
KS_INLINE F *pair_sums(NormalTile &t, int a, int b) {
    int32_t &slot = t.scratch.pair_of[static_cast<size_t>(a) * static_cast<size_t>(t.links) + static_cast<size_t>(b)];
    size_t used = static_cast<size_t>(t.pairs) * kPairFloats;
    if (slot < 0) {
        slot = t.pairs++;
        float *sums = t.scratch.pairs.grow(used + kPairFloats, used) + used;
        std::memset(sums, 0, kPairFloats * sizeof(float));
    }
    return reinterpret_cast<F *>(t.scratch.pairs.data() + static_cast<size_t>(slot) * kPairFloats);
}

template <int kChannels>
void accumulate_links(NormalTile &t, const int32_t *present, int present_count, const Pixels &p) {
    F *rows = reinterpret_cast<F *>(t.scratch.rows.data());
    for (int i = 0; i < present_count; ++i) {
        int a = present[i];
        F weighted[24], *J = rows + 24 * a;
        F *gradient = reinterpret_cast<F *>(t.scratch.gradient.data()) + 6 * a;
        for (int c = 0; c < kChannels; ++c)
            for (int axis = 0; axis < 6; ++axis) {
                weighted[6 * c + axis] = J[6 * c + axis] * p.weight[c];
                gradient[axis] = fma(weighted[6 * c + axis], p.residual[c], gradient[axis]);
            }
        for (int j = 0; j < present_count; ++j) {
            int b = present[j];
            if (a == b) rank_update<kChannels, true>(weighted, J, pair_sums(t, a, a));
            if (a < b) rank_update<kChannels, false>(weighted, rows + 24 * b, pair_sums(t, a, b));
        }
    }
}

template <int kChannels>
void normal_block(NormalTile &t, int b) {
    Block k = block_at(t.s, t.tile, b);
    if (k.width <= 0 || k.height <= 0) return;
    const Local *locals = t.scratch.locals.data();
    int32_t *list = t.scratch.list.ensure(t.staged + 32);
    int listed = list_block(t.scratch.masks.data(), t.staged, b, list);
    size_t room = static_cast<size_t>(listed) * 16 + 16;
    float *alphas = t.scratch.alpha.ensure(room), *weights = t.scratch.weight.ensure(room);
    float *slopes = t.scratch.slopes.ensure(room * kChannels);
    Pixels p;
    int count = composite_block(locals, list, listed, k, alphas, weights, p.value);
    load_pixels(t.s, t.image, k, t.target, p);
    if (!p.any) return;
    F squares = set1(0.0f);
    for (int c = 0; c < kChannels; ++c) squares = fma(p.weight[c] * p.residual[c], p.residual[c], squares);
    t.loss += static_cast<double>(sum(squares));
    if (!count) return;
    channel_slopes<kChannels>(locals, list, count, p.background, alphas, weights, slopes);

    int32_t *members = t.scratch.members.data(), *counts = t.scratch.member_counts.data();
    int32_t *present = t.scratch.present.ensure(static_cast<size_t>(t.links) + 1);
    int present_count = 0;
    for (int l = 0; l < t.links; ++l) counts[l] = 0;
    for (int i = 0; i < count; ++i) {
        int link = t.scratch.link_of_entry[static_cast<size_t>(list[i])];
        if (!counts[link]) present[present_count++] = link;
        members[static_cast<size_t>(link) * t.staged + static_cast<size_t>(counts[link]++)] = i;
    }
    F *rows = reinterpret_cast<F *>(t.scratch.rows.data());
    for (int i = 0; i < present_count; ++i) {
        int link = present[i];
        link_rows<kChannels>(locals, list, t.frame.work.poses.data(), members + static_cast<size_t>(link) * t.staged,
                             counts[link], t.s.along_axis ? 3 : 0, k, weights, slopes, rows + 24 * link);
    }
    accumulate_links<kChannels>(t, present, present_count, p);
}

KS_INLINE NormalItem &append_item(NormalSums &out, int a, int b) {
    NormalItem *items = out.items.grow(out.count + 1, out.count);
    NormalItem &item = items[out.count++];
    item.a = a;
    item.b = b;
    return item;
}

void emit_tile(const NormalTile &t, NormalSums &out) {
    append_item(out, -1, -1).value[0] = t.loss;
    const int32_t *links = t.scratch.links.data();
    for (int a = 0; a < t.links; ++a) {
        const F *gradient = reinterpret_cast<const F *>(t.scratch.gradient.data()) + 6 * a;
        NormalItem &g = append_item(out, links[a], -1);
        for (int j = 0; j < 6; ++j) g.value[j] = static_cast<double>(sum(gradient[j]));
        for (int b = a; b < t.links; ++b) {
            int slot = t.scratch.pair_of[static_cast<size_t>(a) * static_cast<size_t>(t.links) + static_cast<size_t>(b)];
            if (slot < 0) continue;
            const F *sums = reinterpret_cast<const F *>(t.scratch.pairs.data() + static_cast<size_t>(slot) * kPairFloats);
            NormalItem &item = append_item(out, links[a], links[b]);
            for (int j = 0; j < 36; ++j) item.value[j] = static_cast<double>(sum(sums[j]));
        }
    }
}

void normal_tile(const Scene &s, ImageFrame &frame, int image, int tile, Scratch &scratch, const Target &target,
                 NormalSums &out) {
    NormalTile t{s, frame, image, tile, scratch, target};
    stage_normal_tile(t);
    for (int b = 0; b < kTileBlocks; ++b) {
        if (target.alpha)
            normal_block<4>(t, b);
        else
            normal_block<3>(t, b);
    }
    emit_tile(t, out);
}

}  // namespace
