// exp2 and log2 on sixteen lanes, from polynomials; accurate to about 2 units in the last place.
#pragma once
#if defined(__AVX512F__)
#include "simd_avx512.h"
#else
#include "simd_pieces.h"
#endif

namespace {

// 2^x for -126 <= x <= 127: minimax of 2^f on |f| <= 1/2, degree 5, relative error 8e-8 before rounding.
KS_INLINE F exp2_lanes(F x) {
    F n = round_nearest(x), f = x - n;
    F y = fma(set1(1.32746334e-3f), f, set1(9.67196168e-3f));
    y = fma(y, f, set1(5.55067837e-2f));
    y = fma(y, f, set1(2.40222353e-1f));
    y = fma(y, f, set1(6.93147062e-1f));
    y = fma(y, f, set1(1.0f));
    return scale_by_power(y, n);
}

// log2(x) for normal x > 0: exponent + atanh series of the mantissa in [0.75, 1.5).
KS_INLINE F log2_lanes(F x) {
    F e, m = split_exponent(x, &e);
    F s = (m - set1(1.0f)) / (m + set1(1.0f)), s2 = s * s;
    F y = set1(0.26230821f);
    y = fma(y, s2, set1(0.32059892f));
    y = fma(y, s2, set1(0.41219858f));
    y = fma(y, s2, set1(0.57707802f));
    y = fma(y, s2, set1(0.96179669f));
    y = fma(y, s2, set1(2.88539008f));
    return fma(y, s, e);
}

}  // namespace
