"""Tables and the line under them, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fastlstm.bench.clock import Spread, verdict

VERSIONS = ("numpy", "numba", "torch", "onnxruntime", "openvino", "jax")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a table whose first `left` columns are flush left, and the others flush right."""
    rule = ["---"] * left + ["--:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def ratio(found: Spread | None) -> str:
    """Return time theirs / time ours as a cell: bold where the peer wins, ``=`` where there is no difference."""
    if found is None:
        return "-"
    word = verdict(found)
    if word == "no difference":
        return "="
    return f"**{found.middle:.2f}**" if word == "slower" else f"{found.middle:.2f}"


def machine_line(machine: Mapping[str, str], threads: int, made: str, gpu: bool = False) -> str:
    """Return what stands under a figure: the machine, the threads, the versions, and the day."""
    place = [machine.get("processor", "an unknown processor")]
    place += [machine["GPU"]] if gpu and "GPU" in machine else []
    versions = [f"{name} {machine[name]}" for name in VERSIONS if name in machine]
    count = f"{threads} thread{'s' if threads > 1 else ''} on each side"
    day = made.partition("T")[0]
    python = f"Python {machine['python'].partition(' ')[0]}" if "python" in machine else ""
    parts = (*place, count, ", ".join(filter(None, [python, *versions])), day)
    return "*" + "; ".join(filter(None, parts)) + "*"
