// Threads for the kernels; see parallel.h for why there are two sources of them.
#include "parallel.h"

#include <pthread.h>
#include "abi/abi.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "errors.h"
#include "memory.h"
#include "sizes.h"

namespace entrenar {
namespace {

// About this many ranges a thread: enough to even out a core that another process disturbs.
constexpr int64_t kRangesPerThread = 4;

struct Job {
    RangeBody body;
    const void* context;
    int64_t items, step;
    std::atomic<int64_t> next{0};  // in steps, so that no counter runs past the end of the integers

    void run() {
        const int64_t steps = divide_up(items, step);
        for (int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < steps;) {
            const int64_t begin = index * step;
            body(context, begin, begin + std::min(step, items - begin));
        }
    }
};

// Workers that sleep until a job comes. One job at a time: a second caller does its own work alone.
class Pool {
public:
    // False if the pool is busy, in which case nothing was done.
    bool run(Job& job, int threads) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) return false;
        {
            std::lock_guard<std::mutex> lock(state_);
            grow(threads - 1);
            job_ = &job;
            helpers_wanted_ = std::min(threads - 1, workers_);
            helpers_running_ = helpers_wanted_;
        }
        wake_.notify_all();
        job.run();
        std::unique_lock<std::mutex> lock(state_);
        // Helpers that have not woken yet are no longer needed; the others must leave `job` before it goes away.
        helpers_running_ -= helpers_wanted_;
        helpers_wanted_ = 0;
        done_.wait(lock, [this] { return helpers_running_ == 0; });
        return true;
    }

private:
    void grow(int wanted) {
        try {
            for (; workers_ < wanted; ++workers_) std::thread(&Pool::work, this).detach();
        } catch (const std::system_error&) {  // the system gives no more threads: those there are serve
        }
    }

    [[noreturn]] void work() {
        std::unique_lock<std::mutex> lock(state_);
        for (;;) {
            wake_.wait(lock, [this] { return helpers_wanted_ > 0; });
            --helpers_wanted_;
            Job* job = job_;
            lock.unlock();
            job->run();
            lock.lock();
            if (--helpers_running_ == 0) done_.notify_all();
        }
    }

    std::mutex turn_, state_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    int workers_ = 0, helpers_wanted_ = 0, helpers_running_ = 0;
};

using Clock = std::chrono::steady_clock;

// An OpenMP region ends when its last thread has arrived, work or no work: where another process holds a core that is a
// time slice of the scheduler, 8 ms for a job of 0.1 ms. After two such stalls in a row (one may be a core that wakes
// up) our own pool, which waits for nobody, serves for a while.
constexpr auto kStall = std::chrono::milliseconds(2), kOwnPoolTime = std::chrono::milliseconds(200);
constexpr int kStallsInARow = 2;

std::atomic<GompParallel> gomp{nullptr};
std::atomic<Clock::rep> own_pool_until{0};
std::atomic<int> stalls{0};
std::atomic<Pool*> own_pool{nullptr};

// A child has none of its parent's threads: forget both pools (the parent's Pool leaks in the child, locks and all).
void forget_pools() {
    gomp.store(nullptr);
    own_pool.store(nullptr);
}

// The job and when the caller's share of it began and ended.
struct TimedJob {
    Job* job;
    std::thread::id caller;
    Clock::time_point begin, end;

    void run() {
        job->run();
        if (std::this_thread::get_id() == caller) end = Clock::now();
    }
};

// False if OpenMP's pool is unknown, or has stalled lately; then nothing was done.
bool run_with_gomp(Job& job, int threads) {
    const GompParallel parallel = gomp.load();
    TimedJob timed{&job, std::this_thread::get_id(), Clock::now(), {}};
    if (!parallel || timed.begin.time_since_epoch().count() < own_pool_until.load()) return false;
    parallel([](void* data) { static_cast<TimedJob*>(data)->run(); }, &timed, static_cast<unsigned>(threads), 0);
    const auto now = Clock::now();
    const auto waited = now - timed.end;
    const bool stalled = waited > kStall && waited > (timed.end - timed.begin) / 2;
    stalls.store(stalled ? stalls.load() + 1 : 0);
    if (stalls.load() >= kStallsInARow) own_pool_until.store((now + kOwnPoolTime).time_since_epoch().count());
    return true;
}

Pool* pool() {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pools);
    (void)registered;
    Pool* existing = own_pool.load();
    if (existing) return existing;
    auto* fresh = new Pool;  // never deleted: its workers sleep in it until the process ends
    if (own_pool.compare_exchange_strong(existing, fresh)) return fresh;
    delete fresh;
    return existing;
}

}  // namespace

void parallel_ranges(int64_t items, int64_t grain, int threads, RangeBody body, const void* context) {
    if (items <= 0) return;
    advise_new_heap();  // here, because a result's memory is new now, and untouched
    const bool single = grain == 0;
    grain = std::max<int64_t>(grain, 1);
    const int64_t grains = divide_up(items, grain);
    if (threads <= 1 || grains <= 1) return body(context, 0, items);
    threads = static_cast<int>(std::min<int64_t>(threads, grains));
    const int64_t step = single ? 1 : grain * divide_up(grains, threads * kRangesPerThread);
    Job job{body, context, items, step};
    if (!run_with_gomp(job, threads) && !pool()->run(job, threads)) job.run();
}

}  // namespace entrenar

// Use torch's OpenMP pool from now on; `parallel` is the GOMP_parallel that torch itself calls, or null for our own.
ENTRENAR_API void entrenar_use_gomp(entrenar::GompParallel parallel) {
    static const int registered = pthread_atfork(nullptr, nullptr, entrenar::forget_pools);
    (void)registered;
    entrenar::gomp.store(parallel);
}
