"""The persistent kernels, run on the CPU: right for all shapes; bit-identical for any schedule, batch and exchange."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from harness import Case, problem
from host_cuda import compiler
from host_cuda.streams import CUDARuntimeError, Event, Stream
from persistent_run import EXCHANGES, FLOAT32, assert_agrees, expected, forced, kernels, run
from tolerances import assert_close, assert_identical

import fastlstm
from fastlstm import dispatch
from fastlstm.backends.cuda import plans
from fastlstm.functional import lstm_backward, lstm_forward

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")

# One block a group, two, six and eight; sequences that fill no group; lengths of 0 and T.
SMALL = (
    Case(5, 3, 4, 8),
    Case(1, 1, 1, 1),
    Case(1, 5, 3, 64, 1, True, lengths="zeros"),
    Case(6, 9, 3, 40, 1, True, lengths="zeros", peephole=True),
    Case(4, 5, 3, 100, 2, lengths="zeros"),
    Case(3, 5, 3, 128, 1, True, bias=False, state=False),
    Case(4, 5, 3, 150, 1, True, lengths="zeros", peephole=True),
    Case(4, 3, 5, 256, 1, lengths="positive"),
    Case(3, 4, 2, 20, lengths=(0, 0, 0, 0)),
)
LARGE = (
    Case(3, 3, 3, 384, lengths="zeros"),
    Case(3, 5, 3, 500, lengths="zeros", peephole=True),
    Case(3, 3, 3, 768),
    Case(3, 3, 3, 1000, lengths="zeros"),
)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_results_are_those_of_the_reference(case, exchange):
    _, launched = assert_agrees(case, architecture=EXCHANGES[exchange])
    # One launch for each layer, of both directions if there are two: for inference, forward and backward.
    assert launched == ["persistent_forward"] * 2 * case.layers + ["persistent_backward"] * case.layers


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_sizes_are_those_of_the_reference(case):
    assert_agrees(case, architecture="80")


@pytest.mark.parametrize("case", [Case(5, 5, 3, 100, lengths="zeros"), Case(4, 3, 3, 200)], ids=str)
def test_any_schedule_and_either_exchange_give_the_same_bits(case):
    truth, _ = run(case, architecture="80")
    for seed in (1000, 2000, 3000, 4000):
        for architecture in EXCHANGES.values():
            assert_identical(run(case, architecture=architecture, seed=seed)[0], truth)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_sequence_does_not_depend_on_the_batch(exchange):
    case = Case(4, 19, 3, 70, lengths="zeros")
    whole, _ = run(case, architecture=EXCHANGES[exchange])
    lengths = problem(case).lengths
    for row in (0, 9, 18):  # one of length 0 in the middle
        only = slice(row, row + 1)

        def alone(p, only=only):
            for name in ("x", "dy", "lengths"):
                value = getattr(p, name)
                object.__setattr__(p, name, value[only] if name == "lengths" else value[:, only])
            for name in ("state", "dstate"):
                object.__setattr__(p, name, tuple(value[:, only] for value in getattr(p, name)))

        found, _ = run(case, change=alone, architecture=EXCHANGES[exchange])
        for name in ("y", "h_n", "c_n", "dx", "dh0", "dc0"):
            np.testing.assert_array_equal(found[name], whole[name][:, only], err_msg=f"{name} of length {lengths[row]}")


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_nan_stays_in_its_row(exchange):
    case, row = Case(4, 7, 3, 100, 1, True, lengths="positive"), 2
    truth, _ = run(case, architecture=EXCHANGES[exchange])

    def spoil(p):
        p.x[:, row] = np.nan
        p.dy[:, row] = np.nan

    found, _ = run(case, change=spoil, architecture=EXCHANGES[exchange])
    others = [k for k in range(7) if k != row]
    for name in ("y", "h_n", "c_n", "dx", "dh0", "dc0"):
        np.testing.assert_array_equal(found[name][:, others], truth[name][:, others], err_msg=name)
        assert np.isnan(found[name][:, row]).any(), name


@pytest.mark.parametrize(("hidden", "multiprocessors"), [(20, 2), (100, 5), (200, 8)])
@pytest.mark.parametrize("lengths", [None, "zeros"])
def test_a_batch_of_several_waves(hidden, multiprocessors, lengths):
    case = Case(3, 37, 3, hidden, peephole=True, lengths=lengths)
    truth, once = run(case, architecture="80")
    found, xp = run(case, architecture="80", multiprocessors=multiprocessors)
    assert_identical(found, truth)
    assert kernels(once) == ["persistent_forward"] * 2 + ["persistent_backward"]
    assert kernels(xp).count("persistent_backward") > 1


def solve_on_paths(case, forward, backward):
    """Run forward on one path and backward, twice, on another."""
    p = problem(case).astype(np.float32)
    with forced(forward, architecture="80") as xp:
        params = {name: xp.array(value) for name, value in p.params.items()}
        y, _, tape = lstm_forward(params, xp.array(p.x), tuple(map(xp.array, p.state)), p.lengths)
        plans.FORCED = backward
        results = []
        for _ in range(2):
            grads = lstm_backward(params, tape, xp.array(p.dy), tuple(map(xp.array, p.dstate)))
            results.append({"y": y, "dx": grads.x, "dh0": grads.state[0], "dc0": grads.state[1]} | grads.params)
    first, second = ({name: value.get() for name, value in result.items()} for result in results)
    assert_identical(second, first)
    return first


@pytest.mark.parametrize("lengths", [None, "zeros"])
def test_both_paths_leave_and_read_the_same_tape(lengths):
    case = Case(4, 5, 3, 70, 1, True, lengths=lengths, peephole=True)
    truth = solve_on_paths(case, "step", "step")
    for paths in (("persistent", "step"), ("step", "persistent"), ("persistent", "persistent")):
        assert_close("agreement", solve_on_paths(case, *paths), truth, backend="cuda", dtype=FLOAT32)


@pytest.mark.parametrize("given", ["dy", "dstate"])
def test_a_gradient_that_is_missing_is_zero(given):
    p = problem(Case(4, 3, 3, 20, lengths="zeros")).astype(np.float32)
    found = {}
    for missing in (True, False):
        with forced("persistent", architecture="80") as xp:
            params = {name: xp.array(value) for name, value in p.params.items()}
            _, _, tape = lstm_forward(params, xp.array(p.x), None, p.lengths)
            dy, dstate = xp.array(p.dy), tuple(map(xp.array, p.dstate))
            zero = None if missing else xp.zeros(dy.shape, np.float32)
            zeros = None if missing else tuple(xp.zeros(s.shape, np.float32) for s in dstate)
            grads = lstm_backward(params, tape, *((dy, zeros) if given == "dy" else (zero, dstate)))
            found[missing] = {"dx": grads.x.get(), **{name: value.get() for name, value in grads.params.items()}}
    assert_identical(found[True], found[False])


def test_nothing_waits_and_memory_that_runs_out_is_an_error_and_no_fallback():
    case = Case(4, 5, 3, 20, 2, True, lengths="zeros")
    p = problem(case).astype(np.float32)
    with forced("persistent", architecture="80") as xp:
        params = {name: xp.array(value) for name, value in p.params.items()}
        x, dy, state = xp.array(p.x), xp.array(p.dy), tuple(map(xp.array, p.state))

        def call():
            y, _, tape = lstm_forward(params, x, state, p.lengths)
            return [y.get() for y in (y, lstm_backward(params, tape, dy).x)]

        live, start = xp.pool.live, xp.pool.allocations
        whole = call()
        assert xp.pool.waits == ["get"] * 2 and len(xp.pool.copies) == len(params) + 4 + case.layers
        for number in range(0, xp.pool.allocations - start, 3):
            xp.pool.fail_at = xp.pool.allocations + number
            with pytest.raises(MemoryError, match="Out of memory"):
                call()
            xp.pool.fail_at = None
            assert xp.pool.live == live
        for one, other in zip(call(), whole, strict=True):
            np.testing.assert_array_equal(one, other)
        assert not any(name.startswith("step") for name in xp.pool.launched)


def test_a_cooperative_launch_waits_for_the_one_before_on_another_stream():
    """Two of them at once could each hold multiprocessors that the other one needs."""
    p = problem(Case(3, 3, 3, 100)).astype(np.float32)
    with forced("persistent", architecture="80") as xp:
        params, x = {name: xp.array(value) for name, value in p.params.items()}, xp.array(p.x)
        logs = []
        for _ in range(2):
            with xp.cuda.Stream(non_blocking=True) as stream:
                lstm_forward(params, x, None, None)
            logs.append([what for what in stream.log if what[0] != "launch" or what[1].startswith("persistent")])
    (launch, record), (wait, second, record_again) = logs
    assert launch == second == ("launch", "persistent_forward")
    assert [record[0], wait[0], record_again[0]] == ["record", "wait", "record"]
    assert wait[1] is record[1]


@pytest.mark.parametrize(("architecture", "hidden"), [("90", 100), ("80", 64)], ids=["a cluster", "one block"])
def test_blocks_that_wait_for_none_outside_their_group_are_no_cooperative_launch(architecture, hidden):
    p = problem(Case(3, 5, 3, hidden)).astype(np.float32)
    with forced("persistent", architecture=architecture) as xp:
        params, x = {name: xp.array(value) for name, value in p.params.items()}, xp.array(p.x)
        for _ in range(2):
            with xp.cuda.Stream(non_blocking=True) as stream:
                lstm_backward(params, lstm_forward(params, x)[2], xp.array(p.dy))
            assert {what[0] for what in stream.log} == {"launch"}  # no event: neither waits for the other
        assert kernels(xp) == ["persistent_forward", "persistent_backward"] * 2


@pytest.mark.parametrize("fails", ["wait_event", "record"])
def test_a_stream_that_fails_gives_an_error_or_the_step_path_and_no_wrong_result(monkeypatch, fails):
    """A launch that was made has overwritten the inputs' share of the gates: the step path must not read it."""
    p, of_class = problem(Case(5, 3, 3, 100)).astype(np.float32), Event if fails == "record" else Stream
    found = []
    with forced("step", architecture="80") as xp:
        params, x = {name: xp.array(value) for name, value in p.params.items()}, xp.array(p.x)
        expected = lstm_forward(params, x)[0].get()
        plans.FORCED = "persistent"
        for _ in range(2):  # the second one waits
            lstm_forward(params, x)
        xp.pool.launched.clear()
        with monkeypatch.context() as patch:
            patch.setattr(of_class, fails, lambda *_: found.append(fails) or raises(CUDARuntimeError("no such event")))
            if fails == "record":
                with xp.cuda.Stream() as stream, pytest.raises(fastlstm.BackendError, match="no such event"):
                    lstm_forward(params, x)
                assert ("synchronize", None) in stream.log  # no launch after it could wait for it
                assert kernels(xp) == ["persistent_forward"]
            else:
                assert_identical({"y": lstm_forward(params, x)[0].get()}, {"y": expected})
                assert kernels(xp) == ["step_forward"] * 5
        assert found == [fails]
        assert len(dispatch.backend_named("cuda").device.refusals) == (fails == "wait_event")
        assert_close("agreement", {"y": lstm_forward(params, x)[0].get()}, {"y": expected}, backend="cuda",
                     dtype=FLOAT32)  # fmt: skip


def raises(error):
    raise error


def test_the_step_path_is_untouched_where_it_is_asked_for():
    case = dataclasses.replace(SMALL[3], hidden=20)
    found, xp = run(case, path="step", architecture="90")
    assert not any(name.startswith("persistent") for name in xp.pool.launched)
    assert_close("agreement", found, expected(case), backend="cuda", dtype=FLOAT32)
