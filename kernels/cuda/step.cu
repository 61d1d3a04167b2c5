// The drivers of one time step, forward and backward: one thread for each row and WIDTH hidden units.
//
// They load what the cell step (cell_step.cuh) needs, call it, and store what comes out. Where a sequence's state is
// reset before a step, its c_prev is zero, and so is the h that the kernel of the step before hands on; backward, so are
// the gradients by them. The initial h is the host's to reset.

// One time step: pre-activations and the cell state before to the gates, c and h.
//
// The recurrent product W_hh h_{t-1} has been added to `a` before; the bias is added by the cell step. Rows whose
// sequence goes on hand their h to the next step, the others write their final state.
extern "C" __global__ void step_forward(
    real *a,                   // (N, 4H) at row `first`: pre-activations IN, activated gates OUT
    const real *bias,          // (4H,), IN; null for none
    const real *unit_weights,  // (UNIT_WEIGHTS, H), IN; null if the cell has none
    const index_t *order,      // (B,), IN; null for equal lengths (see common.cuh)
    const index_t *lengths,    // (B,), IN; null for equal lengths
    const unsigned char *resets,  // (T, B): 1 where the state is reset before that step, IN; with RESETS
    const real *c_prev,        // c_{t-1} at row `c_from`, IN
    real *c,                   // c_t at row `c_to`, OUT; may be the rows of c_prev
    real *h_rows,              // h_t at row `h_to`, OUT for the sequences that go on
    real *y,                   // (T, B, D, H), OUT at `direction`
    real *h_n,                 // (B, H), OUT for the sequences that end here
    real *c_n,                 // (B, H), likewise
    const Step s) {
    const index_t unit = FIRST(x) * WIDTH;
    if (unit >= s.hidden) return;
    for (index_t row = FIRST(y); row < s.rows; row += STRIDE(y)) {
        real *here = a + (s.first + row) * GATES * s.hidden + unit;
        Units gates[GATES], b[GATES] = {}, p[SLOTS(UNIT_WEIGHTS)], c_t, h_t;
        load_rows<GATES>(here, s.hidden, gates);
        if (bias) load_rows<GATES>(bias + unit, s.hidden, b);
        load_rows<UNIT_WEIGHTS>(unit_weights + unit, s.hidden, p);
        Units c_before = load(c_prev + (s.c_from + row) * s.hidden + unit);
        if (is_reset(resets, sequence_of(row, order), s.step, length_of(row, lengths, s), s)) c_before = {};
        for (int k = 0; k < WIDTH; ++k) {
            OfGates gates_k, b_k;
            OfUnitWeights p_k;
            take(gates, k, gates_k);
            take(b, k, b_k);
            take(p, k, p_k);
            cell_forward(gates_k, b_k, p_k, c_before.unit[k], c_t.unit[k], h_t.unit[k]);
            put(gates_k, k, gates);
        }
        store_rows<GATES>(here, s.hidden, gates);
        store(c + (s.c_to + row) * s.hidden + unit, c_t);

        const index_t sequence = sequence_of(row, order), length = length_of(row, lengths, s);
        store(y + row_of_output(sequence, length, s) * s.hidden + unit, h_t);
        if (s.step + 1 < length) {
            if (is_reset(resets, sequence, s.step + 1, length, s)) h_t = {};
            store(h_rows + (s.h_to + row) * s.hidden + unit, h_t);
        } else {
            store(h_n + sequence * s.hidden + unit, h_t);
            store(c_n + sequence * s.hidden + unit, c_t);
        }
    }
}

// One time step back: the gradients by h_t and c_t to those by the pre-activations and c_{t-1}.
//
// The tape (gates, c) is only read, so that a second backward pass finds it unchanged.
extern "C" __global__ void step_backward(
    const real *dy,            // (T, B, D, H) at `direction`, IN; null for zeros
    const real *dh,            // (B, H): the gradient by h_t from the step after, IN
    const real *dc_next,       // (B, H): by c_t, IN
    real *dc,                  // (B, H): by c_{t-1}, OUT; may be dc_next
    const real *gates,         // (N, 4H) at row `first`: the activated gates, IN
    const real *c,             // (B + N, H): c_{t-1} at row `c_from`, c_t at row `c_to`, IN
    const real *unit_weights,  // (UNIT_WEIGHTS, H), IN; null if the cell has none
    const index_t *order,      // (B,), IN; null for equal lengths (see common.cuh)
    const index_t *lengths,    // (B,), IN; null for equal lengths
    const unsigned char *resets,  // (T, B), IN, as above
    real *dh_steps,            // (T, D, B, H) at `direction`: the gradient by each h_t, OUT; null if not asked for
    real *dc_steps,            // likewise by each c_t
    real *da,                  // (N, 4H) at row `first`: by the pre-activations, OUT
    real *dp,                  // (B, UNIT_WEIGHTS * H): by unit_weights, this step's are added; null if there are none
    const Step s) {
    const index_t unit = FIRST(x) * WIDTH;
    if (unit >= s.hidden) return;
    for (index_t row = FIRST(y); row < s.rows; row += STRIDE(y)) {
        const index_t at = row * s.hidden + unit, at_gates = (s.first + row) * GATES * s.hidden + unit;
        real *sums = dp + row * UNIT_WEIGHTS * s.hidden + unit;
        Units of_gates[GATES], da_t[GATES], p[SLOTS(UNIT_WEIGHTS)], dp_t[SLOTS(UNIT_WEIGHTS)];
        load_rows<GATES>(gates + at_gates, s.hidden, of_gates);
        load_rows<UNIT_WEIGHTS>(unit_weights + unit, s.hidden, p);
        load_rows<UNIT_WEIGHTS>(sums, s.hidden, dp_t);
#ifdef RESETS
        const index_t length_of_row = length_of(row, lengths, s), sequence_of_row = sequence_of(row, order);
        const bool reset = is_reset(resets, sequence_of_row, s.step, length_of_row, s);
        const bool reset_after =
            s.step + 1 < length_of_row && is_reset(resets, sequence_of_row, s.step + 1, length_of_row, s);
#else
        const bool reset = false, reset_after = false;
#endif
        Units c_prev = load(c + (s.c_from + row) * s.hidden + unit);
        if (reset) c_prev = {};
        const Units c_t = load(c + (s.c_to + row) * s.hidden + unit);
        Units dh_t = load(dh + at), dc_t = load(dc_next + at);
        if (reset_after) dh_t = {};
        if (dy) {
            const index_t output = row_of_output(sequence_of(row, order), length_of(row, lengths, s), s);
            const Units dy_t = load(dy + output * s.hidden + unit);
            for (int k = 0; k < WIDTH; ++k) dh_t.unit[k] += dy_t.unit[k];
        }
        if (dh_steps) {
            const index_t time = time_of(s.step, length_of(row, lengths, s), s.reverse);
            const index_t to =
                ((time * s.directions + s.direction) * s.batch + sequence_of(row, order)) * s.hidden + unit;
            store(dh_steps + to, dh_t);
            store(dc_steps + to, dc_t);
        }
        for (int k = 0; k < WIDTH; ++k) {
            OfGates gates_k, da_k;
            OfUnitWeights p_k, dp_k;
            take(of_gates, k, gates_k);
            take(p, k, p_k);
            take(dp_t, k, dp_k);
            cell_backward(gates_k, p_k, c_prev.unit[k], c_t.unit[k], dh_t.unit[k], dc_t.unit[k], da_k, dp_k);
            put(da_k, k, da_t);
            put(dp_k, k, dp_t);
        }
        store_rows<GATES>(da + at_gates, s.hidden, da_t);
        store_rows<UNIT_WEIGHTS>(sums, s.hidden, dp_t);
        if (reset) dc_t = {};
        store(dc + at, dc_t);
    }
}
