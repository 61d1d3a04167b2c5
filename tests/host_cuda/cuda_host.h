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
#include <cmath>
#include <cstdint>
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

constexpr size_t STACK = 64 * 1024, BLOCKS_AT_ONCE = 8;
enum class State { runnable, at_block_barrier, at_warp_barrier, done };

struct Fiber {
    ucontext_t context;
    dim3 index;
    State state = State::runnable;
    unsigned mask = 0;      // of the warp barrier it waits at
    unsigned char slot[8];  // what it offers to the others of its warp
    std::unique_ptr<char[]> stack{new char[STACK]};
};

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
            if (fibers[k].state == State::runnable) order.push_back(k);
        std::shuffle(order.begin(), order.end(), random);
        for (size_t k : order) {
            current = k;
            threadIdx = fibers[k].index;
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
    if (std::any_of(fibers.begin(), fibers.end(), is(State::runnable))) return true;  // it spins
    if (std::all_of(fibers.begin(), fibers.end(), is(State::at_block_barrier))) {
        for (Fiber &fiber : fibers) fiber.state = State::runnable;
        return true;
    }
    bool released = false;
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
// What a thread does that waits for another block: let the other threads of its block run, and the other blocks.
inline void spin() {
    std::this_thread::yield();
    here().wait(State::runnable);
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

inline void run_fibers(dim3 grid, dim3 threads, std::mt19937_64 &random, void (*body)(void *), void *argument) {
    const Permutation blocks(grid.size(), random);
    std::vector<std::string> errors(grid.size());
    for (size_t first = 0; first < grid.size(); first += BLOCKS_AT_ONCE) {
        std::vector<std::thread> wave;
        for (size_t k = first; k < std::min(first + BLOCKS_AT_ONCE, grid.size()); ++k) {
            wave.emplace_back([=, &errors, seed = random()] {
                poison_shared_memory();
                gridDim = grid, blockDim = threads, blockIdx = grid.at(blocks(k)), block = nullptr;
                std::mt19937_64 own(seed);
                try {
                    Block(threads.size(), body, argument).run(own);
                } catch (const std::exception &error) {
                    errors[k] = error.what();
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

// Launch as cuLaunchKernel does: `args` points to the arguments. Returns the message of what went wrong, or null.
template <class... A>
const char *launch(void (*kernel)(A...), const unsigned *shape, void **args, uint64_t seed, int fibers) {
    static thread_local char message[256];
    std::pair<void (*)(A...), void **> argument{kernel, args};
    const auto body = [](void *given) {
        auto &pair = *static_cast<std::pair<void (*)(A...), void **> *>(given);
        call(pair.first, pair.second, std::index_sequence_for<A...>{});
    };
    std::mt19937_64 random(seed);
    const dim3 grid{shape[0], shape[1], shape[2]}, threads{shape[3], shape[4], shape[5]};
    try {
        (fibers ? run_fibers : run_plainly)(grid, threads, random, body, &argument);
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

#define HOST_CUDA_EXPORT(kernel)                                                                                  \
    extern "C" const char *launch_##kernel(const unsigned *shape, void **args, uint64_t seed, int fibers) {       \
        return host_cuda::launch(kernel, shape, args, seed, fibers);                                              \
    }                                                                                                             \
    extern "C" int arguments_of_##kernel() { return host_cuda::count(kernel); }                                   \
    extern "C" int size_of_argument_of_##kernel(int number) { return host_cuda::size_of_argument(kernel, number); }
