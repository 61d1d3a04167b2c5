"""``fastlstm bench``: what is computed, the timing loop, and runs that are cut short or go wrong."""

from __future__ import annotations

import functools
import math
import sys
import time
from importlib import import_module
from types import SimpleNamespace

import cuda_row
import numpy as np
import pytest
from host_cuda import FakeCupy, compiler

import fastlstm
from fastlstm.bench import clock, grid, peaks, peers, results, run, sides
from fastlstm.bench.clock import Spread
from fastlstm.bench.peers import Contender
from fastlstm.bench.sides import Side
from fastlstm.bench.work import Problem, Work
from fastlstm.errors import ArgumentError

TINY = Work(3, 2, 4, 5)
VARIANTS = [
    TINY,
    Work(3, 2, 4, 5, "float64", "train", layers=2),
    Work(3, 2, 4, 5, layers=2, bidirectional=True),
    Work(3, 2, 4, 5, kind="train", layers=2, bidirectional=True),
    Work(1, 2, 4, 5, kind="stream", layers=2),
    Work(1, 1, 4, 5, kind="stream", unbatched=True),
    Work(3, 1, 4, 5, kind="train", unbatched=True),
    Work(3, 1, 4, 5, unbatched=True),
    Work.ragged(6, 4, 4, 5),
    Work.ragged(6, 4, 4, 5, kind="infer"),
]
needs_kernels = pytest.mark.skipif(peers.missing("fastlstm") is not None, reason="the compiled kernels do not run")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No pauses, no measured peaks: nothing here depends on a measured time."""
    monkeypatch.setattr(clock, "PAUSE", 0.0)
    monkeypatch.setattr(clock, "LONGEST_PAUSE", 0.0)
    monkeypatch.setattr(peaks, "of", lambda device, threads, dtypes: dict.fromkeys(dtypes, 1e10))


BAD_SHAPES = ("1,2,3", "1,2,3,0", "a,b,c,d", "1.5,1,1,1", "", "9" * 99 + ",1,1,1", "3,2,4,1000000000")
BAD_FIELDS = ({"dtype": "float16"}, {"kind": "think"}, {"layers": 0}, {"layers": 100}, {"unbatched": True},
              {"kind": "stream", "bidirectional": True})  # fmt: skip


@pytest.mark.parametrize(
    ("text", "given"), [*((text, {}) for text in BAD_SHAPES), *(("3,2,4,5", given) for given in BAD_FIELDS)]
)
def test_a_bad_shape_or_an_impossible_work_is_a_typed_error(text, given):
    with pytest.raises(ArgumentError):
        Work.parse(text, **given)


@pytest.mark.parametrize("work", [*VARIANTS, Work(1, 2, 4, 5, kind="train")], ids=lambda work: work.title)
def test_operations_are_those_of_the_products(work):
    products, starts = 0, 0 if work.kind == "stream" else work.batch  # without a state to multiply
    for name, value in Problem.of(work).model.params.items():
        products += value.size * (0 if "bias" in name else work.rows - starts * ("weight_hh" in name))
    assert work.operations == 2 * products * (3 if work.kind == "train" else 1)


def test_a_ragged_batch_counts_without_its_padding():
    work = Work.ragged(20, 7, 4, 5)
    assert work.rows == sum(work.lengths) < 20 * 7 and min(work.lengths) >= 10
    past = np.arange(20)[:, None] >= np.array(work.lengths)
    assert not Problem.of(work).dy[past].any() and Problem.of(work).dy[~past].all()


def test_grids_have_every_kind_of_call_and_whole_sweeps():
    kinds = ("infer", "train", "stream")
    small, full, goals = (grid.works(make, ("float32",), kinds) for make in grid.GRIDS.values())
    assert len(small) < 25 and set(small) < set(full) and len(set(full)) == len(full) and len(goals) == 19
    assert {work.kind for work in small if work.layers == 2} == set(kinds)
    assert any(work.unbatched and work.kind == "stream" for work in small)
    assert any(work.bidirectional for work in small) and any(work.lengths for work in small)
    steps, batch, inputs, hidden = grid.CENTRE
    assert {(t, batch, inputs, hidden) for t in grid.STEPS} < {work.shape for work in full}
    assert {(steps, b, inputs, hidden) for b in grid.BATCHES} < {work.shape for work in full if work.kind == "train"}
    assert {(1, batch, inputs, h) for h in grid.HIDDENS} < {work.shape for work in full if work.kind == "stream"}
    assert len(grid.works(grid.crossover, ("float32",), kinds)) == 2 * len(grid.MAP_BATCHES) * len(grid.MAP_HIDDENS)


# The timing loop.


class Machine:
    """A clock that only sleeping and working advance, and a log of both; it is the timing loop's."""

    def __init__(self, monkeypatch, shares=()):
        self.now, self.worked, self.log, self.shares = 0.0, 0.0, [], iter(shares)
        clocks = {"perf_counter": lambda: self.now, "process_time": lambda: self.worked}
        monkeypatch.setattr(clock, "time", SimpleNamespace(sleep=self.sleep, **clocks))

    def sleep(self, seconds):
        """Threads of the process work for the next of the shares of that time."""
        self.log.append("pause")
        self.now += seconds
        self.worked += next(self.shares, 0.0) * seconds

    def side(self, name, duration):
        """A side whose calls take so long."""

        def seconds(_, count):
            self.now += count * duration
            self.log.append(f"{name} x {count}")
            return duration

        return Side(lambda: None, tuple, seconds)


@pytest.mark.parametrize(("shares", "pauses"), [([0.05], 1), ([1.0, 2.0, 0.5, 0.02], 4), ([1.0] * 99, 5)])
def test_a_pause_lasts_until_no_thread_works_but_not_for_ever(monkeypatch, shares, pauses):
    monkeypatch.setattr(clock, "PAUSE", 0.25)
    monkeypatch.setattr(clock, "LONGEST_PAUSE", 1.2)
    machine = Machine(monkeypatch, shares)
    clock.wait_for_quiet()
    assert len(machine.log) == pauses and machine.now == 0.25 * pauses


def test_sides_take_turns_after_a_pause_and_untimed_calls_and_a_sample_lasts_long_enough(monkeypatch):
    machine = Machine(monkeypatch)
    durations = {"short": 8e-6, "middle": 2e-3, "long": 0.2}
    seconds = clock.take_turns({name: machine.side(name, of_one) for name, of_one in durations.items()}, 0.0)
    assert clock.SAMPLE <= 200 * durations["short"] <= 2 * clock.SAMPLE
    # Samples of at least three milliseconds together before the one that counts, unless a call is long.
    turns = {"short": 3 * ["short x 200"], "middle": 3 * ["middle x 1"], "long": ["long x 1"]}
    rounds = [("short", "middle", "long"), ("middle", "long", "short"), ("long", "short", "middle")]
    expected = [entry for order in rounds for name in order for entry in ("pause", *turns[name])]
    assert machine.log[machine.log.index("pause") :] == expected
    assert seconds["middle"] == pytest.approx([2e-3] * clock.FEWEST_ROUNDS)


@pytest.mark.parametrize(("duration", "rounds"), [(0.01, 100), (0.5, clock.LEAST_ROUNDS), (5.0, clock.FEWEST_ROUNDS)])
def test_the_budget_is_spent_but_five_rounds_are_made_unless_they_take_far_too_long(monkeypatch, duration, rounds):
    seconds = clock.take_turns({"a": Machine(monkeypatch).side("a", duration)}, 2.0)
    assert len(seconds["a"]) == pytest.approx(rounds, rel=0.1)


def test_a_ratio_is_taken_within_each_round_and_its_quartiles_decide():
    ours = [1.0, 10.0, 1.0, 10.0]  # the machine is ten times slower in every second round
    assert clock.ratio([2 * value for value in ours], ours) == Spread(2.0, 2.0, 2.0)
    assert clock.verdict(Spread(1.01, 1.5, 2.0)) == "faster" and clock.verdict(Spread(0.5, 0.9, 0.99)) == "slower"
    for level in (Spread(0.9, 1.5, 2.0), Spread(1.0, 1.5, 2.0), Spread(0.5, 0.8, 1.0)):
        assert clock.verdict(level) == "no difference"


def test_results_that_are_not_equal_are_named():
    true = [np.array([1.0, -100.0], np.float32), np.array([[0.5]], np.float32)]
    assert clock.disagreement(true, [value * np.float32(1 + 5e-5) for value in true], "float32") is None
    for wrong in (1.001, math.nan, math.inf):
        found = [true[0], true[1] * np.float32(wrong)]
        assert clock.disagreement(true, found, "float32").startswith("computes something else")
    assert clock.disagreement(true, [true[0], true[1] * np.float32(1.001)], "float32", 1e-2) is None
    assert "1 arrays and not 2" in clock.disagreement(true, true[:1], "float32")
    assert "(1,)" in clock.disagreement(true, [true[0], true[1][0]], "float32")
    assert "float64" in clock.disagreement(true, [true[0], true[1].astype(np.float64)], "float32")


# Whole runs.


def contender(call=lambda: None, outputs=lambda y: y, **fields):
    """A side that computes as `call` does, and claims the right results unless told otherwise."""

    def build(problem, threads):
        return Side(call, lambda: (outputs(problem.model(problem.x)[0]),))

    return Contender(build, **fields)


@pytest.fixture
def table(monkeypatch):
    """Our side, whichever backend that is, and room for others."""
    entries = {"fastlstm": contender()}
    monkeypatch.setattr(peers, "CONTENDERS", entries)
    return entries


def measured(names, works=(TINY,), **options):
    return run.measure(works, names, **({"threads": 1, "seconds": 0.0} | options))


def test_a_side_that_fails_or_computes_something_else_is_not_timed(table, monkeypatch):
    def fail():
        raise ValueError("no\nsuch luck")

    called, seen = [], set()
    table["wrong"] = contender(lambda: called.append(0), lambda y: y * np.float32(1.001))
    table["while timed"] = contender(fail)
    table["at first"] = contender(outputs=lambda y: fail())
    table["torch"] = contender(outputs=lambda y: import_module("torch"))
    monkeypatch.setitem(sys.modules, "torch", None)  # whose import fails
    table["right"] = contender(lambda: seen.add(fastlstm.get_num_threads()))
    (case,) = measured([*table], threads=3).cases
    assert list(case.values) == ["fastlstm", "right"] and not called and seen == {3}
    assert case.facts["first results, right"] > 0
    assert "computes something else: off by 1.0e-03" in case.refused.pop("wrong")
    assert case.refused.pop("torch").startswith("failed: ModuleNotFoundError")
    assert case.refused == dict.fromkeys(["while timed", "at first"], "failed: ValueError: no such luck")


def test_missing_sides_are_listed_with_the_way_to_get_them(table):
    table["other"] = contender(packages=("numpy", "fastlstm_no_such_package"))
    table["gpu"] = contender(obstacle=lambda: "no GPU here")
    found = measured(["fastlstm", "other", "gpu"])
    assert found.absent == {"other": "pip install fastlstm_no_such_package", "gpu": "no GPU here"}


def test_the_file_is_written_after_each_case_and_ctrl_c_keeps_those_before_it(table, tmp_path, monkeypatch):
    file, written, calls = tmp_path / "x.json", [], []

    def interrupt():
        calls.append(0)
        if len(calls) > 40:
            raise KeyboardInterrupt
        time.sleep(1e-3)

    table["fastlstm"] = contender(interrupt)
    save = results.save
    monkeypatch.setattr(results, "save", lambda *given: (save(*given), written.append(results.load(file))))
    found = measured(["fastlstm"], [Work(n, 2, 4, 5) for n in range(1, 100)], path=file)
    count = len(found.cases)
    assert 0 < count < 40 and [len(state.cases) for state in written] == [*range(1, count + 1), count]
    assert [state.interrupted for state in written] == [False] * count + [True] and found.interrupted


def test_the_map_is_measured_only_where_there_is_a_gpu(table):
    extra = [Work(2, 2, 2, 2)]
    assert len(measured(["fastlstm"], ours_only=extra).cases) == 1
    table["fastlstm cuda"] = contender()
    table["peer"] = contender()
    found = measured(["fastlstm", "fastlstm cuda", "peer"], ours_only=extra)
    assert [list(case.values) for case in found.cases] == [[*table], ["fastlstm", "fastlstm cuda"]]


# Our own sides and the peers, for real.


@needs_kernels
@pytest.mark.parametrize("work", VARIANTS, ids=lambda work: work.title)
def test_every_peer_computes_every_variant_with_as_many_threads_which_are_restored(work, monkeypatch):
    names = [name for name in ("fastlstm", "torch", "onnxruntime") if peers.missing(name) is None]
    counts = [fastlstm.get_num_threads] + [import_module("torch").get_num_threads] * ("torch" in names)
    before = [count() for count in counts]
    seen = []

    def side_of(*given):
        seen.extend(count() for count in counts)
        return sides.side_of(*given)

    monkeypatch.setattr(peers, "side_of", side_of)
    case = run.measure_case(work, names, max(before) + 1, 0.0)
    assert set(seen) == {max(before) + 1} or "torch" not in names
    assert list(case.values) == [name for name in names if peers.CONTENDERS[name].able(work)], case.refused
    assert [count() for count in counts] == before


@needs_kernels
def test_a_stream_continues_from_its_state_and_its_check_starts_anew():
    problem = Problem.of(Work(1, 2, 4, 5, kind="stream"))
    side = sides.cpu(problem, 1)
    (first,) = side.outputs()
    y, _ = problem.model(np.repeat(problem.x, sides.CHECKED_STEPS, axis=0))
    np.testing.assert_allclose(first, y, rtol=1e-5)
    assert not np.array_equal(side.call(), first[-1])
    np.testing.assert_array_equal(side.outputs()[0], first)


@pytest.mark.parametrize("tf32", [False, True])
def test_torch_on_a_gpu_computes_with_tf32_only_if_asked(monkeypatch, tf32):
    torch = pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")
    monkeypatch.setattr(peers, "TORCH_GPU", "cpu")
    parts, seen = (torch.backends.cudnn, torch.backends.cuda.matmul), []
    before = [part.allow_tf32 for part in parts]
    forward = torch.nn.LSTM.forward
    look = lambda *given: (seen.append([part.allow_tf32 for part in parts]), forward(*given))[1]  # noqa: E731
    monkeypatch.setattr(torch.nn.LSTM, "forward", look)
    side = peers.torch_lstm(Problem.of(TINY), 1, on_gpu=True, tf32=tf32)
    side.outputs()
    side.time(1)
    assert seen == [[tf32, tf32]] * 2 and [part.allow_tf32 for part in parts] == before


def test_a_forced_backend_or_a_missing_numba_is_named(monkeypatch):
    with fastlstm.use_backend("reference"):
        assert "forced" in peers.missing("fastlstm")

    def fail(name):
        raise ImportError("no numba")

    monkeypatch.setattr(fastlstm.dispatch, "backend_named", fail)
    assert peers.missing("fastlstm") == "no numba"


@pytest.fixture
def gpu():
    with cuda_row.installed(FakeCupy()) as library:
        yield library


@needs_kernels
@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("kind", ["infer", "train", "stream"])
def test_the_gpu_is_measured_with_and_without_copies(gpu, kind):
    work = Work(1 if kind == "stream" else 3, 2, 4, 5, kind=kind)
    problem = Problem.of(work)
    ours, device, copies = sides.cpu(problem, 1), sides.cuda(problem, 1), sides.cuda(problem, 1, copies=True)
    for side, moved in ((device, False), (copies, True)):
        assert clock.disagreement(ours.outputs(), side.outputs(), "float32") is None
        gpu.pool.copies.clear()
        side.call()
        assert bool(sum(gpu.pool.copies) >= problem.x.nbytes) == moved
    assert device.time(2) > 0


# The peaks.


@needs_kernels
def test_the_microkernel_makes_the_operations_that_it_says():
    (job,), operations = peaks.tile_jobs("float32", 1, 1e6)
    assert operations == pytest.approx(1e6, rel=0.02)
    before = job.args[-1].sum()
    job()
    assert job.args[-1].sum() - before == operations / 2  # ones times ones: each multiply-add adds one


@needs_kernels
def test_the_peak_takes_the_time_in_which_all_threads_were_done(monkeypatch):
    monkeypatch.setattr(peaks, "SECONDS", 0.0)
    assert 1e8 < peaks.cpu("float32", 2) < 1e13
    late = [functools.partial(time.sleep, seconds) for seconds in (0.02, 0.0)]
    monkeypatch.setattr(peaks, "tile_jobs", lambda dtype, threads: (late, 1.0))
    assert peaks.cpu("float32", 2) <= 2 / 0.02


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_the_peak_of_a_gpu(gpu, monkeypatch):
    monkeypatch.setattr(peaks, "CUDA_SIZE", 32)
    assert min(peaks.cuda("float32", repeats=2), peaks.cuda("float64", repeats=2)) > 0
