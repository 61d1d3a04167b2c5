"""Files, tables, pictures and the command of ``fastlstm bench``. All results are made up."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import struct
import subprocess
import sys

import bench_data
import numpy as np
import pytest
from bench_data import case, cpu_results, gpu_results, values

from fastlstm import cli
from fastlstm.bench import ceilings, peers, pictures, report, results, run
from fastlstm.bench.clock import Spread
from fastlstm.bench.results import Case
from fastlstm.bench.work import Work
from fastlstm.errors import ResultsFileError

WORK = Work(100, 32, 64, 128)


def everything():
    """Results that use every field."""
    ragged = case(Work.ragged(4, 2, 3, 5), {"fastlstm": 1e-3, "torch": 2e-3}, refused={"openvino": "failed"})
    other = Case("x", {"fastlstm": (3.0,)}, "bytes", 2, "group", facts={"a fact": -1.5}, bounds=("torch",),
                 ratios={"old": Spread(1.0, 2.0, 3.0)})  # fmt: skip
    return bench_data.results(ragged, other, absent={"openvino": "pip"}, about="words", steps=({"name": "check"},),
                              interrupted=True)  # fmt: skip


# The file.


@pytest.mark.parametrize("made", [cpu_results(), gpu_results(), bench_data.results(), everything()])
def test_a_file_returns_what_was_saved(made, tmp_path):
    results.save(tmp_path / "x.json", made)
    assert results.load(tmp_path / "x.json") == dataclasses.replace(made, name="x")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield from places(part, (*path, key))


def changed(whole, path, value):
    """A copy of a JSON value with another one at a place, or without it."""
    copy = target = json.loads(json.dumps(whole))
    for key in path[:-1]:
        target = target[key]
    if value is KeyError:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return copy


def test_a_broken_file_is_a_typed_error_or_can_be_shown():
    whole = json.loads(results.text_of(everything()))
    refused = 0
    for path in list(places(whole))[1:]:
        for value in (None, [], {}, "", "x", -1, 0, 1.5, True, KeyError, [[]], {"x": 1}, 1e400, 10**400):
            if value is KeyError and isinstance(path[-1], int):
                continue
            try:
                list(report.text(results.read(json.dumps(changed(whole, path, value)))))
            except ResultsFileError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 500
    with pytest.raises(ResultsFileError, match=r"cases\[0\]\.values\.fastlstm\[1\] is no float"):
        results.read(json.dumps(changed(whole, ("cases", 0, "values", "fastlstm", 1), "1")))
    with pytest.raises(ResultsFileError, match="different numbers of rounds"):
        results.read(json.dumps(changed(whole, ("cases", 0, "values", "torch"), [1.0])))
    for text in ("", "{", "[]", "nonsense", "[" * 100_000, '{"format": "other"}', '{"x": NaN}'):
        with pytest.raises(ResultsFileError):
            results.read(text)


# The table.


def row_of(made):
    """The cells of the only row by the heads of their columns."""
    (text,) = [part for part in report.text(made) if part.startswith("|")]
    head, _, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    return dict(zip(head, row, strict=True))


def test_a_row_has_time_share_of_the_peak_ratios_and_facts():
    sides = {"fastlstm": 0.02, "torch": 0.03, "onnxruntime": 0.01, "openvino": values(0.02, bench_data.NOISE[::-1])}
    made = bench_data.results(case(WORK, sides, facts={"bytes kept": 2048.0, "epochs": 7.0}))
    assert row_of(made) == {
        "T,B,I,H": "100,32,64,128", "fastlstm": "20 ms", "of peak": "31 %", "torch": "30 ms (1.50)",
        "onnxruntime": "10 ms (**0.50**)", "openvino": "20 ms (=)", "bytes kept": "2 KiB", "epochs": "7",
    }  # fmt: skip
    text = "\n\n".join(report.text(made))
    assert "against onnxruntime: faster in 0 of 1 rows, no difference in 0, slower in 1; geometric mean of the" in text
    assert f"LOSS at {WORK.title}: onnxruntime 0.50 (quartiles 0.50 to 0.50)" in text


def test_bounds_and_our_own_variants_neither_win_nor_lose():
    sides = {"fastlstm": 2.0, "bare microkernel": 1.0, "fastlstm, padded": 1.5}
    made = bench_data.results(case("a call", sides, bounds=("bare microkernel",)))
    assert row_of(made) == {"what": "a call", "fastlstm": "2 s", "bare microkernel": "1 s (50 % of ours)",
                            "fastlstm, padded": "1.5 s (0.75)"}  # fmt: skip
    assert not report.losses(made.cases) and not report.scores(made.cases)


def test_each_side_is_compared_with_ours_on_its_own_device():
    (one,) = [c for c in gpu_results().cases if c.work.shape == (50, 64, 512, 512)]
    assert report.cell(one, "fastlstm") == "32.8 ms"
    assert report.cell(one, "fastlstm cuda") == "4.1 ms (0.12)"
    assert report.cell(one, "torch cuda") == "5 ms (1.22)"
    assert "torch cuda" not in [side for _, side, _ in report.losses(gpu_results().cases)]


def test_the_report_lists_what_is_missing_refused_first_and_interrupted():
    made = bench_data.results(
        case(WORK, {"fastlstm": 1.0}, refused={"torch": "computes something else"},
             facts={"first results, fastlstm": 0.75}),
        absent={"openvino": "pip install openvino"}, interrupted=True,
    )  # fmt: skip
    text = "\n".join(report.text(made))
    for expected in ("openvino is not measured: pip install openvino", "Interrupted",
                     f"torch is not timed at {WORK.title}: computes something else",
                     "first results, fastlstm, compilation included: 750 ms"):  # fmt: skip
        assert expected in text


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [(2.345, "s", "2.35 s"), (1e-3, "s", "1 ms"), (2.5e-5, "s", "25 us"), (3e-8, "s", "0.03 us"),
     (0, "bytes", "0 bytes"), (5e6, "bytes", "4.77 MiB"), (1e13, "bytes", "9.31e+03 GiB")],
)  # fmt: skip
def test_amounts_have_the_unit_that_suits_them(value, unit, expected):
    assert report.amount(value, unit) == expected


# The pictures.


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason="Matplotlib is not installed")


def test_pictures_are_drawn_at_the_width_of_a_readme_or_the_reason_is_given(matplotlib):
    for made, drawn in ((cpu_results(), {"peers", "scaling", "roofline"}), (gpu_results(), set(pictures.PICTURES))):
        found = pictures.draw(made)
        assert {name for name, picture in found.items() if isinstance(picture, bytes)} == drawn
        for name in drawn:
            width, height = struct.unpack(">II", found[name][16:24])
            assert 850 < width < 950 and 200 < height < 1200
    assert "no GPU was measured" in pictures.draw(cpu_results())["gpu"]
    assert all(isinstance(reason, str) for reason in pictures.draw(bench_data.results()).values())


def test_the_picture_of_peers_has_a_mark_for_each_ratio(matplotlib):
    panel, ours = pictures.peers(cpu_results()).axes
    marks = {line.get_label(): line.get_xdata() for line in panel.get_lines()}
    np.testing.assert_allclose(marks["torch"], 9 * [2.0])
    np.testing.assert_allclose(marks["onnxruntime"], [*9 * [0.8], 1.0], atol=0.03)
    assert panel.get_xlabel() == "time of the peer / time of fastlstm" and panel.get_xscale() == "log"
    assert panel.get_yticklabels()[1].get_text() == "inference 10,32,64,128"
    assert ours.get_yticklabels()[1].get_text() == "10 ms"


def test_many_rows_are_cut_to_the_small_grid_and_the_nearest(matplotlib):
    many = [case(Work(n, 1, 1, 1), {"fastlstm": 1.0, "torch": 1.0 + n}) for n in range(1, 60)]
    many.append(case(WORK, {"fastlstm": 1.0, "torch": 90.0}))
    panel, _ = pictures.peers(bench_data.results(*many)).axes
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert (
        len(labels) == pictures.MOST_ROWS
        and labels[0] == "inference 1,1,1,1"
        and labels[-1] == f"inference {WORK.name}"
    )


def test_curves_have_every_point_and_side(matplotlib):
    figure = pictures.scaling(cpu_results())
    for panel, name in zip(figure.axes, ("time steps T", "batch B", "hidden units H"), strict=True):
        lines = {line.get_label(): line for line in panel.get_lines()}
        assert panel.get_xlabel() == name and set(lines) == {"fastlstm", "torch", "onnxruntime"}
        found = dict(zip(lines["torch"].get_xdata(), lines["torch"].get_ydata(), strict=True))
        through_the_centre = {} if name == "time steps T" else {32 if name == "batch B" else 128: 0.2}
        assert found == pytest.approx({1: 2e-3, 10: 2e-2, 100: 0.2} | through_the_centre)


def test_the_map_of_the_gpu_has_the_ratios(matplotlib):
    figure = pictures.gpu(gpu_results())
    titles = ["inference, arrays on the GPU", "inference, arrays copied in each call"]
    assert [panel.get_title() for panel in figure.axes] == titles
    for panel, limit in zip(figure.axes, (4096, 16384), strict=True):
        ratios = 2.0 ** panel.collections[0].get_array().reshape(3, 3)
        np.testing.assert_allclose(ratios, np.outer([32, 128, 512], [1, 16, 64]) / limit)
        assert [text.get_text() for text in panel.texts][-1] == f"{64 * 512 // limit}x"
    one_batch = [case(Work(50, 4, h, h), {"fastlstm": 1.0, "fastlstm cuda": 2.0}) for h in (8, 16)]
    assert "--grid full" in pictures.gpu(bench_data.results(*one_batch))


def test_the_roofline_has_a_point_for_each_case_below_the_roof(matplotlib):
    made = gpu_results()
    for panel, side in zip(pictures.roofline(made).axes, ("fastlstm", "fastlstm cuda"), strict=True):
        (points,), (roof,) = panel.collections, panel.get_lines()
        found = [
            (c.work.operations / c.work.bytes, c.work.operations / c.spread(side).middle / 1e9) for c in made.cases
        ]
        np.testing.assert_allclose(points.get_offsets(), found)
        ceiling = made.ceilings["cpu" if side == "fastlstm" else "cuda"]
        slope = roof.get_xdata() * ceiling.bandwidth
        np.testing.assert_allclose(roof.get_ydata(), np.minimum(slope, ceiling.operations["float32"]) / 1e9)


def test_names_of_machines_and_sides_are_no_mathematics(matplotlib):
    made = bench_data.results(case(WORK, {"fastlstm": 1.0, "torch $\\frac$": 2.0}), machine={"processor": "$\\frac"})
    assert isinstance(pictures.draw(made)["peers"], bytes)


# The command.


@pytest.fixture
def made(monkeypatch):
    """The results of a run, without one; and what the command asked for."""
    asked = {"found": cpu_results()}

    def measure(works, names, *, keep=lambda found: None, **options):
        asked.update(works=list(works), names=list(names), **options)
        keep(asked["found"])
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


def test_files_and_pictures_are_written_and_ctrl_c_keeps_them(made, tmp_path, capsys):
    made["found"] = dataclasses.replace(cpu_results(), interrupted=True)
    found = tmp_path / "a" / "x.json"
    assert cli.main(["bench", "--json", str(found), "--plot", str(tmp_path / "plots")]) == 130
    assert results.load(found).cases == made["found"].cases
    printed = capsys.readouterr().out
    assert "no picture gpu: " in printed and "Interrupted" in printed
    if importlib.util.find_spec("matplotlib"):
        assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"peers", "scaling", "roofline"}


@pytest.mark.parametrize(("refused", "status"), [("fastlstm", 1), ("torch", 0), (run.EVERYBODY, 1)])
def test_the_status_is_1_if_our_side_failed(made, refused, status):
    made["found"] = bench_data.results(case(WORK, {}, refused={refused: "failed"}))
    assert cli.main(["bench"]) == status


@pytest.mark.skipif(peers.missing("fastlstm") is not None, reason="the compiled kernels do not run")
def test_the_whole_command_on_a_tiny_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(ceilings, "SECONDS", 0.02)
    monkeypatch.setattr(ceilings, "CPU_BYTES", 1 << 22)
    out = tmp_path / "x.json"
    tiny = ["--shape", "3,2,4,5", "--seconds", "0", "--threads", "1", "--peers", "none", "--json", str(out)]
    assert cli.main(["bench", *tiny]) == 0
    found = results.load(out)
    assert [c.work.kind for c in found.cases] == ["infer", "train", "stream"] and "processor" in found.machine
    assert all(0 < found.share_of_peak(c, "fastlstm") < 1 and not c.refused for c in found.cases)


def test_openvino_agrees(tmp_path):
    """In a process of its own: it starts threads, and later tests fork this process."""
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    out = tmp_path / "x.json"
    code = "import sys; from fastlstm.cli import main; sys.exit(main())"
    arguments = [
        "bench",
        "--shape",
        "3,2,4,5",
        "--seconds",
        "0",
        "--threads",
        "2",
        "--peers",
        "openvino",
        "--json",
        out,
    ]
    subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, timeout=120, check=True)
    found = results.load(out)
    assert {c.work.kind for c in found.cases if "openvino" in c.values} == {"infer", "stream"}
    assert not any(c.refused for c in found.cases)


@pytest.mark.parametrize(
    "arguments",
    ["--shape 1,2,3", "--shape 0,1,1,1", "--peers nobody", "--threads 0", "--seconds nan", "--layers 2",
     "--shape 3,2,4,5 --stream --bidirectional", "--json {0}", "--plot {0}/x"],
)  # fmt: skip
def test_a_bad_option_is_one_line_and_status_2(arguments, tmp_path, capsys):
    (tmp_path / "x").touch()
    assert cli.main(["bench", *arguments.format(tmp_path).split()]) == 2
    message = capsys.readouterr().err
    assert message.startswith("fastlstm bench: ") and message.count("\n") == 1
