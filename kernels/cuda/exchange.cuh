// How the blocks of a persistent kernel exchange results: PTX instructions that C++ does not offer.
//
// Data and flags that other blocks write go through ld.relaxed and ld.acquire, which read L2: __ldg and const __restrict__
// would read a cache that does not see those writes. The order is that of the PTX memory model: data, barrier of the
// block, fence, flag; and flag with acquire, barrier of the warp, data.
//
// Host code for the tests has its own version of this file (tests/host_cuda/exchange_host.h), and defines HOST_CUDA.
typedef unsigned int word_t;

#ifndef HOST_CUDA
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) float name[]

// A wait for another block that lasts longer than any can (some 30 s) ends in an error in place of a hang.
#define SPIN(tries)                                     \
    do {                                                \
        if ((tries) > (1 << 26)) asm volatile("trap;"); \
    } while (0)

__device__ inline word_t load_acquire(const word_t *from) {
    word_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}

__device__ inline void store_relaxed(word_t *to, word_t value) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

__device__ inline void fence_acq_rel() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Four numbers at once. ld.volatile would do as well, at the cost of system scope.
__device__ inline float4 load_shared_by_blocks(const float *from) {
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from) : "memory");
    return v;
}

__device__ inline void store_shared_by_blocks(float *to, float value) {
    asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(to), "f"(value) : "memory");
}

#ifdef CLUSTER
#define CLUSTER_OF(blocks) __cluster_dims__(blocks, 1, 1)

// Store to the place that `mine` has in the shared memory of block `rank` of the cluster.
__device__ inline void store_to_block(float *mine, unsigned rank, float value) {
    const unsigned local = unsigned(__cvta_generic_to_shared(mine));
    unsigned remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
}

// Not .aligned: the threads of a warp may come here one after the other, from the branches of the cell phase.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
#endif
#endif

#ifndef CLUSTER
#define CLUSTER_OF(blocks)
#endif
