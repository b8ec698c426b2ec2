// Times of the stages of one forward and backward pass, for the benchmark.
#include <algorithm>
#include <chrono>

#include "engine.h"

namespace kinesplat {

namespace {

template <typename Work>
double shortest(int repeats, const Work &work) {
    double best = 1e30;
    for (int i = 0; i < repeats; ++i) {
        auto start = std::chrono::steady_clock::now();
        work();
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return best;
}

template <typename Work>
void for_each_tile(const Scene &s, const Work &work) {
    for (int image = 0; image < s.images; ++image)
        for (int tile = 0; tile < s.tiles(); ++tile) work(image, tile);
}

}  // namespace

StageTimes profile_stages(const Scene &s, const Options &options, int repeats) {
    const Kernels &k = *options.kernels;
    FramePtr frame = take_frame(s.images);
    std::vector<float> rgb(static_cast<size_t>(s.images * s.pixels() * 3)), v_rgb(rgb.size(), 1.0f);
    std::vector<float> v_splats(static_cast<size_t>(s.sets) * s.n * (11 + 3 * static_cast<size_t>(s.coefficients)));
    Images out;
    out.rgb = rgb.data();
    ImageGradients in;
    in.rgb = v_rgb.data();
    size_t n = static_cast<size_t>(s.sets) * static_cast<size_t>(s.n);
    Gradients g;
    g.means = v_splats.data();
    g.quats = g.means + 3 * n;
    g.scales = g.quats + 4 * n;
    g.opacities = g.scales + 3 * n;
    g.sh = g.opacities + n;

    StageTimes t;
    Options one{options.kernels, 1};
    t.prepare = shortest(repeats, [&] { prepare(s, one, *frame, {0, s.images}); });
    Scratch &scratch = thread_scratch();
    t.forward_blend = shortest(repeats, [&] {
        for_each_tile(s, [&](int image, int tile) {
            k.forward_tile(s, frame->images[image], image, tile, scratch, out);
        });
    });
    for (ImageFrame &f : frame->images) {
        make_slots(s, f, true);
        for (int block = 0; block < s.tiles() * kTileBlocks; ++block) t.lane_evaluations += 16.0 * f.block_counts[block];
    }
    t.backward_blend = shortest(repeats, [&] {
        for_each_tile(s, [&](int image, int tile) {
            k.backward_tile(s, frame->images[image], image, tile, scratch, in);
        });
    });
    double both = shortest(repeats, [&] { backward(s, one, *frame, in, g); });
    t.backward_splats = std::max(0.0, both - t.backward_blend);
    t.frame_bytes = static_cast<double>(frame->bytes());
    return t;
}

}  // namespace kinesplat
