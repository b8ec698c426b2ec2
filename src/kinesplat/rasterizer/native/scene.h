// What the kernels eat, give, and keep between forward and backward. Plain structs, no Python.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "constants.h"

namespace kinesplat {

// Aligned to a cache line; large blocks on huge pages where the system grants them. Throws std::bad_alloc.
void *allocate_aligned(size_t bytes);

// Memory that only grows, aligned to a cache line and not initialised.
template <typename T>
class Buffer {
public:
    T *ensure(size_t count) {
        if (count > capacity_) {
            size_t wanted = count + count / 4 + 64;
            data_.reset(static_cast<T *>(allocate_aligned(wanted * sizeof(T))));
            capacity_ = wanted;
        }
        return data_.get();
    }
    // Like ensure, but keeps the first `kept` elements.
    T *grow(size_t count, size_t kept) {
        if (count <= capacity_) return data_.get();
        Buffer larger;
        larger.ensure(count * 2);
        for (size_t i = 0; i < kept; ++i) larger.data_.get()[i] = data_.get()[i];
        *this = std::move(larger);
        return data_.get();
    }
    T *data() const { return data_.get(); }
    T &operator[](size_t i) const { return data_.get()[i]; }
    size_t bytes() const { return capacity_ * sizeof(T); }

private:
    struct Free {
        void operator()(T *p) const { std::free(p); }
    };
    std::unique_ptr<T[], Free> data_;
    size_t capacity_ = 0;
};

struct Scene {
    int images = 0, sets = 0, n = 0, links = 0;
    int links_per_splat = 1, coefficients = 1;
    const float *means = nullptr, *quats = nullptr, *scales = nullptr, *opacities = nullptr, *sh = nullptr;
    const int32_t *link_index = nullptr;   // (n, links_per_splat)
    const float *link_weights = nullptr;   // (n, links_per_splat) or null
    const double *Ts_cam_link = nullptr;   // (images, links, 4, 4)
    const double *K = nullptr;             // (images, 3, 3)
    const int32_t *set_of_image = nullptr; // (images)
    const float *background = nullptr;     // (images, 3)
    int width = 0, height = 0;
    double eps2d = 0;
    bool along_axis = false;  // spherical harmonics along the optical axis, not from the camera centre to the splat

    int tiles_x() const { return (width + kTile - 1) / kTile; }
    int tiles_y() const { return (height + kTile - 1) / kTile; }
    int tiles() const { return tiles_x() * tiles_y(); }
    double focal(int image, int axis) const { return K[9 * image + 4 * axis]; }
    double centre(int image, int axis) const { return K[9 * image + 2 + 3 * axis]; }
    int64_t pixels() const { return static_cast<int64_t>(width) * height; }
};

struct Images {  // channels last, any of them null
    float *rgb = nullptr, *alpha = nullptr, *depth = nullptr;
    int32_t *link_id = nullptr;
    float *contribution = nullptr;  // (images, n)
};

struct ImageGradients {  // incoming, any of them null; depth is the forward's output
    const float *rgb = nullptr, *alpha = nullptr, *v_depth = nullptr, *depth = nullptr;
};

struct Gradients {  // outgoing, any of them null, every one written whole
    float *means = nullptr, *quats = nullptr, *scales = nullptr, *opacities = nullptr, *sh = nullptr;
    double *Ts_cam_link = nullptr;  // (images, links, 4, 4), last row zero
    double *K = nullptr;            // (images, 3, 3)
    float *link_weights = nullptr;  // (n, links_per_splat)
    bool per_splat() const { return means || quats || scales || opacities || sh || link_weights; }
};

// A visible splat as the blending loops read it. In whitened coordinates u = p dx + q dy, v = r dy the falloff is
// 2^-(u^2 + v^2); log2_opacity is folded into the exponent.
struct alignas(64) Record {
    float p, q, r, log2_opacity;
    float color[3], z;
    uint32_t splat;
    float unused[7];
};

// The same splat as binning reads it: p, q and the centre in double so that far-away needles keep their edges.
struct Cull {
    double mean_x, mean_y, p, q;
    float r, reach;            // reach: u^2 + v^2 at alpha = 1/255
    float ratio_x, ratio_y;    // along edges of constant y and x: where the falloff is least
    float tile[4];             // first and last tile of its bounding box: x, x, y, y
};

struct Entry {  // splat of a tile; u, v at the tile's centre; bit b of mask: reaches block b
    uint32_t record, slot;
    float u, v;
    uint32_t mask;
};

struct Candidate {
    uint32_t record, tile;
    float u, v;
    uint32_t mask;
};

// Gradient sums of one splat in one tile: g = alpha dL/dalpha over 1, u, v, u^2, uv, v^2; then colour and z.
enum Moment { kG, kGu, kGv, kGuu, kGuv, kGvv, kRed, kGreen, kBlue, kZ, kMoments };
struct alignas(64) Slot {
    float sum[16];
};

// Derivatives of one splat with respect to the twist [v; w] of its link in the camera frame.
struct alignas(64) PoseRecord {
    float sigma[6][5];   // d(sigma)/d(twist) = a0 u + a1 v + a2 u^2 + a3 u v + a4 v^2
    float color[3][3];   // d(colour)/d(v), or d(colour)/d(w) where the scene is lit along the axis
    float unused[9];     // to 48 floats
    int32_t link;
};

struct Target {  // what the normal equations compare the images with; all but rgb may be null
    const float *rgb = nullptr;           // (targets, height, width, 3)
    const float *alpha = nullptr;         // (targets, height, width)
    const float *rgb_weight = nullptr, *alpha_weight = nullptr;  // (targets, height, width)
    const float *backdrop = nullptr;      // (targets, height, width, 3) in place of the scene's background
    const int32_t *target_of_image = nullptr;
};

struct NormalItem {  // a pair of links and its 6x6 block; b < 0: gradient of link a; a < 0: loss
    int32_t a, b;
    double value[36];
};
struct NormalSums {
    Buffer<NormalItem> items;
    size_t count = 0;
};

struct Bin {  // candidates of a run of depth-sorted splats, and how many fall into each tile
    Buffer<Candidate> candidates;
    Buffer<uint32_t> tile_counts;
    uint32_t count = 0;
};

// What one image needs during a call alone. Where a thread takes whole images it lends each its own, which stays in
// its cache.
struct Workspace {
    Buffer<Cull> culls;
    Buffer<uint64_t> keys, spare_keys;
    std::vector<Bin> bins;
    Buffer<Slot> slots;  // one per splat and tile, or one per record where a single thread adds them up in tile order
    bool merged = false;
    Buffer<PoseRecord> poses;             // only for normal equations
    std::vector<NormalSums> normal_sums;  // per run of tiles
    size_t bytes() const;
};

struct ImageFrame {
    Workspace work;
    Buffer<Record> records;
    Buffer<uint32_t> chunk_visible;
    Buffer<uint32_t> slot_begin, slot_count;  // per record
    Buffer<uint32_t> tile_begin;
    Buffer<Entry> entries;
    Buffer<float> coverage;        // sum of weights, (tiles, blocks, 16); only with depth
    Buffer<uint32_t> staged;       // splats of each tile up to the last that was composited
    Buffer<uint32_t> block_counts; // list entries processed, (tiles, blocks)
    uint32_t visible = 0, slot_total = 0;
};

// One splat as a tile's loops read it, staged into L1.
struct alignas(64) Local {
    float p, q, r, log2_opacity, u, v;
    uint32_t mask, record;
    float color[3], z;
    uint32_t slot;
    float unused[3];
};

struct Scratch {  // per thread
    Buffer<Local> locals;
    Buffer<uint32_t> masks;
    Buffer<int32_t> list;
    Buffer<float> alpha, weight;
    Buffer<Slot> sums;
    Buffer<float> slopes, rows, pairs, gradient;  // normal equations
    Buffer<int32_t> links, link_of_entry, pair_of, members, member_counts, present;
};

constexpr int kSplatChunk = 512;

}  // namespace kinesplat
