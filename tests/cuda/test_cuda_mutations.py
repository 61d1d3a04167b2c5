"""Known slips, put into the CUDA kernels on purpose: the check of the other files must notice each of them.

A mutant is the kernels' source with one snippet replaced, compiled for the CPU and driven by the real backend. The
check is that of ``test_backends_agree.py``: outputs and all gradients against the float64 reference.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from cuda_row import installed
from harness import REFERENCE, Arrays, Case, model_of, problem
from host_cuda import FakeCupy, compiler
from tolerances import BOUNDS, normalised_error

from fastlstm import LSTM
from fastlstm.backends.cuda import launch
from fastlstm.functional import lstm_backward, lstm_forward
from fastlstm.kernels.cuda import loader

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")

# Ragged, both directions, with a sequence of length 0; and equal lengths over more rows than one slab of column_sum.
CASES = (Case(5, 4, 3, 5, 1, True, lengths="zeros"), Case(18, 16, 2, 3))
PEEPHOLE_CASES = tuple(dataclasses.replace(case, peephole=True) for case in CASES)

# what slipped: (what stands there, what the slip makes of it)
SLIPS = {
    "gates i and f swapped": ("c = fma(f, c_prev, i * g);", "c = fma(i, c_prev, f * g);"),
    "bias of another gate": ("gates[1] + bias[1]", "gates[1] + bias[0]"),
    "bias not read": ("if (bias) load_rows", "if (false) load_rows"),
    "candidate by the sigmoid": ("g = OfCandidate::value(", "g = OfGate::value("),
    "no tanh at the output": ("h = o * OfOutput::value(c);", "h = o * c;"),
    "gates kept in another order": ("gates[1] = f_noted, gates[2] = noted(g, a_g)", "gates[1] = g, gates[2] = f"),
    "wrong stride of the gates": ("*here = a + (s.first + row) * GATES", "*here = a + (s.first + row) * 3"),
    "rows of gates too close": ("to[n] = load(from + n * stride)", "to[n] = load(from + n)"),
    "reverse runs forwards": ("return reverse ? length - 1 - step : step;", "return step;"),
    "equal lengths taken for shorter": ("lengths[row] : s.steps;", "lengths[row] : s.steps - 1;"),
    "lengths not sorted": ("return lengths ? lengths[row]", "return lengths ? lengths[s.rows - 1 - row]"),
    "outputs of the row in place of the sequence": ("return order ? order[row] : row;", "return row;"),
    "final state a step early": ("if (s.step + 1 < length) {", "if (s.step + 2 < length) {"),
    "final state never written": ("if (s.step + 1 < length) {", "if (true) {"),
    "h handed to this step": ("store(h_rows + (s.h_to + row)", "store(h_rows + (s.first + row)"),
    "c stored where it came from": ("store(c + (s.c_to + row)", "store(c + (s.c_from + row)"),
    "output of the other direction": ("* s.directions + s.direction;", "* s.directions;"),
    "dc from the next step dropped": ("OfOutput::slope(squashed), dc);", "OfOutput::slope(squashed), real(0));"),
    "tanh of c not differentiated": ("OfOutput::slope(squashed), dc)", "real(1), dc)"),
    "tanh applied twice": ("slope<OfCandidate>(gates[2])", "slope<OfCandidate>(tanh(gates[2]))"),
    "i's derivative without 1 - i": ("real da_i = dc * g * slope<OfGate>(gates[0])", "real da_i = dc * g * i"),
    "c_t in place of c_{t-1}": ("c_prev = load(c + (s.c_from + row)", "c_prev = load(c + (s.c_to + row)"),
    "dc not times f": ("dc = dc * f;", ""),
    "da of two gates swapped": ("da[1] = da_f, da[2] = da_g", "da[1] = da_g, da[2] = da_f"),
    "dy not added": ("dh_t.unit[k] += dy_t.unit[k];", ";"),
    "tape overwritten": (
        "store_rows<GATES>(da + at_gates, s.hidden, da_t);",
        "store_rows<GATES>(da + at_gates, s.hidden, da_t);"
        " store_rows<GATES>(const_cast<real *>(gates) + at_gates, s.hidden, da_t);",
    ),
    "last step not packed": ("if (step >= lengths[row]) continue;", "if (step + 1 >= lengths[row]) continue;"),
    "no zeros in the padding": ("padding ? real(0) : from[k]", "from[k]"),
    "dx overwritten by the reverse direction": ("accumulate ? to[k] + value : value", "value"),
    "states not sorted": ("source[sequence_of(row, order) * hidden + k]", "source[row * hidden + k]"),
    "gradients not sorted back": ("result[order[row] * hidden + k] =", "result[row * hidden + k] ="),
    "missing __syncthreads": ("        __syncthreads();\n", ""),
    "uninitialised shared memory": ("    partial[threadIdx.y][threadIdx.x] = sum;\n", ""),
    "sum stops a half early": ("half > 0; half /= 2", "half > 1; half /= 2"),
    "first row of each slab left out": ("row = start + threadIdx.y;", "row = start + 1 + threadIdx.y;"),
}  # fmt: skip

PEEPHOLE_SLIPS = {
    "no peephole to i": ("    a_i = fma(p[0], c_prev, a_i);\n", ""),
    "no peephole to f": ("    a_f = fma(p[1], c_prev, a_f);\n", ""),
    "no peephole to o": ("    a_o = fma(p[2], c, a_o);\n", ""),
    "f by the weight of i": ("fma(p[1], c_prev, a_f)", "fma(p[0], c_prev, a_f)"),
    "i by the weight of o": ("fma(p[0], c_prev, a_i)", "fma(p[2], c_prev, a_i)"),
    "o sees the cell state before": ("fma(p[2], c, a_o)", "fma(p[2], c_prev, a_o)"),
    "dc without the share of o": ("    dc = fma(da_o, p[2], dc);\n", ""),
    "dc with the weight of f": ("dc = fma(da_o, p[2], dc);", "dc = fma(da_o, p[1], dc);"),
    "dc before without the share of i": ("fma(da_i, p[0], fma(da_f, p[1], dc))", "fma(da_f, p[1], dc)"),
    "dc before without the share of f": ("fma(da_i, p[0], fma(da_f, p[1], dc))", "fma(da_i, p[0], dc)"),
    "dc before with swapped weights": ("fma(da_i, p[0], fma(da_f, p[1], dc))", "fma(da_i, p[1], fma(da_f, p[0], dc))"),
    "shares of i and f before da_g": ("dc = fma(da_i, p[0], fma(da_f, p[1], dc));", "dc = fma(da_i, p[0] * f, dc);"),
    "dp of i with c_t": ("dp[0] = fma(da_i, c_prev, dp[0])", "dp[0] = fma(da_i, c, dp[0])"),
    "dp of f with c_t": ("dp[1] = fma(da_f, c_prev, dp[1])", "dp[1] = fma(da_f, c, dp[1])"),
    "dp of o with c_{t-1}": ("dp[2] = fma(da_o, c, dp[2])", "dp[2] = fma(da_o, c_prev, dp[2])"),
    "dp of f from da_g": ("dp[1] = fma(da_f, c_prev, dp[1])", "dp[1] = fma(da_g, c_prev, dp[1])"),
    "dp of the last step alone": ("dp[0] = fma(da_i, c_prev, dp[0])", "dp[0] = da_i * c_prev"),
    "dp left out": ("    dp[2] = fma(da_o, c, dp[2]);\n", ""),
    "rows of dp overlap": ("*sums = dp + row * UNIT_WEIGHTS * s.hidden", "*sums = dp + row * s.hidden"),
    "dp not stored": ("        store_rows<UNIT_WEIGHTS>(sums, s.hidden, dp_t);\n", ""),
    "dp not read": ("load_rows<UNIT_WEIGHTS>(sums, s.hidden, dp_t)", "for (auto &d : dp_t) d = {}"),
}  # fmt: skip

RESET_CASES = (Case(5, 4, 3, 5, 1, True, lengths="zeros", resets=True),)
RESET_SLIPS = {
    "c before a reset kept": ("length_of(row, lengths, s), s)) c_before = {};", "length_of(row, lengths, s), s)) {}"),
    "h before a reset handed on": ("if (is_reset(resets, sequence, s.step + 1, length, s)) h_t = {};", ""),
    "final h reset": ("if (s.step + 1 < length) {\n            if (is_reset", "{\n            if (is_reset"),
    "c before a reset, backward": ("if (reset) c_prev = {};", ""),
    "dh through a reset": ("if (reset_after) dh_t = {};", ""),
    "dh of this step's reset": (
        "is_reset(resets, sequence_of_row, s.step + 1,", "is_reset(resets, sequence_of_row, s.step,"
    ),
    "dc through a reset": ("if (reset) dc_t = {};", ""),
    "resets of another sequence": ("s.reverse) * s.batch + sequence]", "s.reverse) * s.batch]"),
    "resets of the other direction": (
        "return resets[time_of(step, length, s.reverse)", "return resets[time_of(step, length, 0)"
    ),
}  # fmt: skip


def _case(**fields):
    return (Case(5, 4, 3, 6, 1, True, lengths="zeros", fields=tuple(fields.items())),)


CLIP, CELL_CLIP, COUPLED = _case(clip=0.4), _case(cell_clip=0.3), _case(coupled=True)
PAPER = _case(forget_gate=False, block_size=2, truncated=True, activations=("sigmoid", "1997", "1997"))
RELU, HARD, SOFT, IDENTITY = (
    _case(activations=("sigmoid", "relu", "relu")), _case(activations=("hard_sigmoid", "tanh", "tanh")),
    _case(activations=("softsign", "softsign", "tanh")), _case(activations=("sigmoid", "identity", "identity")),
)  # fmt: skip
# As SLIPS, and the cases that show it.
FAMILY_SLIPS = {
    "clipped above alone": ("a < -real(CLIP) ? -real(CLIP) : a;", "a;", CLIP),
    "clipped below alone": ("return a > real(CLIP) ? real(CLIP) : a <", "return a <", CLIP),
    "clip not noted": ("word(fabs(a) < real(CLIP) ? 0 : 1)", "word(0)", CLIP),
    "noted the other way round": ("word(fabs(a) < real(CLIP) ? 0 : 1)", "word(fabs(a) < real(CLIP) ? 1 : 0)", CLIP),
    "noted for large numbers alone": ("word(fabs(a) < real(CLIP)", "word(a < real(CLIP)", CLIP),
    "last bit left as it was": ("(value.bits & ~word(1)) | word", "value.bits | word", CLIP),
    "gradient through a clip": ("value.bits & 1 ? real(0) : ", "", CLIP),
    "f not noted": ("f_noted = noted(f, a_f)", "f_noted = f", CLIP),
    "o noted by i": ("gates[3] = noted(o, a_o)", "gates[3] = noted(o, a_i)", CLIP),
    "i not clipped": ("i = OfGate::value(bounded(a_i))", "i = OfGate::value(a_i)", CLIP),
    "f not clipped": ("f = OfGate::value(bounded(a_f))", "f = OfGate::value(a_f)", CLIP),
    "g not clipped": ("OfCandidate::value(bounded(a_g))", "OfCandidate::value(a_g)", CLIP),
    "o not clipped": ("o = OfGate::value(bounded(a_o))", "o = OfGate::value(a_o)", CLIP),
    "c clipped above alone": ("c < -real(CELL_CLIP) ? -real(CELL_CLIP) : c;", "c;", CELL_CLIP),
    "c clipped below alone": ("c = c > real(CELL_CLIP) ? real(CELL_CLIP) : c <", "c = c <", CELL_CLIP),
    "gradient through the clip of c": ("    dc = fabs(c) < real(CELL_CLIP) ? dc : real(0);\n", "", CELL_CLIP),
    "gradient at the bound of c": ("fabs(c) < real(CELL_CLIP)", "fabs(c) <= real(CELL_CLIP)", CELL_CLIP),
    "gradient by c below alone": ("dc = fabs(c) < real(CELL_CLIP)", "dc = c < real(CELL_CLIP)", CELL_CLIP),
    "f = i": ("f = real(1) - i, f_noted", "f = i, f_noted", COUPLED),
    "f not kept": ("f = real(1) - i, f_noted = f;", "f = real(1) - i, f_noted = 1;", COUPLED),
    "i's gradient without f's": ("dc * (g - c_prev) *", "dc * g *", COUPLED),
    "i's gradient with f's added": ("dc * (g - c_prev) *", "dc * (g + c_prev) *", COUPLED),
    "f = 0": ("const real f = 1, f_noted", "const real f = 0, f_noted", PAPER),
    "candidate of 1997 halved": ("real(2) * tanh(real(0.5) * a)", "tanh(real(0.5) * a)", PAPER),
    "candidate of 1997 by tanh": ("real(2) * tanh(real(0.5) * a)", "real(2) * tanh(a)", PAPER),
    "its slope": ("(real(2) - s) * (real(2) + s) * real(0.25)", "(real(1) - s) * (real(1) + s)", PAPER),
    "output of 1997 by tanh": ("tanh(real(0.5) * c)", "tanh(c)", PAPER),
    "its slope without a half": ("(real(1) - s * s) * real(0.5)", "(real(1) - s * s)", PAPER),
    "relu passes all": ("return a < real(0) ? real(0) : a;", "return a;", RELU),
    "slope of relu": ("return s > real(0) ? real(1) : real(0);", "return real(1);", RELU),
    "hard sigmoid's slope": ("fma(real(0.2), a, real(0.5))", "fma(real(0.25), a, real(0.5))", HARD),
    "its derivative": ("? real(0.2) : real(0);", "? real(0.25) : real(0);", HARD),
    "softsign without the size": ("a / (real(1) + fabs(a))", "a / (real(1) + a * a)", SOFT),
    "slope of softsign": ("real below = real(1) - fabs(s);", "real below = real(1) - s;", SOFT),
    "slope of softsign not squared": ("return below * below;", "return below;", SOFT),
    "slope of identity": ("slope(real) { return real(1); }", "slope(real) { return real(0); }", IDENTITY),
}  # fmt: skip

STEP_SLIPS = {
    "state not read": ("if (h_prev) add_products", "if (false) add_products"),
    "weights of the next unit": ("rows_of_unit(unit, hidden", "rows_of_unit((unit + 1) % hidden, hidden"),
    "gates too close": ("weight[rows[gate] * count + k]", "weight[(rows[0] + gate) * count + k]"),
    "last lane's share left out": ("k = threadIdx.x; k < count", "k = threadIdx.x; k + 1 < count"),
    "half of the sum": ("int flip = 16;", "int flip = 8;"),
    "every lane the last sequence's sums": ("if (threadIdx.x == n) gates", "gates"),
    "bias of the gate before": ("bias[rows[gate]]", "bias[rows[(gate + 3) % GATES]]"),
    "no cell state": ("c_prev ? c_prev[at] : real(0)", "real(0)"),
    "sequences of one warp alone": ("first += index_t(gridDim.y) * STEP_ROWS", "first += batch"),
    "output left out": ("if (y) y[at] = h_t;", ""),
    "rows of the first group again": ("row = min(first + n, batch - 1);", "row = min(index_t(n), batch - 1);"),
}  # fmt: skip
_SHARED, _MISSING = {"block_size": 5, "forget_gate": False}, {"coupled": True, "peephole": True}
# As SLIPS, and the fields of the cell that shows it.
STEP_FAMILY_SLIPS = {
    "rows of i for g": ("rows[2] = before_g + unit", "rows[2] = unit", _MISSING),
    "a row of i for each unit": ("rows[0] = block", "rows[0] = unit", _SHARED),
    "one row of o": ("rows[3] = before_g + hidden + block", "rows[3] = before_g + hidden", _SHARED),
    "one row of g for a block": ("rows[2] = before_g + unit", "rows[2] = before_g + block * shared", _SHARED),
    "nothing before g": ("before_g = (1 + FORGET_ROWS) * blocks", "before_g = 0", _SHARED),
    "one peephole": ("n == 0 ? 0 : n - 1 + FORGET_ROWS", "0", _MISSING),
    "f without rows read from i": ("gate != 1 || FORGET_ROWS", "gate != 1", {}),
}  # fmt: skip


def solve_twice(xp: FakeCupy, case: Case) -> list[Arrays]:
    """Forward once, backward twice on one tape; all results, once with each backward pass."""
    p = problem(case)
    params = {name: xp.array(value) for name, value in p.params.items()}
    resets = None if p.resets is None else xp.array(p.resets)
    state = tuple(map(xp.array, p.state))
    y, (h_n, c_n), tape = lstm_forward(params, xp.array(p.x), state, p.lengths, **model_of(p), resets=resets)
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
        y, (h_n, c_n), tape = lstm_forward(p.params, p.x, p.state, p.lengths, **model_of(p), resets=p.resets)
        grads = lstm_backward(p.params, tape, p.dy, p.dstate)
    return {"y": y, "h_n": h_n, "c_n": c_n, "dx": grads.x, "dh0": grads.state[0], "dc0": grads.state[1]} | grads.params


def worst_error(change, cases: tuple[Case, ...]) -> float:
    """Largest error of the changed kernels over the cases; infinite if a kernel fails."""
    worst = 0.0
    xp = FakeCupy(change=change, fibers=True, options=("-O0",))  # compiling takes most of the time
    with installed(xp):
        for case in cases:
            try:
                found = solve_twice(xp, case)
            except RuntimeError:  # a barrier that some thread never reached
                return np.inf
            for result in found:
                worst = max(worst, *(normalised_error(result[name], value) for name, value in truth(case).items()))
    return worst


BOUND = BOUNDS["agreement"].float64
NOTICED = 1e3  # a slip must stand out by this factor over the bound: no check may pass or fail by luck


@pytest.mark.parametrize(
    "cases", [CASES, PEEPHOLE_CASES, RESET_CASES, *dict.fromkeys(cases for *_, cases in FAMILY_SLIPS.values())], ids=str
)
def test_the_unchanged_kernels_pass(cases):
    """After a slip, too: the check must not use what an earlier one has compiled or prepared."""
    for change, passes in ((slipped(*SLIPS["dy not added"]), False), (lambda code: code, True)) * 2:
        assert (worst_error(change, cases) <= BOUND) is passes


def slipped(old: str, new: str):
    """Return what puts one slip into the source."""

    def change(code: str) -> str:
        assert code == loader.source() and code.count(old) == 1, f"{old!r} is there {code.count(old)} times"
        return code.replace(old, new)

    return change


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_noticed(slip):
    assert worst_error(slipped(*SLIPS[slip]), CASES) > NOTICED * BOUND


@pytest.mark.parametrize("slip", PEEPHOLE_SLIPS)
def test_a_slip_in_the_peepholes_is_noticed(slip):
    assert worst_error(slipped(*PEEPHOLE_SLIPS[slip]), PEEPHOLE_CASES) > NOTICED * BOUND


@pytest.mark.parametrize("slip", RESET_SLIPS)
def test_a_slip_in_the_resets_is_noticed(slip):
    assert worst_error(slipped(*RESET_SLIPS[slip]), RESET_CASES) > NOTICED * BOUND


@pytest.mark.parametrize("slip", FAMILY_SLIPS)
def test_a_slip_in_a_variant_is_noticed(slip):
    *change, cases = FAMILY_SLIPS[slip]
    assert worst_error(slipped(*change), cases) > NOTICED * BOUND


# More inputs than a warp has lanes, sequences that fill no warp, more groups of them than the grid has blocks.
STEP_CASE = Case(1, 7, 37, 5, 2)


def error_of_a_step(monkeypatch, change, **fields) -> float:
    """Return the largest error of two steps with the changed kernels."""
    monkeypatch.setattr(launch, "_MOST_BLOCKS", 1)
    case = dataclasses.replace(STEP_CASE, hidden=10 if fields else 5, fields=tuple(fields.items()))
    p, found = problem(case), []
    xp = FakeCupy(change=change, fibers=True, options=("-O0",))
    for library, host in ((xp, lambda value: value.get()), (np, lambda value: value)):
        with installed(xp) if library is xp else REFERENCE.active():
            lstm = LSTM(37, case.hidden, 2, dtype=np.float64, **fields)
            lstm.params.update({name: library.array(value) for name, value in p.params.items()})
            first, state = lstm.step(library.array(p.x[0]), tuple(map(library.array, p.state)))
            second, state = lstm.step(library.array(p.x[0]), state)
            found.append([host(value) for value in (first, second, *state)])
    return max(normalised_error(ours, true) for ours, true in zip(*found, strict=True))


@pytest.mark.parametrize("fields", [{}, _SHARED, _MISSING], ids=str)
def test_the_unchanged_single_step_passes(fields, monkeypatch):
    assert error_of_a_step(monkeypatch, lambda code: code, **fields) <= BOUND


@pytest.mark.parametrize("slip", STEP_SLIPS)
def test_a_slip_in_the_single_step_is_noticed(slip, monkeypatch):
    assert error_of_a_step(monkeypatch, slipped(*STEP_SLIPS[slip])) > NOTICED * BOUND


@pytest.mark.parametrize("slip", STEP_FAMILY_SLIPS)
def test_a_slip_in_a_variant_of_the_single_step_is_noticed(slip, monkeypatch):
    *change, fields = STEP_FAMILY_SLIPS[slip]
    assert error_of_a_step(monkeypatch, slipped(*change), **fields) > NOTICED * BOUND
