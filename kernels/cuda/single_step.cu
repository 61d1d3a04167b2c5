// One time step of one layer in one launch: both products and the cell step, for streaming.
//
// A warp takes one hidden unit of STEP_ROWS sequences. Its lanes read the unit's rows of W_ih and W_hh side by side, each
// element once for all of these sequences. Sums are in a fixed order, which depends on I and H only: a sequence's result
// depends neither on the batch nor on the run. Nothing but this kernel runs, so a CUDA graph can capture it. Parameters
// are the model's own, without rows for gates that the cell lacks or shares (`rows_of_unit` in cell_step.cuh).

#define STEP_ROWS 4  // sequences of a warp: 16 sums a lane

// Add `count` products of the row `vector` of each sequence with the unit's rows of `weight`, a lane's share.
__device__ inline void add_products(
    const real *const (&vectors)[STEP_ROWS], const real *weight, const index_t (&rows)[GATES], index_t count,
    real (&sums)[STEP_ROWS][GATES]) {
    for (index_t k = threadIdx.x; k < count; k += warpSize) {
        real w[GATES] = {};
        for (int gate = 0; gate < GATES; ++gate)
            if (has_row(gate)) w[gate] = weight[rows[gate] * count + k];
        for (int n = 0; n < STEP_ROWS; ++n) {
            const real value = vectors[n][k];
            for (int gate = 0; gate < GATES; ++gate) sums[n][gate] = fma(w[gate], value, sums[n][gate]);
        }
    }
}

// blockDim.x is a warp; threadIdx.y and blockIdx.x number the hidden units, blockIdx.y the groups of sequences.
extern "C" __global__ void single_step(
    const real *x,             // (B, I), IN
    const real *h_prev,        // (B, H), IN; null for zeros
    const real *c_prev,        // (B, H), IN; null for zeros
    const real *weight_ih,     // (R, I), IN; R rows, 4H of a plain cell
    const real *weight_hh,     // (R, H), IN
    const real *bias,          // (R,), IN; null for none
    const real *unit_weights,  // (UNIT_WEIGHTS, H), IN, without a row of a missing f; null if the cell has none
    real *h,                   // (B, H), OUT
    real *c,                   // (B, H), OUT
    real *y,                   // (B, H), OUT: h once more; null for none
    index_t batch, index_t inputs, index_t hidden,
    index_t shared) {          // units that share i, f and o
    const index_t unit = index_t(blockIdx.x) * blockDim.y + threadIdx.y;
    if (unit >= hidden) return;  // a whole warp
    OfGates b = {};
    OfUnitWeights p;
    index_t rows[GATES];
    rows_of_unit(unit, hidden, shared, rows);
    if (bias)
        for (int gate = 0; gate < GATES; ++gate)
            if (has_row(gate)) b[gate] = bias[rows[gate]];
    for (int n = 0; n < UNIT_WEIGHTS; ++n) p[n] = unit_weights[row_of_unit_weight(n) * hidden + unit];
    for (index_t first = index_t(blockIdx.y) * STEP_ROWS; first < batch; first += index_t(gridDim.y) * STEP_ROWS) {
        const real *inputs_of[STEP_ROWS], *states_of[STEP_ROWS];
        real sums[STEP_ROWS][GATES] = {};
        for (int n = 0; n < STEP_ROWS; ++n) {  // beyond the batch: the last sequence again, not stored
            const index_t row = min(first + n, batch - 1);
            inputs_of[n] = x + row * inputs;
            states_of[n] = h_prev + row * hidden;
        }
        add_products(inputs_of, weight_ih, rows, inputs, sums);
        if (h_prev) add_products(states_of, weight_hh, rows, hidden, sums);
        OfGates gates;
        for (int n = 0; n < STEP_ROWS; ++n) {
            for (int gate = 0; gate < GATES; ++gate) {
                real sum = sums[n][gate];
                for (int flip = 16; flip; flip /= 2) sum += __shfl_xor_sync(~0u, sum, flip);
                if (threadIdx.x == n) gates[gate] = sum;
            }
        }
        const index_t row = first + threadIdx.x;  // lane n goes on with sequence n
        if (threadIdx.x >= STEP_ROWS || row >= batch) continue;
        const index_t at = row * hidden + unit;
        real c_t, h_t;
        cell_forward(gates, b, p, c_prev ? c_prev[at] : real(0), c_t, h_t);
        h[at] = h_t;
        c[at] = c_t;
        if (y) y[at] = h_t;
    }
}
