// What every kernel starts from. The loader puts this text in front of the kernels, because CuPy's cache
// of compiled code does not see included files.
//
// Two macros come from the compiler's options:
//   REAL   float or double
//   WIDTH  hidden units that one thread of a gate kernel handles: 1, or as many as fill 16 bytes, so that
//          it loads and stores 128 bits at once. H must then be a multiple of WIDTH and every buffer aligned.
//
// In the shape comments, T is time steps, B sequences, I inputs, H hidden units, D directions. The sequences
// stand sorted by length, the longest first, and their steps are packed: the rows of one step lie together,
// one for each sequence that is long enough, N rows over all steps. IN is read, OUT is written.

typedef REAL real;
typedef long long index_t;  // T * B * 4H passes 2^31

// The hidden units of one thread.
struct alignas(WIDTH * sizeof(real)) Units {
    real unit[WIDTH];
};

__device__ inline Units load(const real *from) { return *reinterpret_cast<const Units *>(from); }

__device__ inline void store(real *to, const Units &values) { *reinterpret_cast<Units *>(to) = values; }

// 1 / (1 + e^-a), from e^-|a|, which cannot overflow.
__device__ inline real sigmoid(real a) {
    const real e = exp(-fabs(a));
    return (a >= real(0) ? real(1) : e) / (real(1) + e);
}

// Where a sequence's step number `step` lies in time.
__device__ inline index_t time_of(index_t step, index_t length, index_t reverse) {
    return reverse ? length - 1 - step : step;
}

// The first element of a thread, and how far apart its elements lie, along one axis of the grid.
#define FIRST(axis) (index_t(blockIdx.axis) * blockDim.axis + threadIdx.axis)
#define STRIDE(axis) (index_t(gridDim.axis) * blockDim.axis)
