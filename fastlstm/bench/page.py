"""The results of several machines as one page of HTML, the pictures inside: it needs no other file and no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from html import escape

from fastlstm.bench import pictures, table
from fastlstm.bench.clock import verdict
from fastlstm.bench.peers import OURS
from fastlstm.bench.results import Results

__all__ = ["html"]

STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; }
td, th { border: 1px solid #ccc; padding: 2px 8px; text-align: right; }
td:first-child, th:first-child { text-align: left; }
td.slower { background: #fbd5d5; } td.faster { background: #dff3df; }
img { max-width: 100%; } pre { overflow-x: auto; background: #f6f6f6; padding: 1em; font-size: 12px; }
"""


def html(found: Mapping[str, Results]) -> str:
    """Return the page.

    Parameters
    ----------
    found : mapping of str to Results
        The results by a name for each machine, such as that of the file.
    """
    parts = ["<h1>fastlstm bench</h1>"]
    if len(found) > 1:
        parts += ["<h2>All machines</h2>", _across(found)]
    for name, results in found.items():
        parts += _machine(name, results)
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>fastlstm bench</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _cells(tag: str, values: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values) + "</tr>"


def _across(found: Mapping[str, Results]) -> str:
    """Our own times on every machine, side by side."""
    times = {
        name: {
            (row.work, side): row.sides[side].spread.middle
            for row in results.rows
            for side in OURS
            if side in row.sides
        }
        for name, results in found.items()
    }
    rows = [_cells("th", ["T,B,I,H", "what", "side", *times])]
    for work, side in dict.fromkeys(key for columns in times.values() for key in columns):
        cells = [table.time_of(column[work, side]) if (work, side) in column else "-" for column in times.values()]
        rows.append(_cells("td", [work.name, f"{work.kind} {work.dtype}", side, *cells]))
    return "<table>" + "\n".join(rows) + "</table>"


def _machine(name: str, results: Results) -> list[str]:
    facts = {"measured": results.made, **results.machine, "threads of each side": str(results.threads)}
    parts = [f"<h2>{escape(name)}</h2>"]
    if results.interrupted:
        parts.append("<p><strong>Interrupted: this is what was measured until then.</strong></p>")
    parts.append("<table>" + "\n".join(_cells("td", pair) for pair in facts.items()) + "</table>")
    parts.append(_lines(results))
    for picture, made in pictures.draw(results).items():
        if isinstance(made, str):
            parts.append(f"<p>No picture {escape(picture)}: {escape(made)}.</p>")
        else:
            data = base64.b64encode(made).decode()
            parts.append(f'<p><img alt="{escape(picture)}" src="data:image/png;base64,{data}"></p>')
    report = "\n".join(table.text(results))
    method = "\n".join(f"{key}: {words}" for key, words in results.method.items())
    parts.append(
        f"<details><summary>As text, with the method</summary><pre>{escape(report)}\n\n{escape(method)}</pre></details>"
    )
    return parts


def _lines(results: Results) -> str:
    """Make the table of a machine, losses in red."""
    found = table.lines(results)
    names = list(dict.fromkeys(name for line in found for name in line.ratios))
    heads = ["T,B,I,H", "what", "side", "time", "GFLOP/s", "of peak"]
    rows = [_cells("th", heads + [f"{name} / ours" for name in names])]
    for line in found:
        work = line.row.work
        share = "-" if line.share is None else f"{100 * line.share:.1f} %"
        values = [work.name, f"{work.kind} {work.dtype}", line.side, table.time_of(line.seconds.middle)]
        cells = [f"<td>{escape(value)}</td>" for value in [*values, f"{line.operations / 1e9:.3g}", share]]
        for name in names:
            ratio = line.ratios.get(name)
            kind = "none" if ratio is None else verdict(ratio).replace(" ", "-")
            cells.append(f'<td class="{kind}">{escape(table.cell(ratio))}</td>')
        rows.append("<tr>" + "".join(cells) + "</tr>")
    return "<table>" + "\n".join(rows) + "</table>"
