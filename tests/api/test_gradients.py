"""The gradients against differentiation of the forward pass: by every element of every input, none left out.

The reference is proved by the complex step, to rounding; each backend, the reference too, by central
differences through the public functions.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from derivatives import backward_pass, central_differences, complex_step, inputs
from harness import REFERENCE, Case, problem, solve
from tolerances import assert_close

COMPLEX_CASES = [
    Case(4, 3, 2, 3, layers, bidirectional, bias, lengths=lengths, dropout=dropout, seed=k)
    for k, (layers, bidirectional, bias, lengths, dropout) in enumerate(
        itertools.product((1, 2, 3), (False, True), (False, True), (None, "zeros"), (0.0, 0.4))
    )
    if layers < 3 or lengths  # three layers only with lengths: they take the longest and add least
    if layers > 1 or not dropout  # no dropout without a layer above
] + [
    Case(4, 3, 2, 3, layers, bidirectional, bias, lengths=lengths, peephole=True, seed=k)
    for k, (layers, bidirectional, bias, lengths) in enumerate(
        itertools.product((1, 2), (False, True), (False, True), (None, "zeros"))
    )
]
CENTRAL_CASES = [
    Case(3, 4, 2, 3, 2, True, lengths=(1, 0, 3, 2), dropout=0.4),
    Case(4, 2, 3, 5, 1, False, bias=False, batch_first=True),
    Case(2, 3, 1, 2, 3, False, lengths="zeros", batch_first=True),
    Case(1, 1, 1, 1, 1, True),
    Case(5, 1, 2, 17, 1, False),
    Case(3, 4, 2, 3, 2, True, lengths=(1, 0, 3, 2), peephole=True),
    Case(2, 2, 2, 5, peephole=True),
]
# In float32, against the float64 truth: three steps or more, so that a GPU may take the persistent kernels.
FLOAT32_CASES = [
    Case(4, 3, 2, 3, 2, True, lengths="zeros", dropout=0.4),
    Case(4, 3, 2, 3, 1, True, lengths=(1, 4, 0), peephole=True, resets=True),
    Case(3, 2, 2, 5, bias=False, batch_first=False),
    Case(3, 2, 1, 5, fields=(("clip", 0.5), ("activations", ("hard_sigmoid", "softsign", "relu")))),
    Case(3, 2, 2, 4, fields=(("forget_gate", False), ("reverse", True))),
    Case(3, 2, 2, 4, peephole=True, fields=(("coupled", True),)),
]


def gradients(p, backend):
    """Return the gradients that a backend computes, and nothing else."""
    return {name: value for name, value in solve(p, backend).items() if name.startswith("d")}


def test_cases_drop_units_and_have_unsorted_lengths_with_zeros():
    for case in (case for case in COMPLEX_CASES if case.lengths):
        lengths = problem(case).lengths
        assert 0 in lengths and (np.diff(lengths) > 0).any()
    for case in (case for case in COMPLEX_CASES if case.dropout):
        without = solve(problem(Case(**(vars(case) | {"dropout": 0.0}))), REFERENCE)
        assert (np.abs(solve(problem(case), REFERENCE)["y"] - without["y"]).max(axis=(0, 2)) > 0).any()


@pytest.mark.parametrize("case", COMPLEX_CASES, ids=str)
@pytest.mark.sampled
def test_reference_equals_the_complex_step(case):
    p = problem(case)
    _, found = backward_pass(REFERENCE.implementation, p)
    assert found.keys() == inputs(p).keys()
    truth = complex_step(REFERENCE.implementation, p)
    assert_close("complex step", found, truth, backend="reference", dtype=np.float64)


@pytest.mark.parametrize("case", CENTRAL_CASES, ids=str)
def test_gradients_equal_central_differences(backend, case):
    p = problem(case)
    assert_close(
        "central differences", gradients(p, backend), central_differences(backend, p), backend=backend.name,
        dtype=np.float64,
    )  # fmt: skip


@functools.cache
def truth(case):
    """Differentiate the float64 reference."""
    return complex_step(REFERENCE.implementation, problem(case))


@pytest.mark.parametrize("case", FLOAT32_CASES, ids=str)
def test_float32_gradients_equal_the_complex_step(backend, case):
    found = gradients(problem(case).astype(np.float32), backend)
    assert_close("agreement", found, truth(case), backend=backend.name, dtype=np.float32)
