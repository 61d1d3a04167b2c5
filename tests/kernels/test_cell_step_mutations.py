"""Mutations of the equations of the CPU's cell step: a comparison with the reference notices each.

A mutant is the source of ``cell_step.py`` or ``gate_activations.py`` with one snippet of one routine replaced. What
depends on that routine is compiled for a variant, which the drivers call by its address; the drivers are those of the
library. The plain LSTM is the same source, compiled for another variant.
"""

from __future__ import annotations

import dataclasses
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

from fastlstm import LSTM, use_backend

# The routine, what stands there, and what a slip makes of it.
SLIPS = {
    "gates i and f swapped": ("_update", "c = fma(f, c_prev, i * g)", "c = fma(i, c_prev, f * g)"),
    "candidate by the sigmoid": ("_update", "g = candidate(a_g)", "g = gate(a_g)"),
    "forget gate by the tanh": ("_update", "f = gate(a_f)", "f = candidate(a_f)"),
    "input gate reads the forget gate's": ("_update", "load_first(a, units)", "load_first(offset(a, width), units)"),
    "candidate reads the output gate's row": ("_update", "offset(a, 2 * width)", "offset(a, 3 * width)"),
    "no peephole to i": ("_update", "a_i = fma(_peephole(own, hidden, 0, units), c_prev, a_i)", "pass"),
    "no peephole to f": ("_update", "a_f = fma(_peephole(own, hidden, 1, units), c_prev, a_f)", "pass"),
    "no peephole to o": ("_update", "a_o = fma(_peephole(own, hidden, 2, units), c, a_o)", "pass"),
    "f by the weight of i": ("_update", "_peephole(own, hidden, 1, units)", "_peephole(own, hidden, 0, units)"),
    "o by the weight of f": ("_update", "_peephole(own, hidden, 2, units)", "_peephole(own, hidden, 1, units)"),
    "o sees the cell state before": ("_update", "c, a_o)", "c_prev, a_o)"),
    "tape with f and g swapped": ("_update", "note_gate(a_f, f)", "note_gate(a_f, g)"),
    "tape without o": ("_update", "store(offset(tape, 3 * width), note_gate(a_o, o))", "pass"),
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
    "computed again, g by the sigmoid": ("_rebuild", " candidate(a_g)", " gate(a_g)"),
    "computed again, the cell state before": (
        "_rebuild", "store(offset(tape, 4 * width), c)", "store(offset(tape, 4 * width), c_prev)",
    ),
    "o's derivative without 1 - o": ("_backward", "squashed * slope(o)", "squashed * o"),
    "output gate reads c": ("_backward", "squashed = squash(c)", "squashed = c"),
    "tanh of c not differentiated": (
        "_backward", "fma(dh * o, slope_of_squashed(squashed), dc)", "fma(dh, o, dc)",
    ),
    "dc from the next step dropped": (
        "_backward", "slope_of_squashed(squashed), dc)", "slope_of_squashed(squashed), dc - dc)",
    ),
    "i's derivative without 1 - i": ("_backward", "* slope(i)", "* i"),
    "f's derivative by i": ("_backward", "slope(f)", "slope(i)"),
    "g's derivative dropped": ("_backward", "dc * i * slope_of_g(g)", "dc * i"),
    "tanh applied twice": ("_backward", "slope_of_g(g)", "slope_of_g(tanh(g))"),
    "tanh of c in place of c before": ("_backward", "dc * c_prev * slope(f)", "dc * squashed * slope(f)"),
    "dc not times f": ("_backward", "dc = dc * f", "pass"),
    "dc without the share of o": ("_backward", "dc = fma(da_o, _peephole(own, hidden, 2, units), dc)", "pass"),
    "dc before without the share of i": ("_backward", "dc = fma(da_i, _peephole(own, hidden, 0, units), dc)", "pass"),
    "dc before without the share of f": ("_backward", "dc = fma(da_f, _peephole(own, hidden, 1, units), dc)", "pass"),
    "dc before with the weight of i for f": ("_backward", "_peephole(own, hidden, 1, units)",
                                             "_peephole(own, hidden, 0, units)"),
    "da of f and g swapped": ("_backward", "store(offset(da, width), da_f)", "store(offset(da, width), da_g)"),
    "da of o not stored": ("_backward", "store(offset(da, 3 * width), da_o)", "pass"),
    "gradient of i's peephole by c": ("_add_peepholes", "fma(load(da), c_prev", "fma(load(da), c"),
    "gradient of f's peephole by the da of i": ("_add_peepholes", "load(offset(da, width))", "load(da)"),
    "gradient of o's peephole by the c before": ("_add_peepholes", "3 * width)), c,", "3 * width)), c_prev,"),
    "gradient of f's peephole overwritten": ("_add_peepholes", "load_first(p_f, units)), units)", "c - c), units)"),
    "gradient of o's peephole in the row of f": ("_add_peepholes", "offset(sums, 2 * hidden)", "offset(sums, hidden)"),
}  # fmt: skip
# At these bounds, the values of the gates and of the candidate round to those of the next numbers below.
CLIPPED, CLIPPED_G = {"clip": 1.5}, {"clip": 2.0}
COUPLED = {"coupled": True, "peephole": True, "activations": ("sigmoid", "tanh", "1997")}
PAPER = {"forget_gate": False, "activations": ("sigmoid", "1997", "1997")}
BOUNDED = {"cell_clip": 0.5, "peephole": True}


def _activated(name):
    return {"activations": (name if name != "identity" else "sigmoid", name, name)}


# Of variants: its fields, the routine, what stands there, and what a slip makes of it.
OF_VARIANTS = {
    "f = i of coupled gates": (COUPLED, "_update", "f = 1.0 - i", "f = i"),
    "f by zeros without a forget gate": (PAPER, "_update", "f = like(i, 1.0)", "f = gate(a_f)"),
    "f of coupled gates by its rows": (COUPLED, "_update", "elif forget == COUPLED", "elif forget == NONE"),
    "c not clipped": (BOUNDED, "_update", "c = clamped(c, cell_clip)", "pass"),
    "c clipped by another bound": (BOUNDED, "_update", "clamped(c, cell_clip)", "clamped(c, 1.5 * cell_clip)"),
    "tape with i for f": (COUPLED, "_update", "if forget == OWN else f)", "if forget == OWN else i)"),
    "tape with i not noted": (CLIPPED, "_update", "note_gate(a_i, i)", "i"),
    "tape with f not noted": (CLIPPED, "_update", "note_gate(a_f, f)", "f"),
    "tape with g not noted": (CLIPPED_G, "_update", "note_candidate(a_g, g)", "g"),
    "tape with o not noted": (CLIPPED, "_update", "note_gate(a_o, o)", "o"),
    "computed again, f = i of coupled gates": (COUPLED, "_rebuild", "f = 1.0 - i", "f = i"),
    "computed again, f = 0": (PAPER, "_rebuild", "f = like(i, 1.0)", "f = like(i, 0.0)"),
    "computed again, i not noted": (CLIPPED, "_rebuild", "note_gate(a_i, i)", "i"),
    "computed again, f not noted": (CLIPPED, "_rebuild", "note_gate(a_f, gate(a_f))", "gate(a_f)"),
    "computed again, g not noted": (CLIPPED_G, "_rebuild", "note_candidate(a_g, candidate(a_g))", "candidate(a_g)"),
    "computed again, o not noted": (CLIPPED, "_rebuild", "note_gate(a_o, gate(a_o))", "gate(a_o)"),
    "gradient through the clip of c": (BOUNDED, "_backward", "dc = select(abs(c) < cell_clip, dc, 0.0)", "pass"),
    "gradient through the lower clip of c": (BOUNDED, "_backward", "abs(c) < cell_clip", "c < cell_clip"),
    "gradient stopped within the clip of c": (BOUNDED, "_backward", "abs(c) < cell_clip", "abs(c) < 0.5 * cell_clip"),
    "coupled gates without f": (COUPLED, "_backward", "dc * (g - c_prev)", "dc * g"),
    "coupled gates with the sign of f": (COUPLED, "_backward", "g - c_prev", "g + c_prev"),
    "output's slope by the gates'": (COUPLED, "_backward", "slope_of_squashed(squashed)", "slope(squashed)"),
    "candidate's slope by the gates'": (PAPER, "_backward", "slope_of_g(g)", "slope(g)"),
    "output by tanh": (PAPER, "_routines", "held * squash(c)", "held * tanh(c)"),
    "output without o": (PAPER, "_routines", "held * squash(c)", "squash(c)"),
    "relu of negative numbers": (_activated("relu"), "_relu", "select(a < 0.0, 0.0, a)", "a"),
    "relu's slope everywhere": (_activated("relu"), "_slope_of_relu", "1.0, 0.0", "1.0, 1.0"),
    "hard sigmoid by another slope": (_activated("hard_sigmoid"), "_hard_sigmoid", "a * 0.2", "a * 0.25"),
    "hard sigmoid from zero": (_activated("hard_sigmoid"), "_hard_sigmoid", "+ 0.5", ""),
    "hard sigmoid's lower end": (_activated("hard_sigmoid"), "_hard_sigmoid", "a < -2.5", "a < -3.5"),
    "hard sigmoid's upper end": (_activated("hard_sigmoid"), "_hard_sigmoid", "a > 2.5", "a > 3.5"),
    "slope of the hard sigmoid": (_activated("hard_sigmoid"), "_slope_of_hard_sigmoid", "0.2", "0.25"),
    "slope above the hard sigmoid": (_activated("hard_sigmoid"), "_slope_of_hard_sigmoid", "s < 1.0", "s < 2.0"),
    "slope below the hard sigmoid": (_activated("hard_sigmoid"), "_slope_of_hard_sigmoid", "s > 0.0", "s > -1.0"),
    "softsign by the square": (_activated("softsign"), "_softsign", "abs(a)", "a * a"),
    "softsign by the sign": (_activated("softsign"), "_softsign", "abs(a)", "a"),
    "softsign's slope not squared": (_activated("softsign"), "_slope_of_softsign", "below * below", "below"),
    "softsign's slope by the sign": (_activated("softsign"), "_slope_of_softsign", "abs(s)", "s"),
    "identity's slope": (_activated("identity"), "_slope_of_identity", "1.0", "2.0"),
    "candidate of 1997 halved": (PAPER, "_candidate_1997", "2.0 * tanh", "tanh"),
    "candidate of 1997 not flat": (PAPER, "_candidate_1997", "0.5 * a", "a"),
    "candidate's slope of 1997 doubled": (PAPER, "_slope_of_candidate_1997", "0.25", "0.5"),
    "candidate's slope of 1997 within ±1": (PAPER, "_slope_of_candidate_1997", "(2.0 - s)", "(1.0 - s)"),
    "candidate's slope of 1997 with a sign": (PAPER, "_slope_of_candidate_1997", "(2.0 + s)", "(2.0 - s)"),
    "output of 1997 not flat": (PAPER, "_output_1997", "0.5 * c", "c"),
    "output's slope of 1997 doubled": (PAPER, "_slope_of_output_1997", "* 0.5", ""),
    "output's slope of 1997 not by the square": (PAPER, "_slope_of_output_1997", "s * s", "s"),
    "no upper clip": (CLIPPED, "clamped", "select(a > bound, bound, a)", "a"),
    "no lower clip": (CLIPPED, "clamped", "select(a < -bound, -bound, a)", "a"),
    "no clip": (CLIPPED, "activation", "value(clamped(a, clip))", "value(a)"),
    "gradient below the clip": (CLIPPED, "activation", "select(s > low, ", "select(s > low - 1.0, "),
    "gradient above the clip": (CLIPPED, "activation", "select(s < high, slope", "select(s < high + 1.0, slope"),
    "no gradient within the clip": (CLIPPED, "activation", "slope(s), 0.0)", "like(s, 0.0), 0.0)"),
    "noted beyond the clip": (CLIPPED, "activation", "abs(a) < clip", "abs(a) < 2.0 * clip"),
    "nothing noted": (CLIPPED, "activation", "select(abs(a) < clip, told_apart, s)", "s"),
    "the upper bound not told apart": (CLIPPED, "activation", "select(s < high, s, high * _INWARDS(high))", "s"),
    "the lower bound not told apart": (CLIPPED, "activation", "low, told_apart, inner_low)", "low - 1.0, s, s)"),
}  # fmt: skip
# By the drivers for large batches, ragged and in both directions, with the gates kept and recomputed, and for small
# ones.
LARGE, SMALL = Case(12, 7, 3, 11, 1, True, lengths="zeros"), Case(3, 2, 3, 11)
NOTICED = 1e3  # a slip must stand out by this factor over the bound
PEEPHOLE = {"peephole": True}


def errors(fields):
    """Largest errors of each kind of call, in float64 against the reference; and, of a clip, close to its bound."""
    cpu, found, key = BackendUnderTest("cpu"), [], tuple(fields.items())
    cases = [dataclasses.replace(case, fields=key) for case in (LARGE, SMALL)]
    for case, recompute in itertools.product(cases, (False, True)):
        p, expected = spread(case), truth(case)
        lstm = LSTM(3, 11, bidirectional=case.bidirectional, dtype=np.float64, **fields)
        lstm.params.update(p.params)
        y, state, tape = lstm.forward(p.x, p.state, p.lengths, recompute=recompute)
        computed = results(cpu, y, *state, lstm.backward(tape, p.dy, p.dstate))
        found.append(max(normalised_error(computed[name], value) for name, value in expected.items()))
    return found + ([close_to_the_bound(fields, recompute) for recompute in (False, True)] if "clip" in fields else [])


def spread(case):
    """Make the problem of a case; the inputs of a variant are large enough for saturation and clipping."""
    p = problem(case)
    return p if dict(case.fields) == PEEPHOLE else dataclasses.replace(p, x=3 * p.x)


@functools.cache
def truth(case):
    return solve(spread(case), REFERENCE)


def close_to_the_bound(fields, recompute):
    """Return the share of the gradient that is lost next to a bound, where values round to that of the bound."""
    clip, steps = fields["clip"], 8
    at = clip - np.arange(1, steps + 1) * np.finfo(np.float64).eps
    x = np.concatenate([at, -at]).reshape(1, -1, 1)
    found = []
    for gate in range(4):  # one gate close to the bound, whose gradient alone reaches the input
        lstm = LSTM(1, 1, dtype=np.float64, bias=False, **fields)
        for array in lstm.params.values():
            array[:] = 0.0
        lstm.params["weight_ih_l0"][gate] = 1.0
        state = np.zeros((1, x.shape[1], 1)), np.ones((1, x.shape[1], 1))
        if gate in (0, 3):  # i and o count where g and c are not zero
            lstm.params["weight_ih_l0"][2] = 0.25
        # The drivers for large batches compute the gates again, those for small ones keep them.
        times = 9 if recompute else 1
        for backend in ("reference", "cpu"):
            with use_backend(backend):
                given = x.repeat(times, axis=1), tuple(value.repeat(times, axis=1) for value in state)
                _, _, tape = lstm.forward(*given, recompute=recompute)
                found.append(lstm.backward(tape, np.ones(tape.call.y_shape)).x)
    return max(normalised_error(ours, theirs) for theirs, ours in zip(found[::2], found[1::2], strict=True))


def mutant(slip):
    """Return a variant's addresses with a slip: those of the routine with it, or all if an activation has it."""
    from fastlstm.backends.cpu import weights
    from fastlstm.kernels.cpu import cell_step, gate_activations, jit

    fields, routine, old, new = ALL[slip]
    variant = weights.variant_of(LSTM(3, 11, **fields).cell)
    addresses = cell_step.cell_addresses(variant, np.dtype("float64"))
    source = inspect.getsource(cell_step)
    name = routine if routine == "_routines" else routine if routine == "_add_peepholes" else f"{routine}_of"
    in_step = f"def {name}(" in source
    changed = {module: types.ModuleType(f"{module.__name__}_mutant") for module in (gate_activations, cell_step)}
    for module, other in changed.items():
        text = inspect.getsource(module)
        if (module is cell_step) == in_step:
            text = with_slip(slip, text, name if in_step else routine, old, new)
        exec(text, vars(other))
    step = changed[cell_step]
    if not in_step:
        for each in ("activation", "clamped", "like"):
            setattr(step, each, getattr(changed[gate_activations], each))
    names = ["variant_update", "variant_rebuild", "variant_backward", "variant_own_gradients", "variant_output",
             "variant_output_back"]  # fmt: skip
    affected = {"_add_peepholes": "variant_own_gradients", "_routines": "variant_output"}

    def address_of(function, signature):
        is_changed = not in_step or function.__name__ == affected.get(routine, f"variant{routine}")
        kept.append(function)
        return jit.address_of(function, signature) if is_changed else addresses[names.index(function.__name__)]

    step.address_of = address_of
    return step.cell_addresses(variant, np.dtype("float64"))


def with_slip(slip, source, routine, old, new):
    start = source.index(f"def {routine}(")
    end = source.find("\n\n\n", start)
    end = len(source) if end < 0 else end
    assert source[start:end].count(old) == 1, f"{slip}: {old!r} is there {source[start:end].count(old)} times"
    return source[:start] + source[start:end].replace(old, new) + source[end:]


ALL = {name: (PEEPHOLE, *slip) for name, slip in SLIPS.items()} | OF_VARIANTS
kept = []  # what was compiled, whose machine code is freed with it


def run_all():
    """Return the errors with each slip, and without any."""
    from fastlstm.backends.cpu import weights
    from fastlstm.kernels.cpu import kernel_cache

    with use_backend("cpu"):
        found = {f"none of {fields}": errors(fields) for fields, *_ in ALL.values()}
        kernel_cache.read = lambda *_: None  # the key of a cached kernel says nothing of these sources
        kernel_cache.write = lambda *_: None
        for slip, (fields, *_) in ALL.items():
            changed = mutant(slip)
            weights.cell_addresses = lambda *_, changed=changed: changed
            weights.size_of.cache_clear()
            found[slip] = errors(fields)
    return found


@pytest.fixture(scope="module")
def found():
    """Run all mutants in a process of its own, since what they compute there is wrong."""
    if BackendUnderTest("cpu").missing:
        pytest.skip(str(BackendUnderTest("cpu").missing))
    tests = os.path.dirname(os.path.dirname(__file__))
    path = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, __file__], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


def test_without_a_slip_the_results_are_right(found):
    right = [max(errors) for name, errors in found.items() if name.startswith("none of")]
    assert len(right) > 1
    assert max(right) <= BOUNDS["agreement"].float64


@pytest.mark.parametrize("slip", ALL)
def test_a_slip_is_noticed(found, slip):
    large, again, small, small_again, *close = noticed = [
        error > NOTICED * BOUNDS["agreement"].float64 for error in found[slip]
    ]
    if not any(noticed[:4]) and any(close):
        return  # it shows close to a clip's bound alone
    if ALL[slip][1] == "_rebuild":  # small batches keep the gates even so
        assert [large, again, small, small_again] == [False, True, False, False]
    else:
        assert large and small


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run_all()))
