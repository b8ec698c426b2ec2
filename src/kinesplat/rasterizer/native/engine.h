// The rasteriser without Python: forward and backward of a batch of images.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace kinesplat {

struct Options {
    const Kernels *kernels = nullptr;
    int threads = 1;
};

// What the forward pass leaves for the backward pass. Frames return to a shared store and keep their memory.
struct Frame {
    std::vector<ImageFrame> images;
    size_t bytes() const;
};

struct FrameReturner {
    void operator()(Frame *frame) const;
};
using FramePtr = std::unique_ptr<Frame, FrameReturner>;
FramePtr take_frame(int images);

// Levels that this machine can run, best first ("avx512", "avx2", "baseline").
std::vector<const Kernels *> available_kernels();
// By name; the empty name gives the best. Null for an unknown or unavailable name.
const Kernels *find_kernels(const std::string &name);

// Name of the first input with NaN, infinity, a zero quaternion or a focal length <= 0; empty if all is well.
std::string find_bad_input(const Scene &, const Options &);

void forward(const Scene &, const Options &, Frame &, const Images &);
// Writes every buffer of `Gradients` that is not null.
void backward(const Scene &, const Options &, Frame &, const ImageGradients &, const Gradients &);

// The same for a target of `pixels` pixels in all.
std::string find_bad_target(const Target &, size_t pixels, const Options &);

struct NormalEquations {  // every one written whole
    double *loss = nullptr;      // (images)
    double *gradient = nullptr;  // (images, links * 6): J^T W r
    double *hessian = nullptr;   // (images, links * 6, links * 6): J^T W J
};
void normal_equations(const Scene &, const Options &, Frame &, const Target &, const NormalEquations &);

// Loss of each image, and where asked its gradient.
void photometric(const Photometric &, const Options &, double *loss);

// Shortest times of the stages on one thread [s], what the blending evaluated, and the frame's memory.
struct StageTimes {
    double prepare = 0, forward_blend = 0, backward_blend = 0, backward_splats = 0;
    double lane_evaluations = 0, frame_bytes = 0;
};
StageTimes profile_stages(const Scene &, const Options &, int repeats);

// Runs work(unit, thread) for units [0, count) on the shared pool.
void for_units(const Options &, int count, const Pool::Work &work);

// Scratch of the calling thread.
Scratch &thread_scratch();
size_t chunk_count(const Scene &);

struct ImageRange {
    int first, end;
    int count() const { return end - first; }
};

// Memory for the gradient sums of an image; merged: one row per record, for a single thread.
void make_slots(const Scene &, ImageFrame &, bool merged);

// Projects, sorts and bins: everything of the forward pass before the pixels.
void prepare(const Scene &, const Options &, Frame &, ImageRange);

}  // namespace kinesplat
