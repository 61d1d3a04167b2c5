"""A case as text: what the command prints, and the cells of the README's tables."""

from __future__ import annotations

from collections.abc import Iterator

from fastlstm.bench import table

from .record import OURS, Case

KIB = 1024


def amount(value: float, unit: str) -> str:
    """Return seconds or bytes with the unit that suits them.

    >>> amount(0.0123, "s"), amount(5_000_000, "bytes")
    ('12.3 ms', '4.77 MiB')
    """
    if unit == "s":
        return table.time_of(value)
    for name in ("bytes", "KiB", "MiB"):
        if value < KIB:
            return f"{value:.3g} {name}" if value < 999 and name != "bytes" else f"{value:.0f} {name}"
        value /= KIB
    return f"{value:.3g} GiB"


def lines_of(case: Case) -> Iterator[str]:
    """Return a case line by line."""
    parts = []
    for side in case.values:
        spread = case.spread(side)
        text = f"{side} {amount(spread.middle, case.unit)}"
        ratio = case.ratio(side)
        if side != OURS and ratio is not None:
            text += f" ({f'{ratio.middle:.2f} of it' if side in case.yardsticks else table.cell(ratio)})"
        parts.append(text)
    yield f"{case.name}: " + ", ".join(parts)
    facts = [f"{name} {value:.4g}" for name, value in case.facts.items()]
    if facts:
        yield "  " + ", ".join(facts)
    for side, reason in case.refused.items():
        yield f"  {side} is not timed: {reason}"
