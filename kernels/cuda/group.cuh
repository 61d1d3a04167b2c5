// Code of both persistent kernels: a group of blocks, the product of its weights, and the exchange between them.
//
// A group of BLOCKS blocks owns all of W_hh, spread over its registers and loaded once. It takes ROWS sequences of the
// batch; several groups run side by side, so that no wait spans the grid. Each of the 8 warps of a block owns an eighth
// of the inner dimension of the product. One step:
//
//   fetch     each warp waits for its eighth of the vector of the step before, and brings it to its part of shared memory
//   multiply  weights in registers times vector in shared memory, summed over the lanes that share a row
//             (one __syncthreads; the next step's sums come after a barrier of the block, in `published`)
//   cell      one thread a sequence and unit sums the 8 warps' shares in fixed order and keeps c (backward: dc) in a
//             register
//   publish   the vector for the next step, before anything else is stored
//
// Forward the vector is h_t (H numbers), and the rows are the gates of a block's UNITS units. Backward it is da_t (4H),
// and the rows are the UNITS units. The buffers of the tape are those of step.cu, so that each pass may take either way.
//
// Macros come from the compiler's options (fastlstm/backends/cuda/plans.py), besides those of the other kernels:
//   SIZE      H rounded up to 64 128 192 256 384 512 768 or 1024; weights beyond H are zero
//   ROWS      sequences of a group: an even number, 2 or a multiple of 4
//   PRODUCTS_TF32 or PRODUCTS_BF16  defined: products round their factors (mma_products.cuh)
//   CLUSTER   defined: the blocks of a group are a thread-block cluster, and exchange the vector by distributed shared
//             memory (from sm_90 on, at most 8 blocks). Otherwise by global memory and a flag for each block; all blocks
//             must then be resident, so the launch is cooperative, unless a group is one block.
//   TRUNCATED  defined: the gradient does not go from one step to the one before through h, so backward has no product
//   BLOCKS SHARED_FORWARD SHARED_BACKWARD  what the host takes for granted
//
// Sums are in a fixed order that depends on SIZE only: a sequence's result depends neither on the batch nor on the run.

#ifdef TRUNCATED
constexpr bool TRUNCATES = true;
#else
constexpr bool TRUNCATES = false;
#endif
constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int HELD = 8;                                                      // rows of W whose elements a thread holds
constexpr int SPLIT = SIZE <= 128 ? 1 : SIZE <= 256 ? 2 : SIZE <= 512 ? 4 : 8;  // lanes that share a row, forward
constexpr int DEPTH = SIZE / WARPS / SPLIT;                                  // columns of W of a thread
constexpr int UNITS = 32 / SPLIT * HELD / GATES;                             // hidden units of a block
constexpr int ITEMS = (ROWS * UNITS + THREADS - 1) / THREADS;                // (sequence, unit) pairs of a thread
static_assert(GATES == 4 && HELD % GATES == 0, "a thread holds the rows of whole units");
static_assert(SPLIT * DEPTH * WARPS == SIZE && DEPTH % 4 == 0, "SIZE is none of the list");
static_assert(BLOCKS * UNITS == SIZE, "the host counts other blocks");
static_assert(THREADS % UNITS == 0, "a thread's items have one unit");

// What depends on the pass: the inner dimension of the product, and the rows of a block.
template <int LANES_> struct Pass {
    static constexpr int LANES = LANES_;  // that share a row
    static constexpr int SLICE = LANES * DEPTH, INNER = SLICE * WARPS;
    static constexpr int OUT = 32 / LANES * HELD;  // rows of a block
    static constexpr int TILE = ROWS == 2 || INNER > 1024 ? 2 : 4;  // sequences fetched at once
    static constexpr int VECTORS = TILE * SLICE / 4;                // of 16 bytes
    static constexpr int LOADS = (VECTORS + 31) / 32;               // of a lane
#ifdef MMA  // see mma_products.cuh
    static constexpr int STRIDE = OUT + 4;  // of a sequence's sums: lanes that store them take different banks
    static constexpr int STAGED = 0;
    static constexpr int ELEMENT = sizeof(element_t);
#else
    static constexpr int STRIDE = OUT;
    static constexpr int STAGED = WARPS * 2 * TILE * SLICE;  // two tiles a warp
    static constexpr int ELEMENT = sizeof(float);
#endif
#ifdef CLUSTER
    static constexpr int STAGE = 2 * ROWS * INNER * ELEMENT / int(sizeof(float));  // floats: the vector of two steps
#else
    static constexpr int STAGE = STAGED;
#endif
    static constexpr int SHARED = (STAGE + WARPS * ROWS * STRIDE) * int(sizeof(float));  // bytes
    static_assert(ROWS % TILE == 0, "ROWS");
};
using Forward = Pass<SPLIT>;
using Backward = Pass<4 * SPLIT>;
static_assert(Forward::SHARED == SHARED_FORWARD && Backward::SHARED == SHARED_BACKWARD, "the host counts other bytes");
static_assert(Forward::INNER == SIZE && Backward::INNER == 4 * SIZE, "inner dimensions");

// What a launch computes, passed by value: the host's copy is FIELDS in fastlstm/backends/cuda/persistent.py.
//
// One direction, or both at once: the groups of the second direction then follow those of the first, and each array of
// a direction, in the shape comments (K, ...), has K = 2 of them.
struct Direction {
    index_t row;        // the first of this launch's rows
    index_t groups;     // of each direction
    index_t rows;       // N, of all steps
    index_t steps;      // T, each length if `lengths` is null
    index_t batch, hidden, directions;
    index_t direction;  // number of the launch's first direction, or of the block's (`direction_of`)
    index_t reverse;    // 1 if that direction runs backwards in time, as a second one does
};

// The blocks that work together, and what they exchange through.
struct Group {
    float *vectors;  // (2, WARPS, ROWS, SLICE): in global memory, or in this block's shared memory
    word_t *flags;   // (BLOCKS,): the number of the last step that a block has published; null in a cluster
    int rank;        // of this block
    index_t row;     // its first sequence
    index_t half;    // 1 if it works on the second direction of the launch
};

#if defined(CLUSTER) || BLOCKS == 1
#define BLOCK blockIdx.x
#else
#define BLOCK blockIdx.y  // CuPy would shrink a cooperative grid that is too large along x, and refuses one along y
#endif

template <class P> __device__ inline Group group_of(float *vectors, word_t *flags, const Direction &d) {
    const index_t number = BLOCK / BLOCKS, half = number / d.groups;
    return {vectors + number * 2 * ROWS * P::INNER, flags + number * BLOCKS, int(BLOCK % BLOCKS),
            d.row + (number - half * d.groups) * ROWS, half};
}

// The block's own direction.
__device__ inline Direction direction_of(const Group &group, Direction d) {
    d.direction += group.half, d.reverse |= group.half;
    return d;
}

// The number of steps of a group: its first sequence is its longest.
__device__ inline index_t steps_of(const Group &group, const index_t *lengths, const Direction &d) {
    return lengths ? lengths[group.row] : d.steps;
}

// The first of a step's rows, out of K N.
__device__ inline index_t first_row(index_t step, const Group &group, const index_t *offsets, const Direction &d) {
    return group.half * d.rows + (offsets ? offsets[step] : time_of(step, d.steps, d.reverse) * d.batch);
}

// What a thread of the cell phase owns: item n is the thread's unit of one sequence. 32 bits each save registers.
struct Item {
    int row;       // of the sorted batch
    int length;    // 0 where there is no such sequence or unit: it then publishes zeros and stores nothing
    int sequence;  // of the batch; -1 where there is none
};

__device__ inline int place_of(int n) { return (threadIdx.x + n * THREADS) / UNITS; }

__device__ inline Item item_of(
    int n, index_t unit, const Group &group, const index_t *order, const index_t *lengths, const Direction &d) {
    const int place = place_of(n);
    const index_t row = group.row + place;
    if (place >= ROWS || row >= d.batch || unit >= d.hidden) return {int(row), 0, -1};
    return {int(row), int(lengths ? lengths[row] : d.steps), int(sequence_of(row, order))};
}

// Rows of what a step of an item leaves: in (T, B, D, H), and in (T, D, B, H).
__device__ inline index_t output_of(const Item &item, index_t step, const Direction &d) {
    return (time_of(step, item.length, d.reverse) * d.batch + item.sequence) * d.directions + d.direction;
}

__device__ inline index_t state_of(const Item &item, index_t step, const Direction &d) {
    return (time_of(step, item.length, d.reverse) * d.directions + d.direction) * d.batch + item.sequence;
}

// Its row in the states of all sequences, (K, B, H).
__device__ inline index_t row_of_state(const Item &item, const Group &group, const Direction &d) {
    return group.half * d.batch + item.sequence;
}

// Rows of the tape of c, (K, B + N, H): the initial states, and c of row `row`, out of K N.
__device__ inline index_t initial_c(const Item &item, const Group &group, const Direction &d) {
    return group.half * (d.batch + d.rows) + item.row;
}

__device__ inline index_t tape_of_c(index_t row, const Group &group, const Direction &d) {
    return (group.half + 1) * d.batch + row;
}

// Whether the item's state is zero before its step number `step`, by `resets` (T, B).
__device__ inline bool reset_before(const unsigned char *resets, const Item &item, index_t step, const Direction &d) {
#ifdef RESETS
    return step < item.length && resets[time_of(step, item.length, d.reverse) * d.batch + item.sequence];
#else
    return false;
#endif
}

// Where element k (of INNER) of the group's sequence `place` stands in a buffer: warp by warp, sequence by sequence.
template <class P> __device__ inline int position(int place, int k) {
    return (k / P::SLICE * ROWS + place) * P::SLICE + k % P::SLICE;
}

// ---- the product ----

#ifndef CLUSTER
// Wait until the blocks that make the warp's slice have published step number `epoch`.
template <class P> __device__ inline void wait_for_slice(const Group &group, int warp, int lane, word_t epoch) {
    // Forward a slice is an eighth of the units; backward warp w has gate w / 2 of one half of the units.
    constexpr int PARTS = P::INNER == SIZE ? WARPS : WARPS / GATES, SPAN = SIZE / PARTS;
    const int first = warp % PARTS * SPAN / UNITS, last = (warp % PARTS * SPAN + SPAN - 1) / UNITS;
    for (int block = first + lane; block <= last; block += 32) {
        for (int tries = 0; int(load_acquire(group.flags + block) - epoch) < 0; ++tries) SPIN(tries);
    }
    __syncwarp();
}

#ifndef MMA
template <class P> __device__ inline void fetch(float4 (&to)[P::LOADS], const float *from, int lane) {
#pragma unroll
    for (int n = 0; n < P::LOADS; ++n) {
        if (P::VECTORS % 32 == 0 || n * 32 + lane < P::VECTORS) to[n] = load_shared_by_blocks(from + (n * 32 + lane) * 4);
    }
}

template <class P> __device__ inline void settle(const float4 (&from)[P::LOADS], float *to, int lane) {
#pragma unroll
    for (int n = 0; n < P::LOADS; ++n) {
        if (P::VECTORS % 32 == 0 || n * 32 + lane < P::VECTORS) reinterpret_cast<float4 *>(to)[n * 32 + lane] = from[n];
    }
}
#endif
#endif

#ifndef MMA
// Sum over the lanes that share the thread's rows. While a lane holds several rows, each exchange halves their number;
// when one is left, plain sums. The lane's first row ends in sums[0], and so on.
template <int LANES> __device__ inline void sum_over_lanes(float (&sums)[HELD], int lane) {
    int held = HELD;
#pragma unroll
    for (int flip = LANES / 2; flip >= 1; flip /= 2) {
        if (held > 1) {
            held /= 2;
            const bool upper = lane & flip;
#pragma unroll
            for (int j = 0; j < HELD / 2; ++j) {
                if (j >= held) continue;
                const float send = upper ? sums[j] : sums[j + held], keep = upper ? sums[j + held] : sums[j];
                sums[j] = keep + __shfl_xor_sync(~0u, send, flip);
            }
        } else {
            sums[0] += __shfl_xor_sync(~0u, sums[0], flip);
        }
    }
}

// Two sequences times the thread's weights; the warp's sums go to `partial` (ROWS, STRIDE).
template <class P>
__device__ inline void multiply(const float (&w)[HELD][DEPTH], const float *vector, float *partial, int lane) {
    constexpr int LANES = P::LANES, COUNT = 2;
    const int share = lane % LANES, rows = lane / LANES * HELD;
    float sums[COUNT][HELD] = {};
#pragma unroll
    for (int i = 0; i < DEPTH / 4; ++i) {
        float4 v[COUNT];
#pragma unroll
        for (int b = 0; b < COUNT; ++b) v[b] = reinterpret_cast<const float4 *>(vector + b * P::SLICE)[i * LANES + share];
#pragma unroll
        for (int j = 0; j < HELD; ++j) {
#pragma unroll
            for (int b = 0; b < COUNT; ++b) {
                sums[b][j] = fma(w[j][4 * i], v[b].x, sums[b][j]);
                sums[b][j] = fma(w[j][4 * i + 1], v[b].y, sums[b][j]);
                sums[b][j] = fma(w[j][4 * i + 2], v[b].z, sums[b][j]);
                sums[b][j] = fma(w[j][4 * i + 3], v[b].w, sums[b][j]);
            }
        }
    }
    constexpr int LEFT = LANES >= HELD ? 1 : HELD / LANES;  // rows of a lane after the exchanges
    const int row = LANES >= HELD ? share / (LANES / HELD) : share * LEFT;
#pragma unroll
    for (int b = 0; b < COUNT; ++b) {
        sum_over_lanes<LANES>(sums[b], lane);
        if (LANES > HELD && share % (LANES / HELD) != 0) continue;
#pragma unroll
        for (int j = 0; j < LEFT; ++j) partial[b * P::STRIDE + rows + row + j] = sums[b][j];
    }
}

// The product of the group's vectors of step `step` with the weights: each warp's share to `partial` (WARPS, ROWS, STRIDE).
template <class P>
__device__ inline void product(
    const float (&w)[HELD][DEPTH], const Group &group, float *stage, float *partial, index_t step) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float *mine = partial + warp * ROWS * P::STRIDE;
    const float *from = group.vectors + (step % 2) * ROWS * P::INNER + warp * ROWS * P::SLICE;
#ifdef CLUSTER
    for (int b = 0; b < ROWS; b += 2) multiply<P>(w, from + b * P::SLICE, mine + b * P::STRIDE, lane);
#else
    float *tiles = stage + warp * 2 * P::TILE * P::SLICE;
    float4 next[P::LOADS];
    wait_for_slice<P>(group, warp, lane, word_t(step + 1));
    fetch<P>(next, from, lane);
    for (int b = 0, half = 0; b < ROWS; b += P::TILE, half ^= 1) {
        float *tile = tiles + half * P::TILE * P::SLICE;
        settle<P>(next, tile, lane);
        __syncwarp();
        if (b + P::TILE < ROWS) fetch<P>(next, from + (b + P::TILE) * P::SLICE, lane);  // under the product
        for (int part = 0; part < P::TILE; part += 2) {
            multiply<P>(w, tile + part * P::SLICE, mine + (b + part) * P::STRIDE, lane);
        }
    }
#endif
}

#endif

// ---- the exchange ----

#ifndef MMA
// Make one number of step `step` known to the group; `published` follows once for all of a step.
template <class P> __device__ inline void publish(const Group &group, index_t step, int place, int k, float value) {
    float *at = group.vectors + (step % 2) * ROWS * P::INNER + position<P>(place, k);
#ifdef CLUSTER
#pragma unroll
    for (int rank = 0; rank < BLOCKS; ++rank) store_to_block(at, rank, value);
#else
    store_shared_by_blocks(at, value);
#endif
}
#endif

__device__ inline void published(const Group &group, index_t step) {
#ifdef CLUSTER
    cluster_arrive();
#else
    __syncthreads();  // all of the block's numbers are there
    if (threadIdx.x == 0) {
        fence_acq_rel();
        store_relaxed(group.flags + group.rank, word_t(step + 1));
    }
#endif
}

// In a cluster: wait until everybody has published. Otherwise each warp waits for its slice, in `product`.
__device__ inline void wait_for_group() {
#ifdef CLUSTER
    cluster_wait();
#endif
}

__device__ inline void begin_group() {
#ifdef CLUSTER
    cluster_arrive();  // a block that has not begun must not be written to
    cluster_wait();
#endif
}
