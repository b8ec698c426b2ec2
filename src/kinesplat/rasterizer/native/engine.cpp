#include "engine.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <mutex>

namespace kinesplat {

namespace {

std::mutex store_mutex;
std::vector<std::unique_ptr<Frame>> &frame_store() {
    static auto *store = new std::vector<std::unique_ptr<Frame>>();
    return *store;
}

constexpr size_t kStoredFrames = 4;
void sum_contributions(const Scene &s, const ImageFrame &frame, int image, size_t chunk, float *out) {
    uint32_t first = static_cast<uint32_t>(chunk * kSplatChunk);
    float *row = out + static_cast<size_t>(image) * static_cast<size_t>(s.n);
    for (size_t i = first; i < std::min<size_t>(first + kSplatChunk, static_cast<size_t>(s.n)); ++i) row[i] = 0;
    for (uint32_t i = first; i < first + frame.chunk_visible[chunk]; ++i) {
        float total = 0;
        for (uint32_t j = 0; j < frame.slot_count[i]; ++j) total += frame.slots[frame.slot_begin[i] + j].sum[0];
        row[frame.records[i].splat] = total;
    }
}

// Zeroes the gradient rows of one chunk of splats in `sets` sets from `set` on, just before they are added to.
void clear_rows(const Scene &s, const Gradients &out, int set, int sets, size_t chunk) {
    size_t begin = chunk * kSplatChunk, count = std::min<size_t>(kSplatChunk, static_cast<size_t>(s.n) - begin);
    auto clear = [&](float *rows, size_t length, int first_set, int set_count) {
        for (int i = first_set; rows && i < first_set + set_count; ++i)
            std::fill_n(rows + (static_cast<size_t>(i) * s.n + begin) * length, count * length, 0.0f);
    };
    clear(out.means, 3, set, sets);
    clear(out.quats, 4, set, sets);
    clear(out.scales, 3, set, sets);
    clear(out.opacities, 1, set, sets);
    clear(out.sh, 3 * static_cast<size_t>(s.coefficients), set, sets);
    clear(out.link_weights, static_cast<size_t>(s.links_per_splat), 0, 1);
}

constexpr int kTileRun = 4;  // tiles per work unit

template <typename TileWork>
void for_tiles(const Scene &s, const Options &options, const TileWork &work) {
    int runs = (s.tiles() + kTileRun - 1) / kTileRun;
    for_units(options, s.images * runs, [&](int unit, int) {
        int image = unit / runs, first = unit % runs * kTileRun;
        for (int tile = first; tile < std::min(first + kTileRun, s.tiles()); ++tile) work(image, tile);
    });
}

// Adds the tiles' sums in tile order into the dense matrices of one image.
void add_normal_sums(const Scene &s, const ImageFrame &frame, int image, int runs, const NormalEquations &out) {
    size_t rows = 6 * static_cast<size_t>(s.links), at = static_cast<size_t>(image);
    double *gradient = out.gradient + at * rows, *hessian = out.hessian + at * rows * rows;
    std::fill_n(gradient, rows, 0.0);
    std::fill_n(hessian, rows * rows, 0.0);
    out.loss[image] = 0;
    for (int run = 0; run < runs; ++run)
        for (size_t i = 0; i < frame.normal_sums[run].count; ++i) {
            const NormalItem &item = frame.normal_sums[run].items[i];
            if (item.a < 0) {
                out.loss[image] += item.value[0];
                continue;
            }
            size_t a = 6 * static_cast<size_t>(item.a), b = 6 * static_cast<size_t>(item.b);
            for (size_t j = 0; j < (item.b < 0 ? 6 : 36); ++j) {
                if (item.b < 0) {
                    gradient[a + j] += item.value[j];
                } else {
                    bool diagonal = a == b && j / 6 == j % 6, below = a == b && j / 6 > j % 6;
                    if (below) continue;
                    hessian[(a + j / 6) * rows + b + j % 6] += item.value[j];
                    if (!diagonal) hessian[(b + j % 6) * rows + a + j / 6] += item.value[j];
                }
            }
        }
}

}  // namespace

void for_units(const Options &options, int count, const Pool::Work &work) {
    Pool::shared().run(count, options.threads, work);
}

size_t chunk_count(const Scene &s) { return (static_cast<size_t>(s.n) + kSplatChunk - 1) / kSplatChunk; }

void *allocate_aligned(size_t bytes) {
    constexpr size_t kLine = 64, kHugePage = size_t{1} << 21;
    size_t alignment = bytes >= kHugePage ? kHugePage : kLine;
    bytes = (bytes + alignment - 1) / alignment * alignment;
    void *memory = std::aligned_alloc(alignment, bytes);
    if (!memory) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (alignment == kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return memory;
}

Scratch &thread_scratch() {
    thread_local Scratch scratch;
    return scratch;
}

size_t Frame::bytes() const {
    size_t total = 0;
    for (const ImageFrame &f : images) {
        total += f.records.bytes() + f.culls.bytes() + f.chunk_visible.bytes() + f.keys.bytes() +
                 f.spare_keys.bytes() + f.slot_begin.bytes() + f.slot_count.bytes() + f.tile_begin.bytes() +
                 f.entries.bytes() + f.coverage.bytes() + f.block_counts.bytes() + f.staged.bytes() + f.slots.bytes() + f.poses.bytes();
        for (const NormalSums &n : f.normal_sums) total += n.items.bytes();
        for (const Bin &b : f.bins) total += b.candidates.bytes() + b.tile_counts.bytes();
    }
    return total;
}

void FrameReturner::operator()(Frame *frame) const {
    std::unique_ptr<Frame> owned(frame);
    std::lock_guard<std::mutex> lock(store_mutex);
    if (frame_store().size() < kStoredFrames) frame_store().push_back(std::move(owned));
}

FramePtr take_frame(int images) {
    std::unique_ptr<Frame> frame;
    {
        std::lock_guard<std::mutex> lock(store_mutex);
        auto &store = frame_store();
        auto best = std::min_element(store.begin(), store.end(), [&](const auto &a, const auto &b) {
            return std::abs(static_cast<int>(a->images.size()) - images) <
                   std::abs(static_cast<int>(b->images.size()) - images);
        });
        if (best != store.end()) {
            frame = std::move(*best);
            store.erase(best);
        }
    }
    if (!frame) frame = std::make_unique<Frame>();
    frame->images.resize(static_cast<size_t>(images));
    return FramePtr(frame.release());
}

std::vector<const Kernels *> available_kernels() {
    std::vector<const Kernels *> levels;
#if defined(KS_X86_LEVELS)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512) levels.push_back(&kernels_avx512);
    if (avx2) levels.push_back(&kernels_avx2);
#endif
    levels.push_back(&kernels_baseline);
    return levels;
}

const Kernels *find_kernels(const std::string &name) {
    for (const Kernels *level : available_kernels())
        if (name.empty() || name == level->name) return level;
    return nullptr;
}

void forward(const Scene &s, const Options &options, Frame &frame, const Images &out) {
    prepare(s, options, frame);
    if (out.contribution)
        for (ImageFrame &f : frame.images) f.slots.ensure(f.slot_total + 1);
    for_tiles(s, options, [&](int image, int tile) {
        options.kernels->forward_tile(s, frame.images[image], image, tile, thread_scratch(), out);
    });
    if (!out.contribution) return;
    int chunks = static_cast<int>(chunk_count(s));
    for_units(options, s.images * chunks, [&](int unit, int) {
        sum_contributions(s, frame.images[unit / chunks], unit / chunks, unit % chunks, out.contribution);
    });
}

void backward(const Scene &s, const Options &options, Frame &frame, const ImageGradients &in, const Gradients &out) {
    const Kernels &k = *options.kernels;
    for (ImageFrame &f : frame.images) f.slots.ensure(f.slot_total + 1);
    for_tiles(s, options, [&](int image, int tile) {
        k.backward_tile(s, frame.images[image], image, tile, thread_scratch(), in);
    });
    // Pose sums per (image, chunk), added up in chunk order, so that threads do not matter.
    size_t chunks = chunk_count(s), row = 12 * static_cast<size_t>(s.links) + 4;
    bool pose = out.Ts_cam_link || out.K;
    std::vector<double> sums(pose ? chunks * s.images * row : 0, 0.0);
    auto do_chunk = [&](int image, size_t chunk) {
        PoseSums p;
        double *base = pose ? sums.data() + (image * chunks + chunk) * row : nullptr;
        p.links = out.Ts_cam_link ? base : nullptr;
        p.K = out.K ? base + row - 4 : nullptr;
        uint32_t begin = static_cast<uint32_t>(chunk * kSplatChunk);
        const ImageFrame &f = frame.images[image];
        k.backward_splats(s, f, image, begin, begin + f.chunk_visible[chunk], out, p);
    };
    if (out.per_splat()) {  // images that share a set add to the same rows: one unit does them in turn
        bool shared_rows = out.link_weights != nullptr;
        int sets = shared_rows ? 1 : s.sets;
        for_units(options, sets * static_cast<int>(chunks), [&](int unit, int) {
            int set = unit / static_cast<int>(chunks);
            clear_rows(s, out, shared_rows ? 0 : set, shared_rows ? s.sets : 1, unit % chunks);
            for (int image = 0; image < s.images; ++image)
                if (shared_rows || s.set_of_image[image] == set) do_chunk(image, unit % chunks);
        });
    } else {
        for_units(options, s.images * static_cast<int>(chunks),
                  [&](int unit, int) { do_chunk(unit / static_cast<int>(chunks), unit % chunks); });
    }
    if (!pose) return;
    for (int image = 0; image < s.images; ++image) {
        std::vector<double> total(row, 0.0);
        for (size_t chunk = 0; chunk < chunks; ++chunk)
            for (size_t j = 0; j < row; ++j) total[j] += sums[(image * chunks + chunk) * row + j];
        if (out.K) {
            double *K = out.K + 9 * image, *v = total.data() + row - 4;
            std::fill_n(K, 9, 0.0);
            K[0] = v[0];
            K[4] = v[1];
            K[2] = v[2];
            K[5] = v[3];
        }
        if (!out.Ts_cam_link) continue;
        for (int link = 0; link < s.links; ++link) {
            double *T = out.Ts_cam_link + (static_cast<size_t>(image) * s.links + link) * 16;
            std::copy_n(total.data() + 12 * link, 12, T);
            std::fill_n(T + 12, 4, 0.0);
        }
    }
}

void normal_equations(const Scene &s, const Options &options, Frame &frame, const Target &target,
                      const NormalEquations &out) {
    prepare(s, options, frame);
    const Kernels &k = *options.kernels;
    int chunks = static_cast<int>(chunk_count(s));
    for (ImageFrame &f : frame.images) f.poses.ensure(static_cast<size_t>(s.n) + 16);
    for_units(options, s.images * chunks, [&](int unit, int) {
        int image = unit / chunks, chunk = unit % chunks;
        ImageFrame &f = frame.images[image];
        uint32_t begin = static_cast<uint32_t>(chunk * kSplatChunk);
        k.pose_records(s, f, image, begin, begin + f.chunk_visible[chunk], f.poses.data());
    });
    int runs = (s.tiles() + kTileRun - 1) / kTileRun;
    for (ImageFrame &f : frame.images)
        if (f.normal_sums.size() < static_cast<size_t>(runs)) f.normal_sums.resize(runs);
    for_units(options, s.images * runs, [&](int unit, int) {
        int image = unit / runs, run = unit % runs;
        NormalSums &sums = frame.images[image].normal_sums[run];
        sums.count = 0;
        for (int tile = run * kTileRun; tile < std::min((run + 1) * kTileRun, s.tiles()); ++tile)
            k.normal_tile(s, frame.images[image], image, tile, thread_scratch(), target, sums);
    });
    for_units(options, s.images, [&](int image, int) { add_normal_sums(s, frame.images[image], image, runs, out); });
}

}  // namespace kinesplat
