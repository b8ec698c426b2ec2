// Sixteen floats or doubles at a time, AVX-512 (F, BW, DQ, VL). Same interface as simd_pieces.h.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

struct M {
    __mmask16 m;
};
struct F {
    __m512 v;
};
struct D {
    __m512d lo, hi;
};

#define KS_INLINE [[gnu::always_inline]] inline

KS_INLINE F set1(float x) { return {_mm512_set1_ps(x)}; }
KS_INLINE F load(const float *p) { return {_mm512_loadu_ps(p)}; }
KS_INLINE void store(float *p, F a) { _mm512_storeu_ps(p, a.v); }
KS_INLINE F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
KS_INLINE F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
KS_INLINE F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
KS_INLINE F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
KS_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
KS_INLINE F fnma(F a, F b, F c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
KS_INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
KS_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
KS_INLINE F sqrt(F a) { return {_mm512_sqrt_ps(a.v)}; }
KS_INLINE M operator<(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
KS_INLINE M operator<=(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
KS_INLINE M operator>=(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
KS_INLINE M operator&(M a, M b) { return {static_cast<__mmask16>(a.m & b.m)}; }
KS_INLINE M operator|(M a, M b) { return {static_cast<__mmask16>(a.m | b.m)}; }
KS_INLINE M andnot(M a, M b) { return {static_cast<__mmask16>(~a.m & b.m)}; }
KS_INLINE uint32_t bits(M a) { return a.m; }
KS_INLINE M from_bits(uint32_t b) { return {static_cast<__mmask16>(b)}; }
KS_INLINE bool any(M a) { return a.m != 0; }
KS_INLINE F select(M m, F a, F b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }
KS_INLINE F zero_unless(M m, F a) { return {_mm512_maskz_mov_ps(m.m, a.v)}; }
KS_INLINE float sum(F a) { return _mm512_reduce_add_ps(a.v); }

// 2^floor-ish scaling used by exp2: x = n + f with |f| <= 1/2.
KS_INLINE F round_nearest(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
KS_INLINE F scale_by_power(F a, F n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// x = mantissa * 2^exponent with the mantissa in [0.75, 1.5).
KS_INLINE F split_exponent(F a, F *exponent) {
    F mantissa{_mm512_getmant_ps(a.v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src)};
    *exponent = F{_mm512_getexp_ps((a / mantissa).v)};
    return mantissa;
}

KS_INLINE D set1d(double x) { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
KS_INLINE D load(const double *p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
KS_INLINE void store(double *p, D a) {
    _mm512_storeu_pd(p, a.lo);
    _mm512_storeu_pd(p + 8, a.hi);
}
KS_INLINE D widen(F a) {
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))};
}
KS_INLINE F narrow(D a) {
    __m512 lo = _mm512_castps256_ps512(_mm512_cvtpd_ps(a.lo));
    return {_mm512_insertf32x8(lo, _mm512_cvtpd_ps(a.hi), 1)};
}
KS_INLINE D operator+(D a, D b) { return {_mm512_add_pd(a.lo, b.lo), _mm512_add_pd(a.hi, b.hi)}; }
KS_INLINE D operator-(D a, D b) { return {_mm512_sub_pd(a.lo, b.lo), _mm512_sub_pd(a.hi, b.hi)}; }
KS_INLINE D operator*(D a, D b) { return {_mm512_mul_pd(a.lo, b.lo), _mm512_mul_pd(a.hi, b.hi)}; }
KS_INLINE D operator/(D a, D b) { return {_mm512_div_pd(a.lo, b.lo), _mm512_div_pd(a.hi, b.hi)}; }
KS_INLINE D fma(D a, D b, D c) { return {_mm512_fmadd_pd(a.lo, b.lo, c.lo), _mm512_fmadd_pd(a.hi, b.hi, c.hi)}; }
KS_INLINE D fnma(D a, D b, D c) { return {_mm512_fnmadd_pd(a.lo, b.lo, c.lo), _mm512_fnmadd_pd(a.hi, b.hi, c.hi)}; }
KS_INLINE D min(D a, D b) { return {_mm512_min_pd(a.lo, b.lo), _mm512_min_pd(a.hi, b.hi)}; }
KS_INLINE D max(D a, D b) { return {_mm512_max_pd(a.lo, b.lo), _mm512_max_pd(a.hi, b.hi)}; }
KS_INLINE D sqrt(D a) { return {_mm512_sqrt_pd(a.lo), _mm512_sqrt_pd(a.hi)}; }
KS_INLINE M operator<(D a, D b) {
    unsigned lo = _mm512_cmp_pd_mask(a.lo, b.lo, _CMP_LT_OQ), hi = _mm512_cmp_pd_mask(a.hi, b.hi, _CMP_LT_OQ);
    return {static_cast<__mmask16>(lo | hi << 8)};
}
KS_INLINE M operator<=(D a, D b) {
    unsigned lo = _mm512_cmp_pd_mask(a.lo, b.lo, _CMP_LE_OQ), hi = _mm512_cmp_pd_mask(a.hi, b.hi, _CMP_LE_OQ);
    return {static_cast<__mmask16>(lo | hi << 8)};
}
KS_INLINE D select(M m, D a, D b) {
    return {_mm512_mask_blend_pd(static_cast<__mmask8>(m.m), b.lo, a.lo),
            _mm512_mask_blend_pd(static_cast<__mmask8>(m.m >> 8), b.hi, a.hi)};
}
KS_INLINE double sum(D a) { return _mm512_reduce_add_pd(_mm512_add_pd(a.lo, a.hi)); }

// Rows become columns: afterwards row i holds what was lane i of every row.
KS_INLINE void transpose(F r[16]) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
        a[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
    }
    for (int i = 0; i < 16; i += 4) {
        b[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[i]), _mm512_castps_pd(a[i + 2])));
        b[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[i]), _mm512_castps_pd(a[i + 2])));
        b[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[i + 1]), _mm512_castps_pd(a[i + 3])));
        b[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[i + 1]), _mm512_castps_pd(a[i + 3])));
    }
    for (int i = 0; i < 4; ++i) {
        __m512 x0 = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), x1 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
        __m512 y0 = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd), y1 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
        r[i] = {_mm512_shuffle_f32x4(x0, x1, 0x88)};
        r[i + 8] = {_mm512_shuffle_f32x4(x0, x1, 0xdd)};
        r[i + 4] = {_mm512_shuffle_f32x4(y0, y1, 0x88)};
        r[i + 12] = {_mm512_shuffle_f32x4(y0, y1, 0xdd)};
    }
}

// Sixteen rows of eight floats, 64 bytes apart, become eight columns.
KS_INLINE void load_columns8(const float *const rows[16], F c[8]) {
    __m512 a[8], b[8];
    for (int i = 0; i < 8; ++i)  // rows i and i + 8 side by side
        a[i] = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(rows[i])), _mm256_loadu_ps(rows[i + 8]), 1);
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    // a[i] holds columns i and i + 4 of rows 0-3 | 8-11, a[i + 4] those of rows 4-7 | 12-15.
    const __m512i low = _mm512_set_epi32(27, 26, 25, 24, 11, 10, 9, 8, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i high = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 23, 22, 21, 20, 7, 6, 5, 4);
    for (int i = 0; i < 4; ++i) {
        c[i] = {_mm512_permutex2var_ps(a[i], low, a[i + 4])};
        c[i + 4] = {_mm512_permutex2var_ps(a[i], high, a[i + 4])};
    }
}

// 48 floats x0 y0 z0 x1 ... to three vectors and back; 64 floats to four vectors.
KS_INLINE void deinterleave3(const float *p, F out[3]) {
    __m512 a = _mm512_loadu_ps(p), b = _mm512_loadu_ps(p + 16), c = _mm512_loadu_ps(p + 32);
    alignas(64) static const int32_t kFirst[3][16] = {{0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 0, 0, 0, 0, 0},
                                                      {1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 0, 0, 0, 0, 0},
                                                      {2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 0, 0, 0, 0, 0, 0}};
    alignas(64) static const int32_t kSecond[3][16] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 17, 20, 23, 26, 29},
                                                       {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 18, 21, 24, 27, 30},
                                                       {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 19, 22, 25, 28, 31}};
    for (int i = 0; i < 3; ++i) {
        __m512 ab = _mm512_permutex2var_ps(a, _mm512_load_si512(kFirst[i]), b);
        out[i] = {_mm512_permutex2var_ps(ab, _mm512_load_si512(kSecond[i]), c)};
    }
}
KS_INLINE void interleave3(const F in[3], float *p) {
    alignas(64) static const int32_t kFirst[3][16] = {{0, 16, 0, 1, 17, 0, 2, 18, 0, 3, 19, 0, 4, 20, 0, 5},
                                                      {21, 0, 6, 22, 0, 7, 23, 0, 8, 24, 0, 9, 25, 0, 10, 26},
                                                      {0, 11, 27, 0, 12, 28, 0, 13, 29, 0, 14, 30, 0, 15, 31, 0}};
    alignas(64) static const int32_t kSecond[3][16] = {{0, 1, 16, 3, 4, 17, 6, 7, 18, 9, 10, 19, 12, 13, 20, 15},
                                                       {0, 21, 2, 3, 22, 5, 6, 23, 8, 9, 24, 11, 12, 25, 14, 15},
                                                       {26, 1, 2, 27, 4, 5, 28, 7, 8, 29, 10, 11, 30, 13, 14, 31}};
    for (int i = 0; i < 3; ++i) {
        __m512 rg = _mm512_permutex2var_ps(in[0].v, _mm512_load_si512(kFirst[i]), in[1].v);
        _mm512_storeu_ps(p + 16 * i, _mm512_permutex2var_ps(rg, _mm512_load_si512(kSecond[i]), in[2].v));
    }
}
KS_INLINE void deinterleave4(const float *p, F out[4]) {
    __m512 a = _mm512_loadu_ps(p), b = _mm512_loadu_ps(p + 16), c = _mm512_loadu_ps(p + 32), d = _mm512_loadu_ps(p + 48);
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    __m512 e0 = _mm512_permutex2var_ps(a, even, b), e1 = _mm512_permutex2var_ps(c, even, d);
    __m512 o0 = _mm512_permutex2var_ps(a, odd, b), o1 = _mm512_permutex2var_ps(c, odd, d);
    out[0] = {_mm512_permutex2var_ps(e0, even, e1)};
    out[2] = {_mm512_permutex2var_ps(e0, odd, e1)};
    out[1] = {_mm512_permutex2var_ps(o0, even, o1)};
    out[3] = {_mm512_permutex2var_ps(o0, odd, o1)};
}

// Appends the indices base + lane whose mask word has `bit` set; writes up to 16 words, returns how many count.
KS_INLINE int append_indices(const uint32_t *masks, uint32_t bit, int base, int32_t *out) {
    __mmask16 hit = _mm512_test_epi32_mask(_mm512_loadu_si512(masks), _mm512_set1_epi32(static_cast<int>(bit)));
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(hit, _mm512_add_epi32(lanes, _mm512_set1_epi32(base))));
    return __builtin_popcount(hit);
}

}  // namespace
