// The gate step of the LSTM, forward and backward: one thread for each row and WIDTH hidden units.
//
// The equations are those of fastlstm/backends/reference.py, in the same symbols; the twins on the CPU are
// gates_forward and gates_backward in kernels/cpu/gates.py. A reset inside a sequence would be one more
// mask by row here, which makes c_prev (and the h that the product before this kernel read) zero.

// One time step: pre-activations and the cell state before to the gates, c and h.
//
// The recurrent product W_hh h_{t-1} has been added to `a` before; the bias is added here. Rows whose
// sequence goes on hand their h to the next step, the others write their final state.
extern "C" __global__ void gates_forward(
    real *a,                 // (N, 4H) at row `first`: pre-activations IN, activated gates i f g o OUT
    const real *bias,        // (4H,), IN
    const index_t *order,    // (B,) which sequence of the batch stands at each row, IN
    const index_t *lengths,  // (B,) in that order, descending, IN
    real *c,                 // (B + N, H): c_{t-1} IN at row `c_from`, c_t OUT at row `c_to`; these may be equal
    real *h_rows,            // (N, H): h_t OUT at row `h_to`, only for the sequences that go on
    real *y,                 // (T, B, D, H), OUT at `direction`
    real *h_n,               // (B, H), OUT for the sequences that end here
    real *c_n,               // (B, H), likewise
    index_t first, index_t c_from, index_t c_to, index_t h_to,
    index_t rows,            // sequences that have this step
    index_t step, index_t reverse, index_t batch, index_t hidden, index_t directions, index_t direction) {
    const index_t unit = FIRST(x) * WIDTH;
    if (unit >= hidden) return;
    for (index_t row = FIRST(y); row < rows; row += STRIDE(y)) {
        real *here = a + (first + row) * 4 * hidden + unit;
        Units i = load(here), f = load(here + hidden), g = load(here + 2 * hidden), o = load(here + 3 * hidden);
        const Units b_i = load(bias + unit), b_f = load(bias + hidden + unit);
        const Units b_g = load(bias + 2 * hidden + unit), b_o = load(bias + 3 * hidden + unit);
        const Units c_prev = load(c + (c_from + row) * hidden + unit);
        Units c_t, h_t;
        for (int k = 0; k < WIDTH; ++k) {
            i.unit[k] = sigmoid(i.unit[k] + b_i.unit[k]);
            f.unit[k] = sigmoid(f.unit[k] + b_f.unit[k]);
            g.unit[k] = tanh(g.unit[k] + b_g.unit[k]);
            o.unit[k] = sigmoid(o.unit[k] + b_o.unit[k]);
            c_t.unit[k] = fma(f.unit[k], c_prev.unit[k], i.unit[k] * g.unit[k]);
            h_t.unit[k] = o.unit[k] * tanh(c_t.unit[k]);
        }
        store(here, i);
        store(here + hidden, f);
        store(here + 2 * hidden, g);
        store(here + 3 * hidden, o);
        store(c + (c_to + row) * hidden + unit, c_t);

        const index_t sequence = order[row], length = lengths[row];
        const index_t time = time_of(step, length, reverse);
        store(y + ((time * batch + sequence) * directions + direction) * hidden + unit, h_t);
        if (step + 1 < length) {
            store(h_rows + (h_to + row) * hidden + unit, h_t);
        } else {
            store(h_n + sequence * hidden + unit, h_t);
            store(c_n + sequence * hidden + unit, c_t);
        }
    }
}

// One time step back: the gradients by h_t and c_t to those by the pre-activations and c_{t-1}.
//
// The tape (gates, c) is only read, so that a second backward pass finds it unchanged.
extern "C" __global__ void gates_backward(
    const real *dy,          // (T, B, D, H) at `direction`, IN; not read unless `with_dy`
    const real *dh,          // (B, H): the gradient by h_t from the step after, IN
    real *dc,                // (B, H): by c_t IN, by c_{t-1} OUT
    const real *gates,       // (N, 4H) at row `first`: i f g o, IN
    const real *c,           // (B + N, H): c_{t-1} at row `c_from`, c_t at row `c_to`, IN
    const index_t *order,    // (B,) which sequence of the batch stands at each row, IN
    const index_t *lengths,  // (B,) in that order, descending, IN
    real *da,                // (N, 4H) at row `first`: by the pre-activations, OUT
    index_t with_dy, index_t first, index_t c_from, index_t c_to,
    index_t rows,            // sequences that have this step
    index_t step, index_t reverse, index_t batch, index_t hidden, index_t directions, index_t direction) {
    const index_t unit = FIRST(x) * WIDTH;
    if (unit >= hidden) return;
    const real one = 1;
    for (index_t row = FIRST(y); row < rows; row += STRIDE(y)) {
        const index_t left = (first + row) * 4 * hidden + unit;
        const Units i = load(gates + left), f = load(gates + left + hidden);
        const Units g = load(gates + left + 2 * hidden), o = load(gates + left + 3 * hidden);
        const Units c_prev = load(c + (c_from + row) * hidden + unit), c_t = load(c + (c_to + row) * hidden + unit);
        Units dh_t = load(dh + row * hidden + unit), dc_t = load(dc + row * hidden + unit);
        if (with_dy) {
            const index_t time = time_of(step, lengths[row], reverse);
            const Units dy_t = load(dy + ((time * batch + order[row]) * directions + direction) * hidden + unit);
            for (int k = 0; k < WIDTH; ++k) dh_t.unit[k] += dy_t.unit[k];
        }
        Units da_i, da_f, da_g, da_o;
        for (int k = 0; k < WIDTH; ++k) {
            const real tanh_c = tanh(c_t.unit[k]);
            const real dc_k = fma(dh_t.unit[k] * o.unit[k], one - tanh_c * tanh_c, dc_t.unit[k]);
            da_i.unit[k] = dc_k * g.unit[k] * (i.unit[k] * (one - i.unit[k]));
            da_f.unit[k] = dc_k * c_prev.unit[k] * (f.unit[k] * (one - f.unit[k]));
            da_g.unit[k] = dc_k * i.unit[k] * (one - g.unit[k] * g.unit[k]);
            da_o.unit[k] = dh_t.unit[k] * tanh_c * (o.unit[k] * (one - o.unit[k]));
            dc_t.unit[k] = dc_k * f.unit[k];
        }
        store(da + left, da_i);
        store(da + left + hidden, da_f);
        store(da + left + 2 * hidden, da_g);
        store(da + left + 3 * hidden, da_o);
        store(dc + row * hidden + unit, dc_t);
    }
}
