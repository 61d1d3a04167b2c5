"""The report of results: tables in Markdown, for the terminal and for ``benchmarks/RESULTS.md``.

Behind each peer's time stands its ratio, time theirs / time fastlstm's: above 1 fastlstm is faster. Losses are bold and
listed; ``=`` is no difference.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from statistics import geometric_mean

from fastlstm.bench.clock import Spread, verdict
from fastlstm.bench.peers import COPIES, CPU, CUDA
from fastlstm.bench.results import Case, Results, device_of
from fastlstm.bench.work import KINDS

__all__ = ["amount", "cell", "duels", "is_peer", "line", "losses", "machine_line", "table", "text"]

VERSIONS = ("python", "numpy", "numba", "torch", "onnxruntime", "openvino", "CuPy", "cuDNN")
PEERS = ("torch", "onnxruntime", "openvino")  # a side is a peer's if its name begins so


def amount(value: float, unit: str = "s") -> str:
    """Return seconds or bytes with the unit that suits them.

    >>> amount(0.0123), amount(2.5e-5), amount(5_000_000, "bytes")
    ('12.3 ms', '25 us', '4.77 MiB')
    """
    if unit == "bytes":
        power = min(3, max(0, int(math.log2(max(value, 1)) // 10)))
        return f"{value / 1024**power:.3g} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"
    name, scale = next((name, scale) for name, scale in (("s", 1.0), ("ms", 1e-3), ("us", 0.0)) if value >= scale)
    value /= scale or 1e-6
    return f"{value:.3g} {name}" if value < 999 else f"{value:.0f} {name}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table with aligned columns, the first `left` of them flush left."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * width if n < left else "-" * (width - 1) + ":" for n, width in enumerate(widths)]
    aligned = [
        "| " + " | ".join(f"{cell:{'<' if n < left else '>'}{widths[n]}}" for n, cell in enumerate(row)) + " |"
        for row in (cells[0], rule, *cells[1:])
    ]
    return "\n".join(aligned)


def is_peer(side: str) -> bool:
    """Whether a side is another library, which can win."""
    return side.startswith(PEERS)


def ratio_of(case: Case, side: str) -> Spread | None:
    """Return time of the side / time of ours on the same device; our own on a GPU are compared with the CPU."""
    ours = CUDA if device_of(side) == "cuda" and side not in (CUDA, COPIES) else CPU
    return case.ratio(side, ours) if side != ours else None


def cell(case: Case, side: str) -> str:
    """Return a side's median and its ratio to ours: bold where a peer wins, ``=`` where there is no difference."""
    if side not in case.values:
        return "not timed" if side in case.refused else "-"
    found, shown = ratio_of(case, side), amount(case.spread(side).middle, case.unit)
    if found is None:
        return shown
    ratio = f"{found.middle:.2f}" if found.middle >= 0.1 else f"{found.middle:.2g}"
    if is_peer(side):
        ratio = {"faster": ratio, "slower": f"**{ratio}**"}.get(verdict(found), "=")
    return f"{shown} ({ratio})"


def line(case: Case) -> str:
    """Return a case in one line, for a program that shows each case when it is done."""
    return f"{case.name}: " + ", ".join(f"{side} {cell(case, side)}" for side in (*case.values, *case.refused))


def table_of(results: Results, cases: Sequence[Case]) -> str:
    """Return the table of cases: ours, the share of the peak, the other sides, and facts."""
    works = [case.work for case in cases if case.work and case.name == case.work.title]
    columns: dict[str, list[str]] = {}
    if len(works) == len(cases):
        several = len({work.dtype for work in works}) > 1
        columns["T,B,I,H"] = [work.name + f", {work.dtype}" * several for work in works]
    else:  # they have names of their own
        columns["what"] = [case.name for case in cases]
    for side in dict.fromkeys(side for case in cases for side in case.values):
        columns[side] = [cell(case, side) for case in cases]
        shares = [results.share_of_peak(case, side) for case in cases]
        if side in (CPU, CUDA) and any(shares) and "of peak" not in columns:
            columns["of peak"] = [f"{100 * share:.0f} %" if share else "-" for share in shares]
    for fact in dict.fromkeys(fact for case in cases for fact in case.facts if not fact.startswith("first results")):
        unit = "bytes" if fact.startswith("bytes") else ""
        found = [case.facts.get(fact) for case in cases]
        columns[fact] = ["-" if value is None else amount(value, unit) if unit else f"{value:.4g}" for value in found]
    return table(list(columns), zip(*columns.values(), strict=True))


def duels(cases: Iterable[Case]) -> Iterator[tuple[Case, str, Spread]]:
    """Give each case with each peer that was measured, and the ratio of its time to ours."""
    for case in cases:
        for side in filter(is_peer, case.values):
            if found := ratio_of(case, side):
                yield case, side, found


def losses(cases: Iterable[Case]) -> list[tuple[Case, str, Spread]]:
    """Return each case and peer where the peer is faster."""
    return [(case, side, found) for case, side, found in duels(cases) if verdict(found) == "slower"]


def machine_line(results: Results) -> str:
    """Return the line under a table: the machine, the threads, the versions, and the day."""
    machine = results.machine
    place = [machine[name] for name in ("processor", "GPU") if name in machine]
    versions = [f"{name} {machine[name].partition(' ')[0]}" for name in VERSIONS if name in machine]
    threads = f"{results.threads} thread{'s' if results.threads > 1 else ''} on each side"
    parts = [*place, threads, ", ".join(versions), results.made.partition("T")[0]]
    return "*" + "; ".join(filter(None, parts)) + "*"


def text(results: Results, *, list_losses: bool = True) -> Iterator[str]:
    """Return the whole report, paragraph by paragraph."""
    yield machine_line(results)
    for device, rates in results.peaks.items():
        words = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in rates.items())
        yield f"Measured peak, {device}: {words}."
    for group in dict.fromkeys(case.group for case in results.cases):
        title, cases = KINDS.get(group, group), [case for case in results.cases if case.group == group]
        yield f"{title[:1].upper()}{title[1:]}:" if title else ""
        yield table_of(results, cases)
    if lines := list(_summary(results, list_losses)):
        yield "\n".join(f"- {line}" for line in lines)
    if results.steps:
        rows = [[step.get(key, "-") for key in ("name", "result", "seconds", "remark")] for step in results.steps]
        yield table(["step", "result", "seconds", "last line of its log"], rows, left=4)


def _summary(results: Results, list_losses: bool) -> Iterator[str]:
    """Say how it stands with each peer, losses one by one, what is missing and what was refused."""
    found = list(duels(results.cases))
    for peer in dict.fromkeys(side for _, side, _ in found):
        ratios = [ratio for _, side, ratio in found if side == peer]
        count, mean = Counter(map(verdict, ratios)), geometric_mean(ratio.middle for ratio in ratios)
        yield (
            f"against {peer}: faster in {count['faster']} of {len(ratios)} rows, no difference in"
            f" {count['no difference']}, slower in {count['slower']}; geometric mean of the ratios {mean:.2f}"
        )
    for case, side, (low, middle, high) in losses(results.cases) if list_losses else ():
        yield f"LOSS at {case.name}: {side} {middle:.2f} (quartiles {low:.2f} to {high:.2f})"
    facts = [fact for case in results.cases for fact in case.facts.items() if fact[0].startswith("first results")]
    for fact in dict(facts):
        most = max(value for name, value in facts if name == fact)
        yield f"{fact}, compilation included: {amount(most)} at most; in no other figure"
    yield from (f"{name} is not measured: {reason}" for name, reason in results.absent.items())
    for case in results.cases:
        yield from (f"{side} is not timed at {case.name}: {reason}" for side, reason in case.refused.items())
    if results.interrupted:
        yield "Interrupted: this is what was measured until then."
