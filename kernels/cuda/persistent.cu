// One launch for all time steps of one direction or of both, forward and backward, in float32. group.cuh says how, and
// mma_products.cuh for products that round their factors.
//
// The cell's equations are those of cell_step.cuh, with its macros: a variant of the cell is a change there. Where a
// state is reset before a step, c_prev is zero, and the step before hands on zeros in place of h; backward, so are the
// gradients by them.

// ---- forward ----

extern "C" __global__ void __launch_bounds__(THREADS, 1) CLUSTER_OF(BLOCKS) persistent_forward(
    real *a,                   // (K, N, 4H): the inputs' share of the pre-activations IN; with a tape, gates OUT
    const real *weight,        // (4H, H) of the first direction, IN
    const real *weight_2,      // (4H, H) of the second, IN; null if there is none
    const real *bias,          // (4H,), IN; null for none
    const real *bias_2,
    const real *unit_weights,  // (UNIT_WEIGHTS, H), IN; null if the cell has none
    const real *unit_weights_2,
    const index_t *order,      // (B,), IN; null for equal lengths (see common.cuh)
    const index_t *lengths,    // (B,), IN; null for equal lengths
    const index_t *offsets,    // (S + 1,): first row of each step, IN; null for equal lengths
    const unsigned char *resets,  // (T, B): 1 where the state is reset before that step, IN; with RESETS
    const real *h0,            // (K, B, H), IN
    const real *c0,            // (K, B, H), IN
    real *c_tape,              // (K, B + N, H), OUT: initial states, sorted, then c of each row; null without a tape
    real *h_rows,              // (K, N, H), OUT: the h before each row's step; null without a tape
    real *y,                   // (T, B, D, H), OUT at the directions
    real *h_n,                 // (K, B, H), OUT
    real *c_n,                 // (K, B, H), OUT
    float *vectors,            // (K * groups, 2, ROWS, SIZE), scratch; null with CLUSTER
    word_t *flags,             // (K * groups, BLOCKS), zeros IN; null with CLUSTER
    const Direction launch) {
    DYNAMIC_SHARED(shared);
    using P = Forward;
    Group group = group_of<P>(vectors, flags, launch);
    const Direction d = direction_of(group, launch);
    if (group.half) weight = weight_2, bias = bias_2, unit_weights = unit_weights_2;
    float *stage = shared, *sums = shared + P::STAGE;  // sums: (WARPS, ROWS, STRIDE)
#ifdef CLUSTER
    group.vectors = shared;
#endif
    const int own = threadIdx.x % UNITS;
    const index_t unit = group.rank * UNITS + own;

#ifdef MMA
    Held<P> w;
    const int hidden = int(d.hidden), from = threadIdx.x / 32 * P::SLICE, of = group.rank * UNITS;
    const real *part = weight + index_t(of) * hidden + from;
    hold<P>(w, [=](int row, int column) {  // row: the gates of a unit, unit by unit
        const bool there = row / GATES < hidden - of && column < hidden - from;
        return there ? part[(row % GATES * hidden + row / GATES) * hidden + column] : real(0);
    });
#else
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float w[HELD][DEPTH];  // row j is gate j % 4 of the thread's unit j / 4
#pragma unroll
    for (int j = 0; j < HELD; ++j) {
        const index_t of_unit = group.rank * UNITS + lane / SPLIT * (HELD / GATES) + j / GATES;
        const real *row = weight + ((j % GATES) * d.hidden + of_unit) * d.hidden;
#pragma unroll
        for (int k = 0; k < DEPTH; ++k) {
            const int column = warp * P::SLICE + (k / 4 * SPLIT + lane % SPLIT) * 4 + k % 4;
            w[j][k] = of_unit < d.hidden && column < d.hidden ? row[column] : real(0);
        }
    }
#endif
    OfGates b = {};
    OfUnitWeights p = {};
    if (unit < d.hidden) {
        if (bias)
            for (int gate = 0; gate < GATES; ++gate) b[gate] = bias[gate * d.hidden + unit];
        for (int n = 0; n < UNIT_WEIGHTS; ++n) p[n] = unit_weights[n * d.hidden + unit];
    }
    Item items[ITEMS];
    real h[ITEMS], c[ITEMS];
    bool reset[ITEMS];  // before the step that comes
    const int steps = int(steps_of(group, lengths, d));  // 32 bits each save registers, as in Item
    index_t first = steps ? first_row(0, group, offsets, d) : 0;
    begin_group();
#pragma unroll
    for (int n = 0; n < ITEMS; ++n) {
        const Item item = items[n] = item_of(n, unit, group, order, lengths, d);
        h[n] = c[n] = 0;
        reset[n] = reset_before(resets, item, 0, d);
        real handed = 0;
        if (item.sequence >= 0) {
            const index_t at = row_of_state(item, group, d) * d.hidden + unit;
            h[n] = h0[at], c[n] = c0[at];
            handed = reset[n] ? real(0) : h[n];
            if (c_tape) c_tape[initial_c(item, group, d) * d.hidden + unit] = c[n];
            if (h_rows && item.length) h_rows[(first + item.row) * d.hidden + unit] = handed;
        }
        if (place_of(n) < ROWS) publish<P>(group, 0, place_of(n), group.rank * UNITS + own, handed);
    }
    published(group, 0);
    for (int step = 0; step < steps; ++step) {
        OfGates gates[ITEMS];  // asked for before the wait
        bool reset_next[ITEMS];
#pragma unroll
        for (int n = 0; n < ITEMS; ++n) {
            reset_next[n] = reset_before(resets, items[n], step + 1, d);
            const real *from = a + (first + items[n].row) * GATES * d.hidden + unit;
            if (step < items[n].length)
                for (int gate = 0; gate < GATES; ++gate) gates[n][gate] = from[gate * d.hidden];
        }
        const index_t next = step + 1 < steps ? first_row(step + 1, group, offsets, d) : 0;
        wait_for_group();
        product<P>(w, group, stage, sums, step);
        __syncthreads();
#pragma unroll
        for (int n = 0; n < ITEMS; ++n) {
            if (step < items[n].length) {
                const float *share = sums + place_of(n) * P::STRIDE + own * GATES;
                float4 sum = *reinterpret_cast<const float4 *>(share);
#pragma unroll
                for (int k = 1; k < WARPS; ++k) {
                    const float4 more = *reinterpret_cast<const float4 *>(share + k * ROWS * P::STRIDE);
                    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
                }
                gates[n][0] += sum.x, gates[n][1] += sum.y, gates[n][2] += sum.z, gates[n][3] += sum.w;
                if (reset[n]) c[n] = 0;
                cell_forward(gates[n], b, p, c[n], c[n], h[n]);
            }
            reset[n] = reset_next[n];
            const real handed = reset[n] ? real(0) : h[n];
            if (place_of(n) < ROWS) publish<P>(group, step + 1, place_of(n), group.rank * UNITS + own, handed);
        }
        published(group, step + 1);
#pragma unroll
        for (int n = 0; n < ITEMS; ++n) {  // no block waits for this
            const Item &item = items[n];
            if (step >= item.length) continue;
            y[output_of(item, step, d) * d.hidden + unit] = h[n];
            if (!c_tape) continue;
            const index_t row = first + item.row;
            for (int gate = 0; gate < GATES; ++gate) a[(row * GATES + gate) * d.hidden + unit] = gates[n][gate];
            c_tape[tape_of_c(row, group, d) * d.hidden + unit] = c[n];
            if (step + 1 < item.length) h_rows[(next + item.row) * d.hidden + unit] = reset[n] ? real(0) : h[n];
        }
        first = next;
    }
    wait_for_group();  // no block may end while others write to it
#pragma unroll
    for (int n = 0; n < ITEMS; ++n) {
        if (items[n].sequence < 0) continue;
        const index_t at = row_of_state(items[n], group, d) * d.hidden + unit;
        h_n[at] = h[n], c_n[at] = c[n];
    }
}

// ---- backward ----

extern "C" __global__ void __launch_bounds__(THREADS, 1) CLUSTER_OF(BLOCKS) persistent_backward(
    const real *dy,            // (T, B, D, H) at `direction`, IN; null for zeros
    const real *dh_n,          // (K, B, H), IN
    const real *dc_n,          // (K, B, H), IN
    const real *gates,         // (K, N, 4H), IN
    const real *c_tape,        // (K, B + N, H), IN
    const real *weight,        // (4H, H) of the first direction, IN
    const real *weight_2,      // (4H, H) of the second, IN; null if there is none
    const real *unit_weights,  // (UNIT_WEIGHTS, H), IN; null if the cell has none
    const real *unit_weights_2,
    const index_t *order,      // (B,), IN; null for equal lengths (see common.cuh)
    const index_t *lengths,    // (B,), IN; null for equal lengths
    const index_t *offsets,    // (S + 1,): first row of each step, IN; null for equal lengths
    const unsigned char *resets,  // (T, B): 1 where the state is reset before that step, IN; with RESETS
    real *dh_steps,            // (T, D, B, H): the gradient by each h_t, OUT at the directions; null if it is not asked for
    real *dc_steps,            // likewise by each c_t
    real *da,                  // (K, N, 4H): by the pre-activations, OUT
    real *dp,                  // (K, B, UNIT_WEIGHTS * H): by unit_weights, OUT; null if there are none
    real *dh0,                 // (K, B, H), OUT
    real *dc0,                 // (K, B, H), OUT
    float *vectors,            // (K * groups, 2, ROWS, 4 SIZE), scratch; null with CLUSTER
    word_t *flags,             // (K * groups, BLOCKS), zeros IN; null with CLUSTER
    const Direction launch) {
    DYNAMIC_SHARED(shared);
    using P = Backward;
    Group group = group_of<P>(vectors, flags, launch);
    const Direction d = direction_of(group, launch);
    if (group.half) weight = weight_2, unit_weights = unit_weights_2;
    float *stage = shared, *sums = shared + P::STAGE;  // sums: (WARPS, ROWS, STRIDE)
#ifdef CLUSTER
    group.vectors = shared;
#endif
    const int own = threadIdx.x % UNITS;
    const index_t unit = group.rank * UNITS + own;

#ifdef MMA
    Held<P> w;
    static_assert(SIZE % P::SLICE == 0, "a warp's columns are of one gate");
    const int hidden = int(d.hidden), to = group.rank * UNITS;
    const int from = threadIdx.x / 32 * P::SLICE % SIZE, gate = threadIdx.x / 32 * P::SLICE / SIZE;
    const real *part = weight + index_t(gate * hidden + from) * hidden + to;
    hold<P>(w, [=](int row, int column) {  // of W_hh transposed: the columns are gates' rows
        const bool there = column < hidden - from && row < hidden - to;
        return load_if(part + (column * hidden + row), there);
    });
#else
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float w[HELD][DEPTH];  // of W_hh transposed: row j is one of the thread's 8 units, the columns are gates' rows
#pragma unroll
    for (int k = 0; k < DEPTH; ++k) {
        const int column = warp * P::SLICE + (k / 4 * P::LANES + lane % P::LANES) * 4 + k % 4;
        const index_t gate = column / SIZE, from = column % SIZE;
        const real *row = weight + (gate * d.hidden + from) * d.hidden;
#pragma unroll
        for (int j = 0; j < HELD; ++j) {
            const index_t to = group.rank * UNITS + lane / P::LANES * HELD + j;
            w[j][k] = from < d.hidden && to < d.hidden ? row[to] : real(0);
        }
    }
#endif
    OfUnitWeights p = {};
    if (unit < d.hidden)
        for (int n = 0; n < UNIT_WEIGHTS; ++n) p[n] = unit_weights[n * d.hidden + unit];
    Item items[ITEMS];
    real dh[ITEMS], dc[ITEMS], c[ITEMS];
    unsigned reset = 0;  // bit n: item n, before the step after
    OfUnitWeights sums_of_dp[ITEMS] = {};
    begin_group();
#pragma unroll
    for (int n = 0; n < ITEMS; ++n) {
        const Item item = items[n] = item_of(n, unit, group, order, lengths, d);
        dh[n] = dc[n] = c[n] = 0;
        if (item.sequence < 0) continue;
        const index_t at = row_of_state(item, group, d) * d.hidden + unit;
        dh[n] = dh_n[at], dc[n] = dc_n[at];
    }
    const int steps = int(steps_of(group, lengths, d));
    index_t first = steps ? first_row(steps - 1, group, offsets, d) : 0;
    // `turn` counts up, the step down; turn number t publishes da of step steps - 1 - t. The last turn only receives.
    for (int turn = 0; turn <= steps; ++turn) {
        const int step = steps - 1 - turn;
        const index_t before = step > 0 ? first_row(step - 1, group, offsets, d) : 0;
        OfGates of_gates[ITEMS];  // asked for before the wait
        real c_prev[ITEMS], dy_t[ITEMS];
        unsigned reset_now = 0;
#pragma unroll
        for (int n = 0; n < ITEMS; ++n) {
            const Item &item = items[n];
            if (step < 0 || step >= item.length) continue;
            if (reset_before(resets, item, step, d)) reset_now |= 1u << n;
            const index_t row = first + item.row;
            for (int gate = 0; gate < GATES; ++gate) of_gates[n][gate] = gates[(row * GATES + gate) * d.hidden + unit];
            if (step + 1 == item.length) c[n] = c_tape[tape_of_c(row, group, d) * d.hidden + unit];
            const index_t row_before = step ? tape_of_c(before + item.row, group, d) : initial_c(item, group, d);
            c_prev[n] = c_tape[row_before * d.hidden + unit];
            dy_t[n] = dy ? dy[output_of(item, step, d) * d.hidden + unit] : real(0);
        }
        if (turn && !TRUNCATES) {
            wait_for_group();
            product<P>(w, group, stage, sums, turn - 1);
        }
        if (!TRUNCATES) __syncthreads();
        OfGates da_t[ITEMS];
        real dc_t[ITEMS];
#pragma unroll
        for (int n = 0; n < ITEMS; ++n) {
            const Item &item = items[n];
            for (int gate = 0; gate < GATES; ++gate) da_t[n][gate] = 0;
            if (turn && step + 1 < item.length) {  // the step after was this sequence's
                const float *share = sums + place_of(n) * P::STRIDE + own;
                dh[n] = TRUNCATES ? real(0) : share[0];
#pragma unroll
                for (int k = 1; k < (TRUNCATES ? 1 : WARPS); ++k) dh[n] += share[k * ROWS * P::STRIDE];
                if (reset >> n & 1) dh[n] = 0;
            }
            if (step < 0) continue;
            if (step < item.length) {
                dh[n] += dy_t[n];
                dc_t[n] = dc[n];
                const bool forgotten = reset_now >> n & 1;
                const real c_seen = forgotten ? real(0) : c_prev[n];
                cell_backward(of_gates[n], p, c_seen, c[n], dh[n], dc[n], da_t[n], sums_of_dp[n]);
                if (forgotten) dc[n] = 0;
                c[n] = c_prev[n];
            }
            if (place_of(n) >= ROWS || TRUNCATES) continue;
            for (int gate = 0; gate < GATES; ++gate) {
                publish<P>(group, turn, place_of(n), gate * SIZE + group.rank * UNITS + own, da_t[n][gate]);
            }
        }
        if (step < 0) break;
        reset = reset_now;
        if (!TRUNCATES) published(group, turn);
#pragma unroll
        for (int n = 0; n < ITEMS; ++n) {  // no block waits for this
            const Item &item = items[n];
            if (step >= item.length) continue;
            real *to = da + (first + item.row) * GATES * d.hidden + unit;
            for (int gate = 0; gate < GATES; ++gate) to[gate * d.hidden] = da_t[n][gate];
            if (!dh_steps) continue;
            const index_t at = state_of(item, step, d) * d.hidden + unit;
            dh_steps[at] = dh[n], dc_steps[at] = dc_t[n];
        }
        first = before;
    }
#pragma unroll
    for (int n = 0; n < ITEMS; ++n) {
        if (items[n].sequence < 0) continue;
        const index_t at = row_of_state(items[n], group, d) * d.hidden + unit;
        dh0[at] = dh[n], dc0[at] = dc[n];
        for (int k = 0; k < UNIT_WEIGHTS; ++k) {
            const index_t row = (group.half * d.batch + items[n].row) * UNIT_WEIGHTS + k;
            dp[row * d.hidden + unit] = sums_of_dp[n][k];
        }
    }
}
