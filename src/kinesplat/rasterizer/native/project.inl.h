// Forward: projection into records, and binning of depth-sorted records into tiles with exact block masks.
#pragma once
#include <cstring>

#include "splat.inl.h"

namespace {

template <int kCoefficients>
KS_INLINE void colors_of(const F *sh, const F dir[3], F rgb[3]) {
    F Y[16];
    sh_basis(kCoefficients, dir[0], dir[1], dir[2], Y);
    for (int c = 0; c < 3; ++c) {
        F value = set1(0.5f);
        for (int k = 0; k < kCoefficients; ++k) value = fma(Y[k], sh[3 * k + c], value);
        rgb[c] = value;
    }
}

// Tile of a pixel coordinate, clamped into the image, rounded down for coordinates on either side of it.
KS_INLINE F tile_of(D position, int tiles) {
    D inside = min(max(position * set1d(1.0 / kTile), set1d(0.0)), set1d(tiles - 0.5));
    return round_nearest(narrow(inside) - set1(0.49999997f));
}

template <int kCoefficients>
[[gnu::noinline]] uint32_t project_chunk(const Scene &s, int image, int begin, int end, Record *records, Cull *culls) {
    size_t set = static_cast<size_t>(s.set_of_image[image]) * s.n;
    uint32_t visible = 0;
    for (int first = begin; first < end; first += 16) {
        uint32_t ids[16];
        int count = end - first < 16 ? end - first : 16;
        for (int i = 0; i < 16; ++i) ids[i] = static_cast<uint32_t>(first + i);
        Group g = make_group(ids, count);
        Geometry o;
        compute_geometry(s, image, g, o);
        F opacity, fields[16];
        load_columns(s.opacities + set, 1, g, &opacity);
        M solid = set1(1.0f / 255.0f) <= opacity;
        F log2_opacity = log2_lanes(select(solid, opacity, set1(1.0f)));
        F reach = log2_opacity - set1(kLog2AlphaMin);
        D reach_px = widen(reach) * set1d(1.0 / kWhitening2);
        D half_x = sqrt(reach_px * o.Sxx), half_y = sqrt(reach_px * o.Syy);
        M shown = g.valid & solid & o.in_front;
        shown = shown & (set1d(0.0) <= o.mean_x + half_x) & (o.mean_x - half_x <= set1d(s.width));
        shown = shown & (set1d(0.0) <= o.mean_y + half_y) & (o.mean_y - half_y <= set1d(s.height));
        uint32_t lanes = bits(shown);
        if (!lanes) continue;

        F sh[3 * kMaxCoefficients];
        load_columns(s.sh + set * 3 * kCoefficients, 3 * kCoefficients, g, sh);
        fields[0] = narrow(o.p);
        fields[1] = narrow(o.q);
        fields[2] = narrow(o.r);
        fields[3] = log2_opacity;
        colors_of<kCoefficients>(sh, o.dir, fields + 4);
        for (int c = 4; c < 7; ++c) fields[c] = max(fields[c], set1(0.0f));
        fields[7] = narrow(o.pc[2]);
        for (int j = 8; j < 16; ++j) fields[j] = set1(0.0f);
        alignas(64) double wide[4][16];
        F slim[16], p = fields[0], q = fields[1], r = fields[2];
        slim[0] = r;
        slim[1] = reach;
        slim[2] = q / p;
        slim[3] = p * q / fma(q, q, r * r);
        slim[4] = tile_of(o.mean_x - half_x, s.tiles_x());
        slim[5] = tile_of(o.mean_x + half_x, s.tiles_x());
        slim[6] = tile_of(o.mean_y - half_y, s.tiles_y());
        slim[7] = tile_of(o.mean_y + half_y, s.tiles_y());
        for (int j = 8; j < 16; ++j) slim[j] = set1(0.0f);
        transpose(fields);
        transpose(slim);
        store(wide[0], o.mean_x);
        store(wide[1], o.mean_y);
        store(wide[2], o.p);
        store(wide[3], o.q);
        for (; lanes; lanes &= lanes - 1) {
            int i = __builtin_ctz(lanes);
            Record &record = records[begin + visible];
            store(&record.p, fields[i]);
            record.splat = g.id[i];
            Cull &cull = culls[begin + visible];
            alignas(64) float row[16];
            store(row, slim[i]);
            cull.mean_x = wide[0][i];
            cull.mean_y = wide[1][i];
            cull.p = wide[2][i];
            cull.q = wide[3][i];
            std::memcpy(&cull.r, row, 32);
            ++visible;
        }
    }
    return visible;
}

uint32_t project(const Scene &s, int image, int begin, int end, Record *records, Cull *culls) {
    switch (s.coefficients) {
        case 1: return project_chunk<1>(s, image, begin, end, records, culls);
        case 4: return project_chunk<4>(s, image, begin, end, records, culls);
        case 9: return project_chunk<9>(s, image, begin, end, records, culls);
        default: return project_chunk<16>(s, image, begin, end, records, culls);
    }
}

constexpr uint32_t kCullPrefetch = 8;

KS_INLINE F clamp(F x, F low, F high) { return min(max(x, low), high); }

// Bits of the tile's blocks whose rectangle of pixel centres comes within `reach` of the centre: the minimum of the
// convex falloff over a rectangle lies at the centre or on an edge that faces it (docs/derivations.md, section 3).
KS_INLINE uint32_t block_mask(F bx, F by, const Cull &c, F ratio_x, F ratio_y, double dx, double dy, float u, float v) {
    F three = set1(3.0f), cx = set1(static_cast<float>(-dx)), cy = set1(static_cast<float>(-dy));
    F p = set1(static_cast<float>(c.p)), q = set1(static_cast<float>(c.q)), r = set1(c.r);
    F ux = bx + three, uy = by + three;
    F x1 = clamp(cx, bx, ux), y2 = clamp(cy, by, uy);
    F y1 = clamp(fnma(ratio_y, x1 - cx, cy), by, uy), x2 = clamp(fnma(ratio_x, y2 - cy, cx), bx, ux);
    F u1 = fma(p, x1, fma(q, y1, set1(u))), v1 = fma(r, y1, set1(v));
    F u2 = fma(p, x2, fma(q, y2, set1(u))), v2 = fma(r, y2, set1(v));
    F falloff = min(fma(u1, u1, v1 * v1), fma(u2, u2, v2 * v2));
    return bits(falloff <= set1(c.reach * 1.001f + 0.004f));
}

// Blocks of an edge tile that hold at least one pixel.
KS_INLINE uint32_t blocks_inside(const Scene &s, int tx, int ty) {
    uint32_t inside = 0;
    for (int b = 0; b < kTileBlocks; ++b)
        if (tx * kTile + (b % 4) * kBlock < s.width && ty * kTile + (b / 4) * kBlock < s.height) inside |= 1u << b;
    return inside;
}

[[gnu::noinline]] void bin_run(const Scene &s, ImageFrame &frame, Bin &bin, uint32_t begin, uint32_t end) {
    alignas(64) float block_x[16], block_y[16];
    for (int b = 0; b < 16; ++b) {
        block_x[b] = static_cast<float>(b % 4 * kBlock) + 0.5f - kHalfTile;
        block_y[b] = static_cast<float>(b / 4 * kBlock) + 0.5f - kHalfTile;
    }
    const F bx = load(block_x), by = load(block_y);
    int tiles_x = s.tiles_x();
    uint32_t *counts = bin.tile_counts.ensure(s.tiles());
    for (int t = 0; t < s.tiles(); ++t) counts[t] = 0;
    uint32_t total = 0;
    for (uint32_t i = begin; i < end; ++i) {
        uint32_t record = static_cast<uint32_t>(frame.work.keys[i]);
        __builtin_prefetch(&frame.work.culls[static_cast<uint32_t>(frame.work.keys[i + kCullPrefetch < end ? i + kCullPrefetch : i])]);
        const Cull &c = frame.work.culls[record];
        int x0 = static_cast<int>(c.tile[0]), x1 = static_cast<int>(c.tile[1]);
        int y0 = static_cast<int>(c.tile[2]), y1 = static_cast<int>(c.tile[3]);
        F ratio_x = set1(c.ratio_x), ratio_y = set1(c.ratio_y);
        Candidate *out = bin.candidates.grow(total + static_cast<size_t>(x1 - x0 + 1) * (y1 - y0 + 1), total);
        uint32_t first = total;
        for (int ty = y0; ty <= y1; ++ty)
            for (int tx = x0; tx <= x1; ++tx) {
                double dx = tx * kTile + kHalfTile - c.mean_x, dy = ty * kTile + kHalfTile - c.mean_y;
                float u = static_cast<float>(c.p * dx + c.q * dy), v = static_cast<float>(c.r * dy);
                uint32_t mask = block_mask(bx, by, c, ratio_x, ratio_y, dx, dy, u, v);
                bool edge = (tx + 1) * kTile > s.width || (ty + 1) * kTile > s.height;
                if (edge) mask &= blocks_inside(s, tx, ty);
                uint32_t tile = static_cast<uint32_t>(ty * tiles_x + tx);
                out[total] = {record, tile, u, v, mask};
                counts[tile] += mask != 0;
                total += mask != 0;
            }
        frame.slot_count[record] = total - first;
    }
    bin.count = total;
}

}  // namespace
