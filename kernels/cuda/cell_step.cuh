// One time step of the cell for one hidden unit, forward and backward: the only CUDA code that has the equations.
//
// They are those of fastlstm/backends/reference, in the same symbols. All values are in registers: the drivers in
// step.cu load and store them. The drivers use the two numbers below, and no gate's name.
//
// A variant of the cell is a macro of the compiler's options (loader.py), so a plain LSTM pays nothing for it:
//   PEEPHOLE              i and f also see c_{t-1}, and o sees c_t
//   NO_FORGET_GATE        f = 1; the pre-activation of f is not read
//   COUPLED               f = 1 - i, likewise
//   GATE_ACTIVATION       of i, f and o, a name of activations.cuh
//   CANDIDATE_ACTIVATION  of g
//   OUTPUT_ACTIVATION     of c, on its way to h
//   CLIP                  bound of the pre-activations
//   CELL_CLIP             bound of c_t
#define GATES 4  // i f g o, in the order of the rows of W_ih and W_hh

#ifdef PEEPHOLE
#define UNIT_WEIGHTS 3  // p_i p_f p_o: weights that each unit has for itself
#else
#define UNIT_WEIGHTS 0
#endif

#ifndef GATE_ACTIVATION
#define GATE_ACTIVATION Sigmoid
#endif
#ifndef CANDIDATE_ACTIVATION
#define CANDIDATE_ACTIVATION Tanh
#endif
#ifndef OUTPUT_ACTIVATION
#define OUTPUT_ACTIVATION Tanh
#endif
typedef GATE_ACTIVATION OfGate;
typedef CANDIDATE_ACTIVATION OfCandidate;
typedef OUTPUT_ACTIVATION OfOutput;

typedef real OfGates[GATES];
typedef real OfUnitWeights[SLOTS(UNIT_WEIGHTS)];

// The rows of a unit in parameters as a model has them: without f where the cell has none, and with one row of i, f and
// o for each block of `shared` units. The gates of a plain cell have H rows each.
#if defined(COUPLED) || defined(NO_FORGET_GATE)
#define FORGET_ROWS 0
#else
#define FORGET_ROWS 1
#endif

__device__ inline constexpr bool has_row(int gate) { return gate != 1 || FORGET_ROWS; }

__device__ inline void rows_of_unit(index_t unit, index_t hidden, index_t shared, index_t (&rows)[GATES]) {
    const index_t blocks = hidden / shared, block = unit / shared, before_g = (1 + FORGET_ROWS) * blocks;
    rows[0] = block, rows[1] = blocks + block, rows[2] = before_g + unit, rows[3] = before_g + hidden + block;
}

__device__ inline constexpr int row_of_unit_weight(int n) { return n == 0 ? 0 : n - 1 + FORGET_ROWS; }

// What a clip does: `bounded` to a pre-activation; `noted` is the activated value as the tape keeps it, `seen` takes it
// from there, and `slope` is the derivative there, zero where the clip bites. The value does not always show whether it
// does: its last bit says so.
#ifdef CLIP
template <int BYTES> struct Word;
template <> struct Word<4> { typedef unsigned int type; };
template <> struct Word<8> { typedef unsigned long long type; };
typedef Word<sizeof(real)>::type word;
union Bits {
    real number;
    word bits;
};

__device__ inline real bounded(real a) { return a > real(CLIP) ? real(CLIP) : a < -real(CLIP) ? -real(CLIP) : a; }

__device__ inline real noted(real s, real a) {
    Bits value;
    value.number = s;
    value.bits = (value.bits & ~word(1)) | word(fabs(a) < real(CLIP) ? 0 : 1);
    return value.number;
}

__device__ inline real seen(real noted_value) {
    Bits value;
    value.number = noted_value;
    value.bits &= ~word(1);
    return value.number;
}

template <typename Activation> __device__ inline real slope(real noted_value) {
    Bits value;
    value.number = noted_value;
    return value.bits & 1 ? real(0) : Activation::slope(noted_value);
}
#else
__device__ inline real bounded(real a) { return a; }
__device__ inline real noted(real s, real) { return s; }
__device__ inline real seen(real noted_value) { return noted_value; }
template <typename Activation> __device__ inline real slope(real s) { return Activation::slope(s); }
#endif

// Forward: `gates` holds the pre-activations a without the bias IN, and the activated gates OUT.
__device__ inline void cell_forward(
    OfGates &gates, const OfGates &bias, const OfUnitWeights &p, real c_prev, real &c, real &h) {
    real a_i = gates[0] + bias[0], a_g = gates[2] + bias[2], a_o = gates[3] + bias[3];
#ifdef PEEPHOLE
    a_i = fma(p[0], c_prev, a_i);
#endif
    const real i = OfGate::value(bounded(a_i)), g = OfCandidate::value(bounded(a_g));
#ifdef COUPLED
    const real f = real(1) - i, f_noted = f;
#elif defined(NO_FORGET_GATE)
    const real f = 1, f_noted = f;
#else
    real a_f = gates[1] + bias[1];
#ifdef PEEPHOLE
    a_f = fma(p[1], c_prev, a_f);
#endif
    const real f = OfGate::value(bounded(a_f)), f_noted = noted(f, a_f);
#endif
    c = fma(f, c_prev, i * g);
#ifdef CELL_CLIP
    c = c > real(CELL_CLIP) ? real(CELL_CLIP) : c < -real(CELL_CLIP) ? -real(CELL_CLIP) : c;
#endif
#ifdef PEEPHOLE
    a_o = fma(p[2], c, a_o);
#endif
    const real o = OfGate::value(bounded(a_o));
    h = o * OfOutput::value(c);
    gates[0] = noted(i, a_i), gates[1] = f_noted, gates[2] = noted(g, a_g), gates[3] = noted(o, a_o);
}

// Backward: `dh` is the gradient by h_t, `dc` that by c_t IN and by c_{t-1} OUT; `da` are those by the pre-activations,
// OUT; `dp`, the sums over the steps of the gradients by `p`, gains this step's.
__device__ inline void cell_backward(
    const OfGates &gates, const OfUnitWeights &p, real c_prev, real c, real dh, real &dc, OfGates &da,
    OfUnitWeights &dp) {
    const real i = seen(gates[0]), f = seen(gates[1]), g = seen(gates[2]), o = seen(gates[3]);
    const real squashed = OfOutput::value(c);
    const real da_o = dh * squashed * slope<OfGate>(gates[3]);
    dc = fma(dh * o, OfOutput::slope(squashed), dc);
#ifdef PEEPHOLE
    dc = fma(da_o, p[2], dc);
#endif
#ifdef CELL_CLIP
    dc = fabs(c) < real(CELL_CLIP) ? dc : real(0);
#endif
#ifdef COUPLED
    const real da_i = dc * (g - c_prev) * slope<OfGate>(gates[0]);
    const real da_f = 0;
#else
    const real da_i = dc * g * slope<OfGate>(gates[0]);
#ifdef NO_FORGET_GATE
    const real da_f = 0;
#else
    const real da_f = dc * c_prev * slope<OfGate>(gates[1]);
#endif
#endif
    const real da_g = dc * i * slope<OfCandidate>(gates[2]);
    dc = dc * f;
#ifdef PEEPHOLE
    dc = fma(da_i, p[0], fma(da_f, p[1], dc));
    dp[0] = fma(da_i, c_prev, dp[0]);
    dp[1] = fma(da_f, c_prev, dp[1]);
    dp[2] = fma(da_o, c, dp[2]);
#endif
    da[0] = da_i, da[1] = da_f, da[2] = da_g, da[3] = da_o;
}
