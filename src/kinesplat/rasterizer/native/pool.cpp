#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kinesplat {

namespace {

constexpr int kSpins = 2000;  // about 20 microseconds, then sleep: a busy machine must not pay for our waiting

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Pool &Pool::shared() {
    static Pool *pool = new Pool();  // never destroyed: workers may outlive static destructors
    return *pool;
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
        generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread &t : workers_) t.join();
}

void Pool::take_units(Job &job, int thread) {
    for (;;) {
        int unit = job.next.fetch_add(1, std::memory_order_relaxed);
        if (unit >= job.count) return;
        try {
            (*job.work)(unit, thread);
        } catch (...) {
            std::lock_guard<std::mutex> lock(job.error_mutex);
            if (!job.error) job.error = std::current_exception();
        }
        job.done.fetch_add(1, std::memory_order_release);
    }
}

void Pool::start_workers(int threads) {
    while (static_cast<int>(workers_.size()) < threads - 1) {
        int thread = static_cast<int>(workers_.size()) + 1;
        workers_.emplace_back([this, thread] { worker(thread); });
    }
}

void Pool::worker(int thread) {
    uint64_t seen = 0;
    for (;;) {
        for (int i = 0; i < kSpins && generation_.load(std::memory_order_acquire) == seen; ++i) relax();
        Job *job = nullptr;
        {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return stop_ || generation_.load(std::memory_order_relaxed) != seen; });
            if (stop_) return;
            seen = generation_.load(std::memory_order_relaxed);
            if (job_ && thread < wanted_) {
                job = job_;
                ++inside_;
            }
        }
        if (!job) continue;
        take_units(*job, thread);
        std::lock_guard<std::mutex> lock(mutex_);
        if (--inside_ == 0) idle_.notify_all();
    }
}

void Pool::run(int count, int threads, const Work &work) {
    if (count <= 0) return;
    threads = threads < count ? threads : count;
    Job job;
    job.work = &work;
    job.count = count;
    if (threads <= 1) {
        take_units(job, 0);
        if (job.error) std::rethrow_exception(job.error);
        return;
    }
    std::lock_guard<std::mutex> call(call_mutex_);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        start_workers(threads);
        job_ = &job;
        wanted_ = threads;
        generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    take_units(job, 0);
    for (int i = 0; i < kSpins && job.done.load(std::memory_order_acquire) < count; ++i) relax();
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;  // a worker that wakes late finds nothing
    idle_.wait(lock, [&] { return inside_ == 0; });
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace kinesplat
