"""What several studies share: who is here, and a row of ``fastlstm bench`` as a case."""

from __future__ import annotations

from collections.abc import Iterable

from fastlstm.bench import peers, run
from fastlstm.bench.results import Row
from fastlstm.bench.work import Work

from .record import OURS, Case

CPU = tuple(name for name, contender in peers.CONTENDERS.items() if contender.device == "cpu")
"""Everybody who computes on the processor, ourselves first."""


def here(names: Iterable[str], threads: int) -> list[str]:
    """Those of `names` that can run here."""
    return [name for name in names if peers.missing(name, threads) is None]


def measured(work: Work, names: Iterable[str], threads: int, seconds: float, name: str = "", **facts: float) -> Case:
    """Measure one work as ``fastlstm bench`` does: outputs compared first, sides in turn.

    Raises
    ------
    RuntimeError
        If our own side failed: there is nothing to compare then.
    KeyboardInterrupt
        If that cut the row short.
    """
    row, interrupted = run.measure_row(work, here(names, threads), threads, seconds)
    if interrupted:
        raise KeyboardInterrupt
    return case_of(row, name or f"{work.name} {work.kind} {work.dtype}", **facts)


def case_of(row: Row, name: str, **facts: float) -> Case:
    """Return a row as a case."""
    if OURS not in row.sides:
        raise RuntimeError(f"{name}: {row.refused.get(OURS) or row.refused or 'the CPU backend cannot run here'}")
    values = {side: timing.seconds for side, timing in row.sides.items()}
    return Case(name, values, facts=facts, refused=row.refused)
