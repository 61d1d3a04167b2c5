"""Files, tables, pictures and the command of ``fastlstm bench``. All results are made up."""

from __future__ import annotations

import dataclasses
import json
import struct
import subprocess
import sys
from pathlib import Path

import bench_data
import numpy as np
import pytest
from bench_data import case, cpu_results, gpu_results, values

from fastlstm import cli
from fastlstm.bench import peers, pictures, report, results, run
from fastlstm.bench.results import Case
from fastlstm.bench.work import Work
from fastlstm.errors import ResultsFileError

WORK = Work(100, 32, 64, 128)


def everything():
    """Results that use every field."""
    ragged = case(Work.ragged(4, 2, 3, 5), {"fastlstm": 1e-3, "torch": 2e-3}, refused={"openvino": "failed"})
    other = Case("x", {"fastlstm": (3.0,)}, "bytes", 2, "group", facts={"a fact": -1.5})
    return bench_data.results(ragged, other, absent={"openvino": "pip"}, about="words", steps=({"name": "check"},),
                              interrupted=True)  # fmt: skip


@pytest.mark.parametrize("made", [cpu_results(), gpu_results(), bench_data.results(), everything()])
def test_a_file_returns_what_was_saved_even_if_the_next_one_is_cut_short(made, tmp_path, monkeypatch):
    (tmp_path / "x.json").touch()
    empty = (tmp_path / "x.json").stat().st_ino
    results.save(tmp_path / "x.json", made)
    assert (tmp_path / "x.json").stat().st_ino != empty, "written in place, not replaced as a whole"
    assert results.load(tmp_path / "x.json") == dataclasses.replace(made, name="x")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    lines = (tmp_path / "x.json").read_text().splitlines()
    assert len([line for line in lines if '"values"' in line]) == len(made.cases)

    def cut_short(path, text, **options):
        path.write_bytes(text[:99].encode())
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", cut_short)
    with pytest.raises(OSError, match="no space"):
        results.save(tmp_path / "x.json", bench_data.results(case(WORK, {})))
    assert results.load(tmp_path / "x.json") == dataclasses.replace(made, name="x")


WHOLE = {"format": results.FORMAT} | dataclasses.asdict(everything())
BROKEN_CASES = [
    {"values": {"fastlstm": ["1 s"]}}, {"values": {"a": [1.0], "b": []}}, {"values": {"fastlstm": [-1.0]}},
    {"values": 3}, {"work": {"steps": 1}},
]  # fmt: skip
BROKEN = [b"\xff", b"", b"{", b"[]", b"7", b"[" * 100_000, b'{"format": "other"}', json.dumps(WHOLE | {"cases": [7]}),
          *(json.dumps(WHOLE | {"cases": [WHOLE["cases"][0] | change]}) for change in BROKEN_CASES)]  # fmt: skip


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_or_foreign_file_is_a_typed_error(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ResultsFileError, match="holds no results"):
        results.load(tmp_path / "x.json")


# The report.


def rows_of(made):
    """The cells of each row of the only table by the heads of their columns."""
    (text,) = [part for part in report.text(made) if part.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_a_row_has_time_share_of_the_peak_ratios_and_facts_and_a_loss_is_listed():
    sides = {"fastlstm": 0.02, "torch": 0.03, "onnxruntime": 0.01, "openvino": values(0.02, bench_data.NOISE[::-1])}
    made = bench_data.results(
        case(WORK, sides, facts={"bytes kept": 2048.0, "epochs": 7.0, "first results, fastlstm": 0.75},
             refused={"another": "computes something else"}), absent={"jax": "pip install jax"}, interrupted=True,
    )  # fmt: skip
    assert rows_of(made) == [{
        "T,B,I,H": "100,32,64,128", "fastlstm": "20 ms", "of peak": "31 %", "torch": "30 ms (1.50)",
        "onnxruntime": "10 ms (**0.50**)", "openvino": "20 ms (=)", "bytes kept": "2 KiB", "epochs": "7",
    }]  # fmt: skip
    text = "\n\n".join(report.text(made))
    for expected in (
        "against onnxruntime: faster in 0 of 1 rows, no difference in 0, slower in 1; geometric mean of the",
        f"LOSS at {WORK.title}: onnxruntime 0.50 (quartiles 0.50 to 0.50)", "jax is not measured: pip install jax",
        f"another is not timed at {WORK.title}: computes something else", "Interrupted",
        "first results, fastlstm, compilation included: 750 ms",
    ):  # fmt: skip
        assert expected in text


def test_each_side_is_compared_with_ours_on_its_own_device_and_our_own_neither_win_nor_lose():
    made = bench_data.results(case("a call", {"fastlstm": 2.0, "fastlstm, padded": 1.5}))
    assert rows_of(made) == [{"what": "a call", "fastlstm": "2 s", "fastlstm, padded": "1.5 s (0.75)"}]
    assert not list(report.duels(made.cases))
    last = rows_of(gpu_results())[-1]  # 64 sequences, 512 units
    assert (last["fastlstm"], last["fastlstm cuda"], last["torch cuda"]) == ("32.8 ms", "4.1 ms (0.12)", "5 ms (1.22)")
    assert not report.losses(gpu_results().cases)


# The pictures.


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason="Matplotlib is not installed")


NO_MATHEMATICS = case("a call", {"fastlstm": 1.0, "torch $\\frac$": 2.0})
ONE_BATCH = [case(Work(50, 4, h, h), {"fastlstm": 1.0, "fastlstm cuda": 2.0}) for h in (8, 16)]


@pytest.mark.parametrize(
    ("made", "drawn", "reason"),
    [(bench_data.results(NO_MATHEMATICS), {"peers"}, "no picture gpu: no GPU was measured"),
     (gpu_results(), {"peers", "gpu"}, ""), (bench_data.results(*ONE_BATCH), set(), "--grid full")],
)  # fmt: skip
def test_pictures_are_drawn_at_the_width_of_a_readme_or_the_reason_is_given(matplotlib, tmp_path, made, drawn, reason):
    assert reason in "\n".join(pictures.write(made, tmp_path))
    assert {path.stem for path in tmp_path.iterdir()} == drawn
    for path in tmp_path.iterdir():
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert 850 < width < 950 and 100 < height < 1200


def test_the_picture_of_peers_has_a_mark_for_each_ratio_of_the_most_telling_rows(matplotlib):
    (panel,) = pictures.peers(cpu_results()).axes
    marks = {line.get_label(): line.get_xdata() for line in panel.get_lines()}
    np.testing.assert_allclose(marks["torch"], 9 * [2.0])
    np.testing.assert_allclose(marks["onnxruntime"], [*9 * [0.8], 1.0], atol=0.03)
    assert panel.child_axes[0].get_yticklabels()[1].get_text() == "10 ms"
    many = [case(Work(n, 1, 1, 1), {"fastlstm": 1.0, "torch": 1.0 + n}) for n in range(1, 60)]
    many.append(case(WORK, {"fastlstm": 1.0, "torch": 90.0}))  # a row of the small grid
    (panel,) = pictures.peers(bench_data.results(*many)).axes
    first, *others, last = [label.get_text() for label in panel.get_yticklabels()]
    assert (first, last) == ("inference 1,1,1,1", f"inference {WORK.name}") and len(others) == pictures.MOST_ROWS - 2


def test_the_map_of_the_gpu_has_the_ratios(matplotlib):
    figure = pictures.gpu(gpu_results())
    for panel, limit in zip(figure.axes, (4096, 16384), strict=True):  # without copies, with copies
        ratios = 2.0 ** panel.collections[0].get_array().reshape(3, 3)
        np.testing.assert_allclose(ratios, np.outer([32, 128, 512], [1, 16, 64]) / limit)
        assert [text.get_text() for text in panel.texts][-1] == f"{64 * 512 // limit}x"


# The command.


@pytest.fixture
def made(monkeypatch):
    """The results of a run, without one; and what the command asked for."""
    asked = {"found": cpu_results()}

    def measure(works, names, **options):
        asked.update(works=list(works), names=list(names), **options)
        return asked["found"]

    monkeypatch.setattr(run, "measure", measure)
    return asked


def test_options_reach_the_run(made):
    assert cli.main(["bench"]) == 0
    assert {work.kind for work in made["works"]} == {"infer", "train", "stream"} and made["ours_only"]
    arguments = "--shape 3,2,4,5 --shape 7,1,1,1 --train --stream --layers 2 --dtype float64 --peers none --threads 3"
    assert cli.main(["bench", *arguments.split(), "--seconds", "0.5"]) == 0
    options = {"dtype": "float64", "layers": 2}
    assert made["works"] == [
        *(Work(*shape, kind="train", **options) for shape in ((3, 2, 4, 5), (7, 1, 1, 1))),
        *(Work(*shape, kind="stream", **options) for shape in ((1, 2, 4, 5), (1, 1, 1, 1))),
    ]
    assert (made["names"], made["threads"], made["seconds"], made["ours_only"]) == (peers.chosen("none"), 3, 0.5, ())
    assert cli.main(["bench", "--shape", "3,2,4,5", "--bidirectional"]) == 0
    assert made["works"] == [Work(3, 2, 4, 5, kind=kind, bidirectional=True) for kind in ("infer", "train")]


def test_ctrl_c_keeps_the_report_and_the_pictures(made, tmp_path, capsys):
    made["found"] = dataclasses.replace(cpu_results(), interrupted=True)
    assert cli.main(["bench", "--json", str(tmp_path / "a" / "x.json"), "--plot", str(tmp_path / "plots")]) == 130
    assert made["path"] == tmp_path / "a" / "x.json" and made["path"].parent.is_dir()
    printed = capsys.readouterr().out
    assert "no picture" in printed and "Interrupted" in printed and (tmp_path / "plots").is_dir()


@pytest.mark.parametrize(("refused", "status"), [("fastlstm", 1), ("torch", 0), (run.EVERYBODY, 1)])
def test_the_status_is_1_if_our_side_failed(made, refused, status):
    made["found"] = bench_data.results(case(WORK, {}, refused={refused: "failed"}))
    assert cli.main(["bench"]) == status


@pytest.mark.skipif(peers.missing("fastlstm") is not None, reason="the compiled kernels do not run")
def test_the_whole_command_on_a_tiny_shape(tmp_path):
    """In a process of its own: OpenVINO, where it is installed, starts threads, and later tests fork this process."""
    out = tmp_path / "x.json"
    code = "import sys; from fastlstm.cli import main; sys.exit(main())"
    arguments = ["bench", "--shape", "3,2,4,5", "--seconds", "0", "--peers", "openvino", "--json", out]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    assert "2 of 3: 3,2,4,5 train float32\n" in done.stderr
    found = results.load(out)
    assert [c.work.kind for c in found.cases] == ["infer", "train", "stream"] and "processor" in found.machine
    assert all(0 < found.share_of_peak(c, "fastlstm") < 1 and not c.refused for c in found.cases)
    computed = {c.work.kind for c in found.cases if "openvino" in c.values}
    assert computed == (set() if "openvino" in found.absent else {"infer", "stream"})


@pytest.mark.parametrize(
    "arguments",
    ["--shape 1,2,3", "--shape 0,1,1,1", "--peers unknown", "--threads 0", "--seconds nan", "--seconds -1",
     "--layers 2", "--shape 3,2,4,5 --stream --bidirectional", "--json {0}", "--plot {0}/x"],
)  # fmt: skip
def test_a_bad_option_is_one_line_and_status_2(arguments, tmp_path, capsys):
    (tmp_path / "x").touch()
    assert cli.main(["bench", *arguments.format(tmp_path).split()]) == 2
    message = capsys.readouterr().err
    assert message.startswith("fastlstm bench: ") and message.count("\n") == 1
