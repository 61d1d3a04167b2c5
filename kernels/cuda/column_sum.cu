// Sums over rows, for the gradient of the bias.

#define COLUMNS 32  // columns of a block: one warp wide, so that its loads lie together
#define LANES 8     // threads that share a column

// Sum each column over the rows of one slab. blockIdx.x numbers the slabs, blockIdx.y the groups of COLUMNS
// columns; a block is COLUMNS x LANES threads.
//
// The order of summation depends on nothing but the shape, and there are no atomics: the same input gives
// the same bits. The sums of the slabs are summed by another launch.
extern "C" __global__ void column_sum(
    const real *values,  // (rows, columns), IN
    real *sums,          // (slabs, columns), OUT
    index_t rows, index_t columns,
    index_t slab) {  // rows of a slab
    __shared__ real partial[LANES][COLUMNS];
    const index_t column = index_t(blockIdx.y) * COLUMNS + threadIdx.x;
    const index_t start = index_t(blockIdx.x) * slab, end = min(start + slab, rows);

    real sum = 0;
    if (column < columns) {
        for (index_t row = start + threadIdx.y; row < end; row += LANES) sum += values[row * columns + column];
    }
    partial[threadIdx.y][threadIdx.x] = sum;
    for (int half = LANES / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half) partial[threadIdx.y][threadIdx.x] += partial[threadIdx.y + half][threadIdx.x];
    }
    if (threadIdx.y == 0 && column < columns) sums[index_t(blockIdx.x) * columns + column] = partial[0][threadIdx.x];
}
