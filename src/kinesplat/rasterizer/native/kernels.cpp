// All vector code; compiled once per instruction-set level with KS_TABLE naming the table it defines.
#include "kernels.h"

#include <chrono>

#include "project.inl.h"
#include "blend_backward.inl.h"
#include "normal.inl.h"
#include "photometric.inl.h"

namespace {

bool all_finite(const float *values, size_t count) {
    F total = set1(0.0f);
    size_t i = 0;
    for (; i + 16 <= count; i += 16) total = fma(load(values + i), set1(0.0f), total);
    float rest = 0;
    for (; i < count; ++i) rest += values[i] * 0.0f;
    return sum(total) + rest == 0.0f;
}

// Ten independent chains of multiply-adds: what this thread reaches at best, in operations per second.
[[gnu::noinline]] double fma_peak(double seconds) {
    F a[10];
    for (int i = 0; i < 10; ++i) a[i] = set1(1.0f + 1e-3f * static_cast<float>(i));
    const F x = set1(0.999f), y = set1(1e-3f);
    auto begin = std::chrono::steady_clock::now();
    double best = 0, spent = 0;
    while (spent < seconds) {
        auto start = std::chrono::steady_clock::now();
        constexpr int kRounds = 20000;
        for (int n = 0; n < kRounds; ++n)
            for (int i = 0; i < 10; ++i) a[i] = fma(a[i], x, y);
        auto now = std::chrono::steady_clock::now();
        double rate = 10.0 * kRounds * 16 * 2 / std::chrono::duration<double>(now - start).count();
        best = rate > best ? rate : best;
        spent = std::chrono::duration<double>(now - begin).count();
    }
    F total = a[0];
    for (int i = 1; i < 10; ++i) total = total + a[i];
    volatile float keep = sum(total);
    (void)keep;
    return best;
}

}  // namespace

namespace kinesplat {

#define KS_STRING_(x) #x
#define KS_STRING(x) KS_STRING_(x)

extern const Kernels KS_TABLE = {KS_STRING(KS_LEVEL), project,      bin_run,     forward_tile,     backward_tile,
                                 backward_splats,     pose_records, normal_tile, photometric_band, all_finite,
                                 fma_peak};

}  // namespace kinesplat
