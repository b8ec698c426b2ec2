// Compositing of one tile, a 4x4 block of pixels per vector: what forward and backward share, and the forward pass.
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
    F local_x, local_y;  // pixel centres from the tile's centre
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
    k.local_x = x + set1(static_cast<float>(bx) + 0.5f - kHalfTile);
    k.local_y = y + set1(static_cast<float>(by) + 0.5f - kHalfTile);
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
            for (uint32_t i = 0; i < count; ++i) frame.work.slots[frame.entries[first + i].slot].sum[0] = contribution[i];
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

}  // namespace
