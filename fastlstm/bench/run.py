"""Measure: build the sides of each work, compare what they compute, and time them in turn.

>>> results = measure([Work(3, 2, 4, 8)], ["fastlstm"], threads=1, seconds=0.01)
>>> results.rows[0].sides["fastlstm"].spread.middle > 0
True
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from fastlstm.bench import ceilings, clock, peers
from fastlstm.bench.clock import SideError, Timing
from fastlstm.bench.peers import CONTENDERS, OURS
from fastlstm.bench.results import Results, Row
from fastlstm.bench.sides import Side
from fastlstm.bench.work import Problem, Work
from fastlstm.diagnostics import describe_for_others
from fastlstm.errors import ArgumentError

__all__ = ["denormals", "measure", "measure_row"]

EVERYBODY = "everybody"  # is refused what does not fit in memory
METHOD = {
    "sides": "in one process, on the same model and data, in turn, the order rotating from round to round",
    "check": f"outputs equal before timing: off by at most {clock.TOLERANCE} of the largest value of an array",
    "sample": f"a pause of {1e3 * clock.PAUSE:.0f} ms, and until no thread of the process works; untimed calls"
    f" for {1e3 * clock.WARM:.0f} ms; then calls for {1e3 * clock.SAMPLE:.0f} ms or more",
    "figures": "medians and quartiles over rounds; ratios of each round; no difference if 1 is between their quartiles",
    "clock": "the host's; CUDA events for what stays on a GPU",
    "threads": "equal for all sides",
    "precision": "the dtype of the row on all sides: no TF32, no bfloat16",
    "beginning": "building a side and its first results, which compile, are timed apart, and are in no other figure",
}


def measure(
    works: Sequence[Work],
    names: Iterable[str],
    *,
    threads: int,
    seconds: float,
    ours_only: Sequence[Work] = (),
    progress: Callable[[Iterable[Work]], Iterable[Work]] = iter,
    keep: Callable[[Results], Any] = lambda results: None,
) -> Results:
    """Measure all works.

    Parameters
    ----------
    works : sequence of Work
        What to compute, by everybody who can.
    names : iterable of str
        Who shall, of :data:`~fastlstm.bench.peers.CONTENDERS`; who is not here is listed in the results as absent.
    threads : int
        Number of threads that each side is given.
    seconds : float
        For timing each work, at least; building and comparing come on top.
    ours_only : sequence of Work
        What only our own sides are to compute, after the others, in a quarter of the time each: the map of where a GPU
        starts to pay. It is left out if there is no GPU.
    progress : callable
        Given the works, gives them one by one.
    keep : callable
        Called with what there is, after each work.

    Returns
    -------
    Results
        Everything, or what there is until Ctrl-C.
    """
    if not 0 <= seconds < 1e9:
        raise ArgumentError(f"seconds must be a number of at least 0, got {seconds}")
    if threads < 1:
        raise ArgumentError(f"threads must be an integer of at least 1, got {threads}")
    # Starts a process, which has to be before some of the peers start their threads.
    machine = describe_for_others()
    reasons = {name: peers.missing(name, threads) for name in names}
    here = [name for name, reason in reasons.items() if reason is None]
    results = Results(
        machine=machine | {package: _version(package) for name in here for package in CONTENDERS[name].packages},
        threads=threads,
        rows=(),
        absent={name: reason for name, reason in reasons.items() if reason is not None},
        method=METHOD,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    plan = [(work, here, seconds) for work in works]
    if any(CONTENDERS[name].device == "cuda" for name in here):
        ours = [name for name in here if name in OURS]
        plan += [(work, ours, seconds / 4) for work in ours_only if work not in works]
    dtypes = tuple(dict.fromkeys(work.dtype for work, *_ in plan))
    try:
        results = replace(results, ceilings=_ceilings(here, threads, dtypes))
        how = {work: (who, budget) for work, who, budget in plan}
        for work in progress(list(how)):
            who, budget = how[work]
            row, interrupted = measure_row(work, who, threads, budget)
            if row.sides or not interrupted:
                results = results.with_row(row)
                keep(results)
            if interrupted:
                raise KeyboardInterrupt
        # Last: it would have compiled what the rows' first calls are to show.
        results = replace(results, denormals={name: denormals(name, threads) for name in here})
    except KeyboardInterrupt:
        results = replace(results, interrupted=True)
    return results


def _version(package: str) -> str:
    """Return a package's version; some are installed under several names, of which this is the module's."""
    try:
        return version(package)
    except PackageNotFoundError:
        return str(getattr(import_module(package), "__version__", "of unknown version"))


def _ceilings(here: Sequence[str], threads: int, dtypes: tuple[str, ...]) -> dict[str, Any]:
    """Measure the devices that our own sides run on."""
    devices = dict.fromkeys(CONTENDERS[name].device for name in here if name in OURS and name != peers.REFERENCE)
    return {device: ceilings.of(device, threads, dtypes) for device in devices}


def measure_row(work: Work, names: Iterable[str], threads: int, seconds: float) -> tuple[Row, bool]:
    """Measure one work; return its row, and whether Ctrl-C cut it short.

    The first side that can do the work has the truth that the others are compared with; our own come first.
    """
    refused: dict[str, str] = {}
    sides: dict[str, Side] = {}
    began: dict[str, tuple[float, float]] = {}
    plan, timings, interrupted = "", {}, False
    with contextlib.ExitStack() as stack:
        try:
            problem = Problem.of(work)
            truth = None
            for name in names:
                if not peers.able(name, work):
                    continue
                with _refusing(refused, name):
                    start = time.perf_counter()
                    side = stack.enter_context(CONTENDERS[name].build(problem, threads))
                    built = time.perf_counter()
                    found = side.outputs()
                    began[name] = built - start, time.perf_counter() - built
                    truth = found if truth is None else truth
                    wrong = clock.disagreement(truth, found, work.dtype)
                    if wrong is None:
                        sides[name] = side
                    else:
                        refused[name] = wrong
                    del found
            if peers.CPU in sides:  # which holds the number of threads
                plan = problem.frozen_or_trained.plan(problem.x, problem.lengths).partition(": ")[2]
            timed, interrupted = _timed(sides, seconds, refused)
            timings = {name: Timing(*figures, *began[name]) for name, figures in timed.items()}
        except KeyboardInterrupt:
            interrupted = True
        except MemoryError as error:
            refused[EVERYBODY] = f"not enough memory: {error}"
    return Row(work, threads, plan, timings, refused), interrupted


def _timed(
    sides: dict[str, Side], seconds: float, refused: dict[str, str]
) -> tuple[dict[str, tuple[tuple[float, ...], int]], bool]:
    """Time the sides in turn, and anew without the one that fails meanwhile."""
    while True:
        try:
            found, calls, interrupted = clock.take_turns(sides, seconds)
        except SideError as error:
            refused[error.side] = _words(error.__cause__)
            sides = {name: side for name, side in sides.items() if name != error.side}
        else:
            return {name: (rounds, calls[name]) for name, rounds in found.items() if rounds}, interrupted


def _words(error: BaseException | None) -> str:
    """Say in one line what failed."""
    return " ".join(f"failed: {type(error).__name__}: {error}".split())[:300]


@contextlib.contextmanager
def _refusing(refused: dict[str, str], name: str) -> Iterator[None]:
    """Note the error of one side, whatever it is, and go on with the others."""
    try:
        yield
    except Exception as error:
        refused[name] = _words(error)


def denormals(name: str, threads: int) -> str:
    """Observe what a side does with denormals, the numbers below the smallest normal one.

    A model of one unit is made such that the smallest normal number, as its input, gives an output below: a side that
    keeps denormals returns it, one that flushes them returns zero. Then the smallest normal number is halved in this
    thread, to see whether the side has left it flushing.
    """
    dtype = "float32"
    problem = Problem.of(Work(1, 1, 1, 1, dtype))
    for parameter, values in {"weight_ih_l0": (0, 0, 1, 0), "weight_hh_l0": (0,) * 4, "bias_l0": (0,) * 4}.items():
        problem.model.params[parameter].flat = values
    tiny = np.finfo(dtype).smallest_normal
    problem.x.fill(tiny)
    try:
        with CONTENDERS[name].build(problem, threads) as side:
            (y,) = side.outputs()
            after = np.multiply(np.full(1, tiny), np.float32(0.5))[0]
    except Exception as error:
        return f"not observed: {type(error).__name__}"
    inside = "kept" if 0 < float(y[0, 0, 0]) < tiny else "flushed to zero"
    return inside + ("" if after > 0 else "; flushing is left on in the calling thread")
