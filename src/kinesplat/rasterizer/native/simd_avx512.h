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

// Appends the indices base + lane whose mask word has `bit` set; writes up to 16 words, returns how many count.
KS_INLINE int append_indices(const uint32_t *masks, uint32_t bit, int base, int32_t *out) {
    __mmask16 hit = _mm512_test_epi32_mask(_mm512_loadu_si512(masks), _mm512_set1_epi32(static_cast<int>(bit)));
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(hit, _mm512_add_epi32(lanes, _mm512_set1_epi32(base))));
    return __builtin_popcount(hit);
}

}  // namespace
