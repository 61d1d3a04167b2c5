"""The format of all results: cases, the machine, and the JSON file that keeps them, one case a line.

A case keeps the value of every round; medians, quartiles, ratios and verdicts are computed from these when they are
shown.

>>> case = Case("a loop", {"fastlstm": (1.0, 1.1, 1.0), "torch": (2.0, 2.2, 2.1)})
>>> case.ratio("torch", "fastlstm")
Spread(low=2.0, middle=2.0, high=2.05)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fastlstm.bench.clock import Spread, ratio, spread
from fastlstm.bench.work import Work
from fastlstm.errors import ResultsFileError

__all__ = ["Case", "Results", "device_of", "load", "save"]

FORMAT = "fastlstm results 2"


def device_of(side: str) -> str:
    """Return where the side of this name computes: ``cpu`` or ``cuda``."""
    return "cuda" if "cuda" in side.split() else "cpu"


@dataclass(frozen=True)
class Case:
    """One measurement of several sides; less is better."""

    name: str
    values: Mapping[str, tuple[float, ...]]  # of each side; those at the same place belong to the same round
    unit: str = "s"  # or bytes
    threads: int = 1  # that each side was given
    group: str = ""  # the table that the case belongs to
    work: Work | None = None
    facts: Mapping[str, float] = field(default_factory=dict)  # such as an error, or seconds of the first results
    refused: Mapping[str, str] = field(default_factory=dict)  # sides that failed or computed something else, and why

    def __post_init__(self) -> None:
        rounds = list(self.values.values())
        if len(set(map(len, rounds))) > 1 or not all(values and min(values) > 0 for values in rounds):
            raise ResultsFileError(f"{self.name}: each side has to have as many values, all of them above 0")

    def spread(self, side: str) -> Spread:
        """The median of a side's values, between their quartiles."""
        return spread(self.values[side])

    def ratio(self, theirs: str, ours: str = "fastlstm") -> Spread | None:
        """Spread of theirs / ours over the rounds, None if either was not measured."""
        if theirs not in self.values or ours not in self.values:
            return None
        return ratio(self.values[theirs], self.values[ours])


@dataclass(frozen=True)
class Results:
    """The results of one run."""

    name: str  # that of the file, without its suffix
    machine: Mapping[str, str]  # versions, processor and the like, by name
    threads: int  # that each side was given, unless a case says otherwise
    cases: tuple[Case, ...] = ()
    about: str = ""  # what was measured
    peaks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # FLOP/s by device (cpu, cuda) and dtype
    absent: Mapping[str, str] = field(default_factory=dict)  # sides that cannot run here, and what to do about it
    steps: tuple[Mapping[str, str], ...] = ()  # of a stage of .ci/gpu: name, result, seconds, last line of the log
    made: str = ""  # when, in ISO 8601
    interrupted: bool = False  # by Ctrl-C

    def share_of_peak(self, case: Case, side: str) -> float | None:
        """Return the share of the device's measured peak that a side reached."""
        peaks = self.peaks.get(device_of(side), {})
        if case.work is None or case.work.dtype not in peaks or side not in case.values:
            return None
        return case.work.operations / case.spread(side).middle / peaks[case.work.dtype]


def save(path: Path, results: Results) -> None:
    """Write the file as a whole, under its own name: it is readable whenever this is interrupted."""
    content = {"format": FORMAT} | asdict(results) | {"name": path.stem}
    cases = ",\n".join("  " + json.dumps(case, allow_nan=False) for case in content.pop("cases"))
    head = json.dumps(content, indent=1, allow_nan=False).removesuffix("\n}")
    part = path.with_name(path.name + ".part")
    part.write_text(f'{head},\n "cases": [{cases and chr(10) + cases + chr(10) + " "}]\n}}\n', encoding="utf-8")
    part.replace(path)


def load(path: Path) -> Results:
    """Read a file that :func:`save` wrote; ResultsFileError if it is broken or foreign. Unknown fields are left out."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        if whole["format"] != FORMAT:
            raise ResultsFileError(f'no "format": "{FORMAT}"')
        cases = tuple(_with(Case, case, **_tuples(case)) for case in whole["cases"])
        found: Results = _with(Results, whole, name=path.stem, cases=cases, steps=tuple(whole["steps"]))
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:  # and what these derive
        raise ResultsFileError(f"{path} holds no results: {type(error).__name__}: {error}") from error
    return found


def _with(kind: Any, found: Mapping[str, Any], **parts: Any) -> Any:
    """Make a dataclass of JSON's fields, some of them replaced."""
    return kind(**{field.name: found[field.name] for field in fields(kind) if field.name in found} | parts)


def _tuples(case: Mapping[str, Any]) -> dict[str, Any]:
    """Return what JSON does not keep of a case: the Work, and tuples."""
    work = case["work"] and dict(case["work"])
    if work and work["lengths"]:
        work["lengths"] = tuple(work["lengths"])
    values = {side: tuple(map(float, given)) for side, given in case["values"].items()}
    return {"work": work and Work(**work), "values": values}
