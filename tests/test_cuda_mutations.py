"""Known slips, put into the CUDA kernels on purpose: the check of the other files must notice each of them.

A mutant is the kernels' source with one snippet replaced, compiled for the CPU and driven by the real backend. The
check is that of ``test_backends_agree.py``: outputs and all gradients against the float64 reference.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from cuda_row import installed
from harness import REFERENCE, Arrays, Case, problem
from host_cuda import FakeCupy, compiler
from tolerances import BOUNDS, normalised_error

from fastlstm.functional import lstm_backward, lstm_forward
from fastlstm.kernels.cuda import loader

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")

# Ragged, both directions, with a sequence of length 0; and equal lengths over more rows than one slab of column_sum.
CASES = (Case(5, 4, 3, 5, 1, True, lengths="zeros"), Case(18, 16, 2, 3))

# what slipped: (what stands there, what the slip makes of it)
SLIPS = {
    "gates i and f swapped": (
        "fma(f.unit[k], c_prev.unit[k], i.unit[k] * g.unit[k])",
        "fma(i.unit[k], c_prev.unit[k], f.unit[k] * g.unit[k])",
    ),
    "bias of another gate": ("b_f = load(bias + hidden + unit)", "b_f = load(bias + unit)"),
    "candidate by the sigmoid": ("g.unit[k] = tanh(", "g.unit[k] = sigmoid("),
    "no tanh at the output": ("o.unit[k] * tanh(c_t.unit[k])", "o.unit[k] * c_t.unit[k]"),
    "wrong stride of the gates": ("*here = a + (first + row) * 4 * hidden", "*here = a + (first + row) * 3 * hidden"),
    "reverse runs forwards": ("return reverse ? length - 1 - step : step;", "return step;"),
    "final state a step early": ("if (step + 1 < length) {", "if (step + 2 < length) {"),
    "final state never written": ("if (step + 1 < length) {", "if (true) {"),
    "h handed to this step": ("store(h_rows + (h_to + row)", "store(h_rows + (first + row)"),
    "output of the other direction": ("+ direction) * hidden + unit, h_t);", ") * hidden + unit, h_t);"),
    "dc from the next step dropped": ("one - tanh_c * tanh_c, dc_t.unit[k])", "one - tanh_c * tanh_c, real(0))"),
    "tanh of c not differentiated": ("one - tanh_c * tanh_c, dc_t", "one, dc_t"),
    "tanh applied twice": ("(one - g.unit[k] * g.unit[k])", "(one - tanh(g.unit[k]) * tanh(g.unit[k]))"),
    "i's derivative without 1 - i": ("(i.unit[k] * (one - i.unit[k]))", "i.unit[k]"),
    "c_t in place of c_{t-1}": (
        "const Units c_prev = load(c + (c_from + row) * hidden + unit), c_t",
        "const Units c_prev = load(c + (c_to + row) * hidden + unit), c_t",
    ),
    "dc not times f": ("dc_t.unit[k] = dc_k * f.unit[k];", "dc_t.unit[k] = dc_k;"),
    "dy not added": ("dh_t.unit[k] += dy_t.unit[k];", ";"),
    "tape overwritten": (
        "store(da + left, da_i);",
        "store(da + left, da_i); store(const_cast<real *>(gates) + left, da_i);",
    ),
    "last step not packed": ("if (step >= lengths[row]) continue;", "if (step + 1 >= lengths[row]) continue;"),
    "no zeros in the padding": ("padding ? real(0) : from[k]", "from[k]"),
    "dx overwritten by the reverse direction": ("accumulate ? to[k] + value : value", "value"),
    "states not sorted": ("= source[order[row] * hidden + k]", "= source[row * hidden + k]"),
    "gradients not sorted back": ("result[order[row] * hidden + k] =", "result[row * hidden + k] ="),
    "missing __syncthreads": ("        __syncthreads();\n", ""),
    "uninitialised shared memory": ("    partial[threadIdx.y][threadIdx.x] = sum;\n", ""),
    "sum stops a half early": ("half > 0; half /= 2", "half > 1; half /= 2"),
    "first row of each slab left out": ("row = start + threadIdx.y;", "row = start + 1 + threadIdx.y;"),
}  # fmt: skip


def solve_twice(xp: FakeCupy, case: Case) -> list[Arrays]:
    """Forward once, backward twice on one tape; all results, once with each backward pass."""
    p = problem(case)
    params = {name: xp.array(value) for name, value in p.params.items()}
    y, (h_n, c_n), tape = lstm_forward(params, xp.array(p.x), tuple(map(xp.array, p.state)), p.lengths)
    found = []
    for _ in range(2):
        grads = lstm_backward(params, tape, xp.array(p.dy), tuple(map(xp.array, p.dstate)))
        result = {"y": y, "h_n": h_n, "c_n": c_n, "dx": grads.x, "dh0": grads.state[0], "dc0": grads.state[1]}
        found.append({name: value.get() for name, value in (result | grads.params).items()})
    return found


@functools.cache
def truth(case: Case) -> Arrays:
    p = problem(case)
    with REFERENCE.active():
        y, (h_n, c_n), tape = lstm_forward(p.params, p.x, p.state, p.lengths)
        grads = lstm_backward(p.params, tape, p.dy, p.dstate)
    return {"y": y, "h_n": h_n, "c_n": c_n, "dx": grads.x, "dh0": grads.state[0], "dc0": grads.state[1]} | grads.params


def worst_error(change) -> float:
    """Largest error of the changed kernels over all cases; infinite if a kernel fails."""
    worst = 0.0
    xp = FakeCupy(change=change, fibers=True, options=("-O0",))  # compiling takes most of the time
    with installed(xp):
        for case in CASES:
            try:
                found = solve_twice(xp, case)
            except RuntimeError:  # a barrier that some thread never reached
                return np.inf
            for result in found:
                worst = max(worst, *(normalised_error(result[name], value) for name, value in truth(case).items()))
    return worst


BOUND = BOUNDS["agreement"].float64
NOTICED = 1e3  # a slip must stand out by this factor over the bound: no check may pass or fail by luck


def test_the_unchanged_kernels_pass():
    assert worst_error(lambda code: code) <= BOUND


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_noticed(slip):
    old, new = SLIPS[slip]

    def change(code: str) -> str:
        assert code == loader.source() and code.count(old) == 1, f"{old!r} is there {code.count(old)} times"
        return code.replace(old, new)

    assert worst_error(change) > NOTICED * BOUND
