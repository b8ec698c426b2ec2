// A small thread pool: the caller works too, workers sleep when there is nothing to do.
#pragma once
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace kinesplat {

class Pool {
public:
    using Work = std::function<void(int unit, int thread)>;

    Pool() = default;
    ~Pool();
    Pool(const Pool &) = delete;
    Pool &operator=(const Pool &) = delete;

    // Runs work(unit, thread) for every unit in [0, count) on up to `threads` threads, the caller being thread 0.
    // Rethrows the first exception that a unit threw. Calls from several threads are served one after the other.
    void run(int count, int threads, const Work &work);

    static Pool &shared();

private:
    struct Job {
        const Work *work = nullptr;
        int count = 0;
        std::atomic<int> next{0}, done{0};
        std::exception_ptr error;
        std::mutex error_mutex;
    };

    void start_workers(int threads);
    void worker(int thread);
    static void take_units(Job &job, int thread);

    std::mutex call_mutex_, mutex_;
    std::condition_variable wake_, idle_;
    std::vector<std::thread> workers_;
    Job *job_ = nullptr;
    std::atomic<uint64_t> generation_{0};
    int wanted_ = 0, inside_ = 0;
    bool stop_ = false;
};

}  // namespace kinesplat
