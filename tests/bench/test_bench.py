"""``fastlstm bench``: what is computed, the method of timing, and runs that are cut short or go wrong."""

from __future__ import annotations

import contextlib
import time

import cuda_row
import numpy as np
import pytest
from host_cuda import FakeCupy, compiler

import fastlstm
from fastlstm.bench import ceilings, clock, grid, peers, run, sides
from fastlstm.bench.clock import Spread
from fastlstm.bench.peers import Contender
from fastlstm.bench.results import Ceiling
from fastlstm.bench.sides import Side
from fastlstm.bench.work import Problem, Work
from fastlstm.errors import ArgumentError

TINY = Work(3, 2, 4, 5)
needs_kernels = pytest.mark.skipif(peers.missing("fastlstm", 1) is not None, reason="the compiled kernels do not run")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No pauses, no ceilings: nothing here looks at a time that was really measured."""
    monkeypatch.setattr(clock, "PAUSE", 0.0)
    monkeypatch.setattr(clock, "LONGEST_PAUSE", 0.0)
    monkeypatch.setattr(ceilings, "of", lambda device, threads, dtypes: Ceiling(dict.fromkeys(dtypes, 1e10), 1e10))


# What there is to compute.


@pytest.mark.parametrize(
    "text", ["1,2,3", "1,2,3,0", "a,b,c,d", "1,2,3,4,5", "-1,2,3,4", "1.5,1,1,1", "", "9" * 99 + ",1,1,1"]
)
def test_a_bad_shape_is_a_typed_error(text):
    with pytest.raises(ArgumentError, match="T,B,I,H"):
        Work.parse(text)


@pytest.mark.parametrize(
    "given",
    [
        {"steps": True},
        {"hidden": 10**9},
        {"dtype": "float16"},
        {"kind": "think"},
        {"kind": "stream"},
        {"lengths": (1,)},
        {"lengths": (3, 4)},
        {"lengths": (0, 1)},
    ],
)
def test_a_work_that_makes_no_sense_is_a_typed_error(given):
    with pytest.raises(ArgumentError):
        Work(**({"steps": 3, "batch": 2, "inputs": 4, "hidden": 5} | given))


@pytest.mark.parametrize("kind", ["infer", "train", "stream"])
def test_operations_and_bytes_are_those_of_the_arrays(kind, dtype):
    work = Work(1 if kind == "stream" else 3, 2, 4, 5, dtype.name, kind)
    problem = Problem.of(work)
    params = problem.model.params
    y, (h, c) = problem.model(problem.x)
    moved = sum(value.nbytes for value in params.values()) + problem.x.nbytes + y.nbytes
    passes = 1
    if kind == "train":
        moved, passes = 2 * moved, 3  # each has a gradient of its size
    if kind == "stream":
        moved += 2 * h.nbytes + c.nbytes  # both in, and one of the two out besides y
    with_state = work.rows if kind == "stream" else work.rows - work.batch  # none is needed for a product with zeros
    products = work.rows * params["weight_ih_l0"].size + with_state * params["weight_hh_l0"].size
    assert work.operations == 2 * products * passes
    assert work.bytes == moved


def test_a_ragged_batch_counts_without_its_padding():
    work = Work.ragged(20, 7, 4, 5)
    assert work.rows == sum(work.lengths) < 20 * 7 and min(work.lengths) >= 10
    assert work.operations == 3 * 8 * 5 * (work.rows * 4 + (work.rows - 7) * 5)
    past = np.arange(20)[:, None] >= np.array(work.lengths)
    assert not Problem.of(work).dy[past].any() and Problem.of(work).dy[~past].all()
    assert work == Work.ragged(20, 7, 4, 5)


def test_the_grids_can_be_read_or_swept():
    kinds = ("infer", "train", "stream")
    small, full = (grid.named(name, ("float32",), kinds) for name in ("small", "full"))
    assert len(small) < 20 and {work.kind for work in small} == set(kinds)
    assert set(small) < set(full) and len(set(full)) == len(full)
    for place, sizes in ((0, grid.STEPS), (1, grid.BATCHES), (3, grid.HIDDENS)):
        others = {n: grid.CENTRE[n] for n in range(4) if n != place}
        swept = {work.shape[place] for work in full if all(work.shape[n] == size for n, size in others.items())}
        assert swept >= set(sizes)
    assert len(grid.crossover("full", ("float32",), kinds)) == 2 * len(grid.MAP_BATCHES) * len(grid.MAP_HIDDENS)
    assert {work.kind for work in grid.named("full", ("float64",), ("train",))} == {"train"}
    with pytest.raises(ArgumentError, match="no grid 'huge'"):
        grid.named("huge", ("float32",), kinds)


# The method.


@pytest.mark.parametrize(("shares", "pauses"), [([0.0], 1), ([0.05], 1), ([1.0, 2.0, 0.5, 0.02], 4), ([1.0] * 99, 5)])
def test_a_pause_lasts_until_no_thread_works_or_it_is_enough(monkeypatch, shares, pauses):
    monkeypatch.setattr(clock, "PAUSE", 0.25)
    monkeypatch.setattr(clock, "LONGEST_PAUSE", 1.2)
    slept, worked, left = [], [0.0], iter(shares)

    def sleep(seconds):
        slept.append(seconds)
        worked[0] += next(left) * seconds

    clock.wait_for_quiet(sleep, lambda: sum(slept), lambda: worked[0])
    assert slept == [0.25] * pauses


class Machine:
    """A clock that only sleeping and working move on, and what was done in which order."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def sleep(self, seconds):
        self.log.append("pause")
        self.now += seconds

    def side(self, name, durations, fails_at=None, error=KeyboardInterrupt):
        """A side whose calls take the given durations in turn, again and again."""
        done = []

        def call():
            if len(done) == fails_at:
                raise error
            self.log.append(name)
            self.now += durations[len(done) % len(durations)]
            done.append(name)

        def seconds(call, count):
            start = self.now
            for _ in range(count):
                call()
            self.log.append(f"{name} x {count}")
            return (self.now - start) / count

        return Side(call, lambda: (), seconds)

    def turns(self, sides, budget):
        return clock.take_turns(sides, budget, pause=lambda: self.sleep(clock.PAUSE), now=lambda: self.now)


def test_sides_take_turns_after_a_pause_and_untimed_calls():
    machine = Machine()
    seconds, calls, interrupted = machine.turns({name: machine.side(name, [2e-3]) for name in "abc"}, 0.0)
    assert calls == {"a": 1, "b": 1, "c": 1} and not interrupted
    after = machine.log[machine.log.index("pause") :]
    expected = []
    for order in ("abc", "bca", "cab", "abc", "bca")[: len(seconds["a"])]:
        for name in order:
            expected += ["pause", *[name, f"{name} x 1"] * 3]  # twice two milliseconds before it counts
    assert after == expected
    assert len(seconds["a"]) == clock.FEWEST_ROUNDS and seconds["a"] == pytest.approx([2e-3] * 3)


def test_a_sample_lasts_long_enough_and_a_long_call_needs_no_warm_up():
    machine = Machine()
    _, calls, _ = machine.turns({"short": machine.side("short", [1e-5]), "long": machine.side("long", [0.2])}, 1.0)
    assert calls["long"] == 1 and 100 <= calls["short"] <= 1000
    turns = machine.log[machine.log.index("pause") :]
    assert turns[turns.index("long") - 1] == "pause" and turns[turns.index("long") + 1] == "long x 1"
    rest = turns[turns.index("short") :]
    warm = rest[: rest.index("pause")].count("short") - calls["short"]
    assert clock.WARM <= warm * 1e-5 <= clock.WARM + 2 * clock.SAMPLE


def test_the_budget_is_spent_but_five_rounds_are_made_unless_they_take_far_too_long():
    machine = Machine()
    seconds, _, _ = machine.turns({"a": machine.side("a", [0.01])}, 1.0)
    assert 0.9 <= len(seconds["a"]) * 0.02 <= 1.1
    assert len(Machine().turns({}, 1.0)[0]) == 0
    machine = Machine()
    assert len(machine.turns({"a": machine.side("a", [0.5])}, 1.0)[0]["a"]) == clock.LEAST_ROUNDS
    machine = Machine()
    assert len(machine.turns({"a": machine.side("a", [5.0])}, 1.0)[0]["a"]) == clock.FEWEST_ROUNDS


def test_ctrl_c_keeps_whole_rounds():
    machine = Machine()
    given = {"a": machine.side("a", [0.5]), "b": machine.side("b", [0.25], fails_at=5)}
    seconds, _, interrupted = machine.turns(given, 100.0)
    assert interrupted and {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4}
    machine = Machine()
    given = {"a": machine.side("a", [0.5]), "b": machine.side("b", [0.25], fails_at=2)}
    assert machine.turns(given, 100.0) == ({"a": (), "b": ()}, {"a": 1, "b": 1}, True)


def test_medians_quartiles_and_ratios_of_rounds():
    assert clock.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(2.0, 3.0, 4.0)
    # The machine is ten times slower from one round to the next; within each, theirs takes twice as long.
    ours = [1.0, 10.0, 1.0, 10.0]
    assert clock.ratio([2 * value for value in ours], ours) == Spread(2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (Spread(1.01, 1.5, 2.0), "faster"),
        (Spread(0.5, 0.9, 0.99), "slower"),
        (Spread(0.9, 1.5, 2.0), "no difference"),
        (Spread(0.5, 0.6, 1.1), "no difference"),
        (Spread(1.0, 1.5, 2.0), "no difference"),
        (Spread(0.5, 0.8, 1.0), "no difference"),
    ],
)
def test_there_is_no_difference_where_the_spread_exceeds_it(found, expected):
    assert clock.verdict(found) == expected


def test_results_that_are_not_equal_are_told():
    true = [np.array([1.0, -100.0], np.float32), np.array([[0.5]], np.float32)]
    assert clock.disagreement(true, [value * np.float32(1 + 5e-5) for value in true], "float32") is None
    for wrong in (1.001, float("nan"), float("inf")):
        found = [true[0], true[1] * np.float32(wrong)]
        assert clock.disagreement(true, found, "float32").startswith("computes something else")
    assert "1 arrays and not 2" in clock.disagreement(true, true[:1], "float32")
    assert "(1,)" in clock.disagreement(true, [true[0], true[1][0]], "float32")
    assert "float64" in clock.disagreement(true, [true[0], true[1].astype(np.float64)], "float32")
    zeros = [np.zeros(2)]
    assert clock.disagreement(zeros, zeros, "float64") is None


# Whole runs.


def contender(call, outputs=None, **fields):
    """Somebody who computes as `call` does, and claims the right results unless told otherwise."""

    @contextlib.contextmanager
    def build(problem, threads):
        def results():
            y, _ = problem.model(problem.x, lengths=problem.lengths)
            return (y if outputs is None else outputs(y),)

        yield Side(call, results)

    return Contender(build, "cpu", "fastlstm", **fields)


@pytest.fixture
def table(monkeypatch):
    """Ourselves, whichever backend that is, and room for others."""
    entries = {"fastlstm": contender(lambda: None)}
    monkeypatch.setattr(peers, "CONTENDERS", entries)
    monkeypatch.setattr(run, "CONTENDERS", entries)
    return entries


def measured(names, works=(TINY,), **options):
    return run.measure(works, names, **({"threads": 1, "seconds": 0.0} | options))


def test_who_computes_something_else_is_not_timed(table):
    called = []
    table["wrong"] = contender(lambda: called.append(0), lambda y: y * np.float32(1.001))
    table["right"] = contender(lambda: None)
    (row,) = measured(["fastlstm", "wrong", "right"]).rows
    assert list(row.sides) == ["fastlstm", "right"] and not called
    assert "computes something else: off by 1.0e-03" in row.refused["wrong"]


def test_who_fails_is_named_and_the_others_go_on(table):
    def fail():
        raise ValueError("no\nsuch luck")

    table["while timed"] = contender(fail)
    table["at first"] = contender(lambda: None, lambda y: fail())
    (row,) = measured(["fastlstm", "while timed", "at first"]).rows
    assert list(row.sides) == ["fastlstm"] and len(row.sides["fastlstm"].seconds) >= clock.FEWEST_ROUNDS
    assert row.refused == dict.fromkeys(["while timed", "at first"], "failed: ValueError: no such luck")


def test_who_is_not_here_is_said_with_the_way_to_get_it(table):
    table["other"] = contender(lambda: None, packages=("numpy", "fastlstm_no_such_package"))
    table["gpu"] = contender(lambda: None, obstacle=lambda threads: f"no GPU for {threads}")
    found = measured(["fastlstm", "other", "gpu"])
    assert found.absent == {"other": "pip install fastlstm_no_such_package", "gpu": "no GPU for 1"}
    assert list(found.rows[0].sides) == ["fastlstm"] and not found.rows[0].refused


def test_who_cannot_do_a_work_is_left_out(table):
    table["infers"] = contender(lambda: None, kinds=("infer",), dtypes=("float32",), ragged=False)
    works = [TINY, Work(3, 2, 4, 5, "float64"), Work.ragged(4, 2, 4, 5, kind="infer")]
    assert [list(row.sides) for row in measured(["fastlstm", "infers"], works).rows] == [
        ["fastlstm", "infers"], ["fastlstm"], ["fastlstm"],
    ]  # fmt: skip


def test_ctrl_c_keeps_the_rows_before_it(table):
    kept, calls = [], []

    def interrupt():
        calls.append(0)
        if len(calls) > 40:
            raise KeyboardInterrupt
        time.sleep(1e-3)

    table["fastlstm"] = contender(interrupt)
    works = [Work(n, 2, 4, 5) for n in range(1, 100)]
    found = measured(["fastlstm"], works, keep=kept.append)
    assert found.interrupted and 0 < len(found.rows) < 40
    assert [len(state.rows) for state in kept] == list(range(1, len(found.rows) + 1))
    assert all(len(row.sides["fastlstm"].seconds) >= clock.FEWEST_ROUNDS for row in found.rows)


def test_a_work_that_does_not_fit_in_memory_is_said(table, monkeypatch):
    def no_memory(work, of=Problem.of):
        if work == TINY:
            raise MemoryError("of course")
        return of(work)

    monkeypatch.setattr(Problem, "of", no_memory)
    (row,) = measured(["fastlstm"]).rows
    assert row.refused == {run.EVERYBODY: "not enough memory: of course"} and not row.sides


def test_the_map_is_measured_only_where_there_is_a_gpu(table):
    extra = [Work(2, 2, 2, 2)]
    assert len(measured(["fastlstm"], ours_only=extra).rows) == 1
    table["fastlstm cuda"] = contender(lambda: None)._replace(device="cuda", against=None)
    table["peer"] = contender(lambda: None)
    found = measured(["fastlstm", "fastlstm cuda", "peer"], ours_only=extra)
    assert [list(row.sides) for row in found.rows] == [
        ["fastlstm", "fastlstm cuda", "peer"],
        ["fastlstm", "fastlstm cuda"],
    ]


@pytest.mark.parametrize("given", [{"seconds": -1.0}, {"seconds": float("nan")}, {"threads": 0}])
def test_a_budget_or_a_number_of_threads_that_makes_no_sense(given, table):
    with pytest.raises(ArgumentError):
        measured(["fastlstm"], **given)


def test_denormals_are_observed(table):
    table["flushes"] = contender(lambda: None, lambda y: np.where(abs(y) < np.finfo(y.dtype).smallest_normal, 0, y))
    table["fails"] = contender(lambda: None, lambda y: 1 / 0)
    found = measured(["fastlstm", "flushes", "fails"]).denormals
    assert found == {"fastlstm": "kept", "flushes": "flushed to zero", "fails": "not observed: ZeroDivisionError"}


# Ourselves and the peers, for real.


@needs_kernels
@pytest.mark.parametrize("kind", ["infer", "train", "stream"])
def test_our_sides_agree_and_put_the_threads_back(kind, dtype):
    pytest.importorskip("threadpoolctl", reason="the reference's threads are held by threadpoolctl")
    before = fastlstm.get_num_threads()
    work = Work(1 if kind == "stream" else 3, 2, 4, 5, dtype.name, kind)
    row, interrupted = run.measure_row(work, ["fastlstm", "fastlstm reference"], before + 3, 0.0)
    assert set(row.sides) == {"fastlstm", "fastlstm reference"} and not row.refused and not interrupted
    assert fastlstm.get_num_threads() == before
    assert "thread" in row.plan


@needs_kernels
def test_a_stream_goes_on_from_its_state():
    problem = Problem.of(Work(1, 2, 4, 5, kind="stream"))
    with sides.cpu(problem, 1) as side:
        (first,) = side.outputs()
        y, _ = problem.model(np.repeat(problem.x, sides.CHECKED_STEPS, axis=0))
        np.testing.assert_allclose(first, y, rtol=1e-5)
        side.call()
        np.testing.assert_array_equal(side.outputs()[0], first)  # it starts anew


def test_torch_gets_the_same_work_and_its_threads_back():
    torch = pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")
    before = torch.get_num_threads()
    for work in (TINY, Work(3, 2, 4, 5, "float64", "train"), Work(1, 2, 4, 5, kind="stream"), Work.ragged(6, 4, 4, 5)):
        problem = Problem.of(work)
        with sides.cpu(problem, 1) as ours, peers.torch_cpu(problem, before + 1) as theirs:
            assert torch.get_num_threads() == before + 1
            assert clock.disagreement(ours.outputs(), theirs.outputs(), work.dtype) is None
            assert theirs.time(2) > 0
        assert torch.get_num_threads() == before


def test_torch_on_a_gpu_computes_without_tf32(monkeypatch):
    torch = pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")
    monkeypatch.setattr(peers, "TORCH_GPU", "cpu")
    parts = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [part.allow_tf32 for part in parts]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    problem = Problem.of(TINY)
    with peers.torch_cuda(problem, 1) as side:
        assert not any(part.allow_tf32 for part in parts)
        assert clock.disagreement((problem.model(problem.x)[0],), side.outputs(), "float32") is None
    assert torch.backends.cudnn.allow_tf32
    monkeypatch.undo()
    assert [part.allow_tf32 for part in parts] == before


def test_a_missing_numba_or_a_forced_backend_is_said(monkeypatch):
    with fastlstm.use_backend("reference"):
        assert "forced" in peers.missing("fastlstm", 1)

    def fail(name):
        raise ImportError("no numba")

    monkeypatch.setattr(fastlstm.dispatch, "backend_named", fail)
    assert peers.missing("fastlstm", 1) == "no numba"


@pytest.mark.parametrize("works", [(TINY, Work.ragged(6, 4, 4, 5, kind="infer"), Work(1, 2, 4, 5, kind="stream"))])
def test_onnxruntime_gets_the_same_work(works):
    pytest.importorskip("onnxruntime", reason="the oracle is missing: onnxruntime is not installed")
    pytest.importorskip("onnx", reason="the oracle is missing: onnx is not installed")
    for work in works:
        problem = Problem.of(work)
        with sides.cpu(problem, 1) as ours, peers.onnxruntime(problem, 1) as theirs:
            assert clock.disagreement(ours.outputs(), theirs.outputs(), work.dtype) is None
            assert theirs.time(2) > 0


def test_peers_are_chosen_by_name():
    assert peers.chosen("none") == ["fastlstm", "fastlstm cuda", "fastlstm cuda with copies"]
    assert peers.chosen(" torch,reference") == [*peers.chosen("none"), "torch", "fastlstm reference"]
    assert set(peers.chosen(None)) == set(peers.CONTENDERS) - {"fastlstm reference"}
    with pytest.raises(ArgumentError, match="there is no peer 'tensorfloat'"):
        peers.chosen("torch,tensorfloat")


def test_each_side_is_compared_with_its_own_device():
    names = [*peers.CONTENDERS, "tomorrow's", "tomorrow's cuda"]
    assert set(peers.opponents("fastlstm", names)) == {"torch", "onnxruntime", "openvino", "jax", "fastlstm reference",
                                                       "tomorrow's"}  # fmt: skip
    assert set(peers.opponents("fastlstm cuda", names)) == {"fastlstm", "torch cuda", "jax cuda", "tomorrow's cuda"}
    assert peers.opponents("fastlstm cuda with copies", names) == ["fastlstm"]


@pytest.fixture
def gpu(monkeypatch):
    """The stand-in for CuPy, with what describes a machine."""
    library = FakeCupy()
    library.cuda.runtime.getDeviceProperties = lambda number: {"name": b"none"}
    library.cuda.runtime.driverGetVersion = library.cuda.runtime.runtimeGetVersion = lambda: 0
    monkeypatch.setattr(library.cuda.Device, "compute_capability", "00", raising=False)
    with cuda_row.installed(library):
        yield library


@needs_kernels
@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_the_gpu_is_measured_with_and_without_copies(gpu):
    kinds = {"infer": 3, "train": 3, "stream": 1}
    for kind, steps in kinds.items():
        names = ["fastlstm", "fastlstm cuda", "fastlstm cuda with copies"]
        row, _ = run.measure_row(Work(steps, 2, 4, 5, kind=kind), names, 1, 0.0)
        assert list(row.sides) == names and not row.refused, row.refused
    problem = Problem.of(Work(3, 2, 4, 5, kind="train"))
    for build, moved in ((sides.cuda, False), (sides.cuda_with_copies, True)):
        with build(problem, 1) as side:
            gpu.pool.copies.clear()
            gpu.pool.waits.clear()
            side.call()
        assert bool(sum(gpu.pool.copies) >= problem.x.nbytes + problem.dy.nbytes) == moved
        assert (gpu.pool.waits.count("get") == 5) == moved


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_the_ceilings_of_a_gpu(gpu):
    found = ceilings.cuda(("float32", "float64"), size=32, copied=4096, repeats=2)
    assert set(found.operations) == {"float32", "float64"}
    assert min(*found.operations.values(), found.bandwidth) > 0


@needs_kernels
def test_the_ceilings_of_the_processor_are_those_of_all_threads():
    found = ceilings.cpu_peak("float32", 2, seconds=0.02)
    assert 1e8 < found < 1e13
    assert 1e7 < ceilings.cpu_bandwidth(3, seconds=0.0, size=1 << 20) < 1e13


def test_ceilings_take_the_time_in_which_all_threads_were_done():
    assert ceilings._shortest([lambda: time.sleep(0.02), lambda: None], 0.0) >= 0.02

    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):
        ceilings._shortest([fail, lambda: None], 0.0)
