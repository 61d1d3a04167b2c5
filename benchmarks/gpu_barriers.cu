// Microbenchmarks for persistent kernels: what one time step pays to meet the other blocks and to read their results.
//
// Blocks stand in groups: gridDim.x blocks in each of gridDim.y groups, which share nothing. Every kernel does `rounds`
// rounds; its time / rounds is the cost of one. All blocks must be resident at once. A spin is bounded, so a kernel
// whose blocks are not ends with an error instead of hanging.
typedef unsigned u32;

static const u32 MOST_POLLS = 1u << 22; // some seconds
static const u32 STRIDE = 256;          // words between the flags of two groups; at most so many blocks a group

#ifdef __CUDACC__
static __device__ u32 acquire(const u32 *p) {
    u32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
    return value;
}
static __device__ u32 get(const u32 *p) { // from L2: a cached copy in L1 could be stale
    u32 value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
    return value;
}
static __device__ void put(u32 *p, u32 value) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
static __device__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
static __device__ void add(u32 *p) { asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(p) : "memory"); }
static __device__ void spin() {}
static __device__ void give_up() { asm volatile("trap;"); }
#else // the tests run these kernels on a CPU
static u32 acquire(const u32 *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static u32 get(const u32 *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static void put(u32 *p, u32 value) { __atomic_store_n(p, value, __ATOMIC_RELAXED); }
static void fence() { __atomic_thread_fence(__ATOMIC_ACQ_REL); }
static void add(u32 *p) { __atomic_fetch_add(p, 1u, __ATOMIC_RELAXED); }
static void spin() { host_cuda::spin(); }
static void give_up() { throw std::runtime_error("a block waited in vain"); }
#endif

static __device__ void wait_for(const u32 *p, u32 value) {
    for (u32 polls = 0; acquire(p) < value; ++polls) {
        if (polls == MOST_POLLS) give_up();
        spin();
    }
}

// Arrive at the group's flags in round t, and wait until all of its blocks have. A block barrier has to stand
// before and after it.
static __device__ void meet(u32 *flags, u32 t) {
    if (threadIdx.x == 0) {
        fence();
        put(flags + blockIdx.x, t);
    }
    for (u32 k = threadIdx.x; k < gridDim.x; k += blockDim.x) wait_for(flags + k, t);
}

// One counter a group; one group is the whole grid.
extern "C" __global__ void counter(u32 *words, long long rounds) {
    u32 *arrived = words + blockIdx.y * STRIDE;
    for (u32 t = 1; t <= rounds; ++t) {
        __syncthreads();
        if (threadIdx.x == 0) {
            fence();
            add(arrived);
            wait_for(arrived, t * gridDim.x);
        }
        __syncthreads();
    }
}

// A flag for each block of the group, each polled by a thread of its own.
extern "C" __global__ void flags(u32 *words, long long rounds) {
    for (u32 t = 1; t <= rounds; ++t) {
        __syncthreads();
        meet(words + blockIdx.y * STRIDE, t);
        __syncthreads();
    }
}

// Flags, and the exchange of h: each block publishes its share of `count` words, and then reads all of them. Words that
// are not those of the round are counted in the last flag of the group.
extern "C" __global__ void exchange(u32 *words, long long rounds, long long count) {
    u32 *flags = words + blockIdx.y * STRIDE, *data = words + gridDim.y * STRIDE + blockIdx.y * 2 * count;
    u32 wrong = 0;
    for (u32 t = 1; t <= rounds; ++t) {
        u32 *now = data + (t & 1) * count; // two buffers: one round's readers may still read the other
        for (u32 k = blockIdx.x * blockDim.x + threadIdx.x; k < count; k += gridDim.x * blockDim.x) put(now + k, t);
        __syncthreads();
        meet(flags, t);
        __syncthreads();
        for (u32 k = threadIdx.x; k < count; k += blockDim.x) wrong += get(now + k) != t;
    }
    if (wrong) add(flags + STRIDE - 1);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
static __device__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

extern "C" __global__ __cluster_dims__(CLUSTER, 1, 1) void cluster(u32 *, long long rounds) {
    for (u32 t = 1; t <= rounds; ++t) meet_cluster();
}

// The same exchange through distributed shared memory: each block writes its share into every block of the cluster.
extern "C" __global__ __cluster_dims__(CLUSTER, 1, 1) void cluster_exchange(u32 *words, long long rounds,
                                                                            long long count) {
    __shared__ u32 box[2][2048];
    u32 wrong = 0;
    meet_cluster(); // a block's shared memory can be written once it runs
    for (u32 t = 1; t <= rounds; ++t) {
        for (u32 k = blockIdx.x * blockDim.x + threadIdx.x; k < count; k += CLUSTER * blockDim.x) {
            const u32 here = (u32)__cvta_generic_to_shared(&box[t & 1][k]);
            for (u32 peer = 0; peer < CLUSTER; ++peer) {
                u32 there;
                asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(peer));
                asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(t) : "memory");
            }
        }
        meet_cluster();
        for (u32 k = threadIdx.x; k < count; k += blockDim.x) wrong += box[t & 1][k] != t;
    }
    if (wrong) add(words + blockIdx.y * STRIDE + STRIDE - 1);
}
#endif

// What a launch costs: the arguments of a gate kernel one by one, and the same in one record passed by value.
extern "C" __global__ void empty_of_20(void *, void *, void *, void *, void *, void *, void *, void *, void *,
                                       long long, long long, long long, long long, long long, long long, long long,
                                       long long, long long, long long, long long) {}

struct Record {
    void *arrays[9];
    long long numbers[11];
};
extern "C" __global__ void empty_of_record(Record) {}
