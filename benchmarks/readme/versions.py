"""The table of two versions of fastlstm, from a file of ``benchmarks/versions.py``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastlstm.errors import ResultsFileError

FORMAT = "fastlstm versions 1"


def load(path: Path) -> dict[str, Any]:
    """Read a file.

    Raises
    ------
    ResultsFileError
        If something that the table needs is missing.
    """
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    missing = {"versions", "first calls", "calls", "machine"} - content.keys()
    if missing:
        raise ResultsFileError(f"{path} has no {', '.join(sorted(missing))}")
    return content


def paragraphs(content: dict[str, Any]) -> Iterator[str]:
    """Give the heading, what was compared, and one table for each number of threads."""
    old, new = content["versions"]
    yield f"### Two versions in turn: {old} and {new}"
    yield (
        "Blocks of calls of one version follow blocks of the other. The ratio is the median of old time / new time,"
        " with its quartiles: above 1 the new version is faster."
    )
    first = content["first calls"].items()
    rows = [f"| {what} | {t['old s']:.2f} s | {t['new s']:.2f} s | {t['new / old']:.2f} |" for what, t in first]
    yield "\n".join(["| first call, empty cache, CPU time | old | new | new / old |", "|---|---|---|---|", *rows])
    for threads, table in content["calls"].items():
        rows = [_row(cell, times) for cell, times in table.items()]
        head = f"| call, float32, at most {threads} thread{'s' * (int(threads) > 1)} | old, µs | new, µs | ratio |"
        yield "\n".join([head, "|---|---|---|---|", *rows])


def _row(cell: str, times: dict[str, Any]) -> str:
    low, high = times["quartiles"]
    return (
        f"| {cell} | {times['old us']:.1f} | {times['new us']:.1f} | {times['ratio']:.2f} ({low:.2f} to {high:.2f}) |"
    )
