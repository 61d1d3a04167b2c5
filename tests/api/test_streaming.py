"""Any split of a sequence into steps and partial calls gives the whole sequence's result, and its gradients."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from harness import Case, problem, solve
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close, assert_identical

from fastlstm import LSTM, RNN, ArgumentError
from fastlstm.functional import lstm_backward, lstm_forward

STEPS = 12
SIZES = st.sampled_from([(1, 1, 1, 1), (3, 5, 7, 1), (2, 17, 4, 2), (13, 8, 33, 3), (7, 3, 16, 2), (4, 70, 64, 1)])
CUTS = st.sets(st.integers(1, STEPS - 1))  # where a part ends and the next begins


def parts_of(cuts):
    """Return the slices of time between the cuts."""
    edges = [0, *sorted(cuts), STEPS]
    return [slice(begin, end) for begin, end in itertools.pairwise(edges)]


def model_of(p, backend):
    lstm = LSTM(p.cell.input_size, p.cell.hidden_size, p.cell.num_layers, dtype=p.cell.dtype)
    lstm.params.update({name: backend.array(value) for name, value in p.params.items()})
    return lstm


@given(sizes=SIZES, cuts=CUTS, stepped=st.sets(st.integers(0, STEPS - 1)), seed=st.integers(0, 99))
def test_any_split_into_steps_and_calls_gives_the_whole(backend, dtype, sizes, cuts, stepped, seed):
    batch, inputs, hidden, layers = sizes
    p = problem(Case(STEPS, batch, inputs, hidden, layers, seed=seed)).astype(dtype)
    lstm, state, y = model_of(p, backend), tuple(map(backend.array, p.state)), []
    for k, part in enumerate(parts_of(cuts)):
        if k in stepped:  # this part step by step, the others in one call each
            for t in range(part.start, part.stop):
                h, state = lstm.step(backend.array(p.x[t]), state)
                y.append(backend.host(h)[None])
        else:
            part_y, state = lstm(backend.array(p.x[part]), state)
            y.append(backend.host(part_y))
    found = {"y": np.concatenate(y), "h_n": backend.host(state[0]), "c_n": backend.host(state[1])}
    whole, (h_n, c_n) = lstm(backend.array(p.x), tuple(map(backend.array, p.state)))
    expected = {"y": backend.host(whole), "h_n": backend.host(h_n), "c_n": backend.host(c_n)}
    assert_close("streaming", found, expected, backend=backend.name, dtype=dtype)


def test_a_stream_starts_at_zero_and_leaves_its_states_alone(backend, dtype):
    x = backend.array(np.ones((4, 3), dtype))
    lstm = model_of(problem(Case(1, 4, 3, 5, 2)).astype(dtype), backend)
    zeros = backend.array(np.zeros((2, 4, 5), dtype))
    _, first = lstm.step(x)
    _, same = lstm.step(x, (zeros, zeros))
    kept = [backend.host(value).copy() for value in first]
    h, second = lstm.step(x, first)
    for a, b, c in zip(first, same, kept, strict=True):
        np.testing.assert_array_equal(backend.host(a), backend.host(b))
        np.testing.assert_array_equal(backend.host(a), c)
    np.testing.assert_array_equal(backend.host(h), backend.host(second[0])[-1])
    assert not backend.host(zeros).any()


def test_one_sequence_steps_without_a_batch(backend, dtype):
    p = problem(Case(1, 1, 3, 5, 2)).astype(dtype)
    lstm = model_of(p, backend)
    h, (h_n, c_n) = lstm.step(backend.array(p.x[0, 0]), tuple(backend.array(value[:, 0]) for value in p.state))
    batched, (batched_h, batched_c) = lstm.step(backend.array(p.x[0]), tuple(map(backend.array, p.state)))
    assert h.shape == (5,) and h_n.shape == c_n.shape == (2, 5)
    for alone, row in ((h, batched[0]), (h_n, batched_h[:, 0]), (c_n, batched_c[:, 0])):
        np.testing.assert_array_equal(backend.host(alone), backend.host(row.copy()))


def solve_in_parts(p, backend, cuts):
    """Run forward part by part with carried states, then backward with carried gradients; all results."""
    params = {name: backend.array(value) for name, value in p.params.items()}
    state, done = tuple(map(backend.array, p.state)), []
    for part in parts_of(cuts):
        lengths = None if p.lengths is None else np.clip(p.lengths - part.start, 0, part.stop - part.start)
        y, state, tape = lstm_forward(params, backend.array(p.x[part]), state, lengths)
        done.append((part, y, tape))
    dstate, dx = tuple(map(backend.array, p.dstate)), {}
    total = {name: np.zeros_like(value) for name, value in p.params.items()}
    for part, _, tape in reversed(done):
        grads = lstm_backward(params, tape, backend.array(p.dy[part]), dstate)
        dstate, dx[part.start] = grads.state, backend.host(grads.x)
        for name, value in grads.params.items():
            total[name] += backend.host(value)
    found = {"y": np.concatenate([backend.host(y) for _, y, _ in done])}
    found |= {"dx": np.concatenate([dx[key] for key in sorted(dx)])}
    ends = zip(("h_n", "c_n", "dh0", "dc0"), (*state, *dstate), strict=True)
    return found | {name: backend.host(value) for name, value in ends} | {f"d{k}": v for k, v in total.items()}


@given(sizes=SIZES, cuts=CUTS, ragged=st.booleans(), seed=st.integers(0, 99))
def test_chunks_without_truncation_give_the_gradients_of_the_whole(backend, dtype, sizes, cuts, ragged, seed):
    batch, inputs, hidden, layers = sizes
    case = Case(STEPS, batch, inputs, hidden, layers, seed=seed, lengths="zeros" if ragged else None)
    p = problem(case).astype(dtype)
    assert_close(
        "chunked gradients", solve_in_parts(p, backend, cuts), solve(p, backend), backend=backend.name, dtype=dtype
    )


def test_one_part_is_bit_identical_to_the_whole(backend, dtype):
    p = problem(Case(STEPS, 3, 2, 5, 2, lengths="zeros")).astype(dtype)
    assert_identical(solve_in_parts(p, backend, ()), solve(p, backend))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_only_one_direction_can_step(backend, bidirectional):
    lstm = LSTM(2, 3, bidirectional=bidirectional, seed=0)
    lstm.params.update({name: backend.array(value) for name, value in lstm.params.items()})
    x = backend.array(np.ones((4, 2), np.float32))
    if not bidirectional:
        assert lstm.step(x)[0].shape == (4, 3)
        return
    with pytest.raises(ValueError, match="bidirectional"):
        lstm.step(x)


@pytest.mark.parametrize("fields", [{"bidirectional": True}, {"reverse": True}], ids=str)
@pytest.mark.parametrize("kind", [LSTM, RNN])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_that_runs_backwards_in_time_takes_no_steps(backend, kind, fields, frozen):
    if frozen and not backend.is_numpy:
        pytest.skip("only models of NumPy arrays can be frozen")
    model = kind(3, 4, seed=0, **fields)
    model.params.update({name: backend.array(value) for name, value in model.params.items()})
    model = model.freeze() if frozen else model
    x = backend.array(np.ones((2, 3), np.float32))
    for _ in range(2):  # the second call may be prepared
        with pytest.raises(ArgumentError, match="cannot be run step by step"):
            model.step(x)
