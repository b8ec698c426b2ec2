// Entry points of one instruction-set level; kernels.cpp is compiled once per level.
#pragma once
#include "photometric.h"
#include "scene.h"

namespace kinesplat {

// Pose gradients of one image and one chunk of splats: 12 numbers per link (rows of the 3x4), then fx fy cx cy.
struct PoseSums {
    double *links = nullptr;
    double *K = nullptr;
};

struct Kernels {
    const char *name;
    // Splats [begin, end) of `image` to records and culls from index `begin` on; returns how many are visible.
    uint32_t (*project)(const Scene &, int image, int begin, int end, Record *, Cull *);
    // Sorted splats [begin, end) to candidates.
    void (*bin)(const Scene &, ImageFrame &, Bin &, uint32_t begin, uint32_t end);
    void (*forward_tile)(const Scene &, ImageFrame &, int image, int tile, Scratch &, const Images &);
    void (*backward_tile)(const Scene &, ImageFrame &, int image, int tile, Scratch &, const ImageGradients &);
    // Slots of the records of one chunk to parameter gradients (added) and pose sums (added).
    void (*backward_splats)(const Scene &, const ImageFrame &, int image, uint32_t begin, uint32_t end,
                            const Gradients &, const PoseSums &);
    // Normal equations: twist derivatives of records [begin, end), and the sums of one tile, appended.
    void (*pose_records)(const Scene &, const ImageFrame &, int image, uint32_t begin, uint32_t end, PoseRecord *);
    void (*normal_tile)(const Scene &, ImageFrame &, int image, int tile, Scratch &, const Target &, NormalSums &);
    // L1 + SSIM over rows [begin, end) of one image, not divided by the number of values; writes the gradient's rows.
    double (*photometric_band)(const Photometric &, int image, int begin, int end, Scratch &);
    bool (*all_finite)(const float *, size_t count);
    double (*fma_peak)(double seconds);  // measured multiply-adds per second times 2, this thread
};

extern const Kernels kernels_avx512, kernels_avx2, kernels_baseline;

}  // namespace kinesplat
