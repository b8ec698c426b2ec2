// Everything of the forward pass before the pixels: projection, depth sort, tiles.
#include <algorithm>
#include <cstring>

#include "engine.h"

namespace kinesplat {

namespace {

constexpr uint32_t kMaxBins = 16, kMinBinRun = 1024;

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
    uint64_t *keys = frame.work.keys.data(), *spare = frame.work.spare_keys.ensure(count);
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
    if (keys != frame.work.keys.data()) std::swap(frame.work.keys, frame.work.spare_keys);
}

void collect_and_sort(const Scene &s, ImageFrame &frame) {
    uint64_t *keys = frame.work.keys.ensure(static_cast<size_t>(s.n) + 1);
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
    if (frame.work.bins.size() < bin_count(count)) frame.work.bins.resize(bin_count(count));
}

// Slots in the order of the records, so that the splats' backward pass reads them in sequence.
void place_slots(const Scene &s, ImageFrame &frame) {
    uint32_t slots = 0;
    for (size_t chunk = 0; chunk < chunk_count(s); ++chunk) {
        uint32_t first = static_cast<uint32_t>(chunk * kSplatChunk);
        for (uint32_t i = first; i < first + frame.chunk_visible[chunk]; ++i) {
            frame.slot_begin[i] = slots;
            slots += frame.slot_count[i];
        }
    }
}

// Turns the bins' counts per tile into where each bin writes its first entry of each tile.
void place_tiles(const Scene &s, ImageFrame &frame) {
    uint32_t bins = bin_count(frame.visible), total = 0;
    uint32_t *begin = frame.tile_begin.ensure(static_cast<size_t>(s.tiles()) + 1);
    for (int tile = 0; tile < s.tiles(); ++tile) {
        begin[tile] = total;
        for (uint32_t b = 0; b < bins; ++b) {
            uint32_t here = frame.work.bins[b].tile_counts[tile];
            frame.work.bins[b].tile_counts[tile] = total;
            total += here;
        }
    }
    begin[s.tiles()] = total;
    frame.slot_total = total;
    place_slots(s, frame);
    frame.entries.ensure(total + 64);  // staging looks ahead
    for (uint32_t i = 0; i < 64; ++i) frame.entries[total + i].record = 0;
    frame.staged.ensure(static_cast<size_t>(s.tiles()));
    frame.coverage.ensure(static_cast<size_t>(s.tiles()) * kTileBlocks * kLanes);
    frame.block_counts.ensure(static_cast<size_t>(s.tiles()) * kTileBlocks);
}

void scatter_entries(ImageFrame &frame, uint32_t b) {
    Bin &bin = frame.work.bins[b];
    uint32_t slot = 0, record = UINT32_MAX;
    for (uint32_t i = 0; i < bin.count; ++i) {
        const Candidate &c = bin.candidates[i];
        slot = c.record == record ? slot + 1 : frame.slot_begin[c.record];
        record = c.record;
        frame.entries[bin.tile_counts[c.tile]++] = {c.record, slot, c.u, c.v, c.mask};
    }
}

// Work units of (image, part) pairs, where images have different numbers of parts.
struct Parts {
    std::vector<std::pair<int, uint32_t>> units;
};

Parts bin_parts(const Frame &frame, ImageRange range) {
    Parts parts;
    for (int image = range.first; image < range.end; ++image)
        for (uint32_t b = 0; b < bin_count(frame.images[image].visible); ++b) parts.units.emplace_back(image, b);
    return parts;
}

}  // namespace

void prepare(const Scene &s, const Options &options, Frame &frame, ImageRange range) {
    const Kernels &k = *options.kernels;
    int chunks = static_cast<int>(chunk_count(s));
    for (int image = range.first; image < range.end; ++image) {
        ImageFrame &f = frame.images[image];
        size_t n = static_cast<size_t>(s.n) + 16;
        f.records.ensure(n);
        f.work.culls.ensure(n);
        f.slot_begin.ensure(n);
        f.slot_count.ensure(n);
        f.chunk_visible.ensure(static_cast<size_t>(chunks) + 1);
    }
    for_units(options, range.count() * chunks, [&](int unit, int) {
        int image = range.first + unit / chunks, chunk = unit % chunks, begin = chunk * kSplatChunk;
        ImageFrame &f = frame.images[image];
        f.chunk_visible[chunk] =
            k.project(s, image, begin, std::min(begin + kSplatChunk, s.n), f.records.data(), f.work.culls.data());
    });
    auto for_images = [&](auto work) {
        for_units(options, range.count(), [&](int i, int) { work(frame.images[range.first + i]); });
    };
    for_images([&](ImageFrame &f) { collect_and_sort(s, f); });
    Parts parts = bin_parts(frame, range);
    int units = static_cast<int>(parts.units.size());
    for_units(options, units, [&](int unit, int) {
        auto [image, b] = parts.units[unit];
        ImageFrame &f = frame.images[image];
        uint32_t run = bin_run_length(f.visible);
        k.bin(s, f, f.work.bins[b], b * run, std::min(f.visible, (b + 1) * run));
    });
    for_images([&](ImageFrame &f) { place_tiles(s, f); });
    for_units(options, units, [&](int unit, int) {
        auto [image, b] = parts.units[unit];
        scatter_entries(frame.images[image], b);
    });
}

}  // namespace kinesplat
