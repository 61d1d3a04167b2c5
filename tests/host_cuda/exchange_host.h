// The tests' version of kernels/cuda/exchange.cuh: what blocks exchange, by the host's atomics; and vectors of CUDA.
//
// On x86 a plain load is an acquire and a plain store a release, so orders that PTX would not promise go unnoticed here.
#pragma once

struct alignas(16) float4 {
    float x, y, z, w;
};

#define DYNAMIC_SHARED(name) float *const name = host_cuda::dynamic_shared
#define SPIN(tries) host_cuda::spin_again(tries)

namespace host_cuda {
inline void spin_again(int tries) {
    static thread_local std::chrono::steady_clock::time_point begin[1024];  // of each fiber's wait
    auto &mine = begin[here().current];
    if (tries == 0) mine = std::chrono::steady_clock::now();
    spin(mine);
}
}  // namespace host_cuda

inline uint32_t load_acquire(const uint32_t *from) { return __atomic_load_n(from, __ATOMIC_ACQUIRE); }
inline void store_relaxed(uint32_t *to, uint32_t value) { __atomic_store_n(to, value, __ATOMIC_RELAXED); }
inline void fence_acq_rel() { __atomic_thread_fence(__ATOMIC_ACQ_REL); }

inline float load_word(const float *from) {
    float value;
    __atomic_load(from, &value, __ATOMIC_RELAXED);
    return value;
}
inline float4 load_shared_by_blocks(const float *from) {
    if (reinterpret_cast<uintptr_t>(from) % 16) throw std::runtime_error("a vector that is not aligned");
    return {load_word(from), load_word(from + 1), load_word(from + 2), load_word(from + 3)};
}
inline void store_shared_by_blocks(float *to, float value) { __atomic_store(to, &value, __ATOMIC_RELAXED); }

#if defined(CLUSTER) && defined(BLOCKS)
#define CLUSTER_OF(blocks)

inline void store_to_block(float *mine, unsigned rank, float value) {
    using namespace host_cuda;
    float *base = launched->memory[blockIdx.x / BLOCKS * BLOCKS + rank];
    if (!base) throw std::runtime_error("a write to a block that has not begun, or has ended");
    store_shared_by_blocks(base + (mine - dynamic_shared), value);
}
inline void cluster_arrive() {
    using namespace host_cuda;
    launched->memory[blockIdx.x] = dynamic_shared;
    ++here().fibers[here().current].phase;
    ++launched->arrived[blockIdx.x / BLOCKS];
}
inline void cluster_wait() {
    using namespace host_cuda;
    const uint32_t due = here().fibers[here().current].phase * BLOCKS * uint32_t(blockDim.size());
    spin_until([due] { return launched->arrived[blockIdx.x / BLOCKS] >= due; });
}
#endif
