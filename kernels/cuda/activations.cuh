// The activations of the family: each value, and its slope as a function of the value s. cell_step.cuh says which it uses.

struct Sigmoid {
    __device__ static real value(real a) { return sigmoid(a); }
    __device__ static real slope(real s) { return s * (real(1) - s); }
};

struct Tanh {
    __device__ static real value(real a) { return tanh(a); }
    __device__ static real slope(real s) { return real(1) - s * s; }
};

struct Relu {
    __device__ static real value(real a) { return a < real(0) ? real(0) : a; }  // NaN stays NaN
    __device__ static real slope(real s) { return s > real(0) ? real(1) : real(0); }
};

struct HardSigmoid {
    __device__ static real value(real a) {
        return a < real(-2.5) ? real(0) : a > real(2.5) ? real(1) : fma(real(0.2), a, real(0.5));
    }
    __device__ static real slope(real s) { return s > real(0) && s < real(1) ? real(0.2) : real(0); }
};

struct Softsign {
    __device__ static real value(real a) { return a / (real(1) + fabs(a)); }
    __device__ static real slope(real s) {
        const real below = real(1) - fabs(s);
        return below * below;
    }
};

struct Identity {
    __device__ static real value(real a) { return a; }
    __device__ static real slope(real) { return real(1); }
};

struct Candidate1997 {  // 4 sigmoid(a) - 2
    __device__ static real value(real a) { return real(2) * tanh(real(0.5) * a); }
    __device__ static real slope(real s) { return (real(2) - s) * (real(2) + s) * real(0.25); }
};

struct Output1997 {  // 2 sigmoid(c) - 1
    __device__ static real value(real c) { return tanh(real(0.5) * c); }
    __device__ static real slope(real s) { return (real(1) - s * s) * real(0.5); }
};
