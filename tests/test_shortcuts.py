"""Calls of one layer skip most checks in Python: what they give, or raise, is what the long way does, to the bit."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from layouts import LAYOUTS, lay_out
from tolerances import assert_identical

import fastlstm
from fastlstm import LSTM
from fastlstm.backends.plain_arrays import as_plain

CPU = fastlstm.dispatch.backend_named("cpu")
# T, B, I, H: short calls, at whose shapes the kernels look, and longer ones
SIZES = [
    (1, 1, 5, 3),
    (1, 1, 32, 64),
    (1, 8, 7, 33),
    (4, 2, 9, 20),
    (16, 1, 3, 17),
    (17, 1, 3, 17),
    (2, 2, 300, 400),  # a short call only on the way back
    (9, 1, 300, 400),
    (30, 20, 9, 40),
]


@pytest.fixture(autouse=True)
def on_the_cpu():
    """Only there are shortcuts."""
    with fastlstm.use_backend("cpu"):
        yield


@pytest.fixture
def watched(monkeypatch):
    """Note by name whether the shortcuts of training were taken when they were tried last."""
    found = {}

    def watch(name, shortcut):
        def take(*arguments):
            result = shortcut(*arguments)
            found[name] = result is not None
            return result

        monkeypatch.setattr(CPU, name, take)

    watch("shortcut_forward", CPU.shortcut_forward)
    watch("shortcut_backward", CPU.shortcut_backward)
    return found


@contextlib.contextmanager
def the_long_way():
    """Have no call take a shortcut."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("shortcut", "shortcut_forward", "shortcut_backward"):
            patch.setattr(CPU, name, lambda *_: None)
        yield


def problem(size, dtype, *, bias=True, stated=True):
    """A model, and x, a state or None, and dy for it."""
    steps, batch, inputs, hidden = size
    rng = np.random.default_rng(size)
    lstm = LSTM(inputs, hidden, bias=bias, dtype=dtype, seed=0)
    if bias:
        lstm.params["bias_l0"][:] = rng.normal(size=4 * hidden)
    x, dy = rng.normal(size=(steps, batch, inputs)).astype(dtype), rng.normal(size=(steps, batch, hidden)).astype(dtype)
    state = tuple(rng.normal(size=(2, 1, batch, hidden)).astype(dtype)) if stated else None
    return lstm, x, state, dy


def train(lstm, x, state, dy):
    """Everything a forward and a backward pass give."""
    y, (h_n, c_n), tape = lstm.forward(x, state)
    grads = lstm.backward(tape, dy)
    return {"y": y, "h_n": h_n, "c_n": c_n, "dx": grads.x, "dh0": grads.state[0], "dc0": grads.state[1]} | {
        f"d{name}": value for name, value in grads.params.items()
    }


@pytest.mark.parametrize("stated", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_training_gives_the_bits_of_the_long_way(dtype, size, bias, stated, watched):
    given = problem(size, dtype, bias=bias, stated=stated)
    with the_long_way():
        expected = train(*given)  # which compiles what the shortcuts need
    before = {"x": given[1].copy(), "dy": given[3].copy()} | {k: v.copy() for k, v in given[0].params.items()}
    for _ in range(2):
        found = train(*given)
        assert watched == {"shortcut_forward": True, "shortcut_backward": True}
        assert list(found) == list(expected)
        assert_identical(found, expected)
        assert all(value.flags.carray for value in found.values())
    assert_identical({"x": given[1], "dy": given[3]} | given[0].params, before)


@pytest.mark.parametrize("size", [(2, 2, 5, 19), (20, 3, 5, 19)], ids=str)
def test_the_gradients_of_a_frozen_model_take_the_short_way(dtype, size, watched):
    lstm, x, state, dy = problem(size, dtype)
    given = lstm.freeze(), x, state, dy
    with the_long_way():
        expected = train(*given)
    assert_identical(train(*given), expected)
    assert watched == {"shortcut_forward": False, "shortcut_backward": True}


@pytest.mark.parametrize("size", [(0, 3, 4, 5), (3, 0, 4, 5)], ids=str)
def test_of_nothing_there_is_no_short_way(dtype, size, watched):
    lstm, x, state, dy = problem(size, dtype)
    found = train(lstm, x, state, dy)
    assert watched == {"shortcut_forward": False, "shortcut_backward": False}
    assert_identical({"h_n": found["h_n"], "c_n": found["c_n"]}, dict(zip(("h_n", "c_n"), state, strict=True)))


@pytest.mark.parametrize("size", [(2, 2, 5, 19), (20, 3, 5, 19)], ids=str)
def test_a_tape_keeps_what_its_backward_pass_needs(dtype, size, watched):
    lstm, x, state, dy = problem(size, dtype)
    expected = train(lstm, x, state, dy)
    y, end, tape = lstm.forward(x, state)
    for array in (y, *state, *end):
        array[:] = np.nan  # nothing of which belongs to the tape
    for _ in range(2):
        grads = lstm.backward(tape, dy)
        assert watched["shortcut_backward"]
        found = {"dx": grads.x, "dh0": grads.state[0], "dc0": grads.state[1]}
        found |= {f"d{name}": value for name, value in grads.params.items()}
        assert_identical(found, {name: expected[name] for name in found})
        for array in found.values():
            array[:] = np.nan


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["x", "dy", "h0", "c0", "weight_ih_l0", "weight_hh_l0", "bias_l0"])
@pytest.mark.parametrize("steps", [2, 20])
def test_an_array_may_lie_in_memory_as_it_likes(dtype, steps, which, layout, watched):
    lstm, x, (h0, c0), dy = problem((steps, 3, 4, 18), dtype)
    named = {"x": x, "dy": dy, "h0": h0, "c0": c0} | lstm.params
    named[which] = lay_out(layout, named[which])

    def run(given):
        lstm.params = {name: given[name] for name in lstm.params}
        return train(lstm, given["x"], (given["h0"], given["c0"]), given["dy"])

    with the_long_way():
        expected = run({name: np.array(value, dtype, order="C") for name, value in named.items()})
    assert_identical(run(named), expected)
    # A part of an output is what is given most often.
    often = which in ("x", "dy") and layout not in ("foreign", "mapped")
    assert not often or watched == {"shortcut_forward": True, "shortcut_backward": True}


@pytest.mark.parametrize("layout", ["foreign", "unaligned", "read_only", "fortran", "mapped"])
@pytest.mark.parametrize("which", ["h0", "c0", "weight_ih_l0", "weight_hh_l0", "bias_l0"])
def test_a_short_call_hands_no_kernel_an_array_that_is_not_plain(dtype, which, layout):
    lstm, x, (h0, c0), _ = problem((2, 3, 4, 18), dtype)
    lstm(x, (h0, c0))
    assert CPU.shortcut(lstm.cell, lstm.params, x, (h0, c0)) is not None
    named = {"h0": h0, "c0": c0} | lstm.params
    named[which] = lay_out(layout, named[which])
    params = {name: named[name] for name in lstm.params}
    found = CPU.shortcut(lstm.cell, params, x, (named["h0"], named["c0"]))
    as_it_was = layout == "fortran" and which == "bias_l0"  # of one axis, both orders are the same
    assert (found is not None) == as_it_was


@pytest.mark.parametrize("layout", ["foreign", "unaligned", "read_only", "fortran", "negative", "mapped"])
def test_what_becomes_plain_is_a_copy_of_native_numbers(dtype, layout):
    given = lay_out(layout, np.random.default_rng(0).normal(size=(3, 4, 5)).astype(dtype))
    before = given.tobytes()
    plain = as_plain(given)
    assert type(plain) is np.ndarray and plain.dtype == dtype and plain.flags.carray
    assert not np.shares_memory(plain, given) and given.tobytes() == before
    np.testing.assert_array_equal(plain, given)
    assert as_plain(plain) is plain


def _params(name, value):
    def change(given):
        given["params"][name] = value(given["params"].get(name))

    return change


def _argument(name, value):
    def change(given):
        given[name] = value(given[name])

    return change


def _other(array):
    """The other dtype that models may have: no kernel would find anything wrong."""
    return array.astype(np.float64 if array.dtype == np.float32 else np.float32)


BAD = {
    "x of the other dtype": _argument("x", _other),
    "h0 of the other dtype": _argument("state", lambda state: (_other(state[0]), state[1])),
    "dy of the other dtype": _argument("dy", _other),
    "weight_ih of the other dtype": _params("weight_ih_l0", _other),
    "x of another dtype": _argument("x", lambda x: x.astype(np.float16)),
    "x a list": _argument("x", lambda x: x.tolist()),
    "x masked": _argument("x", np.ma.masked_array),
    "x too wide": _argument("x", lambda x: np.concatenate([x, x], axis=2)),
    "a state that is a list of wrong things": _argument("state", lambda state: [state[0], 3]),
    "a state of three": _argument("state", lambda state: (*state, state[0])),
    "h0 of another batch": _argument("state", lambda state: (state[0][:, :1], state[1])),
    "c0 of another batch": _argument("state", lambda state: (state[0], state[1][:, :1])),
    "c0 of another dtype": _argument("state", lambda state: (state[0], state[1].astype(np.float16))),
    "h0 masked": _argument("state", lambda state: (np.ma.masked_array(state[0]), state[1])),
    "no dy": _argument("dy", lambda dy: None),
    "dy a list": _argument("dy", lambda dy: dy.tolist()),
    "dy masked": _argument("dy", np.ma.masked_array),
    "dy of another dtype": _argument("dy", lambda dy: dy.astype(np.float16)),
    "dy of other axes, as many numbers": _argument("dy", lambda dy: dy.swapaxes(0, 1).copy()),
    "dy without a batch": _argument("dy", lambda dy: dy[:, 0]),
    "a weight too few": lambda given: given["params"].pop("weight_hh_l0"),
    "no bias": lambda given: given["params"].pop("bias_l0"),
    "a parameter too many": _params("bias_l1", lambda _: np.zeros(3)),
    "another name": lambda given: given["params"].update(bias=given["params"].pop("bias_l0")),
    "weight_ih transposed": _params("weight_ih_l0", lambda value: value.T.copy()),
    "weight_hh too small": _params("weight_hh_l0", lambda value: value[:-4].copy()),
    "weight_hh of another dtype": _params("weight_hh_l0", lambda value: value.astype(np.float16)),
    "weight_ih masked": _params("weight_ih_l0", np.ma.masked_array),
    "bias too short": _params("bias_l0", lambda value: value[:-1].copy()),
    "bias of two axes": _params("bias_l0", lambda value: value[None]),
    "bias a list": _params("bias_l0", lambda value: value.tolist()),
}


OF_FORWARD = [name for name in BAD if "dy" not in name.split()[:2]]
OF_BACKWARD = [name for name in BAD if name.split()[0] not in ("x", "h0", "c0") and "state" not in name]


@pytest.mark.parametrize(
    ("change", "late"), [*((name, False) for name in OF_FORWARD), *((name, True) for name in OF_BACKWARD)], ids=str
)
@pytest.mark.parametrize("steps", [3, 30])
def test_what_is_wrong_is_said_as_on_the_long_way(dtype, steps, change, late):
    """`late`: all was right in the forward pass."""
    lstm, x, state, dy = problem((steps, 2, 7, 5), dtype)

    def run():
        given = {"params": dict(lstm.params), "x": x, "state": state, "dy": dy}
        model = LSTM(7, 5, dtype=dtype)
        model.params = given["params"]
        tape = model.forward(x, state)[2] if late else None
        BAD[change](given)
        if late:
            model.backward(tape, given["dy"])
        else:
            model.forward(given["x"], given["state"])

    with the_long_way():
        lstm.backward(lstm.forward(x, state)[2], dy)
        with pytest.raises(fastlstm.FastLSTMError) as expected:
            run()
    with pytest.raises(expected.type) as found:
        run()
    assert str(found.value) == str(expected.value)
