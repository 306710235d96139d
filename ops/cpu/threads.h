// Threads that share pieces of work and wait for each other.
#pragma once
#include <algorithm>
#include <atomic>
#include <cassert>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#else  // one thread
inline int omp_get_num_threads() { return 1; }
inline int omp_get_thread_num() { return 0; }
#endif

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits until all threads are here; the last one calls `last` before the others go on. Spins only briefly: where other
// programs share the cores, the thread that is waited for may need this very core to get here, and OpenMP's own barrier,
// which spins on, made a token take five times as long.
class Barrier {
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> round{0};

  public:
    template <class Last>
    void wait(int threads, Last last) {
        int now = round.load();
        if (arrived.fetch_add(1) + 1 == threads) {
            last();
            arrived.store(0);
            round.store(now + 1);
            round.notify_all();
            return;
        }
        for (int spins = 0; spins < 1000; spins++) {
            if (round.load() != now) return;
            relax();
        }
        round.wait(now);
    }
};

// Works between two barriers. There are two sets of counters: while one is in use, the other one is at zero.
struct Works {
    static constexpr int MOST = 4;          // between two barriers
    static constexpr int64_t SHORTEST = 1 << 15;  // bytes that a thread claims at once, at least
    std::atomic<int64_t> claimed[2][MOST] = {};   // pieces of each work
    Barrier barrier;
};

// One thread's view of them.
class Sharing {
    Works& works;
    int set = 0, next = 0;

  public:
    int threads = 1;

    explicit Sharing(Works& works) : works(works) {}

    void wait_for_all() {
        works.barrier.wait(threads, [&] {
            for (auto& claimed : works.claimed[set]) claimed.store(0);
        });
        set = 1 - set, next = 0;
    }

    // Splits n equal pieces of work, each of so many bytes to read, between the threads: calls work(begin, end) for
    // ranges. They are long at first, to be one sequential stream, and shorter towards the end, so that all threads end
    // together however fast each of them is.
    template <class Work>
    void share(int64_t n, int64_t bytes, Work work) {
        assert(next < Works::MOST);
        std::atomic<int64_t>& claimed = works.claimed[set][next++];
        int64_t least = std::max(int64_t(1), Works::SHORTEST / bytes), begin = claimed.load();
        while (begin < n) {
            int64_t end = std::min(n, begin + std::max(least, 3 * (n - begin) / (4 * threads)));
            if (!claimed.compare_exchange_weak(begin, end)) continue;
            work(begin, end);
            begin = claimed.load();
        }
    }
};
