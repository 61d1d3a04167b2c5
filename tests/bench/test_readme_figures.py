"""The README's figures are what the committed results say, losses and reasons included."""

from __future__ import annotations

import dataclasses
import re
import sys
from itertools import pairwise
from pathlib import Path

import bench_data
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # the scripts there are no package

import figures
from readme import goals, reasons
from studies import memory, recompute, record, roofs, start
from studies.record import OURS, Case, Study

from fastlstm.bench import pictures
from fastlstm.bench import results as bench
from fastlstm.errors import ResultsFileError

ROOT = Path(__file__).parents[2]
NOISE = bench_data.NOISE
WHY = '[[reason]]\nopponent = "onnxruntime"\nwhy = "It keeps its packed weights between calls."\n'
WHY += '[[reason]]\nstudy = "goals"\nwhy = "It takes what it takes."\n'


def test_the_readme_is_what_the_committed_results_say():
    text = figures.README.read_text(encoding="utf-8")
    assert text == figures.readme(text, figures.section(), figures.gpu_sentence()), "run `python benchmarks/figures.py`"


def test_the_tables_are_what_the_committed_results_say():
    assert figures.TABLES.read_text(encoding="utf-8") == figures.tables(), "run `python benchmarks/figures.py`"


def test_every_picture_in_the_readme_is_there():
    for path in re.findall(r"!\[[^]]*\]\(([^)]*)\)", figures.README.read_text(encoding="utf-8")):
        assert (ROOT / path).is_file(), path


def values(seconds):
    return tuple(seconds * factor for factor in NOISE)


def roof_case(work, threads, seconds):
    """One of the study of roofs: the seconds of each side."""
    return Case(
        roofs.name_of(work, threads),
        {side: values(found) for side, found in seconds.items()},
        facts={"threads": threads},
        yardsticks=tuple(side for side in seconds if side != OURS),
    )


def study(name, *cases, **changes):
    given = {"machine": {"processor": "made up", "torch": "0.0"}, "threads": 2, "made": "2000-01-01T00:00:00"} | changes
    return Study(name, "about", cases=cases, **given)


def studies():
    """One of each kind, with a loss in the closed loop."""
    facts = {"seeds": 3, "seeds that a side did not get there with": 1}
    facts |= {f"epochs, {side}": 7 for side in (OURS, "torch")}
    facts |= {f"final accuracy, {side}": 0.975 for side in (OURS, "torch")}
    both = {OURS: values(2.0), "torch": values(3.0)}
    return [
        study("vowels", Case("training to 95%", both, facts=facts)),
        study("loop", Case("7 steps", both | {"onnxruntime": values(1.0)}, refused={"openvino": "failed"})),
        study("memory", Case("1,2,3,4 float32", {OURS: (5e6,)}, "bytes", {memory.GROWING: 6.5, memory.FIXED: 1000.0})),
        study(
            "recompute",
            Case(
                "5,6,7,8 float64", {OURS: values(2.0), recompute.RECOMPUTED: values(2.5)}, facts={recompute.SAVED: 0.6}
            ),
        ),
        study("start", Case("warm: all three calls", both | {start.NUMBA: values(0.5)}, yardsticks=(start.NUMBA,))),
        study("threads", *(Case(f"a, {n} threads", {OURS: values(2.0 / n)}, facts={"threads": n}) for n in (1, 2))),
        study("growth", *(Case(f"T={n}", {OURS: values(1e-6 * n)}, facts={"T": n}) for n in (10, 100, 1000))),
    ]


@pytest.fixture
def committed(tmp_path):
    """Results of a machine that does not exist, and a README that has no figures yet."""
    folder = tmp_path / "results" / "made-up"
    folder.mkdir(parents=True)
    bench.save(folder / "bench.json", bench_data.cpu_results())
    for found in studies():
        record.save(folder / f"{found.study}.json", found)
    (tmp_path / "reasons.toml").write_text(WHY)
    return tmp_path


def section(root):
    return figures.section(root / "results", root, root / "reasons.toml")


def test_nothing_is_shown_of_no_results(tmp_path):
    assert "benchmarks/README.md" in section(tmp_path)


def test_every_study_has_its_figures_and_its_machine(committed):
    text = section(committed)
    assert "| JapaneseVowels: training to 95% | 2 s | 3 s (1.50) | - | - |" in text
    assert "| closed loop: 7 steps | 2 s | 3 s (1.50) | 1 s (**0.50**) | not timed |" in text
    assert "| 1,2,3,4 float32 | 4.77 MiB | 6.50 | 1000 bytes |" in text
    assert "with it, in how many times the time, 1.25 at most" in text
    assert "| 5,6,7,8 float64 | 2 s | 2.5 s | 1.25 | 0.60 |" in text
    assert "| warm: all three calls | 2 s | 3 s (1.50) | 500 ms (25 % of ours) |" in text
    assert "| a, 2 threads | 1 s (2.00x) |" in text
    assert "T from 10 to 1,000: fastlstm 1.00" in text and "| 1,000 | 1 ms | 1 us |" in text
    assert "7 (fastlstm) and 7 (torch) epochs" in text and "97.5% (torch)" in text
    parts = text.split("\n\n")
    for part, under in pairwise(parts):
        if part.startswith("|"):
            assert under.startswith("*made up") and "2 threads on each side" in under and "2000-01-01" in under


def test_losses_are_shown_with_their_reason(committed):
    text = section(committed)
    assert "1 of 9" not in text
    assert "against onnxruntime: faster in 0 of 10 rows, no difference in 1, slower in 9" in text
    assert "against torch: faster in 9 of 9 rows, no difference in 0, slower in 0" in text
    assert "- **onnxruntime**: closed loop: 7 steps (0.50). It keeps its packed weights between calls." in text
    (kernels,) = (part for part in text.split("\n\n") if "**onnxruntime**: 1,32,64,128 infer" in part)
    assert kernels.count("(0.80)") == 9 and "between calls" in kernels
    (committed / "reasons.toml").write_text(WHY.replace('"onnxruntime"', '"onnxruntime"\nstudy = "loop"'))
    with pytest.raises(reasons.MissingReasonError, match="1,32,64,128 infer float32"):
        section(committed)


def test_rows_that_a_peer_wins_are_shown_in_every_grid(committed):
    path = committed / "results" / "made-up" / "bench.json"
    small = bench_data.row(bench_data.Work(*bench_data.CENTRE), {OURS: 1.0, "onnxruntime": 2.0})
    lost = bench_data.row(bench_data.Work(3, 3, 3, 3), {OURS: 1.0, "onnxruntime": 0.5})
    won = bench_data.row(bench_data.Work(4, 4, 4, 4), {OURS: 1.0, "onnxruntime": 2.0})
    bench.save(path, bench_data.results(small, lost, won))
    text = section(committed)
    assert "| 3,3,3,3 | infer float32 | 1 s | **0.50** |" in text and "4,4,4,4" not in text
    assert "2 of 3 rows are shown" in text


@pytest.mark.parametrize("why", ["", "  ", "It is 2 times faster."])
def test_a_reason_is_words_without_figures(why):
    with pytest.raises(ValueError, match="words without figures"):
        reasons.Reason(why)


def test_other_tables_show_every_row_and_how_far_anyone_could_go(committed):
    """One second at the peak; ours takes two, the best peer four or, in the second row, one and a quarter."""
    work = bench_data.Work(1000, 1, 512, 512)
    ours = {OURS: 2.0, "onnxruntime": 4.0, "torch": 5.0}
    first, second = (bench_data.row(work, ours), bench_data.row(bench_data.Work(10, 99, 9, 9), ours | {"torch": 1.25}))
    results = dataclasses.replace(
        bench_data.results(first, second), ceilings={"cpu": bench.Ceiling({"float32": float(work.operations)}, 7e9)}
    )
    bench.save(committed / "results" / "made-up" / "table-7.json", results)
    (committed / "reasons.toml").write_text(WHY.replace("onnxruntime", "torch"))
    text = figures.tables(committed / "results", committed / "reasons.toml")
    assert "## made-up\n" in text and "### table 7\n" in text and "1,32,64,128" not in text
    assert "moves 7 GB/s" in text
    assert "| 1000,1,512,512 | infer float32 | peak | 50 % | - | onnxruntime | 2.00 | - | 4.00 | - |" in text
    assert "| 10,99,9,9 | infer float32 | peak | 0 % | - | torch | **0.62** | - | - | - |" in text
    assert "- infer float32: geometric mean of the best peer's time divided by ours 1.12, least 0.62\n" in text
    assert "**torch**: 10,99,9,9 infer float32 (0.62). It keeps" in text


def test_a_roof_that_was_measured_in_turn_with_the_call_is_taken_and_the_highest_of_them(committed):
    """Ours takes four seconds here and in the study, the peer five; a roof, by the study, two and, in a row, three."""
    wide, narrow = bench_data.Work(9, 99, 9, 9), bench_data.Work(9, 1, 9, 9)
    results = bench_data.results(*(bench_data.row(work, {OURS: 4.0, "torch": 5.0}) for work in (wide, narrow)))
    bench.save(committed / "results" / "made-up" / "table-7.json", results)
    tile, weights, parts = roofs.TILE, roofs.WEIGHTS, roofs.PARTS
    cases = (
        (wide, 1, {tile: 3.0, parts: 3.2}),
        (narrow, 1, {tile: 0.1, weights: 3.0, parts: 3.2}),
        (wide, 2, {tile: 2.0, parts: 2.5, roofs.BLAS: 4.4}),
        (narrow, 2, {tile: 0.1, weights: 3.5, parts: 3.6}),
    )
    found = (roof_case(work, threads, {OURS: 4.0} | sides) for work, threads, sides in cases)
    record.save(committed / "results" / "made-up" / "roofs.json", Study("roofs", "made up", {}, 2, tuple(found)))
    text = figures.tables(committed / "results", committed / "reasons.toml")
    assert "| 9,99,9,9 | infer float32 | bare tile | 50 % | 62 % | torch | 1.25 | 2.00 | 2.50 | 1.10 |" in text
    assert "| 9,1,9,9 | infer float32 | reading the weights | 75 % | 80 % | torch | 1.25 | 1.56 | 1.67 | - |" in text
    assert "least 1.25; with every call as fast as its bare parts it would be 1.77, least 1.56; " in text
    assert "; with every call at its roof 2.04, least 1.67" in text
    assert "bare tile" not in section(committed)  # no peer, that could win a row


def test_goals_stand_beside_what_was_measured_and_what_misses_is_bold(committed):
    """Ours takes one second, but for the step; the ragged batch, twice as fast as asked, is no part of the mean."""
    peak = goals.PEAK
    results = bench_data.results(
        bench_data.row(peak, {OURS: 1.0, "torch": 1.2}),
        bench_data.row(bench_data.Work(9, 9, 9, 9), {OURS: 1.0, "onnxruntime": 2.7, "torch": 3.0}),
        bench_data.row(bench_data.Work(9, 9, 9, 9, kind="train"), {OURS: 1.0, "torch": 1.1}),
        bench_data.row(bench_data.Work.ragged(9, 9, 9, 9), {OURS: 1.0, "torch": 40.0}),
        bench_data.row(bench_data.Work(1, 1, 32, 64, kind="stream"), {OURS: 5e-6, "onnxruntime": 20e-6}),
    )
    bench.save(committed / "results" / "made-up" / "table-7.json", results)
    step = bench_data.Work(1, 1, 32, 64, kind="stream")
    cases = [
        roof_case(work, threads, {OURS: 1.0, roofs.TILE: share, roofs.PARTS: 1.1 * share})
        for work, threads, share in ((peak, 1, 0.8), (peak, 2, 0.7), (step, 1, 0.5), (step, 2, 0.5))
    ]
    record.save(committed / "results" / "made-up" / "roofs.json", Study("roofs", "made up", {}, 2, tuple(cases)))
    text = figures.tables(committed / "results", committed / "reasons.toml")
    assert "| inference, float32: best peer's time / ours, least | at least 1 | 1.20 | - |" in text
    assert "| inference, float32: geometric mean | at least 1.4 | 1.80 | - |" in text  # one of the two has no parts
    assert "| training, float32: torch's time / ours, least | at least 1.2 | **1.10** | - |" in text
    assert "| training, float32: geometric mean | at least 2 | **1.10** | - |" in text
    assert (
        "- **training, float32: geometric mean**, asked at least 2: 1.10, 45 % too little (table 7). It takes what"
        in text
    )
    assert "seconds**, asked at most 0.5: 2.00, 300 % too much. It takes" in text
    assert "- **inference" not in text and text.count("It takes") == 5
    assert "| training, float64: torch's time / ours, geometric mean | at least 1.5 | - | - |" in text
    assert "50,64,512,512, one thread | at least 0.8 | 0.80 |" in text
    assert "50,64,512,512, all threads | at least 0.8 | **0.70** |" in text
    assert "| a streaming step, microseconds | at most 4 | **5.00** | 2.75 |" in text
    assert "| a streaming step: onnxruntime's time / ours | at least 2 | 4.00 | 7.27 |" in text
    assert "| ragged training: torch's packed sequences / ours | at least 20 | 40.00 | - |" in text
    assert "| training with recompute, times the time | at most 1.35 | 1.25 |" in text
    assert "sequence | at most 7 | 6.50 |" in text
    assert "| first calls in a later process, seconds | at most 0.5 | **2.00** |" in text
    assert "Of the first calls in a later process, 25 % are the import of Numba." in text
    why = committed / "reasons.toml"
    why.write_text(why.read_text().replace('study = "goals"', 'study = "goals"\nwhat = "training"'))
    with pytest.raises(reasons.MissingReasonError, match="goal is missed: a streaming step, microseconds"):
        figures.tables(committed / "results", why)
    why.write_text(WHY)
    cases.append(roof_case(bench_data.Work(9, 9, 9, 9), 2, {OURS: 1.0, roofs.TILE: 0.9, roofs.PARTS: 0.9}))
    record.save(committed / "results" / "made-up" / "roofs.json", Study("roofs", "made up", {}, 2, tuple(cases)))
    text = figures.tables(committed / "results", committed / "reasons.toml")
    assert "| inference, float32: best peer's time / ours, least | at least 1 | 1.20 | 1.56 |" in text


def test_another_result_makes_another_readme(committed):
    before = section(committed)
    path = committed / "results" / "made-up" / "loop.json"
    found = record.load(path)
    (case,) = found.cases
    changed = dataclasses.replace(case, values={**case.values, "torch": values(4.0)})
    record.save(path, dataclasses.replace(found, cases=(changed,)))
    assert section(committed) != before


def test_the_command_writes_and_then_finds_nothing_to_do(committed, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    readme = committed / "README.md"
    sentence = f"{figures.BEGIN_GPU}\n{figures.END_GPU}"
    readme.write_text(f"before\n{sentence}\n{figures.BEGIN}\n{figures.END}\nafter\n")
    monkeypatch.setattr(figures, "README", readme)
    monkeypatch.setattr(pictures, "draw", lambda results: {"scaling": b"a picture", "crossover": "there is no GPU"})
    monkeypatch.setattr(figures, "TABLES", committed / "RESULTS.md")
    monkeypatch.setattr(figures, "RESULTS", committed / "results")
    original, others = figures.section, figures.tables
    monkeypatch.setattr(
        figures, "section", lambda: original(committed / "results", committed, committed / "reasons.toml")
    )
    monkeypatch.setattr(figures, "tables", lambda: others(committed / "results", committed / "reasons.toml"))
    assert figures.main(["--check"]) == 1 and "differ" in capsys.readouterr().err
    assert figures.main([]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "](results/made-up/study-growth.png)" in text and "](results/made-up/bench-scaling.png)" in text
    assert figures.main(["--check"]) == 0
    readme.write_text(text.replace("| 2 s |", "| 1 s |", 1))
    assert figures.main(["--check"]) == 1
    (committed / "reasons.toml").write_text("")
    assert figures.main([]) == 1 and "does not say why" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", figures.BEGIN, figures.END + figures.BEGIN, 2 * (figures.BEGIN + figures.END)])
def test_a_readme_without_the_marks_is_refused(text):
    with pytest.raises(ValueError, match="two marks"):
        figures.replaced(text, "inside")


def test_broken_results_are_refused(committed):
    folder = committed / "results" / "made-up"
    (folder / "loop.json").rename(folder / "vowels.json")
    with pytest.raises(ResultsFileError, match="holds the study 'loop'"):
        section(committed)
    (folder / "vowels.json").write_text("{")
    with pytest.raises(ResultsFileError, match=r"vowels\.json"):
        section(committed)
