"""What ``LSTM.unroll`` refuses, before any work."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from unroll_tools import given, model_of

from fastlstm import ArgumentError, ArrayTypeError, DTypeError, ShapeError


def test_a_step_too_many_is_refused(backend):
    lstm = model_of(backend, np.float32, 3, 6)
    x, *_ = given(lstm, backend, 3, 2)
    run = lstm.unroll(steps=2, batch=2)
    ys = [run.step(x[t]) for t in range(2)]
    before = [backend.host(part) for part in run.state]
    with pytest.raises(ArgumentError, match="room for 2 steps"):
        run.step(x[2])
    assert run.taken == 2
    for part, now in zip(before, run.state, strict=True):
        np.testing.assert_array_equal(backend.host(now), part)
    back = run.backward()
    with pytest.raises(ArgumentError, match="way back has begun"):
        run.step(x[2])
    with pytest.raises(ArgumentError, match="begun already"):
        run.backward()
    for y in ys:
        with pytest.raises(ArgumentError, match="have not been taken back"):
            back.finish()
        back.step(y)
    with pytest.raises(ArgumentError, match="all 2 steps"):
        back.step(ys[0])
    back.finish()


@pytest.mark.parametrize("when", ["before the way back", "before its end"])
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_parameters_that_changed_are_refused(backend, when, how):
    lstm = model_of(backend, np.float32, 3, 6)
    x, _, dy, _ = given(lstm, backend, 1, 2)

    def change():
        if how == "in place":
            lstm.params["bias_l0"][...] += 1
        else:
            lstm.params["bias_l0"] = lstm.params["bias_l0"] + 1

    run = lstm.unroll(steps=1, batch=2)
    run.step(x[0])
    if when == "before the way back":
        change()
        with pytest.raises(ArgumentError, match="bias_l0 has changed"):
            run.backward()
        return
    back = run.backward()
    back.step(dy[0])
    change()
    with pytest.raises(ArgumentError, match="bias_l0 has changed"):
        back.finish()


def test_parameters_of_nan_have_not_changed(backend):
    lstm = model_of(backend, np.float32, 3, 6)
    lstm.params["bias_l0"][0] = np.nan
    lstm.unroll(steps=1, batch=2).backward().finish()


@pytest.mark.parametrize("options", [{}, {"zoneout": (0.1, 0.1)}], ids=str)
def test_a_run_is_neither_pickled_nor_copied(backend, options):
    lstm = model_of(backend, np.float32, 3, 6, **options)
    x, _, dy, _ = given(lstm, backend, 1, 2)
    run = lstm.unroll(steps=1, batch=2)
    run.step(x[0])
    back = run.backward()
    for each, name in ((run, "run"), (back, "runbackward")):
        for copied in (pickle.dumps, copy.copy, copy.deepcopy, lambda one: copy.deepcopy({"one": one})):
            with pytest.raises(ArgumentError, match=f"a {name} belongs to the process"):
                copied(each)
    back.step(dy[0])
    back.finish()


def test_a_bidirectional_model_is_refused(backend):
    lstm = model_of(backend, np.float32, 3, 6, bidirectional=True)
    with pytest.raises(ArgumentError, match="bidirectional"):
        lstm.unroll(steps=3, batch=2)


def test_a_model_backwards_in_time_is_refused(backend):
    lstm = model_of(backend, np.float32, 3, 6, reverse=True)
    with pytest.raises(ArgumentError, match="a model with reverse=True cannot"):
        lstm.unroll(steps=3, batch=2)


@pytest.mark.parametrize("sizes", [(10**15, 10**6), (10**15, 100), (10**17, 1), (1, 10**17), (2**62, 2**62)], ids=str)
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"proj_size": 2}], ids=str)
def test_a_run_that_no_machine_can_address_is_refused(backend, sizes, options):
    lstm = model_of(backend, np.float32, 3, 6, 2, **options)
    with pytest.raises(ArgumentError, match="steps and batch are too large"):
        lstm.unroll(steps=sizes[0], batch=sizes[1])


@pytest.mark.parametrize("name", ["steps", "batch"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "3", 10**400], ids=lambda value: repr(value)[:8])
def test_odd_sizes_are_refused(backend, name, value):
    lstm = model_of(backend, np.float32, 3, 6)
    with pytest.raises(ArgumentError, match=name):
        lstm.unroll(**({"steps": 2, "batch": 2} | {name: value}))


def test_odd_arrays_are_refused_before_any_work(backend):
    lstm = model_of(backend, np.float32, 3, 6)
    x, state, dy, dstate = given(lstm, backend, 2, 2)
    with pytest.raises(ShapeError, match="h0"):
        lstm.unroll((state[0][:, :1], state[1]), steps=2, batch=2)
    with pytest.raises(ArgumentError, match="pair"):
        lstm.unroll(state[0], steps=2, batch=2)
    run = lstm.unroll(state, steps=2, batch=2)
    wrong = [(x[0, :1], ShapeError), (x[0, 0], ShapeError), (x[0].astype(np.float64), DTypeError),
             (x[0].tolist(), ArrayTypeError), (None, ArrayTypeError)]  # fmt: skip
    for value, error in wrong:
        with pytest.raises(error, match="x_t"):
            run.step(value)
    assert run.taken == 0
    run.step(x[0])
    with pytest.raises(ShapeError, match="dh_n"):
        run.backward((dstate[0][:, :1], dstate[1]))
    back = run.backward(dstate)
    for value, error in [(dy[0, :1], ShapeError), (dy[0].astype(np.float64), DTypeError), ([1.0], ArrayTypeError)]:
        with pytest.raises(error, match="dh_t"):
            back.step(value)
    assert back.left == 1
