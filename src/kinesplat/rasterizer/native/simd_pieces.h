// Sixteen floats or doubles at a time out of narrower registers: AVX2 (2 x 8), SSE2 or NEON (4 x 4), by GCC/Clang
// vector extensions; only what these cannot say uses intrinsics. Same interface as simd_avx512.h.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

#define KS_INLINE [[gnu::always_inline]] inline
#if defined(__AVX2__)
#define KS_BYTES 32
#else
#define KS_BYTES 16
#endif

typedef float fpiece __attribute__((vector_size(KS_BYTES)));
typedef int32_t ipiece __attribute__((vector_size(KS_BYTES)));
typedef double dpiece __attribute__((vector_size(KS_BYTES)));
typedef int64_t lpiece __attribute__((vector_size(KS_BYTES)));
typedef float hpiece __attribute__((vector_size(KS_BYTES / 2)));
// The same at any address. Copying whole structs instead goes through the stack in 16-byte pieces, and loading wider
// ones from there stalls: thirty times slower.
typedef float fmemory __attribute__((vector_size(KS_BYTES), aligned(4), may_alias));
typedef double dmemory __attribute__((vector_size(KS_BYTES), aligned(8), may_alias));
constexpr int kWide = KS_BYTES / 4, kF = 16 / kWide, kD = 2 * kF;

struct F {
    fpiece p[kF];
};
struct M {
    ipiece p[kF];
};
struct D {
    dpiece p[kD];
};

#define KS_EACH(count, expr)                      \
    _Pragma("GCC unroll 8") for (int i = 0; i < (count); ++i) { expr; }

KS_INLINE fpiece piece_fma(fpiece a, fpiece b, fpiece c) {
#if defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}
KS_INLINE dpiece piece_fma(dpiece a, dpiece b, dpiece c) {
#if defined(__FMA__)
    return _mm256_fmadd_pd(a, b, c);
#elif defined(__ARM_NEON)
    return vfmaq_f64(c, a, b);
#else
    return a * b + c;
#endif
}
KS_INLINE fpiece piece_sqrt(fpiece a) {
#if defined(__AVX2__)
    return _mm256_sqrt_ps(a);
#elif defined(__SSE2__)
    return _mm_sqrt_ps(a);
#elif defined(__ARM_NEON)
    return vsqrtq_f32(a);
#else
    for (int i = 0; i < kWide; ++i) a[i] = std::sqrt(a[i]);
    return a;
#endif
}
KS_INLINE dpiece piece_sqrt(dpiece a) {
#if defined(__AVX2__)
    return _mm256_sqrt_pd(a);
#elif defined(__SSE2__)
    return _mm_sqrt_pd(a);
#elif defined(__ARM_NEON)
    return vsqrtq_f64(a);
#else
    for (int i = 0; i < kWide / 2; ++i) a[i] = std::sqrt(a[i]);
    return a;
#endif
}
KS_INLINE fpiece piece_min(fpiece a, fpiece b) {
#if defined(__AVX2__)
    return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
    return _mm_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}
KS_INLINE fpiece piece_max(fpiece a, fpiece b) {
#if defined(__AVX2__)
    return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
    return _mm_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}
KS_INLINE uint32_t piece_bits(ipiece a) {
#if defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(a)));
#elif defined(__SSE2__)
    return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(a)));
#else
    uint32_t out = 0;
    for (int i = 0; i < kWide; ++i) out |= static_cast<uint32_t>(a[i] & 1) << i;
    return out;
#endif
}
KS_INLINE ipiece piece_round(fpiece a) {  // to the nearest integer; |a| < 2^22
    const fpiece magic = fpiece{} + 12582912.0f;
    return reinterpret_cast<ipiece>(a + magic) - reinterpret_cast<ipiece>(magic);
}

KS_INLINE F set1(float x) {
    F r;
    KS_EACH(kF, r.p[i] = fpiece{} + x) return r;
}
KS_INLINE F load(const float *q) {
    F r;
    KS_EACH(kF, r.p[i] = *reinterpret_cast<const fmemory *>(q + i * kWide)) return r;
}
KS_INLINE void store(float *q, F a) {
    KS_EACH(kF, *reinterpret_cast<fmemory *>(q + i * kWide) = a.p[i])
}
#define KS_BINARY(T, count, op)                              \
    KS_INLINE T operator op(T a, T b) {                      \
        T r;                                                 \
        KS_EACH(count, r.p[i] = a.p[i] op b.p[i]) return r;  \
    }
KS_BINARY(F, kF, +)
KS_BINARY(F, kF, -)
KS_BINARY(F, kF, *)
KS_BINARY(F, kF, /)
KS_BINARY(D, kD, +)
KS_BINARY(D, kD, -)
KS_BINARY(D, kD, *)
KS_BINARY(D, kD, /)
KS_BINARY(M, kF, &)
KS_BINARY(M, kF, |)
#define KS_COMPARE(op)                                                              \
    KS_INLINE M operator op(F a, F b) {                                             \
        M r;                                                                        \
        KS_EACH(kF, r.p[i] = reinterpret_cast<ipiece>(a.p[i] op b.p[i])) return r;  \
    }                                                                               \
    KS_INLINE M operator op(D a, D b) {                                             \
        M r;                                                                        \
        KS_EACH(kF, r.p[i] = narrow_mask(a.p[2 * i] op b.p[2 * i], a.p[2 * i + 1] op b.p[2 * i + 1])) return r; \
    }
KS_INLINE ipiece narrow_mask(lpiece lo, lpiece hi) {
    ipiece r;
    for (int i = 0; i < kWide / 2; ++i) {
        r[i] = static_cast<int32_t>(lo[i]);
        r[i + kWide / 2] = static_cast<int32_t>(hi[i]);
    }
    return r;
}
KS_COMPARE(<)
KS_COMPARE(<=)
KS_INLINE M operator>=(F a, F b) { return b <= a; }
KS_INLINE F fma(F a, F b, F c) {
    F r;
    KS_EACH(kF, r.p[i] = piece_fma(a.p[i], b.p[i], c.p[i])) return r;
}
KS_INLINE F fnma(F a, F b, F c) {
    F r;
    KS_EACH(kF, r.p[i] = piece_fma(-a.p[i], b.p[i], c.p[i])) return r;
}
KS_INLINE D fma(D a, D b, D c) {
    D r;
    KS_EACH(kD, r.p[i] = piece_fma(a.p[i], b.p[i], c.p[i])) return r;
}
KS_INLINE D fnma(D a, D b, D c) {
    D r;
    KS_EACH(kD, r.p[i] = piece_fma(-a.p[i], b.p[i], c.p[i])) return r;
}
KS_INLINE F min(F a, F b) {
    F r;
    KS_EACH(kF, r.p[i] = piece_min(a.p[i], b.p[i])) return r;
}
KS_INLINE F max(F a, F b) {
    F r;
    KS_EACH(kF, r.p[i] = piece_max(a.p[i], b.p[i])) return r;
}
KS_INLINE D min(D a, D b) {
    D r;
    KS_EACH(kD, r.p[i] = a.p[i] < b.p[i] ? a.p[i] : b.p[i]) return r;
}
KS_INLINE D max(D a, D b) {
    D r;
    KS_EACH(kD, r.p[i] = a.p[i] > b.p[i] ? a.p[i] : b.p[i]) return r;
}
KS_INLINE F sqrt(F a) {
    F r;
    KS_EACH(kF, r.p[i] = piece_sqrt(a.p[i])) return r;
}
KS_INLINE D sqrt(D a) {
    D r;
    KS_EACH(kD, r.p[i] = piece_sqrt(a.p[i])) return r;
}
KS_INLINE M andnot(M a, M b) {
    M r;
    KS_EACH(kF, r.p[i] = ~a.p[i] & b.p[i]) return r;
}
KS_INLINE uint32_t bits(M a) {
    uint32_t r = 0;
    KS_EACH(kF, r |= piece_bits(a.p[i]) << (i * kWide)) return r;
}
KS_INLINE M from_bits(uint32_t b) {
    M r;
    for (int i = 0; i < kF; ++i)
        for (int j = 0; j < kWide; ++j) r.p[i][j] = -static_cast<int32_t>(b >> (i * kWide + j) & 1u);
    return r;
}
KS_INLINE bool any(M a) {
    ipiece r = a.p[0];
    for (int i = 1; i < kF; ++i) r |= a.p[i];
    return piece_bits(r) != 0;
}
KS_INLINE F zero_unless(M m, F a) {
    F r;
    KS_EACH(kF, r.p[i] = reinterpret_cast<fpiece>(m.p[i] & reinterpret_cast<ipiece>(a.p[i]))) return r;
}
KS_INLINE F select(M m, F a, F b) {
    F r;
    KS_EACH(kF, r.p[i] = reinterpret_cast<fpiece>((m.p[i] & reinterpret_cast<ipiece>(a.p[i])) |
                                                  (~m.p[i] & reinterpret_cast<ipiece>(b.p[i]))))
    return r;
}
KS_INLINE D select(M m, D a, D b) {
    D r;
    for (int i = 0; i < kD; ++i) {
        lpiece wide;
        for (int j = 0; j < kWide / 2; ++j) wide[j] = m.p[i / 2][(i % 2) * (kWide / 2) + j];
        r.p[i] = reinterpret_cast<dpiece>((wide & reinterpret_cast<lpiece>(a.p[i])) |
                                          (~wide & reinterpret_cast<lpiece>(b.p[i])));
    }
    return r;
}
KS_INLINE float sum(F a) {
    fpiece s = a.p[0];
    for (int i = 1; i < kF; ++i) s = s + a.p[i];
    float r = 0;
    for (int i = 0; i < kWide; ++i) r += s[i];
    return r;
}
KS_INLINE double sum(D a) {
    dpiece s = a.p[0];
    for (int i = 1; i < kD; ++i) s = s + a.p[i];
    double r = 0;
    for (int i = 0; i < kWide / 2; ++i) r += s[i];
    return r;
}
KS_INLINE F round_nearest(F a) {
    F r;
    KS_EACH(kF, r.p[i] = __builtin_convertvector(piece_round(a.p[i]), fpiece)) return r;
}
KS_INLINE F scale_by_power(F a, F n) {  // n an integer in [-126, 127]
    F r;
    KS_EACH(kF, r.p[i] = a.p[i] * reinterpret_cast<fpiece>((piece_round(n.p[i]) + 127) << 23)) return r;
}
KS_INLINE F split_exponent(F a, F *exponent) {  // mantissa in [0.75, 1.5)
    F r;
    for (int i = 0; i < kF; ++i) {
        ipiece word = reinterpret_cast<ipiece>(a.p[i]);
        ipiece e = ((word - 0x3f400000) >> 23);
        exponent->p[i] = __builtin_convertvector(e, fpiece);
        r.p[i] = reinterpret_cast<fpiece>(word - (e << 23));
    }
    return r;
}

KS_INLINE D set1d(double x) {
    D r;
    KS_EACH(kD, r.p[i] = dpiece{} + x) return r;
}
KS_INLINE D load(const double *q) {
    D r;
    KS_EACH(kD, r.p[i] = *reinterpret_cast<const dmemory *>(q + i * kWide / 2)) return r;
}
KS_INLINE void store(double *q, D a) {
    KS_EACH(kD, *reinterpret_cast<dmemory *>(q + i * kWide / 2) = a.p[i])
}
KS_INLINE D widen(F a) {
    D r;
    hpiece h[kD];
    std::memcpy(h, &a, 64);
    KS_EACH(kD, r.p[i] = __builtin_convertvector(h[i], dpiece)) return r;
}
KS_INLINE F narrow(D a) {
    F r;
    hpiece h[kD];
    KS_EACH(kD, h[i] = __builtin_convertvector(a.p[i], hpiece)) std::memcpy(&r, h, 64);
    return r;
}

#if defined(__AVX2__)
KS_INLINE void transpose8(fpiece r[8]) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}
#else
KS_INLINE void transpose4(fpiece r[4]) {
#if defined(__clang__)
#define KS_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define KS_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (ipiece){i, j, k, l})
#endif
    fpiece a = KS_SHUFFLE(r[0], r[1], 0, 4, 1, 5), b = KS_SHUFFLE(r[0], r[1], 2, 6, 3, 7);
    fpiece c = KS_SHUFFLE(r[2], r[3], 0, 4, 1, 5), d = KS_SHUFFLE(r[2], r[3], 2, 6, 3, 7);
    r[0] = KS_SHUFFLE(a, c, 0, 1, 4, 5);
    r[1] = KS_SHUFFLE(a, c, 2, 3, 6, 7);
    r[2] = KS_SHUFFLE(b, d, 0, 1, 4, 5);
    r[3] = KS_SHUFFLE(b, d, 2, 3, 6, 7);
#undef KS_SHUFFLE
}
#endif
KS_INLINE void transpose(F r[16]) {
    fpiece t[16][kF];
    for (int bi = 0; bi < kF; ++bi)
        for (int bj = 0; bj < kF; ++bj) {
            fpiece block[kWide];
            for (int i = 0; i < kWide; ++i) block[i] = r[bi * kWide + i].p[bj];
#if defined(__AVX2__)
            transpose8(block);
#else
            transpose4(block);
#endif
            for (int i = 0; i < kWide; ++i) t[bj * kWide + i][bi] = block[i];
        }
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < kF; ++j) r[i].p[j] = t[i][j];
}

KS_INLINE void load_columns8(const float *const rows[16], F c[8]) {
    for (int band = 0; band < kF; ++band)
        for (int part = 0; part < 8 / kWide; ++part) {
            fpiece block[kWide];
            for (int i = 0; i < kWide; ++i) std::memcpy(&block[i], rows[band * kWide + i] + part * kWide, KS_BYTES);
#if defined(__AVX2__)
            transpose8(block);
#else
            transpose4(block);
#endif
            for (int i = 0; i < kWide; ++i) c[part * kWide + i].p[band] = block[i];
        }
}
KS_INLINE void deinterleave3(const float *p, F out[3]) {
    alignas(64) float lanes[3][16];
    for (int i = 0; i < 16; ++i)
        for (int c = 0; c < 3; ++c) lanes[c][i] = p[3 * i + c];
    for (int c = 0; c < 3; ++c) out[c] = load(lanes[c]);
}
KS_INLINE void interleave3(const F in[3], float *p) {
    alignas(64) float lanes[3][16];
    for (int c = 0; c < 3; ++c) store(lanes[c], in[c]);
    for (int i = 0; i < 16; ++i)
        for (int c = 0; c < 3; ++c) p[3 * i + c] = lanes[c][i];
}
KS_INLINE void deinterleave4(const float *p, F out[4]) {
    alignas(64) float lanes[4][16];
    for (int i = 0; i < 16; ++i)
        for (int c = 0; c < 4; ++c) lanes[c][i] = p[4 * i + c];
    for (int c = 0; c < 4; ++c) out[c] = load(lanes[c]);
}

KS_INLINE int append_indices(const uint32_t *masks, uint32_t bit, int base, int32_t *out) {
    int count = 0;
    for (int i = 0; i < 16; ++i) {
        out[count] = base + i;
        count += (masks[i] & bit) != 0;
    }
    return count;
}

}  // namespace
