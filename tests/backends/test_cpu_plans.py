"""Results of the CPU backend are bit-identical for every schedule and number of threads."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from harness import REFERENCE, BackendUnderTest, Case, problem, solve
from tolerances import assert_close, assert_identical

import fastlstm
from fastlstm import LSTM
from fastlstm.backends.cpu import small_batch
from fastlstm.backends.cpu.autotune import Trials

CPU = BackendUnderTest("cpu")
pytestmark = pytest.mark.skipif(bool(CPU.missing), reason=str(CPU.missing))

THREADS = (1, 2, 3, 5)  # more than there are cores too: a team must not depend on running at once
CASES = {
    "rows": Case(9, 61, 40, 72),
    "rows, ragged": Case(9, 61, 40, 72, bidirectional=True, lengths="zeros"),
    "rows, many in each step": Case(4, 1100, 64, 36),  # more than a panel of the weights' gradients takes at a time
    "rows, one long sequence": Case(40, 62, 30, 50, lengths=(40, *[1] * 61)),
    "units": Case(40, 5, 30, 130),
    "units, ragged": Case(40, 5, 30, 130, bidirectional=True, lengths=(3, 40, 0, 17, 25)),
    "units, many weights": Case(14, 17, 1000, 650),
    "units, many for a team": Case(14, 17, 300, 400),
    "units, one sequence": Case(60, 1, 20, 250),
    "units, one sequence, whole vectors": Case(30, 1, 20, 160),
    "units, few rows": Case(2, 8, 40, 330),
    "units, few rows, ragged": Case(3, 10, 50, 250, bidirectional=True, lengths="zeros"),
    "units, short": Case(8, 1, 120, 260),
    "units, short, some sequences": Case(4, 2, 120, 260),
    "rows, few rows": Case(1, 61, 420, 70),
    "directions": Case(60, 3, 20, 70, bidirectional=True),
    "directions, ragged": Case(60, 4, 20, 80, 2, True, lengths=(33, 60, 0, 47)),
    "stacked": Case(12, 25, 16, 65, 2, True, lengths="zeros", dropout=0.3),
    "rows, peepholes": Case(9, 61, 40, 72, bidirectional=True, lengths="zeros", peephole=True),
    "units, peepholes": Case(40, 5, 30, 130, peephole=True),
    "units, few rows, peepholes": Case(2, 8, 40, 330, peephole=True),
    "directions, peepholes": Case(60, 3, 20, 70, bidirectional=True, peephole=True),
}


@pytest.fixture
def any_number_of_threads(monkeypatch):
    """Leave the number of threads as it was; and let threads meet, though there are more of them than cores."""
    monkeypatch.setattr(Trials, "pick", lambda self, kind, ways: 0)
    yield
    fastlstm.set_num_threads(None)


def plans_of(case, dtype):
    """Return what the backend says that it will do, layer by layer."""
    p = problem(case)
    lstm = LSTM(case.inputs, case.hidden, case.layers, bidirectional=case.bidirectional, peephole=case.peephole,
                dtype=dtype)  # fmt: skip
    return lstm.plan(p.x.astype(dtype), lengths=p.lengths)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled
def test_any_number_of_threads_gives_the_same_bits(dtype, name, any_number_of_threads):
    p = problem(CASES[name])
    truth, found, plans = solve(p, REFERENCE), [], []
    for threads in THREADS:
        fastlstm.set_num_threads(threads)
        plans.append(plans_of(CASES[name], dtype))
        found.append(solve(p.astype(dtype), CPU))
    kind = {
        "rows": "its own sequences",
        "units": "its own hidden units",
        "directions": "both directions at once",
        "stacked": "threads",
    }[name.split(",")[0]]
    assert "on one thread" in plans[0]
    assert kind in plans[-1], plans
    assert all("threads" in plan or "at once" in plan for plan in plans[1:]), plans
    assert len(set(plans)) > 1, "threads make no difference"
    if "many weights" in name:  # which each step would read from memory
        assert all("input products 7 steps ahead" in plan for plan in plans), plans
    if "many for a team" in name:
        assert ["input products 7 steps ahead" in plan for plan in plans] == [False, True, True, True], plans
    for other in found[1:]:
        assert_identical(other, found[0])
    assert_close("agreement", found[0], truth, backend="cpu", dtype=dtype)


@pytest.mark.parametrize("name", ["rows", "units", "directions"])
def test_batches_of_empty_sequences_run_on_any_number_of_threads(dtype, name):
    case = CASES[name]
    p = problem(dataclasses.replace(case, lengths=(0,) * case.batch)).astype(dtype)
    truth = solve(p, REFERENCE)
    try:
        for threads in THREADS:
            fastlstm.set_num_threads(threads)
            assert_identical(solve(p, CPU), truth)  # zeros, and the initial states
    finally:
        fastlstm.set_num_threads(None)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled
def test_inference_has_the_same_bits_too(dtype, name, any_number_of_threads):
    case = dataclasses.replace(CASES[name], dropout=0.0)
    p = problem(case).astype(dtype)
    lstm = LSTM(case.inputs, case.hidden, case.layers, bidirectional=case.bidirectional, peephole=case.peephole,
                dtype=dtype)  # fmt: skip
    lstm.params.update(p.params)
    found = []
    for threads in THREADS:
        fastlstm.set_num_threads(threads)
        y, (h_n, c_n) = lstm(p.x, p.state, p.lengths)
        found.append({"y": y, "h_n": h_n, "c_n": c_n})
    for other in found[1:]:
        assert_identical(other, found[0])


def test_a_short_call_that_does_not_fit_calls_no_team(dtype, any_number_of_threads):
    lstm, x = LSTM(120, 260, dtype=dtype, seed=0), np.random.default_rng(0).normal(size=(3, 120)).astype(dtype)
    fastlstm.set_num_threads(1)
    alone = lstm.step(x)
    fastlstm.set_num_threads(2)
    for _ in range(3):
        assert_identical({"h": lstm.step(x)[0]}, {"h": alone[0]})
        with pytest.raises(fastlstm.ShapeError, match="120"):
            lstm.step(x[:, :-1])
        kept, lstm.params["weight_hh_l0"] = lstm.params["weight_hh_l0"], lstm.params["weight_hh_l0"][:-1]
        with pytest.raises(fastlstm.ShapeError, match="weight_hh_l0"):
            lstm.step(x)
        lstm.params["weight_hh_l0"] = kept


@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (3, 2), (8, 1)])
def test_few_rows_give_the_same_bits_in_training_as_in_inference(dtype, steps, batch):
    lstm, x = LSTM(7, 21, dtype=dtype, seed=0), np.random.default_rng(0).normal(size=(steps, batch, 7)).astype(dtype)
    with fastlstm.use_backend("cpu"):
        (y, state), (taped_y, taped_state, _) = lstm(x), lstm.forward(x)
    assert_identical(dict(zip("yhc", (y, *state), strict=True)), dict(zip("yhc", (taped_y, *taped_state), strict=True)))


@pytest.mark.parametrize(("steps", "batch", "inputs", "hidden"), [(1, 1, 3, 9), (2, 8, 7, 21), (1, 13, 30, 37)])
def test_a_short_call_is_bit_identical_to_the_long_path(dtype, monkeypatch, steps, batch, inputs, hidden):
    lstm = LSTM(inputs, hidden, dtype=dtype, seed=0)
    x = np.random.default_rng(0).normal(size=(steps, batch, inputs)).astype(dtype)
    found = []
    with fastlstm.use_backend("cpu"):
        for short in (True, False):
            y, (h_n, c_n), tape = lstm.forward(x)
            assert tape.call.prepared.layers[0]._trains_small == short
            found.append({"y": y, "h_n": h_n, "c_n": c_n, "gates": tape.record.layers[0].directions[0].gates})
            monkeypatch.setattr(small_batch, "is_small", lambda *_, **__: False)
            lstm.cell.calls.clear()  # what was prepared knows the kernels for small batches
    assert_identical(*found)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True])
def test_bad_numbers_of_threads_are_refused(threads):
    before = fastlstm.get_num_threads()
    with pytest.raises(fastlstm.ArgumentError, match="threads"):
        fastlstm.set_num_threads(threads)
    assert fastlstm.get_num_threads() == before


def test_the_number_of_threads_is_remembered_and_forgotten(any_number_of_threads, monkeypatch):
    monkeypatch.setenv("FASTLSTM_NUM_THREADS", "7")
    fastlstm.set_num_threads(None)
    assert fastlstm.get_num_threads() == 7
    fastlstm.set_num_threads(3)
    assert fastlstm.get_num_threads() == 3
    fastlstm.set_num_threads(None)
    assert fastlstm.get_num_threads() == 7
    monkeypatch.setenv("FASTLSTM_NUM_THREADS", "many")
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    with pytest.warns(UserWarning, match="FASTLSTM_NUM_THREADS='many' is ignored"):
        fastlstm.set_num_threads(None)
    assert fastlstm.get_num_threads() >= 1
    monkeypatch.delenv("FASTLSTM_NUM_THREADS")


UNIT = 5e-3  # seconds: calls that are neither short nor long


def ways_of_calls(trials, calls, times, unit=UNIT):
    """Make calls that take `times` seconds with each candidate; return the candidates that were picked."""
    found = []
    for _ in range(calls):
        way = trials.pick("kind", len(times))
        trials.report("kind", way, times[way] * unit)
        found.append(way)
    return found


@pytest.mark.parametrize(("ways", "fastest"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_the_fastest_candidate_is_kept_and_others_tried_more_and_more_rarely(ways, fastest):
    trials = Trials()
    found = ways_of_calls(trials, 20_000, [1.0 if way == fastest else 2.0 for way in range(ways)])
    assert found[0] == 0, "the first plan is the most promising"
    tries = [n for n in range(1, len(found)) if found[n] != fastest and found[n - 1] == fastest]
    rests = [after - before - trials.CALLS for before, after in itertools.pairwise(tries)]
    assert rests == sorted(rests)
    assert rests[0] <= (ways - 1) * (trials.FIRST_REST + trials.CALLS / trials.SHARE)
    assert rests[-1] == rests[-2] == trials.LONGEST_REST
    assert {found[n] for n in tries[-4:]} == set(range(ways)) - {fastest}, "each of the others has its turn"
    assert trials.pick("another kind", ways) == 0, "each kind of call has tries of its own"


def test_a_try_has_more_than_one_call():
    trials = Trials()
    ways_of_calls(trials, 20, [3.0, 2.0])
    seconds = itertools.cycle([3.0, 1.0, 1.0])  # the first after a rest is slow, though it is the better way
    found = []
    for _ in range(200):
        found.append(trials.pick("kind", 2))
        trials.report("kind", found[-1], UNIT * (2.0 if found[-1] else next(seconds)))
    assert found[-50:].count(0) > 40


def test_a_hardly_faster_candidate_does_not_alternate_with_the_chosen_one():
    noise = np.random.default_rng(0)
    trials, found = Trials(), []
    for _ in range(2000):
        found.append(trials.pick("kind", 2))
        trials.report("kind", found[-1], UNIT * (1.0 if found[-1] else 1.01) * (1.0 + 0.02 * noise.random()))
    assert found[100:].count(1) < 100


def test_a_candidate_that_is_slow_with_the_whole_machine_is_kept():
    trials = Trials()
    ways_of_calls(trials, 1000, [1.0, 1.2])
    assert ways_of_calls(trials, 100, [1.8, 2.16]).count(1) <= trials.CALLS, "the other was measured on a faster one"


def test_the_first_call_which_compiles_does_not_decide():
    trials = Trials()
    trials.report("kind", trials.pick("kind", 2), 1e6)
    assert ways_of_calls(trials, 100, [1.0, 1.01])[-50:].count(0) > 40


def test_a_hopeless_candidate_takes_little_time():
    found = ways_of_calls(Trials(), 50_000, [100.0, 1.0, 400.0])
    assert (100.0 * found.count(0) + 400.0 * found.count(2)) / 50_000 < 2 * Trials.SHARE
    assert found[10_000:].count(0) and found[10_000:].count(2), "each is tried again all the same"


def test_waking_a_worker_does_not_count_in_a_trial():
    trials, slow = Trials(), iter([150e-6, 27e-6, 23e-6, 21e-6, 12e-6])  # and then 10, against 16 on one thread
    found = ways_of_calls(trials, 20, [1.0, 16e-6], 1.0)  # the first calls were slower still
    for _ in range(500):
        found.append(trials.pick("kind", 2))
        trials.report("kind", found[-1], 16e-6 if found[-1] else next(slow, 10e-6))
    assert found[-200:].count(0) > 180


@pytest.mark.parametrize("woken", [150e-6, 40e-6])
def test_a_team_that_is_woken_for_each_call_loses_and_its_tries_take_little_of_the_time(woken):
    found = ways_of_calls(Trials(), 100_000, [woken, 16e-6], 1.0)
    assert 0 < found[1000:].count(0) * woken / (len(found) * 16e-6) < 2 * Trials.SHARE


@pytest.mark.parametrize("slower", [1.2, 1.8, 3.0])
@pytest.mark.parametrize("unit", [4e-4, UNIT])
def test_trials_lose_a_small_share_of_the_time_from_the_first_on(slower, unit):
    trials = Trials()
    found = ways_of_calls(trials, 10_000, [1.0, slower], unit)
    lost = (slower - 1.0) * np.cumsum(found)
    one_try = (slower - 1.0) * (trials.CALLS + trials.WARMING)
    assert lost[-1] > one_try, "there are more"
    assert (lost <= one_try + trials.SHARE * np.arange(1, len(found) + 1)).all()


@pytest.mark.parametrize("slower", [1.2, 3.0])
def test_a_long_call_that_loses_ends_its_try(slower):
    found = ways_of_calls(Trials(), 2000, [1.0, slower], 0.1)
    tries = [sum(1 for _ in calls) for way, calls in itertools.groupby(found) if way]
    assert set(tries) == {1} and len(tries) > 3
    assert found[:8].count(1) == 1 and sum(tries) * slower / len(found) < 2 * Trials.SHARE


def test_a_long_call_that_wins_has_to_win_again():
    found = ways_of_calls(Trials(), 100, [1.2, 1.0], 0.1)
    assert found[-90:].count(1) == 90 - found[-90:].count(0) > 85
    assert [way for way, _ in itertools.groupby(found)][:2] == [0, 1]


def test_one_slow_call_decides_nothing():
    trials = Trials()
    ways_of_calls(trials, 100, [1.0, 2.0])
    trials.report("kind", 0, 1000.0)
    assert ways_of_calls(trials, 5, [1.0, 2.0]) == [0] * 5


def test_teams_end_when_the_cores_get_busy_and_come_back():
    trials = Trials()
    ways_of_calls(trials, 1000, [1.0, 2.0, 3.0])
    assert ways_of_calls(trials, 100, [40.0, 2.0, 3.0]).count(0) < 10
    assert ways_of_calls(trials, 4 * trials.LONGEST_REST, [1.0, 2.0, 3.0])[-100:].count(0) > 90


def test_calls_with_other_plans_are_of_another_kind(monkeypatch):
    # A few rows more, and one thread is out of the question: its number must not be taken for another plan's.
    trials = Trials()
    monkeypatch.setattr("fastlstm.backends.cpu.launch.TRIALS", trials)
    lstm = LSTM(34, 128, seed=0)
    fastlstm.set_num_threads(2)
    try:
        with fastlstm.use_backend("cpu"):
            for steps in (15, 16):
                for _ in range(5):
                    lstm(np.zeros((steps, 40, 34), np.float32))
                    for record in trials._records.values():
                        record.fastest, record.tries = len(record.seconds) - 1, 0
    finally:
        fastlstm.set_num_threads(None)
    assert sorted(len(record.seconds) for record in trials._records.values()) == [2, 3]


def test_several_threads_pick_at_once():
    trials, ways = Trials(), 3
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work(seed):
        rng = np.random.default_rng(seed)
        for kind in (*rng.integers(0, 3 * Trials.KINDS, 3000).tolist(), *[0] * 20_000):
            way = trials.pick(kind, ways)
            assert 0 <= way < ways
            trials.report(kind, way, rng.random())
        return True

    try:
        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(work, range(4)))
    finally:
        sys.setswitchinterval(before)


def test_kinds_of_calls_are_not_remembered_without_end():
    trials = Trials()
    for kind in range(10 * trials.KINDS):
        trials.report(kind, trials.pick(kind, 2), 1.0)
    assert len(trials._records) <= trials.KINDS + 1
    trials.report("forgotten meanwhile", 0, 1.0)


@pytest.mark.parametrize(("name", "ways"), [("units", 2), ("rows", 3), ("rows, ragged", 3)])
def test_every_candidate_schedule_is_bit_identical(dtype, name, ways):
    p = problem(CASES[name]).astype(dtype)
    fastlstm.set_num_threads(3)
    asked, found = [], []
    try:
        with pytest.MonkeyPatch.context() as patch:
            for way in range(ways):
                patch.setattr(Trials, "pick", lambda self, kind, ways, way=way: asked.append(ways) or way)
                found.append(solve(p, CPU))
    finally:
        fastlstm.set_num_threads(None)
    assert set(asked) == {ways}
    for other in found[1:]:
        assert_identical(other, found[0])
