"""Whatever an input's layout, byte order or kind of memory: the answer is that of a clean copy, to the bit.

And what stands in it: NaN and Inf stay within their own sequence, and nothing in the padding goes anywhere.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from harness import REFERENCE, Case, problem, results, solve
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, cleaned, lay_out, snapshot
from tolerances import assert_close, assert_identical

import fastlstm
from fastlstm import LSTM
from fastlstm.functional import lstm_backward, lstm_forward

LAYOUT = st.sampled_from(sorted(LAYOUTS))
INTEGERS = st.sampled_from([">i2", "<u2", ">i4", "u4", "<i8", ">u8"])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 5, 3)], ids=str)
def test_layouts_are_what_they_claim(dtype, name, shape):
    a = np.random.default_rng(0).uniform(size=shape).astype(dtype)
    made = lay_out(name, a)  # asserts the property
    if name not in ("broadcast", "overlapping"):
        np.testing.assert_array_equal(made, a)
    assert LAYOUTS[name][1](a) == (
        name in ("clean", "fortran", "transposed", "overlapping")[: 1 if len(shape) > 1 else 4]
    )
    copy = cleaned(made)
    assert copy.flags.carray and copy.dtype.isnative and type(copy) is np.ndarray
    np.testing.assert_array_equal(copy, made)


def arguments(p):
    """All arrays of a problem, by name."""
    named = {"x": p.x, "h0": p.state[0], "c0": p.state[1], "dy": p.dy, "dh_n": p.dstate[0], "dc_n": p.dstate[1]}
    return named | p.params | ({} if p.lengths is None else {"lengths": p.lengths})


def on(backend, named):
    """Bring arrays to a backend; lengths stay on the host."""
    return {name: value if name == "lengths" else backend.array(value) for name, value in named.items()}


def solve_with(p, named, backend):
    """Solve a problem with these arrays, which are the backend's, in place of its own."""
    a = named
    params = {name: a[name] for name in p.params}
    y, (h_n, c_n), tape = lstm_forward(params, a["x"], (a["h0"], a["c0"]), a.get("lengths"), batch_first=p.batch_first)
    return results(backend, y, h_n, c_n, lstm_backward(params, tape, a["dy"], (a["dh_n"], a["dc_n"])))


def assert_same(found, expected, backend, dtype):
    """Assert equal bits where the backend promises them for any layout, else a few ulp."""
    if backend.bitwise:
        assert_identical(found, expected)
    else:
        assert_close("alone", found, expected, backend=backend.name, dtype=dtype)


@settings(max_examples=2 * settings().max_examples)
@given(data=st.data())
def test_every_layout_gives_the_clean_answer_and_stays_unchanged(backend, dtype, data):
    sizes = [data.draw(st.sampled_from(choice)) for choice in ((1, 2, 5), (1, 2, 7), (1, 3, 8), (1, 4, 17))]
    flags = [data.draw(st.booleans()) for _ in range(3)]
    case = Case(*sizes, 2, *flags, lengths="zeros" if data.draw(st.booleans()) else None)
    p = problem(case).astype(dtype)
    named = arguments(p)
    if p.lengths is not None:
        named["lengths"] = p.lengths.astype(np.dtype(data.draw(INTEGERS)).newbyteorder("="))
    made = {name: lay_out(data.draw(LAYOUT, label=name), value) for name, value in named.items()}
    before = {name: snapshot(value) for name, value in made.items()}
    given_arrays = on(backend, made)
    found = solve_with(p, given_arrays, backend)
    assert {name: snapshot(value) for name, value in made.items()} == before
    expected = solve_with(p, on(backend, {name: cleaned(value) for name, value in made.items()}), backend)
    assert_same(found, expected, backend, dtype)
    for name, value in given_arrays.items():  # on a device, the copies there are unchanged too
        np.testing.assert_array_equal(value if backend.is_numpy or name == "lengths" else value.get(), made[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_of_every_argument_at_once(backend, dtype, layout):
    p = problem(Case(4, 3, 5, 8, 2, True, lengths="zeros")).astype(dtype)
    made = {name: lay_out(layout, value) for name, value in arguments(p).items()}
    found = solve_with(p, on(backend, made), backend)
    expected = solve_with(p, on(backend, {name: cleaned(value) for name, value in made.items()}), backend)
    assert_same(found, expected, backend, dtype)


@pytest.mark.parametrize(("steps", "batch", "layers"), [(2, 4, 1), (2, 4, 2), (20, 4, 1), (1, 20, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_of_a_step_and_of_an_inference_call(backend, dtype, layout, steps, batch, layers):
    p = problem(Case(steps, batch, 5, 8, layers)).astype(dtype)
    made = {"x": p.x, "x_t": np.ascontiguousarray(p.x[0]), "h": p.state[0], "c": p.state[1]} | p.params
    made = {name: lay_out(layout, value) for name, value in made.items()}

    def run(named):
        lstm, a = LSTM(5, 8, layers, dtype=dtype), on(backend, named)
        lstm.params.update({name: a[name] for name in p.params})
        h_t, (h_1, c_1) = lstm.step(a["x_t"], (a["h"], a["c"]))
        y, (h_n, c_n) = lstm(a["x"], (a["h"], a["c"]))
        found = {"h_t": h_t, "h_1": h_1, "c_1": c_1, "y": y, "h_n": h_n, "c_n": c_n}
        return {name: backend.host(value) for name, value in found.items()}

    before = {name: snapshot(value) for name, value in made.items()}
    clean_copies = {name: cleaned(value) for name, value in made.items()}
    run(clean_copies)  # what has run once may take another path from then on
    assert_same(run(made), run(clean_copies), backend, dtype)
    assert {name: snapshot(value) for name, value in made.items()} == before


def test_results_belong_to_the_caller_alone(backend, dtype):
    # Writing into any result changes no other result, no input, no parameter, and no later call.
    p = problem(Case(3, 2, 4, 5, 2)).astype(dtype)
    lstm = LSTM(4, 5, 2, dtype=dtype)
    lstm.params.update({name: backend.array(value) for name, value in p.params.items()})
    x, dy, state = backend.array(p.x), backend.array(p.dy), tuple(map(backend.array, p.state))

    def run():
        y, (h_n, c_n), tape = lstm.forward(x, state)
        grads = lstm.backward(tape, dy)
        h, (h_1, c_1) = lstm.step(x[0], state)
        return [y, h_n, c_n, grads.x, *grads.state, *grads.params.values(), h, h_1, c_1]

    found = run()
    held = [*found, x, dy, *state, *lstm.params.values()]
    for one, other in itertools.combinations(held, 2):
        assert not backend.shares_memory(one, other)
    copies = [backend.host(value).copy() for value in found]
    for value in found:
        value[...] = np.nan
    for value, copy in zip(run(), copies, strict=True):
        np.testing.assert_array_equal(backend.host(value), copy)


@pytest.mark.parametrize("case", [Case(4, 3, 4, 5, 2, True, lengths=(4, 0, 2)), Case(1, 3, 4, 5)], ids=str)
def test_a_tape_needs_nothing_but_x_to_stay(backend, dtype, case):
    p = problem(case).astype(dtype)
    params = {name: backend.array(value) for name, value in p.params.items()}
    dy, dstate = backend.array(p.dy), tuple(map(backend.array, p.dstate))
    x, state = backend.array(p.x), tuple(backend.array(value.copy()) for value in p.state)
    lengths = None if p.lengths is None else p.lengths.copy()
    y, (h_n, c_n), tape = lstm_forward(params, x, state, lengths)
    for value in (y, h_n, c_n, *state, *([] if lengths is None else [lengths])):
        value[...] = 0  # all of these are the caller's, to use again
    expected = solve(p, backend)
    found = results(backend, y, h_n, c_n, lstm_backward(params, tape, dy, dstate))
    gradients = [name for name in found if name.startswith("d")]
    assert_identical({name: found[name] for name in gradients}, {name: expected[name] for name in gradients})


@pytest.mark.parametrize("case", [Case(0, 3, 4, 5), Case(3, 0, 4, 5), Case(3, 2, 4, 5, lengths=(0, 0))], ids=str)
def test_results_of_nothing_belong_to_the_caller_alone(backend, dtype, case):
    p = problem(case).astype(dtype)
    params = {name: backend.array(value) for name, value in p.params.items()}
    state, dstate = (tuple(map(backend.array, pair)) for pair in (p.state, p.dstate))
    y, (h_n, c_n), tape = lstm_forward(params, backend.array(p.x), state, p.lengths)
    grads = lstm_backward(params, tape, backend.array(p.dy), dstate)
    held = [h_n, c_n, *state, *grads.state, *dstate, *grads.params.values(), *params.values()]
    for one, other in itertools.combinations(held, 2):
        assert not backend.shares_memory(one, other)
    for ours, theirs in ((h_n, state[0]), (c_n, state[1]), (grads.state[0], dstate[0]), (grads.state[1], dstate[1])):
        np.testing.assert_array_equal(backend.host(ours), backend.host(theirs))
    assert not any(backend.host(value).any() for value in (y, grads.x, *grads.params.values()))


@pytest.mark.parametrize(("steps", "batch"), [(0, 2), (3, 0), (0, 0)])
def test_calls_of_nothing_are_right_after_calls_of_something(backend, dtype, steps, batch):
    """A backend may have a quicker way for calls of which it knows the like."""
    lstm = LSTM(3, 5, dtype=dtype, seed=0)
    lstm.params = {name: backend.array(value) for name, value in lstm.params.items()}
    for first in ((2, 2), (40, 2)):
        lstm(backend.array(np.ones((*first, 3), dtype)))
    h0, c0 = (np.full((1, batch, 5), value, dtype) for value in (0.25, 0.5))
    y, (h_n, c_n) = lstm(backend.array(np.ones((steps, batch, 3), dtype)), (backend.array(h0), backend.array(c0)))
    assert y.shape == (steps, batch, 5)
    for found, expected in ((h_n, h0), (c_n, c0)):
        np.testing.assert_array_equal(backend.host(found), expected, strict=True)


def test_one_array_may_serve_as_several_arguments(backend, dtype):
    p = problem(Case(3, 4, 5, 5)).astype(dtype)
    params = {name: backend.array(value) for name, value in p.params.items()}
    x, h = backend.array(p.x), backend.array(p.state[0])

    def run(copy):
        y, state, tape = lstm_forward(params, x, (h, copy(h)))
        return results(backend, y, *state, lstm_backward(params, tape, copy(y), (copy(state[0]), copy(state[0]))))

    assert_identical(run(lambda value: value), run(lambda value: value.copy()))


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda v: np.array(v, ">i2"), lambda v: np.array(v, np.uint8)])
def test_lengths_may_be_any_integers(backend, dtype, kind):
    p = problem(Case(4, 3, 2, 5, lengths=(2, 0, 4))).astype(dtype)
    assert_identical(solve(dataclasses.replace(p, lengths=kind([2, 0, 4])), backend), solve(p, backend))
    one = problem(Case(4, 3, 2, 5, lengths=(0, 1, 2))).astype(dtype)
    assert_identical(solve(dataclasses.replace(one, lengths=range(3)), backend), solve(one, backend))


class Column:
    """What a pandas Series is to NumPy: neither an array nor a sequence, but an array can be made of it."""

    def __init__(self, values):
        self.values = np.array(values)

    def __array__(self, dtype=None, copy=None):
        return self.values.astype(dtype or self.values.dtype)


def _series(kind):
    """Make a Series of a dtype whose labels are not the positions."""

    def make(values):
        pandas = pytest.importorskip("pandas", reason="pandas is not installed")
        return pandas.Series(values, index=range(9, 9 - len(values), -1), dtype=kind)

    return make


@pytest.mark.parametrize(
    "kind", [Column, _series("int64"), _series("uint8"), _series("Int64")], ids=["stand-in", "int64", "uint8", "Int64"]
)
def test_lengths_may_be_a_column_of_a_table(backend, dtype, kind):
    p = problem(Case(4, 3, 2, 5, lengths=(2, 0, 4))).astype(dtype)
    assert_identical(solve(dataclasses.replace(p, lengths=kind([2, 0, 4])), backend), solve(p, backend))


@pytest.mark.parametrize(("values", "kind"), [([2.0, 0, 4], "float64"), ([2, None, 4], "Int64"), ([True] * 3, "bool")])
def test_a_column_of_no_integers_is_refused(backend, dtype, values, kind):
    p = problem(Case(4, 3, 2, 5, lengths=(2, 0, 4))).astype(dtype)
    with pytest.raises(fastlstm.DTypeError, match="lengths must be integers"):
        solve(dataclasses.replace(p, lengths=_series(kind)(values)), backend)


# What stands in the arrays.

VALUES = Case(5, 4, 3, 9, 2, True, lengths=(3, 0, 5, 4))
POISONS = [np.nan, np.inf, -np.inf]


def rows_without(found, row):
    """Cut a sequence out of all results that have a batch axis, and leave out the parameters' gradients."""
    return {name: np.delete(found[name], row, axis=1) for name in ("y", "h_n", "c_n", "dx", "dh0", "dc0")}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("where", ["x", "h0", "c0", "dy", "dh_n", "dc_n"])
def test_nan_and_inf_stay_in_their_own_sequence(backend, dtype, poison, where):
    p = problem(VALUES).astype(dtype)
    clean = solve_with(p, on(backend, arguments(p)), backend)
    for row in (0, 2, 3):
        named = arguments(p) | {where: arguments(p)[where].copy()}
        named[where][1, row, 1] = poison
        found = solve_with(p, on(backend, named), backend)
        assert_identical(rows_without(found, row), rows_without(clean, row))
        if np.isnan(poison):  # and does not vanish: the sequence's own results say that something is wrong
            own = {"x": "y", "h0": "y", "c0": "y"}.get(where, "dx")
            assert np.isnan(found[own][:, row]).any()


@pytest.mark.parametrize("poison", POISONS)
def test_nan_and_inf_go_where_the_equations_send_them(backend, dtype, poison):
    p = problem(VALUES).astype(dtype)
    for where in ("x", "h0", "c0", "dy", "dh_n", "dc_n", "weight_ih_l0", "weight_hh_l1", "bias_l0_reverse"):
        named = arguments(p) | {where: arguments(p)[where].copy()}
        index = {1: (4,), 2: (4, 1), 3: (1, 2, 1)}[named[where].ndim]
        named[where][index] = poison
        with REFERENCE.active():
            expected = solve_with(p, named, REFERENCE)
        found = solve_with(p, on(backend, named), backend)
        assert_close("agreement", found, expected, backend=backend.name, dtype=dtype)
        past = np.arange(VALUES.steps)[:, None] >= p.lengths
        assert not found["y"][past].any() and not found["dx"][past].any()  # even where a weight is NaN


@pytest.mark.parametrize("poison", [*POISONS, 1e30, -1e30, 1e-42])
@pytest.mark.parametrize("where", ["x", "h0", "c0", "weight_ih_l0", "weight_hh_l0", "bias_l0"])
def test_a_small_call_sends_odd_numbers_where_the_reference_does(backend, dtype, poison, where):
    p = problem(Case(2, 3, 4, 9)).astype(dtype)
    named = arguments(p) | {where: arguments(p)[where].copy()}
    named[where][(1,) * named[where].ndim if named[where].ndim < 3 else (0, 1, 1)] = poison

    def run(backend, a):
        lstm = LSTM(4, 9, dtype=dtype)
        lstm.params.update({name: a[name] for name in p.params})
        y, (h_n, c_n) = lstm(a["x"], (a["h0"], a["c0"]))
        found = {"h_t": lstm.step(a["x"][0], (a["h0"], a["c0"]))[0], "y": y, "h_n": h_n, "c_n": c_n}
        return {name: backend.host(value) for name, value in found.items()}

    with REFERENCE.active():
        expected = run(REFERENCE, named)
    run(backend, on(backend, arguments(p)))
    found = run(backend, on(backend, named))
    assert_close("agreement", found, expected, backend=backend.name, dtype=dtype)


# What a first step finds: states of zeros, whose product with the weights may be left out; and what only seems to be.
FIRST_STEPS = {
    "zeros": {},
    "negative zeros": {"h0": -0.0},
    "a number at the end": {"h0": 0.5},
    "NaN at the end": {"h0": np.nan},
    "NaN among the weights": {"weight_hh_l0": np.nan},
    "a weight without end": {"weight_hh_l0": np.inf},
}


@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (1, 23), (3, 2), (40, 3), (4, 40)])
@pytest.mark.parametrize("what", FIRST_STEPS)
def test_a_first_step_from_zeros_is_as_the_equations_say(backend, dtype, what, steps, batch):
    rng = np.random.default_rng(0)
    x, inputs, hidden = rng.normal(size=(steps, batch, 7)).astype(dtype), 7, 21
    given = {"h0": np.zeros((1, batch, hidden), dtype), "c0": rng.normal(size=(1, batch, hidden)).astype(dtype)}
    if "h0" in FIRST_STEPS[what]:
        given["h0"][0, -1, -1] = FIRST_STEPS[what]["h0"]
        if what == "negative zeros":
            given["h0"][:] = -0.0
    params = LSTM(inputs, hidden, dtype=dtype, seed=1).params
    if "weight_hh_l0" in FIRST_STEPS[what]:
        params["weight_hh_l0"][-1, -1] = FIRST_STEPS[what]["weight_hh_l0"]

    def run(backend, freeze):
        lstm = LSTM(inputs, hidden, dtype=dtype)
        lstm.params.update({name: backend.array(value) for name, value in params.items()})
        lstm = lstm.freeze() if freeze else lstm
        x_here, *state = (backend.array(value) for value in (x, given["h0"], given["c0"]))
        found = {}
        for again in ("", " again"):  # what has run once may take a shorter way
            y, (h_n, c_n) = lstm(x_here, tuple(state))
            found |= {f"y{again}": y, f"h_n{again}": h_n, f"c_n{again}": c_n}
        found["y with a tape"] = lstm.forward(x_here, tuple(state))[0]
        return {name: backend.host(value) for name, value in found.items()}

    with REFERENCE.active():
        expected = run(REFERENCE, freeze=False)
    for freeze in (False, True)[: 1 if backend.name == "cuda" else 2]:  # only NumPy arrays can be frozen
        assert_close("agreement", run(backend, freeze), expected, backend=backend.name, dtype=dtype)


@pytest.mark.parametrize("poison", [*POISONS, 1e30])
def test_padding_goes_nowhere(backend, dtype, poison):
    p = problem(VALUES).astype(dtype)
    past = np.arange(VALUES.steps)[:, None] >= p.lengths
    x, dy = p.x.copy(), p.dy.copy()
    x[past], dy[past] = poison, poison
    assert past.any()
    found = solve(dataclasses.replace(p, x=x, dy=dy), backend)
    assert_identical(found, solve(p, backend))
    assert all(np.isfinite(value).all() for value in found.values())
    assert not found["y"][past].any() and not found["dx"][past].any()


@pytest.mark.parametrize("poison", POISONS)
def test_the_state_of_an_empty_sequence_is_handed_through(backend, dtype, poison):
    p = problem(VALUES).astype(dtype)
    clean = solve(p, backend)
    state = tuple(value.copy() for value in p.state)
    dstate = tuple(value.copy() for value in p.dstate)
    for value in (*state, *dstate):
        value[:, 1] = poison
    found = solve(dataclasses.replace(p, state=state, dstate=dstate), backend)
    assert_identical(rows_without(found, 1), rows_without(clean, 1))
    parameters = [name for name in found if name not in rows_without(found, 1)]
    assert_identical({name: found[name] for name in parameters}, {name: clean[name] for name in parameters})
    for name in ("h_n", "c_n", "dh0", "dc0"):
        np.testing.assert_array_equal(found[name][:, 1], np.full_like(found[name][:, 1], poison))
    assert not found["y"][:, 1].any() and not found["dx"][:, 1].any()


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-30, 1e-38, 1e5, 1e30])
def test_numbers_of_any_size_give_the_reference(backend, dtype, scale):
    # Gates saturate to 0 and 1 and tanh to 1 without overflow, and tiny inputs do not vanish before they must.
    p = problem(VALUES)
    p = dataclasses.replace(p, x=(p.x * scale).astype(np.float32).astype(np.float64))
    found, expected = solve(p.astype(dtype), backend), solve(p, REFERENCE)
    assert all(np.isfinite(value).all() for value in found.values())
    if dtype == np.float32 and scale > 1:
        # A saturated gate is 1 in float32 and 1 - 1e-20 in float64, so the gradients through it are 0 and 1e-20.
        found = {name: value for name, value in found.items() if not name.startswith("d")}
    if dtype == np.float32 and backend.flushes:
        least = 1e3 * np.finfo(dtype).tiny
        small = {name for name, value in found.items() if 0 < np.abs(expected[name]).max() < least}
        assert all(np.abs(found[name]).max() < least for name in small)
        found = {name: value for name, value in found.items() if name not in small}
    expected = {name: expected[name] for name in found}
    if scale > 1:
        gradients = {name: found.pop(name) for name in list(found) if name.startswith("d")}
        true = {name: expected.pop(name) for name in gradients}
        assert_close("saturated", gradients, true, backend=backend.name, dtype=dtype)
    assert_close("agreement", found, expected, backend=backend.name, dtype=dtype)
