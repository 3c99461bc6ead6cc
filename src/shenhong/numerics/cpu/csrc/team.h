// What threads share that compute one thing together: a barrier, and memory that stays.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <vector>

// A barrier that spins for a while and then lets others run: this machine may be busy.
class Barrier {
    std::atomic<int> waiting{0}, round{0};

public:
    int threads = 1;
    void wait() {
        if (threads == 1) return;
        const int now = round.load();
        if (waiting.fetch_add(1) + 1 == threads) {
            waiting.store(0);
            round.store(now + 1);
            return;
        }
        for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++)
            if (spins > 20000) sched_yield();
    }
};

// Memory that begins with a cache line and is kept from call to call, for fresh pages cost more than a small step.
template <class T> class Buffer {
    struct alignas(64) Line {
        T numbers[64 / sizeof(T)];
    };
    std::vector<Line> lines;

public:
    void grow(int64_t size) {
        const size_t wanted = (size * sizeof(T) + 63) / 64;
        if (lines.size() < wanted) lines.resize(wanted + wanted / 2);
    }
    T* data() { return (T*)lines.data(); }
    const T* data() const { return (const T*)lines.data(); }
    T& operator[](int64_t i) { return data()[i]; }
    const T& operator[](int64_t i) const { return data()[i]; }
};
