"""The one format of all results: cases, the machine, and the JSON file that keeps them, one case a line.

A case keeps the value of every round; medians, quartiles, ratios and verdicts are computed from these when they are
shown. :func:`load` checks everything: a broken or foreign file raises :class:`~fastlstm.errors.ResultsFileError`.

>>> case = Case("a loop", {"fastlstm": (1.0, 1.1, 1.0), "torch": (2.0, 2.2, 2.1)})
>>> case.ratio("torch", "fastlstm")
Spread(low=2.0, middle=2.0, high=2.05)
>>> results = Results("loop", {"processor": "some"}, threads=1, cases=(case,))
>>> read(text_of(results)) == results
True
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fastlstm.bench.clock import Spread, ratio, spread
from fastlstm.bench.work import Work
from fastlstm.errors import ArgumentError, ResultsFileError

__all__ = ["Case", "Ceiling", "Results", "load", "read", "save", "text_of"]

FORMAT = "fastlstm results 2"
MOST_BYTES = 1 << 28  # of a file


@dataclass(frozen=True)
class Ceiling:
    """The most that a device did: operations per second of matrix products by dtype, bytes per second of a copy."""

    operations: Mapping[str, float]
    bandwidth: float


@dataclass(frozen=True)
class Case:
    """One thing that was measured on several sides; less is better."""

    name: str
    values: Mapping[str, tuple[float, ...]]  # of each side; those at the same place belong to the same round
    unit: str = "s"  # or bytes
    threads: int = 1  # that each side was given
    group: str = ""  # the table that the case belongs to
    work: Work | None = None
    facts: Mapping[str, float] = field(default_factory=dict)  # such as an error, or seconds of the first results
    refused: Mapping[str, str] = field(default_factory=dict)  # sides that failed or computed something else, and why
    bounds: tuple[str, ...] = ()  # sides that are lower bounds: they neither win nor lose
    ratios: Mapping[str, Spread] = field(default_factory=dict)  # to ours, where `values` do not have every round

    def __post_init__(self) -> None:
        if self.unit not in ("s", "bytes") or self.threads < 1:
            raise ResultsFileError(f"{self.name}: no unit {self.unit!r}, or {self.threads} threads")
        counts = {len(values) for values in self.values.values()}
        if len(counts) > 1 or 0 in counts:
            raise ResultsFileError(f"{self.name}: the sides have different numbers of rounds, or none")
        if not all(value > 0 for values in (*self.values.values(), *self.ratios.values()) for value in values):
            raise ResultsFileError(f"{self.name}: a value is no positive number")

    def spread(self, side: str) -> Spread:
        """The median of a side's values, between their quartiles."""
        return spread(self.values[side])

    def ratio(self, theirs: str, ours: str = "fastlstm") -> Spread | None:
        """Spread of theirs / ours over the rounds, None if either was not measured."""
        if theirs in self.ratios and ours == "fastlstm":
            return self.ratios[theirs]
        if theirs not in self.values or ours not in self.values:
            return None
        return ratio(self.values[theirs], self.values[ours])


@dataclass(frozen=True)
class Results:
    """Everything that one run found."""

    name: str  # of the file, without its suffix
    machine: Mapping[str, str]  # versions, processor and the like, by name
    threads: int  # that each side was given, unless a case says otherwise
    cases: tuple[Case, ...] = ()
    about: str = ""  # what was measured
    ceilings: Mapping[str, Ceiling] = field(default_factory=dict)  # by device, "cpu" and "cuda"
    absent: Mapping[str, str] = field(default_factory=dict)  # sides that cannot run here, and what to do about it
    steps: tuple[Mapping[str, str], ...] = ()  # of a stage of .ci/gpu: name, result, seconds, last line of the log
    made: str = ""  # when, in ISO 8601
    interrupted: bool = False  # by Ctrl-C

    def with_case(self, case: Case) -> Results:
        """Return the same and one more case."""
        return replace(self, cases=(*self.cases, case))

    def share_of_peak(self, case: Case, side: str) -> float | None:
        """Return the share of the device's measured peak that a side reached."""
        ceiling = self.ceilings.get("cuda" if "cuda" in side.split() else "cpu")
        if case.work is None or ceiling is None or case.work.dtype not in ceiling.operations or side not in case.values:
            return None
        return case.work.operations / case.spread(side).middle / ceiling.operations[case.work.dtype]


def text_of(results: Results) -> str:
    """Return the results as JSON text."""
    content = {"format": FORMAT} | asdict(results)
    cases = ",\n".join("  " + json.dumps(case, allow_nan=False) for case in content.pop("cases"))
    head = json.dumps(content, indent=1, allow_nan=False).removesuffix("\n}")
    return f'{head},\n "cases": [{cases and chr(10) + cases + chr(10) + " "}]\n}}\n'


def save(path: Path, results: Results) -> None:
    """Write the file as a whole, under its own name: it is readable whenever this is interrupted."""
    part = path.with_name(path.name + ".part")
    part.write_text(text_of(replace(results, name=path.stem)), encoding="utf-8")
    part.replace(path)


def load(path: Path) -> Results:
    """Read a file that :func:`save` wrote; ResultsFileError if it is broken or foreign."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ResultsFileError("more than 256 MiB")
        return read(path.read_text(encoding="utf-8"))
    except (ResultsFileError, UnicodeDecodeError) as error:
        raise ResultsFileError(f"{path} holds no results: {error}") from error


_WORK = {"steps": int, "batch": int, "inputs": int, "hidden": int, "dtype": str, "kind": str, "layers": int,
         "bidirectional": bool, "unbatched": bool, "lengths": ([int], None)}  # fmt: skip
_CASE = {"name": str, "values": {str: [float]}, "unit": str, "threads": int, "group": str, "work": (_WORK, None),
         "facts": {str: float}, "refused": {str: str}, "bounds": [str], "ratios": {str: [float]}}  # fmt: skip
_FILE = {"format": str, "name": str, "machine": {str: str}, "threads": int, "cases": [_CASE], "about": str,
         "ceilings": {str: {"operations": {str: float}, "bandwidth": float}}, "absent": {str: str},
         "steps": [{str: str}], "made": str, "interrupted": bool}  # fmt: skip
"""Types by name: ``{str: type}`` is an object of any names, a tuple has alternatives."""


def _checked(value: Any, kind: Any, where: str) -> Any:
    """Return a JSON value, its lists as tuples; raise an error that says where it is of another type."""
    if isinstance(kind, tuple):
        return None if value is None else _checked(value, kind[0], where)
    if isinstance(kind, list) and type(value) is list:
        return tuple(_checked(one, kind[0], f"{where}[{n}]") for n, one in enumerate(value))
    if isinstance(kind, dict) and type(value) is dict:
        if str not in kind and value.keys() != kind.keys():
            raise ResultsFileError(f"{where} has to have {', '.join(kind)}")
        return {key: _checked(one, kind.get(key, kind.get(str)), f"{where}.{key}") for key, one in value.items()}
    if kind is float and type(value) in (int, float) and abs(value) < 1e300:
        return float(value)
    if kind is float or type(value) is not kind or (kind is int and abs(value) >= 1 << 60):
        raise ResultsFileError(f"{where} is no {getattr(kind, '__name__', 'list or object')}")
    return value


def read(text: str) -> Results:
    """Read what :func:`text_of` made; ResultsFileError if it is anything else."""
    try:
        whole = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise ResultsFileError(f"no JSON: {error}") from error
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise ResultsFileError(f'no "format": "{FORMAT}"')
    content = _checked(whole, _FILE, "results")
    del content["format"]
    ceilings = {name: Ceiling(**ceiling) for name, ceiling in content.pop("ceilings").items()}
    if any(rate <= 0 for c in ceilings.values() for rate in (c.bandwidth, *c.operations.values())):
        raise ResultsFileError("results.ceilings: a rate is no positive number")
    return Results(**content | {"cases": tuple(_cases(content["cases"]))}, ceilings=ceilings)


def _cases(found: Sequence[dict[str, Any]]) -> Iterator[Case]:
    for number, case in enumerate(found):
        try:
            work = case["work"] and Work(**case["work"])
            ratios = {side: Spread(*values) for side, values in case["ratios"].items()}
            yield Case(**case | {"work": work, "ratios": ratios})
        except (ArgumentError, TypeError) as error:
            raise ResultsFileError(f"results.cases[{number}]: {error}") from error
