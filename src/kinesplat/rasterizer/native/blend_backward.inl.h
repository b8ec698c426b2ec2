// Backward of the compositing of one tile: per splat and tile the sums that `Moment` names.
// Derivation: docs/derivations.md, section 2.
#pragma once
#include <cstring>

#include "blend.inl.h"

namespace {

struct BlockGradient {  // per pixel: dL/d(colour), dL/d(sum w z), dL/d(alpha), and the background's share
    alignas(64) float rgb[3][16];
    alignas(64) float z[16];
    F vec[3], vz, valpha, behind;
    bool zero;
};

KS_INLINE void load_gradient(const Scene &s, const ImageFrame &frame, int image, size_t at, const Block &k,
                             const ImageGradients &in, BlockGradient &g) {
    size_t offset = static_cast<size_t>(image) * static_cast<size_t>(s.pixels());
    for (int c = 0; c < 3; ++c) g.vec[c] = set1(0.0f);
    if (in.rgb) load_rgb(in.rgb + offset * 3, s.width, k, g.vec);
    g.behind = set1(0.0f);
    for (int c = 0; c < 3; ++c) g.behind = fma(g.vec[c], set1(s.background[3 * image + c]), g.behind);
    g.valpha = in.alpha ? load_plane(in.alpha + offset, s.width, k) : set1(0.0f);
    g.vz = set1(0.0f);
    if (in.v_depth) {
        F cover = load(&frame.coverage[at * 16]), v = load_plane(in.v_depth + offset, s.width, k);
        g.vz = v / max(cover, set1(kDepthAlphaMin));
        F through = zero_unless(set1(kDepthAlphaMin) <= cover, g.vz * load_plane(in.depth + offset, s.width, k));
        g.valpha = g.valpha - through;
    }
    M some = from_bits(0);
    for (F v : {g.vec[0], g.vec[1], g.vec[2], g.vz, g.valpha}) some = some | (v < set1(0.0f)) | (set1(0.0f) < v);
    g.zero = !any(some);
    for (int c = 0; c < 3; ++c) store(g.rgb[c], g.vec[c]);
    store(g.z, g.vz);
}

// Forward again: effective alphas and weights of every listed splat.
[[gnu::noinline]] void replay_block(const Local *locals, const int32_t *list, int count, const Block &k, float *alphas,
                                    float *weights) {
    F T = zero_unless(from_bits(k.inside), set1(1.0f));
    const F x = k.local_x, y = k.local_y, floor_T = set1(kTransmittanceMin);
    for (int i = 0; i < count; ++i) {
        F alpha = alpha_of(locals[list[i]], x, y);
        F after = fnma(alpha, T, T);
        M live = floor_T <= after;
        store(alphas + 16 * i, zero_unless(live, alpha));
        store(weights + 16 * i, zero_unless(live, alpha * T));
        T = after;
    }
}

// Back to front: alphas become g = alpha dL/dalpha. `behind` is the gradient-weighted colour behind each splat, so
// dL/dalpha_i = T_i (s_i - behind_i) needs no division by 1 - alpha.
template <bool kDepth>
[[gnu::noinline]] void reverse_block(const Local *locals, const int32_t *list, int count, const BlockGradient &grad,
                                     float *alphas, const float *weights) {
    F behind = grad.behind;
    const F vr = grad.vec[0], vg = grad.vec[1], vb = grad.vec[2], va = grad.valpha, vz = grad.vz;
    const F top = set1(kAlphaMax);
    for (int i = count - 1; i >= 0; --i) {
        const Local &l = locals[list[i]];
        F s = fma(set1(l.color[0]), vr, fma(set1(l.color[1]), vg, fma(set1(l.color[2]), vb, va)));
        if (kDepth) s = fma(set1(l.z), vz, s);
        F alpha = load(alphas + 16 * i), d = s - behind;
        store(alphas + 16 * i, zero_unless(alpha < top, d * load(weights + 16 * i)));
        behind = fma(alpha, d, behind);
    }
}

// Sums over the lattice 0, 1, 2, 3 centred at zero: 1, x, x^2 of four vectors.
KS_INLINE void lattice(F a0, F a1, F a2, F a3, F &s0, F &s1, F &s2) {
    F outer = a0 + a3, inner = a1 + a2;
    s0 = outer + inner;
    s1 = fma(set1(1.5f), a3 - a0, set1(0.5f) * (a2 - a1));
    s2 = fma(set1(2.25f), outer, set1(0.25f) * inner);
}
KS_INLINE void lattice(F a0, F a1, F a2, F a3, F &s0, F &s1) {
    s0 = (a0 + a3) + (a1 + a2);
    s1 = fma(set1(1.5f), a3 - a0, set1(0.5f) * (a2 - a1));
}

// Sixteen splats of a block: sums over its pixels, splats in the lanes, then added to the splats' rows.
template <bool kDepth>
[[gnu::noinline]] void reduce_group(const Local *locals, const int32_t *list, int count, float centre_x,
                                    float centre_y, const BlockGradient &grad, const float *gs, const float *weights,
                                    Slot *sums) {
    F t[16], out[16];
    for (int i = 0; i < 16; ++i) t[i] = load(gs + 16 * i);
    transpose(t);
    F r0[4], r1[4], r2[4], s00, s01, s02, s10, s11, s20;
    for (int y = 0; y < 4; ++y) lattice(t[4 * y], t[4 * y + 1], t[4 * y + 2], t[4 * y + 3], r0[y], r1[y], r2[y]);
    lattice(r0[0], r0[1], r0[2], r0[3], s00, s01, s02);
    lattice(r1[0], r1[1], r1[2], r1[3], s10, s11);
    s20 = (r2[0] + r2[3]) + (r2[1] + r2[2]);

    const float *geometry[16];
    for (int i = 0; i < 16; ++i) geometry[i] = &locals[list[i < count ? i : 0]].p;
    load_columns8(geometry, t);
    F p = t[0], q = t[1], r = t[2], cx = set1(centre_x), cy = set1(centre_y);
    F u = fma(p, cx, fma(q, cy, t[4])), v = fma(r, cy, t[5]);
    F du = fma(p, s10, q * s01), dv = r * s01;
    out[kG] = s00;
    out[kGu] = fma(u, s00, du);
    out[kGv] = fma(v, s00, dv);
    F px = fma(p, s20, q * s11), py = fma(p, s11, q * s02);
    out[kGuu] = fma(u, fma(u, s00, du + du), fma(p, px, q * py));
    out[kGuv] = fma(u, fma(v, s00, dv), fma(v, du, r * py));
    out[kGvv] = fma(v, fma(v, s00, dv + dv), r * r * s02);

    for (int i = 0; i < 16; ++i) t[i] = load(weights + 16 * i);
    transpose(t);
    for (int c = 0; c < 3; ++c) {
        F a = t[0] * set1(grad.rgb[c][0]), b = t[1] * set1(grad.rgb[c][1]);
        for (int i = 2; i < 16; i += 2) {
            a = fma(t[i], set1(grad.rgb[c][i]), a);
            b = fma(t[i + 1], set1(grad.rgb[c][i + 1]), b);
        }
        out[kRed + c] = a + b;
    }
    out[kZ] = set1(0.0f);
    if (kDepth)
        for (int i = 0; i < 16; ++i) out[kZ] = fma(t[i], set1(grad.z[i]), out[kZ]);
    for (int i = kMoments; i < 16; ++i) out[i] = set1(0.0f);
    transpose(out);
    for (int i = 0; i < count; ++i) {
        float *row = sums[list[i]].sum;
        store(row, load(row) + out[i]);
    }
}

template <bool kDepth>
void backward_block(const Scene &s, const ImageFrame &frame, int image, int tile, int b, uint32_t staged,
                    Scratch &scratch, const ImageGradients &in) {
    size_t at = static_cast<size_t>(tile) * kTileBlocks + b;
    int count = static_cast<int>(frame.block_counts[at]);
    if (!count) return;
    Block k = block_at(s, tile, b);
    BlockGradient grad;
    load_gradient(s, frame, image, at, k, in, grad);
    if (grad.zero) return;
    const Local *locals = scratch.locals.data();
    int32_t *list = scratch.list.ensure(staged + 32);
    list_block(scratch.masks.data(), staged, b, list);
    size_t rows = (static_cast<size_t>(count) + 15) / 16 * 16;
    float *alphas = scratch.alpha.ensure(rows * 16), *weights = scratch.weight.ensure(rows * 16);
    replay_block(locals, list, count, k, alphas, weights);
    reverse_block<kDepth>(locals, list, count, grad, alphas, weights);
    size_t tail = (rows - static_cast<size_t>(count)) * 16;
    std::memset(alphas + static_cast<size_t>(count) * 16, 0, tail * sizeof(float));
    std::memset(weights + static_cast<size_t>(count) * 16, 0, tail * sizeof(float));
    float cx = static_cast<float>(b % 4 * kBlock) + 2.0f - kHalfTile;
    float cy = static_cast<float>(b / 4 * kBlock) + 2.0f - kHalfTile;
    for (int i = 0; i < count; i += 16)
        reduce_group<kDepth>(locals, list + i, count - i < 16 ? count - i : 16, cx, cy, grad, alphas + 16 * i,
                             weights + 16 * i, scratch.sums.data());
}

template <bool kDepth>
void backward_tile_as(const Scene &s, ImageFrame &frame, int image, int tile, Scratch &scratch,
                      const ImageGradients &in) {
    uint32_t begin = frame.tile_begin[tile], count = frame.tile_begin[tile + 1] - begin;
    if (!count) return;
    uint32_t staged = frame.staged[tile];
    Local *locals = scratch.locals.ensure(staged + 16);
    uint32_t *masks = scratch.masks.ensure(staged + 16);
    Slot *sums = scratch.sums.ensure(staged + 16);
    stage(frame, begin, staged, locals, masks);
    std::memset(sums, 0, staged * sizeof(Slot));
    for (int b = 0; b < kTileBlocks; ++b) backward_block<kDepth>(s, frame, image, tile, b, staged, scratch, in);
    Slot *slots = frame.work.slots.data();
    if (frame.work.merged) {
        for (uint32_t i = 0; i < staged; ++i) {
            float *row = slots[locals[i].record].sum;
            store(row, load(row) + load(sums[i].sum));
        }
        return;
    }
    for (uint32_t i = 0; i < staged; ++i) slots[locals[i].slot] = sums[i];
    for (uint32_t i = staged; i < count; ++i) std::memset(&slots[frame.entries[begin + i].slot], 0, sizeof(Slot));
}

void backward_tile(const Scene &s, ImageFrame &frame, int image, int tile, Scratch &scratch,
                   const ImageGradients &in) {
    if (in.v_depth)
        backward_tile_as<true>(s, frame, image, tile, scratch, in);
    else
        backward_tile_as<false>(s, frame, image, tile, scratch, in);
}

}  // namespace
