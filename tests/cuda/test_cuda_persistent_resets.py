"""Resets, gradients by the states and truncated gradients in the persistent kernels, run on the CPU."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from harness import Case, problem
from host_cuda import compiler
from persistent_run import EXCHANGES, FLOAT32, assert_agrees, expected, forced, kernels, run
from tolerances import assert_close, assert_identical

from fastlstm.backends.cuda import plans
from fastlstm.functional import lstm_backward, lstm_forward

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")

TRUNCATED = (("truncated", True),)
# One block a group, two, six and eight; lengths of 0 and T; either direction, and both.
CASES = (
    Case(6, 7, 3, 40, 2, lengths="zeros", resets=True, peephole=True),
    Case(5, 5, 3, 100, 1, True, lengths="zeros", resets=True),
    Case(5, 5, 3, 150, resets=True, fields=(("reverse", True),)),
    Case(4, 3, 3, 250, lengths="zeros", resets=True, fields=(("clip", 0.5), ("coupled", True))),
    Case(1, 3, 3, 20, lengths=(1, 0, 1), resets=True),
)


def resets_at_the_edges(p):
    """Reset one sequence before each step, and one only before its first and its last step in either direction."""
    resets = np.zeros_like(p.resets)
    resets[:, 0] = True
    resets[:, 1] = p.resets[:, 1]
    last = p.x.shape[0] if p.lengths is None else int(p.lengths[-1])
    if last:
        resets[[0, last - 1], -1] = True
    object.__setattr__(p, "resets", resets)


@pytest.mark.parametrize(
    ("exchange", "change"), [("flags", None), ("cluster", resets_at_the_edges)], ids=["at random", "at the edges"]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_resets_and_gradients_by_the_states_are_those_of_the_reference(case, exchange, change):
    _, launched = assert_agrees(case, change, keep_steps=True, architecture=EXCHANGES[exchange])
    assert launched == ["persistent_forward"] * 2 * case.layers + ["persistent_backward"] * case.layers


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(
    "case",
    [
        Case(5, 5, 3, 100, 1, True, lengths="zeros", peephole=True, fields=TRUNCATED, resets=True),
        Case(4, 3, 3, 40, 2, fields=TRUNCATED),
    ],
    ids=str,
)
def test_truncated_gradients_are_those_of_the_reference(case, exchange):
    assert_agrees(case, keep_steps=True, architecture=EXCHANGES[exchange])


def test_any_schedule_exchange_and_number_of_waves_give_the_same_bits():
    case = Case(5, 9, 3, 100, 1, True, lengths="zeros", resets=True, peephole=True)
    truth, _ = run(case, keep_steps=True, architecture="80")
    for seed in (1000, 2000, 3000, 4000):
        for architecture in EXCHANGES.values():
            found, _ = run(case, keep_steps=True, architecture=architecture, seed=seed)
            assert_identical(found, truth)
    found, xp = run(case, keep_steps=True, architecture="80", multiprocessors=3)  # one group
    assert_identical(found, truth)
    assert kernels(xp).count("persistent_backward") > 2


@pytest.mark.parametrize("case", [CASES[0], dataclasses.replace(CASES[1], hidden=40)], ids=str)
def test_a_reset_that_never_comes_changes_no_bit(case):
    def never(p):
        object.__setattr__(p, "resets", np.zeros_like(p.resets))

    def none(p):
        object.__setattr__(p, "resets", None)

    truth, _ = run(case, change=none, keep_steps=True, architecture="80")
    assert_identical(run(case, change=never, keep_steps=True, architecture="80")[0], truth)


def test_no_steps_have_no_resets():
    case = Case(0, 3, 2, 20, resets=True)
    assert_identical(
        run(case, keep_steps=True, architecture="80")[0],
        {name: value.astype(np.float32) for name, value in expected(case, keep_steps=True).items()},
    )


def solve_on_paths(case, forward, backward):
    """Run forward on one path and backward on another, with resets and the gradients by the states."""
    p = problem(case).astype(np.float32)
    with forced(forward, architecture="80") as xp:
        params = {name: xp.array(value) for name, value in p.params.items()}
        x, state, resets = xp.array(p.x), tuple(map(xp.array, p.state)), xp.array(p.resets)
        y, _, tape = lstm_forward(params, x, state, p.lengths, resets=resets)
        plans.FORCED = backward
        grads = lstm_backward(params, tape, xp.array(p.dy), tuple(map(xp.array, p.dstate)), keep_state_gradients=True)
    found = {"y": y, "dx": grads.x, "dh0": grads.state[0], "dc0": grads.state[1], **grads.steps._asdict()}
    return {name: value.get() for name, value in (found | grads.params).items()}


@pytest.mark.parametrize("lengths", [None, "zeros"])
def test_both_paths_leave_and_read_the_same_tape_with_resets(lengths):
    case = Case(4, 5, 3, 70, 1, True, lengths=lengths, resets=True)
    truth = solve_on_paths(case, "step", "step")
    for paths in (("persistent", "step"), ("step", "persistent"), ("persistent", "persistent")):
        assert_close("agreement", solve_on_paths(case, *paths), truth, backend="cuda", dtype=FLOAT32)
