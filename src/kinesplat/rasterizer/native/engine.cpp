#include "engine.h"

#include <algorithm>
#include <cstring>
#include <mutex>

#include "pool.h"

namespace kinesplat {

namespace {

std::mutex store_mutex;
std::vector<std::unique_ptr<Frame>> &frame_store() {
    static auto *store = new std::vector<std::unique_ptr<Frame>>();
    return *store;
}

constexpr size_t kStoredFrames = 4;
constexpr uint32_t kMaxBins = 16, kMinBinRun = 1024;

void for_units(const Options &options, int count, const Pool::Work &work) {
    Pool::shared().run(count, options.threads, work);
}

uint32_t bin_run_length(uint32_t visible) {
    uint32_t run = (visible + kMaxBins - 1) / kMaxBins;
    return std::max(run, kMinBinRun);
}

uint32_t bin_count(uint32_t visible) {
    uint32_t run = bin_run_length(visible);
    return (visible + run - 1) / run;
}

// Stable radix sort of (depth bits << 32 | record) by depth; digits as wide as the range of depths needs.
void sort_keys(ImageFrame &frame, uint32_t count) {
    uint64_t *keys = frame.keys.data(), *spare = frame.spare_keys.ensure(count);
    if (count < 2) return;
    uint32_t low = UINT32_MAX, high = 0;
    for (uint32_t i = 0; i < count; ++i) {
        uint32_t depth = static_cast<uint32_t>(keys[i] >> 32);
        low = std::min(low, depth);
        high = std::max(high, depth);
    }
    int width = high == low ? 0 : 32 - __builtin_clz(high - low);
    constexpr int kDigit = 11;
    int passes = (width + kDigit - 1) / kDigit;
    if (!passes) return;
    int digit = (width + passes - 1) / passes;
    uint32_t histogram[3][1 << kDigit] = {};
    uint32_t mask = (1u << digit) - 1;
    for (uint32_t i = 0; i < count; ++i) {
        uint32_t depth = static_cast<uint32_t>(keys[i] >> 32) - low;
        for (int pass = 0; pass < passes; ++pass) ++histogram[pass][depth >> (pass * digit) & mask];
    }
    for (int pass = 0; pass < passes; ++pass) {
        uint32_t total = 0, *slots = histogram[pass];
        for (uint32_t d = 0; d <= mask; ++d) {
            uint32_t here = slots[d];
            slots[d] = total;
            total += here;
        }
        for (uint32_t i = 0; i < count; ++i) {
            uint32_t depth = static_cast<uint32_t>(keys[i] >> 32) - low;
            spare[slots[depth >> (pass * digit) & mask]++] = keys[i];
        }
        std::swap(keys, spare);
    }
    if (keys != frame.keys.data()) std::swap(frame.keys, frame.spare_keys);
}

void collect_and_sort(const Scene &s, ImageFrame &frame) {
    uint64_t *keys = frame.keys.ensure(static_cast<size_t>(s.n) + 1);
    uint32_t count = 0;
    for (size_t chunk = 0; chunk < chunk_count(s); ++chunk) {
        uint32_t first = static_cast<uint32_t>(chunk * kSplatChunk);
        for (uint32_t i = first; i < first + frame.chunk_visible[chunk]; ++i) {
            uint32_t depth;
            std::memcpy(&depth, &frame.records[i].z, 4);
            keys[count++] = static_cast<uint64_t>(depth) << 32 | i;
        }
    }
    frame.visible = count;
    sort_keys(frame, count);
    if (frame.bins.size() < bin_count(count)) frame.bins.resize(bin_count(count));
}

// Turns the bins' counts per tile into where each bin writes its first entry of each tile.
void place_tiles(const Scene &s, ImageFrame &frame) {
    uint32_t bins = bin_count(frame.visible), total = 0, slots = 0;
    uint32_t *begin = frame.tile_begin.ensure(static_cast<size_t>(s.tiles()) + 1);
    for (int tile = 0; tile < s.tiles(); ++tile) {
        begin[tile] = total;
        for (uint32_t b = 0; b < bins; ++b) {
            uint32_t here = frame.bins[b].tile_counts[tile];
            frame.bins[b].tile_counts[tile] = total;
            total += here;
        }
    }
    begin[s.tiles()] = total;
    for (uint32_t b = 0; b < bins; ++b) {
        frame.bins[b].slot_base = slots;
        slots += frame.bins[b].count;
    }
    frame.slot_total = slots;
    frame.entries.ensure(total + 64);  // staging looks ahead
    for (uint32_t i = 0; i < 64; ++i) frame.entries[total + i].record = 0;
    frame.staged.ensure(static_cast<size_t>(s.tiles()));
    frame.coverage.ensure(static_cast<size_t>(s.tiles()) * kTileBlocks * kLanes);
    frame.block_counts.ensure(static_cast<size_t>(s.tiles()) * kTileBlocks);
}

void scatter_entries(ImageFrame &frame, uint32_t b) {
    Bin &bin = frame.bins[b];
    for (uint32_t i = 0; i < bin.count; ++i) {
        const Candidate &c = bin.candidates[i];
        frame.entries[bin.tile_counts[c.tile]++] = {c.record, bin.slot_base + i, c.u, c.v, c.mask};
    }
    uint32_t run = bin_run_length(frame.visible);
    for (uint32_t i = b * run; i < std::min(frame.visible, (b + 1) * run); ++i)
        frame.slot_begin[static_cast<uint32_t>(frame.keys[i])] += bin.slot_base;
}

// Work units of (image, part) pairs, where images have different numbers of parts.
struct Parts {
    std::vector<std::pair<int, uint32_t>> units;
};

Parts bin_parts(const Frame &frame, int images) {
    Parts parts;
    for (int image = 0; image < images; ++image)
        for (uint32_t b = 0; b < bin_count(frame.images[image].visible); ++b) parts.units.emplace_back(image, b);
    return parts;
}

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

constexpr int kTileRun = 4;  // tiles per work unit

template <typename TileWork>
void for_tiles(const Scene &s, const Options &options, const TileWork &work) {
    int runs = (s.tiles() + kTileRun - 1) / kTileRun;
    for_units(options, s.images * runs, [&](int unit, int thread) {
        int image = unit / runs, first = unit % runs * kTileRun;
        for (int tile = first; tile < std::min(first + kTileRun, s.tiles()); ++tile) work(image, tile, thread);
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

size_t chunk_count(const Scene &s) { return (static_cast<size_t>(s.n) + kSplatChunk - 1) / kSplatChunk; }

Scratch &scratch_of(int thread) {
    // The pool serves one multi-threaded call at a time; a single-threaded call runs on its caller.
    thread_local Scratch scratch;
    (void)thread;
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

std::string find_bad_input(const Scene &s, const Options &options) {
    size_t n = static_cast<size_t>(s.sets) * static_cast<size_t>(s.n);
    const struct {
        const char *name;
        const float *values;
        size_t count;
    } named[] = {{"gaussians.means", s.means, 3 * n},
                 {"gaussians.quats", s.quats, 4 * n},
                 {"gaussians.scales", s.scales, 3 * n},
                 {"gaussians.opacities", s.opacities, n},
                 {"gaussians.sh", s.sh, 3 * n * static_cast<size_t>(s.coefficients)},
                 {"link_weights", s.link_weights, s.link_weights ? static_cast<size_t>(s.n) * s.links_per_splat : 0},
                 {"background", s.background, 3 * static_cast<size_t>(s.images)}};
    for (const auto &input : named)
        if (!options.kernels->all_finite(input.values, input.count)) return std::string(input.name) + " contains NaN or infinity";
    double total = 0;
    for (size_t i = 0; i < static_cast<size_t>(s.images) * s.links * 16; ++i) total += s.Ts_cam_link[i] * 0.0;
    if (total != 0.0) return "Ts_world_link or camera T_cam_world contains NaN or infinity";
    for (size_t i = 0; i < static_cast<size_t>(s.images) * 5; ++i) total += s.K[i] * 0.0;
    if (total != 0.0) return "camera K contains NaN or infinity";
    for (size_t i = 0; i < static_cast<size_t>(s.images); ++i) {
        if (s.K[5 * i] <= 0 || s.K[5 * i + 1] <= 0) return "camera K has a focal length that is not positive";
        if (s.K[5 * i + 4] != 0) return "camera K has skew (K[0, 1] is not 0), which no backend renders";
    }
    for (size_t i = 0; i < n; ++i) {
        const float *q = s.quats + 4 * i;
        if (q[0] == 0 && q[1] == 0 && q[2] == 0 && q[3] == 0) return "gaussians.quats contains a quaternion of length zero";
    }
    return {};
}

std::string find_bad_target(const Target &t, size_t pixels, const Options &options) {
    const struct {
        const char *name;
        const float *values;
        size_t count;
    } named[] = {{"target rgb", t.rgb, 3 * pixels},
                 {"target alpha", t.alpha, pixels},
                 {"rgb_weight", t.rgb_weight, pixels},
                 {"alpha_weight", t.alpha_weight, pixels}};
    for (const auto &input : named)
        if (input.values && !options.kernels->all_finite(input.values, input.count))
            return std::string(input.name) + " contains NaN or infinity";
    return {};
}

void prepare(const Scene &s, const Options &options, Frame &frame) {
    const Kernels &k = *options.kernels;
    int chunks = static_cast<int>(chunk_count(s));
    for (ImageFrame &f : frame.images) {
        size_t n = static_cast<size_t>(s.n) + 16;
        f.records.ensure(n);
        f.culls.ensure(n);
        f.slot_begin.ensure(n);
        f.slot_count.ensure(n);
        f.chunk_visible.ensure(static_cast<size_t>(chunks) + 1);
    }
    for_units(options, s.images * chunks, [&](int unit, int) {
        int image = unit / chunks, chunk = unit % chunks, begin = chunk * kSplatChunk;
        ImageFrame &f = frame.images[image];
        f.chunk_visible[chunk] =
            k.project(s, image, begin, std::min(begin + kSplatChunk, s.n), f.records.data(), f.culls.data());
    });
    for_units(options, s.images, [&](int image, int) { collect_and_sort(s, frame.images[image]); });
    Parts parts = bin_parts(frame, s.images);
    int units = static_cast<int>(parts.units.size());
    for_units(options, units, [&](int unit, int) {
        auto [image, b] = parts.units[unit];
        ImageFrame &f = frame.images[image];
        uint32_t run = bin_run_length(f.visible);
        k.bin(s, f, f.bins[b], b * run, std::min(f.visible, (b + 1) * run));
    });
    for_units(options, s.images, [&](int image, int) { place_tiles(s, frame.images[image]); });
    for_units(options, units, [&](int unit, int) {
        auto [image, b] = parts.units[unit];
        scatter_entries(frame.images[image], b);
    });
}

void forward(const Scene &s, const Options &options, Frame &frame, const Images &out) {
    prepare(s, options, frame);
    if (out.contribution)
        for (ImageFrame &f : frame.images) f.slots.ensure(f.slot_total + 1);
    for_tiles(s, options, [&](int image, int tile, int thread) {
        options.kernels->forward_tile(s, frame.images[image], image, tile, scratch_of(thread), out);
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
    for_tiles(s, options, [&](int image, int tile, int thread) {
        k.backward_tile(s, frame.images[image], image, tile, scratch_of(thread), in);
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
        if (out.K) std::copy(total.end() - 4, total.end(), out.K + 4 * image);
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
    for_units(options, s.images * runs, [&](int unit, int thread) {
        int image = unit / runs, run = unit % runs;
        NormalSums &sums = frame.images[image].normal_sums[run];
        sums.count = 0;
        for (int tile = run * kTileRun; tile < std::min((run + 1) * kTileRun, s.tiles()); ++tile)
            k.normal_tile(s, frame.images[image], image, tile, scratch_of(thread), target, sums);
    });
    for_units(options, s.images, [&](int image, int) { add_normal_sums(s, frame.images[image], image, runs, out); });
}

}  // namespace kinesplat
