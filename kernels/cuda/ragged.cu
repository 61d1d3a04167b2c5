// From the batch as the caller has it to packed rows, sorted by length, and back.

// Pack a ragged sequence: every step of every sequence to its row, padding left behind.
extern "C" __global__ void pack_rows(
    const real *x,           // (T, B, I), IN
    const index_t *order,    // (B,) which sequence of the batch stands at each row, IN
    const index_t *lengths,  // (B,) in that order, descending, IN
    const index_t *offsets,  // (S + 1,) first row of each step, IN
    real *packed,            // (N, I), OUT
    index_t steps,           // S, the longest length
    index_t reverse, index_t batch, index_t inputs) {
    for (index_t position = FIRST(y); position < steps * batch; position += STRIDE(y)) {
        const index_t step = position / batch, row = position % batch;
        if (step >= lengths[row]) continue;
        const index_t time = time_of(step, lengths[row], reverse);
        const real *from = x + (time * batch + order[row]) * inputs;
        real *to = packed + (offsets[step] + row) * inputs;
        for (index_t k = FIRST(x); k < inputs; k += STRIDE(x)) to[k] = from[k];
    }
}

// The inverse: packed rows to their places, zero in the padding; with `accumulate`, added to what is there.
extern "C" __global__ void unpack_rows(
    const real *packed,      // (N, I), IN
    const index_t *order,    // (B,) which sequence of the batch stands at each row, IN
    const index_t *lengths,  // (B,) in that order, descending, IN
    const index_t *offsets,  // (S + 1,) first row of each step, IN
    real *x,                 // (T, B, I), OUT
    index_t steps,           // T
    index_t reverse, index_t batch, index_t inputs, index_t accumulate) {
    for (index_t position = FIRST(y); position < steps * batch; position += STRIDE(y)) {
        const index_t time = position / batch, row = position % batch;
        const bool padding = time >= lengths[row];
        const index_t step = padding ? 0 : time_of(time, lengths[row], reverse);  // its own inverse
        const real *from = packed + (offsets[step] + row) * inputs;
        real *to = x + (time * batch + order[row]) * inputs;
        for (index_t k = FIRST(x); k < inputs; k += STRIDE(x)) {
            const real value = padding ? real(0) : from[k];
            to[k] = accumulate ? to[k] + value : value;
        }
    }
}

// Sort the rows of a state: row r of the result is row order[r] of the source.
extern "C" __global__ void gather_rows(
    const real *source,    // (B, H), IN
    const index_t *order,  // (B,), IN; null for equal lengths: a copy
    real *sorted,          // (at least `rows`, H), OUT
    index_t rows, index_t hidden) {
    for (index_t row = FIRST(y); row < rows; row += STRIDE(y)) {
        for (index_t k = FIRST(x); k < hidden; k += STRIDE(x)) {
            sorted[row * hidden + k] = source[sequence_of(row, order) * hidden + k];
        }
    }
}

// The inverse: row r of the source to row order[r] of the result.
extern "C" __global__ void scatter_rows(
    const real *sorted,    // (B, H), IN
    const index_t *order,  // (B,), IN
    real *result,          // (B, H), OUT
    index_t rows, index_t hidden) {
    for (index_t row = FIRST(y); row < rows; row += STRIDE(y)) {
        for (index_t k = FIRST(x); k < hidden; k += STRIDE(x)) {
            result[order[row] * hidden + k] = sorted[row * hidden + k];
        }
    }
}
