// L1 + SSIM of rendered against true images, value and gradient in one pass.
#pragma once
#include "scene.h"

namespace kinesplat {

constexpr int kWindowRadius = 5;  // 11x11 Gaussian window of standard deviation 1.5, as in 3DGS
constexpr float kWindow[kWindowRadius + 1] = {2.660117184e-1f, 2.130055377e-1f, 1.093606895e-1f,
                                              3.600077094e-2f, 7.598758138e-3f, 1.028380084e-3f};
constexpr float kSsimC1 = 1e-4f, kSsimC2 = 9e-4f;  // (0.01 L)^2 and (0.03 L)^2 for a range L = 1
constexpr int kPhotometricBand = 64;               // rows per work unit

struct Photometric {  // images channels last, (images, height, width, 3)
    int images = 0, width = 0, height = 0;
    double weight = 0;  // lambda: (1 - lambda) L1 + lambda (1 - SSIM)
    const float *rendered = nullptr, *truth = nullptr;
    float *gradient = nullptr;  // with respect to `rendered`, of each image's own loss; null: value alone
};

}  // namespace kinesplat
