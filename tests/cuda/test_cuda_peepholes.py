"""Peepholes on the CUDA backend against the NumPy reference: outputs, states and every gradient, and one time step.

The reference itself is compared with the complex step in ``test_gradients.py``.
"""

from __future__ import annotations

import itertools

import cuda_row
import numpy as np
import pytest
from harness import REFERENCE, BackendUnderTest, Case, problem, solve
from tolerances import assert_close, assert_identical

from fastlstm import LSTM

pytestmark = pytest.mark.skipif(bool(cuda_row.missing()), reason=str(cuda_row.missing()))

CUDA = BackendUnderTest("cuda")
# H = 8 takes wide loads, H = 5 narrow ones; 300 sequences take two slabs of the sum over the batch.
CASES = [
    Case(6, 5, 3, hidden, layers, bidirectional, bias, lengths=lengths, peephole=True)
    for hidden, (layers, bidirectional), bias, lengths in itertools.product(
        (5, 8), ((1, False), (1, True), (2, True)), (False, True), (None, "zeros")
    )
] + [
    Case(1, 1, 1, 1, peephole=True),
    Case(3, 300, 2, 4, 1, True, lengths="positive", peephole=True),
    Case(3, 300, 2, 3, state=False, peephole=True),
    Case(4, 3, 2, 8, lengths=(0, 0, 0), peephole=True),
    Case(5, 4, 3, 8, 2, True, batch_first=True, dropout=0.4, peephole=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_result_is_that_of_the_reference(case, dtype):
    p = problem(case)
    found = solve(p.astype(dtype), CUDA)
    assert all(value.dtype == dtype for value in found.values())
    assert_close("agreement", found, solve(p, REFERENCE), backend="cuda", dtype=dtype)


@pytest.mark.parametrize("lengths", [None, "zeros"])
def test_peepholes_of_zero_are_no_peepholes(dtype, lengths):
    with_peepholes = problem(Case(6, 5, 3, 8, 2, True, lengths=lengths, peephole=True)).astype(dtype)
    for name, value in with_peepholes.params.items():
        if name.startswith("weight_peephole"):
            value[...] = 0
    plain = problem(Case(6, 5, 3, 8, 2, True, lengths=lengths)).astype(dtype)
    plain.params.update({name: with_peepholes.params[name] for name in plain.params})
    plain = type(plain)(**(vars(with_peepholes) | {"params": plain.params, "cell": plain.cell}))
    found = solve(with_peepholes, CUDA)
    assert_identical({name: value for name, value in found.items() if "peephole" not in name}, solve(plain, CUDA))


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("hidden", [5, 8])
def test_steps_give_the_whole_sequence(dtype, hidden, state):
    case = Case(6, 4, 3, hidden, 2, state=state, peephole=True)
    p = problem(case).astype(dtype)
    with CUDA.active():
        lstm = LSTM(case.inputs, hidden, 2, peephole=True, dtype=dtype, seed=0)
        lstm.params.update({name: CUDA.array(value) for name, value in p.params.items()})
        given = p.state and tuple(map(CUDA.array, p.state))
        y, (h_n, c_n) = lstm(CUDA.array(p.x), given)
        now, outputs = given, []
        for x_t in p.x:
            h, now = lstm.step(CUDA.array(x_t), now)
            outputs.append(CUDA.host(h))
        found = {"y": np.stack(outputs), "h_n": CUDA.host(now[0]), "c_n": CUDA.host(now[1])}
        whole = {"y": CUDA.host(y), "h_n": CUDA.host(h_n), "c_n": CUDA.host(c_n)}
    assert_close("streaming", found, whole, backend="cuda", dtype=dtype)


def test_a_second_backward_pass_gives_the_same_bits(dtype):
    p = problem(Case(6, 5, 3, 8, 1, True, lengths="zeros", peephole=True)).astype(dtype)
    with CUDA.active():
        lstm = LSTM(3, 8, bidirectional=True, peephole=True, dtype=dtype, seed=0)
        lstm.params.update({name: CUDA.array(value) for name, value in p.params.items()})
        _, _, tape = lstm.forward(CUDA.array(p.x), tuple(map(CUDA.array, p.state)), p.lengths)
        found = []
        for _ in range(2):
            grads = lstm.backward(tape, CUDA.array(p.dy), tuple(map(CUDA.array, p.dstate)))
            found.append({name: CUDA.host(value) for name, value in grads.params.items()})
    assert_identical(found[1], found[0])
