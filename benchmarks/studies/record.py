"""What a study found: its cases, the machine, and the JSON file that keeps them.

The file holds every measured value. Medians, ratios and verdicts are computed from these whenever they are shown, with
the functions of ``fastlstm.bench.clock``.

>>> case = Case("a loop", {"fastlstm": (1.0, 1.1, 1.0), "torch": (2.0, 2.2, 2.1)})
>>> case.ratio("torch")
Spread(low=2.0, middle=2.0, high=2.05)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fastlstm.bench import clock
from fastlstm.errors import ResultsFileError

FORMAT, VERSION = "fastlstm study", 1
OURS = "fastlstm"
UNITS = ("s", "bytes")


@dataclass(frozen=True)
class Case:
    """One thing that was measured on all sides.

    Attributes
    ----------
    name : str
        What was done.
    values : dict of str to tuple of float
        What was measured of each side, in `unit`; less is better. Values at the same place belong to the same round.
    unit : {"s", "bytes"}
        Seconds or bytes.
    facts : dict of str to float
        Numbers that go with it, such as a size or an accuracy.
    refused : dict of str to str
        Which side was not measured, and why: it failed, or computed something else.
    yardsticks : tuple of str
        Sides that do not do the work and cannot win or lose: what any time of this machine is held against.
    """

    name: str
    values: Mapping[str, tuple[float, ...]]
    unit: str = "s"
    facts: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    yardsticks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ResultsFileError(f"{self.name}: no unit {self.unit!r}")
        if len({len(values) for values in self.values.values()}) > 1:
            raise ResultsFileError(f"{self.name}: the sides have different numbers of rounds")
        if not all(value > 0 for values in self.values.values() for value in values):
            raise ResultsFileError(f"{self.name}: a value is no positive number")

    def spread(self, side: str) -> clock.Spread:
        """The median of a side's values, and their quartiles."""
        return clock.spread(self.values[side])

    def ratio(self, theirs: str, ours: str = OURS) -> clock.Spread | None:
        """Spread of theirs / ours over the rounds, None if either was not measured."""
        if not self.values.get(theirs) or not self.values.get(ours):
            return None
        return clock.ratio(self.values[theirs], self.values[ours])


@dataclass(frozen=True)
class Study:
    """Everything that one run of one study found.

    Attributes
    ----------
    study : str
        Its name, as ``benchmarks/study.py`` takes it.
    about : str
        What was measured and how, in words.
    machine : dict of str to str
        Versions, processor and the like, by name.
    threads : int
        Number of threads that each side was given, unless a case says otherwise.
    cases : tuple of Case
        What was measured.
    absent : dict of str to str
        Who is not here, and what to install.
    made : str
        When, in ISO 8601.
    """

    study: str
    about: str
    machine: Mapping[str, str]
    threads: int
    cases: tuple[Case, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    made: str = ""

    def with_case(self, case: Case) -> Study:
        """Return the same and one more case."""
        return replace(self, cases=(*self.cases, case))


def save(path: Path, study: Study) -> None:
    """Write the file as a whole: it is readable whenever this is interrupted."""
    part = path.with_name(path.name + ".part")
    content = {"format": FORMAT, "version": VERSION} | asdict(study)
    part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


def load(path: Path) -> Study:
    """Read a file that :func:`save` wrote.

    Raises
    ------
    ResultsFileError
        If it is broken or foreign.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content.pop("format"), content.pop("version")) != (FORMAT, VERSION):
            raise ResultsFileError("another format or version")
        cases = tuple(_case(case) for case in content.pop("cases"))
        return Study(**content, cases=cases)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ResultsFileError(f"{path} holds no study: {error}") from error


def _case(content: dict[str, Any]) -> Case:
    values = {side: tuple(map(float, found)) for side, found in content.pop("values").items()}
    return Case(values=values, yardsticks=tuple(content.pop("yardsticks", ())), **content)
