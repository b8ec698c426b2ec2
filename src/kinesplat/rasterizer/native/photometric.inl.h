// L1 + SSIM of a band of rows, from the sum and the difference of the two images: docs/derivations.md, section 6.
// Rows stay interleaved (x0 y0 z0 x1 ...), so that a neighbour in the same channel lies three floats away.
#pragma once
#include <cstring>

#include "photometric.h"
#include "simd_math.h"

namespace {

using namespace kinesplat;

constexpr int kRgb = 3, kRowPad = 16, kRing = 16;  // rows r - 10 to r + 5 are alive at a time
constexpr int kRingMaps = 5, kFilterMaps = 4;

struct PhotometricRows {  // rings of padded rows; sum and difference of the images, and what a window contributes
    float *sum, *difference, *flat, *by_sum, *by_difference;
    float *mean_sum, *within_sum, *mean_difference, *square_difference;  // filtered vertically, one row each
    int length, vectors;
    size_t stride;

    float *at(float *ring, int row) const { return ring + static_cast<size_t>(row & (kRing - 1)) * stride + kRowPad; }
};

// Zeroes what the filters read beside the image.
KS_INLINE void clear_margins(const PhotometricRows &rows, float *first, int count) {
    for (int i = 0; i < count; ++i) {
        float *row = first + static_cast<size_t>(i) * rows.stride;
        std::memset(row, 0, kRowPad * sizeof(float));
        std::memset(row + kRowPad + rows.length, 0, (rows.stride - kRowPad - rows.length) * sizeof(float));
    }
}

inline PhotometricRows make_rows(int width, Buffer<float> &memory) {
    PhotometricRows rows;
    rows.length = width * kRgb;
    rows.vectors = (rows.length + 15) / 16;
    rows.stride = static_cast<size_t>(rows.vectors) * 16 + 2 * kRowPad;
    size_t ring = rows.stride * kRing;
    float *base = memory.ensure(kRingMaps * ring + kFilterMaps * rows.stride);
    clear_margins(rows, base, kRingMaps * kRing + kFilterMaps);
    rows.sum = base;
    rows.difference = base + ring;
    rows.flat = base + 2 * ring;
    rows.by_sum = base + 3 * ring;
    rows.by_difference = base + 4 * ring;
    float *filtered = base + kRingMaps * ring + kRowPad;
    rows.mean_sum = filtered;
    rows.within_sum = filtered + rows.stride;
    rows.mean_difference = filtered + 2 * rows.stride;
    rows.square_difference = filtered + 3 * rows.stride;
    return rows;
}

KS_INLINE void load_row(const Photometric &p, int image, int row, const PhotometricRows &rows) {
    float *sum = rows.at(rows.sum, row), *difference = rows.at(rows.difference, row);
    if (row < 0 || row >= p.height) {
        std::memset(sum, 0, rows.length * sizeof(float));
        std::memset(difference, 0, rows.length * sizeof(float));
        return;
    }
    size_t at = (static_cast<size_t>(image) * p.height + row) * rows.length;
    const float *x = p.rendered + at, *y = p.truth + at;
    int i = 0;
    for (; i + 16 <= rows.length; i += 16) {
        store(sum + i, load(x + i) + load(y + i));
        store(difference + i, load(x + i) - load(y + i));
    }
    for (; i < rows.length; ++i) {
        sum[i] = x[i] + y[i];
        difference[i] = x[i] - y[i];
    }
}

// Down the columns: mean and variance of the sum (about the pixel in the middle, so that nothing cancels), mean and
// mean square of the difference.
[[gnu::noinline]] void filter_columns(const PhotometricRows &rows, int row) {
    const float *s[2 * kWindowRadius + 1], *d[2 * kWindowRadius + 1];
    for (int k = 0; k <= 2 * kWindowRadius; ++k) {
        s[k] = rows.at(rows.sum, row + k - kWindowRadius);
        d[k] = rows.at(rows.difference, row + k - kWindowRadius);
    }
    for (int i = 0; i < rows.vectors * 16; i += 16) {
        F middle = load(s[kWindowRadius] + i), d0 = load(d[kWindowRadius] + i), w0 = set1(kWindow[0]);
        F first = set1(0.0f), second = set1(0.0f), mean = w0 * d0, square = w0 * (d0 * d0);
#pragma GCC unroll 5
        for (int k = 1; k <= kWindowRadius; ++k) {
            F w = set1(kWindow[k]);
            F up = load(s[kWindowRadius - k] + i) - middle, down = load(s[kWindowRadius + k] + i) - middle;
            first = fma(w, up + down, first);
            second = fma(w, fma(up, up, down * down), second);
            F a = load(d[kWindowRadius - k] + i), b = load(d[kWindowRadius + k] + i);
            mean = fma(w, a + b, mean);
            square = fma(w, fma(a, a, b * b), square);
        }
        store(rows.mean_sum + i, middle + first);
        store(rows.within_sum + i, fnma(first, first, second));
        store(rows.mean_difference + i, mean);
        store(rows.square_difference + i, square);
    }
}

// Along a row: the window's statistics, 1 - SSIM (their sum is returned, up to `valid` floats), and its derivatives.
template <bool kGradient>
[[gnu::noinline]] float filter_row(const PhotometricRows &rows, int row) {
    float *flat = rows.at(rows.flat, row), *by_sum = rows.at(rows.by_sum, row);
    float *by_difference = rows.at(rows.by_difference, row);
    F total = set1(0.0f);
    for (int i = 0; i < rows.vectors * 16; i += 16) {
        const float *m = rows.mean_sum + i, *v = rows.within_sum + i;
        const float *d = rows.mean_difference + i, *d2 = rows.square_difference + i;
        F middle = load(m), w0 = set1(kWindow[0]), first = set1(0.0f), within = w0 * load(v), between = set1(0.0f);
        F md = w0 * load(d), square = w0 * load(d2);
#pragma GCC unroll 5
        for (int k = 1; k <= kWindowRadius; ++k) {
            F w = set1(kWindow[k]);
            int step = k * kRgb;
            F left = load(m - step) - middle, right = load(m + step) - middle;
            first = fma(w, left + right, first);
            between = fma(w, fma(left, left, right * right), between);
            within = fma(w, load(v - step) + load(v + step), within);
            md = fma(w, load(d - step) + load(d + step), md);
            square = fma(w, load(d2 - step) + load(d2 + step), square);
        }
        F ms = middle + first, vs = within + fnma(first, first, between), vd = fnma(md, md, square);
        F half = set1(0.5f), one = set1(1.0f), two = set1(2.0f), md2 = md * md;
        F A = fma(half, fma(ms, ms, md2), set1(kSsimC1)), B = fma(half, vs + vd, set1(kSsimC2));
        F inv = one / (A * B), inv_a = inv * B, inv_b = inv * A;
        F a = md2 * inv_a, b = vd * inv_b, rest = one - a;
        M inside = from_bits(rows.length - i >= 16 ? 0xffffu : (1u << (rows.length - i)) - 1u);
        total = total + zero_unless(inside, fma(b, rest, a));
        if (!kGradient) continue;
        F h2 = rest * (two - b) * inv_b, h1 = set1(0.0f) - rest * b * inv_b;
        F h0 = (one - b) * inv_a * fnma(a, ms + md, two * md);
        h0 = fnma(h2, md, fnma(h1, ms - one, h0));
        store(flat + i, zero_unless(inside, h0));
        store(by_sum + i, zero_unless(inside, h1));
        store(by_difference + i, zero_unless(inside, h2));
    }
    return sum(total);
}

// Back from the windows to the pixels of `row`: columns first, then along the row.
[[gnu::noinline]] void scatter_row(const PhotometricRows &rows, int row, float ssim_scale, float l1_scale, float *out) {
    float *const maps[3] = {rows.flat, rows.by_sum, rows.by_difference};
    float *const filtered[3] = {rows.mean_sum, rows.within_sum, rows.mean_difference};
    for (int map = 0; map < 3; ++map) {
        const float *h[2 * kWindowRadius + 1];
        for (int k = 0; k <= 2 * kWindowRadius; ++k) h[k] = rows.at(maps[map], row + k - kWindowRadius);
        for (int i = 0; i < rows.vectors * 16; i += 16) {
            F total = set1(kWindow[0]) * load(h[kWindowRadius] + i);
#pragma GCC unroll 5
            for (int k = 1; k <= kWindowRadius; ++k)
                total = fma(set1(kWindow[k]), load(h[kWindowRadius - k] + i) + load(h[kWindowRadius + k] + i), total);
            store(filtered[map] + i, total);
        }
    }
    const float *s = rows.at(rows.sum, row), *d = rows.at(rows.difference, row);
    for (int i = 0; i < rows.vectors * 16; i += 16) {
        F total[3];
        for (int map = 0; map < 3; ++map) {
            const float *h = filtered[map] + i;
            total[map] = set1(kWindow[0]) * load(h);
#pragma GCC unroll 5
            for (int k = 1; k <= kWindowRadius; ++k)
                total[map] = fma(set1(kWindow[k]), load(h - k * kRgb) + load(h + k * kRgb), total[map]);
        }
        F difference = load(d + i), zero = set1(0.0f), l1 = set1(l1_scale);
        F sign = zero_unless(zero < difference, l1) - zero_unless(difference < zero, l1);
        F pixel = fma(difference, total[2], fma(load(s + i) - set1(1.0f), total[1], total[0]));
        F v = fma(set1(ssim_scale), pixel, sign);
        if (i + 16 <= rows.length) {
            store(out + i, v);
        } else {
            alignas(64) float lanes[16];
            store(lanes, v);
            std::memcpy(out + i, lanes, static_cast<size_t>(rows.length - i) * sizeof(float));
        }
    }
}

float l1_of_row(const PhotometricRows &rows, int row) {
    const float *d = rows.at(rows.difference, row);
    F total = set1(0.0f);
    for (int i = 0; i < rows.vectors * 16; i += 16) total = total + max(load(d + i), set1(0.0f) - load(d + i));
    return sum(total);
}

void clear_window_row(const PhotometricRows &rows, int row) {
    for (float *ring : {rows.flat, rows.by_sum, rows.by_difference})
        std::memset(rows.at(ring, row), 0, static_cast<size_t>(rows.vectors) * 16 * sizeof(float));
}

// Sum of (1 - lambda) |x - y| + lambda (1 - SSIM) over the rows [begin, end), and their gradient where asked.
double photometric_band(const Photometric &p, int image, int begin, int end, Scratch &scratch) {
    PhotometricRows rows = make_rows(p.width, scratch.rows);
    int halo = p.gradient ? kWindowRadius : 0;
    double l1 = 0, dissimilarity = 0, count = static_cast<double>(p.height) * rows.length;
    float ssim_scale = static_cast<float>(p.weight / count), l1_scale = static_cast<float>((1.0 - p.weight) / count);
    for (int row = begin - halo - kWindowRadius; row < begin - halo + kWindowRadius; ++row) load_row(p, image, row, rows);
    for (int row = begin - halo; row < end + halo; ++row) {
        load_row(p, image, row + kWindowRadius, rows);
        bool own = row >= begin && row < end;
        if (row < 0 || row >= p.height) {
            clear_window_row(rows, row);
        } else {
            filter_columns(rows, row);
            float here = p.gradient ? filter_row<true>(rows, row) : filter_row<false>(rows, row);
            if (own) dissimilarity += here;
        }
        if (own) l1 += l1_of_row(rows, row);
        int ready = row - kWindowRadius;
        if (p.gradient && ready >= begin)
            scatter_row(rows, ready, ssim_scale, l1_scale,
                        p.gradient + (static_cast<size_t>(image) * p.height + ready) * rows.length);
    }
    return (1.0 - p.weight) * l1 + static_cast<double>(p.weight) * dissimilarity;
}

}  // namespace
