"""Each backend against the float64 reference, over the sizes and flags at which a kernel can go wrong."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import os
import subprocess
import sys

import cuda_row
import numpy as np
import pytest
from harness import DROPOUT_SEED, REFERENCE, Arrays, Case, problem, results, solve
from scalar_lstm import solve_forward
from tolerances import assert_close, assert_identical

from fastlstm import LSTM
from fastlstm.backends.base import Backend, Dropout
from fastlstm.backends.layers import dropout_mask
from fastlstm.functional import lstm_backward, lstm_forward

LANES = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 100)  # H: around the lane counts of a vector, and beyond a tile
TILE_ROWS = tuple(range(1, 14))  # B: every remainder of a tile of 6 rows, with one and two whole tiles before it
FEW_ROWS = ((1, 1), (4, 1), (1, 4), (2, 2), (5, 1), (1, 8), (3, 3))  # T, B: where weights are not rearranged, and above
FLAGS = tuple(itertools.product((1, 2), (False, True), (False, True), (False, True), (None, "zeros")))

CASES = [
    *(Case(3, 5, 7, hidden, 2, hidden % 2 == 0, lengths="zeros" if hidden % 3 else None) for hidden in LANES),
    *(Case(2, 3, inputs, 5, bidirectional=inputs % 2 == 1) for inputs in LANES),
    *(Case(4, batch, 3, 17, 1, batch % 2 == 0, lengths=None if batch % 3 else "zeros") for batch in TILE_ROWS),
    *(Case(3, batch, 5, 33, 2, lengths="zeros", dropout=0.3) for batch in (6, 12, 13)),
    # More rows than go over a slice of the weights at a time, and more inputs and units than a slice has.
    *(Case(2, *sizes) for sizes in ((131, 3, 9), (2, 200, 5), (3, 128, 129), (2, 5, 261), (67, 130, 40))),
    *(Case(*sizes) for sizes in itertools.product((1, 2), repeat=4)),
    *(Case(*rows, 11, hidden, 2, bias=hidden != 33) for rows in FEW_ROWS for hidden in (5, 33, 64)),
    *(
        Case(5, 4, 3, 6, layers, bidirectional, bias, batch_first, state, lengths, dropout=0.25 if layers > 1 else 0.0)
        for layers, bidirectional, bias, (batch_first, state), lengths in itertools.product(
            (1, 2), (False, True), (False, True), ((False, True), (True, False)), (None, "zeros")
        )
    ),
    *(Case(steps, 3, 2, 5, 2, True, lengths=lengths) for steps in (1, 70) for lengths in (None, "zeros")),
    *(Case(0, 3, 2, 5, layers, True) for layers in (1, 2)),  # no time
    *(Case(4, 0, 2, 5, layers, True) for layers in (1, 2)),  # no sequences
    Case(0, 0, 2, 5),
    Case(0, 3, 2, 5, lengths=(0, 0, 0)),
    Case(4, 3, 2, 5, 2, True, lengths=(0, 0, 0), dropout=0.5),
    Case(4, 3, 2, 5, 2, True, lengths=(4, 4, 4)),
    *(Case(6, 3, 40, 12, layers, one_hot=True, state=False) for layers in (1, 2)),
    Case(40, 1, 3, 16),
    Case(2, 70, 9, 24, bidirectional=True, lengths="zeros"),
]
RAGGED = Case(7, 9, 5, 20, 2, True, lengths="zeros", dropout=0.3)


@functools.lru_cache(maxsize=8)
def truth(case: Case) -> Arrays:
    """Solve a case with the reference in float64, kept while the same case runs on each backend and dtype."""
    return solve(problem(case), REFERENCE)


def test_cases_are_different_and_say_so():
    assert len({str(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_equal_the_float64_reference(backend, dtype, case):
    found = solve(problem(case).astype(dtype), backend)
    assert_close("agreement", found, truth(case), backend=backend.name, dtype=dtype)


@pytest.mark.parametrize("hidden", LANES)
@pytest.mark.sampled
def test_inference_and_steps_equal_the_float64_reference(backend, dtype, hidden):
    # A few rows may take a path of their own, and so may what has run once before.
    for inputs, batch, bias in itertools.product((1, 5, 16, 17, 64), (1, 3, 8), (False, True)):
        for steps in (1, 8 // batch):
            case = Case(steps, batch, inputs, hidden, bias=bias)
            p = problem(case).astype(dtype)
            lstm = LSTM(inputs, hidden, bias=bias, dtype=dtype)
            lstm.params.update({name: backend.array(value) for name, value in p.params.items()})
            x, state = backend.array(p.x), tuple(map(backend.array, p.state))
            expected = {name: truth(case)[name] for name in ("y", "h_n", "c_n")}
            y, (h_n, c_n) = lstm(x, state)
            found = {"y": backend.host(y), "h_n": backend.host(h_n), "c_n": backend.host(c_n)}
            assert_close("agreement", found, expected, backend=backend.name, dtype=dtype)
        y, (h_n, c_n) = lstm.step(x[0], state)
        first = {"y": backend.host(y), "h_n": backend.host(h_n)[0]}
        expected = {name: truth(case)["y"][0] for name in first}
        assert_close("agreement", first, expected, backend=backend.name, dtype=dtype)


@pytest.mark.parametrize(
    "case",
    [
        Case(4, 3, 2, 5, 2, True, lengths="zeros"), Case(5, 2, 3, 7, 1, bias=False), Case(3, 7, 3, 17),
        Case(4, 3, 2, 6, 2, True, lengths="zeros", peephole=True), Case(4, 3, 2, 18, fields=(("block_size", 3),)),
        Case(4, 3, 2, 18, 2, True, lengths="zeros", peephole=True, fields=(("block_size", 3),)),
    ],
    ids=str,
)  # fmt: skip
def test_forward_equals_a_scalar_loop(backend, case):
    p = problem(case)
    found, expected = solve(p, backend), solve_forward(p)
    found = {name: found[name] for name in expected}
    assert_close("scalar loop", found, expected, backend=backend.name, dtype=np.float64)


def test_signatures_are_those_of_the_protocol(backend):
    assert backend.implementation.name == backend.name
    for name in sorted(name for name in vars(Backend) if not name.startswith("_") and callable(getattr(Backend, name))):
        promised = dict(inspect.signature(getattr(Backend, name)).parameters)
        del promised["self"]
        given = inspect.signature(getattr(backend.implementation, name)).parameters
        assert list(given) == list(promised), name
        for key, parameter in promised.items():
            assert (given[key].kind, given[key].default) == (parameter.kind, parameter.default), (name, key)


def test_equal_keys_give_equal_masks_on_every_backend(backend, dtype):
    # With the reference's mask on the way forward and back, the results are the reference's; another seed gives others.
    p = problem(RAGGED).astype(dtype)
    assert_close("agreement", solve(p, backend), truth(RAGGED), backend=backend.name, dtype=dtype)
    params = {name: backend.array(value) for name, value in p.params.items()}
    outputs = [
        backend.host(lstm_forward(params, backend.array(p.x), dropout=0.3, dropout_seed=seed)[0]) for seed in (7, 7, 8)
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert (outputs[0] != outputs[2]).any()


def test_dropout_multiplies_the_outputs_between_layers(backend, dtype):
    # Layer by layer, with the masks in between by hand: neither the input nor the last output is dropped.
    case = Case(7, 9, 5, 20, 3, False, lengths="zeros", dropout=0.3)
    p = problem(case).astype(dtype)
    whole = solve(p, backend)
    x, h_n = p.x, []
    for layer in range(case.layers):
        if layer:
            x = x * dropout_mask(np, Dropout(case.dropout, DROPOUT_SEED), layer, x)
        row = slice(layer, layer + 1)
        alone = dataclasses.replace(
            p, cell=dataclasses.replace(p.cell, num_layers=1, dropout=0.0), x=x,
            params={name[:-1] + "0": value for name, value in p.params.items() if name.endswith(str(layer))},
            state=tuple(value[row] for value in p.state), dstate=tuple(value[row] for value in p.dstate),
        )  # fmt: skip
        found = solve(alone, backend)
        x = found["y"]
        h_n.append(found["h_n"])
    expected = {"y": x, "h_n": np.concatenate(h_n)}
    assert_close("alone", {name: whole[name] for name in expected}, expected, backend=backend.name, dtype=dtype)
    assert (whole["y"][:, p.lengths == case.steps] != 0).all()


def test_masks_keep_their_share_and_scale_it(dtype):
    like = np.empty((50, 20, 40), dtype)
    for probability in (0.1, 0.5, 0.9):
        mask = dropout_mask(np, Dropout(probability, DROPOUT_SEED), 1, like)
        assert mask.dtype == dtype and mask.shape == like.shape
        assert set(np.unique(mask)) == {dtype.type(0), dtype.type(1 / (1 - probability))}
        # Five standard deviations of a binomial share; also by time step and unit, so that no position is special.
        for axes in ((0, 1, 2), (1, 2), (0, 1)):
            count = like.size // np.prod([n for k, n in enumerate(like.shape) if k not in axes], dtype=int)
            slack = 5 * np.sqrt(probability * (1 - probability) / count)
            assert np.abs((mask == 0).mean(axis=axes) - probability).max() < slack
    first, second = (dropout_mask(np, Dropout(0.5, key), layer, like) for key, layer in ((3, 1), (3, 2)))
    assert (first != second).any()


def test_a_tape_serves_twice_and_no_input_changes(backend, dtype):
    p = problem(RAGGED).astype(dtype)
    params = {name: backend.array(value.copy()) for name, value in p.params.items()}
    x, dy = backend.array(p.x.copy()), backend.array(p.dy.copy())
    state, dstate = (tuple(backend.array(value.copy()) for value in pair) for pair in (p.state, p.dstate))
    y, (h_n, c_n), tape = lstm_forward(params, x, state, p.lengths, dropout=0.3, dropout_seed=DROPOUT_SEED)
    first = results(backend, y, h_n, c_n, lstm_backward(params, tape, dy, dstate))
    first = {name: value.copy() for name, value in first.items()}
    lstm_backward(params, tape, backend.array(2 * p.dy), None)  # other gradients in between leave nothing behind
    second = results(backend, y, h_n, c_n, lstm_backward(params, tape, dy, dstate))
    assert_identical(second, first)
    assert_identical({"x": backend.host(x), "dy": backend.host(dy)}, {"x": p.x, "dy": p.dy})
    assert_identical({name: backend.host(value) for name, value in params.items()}, p.params)
    for pair, kept in ((state, p.state), (dstate, p.dstate)):
        for value, expected in zip(pair, kept, strict=True):
            np.testing.assert_array_equal(backend.host(value), expected)


@pytest.mark.parametrize("case", [dataclasses.replace(RAGGED, dropout=0.0), Case(2, 2, 5, 20)], ids=str)
def test_missing_gradients_are_zeros(backend, dtype, case):
    p = problem(case).astype(dtype)
    params = {name: backend.array(value) for name, value in p.params.items()}
    y, (h_n, c_n), tape = lstm_forward(params, backend.array(p.x), None, p.lengths)
    dy, dh, dc = (backend.array(value) for value in (p.dy, *p.dstate))
    zero_y, zero_h = backend.array(np.zeros_like(p.dy)), backend.array(np.zeros_like(p.dstate[0]))
    for given, spelled_out in [
        ((dy, None), (dy, (zero_h, zero_h))),
        ((None, (dh, dc)), (zero_y, (dh, dc))),
        ((dy, (dh, None)), (dy, (dh, zero_h))),
        ((None, (None, dc)), (zero_y, (zero_h, dc))),
    ]:
        found, expected = (
            results(backend, y, h_n, c_n, lstm_backward(params, tape, *arguments)) for arguments in (given, spelled_out)
        )
        assert_identical(found, expected)


def test_a_missing_state_is_zeros(backend, dtype):
    p = problem(dataclasses.replace(RAGGED, state=False)).astype(dtype)
    zeros = np.zeros_like(p.dstate[0])
    assert_identical(solve(p, backend), solve(dataclasses.replace(p, state=(zeros, zeros)), backend))


def test_full_lengths_are_no_lengths(backend, dtype):
    case = Case(7, 9, 5, 20, 2, True)
    whole, full = problem(case), problem(dataclasses.replace(case, lengths=(7,) * 9))
    assert_close(
        "alone", solve(full.astype(dtype), backend), solve(whole.astype(dtype), backend), backend=backend.name,
        dtype=dtype,
    )  # fmt: skip


def test_sequences_do_not_see_their_batch(backend, dtype):
    # Each sequence alone, cut to its length, gives its row of the batch: outputs, states and their gradients.
    p = problem(dataclasses.replace(RAGGED, dropout=0.0)).astype(dtype)
    whole = solve(p, backend)
    for b, length in enumerate(p.lengths):
        row = slice(b, b + 1)
        alone = dataclasses.replace(
            p, x=p.x[:length, row], dy=p.dy[:length, row], lengths=None,
            state=tuple(value[:, row] for value in p.state), dstate=tuple(value[:, row] for value in p.dstate),
        )  # fmt: skip
        found = {name: value for name, value in solve(alone, backend).items() if name in ("y", "h_n", "c_n", "dx")}
        expected = {name: whole[name][:length, row] if name in ("y", "dx") else whole[name][:, row] for name in found}
        assert_close("alone", found, expected, backend=backend.name, dtype=dtype)
        assert not whole["y"][length:, b].any() and not whole["dx"][length:, b].any()


def digest(found: Arrays) -> str:
    """Hash all results of a problem, bit by bit."""
    total = hashlib.sha256()
    for name in sorted(found):
        total.update(name.encode() + found[name].tobytes())
    return total.hexdigest()


REPEATED = [RAGGED, Case(12, 30, 32, 64), Case(1, 1, 3, 5)]


def test_runs_are_bit_identical(backend, dtype):
    for case in REPEATED:
        p = problem(case).astype(dtype)
        assert len({digest(solve(p, backend)) for _ in range(10)}) == 1


@pytest.mark.slow
def test_fresh_processes_are_bit_identical_for_any_number_of_threads(backend):
    # The BLAS of the reference is held at one thread: NumPy's is not promised to be repeatable across thread counts.
    path = os.pathsep.join(filter(None, [os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH")]))
    # On a GPU, the packages are those of that machine, and their warnings are not ours.
    strict = [] if backend.name == "cuda" and cuda_row.on_gpu() else ["-W", "error"]
    found = []
    for threads in ("1", "2", "2"):
        environment = os.environ | {"NUMBA_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *strict, __file__, backend.name], env=environment | {"PYTHONPATH": path},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1] == found[2]


if __name__ == "__main__":
    from harness import BackendUnderTest

    digests = [
        digest(solve(problem(case).astype(name), BackendUnderTest(sys.argv[1])))
        for case in REPEATED
        for name in ("float32", "float64")
    ]
    sys.stdout.write(json.dumps(digests))
