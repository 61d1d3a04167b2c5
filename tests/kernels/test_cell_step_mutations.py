"""Known slips, put into the equations of the CPU's cell step on purpose: a comparison with the reference notices each.

A mutant is the source of ``cell_step.py`` with one snippet of one routine replaced. Only that routine is compiled, as a
part of the variant with peepholes, which the drivers call by its address; the drivers are those of the library. The
plain LSTM is the same source, compiled with another constant.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from harness import REFERENCE, BackendUnderTest, Case, problem, results, solve
from tolerances import BOUNDS, normalised_error

from fastlstm import LSTM

# The routine, what stands there, and what a slip makes of it.
SLIPS = {
    "gates i and f swapped": ("_update", "c = fma(f, c_prev, i * g)", "c = fma(i, c_prev, f * g)"),
    "candidate by the sigmoid": ("_update", "tanh(a_g)", "sigmoid(a_g)"),
    "forget gate by the tanh": ("_update", "sigmoid(a_f)", "tanh(a_f)"),
    "input gate reads the forget gate's": ("_update", "load_first(a, units)", "load_first(offset(a, width), units)"),
    "candidate reads the output gate's row": ("_update", "offset(a, 2 * width)", "offset(a, 3 * width)"),
    "no peephole to i": ("_update", "a_i = fma(_peephole(own, hidden, 0, units), c_prev, a_i)", "pass"),
    "no peephole to f": ("_update", "a_f = fma(_peephole(own, hidden, 1, units), c_prev, a_f)", "pass"),
    "no peephole to o": ("_update", "a_o = fma(_peephole(own, hidden, 2, units), c, a_o)", "pass"),
    "f by the weight of i": ("_update", "_peephole(own, hidden, 1, units)", "_peephole(own, hidden, 0, units)"),
    "o by the weight of f": ("_update", "_peephole(own, hidden, 2, units)", "_peephole(own, hidden, 1, units)"),
    "o sees the cell state before": ("_update", "c, a_o)", "c_prev, a_o)"),
    "tape with f and g swapped": ("_update", "store(offset(tape, width), f)", "store(offset(tape, width), g)"),
    "tape without o": ("_update", "store(offset(tape, 3 * width), o)", "pass"),
    "tape with the cell state before": (
        "_update", "store(offset(tape, (kept - 1) * width), c)", "store(offset(tape, (kept - 1) * width), c_prev)",
    ),
    "computed again without the peephole to i": (
        "_rebuild", "a_i = fma(_peephole(own, hidden, 0, units), c_prev, a_i)", "pass",
    ),
    "computed again without the peephole to f": (
        "_rebuild", "a_f = fma(_peephole(own, hidden, 1, units), c_prev, a_f)", "pass",
    ),
    "computed again, o sees the cell state before": ("_rebuild", "c, a_o)", "c_prev, a_o)"),
    "computed again, g by the sigmoid": ("_rebuild", "tanh(a_g)", "sigmoid(a_g)"),
    "computed again, the cell state before": (
        "_rebuild", "store(offset(tape, 4 * width), c)", "store(offset(tape, 4 * width), c_prev)",
    ),
    "o's derivative without 1 - o": ("_backward", "da_o = dh * tanh_c * (o * (1.0 - o))", "da_o = dh * tanh_c * o"),
    "output gate reads c": ("_backward", "tanh_c = tanh(load(offset(tape, 4 * width)))",
                            "tanh_c = load(offset(tape, 4 * width))"),
    "tanh of c not differentiated": ("_backward", "1.0 - tanh_c * tanh_c", "1.0"),
    "dc from the next step dropped": ("_backward", "1.0 - tanh_c * tanh_c, dc)", "1.0 - tanh_c * tanh_c, dc - dc)"),
    "i's derivative without 1 - i": ("_backward", "(i * (1.0 - i))", "i"),
    "f's derivative by i": ("_backward", "(f * (1.0 - f))", "(i * (1.0 - i))"),
    "g's derivative dropped": ("_backward", "da_g = dc * i * (1.0 - g * g)", "da_g = dc * i"),
    "tanh applied twice": ("_backward", "(1.0 - g * g)", "(1.0 - tanh(g) * tanh(g))"),
    "tanh of c in place of c before": ("_backward", "dc * c_prev", "dc * tanh_c"),
    "dc not times f": ("_backward", "dc = dc * f", "pass"),
    "dc without the share of o": ("_backward", "dc = fma(da_o, _peephole(own, hidden, 2, units), dc)", "pass"),
    "dc before without the share of i": ("_backward", "dc = fma(da_i, _peephole(own, hidden, 0, units), dc)", "pass"),
    "dc before without the share of f": ("_backward", "dc = fma(da_f, _peephole(own, hidden, 1, units), dc)", "pass"),
    "dc before with the weight of i for f": ("_backward", "_peephole(own, hidden, 1, units)",
                                             "_peephole(own, hidden, 0, units)"),
    "da of f and g swapped": ("_backward", "store(offset(da, width), da_f)", "store(offset(da, width), da_g)"),
    "da of o not stored": ("_backward", "store(offset(da, 3 * width), da_o)", "pass"),
    "gradient of i's peephole by c": ("_own_gradients", "fma(load(da), c_prev", "fma(load(da), c"),
    "gradient of f's peephole by the da of i": ("_own_gradients", "load(offset(da, width))", "load(da)"),
    "gradient of o's peephole by the c before": ("_own_gradients", "3 * width)), c,", "3 * width)), c_prev,"),
    "gradient of f's peephole overwritten": ("_own_gradients", "load_first(p_f, units)), units)", "c - c), units)"),
    "gradient of o's peephole in the row of f": ("_own_gradients", "offset(sums, 2 * hidden)", "offset(sums, hidden)"),
}  # fmt: skip
# By the drivers for large batches, ragged and both ways, with the gates kept and computed again; and for small ones.
CASES = [Case(12, 7, 3, 11, 1, True, lengths="zeros", peephole=True), Case(3, 2, 3, 11, peephole=True)]
NOTICED = 1e3  # a slip must stand out by this factor over the bound


def errors(dtype):
    """Largest errors of each kind of call, in float64 against the reference."""
    cpu, found = BackendUnderTest("cpu"), []
    for case, recompute in itertools.product(CASES, (False, True)):
        p, expected = problem(case).astype(dtype), truth(case)
        lstm = LSTM(3, 11, bidirectional=case.bidirectional, peephole=True, dtype=dtype)
        lstm.params.update(p.params)
        y, state, tape = lstm.forward(p.x, p.state, p.lengths, recompute=recompute)
        computed = results(cpu, y, *state, lstm.backward(tape, p.dy, p.dstate))
        found.append(max(normalised_error(computed[name], value) for name, value in expected.items()))
    return found


@functools.cache
def truth(case):
    return solve(problem(case), REFERENCE)


def mutant(slip, addresses):
    """Return a variant's addresses, that of the routine with a slip in place of its own."""
    from fastlstm.kernels.cpu import cell_step, jit

    routine, old, new = SLIPS[slip]
    source = inspect.getsource(cell_step)
    start = source.index(f"def {routine}(")
    end = source.index("\n\n\n", start)
    assert source[start:end].count(old) == 1, f"{slip}: {old!r} is there {source[start:end].count(old)} times"
    changed = types.ModuleType(f"{cell_step.__name__}_mutant")
    exec(source[:start] + source[start:end].replace(old, new) + source[end:], vars(changed))
    names = ["variant_update", "variant_rebuild", "variant_backward", "variant_own_gradients"]

    def address_of(function, signature):
        number = names.index(function.__name__)
        is_changed = function.__name__ == f"variant{routine}"
        kept.append(function)
        return jit.address_of(function, signature) if is_changed else addresses[number]

    changed.address_of = address_of
    return changed.cell_addresses(changed.PEEPHOLE, np.dtype("float64"))


kept = []  # what was compiled, whose machine code is freed with it


def run_all():
    """Return the errors with each slip, and without any."""
    from fastlstm import use_backend
    from fastlstm.backends.cpu import weights
    from fastlstm.kernels.cpu import cell_step, kernel_cache

    addresses = cell_step.cell_addresses(cell_step.PEEPHOLE, np.dtype("float64"))
    with use_backend("cpu"):
        found = {"none": errors("float64")}
        kernel_cache.read = lambda *_: None  # the key of a cached kernel says nothing of these sources
        kernel_cache.write = lambda *_: None
        for slip in SLIPS:
            changed = mutant(slip, addresses)
            weights.cell_addresses = lambda *_, changed=changed: changed
            weights.size_of.cache_clear()
            found[slip] = errors("float64")
    return found


@pytest.fixture(scope="module")
def found():
    """Run all mutants in a process of its own, since what they compute there is wrong."""
    if BackendUnderTest("cpu").missing:
        pytest.skip(str(BackendUnderTest("cpu").missing))
    tests = os.path.dirname(os.path.dirname(__file__))
    path = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, __file__], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


def test_without_a_slip_the_results_are_right(found):
    assert max(found["none"]) <= BOUNDS["agreement"].float64


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_noticed(found, slip):
    large, _, small, _ = noticed = [error > NOTICED * BOUNDS["agreement"].float64 for error in found[slip]]
    if SLIPS[slip][0] == "_rebuild":  # small batches keep the gates even so
        assert noticed == [False, True, False, False]
    else:
        assert large and small


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run_all()))
