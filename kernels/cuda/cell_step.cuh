// One time step of the cell for one hidden unit, forward and backward: the only CUDA code that has the equations.
//
// They are those of fastlstm/backends/reference.py, in the same symbols. All values are in registers: the drivers in
// step.cu load and store them. The drivers use the two numbers below, and no gate's name.
//
// A variant of the cell is a macro of the compiler's options (loader.py), so a plain LSTM pays nothing for it:
//   PEEPHOLE  i and f also see c_{t-1}, and o sees c_t
#define GATES 4  // i f g o, in the order of the rows of W_ih and W_hh

#ifdef PEEPHOLE
#define UNIT_WEIGHTS 3  // p_i p_f p_o: weights that each unit has for itself
#else
#define UNIT_WEIGHTS 0
#endif

typedef real OfGates[GATES];
typedef real OfUnitWeights[SLOTS(UNIT_WEIGHTS)];

// Forward: `gates` holds the pre-activations a without the bias IN, and the activated gates OUT.
__device__ inline void cell_forward(
    OfGates &gates, const OfGates &bias, const OfUnitWeights &p, real c_prev, real &c, real &h) {
    real a_i = gates[0] + bias[0], a_f = gates[1] + bias[1], a_g = gates[2] + bias[2], a_o = gates[3] + bias[3];
#ifdef PEEPHOLE
    a_i = fma(p[0], c_prev, a_i);
    a_f = fma(p[1], c_prev, a_f);
#endif
    const real i = sigmoid(a_i), f = sigmoid(a_f), g = tanh(a_g);
    c = fma(f, c_prev, i * g);
#ifdef PEEPHOLE
    a_o = fma(p[2], c, a_o);
#endif
    const real o = sigmoid(a_o);
    h = o * tanh(c);
    gates[0] = i, gates[1] = f, gates[2] = g, gates[3] = o;
}

// Backward: `dh` is the gradient by h_t, `dc` that by c_t IN and by c_{t-1} OUT; `da` are those by the pre-activations,
// OUT; `dp`, the sums over the steps of the gradients by `p`, gains this step's.
__device__ inline void cell_backward(
    const OfGates &gates, const OfUnitWeights &p, real c_prev, real c, real dh, real &dc, OfGates &da,
    OfUnitWeights &dp) {
    const real i = gates[0], f = gates[1], g = gates[2], o = gates[3];
    const real one = 1, tanh_c = tanh(c);
    const real da_o = dh * tanh_c * (o * (one - o));
    dc = fma(dh * o, one - tanh_c * tanh_c, dc);
#ifdef PEEPHOLE
    dc = fma(da_o, p[2], dc);
#endif
    const real da_i = dc * g * (i * (one - i));
    const real da_f = dc * c_prev * (f * (one - f));
    const real da_g = dc * i * (one - g * g);
    dc = dc * f;
#ifdef PEEPHOLE
    dc = fma(da_i, p[0], fma(da_f, p[1], dc));
    dp[0] = fma(da_i, c_prev, dp[0]);
    dp[1] = fma(da_f, c_prev, dp[1]);
    dp[2] = fma(da_o, c, dp[2]);
#endif
    da[0] = da_i, da[1] = da_f, da[2] = da_g, da[3] = da_o;
}
