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
        for (uint32_t j = 0; j < frame.slot_count[i]; ++j) total += frame.work.slots[frame.slot_begin[i] + j].sum[0];
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
void for_tiles(const Scene &s, const Options &options, ImageRange range, const TileWork &work) {
    int runs = (s.tiles() + kTileRun - 1) / kTileRun;
    for_units(options, range.count() * runs, [&](int unit, int) {
        int image = range.first + unit / runs, first = unit % runs * kTileRun;
        for (int tile = first; tile < std::min(first + kTileRun, s.tiles()); ++tile) work(image, tile);
    });
}

// Lends the thread's workspace to an image.
class Loan {
public:
    explicit Loan(ImageFrame &image) : image_(image) { std::swap(image_.work, thread_workspace()); }
    ~Loan() { std::swap(image_.work, thread_workspace()); }
    Loan(const Loan &) = delete;
    Loan &operator=(const Loan &) = delete;

private:
    static Workspace &thread_workspace() {
        thread_local Workspace workspace;
        return workspace;
    }
    ImageFrame &image_;
};

// Runs work(options, range) image by image on one thread each where there are enough images to share out, so that an
// image stays in one cache; else once for all of them on all threads. The result is the same.
constexpr int kImagesPerThread = 4;

template <typename Work>
void for_images(const Scene &s, const Options &options, Frame &frame, const Work &work) {
    if (options.threads > 1 && s.images < kImagesPerThread * options.threads) return work(options, {0, s.images});
    for_units(options, s.images, [&](int image, int) {
        Loan loan(frame.images[image]);
        work(Options{options.kernels, 1}, {image, image + 1});
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
        for (size_t i = 0; i < frame.work.normal_sums[run].count; ++i) {
            const NormalItem &item = frame.work.normal_sums[run].items[i];
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

size_t Workspace::bytes() const {
    size_t total = culls.bytes() + keys.bytes() + spare_keys.bytes() + slots.bytes() + poses.bytes();
    for (const NormalSums &n : normal_sums) total += n.items.bytes();
    for (const Bin &b : bins) total += b.candidates.bytes() + b.tile_counts.bytes();
    return total;
}

size_t Frame::bytes() const {
    size_t total = 0;
    for (const ImageFrame &f : images)
        total += f.work.bytes() + f.records.bytes() + f.chunk_visible.bytes() + f.slot_begin.bytes() +
                 f.slot_count.bytes() + f.tile_begin.bytes() + f.entries.bytes() + f.coverage.bytes() +
                 f.block_counts.bytes() + f.staged.bytes();
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

void forward(const Scene &s, const Options &all, Frame &frame, const Images &out) {
    for_images(s, all, frame, [&](const Options &options, ImageRange range) {
        prepare(s, options, frame, range);
        for (int image = range.first; image < range.end && out.contribution; ++image)
            frame.images[image].work.slots.ensure(frame.images[image].slot_total + 1);
        for_tiles(s, options, range, [&](int image, int tile) {
            options.kernels->forward_tile(s, frame.images[image], image, tile, thread_scratch(), out);
        });
        if (!out.contribution) return;
        int chunks = static_cast<int>(chunk_count(s));
        for_units(options, range.count() * chunks, [&](int unit, int) {
            int image = range.first + unit / chunks;
            sum_contributions(s, frame.images[image], image, unit % chunks, out.contribution);
        });
    });
}

void make_slots(const Scene &s, ImageFrame &frame, bool merged) {
    size_t n = static_cast<size_t>(s.n);
    frame.work.merged = merged;
    Slot *slots = frame.work.slots.ensure(merged ? n + 1 : frame.slot_total + 1);
    if (merged) std::memset(slots, 0, n * sizeof(Slot));
}

namespace {

// Pose sums per (image, chunk), added up in chunk order, so that threads do not matter.
class PoseTable {
public:
    PoseTable(const Scene &s, const Gradients &out)
        : scene_(s), out_(out), chunks_(chunk_count(s)), row_(12 * static_cast<size_t>(s.links) + 4) {
        if (wanted()) sums_.resize(chunks_ * static_cast<size_t>(s.images) * row_, 0.0);
    }
    bool wanted() const { return out_.Ts_cam_link || out_.K; }

    PoseSums at(int image, size_t chunk) {
        PoseSums p;
        double *base = wanted() ? sums_.data() + (static_cast<size_t>(image) * chunks_ + chunk) * row_ : nullptr;
        p.links = out_.Ts_cam_link ? base : nullptr;
        p.K = out_.K ? base + row_ - 4 : nullptr;
        return p;
    }

    void write(int image) {
        if (!wanted()) return;
        size_t first = static_cast<size_t>(image) * chunks_, links = static_cast<size_t>(scene_.links);
        double *total = sums_.data() + first * row_;
        for (size_t chunk = 1; chunk < chunks_; ++chunk)
            for (size_t j = 0; j < row_; ++j) total[j] += sums_[(first + chunk) * row_ + j];
        if (out_.K) {
            double *K = out_.K + 9 * image, *v = total + row_ - 4;
            std::fill_n(K, 9, 0.0);
            if (chunks_) K[0] = v[0], K[4] = v[1], K[2] = v[2], K[5] = v[3];
        }
        if (!out_.Ts_cam_link) return;
        double *Ts = out_.Ts_cam_link + static_cast<size_t>(image) * links * 16;
        std::fill_n(Ts, links * 16, 0.0);
        for (size_t link = 0; chunks_ && link < links; ++link) std::copy_n(total + 12 * link, 12, Ts + 16 * link);
    }

private:
    const Scene &scene_;
    const Gradients &out_;
    size_t chunks_, row_;
    std::vector<double> sums_;
};

}  // namespace

void backward(const Scene &s, const Options &all, Frame &frame, const ImageGradients &in, const Gradients &out) {
    const Kernels &k = *all.kernels;
    PoseTable poses(s, out);
    size_t chunks = chunk_count(s);
    auto do_tiles = [&](const Options &options, ImageRange range) {
        for (int image = range.first; image < range.end; ++image)
            make_slots(s, frame.images[image], options.threads == 1);
        for_tiles(s, options, range, [&](int image, int tile) {
            k.backward_tile(s, frame.images[image], image, tile, thread_scratch(), in);
        });
    };
    auto do_chunk = [&](int image, size_t chunk) {
        uint32_t begin = static_cast<uint32_t>(chunk * kSplatChunk);
        const ImageFrame &f = frame.images[image];
        k.backward_splats(s, f, image, begin, begin + f.chunk_visible[chunk], out, poses.at(image, chunk));
    };
    if (!out.per_splat()) {
        for_images(s, all, frame, [&](const Options &options, ImageRange range) {
            do_tiles(options, range);
            for_units(options, range.count() * static_cast<int>(chunks), [&](int unit, int) {
                do_chunk(range.first + unit / static_cast<int>(chunks), unit % chunks);
            });
        });
    } else {  // images that share a set add to the same rows: one unit does them in turn
        do_tiles(all, {0, s.images});
        bool shared_rows = out.link_weights != nullptr;
        int sets = shared_rows ? 1 : s.sets;
        for_units(all, sets * static_cast<int>(chunks), [&](int unit, int) {
            int set = unit / static_cast<int>(chunks);
            clear_rows(s, out, shared_rows ? 0 : set, shared_rows ? s.sets : 1, unit % chunks);
            for (int image = 0; image < s.images; ++image)
                if (shared_rows || s.set_of_image[image] == set) do_chunk(image, unit % chunks);
        });
    }
    for (int image = 0; image < s.images; ++image) poses.write(image);
}

void normal_equations(const Scene &s, const Options &all, Frame &frame, const Target &target,
                      const NormalEquations &out) {
    const Kernels &k = *all.kernels;
    int chunks = static_cast<int>(chunk_count(s)), runs = (s.tiles() + kTileRun - 1) / kTileRun;
    for_images(s, all, frame, [&](const Options &options, ImageRange range) {
        prepare(s, options, frame, range);
        for (int image = range.first; image < range.end; ++image) {
            Workspace &work = frame.images[image].work;
            work.poses.ensure(static_cast<size_t>(s.n) + 16);
            if (work.normal_sums.size() < static_cast<size_t>(runs)) work.normal_sums.resize(runs);
        }
        for_units(options, range.count() * chunks, [&](int unit, int) {
            int image = range.first + unit / chunks, chunk = unit % chunks;
            ImageFrame &f = frame.images[image];
            uint32_t begin = static_cast<uint32_t>(chunk * kSplatChunk);
            k.pose_records(s, f, image, begin, begin + f.chunk_visible[chunk], f.work.poses.data());
        });
        for_units(options, range.count() * runs, [&](int unit, int) {
            int image = range.first + unit / runs, run = unit % runs;
            NormalSums &sums = frame.images[image].work.normal_sums[run];
            sums.count = 0;
            for (int tile = run * kTileRun; tile < std::min((run + 1) * kTileRun, s.tiles()); ++tile)
                k.normal_tile(s, frame.images[image], image, tile, thread_scratch(), target, sums);
        });
        for_units(options, range.count(), [&](int i, int) {
            int image = range.first + i;
            add_normal_sums(s, frame.images[image], image, runs, out);
        });
    });
}

}  // namespace kinesplat
