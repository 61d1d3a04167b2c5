"""RESULTS.md and the README's table are what the committed results say, losses and reasons included."""

from __future__ import annotations

import re
from pathlib import Path

import bench_data
import figures
import goals
import pytest
import studies
from bench_data import case

from fastlstm.bench import pictures, results
from fastlstm.bench.work import Work

ROOT = Path(__file__).parents[2]
OURS = studies.OURS


def test_documents_are_what_the_committed_results_say_with_eight_rows_and_every_picture(capsys):
    assert figures.main(["--check"]) == 0, capsys.readouterr().err
    inside = figures.README.read_text(encoding="utf-8").partition(figures.BEGIN)[2].partition(figures.END)[0]
    assert len(re.findall(r"^\|", inside, re.MULTILINE)) == 2 + 8
    for path in re.findall(r"!\[[^]]*\]\(([^)]*)\)", figures.TABLES.read_text(encoding="utf-8")):
        assert (figures.HERE / path).is_file(), path


LOST = Work(9, 9, 9, 9, kind="train")


def bench(others=()):
    """Results with the README's rows, and two more, of which one is lost, or with other ratios."""
    ratios = dict.fromkeys(figures.ROWS.values(), 2.0) | {Work(7, 7, 7, 7): 1.5, LOST: 0.5} | dict(others)
    return bench_data.results(*(case(work, {OURS: 1.0, "torch": ratio}) for work, ratio in ratios.items()))


def start(seconds=6.0):
    return bench_data.results(case("cold: all three calls", {OURS: seconds, "torch": 0.25}), name="start")


def test_the_readme_shows_the_worst_row_and_the_first_calls():
    found = bench({figures.ROWS["inference, a batch"]: 0.25})  # which is there already
    text = figures.section({"made-up": {"bench": found, "start": start()}})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 8 and rows[2][0] == "one step, streaming" and rows[2][-1] == "2 s (2.00)"
    assert rows[-2] == ["training, the peers' best other size", "9,9,9,9", "1 s", "500 ms (**0.50**)"]
    assert rows[-1] == ["first calls ever, which compile", "", "6 s", "250 ms (**0.042**)"]
    assert "made up, 2 of 2 cores usable; 2 threads on each side" in text and figures.NO_GPU in text


def test_a_loss_without_a_reason_is_refused(monkeypatch):
    found = {"made-up": {"bench": bench()}}
    with pytest.raises(ValueError, match="torch wins at bench: 9,9,9,9 train float32"):
        figures.tables(found)
    monkeypatch.setattr(goals, "WINS", {("bench", "9,9"): "It is made up."})
    text = figures.tables(found)
    assert "- 9,9,9,9 train float32 (torch 0.50): It is made up." in text and "LOSS" not in text


def test_every_reason_is_a_sentence_without_figures():
    for why in (*goals.WINS.values(), *(goal.why for goal in goals.GOALS if goal.why)):
        assert why[0].isupper() and why.endswith(".") and not re.search(r"\d", why)


def test_goals_stand_beside_what_was_measured_and_a_miss_is_bold_with_its_reason():
    table = [
        case(Work(9, 9, 9, 9), {OURS: 1.0, "torch": 3.0, "openvino": 2.7}),
        case(Work(8, 9, 9, 9), {OURS: 1.0, "torch": 1.2}),
        case(goals.STEP, {OURS: 3e-6, "onnxruntime": 9e-6}),
        case(Work.ragged(9, 9, 9, 9), {OURS: 1.0, "torch": 40.0}),  # no part of the mean
        case(Work(50, 64, 512, 512), {OURS: Work(50, 64, 512, 512).operations / 9e10}),  # of a peak of 1e11
    ]
    first = [case(name, {OURS: new, goals.OLD: 2.0}, group="first call") for name, new in (("a", 1.0), ("b", 1.5))]
    times = {1: 1.0, 2: 0.984375}  # of the old version, by the number of threads
    old = [case("inference 1,2,3,4", {OURS: 1.0, goals.OLD: times[n]}, group=f"calls on {n}") for n in times]
    first.append(case("inference, then layer_norm", {OURS: 2.5}, group="first call"))
    micro = {goals.CALL: 10e-6, "ragged": 15e-6, "frozen step, 2 layers": 3e-6, "frozen step, 2 models": 4e-6}
    old += [case(name, {OURS: value}, group="calls on 1") for name, value in micro.items()]
    files = {name: bench_data.results(*table, name=name) for name in ("goals-1-thread", "goals-2-threads")}
    files |= {"versions": bench_data.results(*first, *old, name="versions"), "start": start()}
    rows = {row[0]: row[2:] for row in goals.rows(files)}
    assert rows["inference, float32: best peer's time / ours, least"] == ["1.20 / 1.20", ""]
    assert rows["inference, float32: geometric mean"] == ["1.80 / 1.80", ""]
    assert rows["share of the peak, inference 50,64,512,512"] == ["0.90 / 0.90", ""]
    assert rows["a streaming step, microseconds"] == ["3.00 / 3.00", ""]
    assert rows["ragged training: PyTorch's packed sequences / ours"] == ["40.00 / 40.00", ""]
    assert rows[f"first call, CPU time / {goals.OLD}, most"] == ["**0.75**", goals.COMPILED]
    assert rows[f"first call, CPU time / {goals.OLD}, least"] == ["0.50", ""]
    assert rows["the first cell with phases, inference, CPU seconds to compile"] == ["**2.50**", goals.PHASED]
    assert rows["ragged, microseconds more"] == ["**5.00**", goals.ORDERED]
    assert rows["frozen step of 2 layers / 2 models by hand"] == ["0.75", ""]
    assert rows[f"shapes: {goals.OLD} / ours, least"] == ["1.00 / 0.98", ""]
    files["start"] = start(11.0)
    with pytest.raises(ValueError, match="first calls with an empty kernel cache"):
        list(goals.rows(files))


def test_a_gpu_has_its_tables_and_a_sentence():
    cases = [case(Work(9, 9, 9, 9), {"fastlstm cuda": 1.0, "torch cuda": ratio}) for ratio in (1.0, 4.0)]
    stage = bench_data.results(*cases, name="B", machine={"GPU": "a made-up GPU, driver 7"}, steps=({"name": "table"},))
    text = figures.section({"gpu": {"B": stage}})
    assert "On a made-up GPU, the geometric mean of PyTorch's time / ours is 2.00." in text
    tables = figures.tables({"gpu": {"B": stage}})
    assert "| table" in tables and "*a made-up GPU, driver 7; " in tables


def test_the_command_writes_and_then_finds_nothing_to_do(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "results" / "made-up"
    folder.mkdir(parents=True)
    results.save(folder / "bench.json", bench({LOST: 1.5}))
    for name, path in {"README": "README.md", "TABLES": "RESULTS.md", "RESULTS": "results"}.items():
        monkeypatch.setattr(figures, name, tmp_path / path)
    monkeypatch.setattr(pictures, "write", lambda found, to: [str((to / "peers.png").write_bytes(b"a picture"))])
    figures.README.write_text(f"before\n{figures.BEGIN}\n{figures.END}\nafter\n")
    assert figures.main(["--check"]) == 1 and "differ" in capsys.readouterr().err
    assert figures.main([]) == 0 and figures.main(["--check"]) == 0
    text = figures.README.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "![peers](results/made-up/peers.png)" in figures.TABLES.read_text()
    figures.README.write_text(text.replace("2 s (2.00)", "3 s (3.00)", 1))
    assert figures.main(["--check"]) == 1
    figures.README.write_text("no marks")
    assert figures.main([]) == 1 and "two marks" in capsys.readouterr().err
    (folder / "bench.json").write_text("{}")
    assert figures.main([]) == 1 and "holds no results" in capsys.readouterr().err
