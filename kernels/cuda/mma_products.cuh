// The product and the exchange of group.cuh with factors in TF32 or bfloat16, by tensor cores (mma.cuh). All else, the
// cell, its state and the sums over warps, is float32 and that of group.cuh.
//
// A warp multiplies its block's OUT rows of W, as tiles of 16, with its SLICE columns of 8 sequences at once; where a
// block has 8 rows, the sequences are the tiles of 16. W is held in registers as fragments, rounded once. The thread that
// publishes a vector rounds it, so that the blocks that read it need not; a bfloat16 takes half of the memory and of the
// time to fetch.
//
// The inner dimension of a product may run in any order that is the same in both factors. So a lane's share of 16
// columns is made to be four that follow each other, and one load brings them: lane 4 n + t has columns 4 t .. 4 t + 3 of
// sequence n. For TF32, whose tile has 8 columns, two of them are for the first of two tiles, and two for the second.
// Each number is needed by one lane alone: what is fetched goes to registers, without a stage in shared memory.
#ifdef MMA

// The largest divisor of `whole` that is at most `most`.
__device__ constexpr int largest_part(int whole, int most) {
    return most >= whole ? whole : whole % most == 0 ? most : largest_part(whole, most - 1);
}

template <class P> struct Tiles {
    static constexpr int COUNT = (P::OUT + 15) / 16;             // of 16 rows
    static constexpr int HALVES = P::OUT < 16 ? 1 : 2;           // of a tile: eight rows each
    static constexpr int PIECES = P::OUT < 16 ? 2 : 1;           // of eight sequences that are multiplied at once
    static constexpr int SPAN = 8 * PIECES;
    static constexpr int CHUNKS = (P::SLICE + 15) / 16;          // of 16 columns
    static constexpr int STEPS = 16 * sizeof(element_t) / 32;    // tiles of a chunk: 2 for TF32, 1 for bfloat16
#ifdef CLUSTER
    static constexpr int MOST = 1;  // shared memory is near
#else
    // More would not fit into the registers that the weights, a thread's items and their peepholes leave.
    static constexpr int ROOM = STEPS == 1 || (ITEMS == 1 && !UNIT_WEIGHTS) ? 8 : 4;
    static constexpr int MOST = PIECES == 1 ? ROOM : ROOM / (2 * STEPS);
#endif
    static constexpr int AHEAD = largest_part(CHUNKS, COUNT > 4 ? CHUNKS : MOST);  // chunks that are being fetched
    static constexpr int AT_ONCE = COUNT < 4 ? COUNT : 4;        // tiles of rows whose sums are in registers
    static_assert(P::OUT % 8 == 0 && (P::OUT % 16 == 0 || COUNT == 1), "rows are whole tiles, or half of one");
    static_assert(CHUNKS % AHEAD == 0 && COUNT % AT_ONCE == 0, "no rest");
    static_assert(COUNT == AT_ONCE || CHUNKS == AHEAD, "what several turns multiply stays in registers");
};

// A thread's share of its block's weights: by tile, chunk and tile of the chunk, the rows and columns of a fragment.
template <class P> struct Held {
    using T = Tiles<P>;
    word_t part[T::COUNT][T::CHUNKS][T::STEPS][2 * T::HALVES];
};

__device__ inline word_t joined(element_t low, element_t high) { return word_t(high) << 16 | low; }

// Load the weights; weight(row, column) is that of the block's row and of the warp's column, zero where there is none.
template <class P, class Weight> __device__ inline void hold(Held<P> &to, Weight weight) {
    using T = Tiles<P>;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int tile = 0; tile < T::COUNT; ++tile) {
#pragma unroll
        for (int chunk = 0; chunk < T::CHUNKS; ++chunk) {
#pragma unroll
            for (int half = 0; half < T::HALVES; ++half) {
                element_t v[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const int column = chunk * 16 + lane % 4 * 4 + k;
                    const bool there = P::SLICE % 16 == 0 || column < P::SLICE;
                    const int row = tile * 16 + half * 8 + lane / 4;
                    v[k] = rounded(there ? weight(row, column) : real(0));
                }
#pragma unroll
                for (int pair = 0; pair < 2; ++pair) {
#ifdef PRODUCTS_BF16
                    to.part[tile][chunk][0][pair * T::HALVES + half] = joined(v[2 * pair], v[2 * pair + 1]);
#else
                    for (int step = 0; step < 2; ++step) {
                        to.part[tile][chunk][step][pair * T::HALVES + half] = v[2 * step + pair];
                    }
#endif
                }
            }
        }
    }
}

// Four numbers of one sequence; zeros beyond the last sequence and the last column.
template <class P> __device__ inline Piece fetch_piece(const element_t *slice, int row, int chunk, int lane) {
    const int column = chunk * 16 + lane % 4 * 4;
    if ((ROWS % Tiles<P>::SPAN && row >= ROWS) || (P::SLICE % 16 && column >= P::SLICE)) return {};
    const element_t *from = slice + row * P::SLICE + column;
#ifdef CLUSTER
    return *reinterpret_cast<const Piece *>(from);
#else
    Piece v;
    load_shared_by_blocks(v.word, from);
    return v;
#endif
}

template <int PIECES> struct Pieces {
    Piece of[PIECES];
};

template <class P>
__device__ inline void fetch(Pieces<Tiles<P>::PIECES> &to, const element_t *slice, int place, int chunk, int lane) {
#pragma unroll
    for (int n = 0; n < Tiles<P>::PIECES; ++n) to.of[n] = fetch_piece<P>(slice, place + 8 * n + lane / 4, chunk, lane);
}

// Sixteen rows times eight sequences.
template <int STEPS>
__device__ inline void multiply(float (&sums)[4], const word_t (&w)[STEPS][4], const Pieces<1> &v) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) mma(sums, w[step], v.of[0].word[2 * step], v.of[0].word[2 * step + 1]);
}

// Sixteen sequences times eight rows.
template <int STEPS>
__device__ inline void multiply(float (&sums)[4], const word_t (&w)[STEPS][2], const Pieces<2> &v) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const word_t first = v.of[0].word[2 * step], second = v.of[0].word[2 * step + 1];
        const word_t a[4] = {first, v.of[1].word[2 * step], second, v.of[1].word[2 * step + 1]};
        mma(sums, a, w[step][0], w[step][1]);
    }
}

// Where sum number k of a lane belongs: its sequence, counted from `place`, and its row in a tile.
template <class P> __device__ inline int sequence_of_sum(int k, int lane) {
    return P::OUT < 16 ? k / 2 * 8 + lane / 4 : lane % 4 * 2 + k % 2;
}
template <class P> __device__ inline int row_of_sum(int k, int lane) {
    return P::OUT < 16 ? lane % 4 * 2 + k % 2 : k / 2 * 8 + lane / 4;
}

// The product of the group's vectors of step `step` with the weights: each warp writes its share to `partial`
// (WARPS, ROWS, STRIDE).
template <class P>
__device__ inline void product(const Held<P> &w, const Group &group, float *, float *partial, index_t step) {
    using T = Tiles<P>;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float *mine = partial + warp * ROWS * P::STRIDE;
    const element_t *slice =
        reinterpret_cast<const element_t *>(group.vectors) + (step % 2) * ROWS * P::INNER + warp * ROWS * P::SLICE;
#ifndef CLUSTER
    wait_for_slice<P>(group, warp, lane, word_t(step + 1));
#endif
    Pieces<T::PIECES> ahead[T::AHEAD];
#pragma unroll
    for (int n = 0; n < T::AHEAD; ++n) fetch<P>(ahead[n], slice, 0, n, lane);
#pragma unroll 1
    for (int place = 0; place < ROWS; place += T::SPAN) {
#pragma unroll
        for (int first = 0; first < T::COUNT; first += T::AT_ONCE) {
            float sums[T::AT_ONCE][4] = {};
#pragma unroll
            for (int chunk = 0; chunk < T::CHUNKS; ++chunk) {
                Pieces<T::PIECES> &coming = ahead[chunk % T::AHEAD];
                const Pieces<T::PIECES> now = coming;
                if (first + T::AT_ONCE == T::COUNT) {  // the last use of these factors
                    const int next = chunk + T::AHEAD, to = next < T::CHUNKS ? place : place + T::SPAN;
                    if (to < ROWS) fetch<P>(coming, slice, to, next % T::CHUNKS, lane);
                }
#pragma unroll
                for (int n = 0; n < T::AT_ONCE; ++n) multiply(sums[n], w.part[first + n][chunk], now);
            }
#pragma unroll
            for (int n = 0; n < T::AT_ONCE; ++n) {
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const int at = place + sequence_of_sum<P>(k, lane), row = (first + n) * 16 + row_of_sum<P>(k, lane);
                    if (ROWS % T::SPAN == 0 || at < ROWS) mine[at * P::STRIDE + row] = sums[n][k];
                }
            }
        }
    }
}

// Make one number of step `step` known to the group, rounded; `published` follows once for all of a step.
template <class P> __device__ inline void publish(const Group &group, index_t step, int place, int k, float value) {
    element_t *at = reinterpret_cast<element_t *>(group.vectors) + (step % 2) * ROWS * P::INNER + position<P>(place, k);
    const element_t number = rounded(value);
#ifdef CLUSTER
#pragma unroll
    for (int rank = 0; rank < BLOCKS; ++rank) store_to_block(at, rank, number);
#else
    store_shared_by_blocks(at, number);
#endif
}
#endif
