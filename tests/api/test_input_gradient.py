"""Training without the gradient by the input: it is not computed, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
from harness import DROPOUT_SEED, Case, model_of, problem, results

from fastlstm import LSTM, RNN, ArgumentError
from fastlstm.functional import lstm_backward, lstm_forward
from fastlstm.training import Linear, Model

# The kernel for small batches, that for large ones, several layers, ragged batches, and cells with phases.
SIZES = {"steps": 9, "batch": 21, "inputs": 5, "hidden": 18}
CASES = [
    Case(steps=2, batch=1, inputs=3, hidden=6),
    Case(**SIZES),
    Case(**SIZES, layers=2, bidirectional=True, lengths="zeros", resets=True),
    Case(**SIZES, layers=3, dropout=0.3, batch_first=True, fields=(("coupled", True),)),
    Case(**SIZES, bidirectional=True, lengths="zeros", fields=(("layer_norm", True),)),
    Case(**SIZES, layers=2, fields=(("proj_size", 4), ("zoneout", (0.2, 0.1)))),
    Case(**SIZES, layers=2, bidirectional=True, fields=(("merge", "product"), ("block_size", 3))),
    Case(**SIZES, fields=(("peephole", True), ("block_size", 3))),
    Case(**SIZES, bidirectional=True, lengths=(0,) * SIZES["batch"]),
    Case(**SIZES | {"steps": 0}),
]


@pytest.mark.parametrize("keep_steps", [False, True], ids=["", "state gradients"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.sampled
def test_all_other_gradients_are_the_same_bits(backend, dtype, case, keep_steps):
    p, to = problem(case).astype(dtype), backend.array
    params = {name: to(value) for name, value in p.params.items()}
    found = []
    with backend.active():
        y, state, tape = lstm_forward(
            params, to(p.x), tuple(map(to, p.state)), p.lengths, batch_first=p.batch_first, **model_of(p),
            dropout_seed=DROPOUT_SEED, resets=None if p.resets is None else to(p.resets),
        )  # fmt: skip
        for wanted in (True, False):
            grads = lstm_backward(
                params, tape, to(p.dy), tuple(map(to, p.dstate)), keep_state_gradients=keep_steps, input_gradient=wanted
            )
            assert (grads.x is not None) == wanted
            given = grads if wanted else type(grads)(to(p.x), grads.state, grads.params, grads.steps)
            found.append(results(backend, y, *state, given))
            if keep_steps:
                found[-1] |= {"h steps": backend.host(grads.steps.h), "c steps": backend.host(grads.steps.c)}
    expected, actual = found
    for name in expected.keys() - {"dx"}:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


@pytest.mark.parametrize("kind", [LSTM, RNN])
def test_models_take_it_and_say_what_they_return(kind):
    model, x = kind(3, 4, seed=0), np.random.default_rng(1).normal(size=(5, 2, 3)).astype(np.float32)
    y, *_, tape = model.forward(x)
    grads = model.backward(tape, y, input_gradient=False)
    assert grads.x is None
    assert " x " not in repr(grads)
    for name, value in model.backward(tape, y).params.items():
        np.testing.assert_array_equal(grads.params[name], value)


@pytest.mark.parametrize("wanted", [None, 1, "no", np.ones(2)], ids=repr)
def test_what_is_no_flag_is_refused(wanted):
    model = LSTM(3, 4, seed=0)
    y, _, tape = model.forward(np.ones((5, 2, 3), np.float32))
    with pytest.raises(ArgumentError, match="input_gradient"):
        model.backward(tape, y, input_gradient=wanted)


@pytest.mark.parametrize("count", [1, 2])
def test_whole_models_ask_for_it_between_their_lstms_alone(count, monkeypatch):
    model = Model([LSTM(4, 4, seed=number) for number in range(count)], Linear(4, 1, seed=1))
    asked, backward = [], LSTM.backward

    def noted(self, *given, **options):
        asked.append(options["input_gradient"])
        return backward(self, *given, **options)

    monkeypatch.setattr(LSTM, "backward", noted)
    prediction, tape = model.forward(np.ones((5, 2, 4), np.float32))
    model.backward(tape, np.ones_like(prediction))
    assert asked == [True, False][-count:]
