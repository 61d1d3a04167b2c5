// Definitions for every kernel. The loader puts this text in front of the kernels, because CuPy's cache
// of compiled code does not see included files.
//
// Macros come from the compiler's options:
//   REAL   float or double
//   WIDTH  hidden units that one thread of a step kernel handles: 1, or as many as fill 16 bytes, so that
//          it loads and stores 128 bits at once. H must then be a multiple of WIDTH and every buffer aligned.
//   RESETS defined: states are reset within sequences, and step kernels read where
//   and one for each variant of the cell (cell_step.cuh)
//
// In the shape comments, T is time steps, B sequences, I inputs, H hidden units, D directions. The sequences
// stand sorted by length, the longest first, and their steps are packed: the rows of one step lie together,
// one for each sequence that is long enough, N rows over all steps. IN is read, OUT is written.
//
// Two arrays describe a ragged batch: `order` says which sequence of the batch stands at each row, `lengths` are the
// lengths in that order, descending. With equal lengths both are null: the rows stand as in the batch.

typedef REAL real;
typedef long long index_t;  // T * B * 4H passes 2^31

// One step of one direction, passed by value: the host's copy is FIELDS in fastlstm/backends/cuda/launch.py.
struct Step {
    index_t first;       // the first of the step's rows, out of N
    index_t c_from;      // row of c_{t-1}
    index_t c_to;        // row of c_t
    index_t h_to;        // row of h_t
    index_t rows;        // sequences that have this step
    index_t step;        // number of the step, in the order of computation
    index_t steps;       // T, each length if `lengths` is null
    index_t batch, hidden, directions;
    index_t direction;   // number of the direction
    index_t reverse;     // 1 if it runs backwards in time
};

// C++ has no empty arrays: the elements of one that is to hold `count`.
#define SLOTS(count) ((count) > 0 ? (count) : 1)

// The hidden units of one thread.
struct alignas(WIDTH * sizeof(real)) Units {
    real unit[WIDTH];
};

__device__ inline Units load(const real *from) { return *reinterpret_cast<const Units *>(from); }

__device__ inline void store(real *to, const Units &values) { *reinterpret_cast<Units *>(to) = values; }

// N rows of `stride` elements, the same units of each; N may be 0.
template <int N> __device__ inline void load_rows(const real *from, index_t stride, Units (&to)[SLOTS(N)]) {
    for (int n = 0; n < N; ++n) to[n] = load(from + n * stride);
}

template <int N> __device__ inline void store_rows(real *to, index_t stride, const Units (&from)[SLOTS(N)]) {
    for (int n = 0; n < N; ++n) store(to + n * stride, from[n]);
}

// Unit number `k` of each row, and back.
template <int N> __device__ inline void take(const Units (&from)[N], int k, real (&to)[N]) {
    for (int n = 0; n < N; ++n) to[n] = from[n].unit[k];
}

template <int N> __device__ inline void put(const real (&from)[N], int k, Units (&to)[N]) {
    for (int n = 0; n < N; ++n) to[n].unit[k] = from[n];
}

// 1 / (1 + e^-a), from e^-|a|, which cannot overflow.
__device__ inline real sigmoid(real a) {
    const real e = exp(-fabs(a));
    return (a >= real(0) ? real(1) : e) / (real(1) + e);
}

__device__ inline index_t sequence_of(index_t row, const index_t *order) { return order ? order[row] : row; }

__device__ inline index_t length_of(index_t row, const index_t *lengths, const Step &s) {
    return lengths ? lengths[row] : s.steps;
}

// Where a sequence's step number `step` lies in time.
__device__ inline index_t time_of(index_t step, index_t length, index_t reverse) {
    return reverse ? length - 1 - step : step;
}

// The row of a sequence's step and direction in (T, B, D, H).
__device__ inline index_t row_of_output(index_t sequence, index_t length, const Step &s) {
    return (time_of(s.step, length, s.reverse) * s.batch + sequence) * s.directions + s.direction;
}

// Whether the state of a sequence is zero before its step number `step`, by `resets` (T, B).
__device__ inline bool is_reset(
    const unsigned char *resets, index_t sequence, index_t step, index_t length, const Step &s) {
#ifdef RESETS
    return resets[time_of(step, length, s.reverse) * s.batch + sequence];
#else
    return false;
#endif
}

// The first element of a thread, and how far apart its elements lie, along one axis of the grid.
#define FIRST(axis) (index_t(blockIdx.axis) * blockDim.axis + threadIdx.axis)
#define STRIDE(axis) (index_t(gridDim.axis) * blockDim.axis)
