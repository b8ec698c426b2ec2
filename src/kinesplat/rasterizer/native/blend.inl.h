// Compositing of one tile, forward and backward, a 4x4 block of pixels per vector.
#pragma once
#include <cstring>

#include "kernels.h"
#include "simd_math.h"

namespace {

using namespace kinesplat;

constexpr int kPrefetch = 12;       // entries ahead whose records are fetched while staging
constexpr int kForwardStage = 128;  // splats staged at a time by the forward pass

KS_INLINE void lane_offsets(F &x, F &y) {
    alignas(64) static const float kX[16] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
    alignas(64) static const float kY[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    x = load(kX);
    y = load(kY);
}

struct Block {  // where a block lies
    int x, y;        // first pixel in the image
    int width, height;  // pixels inside the image, up to 4
    F local_x, local_y;  // pixel centres from the tile's corner
    uint32_t inside;
};

KS_INLINE Block block_at(const Scene &s, int tile, int b) {
    Block k;
    int tx = tile % s.tiles_x() * kTile, ty = tile / s.tiles_x() * kTile, bx = b % 4 * kBlock, by = b / 4 * kBlock;
    k.x = tx + bx;
    k.y = ty + by;
    k.width = s.width - k.x < kBlock ? s.width - k.x : kBlock;
    k.height = s.height - k.y < kBlock ? s.height - k.y : kBlock;
    F x, y;
    lane_offsets(x, y);
    k.local_x = x + set1(static_cast<float>(bx) + 0.5f);
    k.local_y = y + set1(static_cast<float>(by) + 0.5f);
    k.inside = 0xffff;
    if (k.width < kBlock || k.height < kBlock) {
        k.inside = 0;
        for (int i = 0; i < 16; ++i) k.inside |= static_cast<uint32_t>(i % 4 < k.width && i / 4 < k.height) << i;
    }
    return k;
}

KS_INLINE void store_plane(float *plane, int stride, const Block &k, F value) {
    alignas(64) float lanes[16];
    store(lanes, value);
    float *out = plane + static_cast<size_t>(k.y) * stride + k.x;
    if (k.inside == 0xffff) {
        for (int y = 0; y < 4; ++y) std::memcpy(out + static_cast<size_t>(y) * stride, lanes + 4 * y, 16);
        return;
    }
    for (int y = 0; y < k.height; ++y)
        for (int x = 0; x < k.width; ++x) out[static_cast<size_t>(y) * stride + x] = lanes[4 * y + x];
}

KS_INLINE void store_rgb(float *image, int stride, const Block &k, const F rgb[3]) {
    alignas(64) float pixels[48];
    interleave3(rgb, pixels);
    float *out = image + (static_cast<size_t>(k.y) * stride + k.x) * 3;
    if (k.inside == 0xffff) {
        for (int y = 0; y < 4; ++y) std::memcpy(out + static_cast<size_t>(y) * stride * 3, pixels + 12 * y, 48);
        return;
    }
    for (int y = 0; y < k.height; ++y)
        for (int x = 0; x < 3 * k.width; ++x) out[static_cast<size_t>(y) * stride * 3 + x] = pixels[12 * y + x];
}

KS_INLINE F load_plane(const float *plane, int stride, const Block &k) {
    alignas(64) float lanes[16] = {};
    const float *in = plane + static_cast<size_t>(k.y) * stride + k.x;
    if (k.inside == 0xffff) {
        for (int y = 0; y < 4; ++y) std::memcpy(lanes + 4 * y, in + static_cast<size_t>(y) * stride, 16);
    } else {
        for (int y = 0; y < k.height; ++y)
            for (int x = 0; x < k.width; ++x) lanes[4 * y + x] = in[static_cast<size_t>(y) * stride + x];
    }
    return load(lanes);
}

KS_INLINE void load_rgb(const float *image, int stride, const Block &k, F rgb[3]) {
    alignas(64) float pixels[48] = {};
    const float *in = image + (static_cast<size_t>(k.y) * stride + k.x) * 3;
    if (k.inside == 0xffff) {
        for (int y = 0; y < 4; ++y) std::memcpy(pixels + 12 * y, in + static_cast<size_t>(y) * stride * 3, 48);
    } else {
        for (int y = 0; y < k.height; ++y)
            for (int x = 0; x < 3 * k.width; ++x) pixels[12 * y + x] = in[static_cast<size_t>(y) * stride * 3 + x];
    }
    deinterleave3(pixels, rgb);
}

KS_INLINE void stage(const ImageFrame &frame, uint32_t first, uint32_t count, Local *locals, uint32_t *masks) {
    for (uint32_t i = 0; i < count; ++i) {
        const Entry &e = frame.entries[first + i];
        __builtin_prefetch(&frame.records[frame.entries[first + i + kPrefetch].record]);
        const Record &r = frame.records[e.record];
        Local &l = locals[i];
        std::memcpy(&l.p, &r.p, 16);
        l.u = e.u;
        l.v = e.v;
        l.mask = e.mask;
        l.record = e.record;
        std::memcpy(l.color, r.color, 16);
        l.slot = e.slot;
        masks[i] = e.mask;
    }
    for (uint32_t i = count; i < (count + 15) / 16 * 16; ++i) masks[i] = 0;
}

KS_INLINE int list_block(const uint32_t *masks, uint32_t count, int b, int32_t *list) {
    int listed = 0;
    for (uint32_t i = 0; i < count; i += 16)
        listed += append_indices(masks + i, 1u << b, static_cast<int>(i), list + listed);
    return listed;
}

// Falloff exponent log2(alpha) before clamping, at sixteen pixels.
KS_INLINE F exponent_of(const Local &l, F x, F y) {
    F u = fma(set1(l.p), x, fma(set1(l.q), y, set1(l.u))), v = fma(set1(l.r), y, set1(l.v));
    return fnma(v, v, fnma(u, u, set1(l.log2_opacity)));
}
KS_INLINE F alpha_of(const Local &l, F x, F y) {
    F e = exponent_of(l, x, y);
    return zero_unless(set1(kLog2AlphaMin) <= e, min(exp2_lanes(e), set1(kAlphaMax)));
}

struct alignas(64) BlockState {
    F transmittance, last;  // running product; product of what was composited
    F rgb[3], z, cover, median;  // cover: sum of weights, precise where 1 - last cancels
    uint32_t processed;
    bool live;
};

// Composites listed splats onto one block; stops when every pixel is full.
template <bool kDepth, bool kFull>
[[gnu::noinline]] void forward_block(const Local *locals, const int32_t *list, int count, const Block &k,
                                     BlockState &state, float *contribution) {
    F T = state.transmittance, last = state.last, z = state.z, cover = state.cover, median = state.median;
    F red = state.rgb[0], green = state.rgb[1], blue = state.rgb[2];
    const F x = k.local_x, y = k.local_y, floor_T = set1(kTransmittanceMin);
    int i = 0;
    for (; i < count; ++i) {
        const Local &l = locals[list[i]];
        F alpha = alpha_of(l, x, y);
        F after = fnma(alpha, T, T);
        M live = floor_T <= after;
        F weight = zero_unless(live, alpha * T);
        red = fma(weight, set1(l.color[0]), red);
        green = fma(weight, set1(l.color[1]), green);
        blue = fma(weight, set1(l.color[2]), blue);
        if (kDepth) {
            z = fma(weight, set1(l.z), z);
            cover = cover + weight;
        }
        if (kFull) {
            M crossed = (set1(kMedianTransmittance) <= T) & (after < set1(kMedianTransmittance)) & live;
            median = select(crossed, set1(static_cast<float>(l.record)), median);
            if (contribution) contribution[list[i]] += sum(weight);
        }
        T = after;
        last = select(live, after, last);
        if (!any(live)) {
            state.live = false;
            ++i;
            break;
        }
    }
    state.processed += static_cast<uint32_t>(i);
    state.transmittance = T;
    state.last = last;
    state.z = z;
    state.cover = cover;
    state.median = median;
    state.rgb[0] = red;
    state.rgb[1] = green;
    state.rgb[2] = blue;
}

KS_INLINE void store_links(const Scene &s, const ImageFrame &frame, int32_t *plane, const Block &k, F median) {
    alignas(64) float lanes[16];
    store(lanes, median);
    for (int y = 0; y < k.height; ++y)
        for (int x = 0; x < k.width; ++x) {
            int32_t link = -1;
            if (lanes[4 * y + x] >= 0) {
                size_t row = static_cast<size_t>(frame.records[static_cast<uint32_t>(lanes[4 * y + x])].splat) *
                             static_cast<size_t>(s.links_per_splat);
                int best = 0;
                for (int l = 1; l < s.links_per_splat; ++l)
                    if (s.link_weights[row + l] > s.link_weights[row + best]) best = l;
                link = s.link_index[row + best];
            }
            plane[static_cast<size_t>(k.y + y) * s.width + k.x + x] = link;
        }
}

KS_INLINE void finish_block(const Scene &s, const ImageFrame &frame, int image, const Block &k,
                            const BlockState &state, const Images &out) {
    size_t offset = static_cast<size_t>(image) * static_cast<size_t>(s.pixels());
    F alpha = set1(1.0f) - state.last;
    if (out.rgb) {
        F rgb[3];
        for (int c = 0; c < 3; ++c) rgb[c] = fma(state.last, set1(s.background[3 * image + c]), state.rgb[c]);
        store_rgb(out.rgb + offset * 3, s.width, k, rgb);
    }
    if (out.alpha) store_plane(out.alpha + offset, s.width, k, alpha);
    if (out.depth) store_plane(out.depth + offset, s.width, k, state.z / max(state.cover, set1(kDepthAlphaMin)));
    if (out.link_id) store_links(s, frame, out.link_id + offset, k, state.median);
}

template <bool kDepth, bool kFull>
void forward_tile_as(const Scene &s, ImageFrame &frame, int image, int tile, Scratch &scratch, const Images &out) {
    BlockState states[kTileBlocks];
    Block blocks[kTileBlocks];
    for (int b = 0; b < kTileBlocks; ++b) {
        blocks[b] = block_at(s, tile, b);
        BlockState &st = states[b];
        st.transmittance = zero_unless(from_bits(blocks[b].inside), set1(1.0f));
        st.last = set1(1.0f);
        st.rgb[0] = st.rgb[1] = st.rgb[2] = st.z = st.cover = set1(0.0f);
        st.median = set1(-1.0f);
        st.processed = 0;
        st.live = blocks[b].width > 0 && blocks[b].height > 0;
    }
    Local *locals = scratch.locals.ensure(kForwardStage);
    uint32_t *masks = scratch.masks.ensure(kForwardStage);
    int32_t *list = scratch.list.ensure(kForwardStage + 16);
    float contribution[kForwardStage];
    uint32_t begin = frame.tile_begin[tile], end = frame.tile_begin[tile + 1], used = 0;
    bool live = true;
    for (uint32_t first = begin; first < end; first += kForwardStage) {
        uint32_t count = end - first < kForwardStage ? end - first : kForwardStage;
        if (kFull) std::memset(contribution, 0, sizeof contribution);
        if (live) stage(frame, first, count, locals, masks);
        bool next = false;
        for (int b = 0; live && b < kTileBlocks; ++b) {
            if (!states[b].live) continue;
            int listed = list_block(masks, count, b, list);
            uint32_t before = states[b].processed;
            forward_block<kDepth, kFull>(locals, list, listed, blocks[b], states[b],
                                         kFull && out.contribution ? contribution : nullptr);
            if (states[b].processed > before) {
                uint32_t last = first - begin + static_cast<uint32_t>(list[states[b].processed - before - 1]) + 1;
                used = last > used ? last : used;
            }
            next |= states[b].live;
        }
        live = next;
        if (kFull && out.contribution)
            for (uint32_t i = 0; i < count; ++i) frame.slots[frame.entries[first + i].slot].sum[0] = contribution[i];
    }
    frame.staged[tile] = used;
    for (int b = 0; b < kTileBlocks; ++b) {
        size_t at = static_cast<size_t>(tile) * kTileBlocks + b;
        frame.block_counts[at] = states[b].processed;
        if (kDepth) store(&frame.coverage[at * 16], states[b].cover);
        if (blocks[b].width > 0 && blocks[b].height > 0) finish_block(s, frame, image, blocks[b], states[b], out);
    }
}

void forward_tile(const Scene &s, ImageFrame &frame, int image, int tile, Scratch &scratch, const Images &out) {
    if (out.link_id || out.contribution)
        forward_tile_as<true, true>(s, frame, image, tile, scratch, out);
    else if (out.depth)
        forward_tile_as<true, false>(s, frame, image, tile, scratch, out);
    else
        forward_tile_as<false, false>(s, frame, image, tile, scratch, out);
}

// ---------------------------------------------------------------------------------------------------- backward

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
    float cx = static_cast<float>(b % 4 * kBlock) + 2.0f, cy = static_cast<float>(b / 4 * kBlock) + 2.0f;
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
    for (uint32_t i = 0; i < staged; ++i) frame.slots[locals[i].slot] = sums[i];
    for (uint32_t i = staged; i < count; ++i) std::memset(&frame.slots[frame.entries[begin + i].slot], 0, sizeof(Slot));
}

void backward_tile(const Scene &s, ImageFrame &frame, int image, int tile, Scratch &scratch,
                   const ImageGradients &in) {
    if (in.v_depth)
        backward_tile_as<true>(s, frame, image, tile, scratch, in);
    else
        backward_tile_as<false>(s, frame, image, tile, scratch, in);
}

}  // namespace
