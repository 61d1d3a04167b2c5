"""One measurement: build the sides of each work, compare their results, and time them in turn.

>>> found = measure([Work(3, 2, 4, 8)], ["fastlstm"], threads=1, seconds=0.01)
>>> found.cases[0].spread("fastlstm").middle > 0
True
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fastlstm.bench import clock, peaks, peers, report, results
from fastlstm.bench.clock import SideError
from fastlstm.bench.results import Case, Results
from fastlstm.bench.sides import Side, with_threads
from fastlstm.bench.work import Array, Problem, Work
from fastlstm.diagnostics import describe_for_others
from fastlstm.errors import ArgumentError

__all__ = ["begin", "keep", "measure", "measure_case", "measure_sides"]

EVERYBODY = "every side"  # is refused what does not fit in memory
Builders = Mapping[str, Callable[[], Side]]


def begin(name: str, names: Iterable[str], threads: int, about: str = "") -> Results:
    """Return results without cases: the machine, the sides' versions, and which of these sides are absent."""
    machine = describe_for_others()  # starts a process, which has to be before some of the peers start their threads
    reasons = {side: peers.missing(side) for side in names}
    absent = {side: reason for side, reason in reasons.items() if reason is not None}
    packages = [package for side in reasons if side not in absent for package in peers.CONTENDERS[side].packages]
    machine |= {package: _version(package) for package in packages}
    if "GPU" in machine:
        machine["CuPy"] = import_module("cupy").__version__
    if "torch cuda" in reasons and "torch cuda" not in absent:
        machine["cuDNN"] = str(import_module("torch").backends.cudnn.version())
    made = datetime.now(UTC).isoformat(timespec="seconds")
    return Results(name, machine, threads, about=about, absent=absent, made=made)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # installed under another name than the module's
        return str(getattr(import_module(package), "__version__", "of unknown version"))


def keep(found: Results, cases: Iterable[Case], path: Path | None, show: Callable[[str], object] = str) -> Results:
    """Add cases as they are measured, until Ctrl-C; the file at `path` is written anew after each.

    A case takes the place of one of the same name in the same table. `show` is called with a line of text for each.
    """
    try:
        for case in cases:
            others = [other for other in found.cases if (other.group, other.name) != (case.group, case.name)]
            found = replace(found, cases=(*others, case))
            show(report.line(case))
            if path:
                results.save(path, found)
    except KeyboardInterrupt:  # the case that it cuts short is left out
        found = replace(found, interrupted=True)
    if path:
        results.save(path, found)
    return found


def measure(
    works: Sequence[Work],
    names: Sequence[str],
    *,
    threads: int,
    seconds: float,
    ours_only: Sequence[Work] = (),
    path: Path | None = None,
    progress: Callable[[str], object] = str,
) -> Results:
    """Measure all works by the sides of these names, in at least so many seconds each, until Ctrl-C.

    `ours_only` is the map of where a GPU pays: for our own sides, in a quarter of the time each, if there is a GPU. The
    file at `path` is written anew after each work; `progress` is called with a line of text before each. ArgumentError
    if seconds or threads make no sense.
    """
    if not 0 <= seconds < 1e9 or threads < 1:
        raise ArgumentError(f"seconds must be at least 0 and threads at least 1, got {seconds} and {threads}")
    found = begin("bench", names, threads)
    here = [name for name in names if name not in found.absent]
    plan = {work: (here, seconds) for work in works}
    if "cuda" in map(results.device_of, here):
        ours = [name for name in here if name in peers.OURS]
        plan |= {work: (ours, seconds / 4) for work in ours_only if work not in plan}
    dtypes = tuple(dict.fromkeys(work.dtype for work in plan))
    devices = dict.fromkeys(results.device_of(name) for name in here if name in peers.OURS)
    found = replace(found, peaks={device: peaks.of(device, threads, dtypes) for device in devices})

    def cases() -> Iterator[Case]:
        for number, (work, (sides, budget)) in enumerate(plan.items(), 1):
            progress(f"{number} of {len(plan)}: {work.title}")
            yield measure_case(work, sides, threads, budget)

    return keep(found, cases(), path)


def measure_case(work: Work, names: Iterable[str], threads: int, seconds: float) -> Case:
    """Measure one work by the sides that can do it."""
    able = {name: peers.CONTENDERS[name] for name in names if peers.CONTENDERS[name].able(work)}
    try:
        problem = Problem.of(work)
        builders = {name: functools.partial(side.build, problem, threads) for name, side in able.items()}
        tolerances = {name: side.tolerance for name, side in able.items()}
        case = measure_sides(work.title, builders, threads, seconds, tolerances, work.dtype)
    except MemoryError as error:
        case = Case(work.title, {}, threads=threads, refused={EVERYBODY: f"not enough memory: {error}"})
    return replace(case, work=work, group=work.kind)


def measure_sides(
    name: str,
    builders: Builders,
    threads: int,
    seconds: float,
    tolerances: Mapping[str, float | None] | None = None,
    dtype: str = "float32",
) -> Case:
    """Build sides, compare them with the first that can be built, and time in turn those that agree and do not fail.

    A side whose tolerance is infinite is not compared: it is meant to compute something else. The case has the values;
    in its facts the seconds of each side's first results, building included.
    """
    refused, built, facts = dict[str, str](), dict[str, Side](), dict[str, float]()
    truth: tuple[Array, ...] | None = None
    with with_threads(threads, builders):
        for side, build in builders.items():
            try:
                start = time.perf_counter()
                made = build()
                found = made.outputs()
                facts[f"first results, {side}"] = time.perf_counter() - start
                truth = found if truth is None else truth
                allowed = (tolerances or {}).get(side)
                wrong = None if allowed == math.inf else clock.disagreement(truth, found, dtype, allowed)
                if wrong:
                    refused[side] = wrong
                else:
                    built[side] = made
                del found
            except Exception as error:  # whatever it is, the other sides are measured
                refused[side] = _words(error)
        values: dict[str, tuple[float, ...]] | None = None
        while values is None:
            try:
                values = clock.take_turns(built, seconds)
            except SideError as error:
                refused[str(error)] = _words(error.__cause__)
                del built[str(error)]
    return Case(name, values, threads=threads, facts=facts, refused=refused)


def _words(error: BaseException | None) -> str:
    """Say in one line what failed."""
    return " ".join(f"failed: {type(error).__name__}: {error}".split())[:300]
