"""Why a peer wins where it does, or a goal is missed: by hand in ``reasons.toml``, put beside what it explains.

The file has one ``[[reason]]`` after the other. Each says whom and what it is about, in ``opponent``, ``study``
(``bench`` for the kernels' table, ``goals`` for what the project holds itself to) and ``what`` (words that the name of
the row must contain), all of which may be left out; and ``why``, which has no digit in it: figures are generated. The
first that fits is taken; a goal's is one of the study ``goals``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fastlstm.bench.clock import Spread

FILE = Path(__file__).parent.parent / "reasons.toml"
BENCH = "bench"


class MissingReasonError(Exception):
    """Peers win, and nobody has written why."""


@dataclass(frozen=True)
class Reason:
    """Why an opponent wins, and where this is the reason."""

    why: str
    opponent: str = ""
    study: str = ""
    what: str = ""

    def __post_init__(self) -> None:
        if not self.why.strip() or any(character.isdigit() for character in self.why):
            raise ValueError(f"a reason is words without figures, got {self.why!r}")


class Loss(NamedTuple):
    """A row in which a peer wins."""

    study: str
    what: str
    opponent: str
    ratio: Spread  # time theirs / time ours, below one


def load(path: Path) -> list[Reason]:
    """Read the reasons.

    Raises
    ------
    ValueError, TypeError
        If one is empty, has figures in it, or an unknown key.
    """
    return [Reason(**entry) for entry in tomllib.loads(path.read_text(encoding="utf-8")).get("reason", [])]


def find(loss: Loss, reasons: Iterable[Reason]) -> Reason | None:
    """Return the first reason that fits."""
    for reason in reasons:
        who, where = reason.opponent in ("", loss.opponent), reason.study in ("", loss.study)
        if who and where and reason.what in loss.what:
            return reason
    return None


def paragraph(losses: Sequence[Loss], reasons: Sequence[Reason]) -> Iterator[str]:
    """Say where peers win, and why; nothing if none does.

    Raises
    ------
    MissingReasonError
        If there is no reason for one of them.
    """
    unexplained = [loss for loss in losses if find(loss, reasons) is None]
    if unexplained:
        words = "; ".join(f"{loss.opponent} at {loss.study}: {loss.what}" for loss in unexplained)
        raise MissingReasonError(f"{FILE.name} does not say why these win: {words}")
    if not losses:
        return
    groups: dict[tuple[str, Reason | None], list[Loss]] = {}
    for loss in losses:
        groups.setdefault((loss.opponent, find(loss, reasons)), []).append(loss)
    lines = ["Where a peer wins, its time as a share of ours, and why:", ""]
    for (opponent, reason), members in groups.items():
        rows = "; ".join(f"{loss.what} ({loss.ratio.middle:.2f})" for loss in members)
        assert reason is not None
        lines.append(f"- **{opponent}**: {rows}. {reason.why.strip()}")
    yield "\n".join(lines)
