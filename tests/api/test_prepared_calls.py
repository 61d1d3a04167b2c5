"""Prepared calls: a call whose signature is known skips most checks, and gives what the first call would."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from prepared_calls import CPU, Model, frozen_if, gradients, host, infer, needs_cpu, step, train
from tolerances import assert_identical

import fastlstm
from fastlstm import LSTM, calls, checks
from fastlstm.functional import lstm_backward, lstm_forward


def train_saving_memory(lstm, given):
    return train(lstm, given, recompute=True)


def train_to_the_states(lstm, given):
    """Gradients by the final states alone, by both and the output, and by one of them."""
    lstm.params = given.params
    _, state, tape = lstm.forward(given.x, given.state, given.lengths)
    found = {}
    for dy, dstate in ((None, state), (given.dy, state), (None, (None, state[1])), (given.dy, (state[0], None))):
        found |= {f"{name} {len(found)}": value for name, value in gradients(lstm.backward(tape, dy, dstate)).items()}
    return found


def as_functions(lstm, given):
    options = {"batch_first": lstm.batch_first, "dropout": lstm.cell.dropout}
    y, (h_n, c_n), tape = lstm_forward(given.params, given.x, given.state, given.lengths, **options)
    return {"y": y, "h_n": h_n, "c_n": c_n} | gradients(lstm_backward(given.params, tape, given.dy))


WAYS = {
    "inference": infer,
    "training": train,
    "recompute": train_saving_memory,
    "gradients by states": train_to_the_states,
    "step": step,
    "functions": as_functions,
}
MODELS = {
    "plain, short": Model(3, 2, 5, 19),
    "plain, long": Model(20, 3, 5, 19),
    "one step": Model(1, 1, 5, 8),
    "zeros": Model(3, 2, 5, 19, stated=False),
    "no bias": Model(3, 2, 5, 19, {"bias": False}),
    "batch first": Model(20, 3, 5, 19, batch_first=True),
    "unbatched": Model(4, 1, 5, 19, batched=False),
    "unbatched, batch first": Model(20, 1, 5, 8, batch_first=True, batched=False),
    "layers": Model(3, 2, 5, 19, {"num_layers": 3}),
    "layers, long": Model(20, 3, 5, 19, {"num_layers": 2}),
    "bidirectional": Model(12, 3, 5, 19, {"bidirectional": True}),
    "bidirectional layers, batch first": Model(12, 3, 5, 8, {"num_layers": 2, "bidirectional": True}, True),
    "ragged": Model(12, 4, 5, 19, ragged=True),
    "ragged bidirectional layers": Model(12, 4, 5, 8, {"num_layers": 2, "bidirectional": True}, ragged=True),
    "peepholes": Model(12, 3, 5, 19, {"peephole": True}),
    "peepholes, step": Model(1, 1, 5, 19, {"peephole": True, "num_layers": 2}),
    "frozen": Model(20, 3, 5, 19, frozen=True),
    "frozen, one step": Model(1, 2, 5, 19, {"num_layers": 2}, frozen=True),
    "frozen, unbatched": Model(2, 1, 5, 19, batched=False, frozen=True),
    "projection": Model(3, 2, 5, 19, {"proj_size": 7}),
    "layer norm, one step": Model(1, 2, 5, 19, {"layer_norm": True, "num_layers": 2}),
    "layer norm, long, batch first": Model(20, 3, 5, 19, {"layer_norm": True}, batch_first=True),
    "frozen layer norm, unbatched": Model(1, 1, 5, 19, {"layer_norm": True}, batched=False, frozen=True),
    "frozen projection, ragged": Model(12, 4, 5, 19, {"proj_size": 7, "num_layers": 2}, ragged=True, frozen=True),
    "frozen projection, one step, zeros": Model(1, 2, 5, 19, {"proj_size": 8}, frozen=True, stated=False),
    "frozen peepholes, ragged": Model(12, 4, 5, 8, {"peephole": True, "bidirectional": True}, ragged=True, frozen=True),
}
# Whatever the call, these have to be looked at: they are no arrays of the model's kind.
ALWAYS = {"lengths", "flag", "dropout_seed"}


@pytest.fixture
def entered(monkeypatch):
    """Note the names of the checks that are entered."""
    found = []
    for name in checks.__all__:
        check = getattr(checks, name)
        monkeypatch.setattr(
            checks,
            name,
            lambda *given, _name=name, _check=check, **named: found.append(_name) or _check(*given, **named),
        )
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.sampled
def test_the_second_call_enters_no_checks_and_gives_what_a_first_one_gives(backend, dtype, name, way, entered):
    model, run = MODELS[name], WAYS[way]
    if model.frozen and not backend.is_numpy:
        pytest.skip("only models of NumPy arrays can be frozen")
    if way == "step" and model.options.get("bidirectional"):
        pytest.skip("a bidirectional model takes no steps")
    calls._cells.clear()
    lstm = model.new(dtype)
    given = [frozen_if(model, lstm, model.given(dtype, backend, seed)) for seed in (0, 1)]
    entered.clear()
    run(lstm, given[0])
    assert {"params", "array"} <= set(entered), "the first call is checked"
    for arguments in (*given, given[0]):
        entered.clear()
        found = run(lstm, arguments)
        needed = {"lengths"} if model.ragged and way != "step" else set()
        assert set(entered) <= ALWAYS and needed <= set(entered)
        entered.clear()
        calls._cells.clear()
        expected = run(model.new(dtype), arguments)  # each first call is checked
        assert "array" in entered
        assert list(found) == list(expected)
        assert_identical(host(backend, found), host(backend, expected))
        # Returned arrays belong to the caller; with other axes they are views.
        assert not (model.batched and not model.batch_first) or all(v.flags.c_contiguous for v in found.values())


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


@needs_cpu
@pytest.mark.parametrize("stated", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_calls_of_any_size_are_bit_identical_to_a_first_call(dtype, size, bias, stated):
    model = Model(*size, {"bias": bias}, stated=stated)
    given = model.given(dtype, CPU)
    before = copy.deepcopy(given)
    with CPU.active():
        expected, lstm = train(model.new(dtype), given), model.new(dtype)
        assert expected["dx"].shape == given.x.shape
        for _ in range(3):
            found = train(lstm, given)
            assert_identical(found, expected)
            assert all(value.flags.carray for value in found.values())
    assert_identical({"x": given.x, "dy": given.dy} | given.params, {"x": before.x, "dy": before.dy} | before.params)


@pytest.mark.parametrize("size", [(0, 3, 4, 5), (3, 0, 4, 5)], ids=str)
def test_of_nothing_the_second_call_gives_nothing_too(backend, dtype, size):
    model = Model(*size)
    given, lstm = model.given(dtype, backend), model.new(dtype)
    for _ in range(2):
        found = host(backend, train(lstm, given))
        assert_identical(
            {"h_n": found["h_n"], "c_n": found["c_n"]},
            {name: backend.host(array) for name, array in zip(("h_n", "c_n"), given.state, strict=True)},
        )
        assert not any(value.any() for name, value in found.items() if name.startswith("dw") or name == "dbias_l0")


@pytest.mark.parametrize("size", [(2, 2, 5, 19), (20, 3, 5, 19)], ids=str)
def test_a_tape_keeps_what_its_backward_pass_needs(backend, dtype, size):
    model = Model(*size)
    given, lstm = model.given(dtype, backend), model.new(dtype)
    expected = host(backend, train(lstm, given))
    y, end, tape = lstm.forward(given.x, given.state)
    for array in (y, *given.state, *end):
        array[...] = np.nan  # nothing of which belongs to the tape
    for _ in range(2):
        found = gradients(lstm.backward(tape, given.dy))
        on_host = host(backend, found)
        assert_identical(on_host, {name: expected[name] for name in found})
        for array in found.values():
            array[...] = np.nan


# --- what is kept --------------------------------------------------------------------------------------------------


def test_calls_are_kept_for_a_bounded_number_of_signatures(backend):
    lstm = LSTM(2, 3, seed=0)
    params = {name: backend.array(value) for name, value in lstm.params.items()}
    lstm.params = params
    for steps in range(1, 2 * calls._MOST_CALLS + 9):
        lstm(backend.array(np.ones((steps, 1, 2), np.float32)))
        assert len(lstm.cell.calls) <= calls._MOST_CALLS
    assert len(lstm.cell.calls) > 1


def test_cells_of_the_functions_are_kept_for_a_bounded_number_of_models():
    with fastlstm.use_backend("reference"):
        for hidden in range(1, 2 * calls._MOST_CELLS + 9):
            lstm_forward(LSTM(1, hidden).params, np.ones((1, 1, 1), np.float32))
            assert len(calls._cells) <= calls._MOST_CELLS


@pytest.mark.parametrize("again", [copy.deepcopy, lambda cell: pickle.loads(pickle.dumps(cell))])
def test_prepared_calls_are_not_copied_or_pickled_with_a_cell(backend, dtype, again):
    model = Model(3, 2, 5, 19)
    given, lstm = model.given(dtype, backend), model.new(dtype)
    expected = infer(lstm, given)
    other = again(lstm.cell)
    assert other == lstm.cell and hash(other) == hash(lstm.cell) and "calls" not in vars(other)
    assert lstm.cell.calls and lstm.cell == model.new(dtype).cell
    copied = model.new(dtype)
    copied.cell = other
    for _ in range(2):
        assert_identical(host(backend, infer(copied, given)), host(backend, expected))
