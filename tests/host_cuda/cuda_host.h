// Stands in for CUDA's built-ins, so that g++ compiles the kernels' files as they are and a CPU runs them.
//
// A block of a kernel with barriers is an OS thread, and each of its CUDA threads a fiber: an own stack, run until
// the next barrier, in an order drawn from a seed. So a missing barrier shows as a wrong result. Shared memory is
// poisoned: an element that nobody wrote is NaN. Kernels without barriers run as plain loops, threads and blocks
// in a permuted order.
//
// What this cannot show: the memory model of a GPU, its launch limits, and speed.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <link.h>
#include <math.h>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define HOST_CUDA

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    size_t size() const { return size_t(x) * y * z; }
    dim3 at(size_t k) const { return {unsigned(k % x), unsigned(k / x % y), unsigned(k / x / y)}; }
};
static thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;
using std::max;
using std::min;

namespace host_cuda {

constexpr size_t STACK = 64 * 1024, BLOCKS_AT_ONCE = 8, GUARD = 64;
enum class State { runnable, spinning, at_block_barrier, at_warp_barrier, done };

struct Fiber {
    ucontext_t context;
    dim3 index;
    State state = State::runnable;
    unsigned mask = 0;      // of the warp barrier it waits at
    uint32_t phase = 0;     // barriers of the cluster that it has arrived at
    unsigned char slot[8];  // what it offers to the others of its warp
    uint32_t fragments[2][6];  // and to a product of the warp (mma_host.h)
    unsigned products = 0;
    std::unique_ptr<char[]> stack{new char[STACK]};
};

// What the blocks of one launch share.
struct Launch {
    size_t shared;                                    // bytes of dynamic shared memory of a block
    std::atomic<bool> failed{false};                  // some block has: the others need not wait for it
    std::unique_ptr<std::atomic<float *>[]> memory;   // each block's shared memory, once it has arrived at a barrier
    std::unique_ptr<std::atomic<uint32_t>[]> arrived; // threads at each cluster's barrier, counted up
    double patience = 60;                             // seconds that a block may wait for another one

    Launch(size_t shared, size_t blocks)
        : shared(shared), memory(new std::atomic<float *>[blocks]()), arrived(new std::atomic<uint32_t>[blocks]()) {
        if (const char *given = std::getenv("FASTLSTM_TEST_SPIN_SECONDS")) patience = std::atof(given);
    }
};
static thread_local Launch *launched = nullptr;
static thread_local float *dynamic_shared = nullptr;

// The fibers of one block, and who runs when.
struct Block {
    std::vector<Fiber> fibers;
    ucontext_t scheduler;
    size_t current = 0;
    void (*body)(void *);
    void *argument;
    std::string error;

    Block(size_t threads, void (*body)(void *), void *argument) : fibers(threads), body(body), argument(argument) {}
    void run(std::mt19937_64 &random);
    bool release();
    void wait(State state, unsigned mask = 0) {
        fibers[current].state = state;
        fibers[current].mask = mask;
        swapcontext(&fibers[current].context, &scheduler);
    }
};
static thread_local Block *block = nullptr;  // null while a kernel runs as a plain loop

inline void fiber_main() {
    Block *mine = block;
    try {
        mine->body(mine->argument);
    } catch (const std::exception &error) {
        mine->error = error.what();
    }
    mine->wait(State::done);
}

inline void Block::run(std::mt19937_64 &random) {
    block = this;
    for (size_t k = 0; k < fibers.size(); ++k) {
        Fiber &fiber = fibers[k];
        fiber.index = blockDim.at(k);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, fiber_main, 0);
    }
    std::vector<size_t> order;
    do {
        order.clear();
        for (size_t k = 0; k < fibers.size(); ++k)
            if (fibers[k].state == State::runnable || fibers[k].state == State::spinning) order.push_back(k);
        std::shuffle(order.begin(), order.end(), random);
        for (size_t k : order) {
            current = k;
            threadIdx = fibers[k].index;
            fibers[k].state = State::runnable;
            swapcontext(&scheduler, &fibers[k].context);
            if (!error.empty()) throw std::runtime_error(error);
        }
    } while (release());
    block = nullptr;
}

// Nobody can run: open the barriers at which everybody has arrived. False when all threads are done.
inline bool Block::release() {
    const auto is = [](State state) { return [state](const Fiber &fiber) { return fiber.state == state; }; };
    if (std::all_of(fibers.begin(), fibers.end(), is(State::done))) return false;
    if (std::any_of(fibers.begin(), fibers.end(), is(State::runnable))) return true;
    if (std::all_of(fibers.begin(), fibers.end(), is(State::at_block_barrier))) {
        for (Fiber &fiber : fibers) fiber.state = State::runnable;
        return true;
    }
    bool released = std::any_of(fibers.begin(), fibers.end(), is(State::spinning));  // these wait for another block
    for (size_t warp = 0; warp < fibers.size(); warp += warpSize) {
        const size_t lanes = std::min<size_t>(warpSize, fibers.size() - warp);
        for (size_t lane = 0; lane < lanes; ++lane) {
            const Fiber &first = fibers[warp + lane];
            if (first.state != State::at_warp_barrier) continue;
            const unsigned mask = first.mask;
            std::vector<Fiber *> named;
            for (size_t other = 0; other < lanes; ++other)
                if (mask >> other & 1) named.push_back(&fibers[warp + other]);
            if (!std::all_of(named.begin(), named.end(), [mask](const Fiber *fiber) {
                    return fiber->state == State::at_warp_barrier && fiber->mask == mask;
                })) continue;
            for (Fiber *fiber : named) fiber->state = State::runnable;
            released = true;
        }
    }
    if (!released) throw std::runtime_error("a barrier was not reached by every thread");
    return true;
}

inline Block &here() {
    if (!block) throw std::runtime_error("a kernel with barriers was launched without fibers");
    return *block;
}

// Offer `value` to the warp and take the value of lane `source`; the own value if there is no such lane.
template <class T> T exchange(unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= sizeof(Fiber::slot), "a shuffle moves at most 8 bytes");
    Block &mine = here();
    const size_t self = mine.current, warp = self / warpSize * warpSize;
    std::memcpy(mine.fibers[self].slot, &value, sizeof value);
    mine.wait(State::at_warp_barrier, mask);
    if (source >= 0 && source < warpSize && warp + source < mine.fibers.size())
        std::memcpy(&value, mine.fibers[warp + source].slot, sizeof value);
    mine.wait(State::at_warp_barrier, mask);
    return value;
}
// What a thread does that waits for another block: let the other threads of its block run, and the other blocks. A wait
// that lasts too long is an error.
inline void spin() {
    std::this_thread::yield();
    here().wait(State::spinning);
}
inline void spin(std::chrono::steady_clock::time_point begin) {
    if (launched->failed) throw std::runtime_error("another block failed");
    if (std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() > launched->patience)
        throw std::runtime_error("a block waited too long for another one");
    spin();
}
// Wait until `done`, as the barriers of a cluster do.
template <class Done> void spin_until(Done done) {
    const auto begin = std::chrono::steady_clock::now();
    while (!done()) spin(begin);
}
inline int lane() { return int(here().current % warpSize); }

// Fill the calling thread's copy of every `__shared__` variable with ones, which read as NaN.
inline void poison_shared_memory() {
    blockDim.x = blockDim.x;  // so that this thread has its copy
    const auto visit = [](dl_phdr_info *info, size_t, void *mine) {
        for (int k = 0; k < info->dlpi_phnum; ++k) {
            const auto &part = info->dlpi_phdr[k];
            char *data = static_cast<char *>(info->dlpi_tls_data);
            if (part.p_type == PT_TLS && data && mine >= data && mine < data + part.p_memsz)
                std::memset(data, 0xff, part.p_memsz);
        }
        return 0;
    };
    dl_iterate_phdr(visit, &threadIdx);
}

// A permutation of 0..size-1, drawn from `random` at little cost: k -> a k + b.
struct Permutation {
    size_t size, factor, shift;
    Permutation(size_t size, std::mt19937_64 &random) : size(size), factor(random() % size), shift(random() % size) {
        while (std::gcd(factor, size) != 1) factor = (factor + 1) % size;
    }
    size_t operator()(size_t k) const { return (k * factor + shift) % size; }
};

// Dynamic shared memory between two guards: poisoned, and a write outside it is found.
struct DynamicShared {
    std::vector<unsigned char> whole;
    explicit DynamicShared(size_t bytes) : whole(bytes + 3 * GUARD, 0xa5) {
        const size_t start = GUARD + (GUARD - reinterpret_cast<uintptr_t>(whole.data()) % GUARD) % GUARD;
        std::memset(whole.data() + start, 0xff, bytes);
        dynamic_shared = reinterpret_cast<float *>(whole.data() + start);
    }
    void check(size_t bytes) const {
        const size_t start = reinterpret_cast<unsigned char *>(dynamic_shared) - whole.data();
        for (size_t k = 0; k < whole.size(); ++k)
            if ((k < start || k >= start + bytes) && whole[k] != 0xa5)
                throw std::runtime_error("a write outside the dynamic shared memory");
    }
};

inline void run_plainly(dim3 grid, dim3 threads, std::mt19937_64 &random, void (*body)(void *), void *argument) {
    const Permutation blocks(grid.size(), random), inside(threads.size(), random);
    gridDim = grid, blockDim = threads;
    for (size_t k = 0; k < grid.size(); ++k) {
        blockIdx = grid.at(blocks(k));
        for (size_t thread = 0; thread < threads.size(); ++thread) {
            threadIdx = threads.at(inside(thread));
            body(argument);
        }
    }
}

// `together`: all blocks at once, as a cooperative launch promises; else a few at a time.
inline void run_fibers(dim3 grid, dim3 threads, std::mt19937_64 &random, void (*body)(void *), void *argument,
                       size_t shared, bool together) {
    const Permutation blocks(grid.size(), random);
    const size_t at_once = together ? grid.size() : BLOCKS_AT_ONCE;
    std::vector<std::string> errors(grid.size());
    Launch launch(shared, grid.size());
    for (size_t first = 0; first < grid.size(); first += at_once) {
        std::vector<std::thread> wave;
        for (size_t k = first; k < std::min(first + at_once, grid.size()); ++k) {
            wave.emplace_back([=, &errors, &launch, seed = random()] {
                poison_shared_memory();
                const DynamicShared memory(shared);
                gridDim = grid, blockDim = threads, blockIdx = grid.at(blocks(k)), block = nullptr, launched = &launch;
                std::mt19937_64 own(seed);
                try {
                    Block(threads.size(), body, argument).run(own);
                    memory.check(shared);
                    launch.memory[blockIdx.x] = nullptr;  // a cluster's peer must not write to it from now on
                } catch (const std::exception &error) {
                    if (!launch.failed.exchange(true)) errors[k] = error.what();  // the others only follow
                }
            });
        }
        for (std::thread &thread : wave) thread.join();
    }
    for (const std::string &error : errors)
        if (!error.empty()) throw std::runtime_error(error);
}

template <class... A> constexpr int count(void (*)(A...)) { return sizeof...(A); }

template <class... A> int size_of_argument(void (*)(A...), int number) {
    const int sizes[] = {int(sizeof(A))..., 0};
    return sizes[number];
}

template <class... A, size_t... K>
void call(void (*kernel)(A...), void **args, std::index_sequence<K...>) {
    kernel(*static_cast<A *>(args[K])...);
}

// Launch as cuLaunchKernel does: `args` points to the arguments, `how` is 0 for plain loops, 1 for fibers, 2 for fibers
// of all blocks at once. Returns the message of what went wrong, or null.
template <class... A>
const char *launch(void (*kernel)(A...), const unsigned *shape, void **args, uint64_t seed, int how, size_t shared) {
    static thread_local char message[256];
    std::pair<void (*)(A...), void **> argument{kernel, args};
    const auto body = [](void *given) {
        auto &pair = *static_cast<std::pair<void (*)(A...), void **> *>(given);
        call(pair.first, pair.second, std::index_sequence_for<A...>{});
    };
    std::mt19937_64 random(seed);
    const dim3 grid{shape[0], shape[1], shape[2]}, threads{shape[3], shape[4], shape[5]};
    try {
        if (how == 0)
            run_plainly(grid, threads, random, body, &argument);
        else
            run_fibers(grid, threads, random, body, &argument, shared, how == 2);
    } catch (const std::exception &error) {
        std::strncpy(message, error.what(), sizeof message - 1);
        return message;
    }
    return nullptr;
}

}  // namespace host_cuda

inline void __syncthreads() { host_cuda::here().wait(host_cuda::State::at_block_barrier); }
inline void __syncwarp(unsigned mask = ~0u) { host_cuda::here().wait(host_cuda::State::at_warp_barrier, mask); }
template <class T> T __shfl_sync(unsigned mask, T value, int source) {
    return host_cuda::exchange(mask, value, source);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
    return host_cuda::exchange(mask, value, host_cuda::lane() + int(delta));
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int flip) {
    return host_cuda::exchange(mask, value, host_cuda::lane() ^ flip);
}

#include "exchange_host.h"
#include "mma_host.h"

#define HOST_CUDA_EXPORT(kernel)                                                                                  \
    extern "C" const char *launch_##kernel(const unsigned *shape, void **args, uint64_t seed, int how,            \
                                           size_t shared) {                                                       \
        return host_cuda::launch(kernel, shape, args, seed, how, shared);                                         \
    }                                                                                                             \
    extern "C" int arguments_of_##kernel() { return host_cuda::count(kernel); }                                   \
    extern "C" int size_of_argument_of_##kernel(int number) { return host_cuda::size_of_argument(kernel, number); }
