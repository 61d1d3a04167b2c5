"""What a benchmark found: the rows, the machine, and the JSON file that keeps them.

The file holds the seconds of every round; medians, quartiles, ratios and verdicts are computed from these whenever they
are shown, and so cannot contradict them. :func:`load` believes nothing: a file that is broken or foreign raises
:class:`~fastlstm.errors.ResultsFileError`, which says where.

>>> row = Row(Work(1, 1, 2, 3), threads=1, plan="", sides={}, refused={})
>>> results = Results(machine={"processor": "some"}, threads=1, rows=(row,))
>>> read(text_of(results)) == results
True
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from fastlstm.bench.clock import Spread, Timing, ratio
from fastlstm.bench.work import Work
from fastlstm.errors import ArgumentError, ResultsFileError

__all__ = ["Ceiling", "Change", "Results", "Row", "compare", "load", "read", "save", "text_of"]

FORMAT, VERSION = "fastlstm bench", 1
MOST_BYTES = 1 << 28  # of a file


@dataclass(frozen=True)
class Ceiling:
    """The most that a device did in this run.

    Attributes
    ----------
    operations : dict of str to float
        Operations per second of matrix products, by dtype.
    bandwidth : float
        Bytes per second, read and written together, of a copy in main memory.
    """

    operations: Mapping[str, float]
    bandwidth: float


@dataclass(frozen=True)
class Row:
    """One work and everybody who did it.

    Attributes
    ----------
    work : Work
        What was computed.
    threads : int
        Number of threads that each side was given.
    plan : str
        How fastlstm ran it, in words.
    sides : dict of str to Timing
        Who was timed.
    refused : dict of str to str
        Who was not, and why: it failed, or computed something else.
    """

    work: Work
    threads: int
    plan: str
    sides: Mapping[str, Timing]
    refused: Mapping[str, str]

    def ratio(self, theirs: str, ours: str) -> Spread | None:
        """Return the spread of theirs / ours over the rounds, None if either was not timed."""
        if theirs not in self.sides or ours not in self.sides:
            return None
        return ratio(self.sides[theirs].seconds, self.sides[ours].seconds)


@dataclass(frozen=True)
class Results:
    """Everything that one run found.

    Attributes
    ----------
    machine : dict of str to str
        Versions, processor and the like, by name.
    threads : int
        Number of threads that each side was given.
    rows : tuple of Row
        What was measured.
    ceilings : dict of str to Ceiling
        By device, ``cpu`` and ``cuda``.
    absent : dict of str to str
        Who was asked for and is not here, and what to do about it.
    denormals : dict of str to str
        What each side does with the smallest numbers.
    method : dict of str to str
        How it was measured, in words.
    made : str
        When, in ISO 8601.
    interrupted : bool
        Whether Ctrl-C ended it before its end.
    """

    machine: Mapping[str, str]
    threads: int
    rows: tuple[Row, ...]
    ceilings: Mapping[str, Ceiling] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    denormals: Mapping[str, str] = field(default_factory=dict)
    method: Mapping[str, str] = field(default_factory=dict)
    made: str = ""
    interrupted: bool = False

    def with_row(self, row: Row) -> Results:
        """Return the same and one more row."""
        return replace(self, rows=(*self.rows, row))

    def share_of_peak(self, row: Row, side: str) -> float | None:
        """Return what share of the device's measured peak a side reached in a row."""
        ceiling = self.ceilings.get("cuda" if "cuda" in side.split() else "cpu")
        if ceiling is None or row.work.dtype not in ceiling.operations or side not in row.sides:
            return None
        return row.work.operations / row.sides[side].spread.middle / ceiling.operations[row.work.dtype]


def text_of(results: Results) -> str:
    """Return the results as JSON text."""
    return json.dumps({"format": FORMAT, "version": VERSION} | asdict(results), indent=1, allow_nan=False) + "\n"


def save(path: Path, results: Results) -> None:
    """Write the file as a whole: it is readable whenever this is interrupted."""
    part = path.with_name(path.name + ".part")
    part.write_text(text_of(results), encoding="utf-8")
    part.replace(path)


def load(path: Path) -> Results:
    """Read a file that :func:`save` wrote.

    Raises
    ------
    ResultsFileError
        If it is broken or foreign.
    OSError
        If it cannot be opened.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ResultsFileError("more than 256 MiB")
        return read(path.read_text(encoding="utf-8"))
    except (ResultsFileError, UnicodeDecodeError) as error:
        raise ResultsFileError(f"{path} holds no results of fastlstm bench: {error}") from error


def read(text: str) -> Results:
    """Read what :func:`text_of` made.

    Raises
    ------
    ResultsFileError
        If it is anything else.
    """
    try:
        whole = json.loads(text, parse_constant=_no_constant)
    except (json.JSONDecodeError, RecursionError, ValueError) as error:
        raise ResultsFileError(f"no JSON: {error}") from error
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise ResultsFileError(f'no "format": "{FORMAT}"')
    if type(whole.get("version")) is not int or whole["version"] != VERSION:
        raise ResultsFileError(f"version {whole.get('version')!r}, and this program reads {VERSION}")
    part = _Part(whole, "results")
    return Results(
        machine=part.texts("machine"),
        threads=part.count("threads"),
        rows=tuple(_row(row) for row in part.parts("rows")),
        ceilings={
            name: Ceiling(
                {dtype: ceiling.part("operations").positive(dtype) for dtype in ceiling.part("operations").content},
                ceiling.positive("bandwidth"),
            )
            for name, ceiling in part.named("ceilings").items()
        },
        absent=part.texts("absent"),
        denormals=part.texts("denormals"),
        method=part.texts("method"),
        made=part.of("made", str),
        interrupted=part.of("interrupted", bool),
    )


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON's")


def _row(part: _Part) -> Row:
    work = part.part("work")
    lengths = work.get("lengths")
    if lengths is not None:
        lengths = tuple(work.of("lengths", list))
    try:
        done = Work(
            steps=work.count("steps"),
            batch=work.count("batch"),
            inputs=work.count("inputs"),
            hidden=work.count("hidden"),
            dtype=work.of("dtype", str),
            kind=work.of("kind", str),
            lengths=lengths,
        )
    except ArgumentError as error:
        raise ResultsFileError(f"{work.where}: {error}") from error
    sides = {name: _timing(side) for name, side in part.named("sides").items()}
    if len({len(side.seconds) for side in sides.values()}) > 1:
        raise ResultsFileError(f"{part.where}: the sides have different numbers of rounds")
    return Row(done, part.count("threads"), part.of("plan", str), sides, part.texts("refused"))


def _timing(part: _Part) -> Timing:
    seconds = _Part(dict(enumerate(part.of("seconds", list))), f"{part.where}.seconds")
    if not seconds.content:
        raise ResultsFileError(f"{part.where}: no rounds")
    return Timing(
        tuple(seconds.positive(number) for number in seconds.content),
        part.count("calls"),
        part.positive("build"),
        part.positive("first"),
    )


class _Part:
    """A JSON object and where it stands; what is taken out of it is checked."""

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, dict):
            raise ResultsFileError(f"{where} is no object")
        self.content: dict[Any, Any] = content
        self.where = where

    def get(self, name: Any) -> Any:
        if name not in self.content:
            raise ResultsFileError(f"{self.where} has no {name!r}")
        return self.content[name]

    def of(self, name: Any, kind: type) -> Any:
        value = self.get(name)
        if type(value) is not kind:
            raise ResultsFileError(f"{self.where}.{name} is no {kind.__name__}")
        return value

    def count(self, name: Any) -> int:
        value: int = self.of(name, int)
        if not 1 <= value < 1 << 60:
            raise ResultsFileError(f"{self.where}.{name} is {value}")
        return value

    def positive(self, name: Any) -> float:
        value = self.get(name)
        if type(value) not in (int, float) or not 0 < value < 1e300 or not math.isfinite(value):
            raise ResultsFileError(f"{self.where}.{name} is no positive number")
        return float(value)

    def part(self, name: Any) -> _Part:
        return _Part(self.get(name), f"{self.where}.{name}")

    def named(self, name: Any) -> dict[str, _Part]:
        part = self.part(name)
        return {key: part.part(key) for key in part.content}

    def parts(self, name: Any) -> list[_Part]:
        return [_Part(value, f"{self.where}.{name}[{n}]") for n, value in enumerate(self.of(name, list))]

    def texts(self, name: Any) -> dict[str, str]:
        part = self.part(name)
        return {key: part.of(key, str) for key in part.content}


class Change(NamedTuple):
    """One side of one work in two runs.

    Attributes
    ----------
    work : Work
        What was computed.
    threads : int
        With how many threads.
    side : str
        By whom.
    before, now : Spread
        The seconds in either run.
    """

    work: Work
    threads: int
    side: str
    before: Spread
    now: Spread

    @property
    def verdict(self) -> str:
        """'slower' or 'faster' where the quartiles of the two runs do not overlap, else 'no difference'."""
        if self.now.low > self.before.high:
            return "slower"
        return "faster" if self.now.high < self.before.low else "no difference"


def compare(before: Results, now: Results) -> tuple[list[Change], list[str]]:
    """Compare two runs, side by side of equal work.

    Returns
    -------
    changes : list of Change
        Everything that is in both, in the order of `now`.
    alone : list of str
        What is in one of them only, in words.
    """
    old, new = _timings(before), _timings(now)
    changes = [Change(*key, old[key].spread, timing.spread) for key, timing in new.items() if key in old]
    alone = [
        f"{work.name} {work.kind} {work.dtype}, {threads} thread(s), {side}: only {where}"
        for keys, where in ((new.keys() - old.keys(), "now"), (old.keys() - new.keys(), "before"))
        for work, threads, side in sorted(keys, key=str)
    ]
    return changes, alone


def _timings(results: Results) -> dict[tuple[Work, int, str], Timing]:
    return {(row.work, row.threads, side): timing for row in results.rows for side, timing in row.sides.items()}
