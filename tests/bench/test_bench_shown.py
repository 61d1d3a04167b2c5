"""What shows the results of ``fastlstm bench``: file, table, comparison, pictures, page, command. All are made up."""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import json
import re
import struct
import subprocess
import sys

import bench_data
import numpy as np
import pytest
from bench_data import cpu_results, gpu_results, row, timing

from fastlstm import cli
from fastlstm.bench import ceilings, command, page, peers, pictures, results, run, table
from fastlstm.bench.clock import Spread
from fastlstm.bench.work import Work
from fastlstm.errors import ResultsFileError

WORK = Work(100, 32, 64, 128)


# The file.


@pytest.mark.parametrize("made", [cpu_results(), gpu_results(), bench_data.results()])
def test_a_file_gives_back_what_was_saved(made, tmp_path):
    ragged = row(Work.ragged(6, 3, 4, 5), {"fastlstm": 1.0}, {"jax": "failed"})
    made = dataclasses.replace(made.with_row(ragged), interrupted=True)
    results.save(tmp_path / "x.json", made)
    assert results.load(tmp_path / "x.json") == made
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def places(value, path=()):
    """Every place in a JSON value, outermost first."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield from places(part, (*path, key))


def changed(whole, path, value):
    """A copy of a JSON value with another one at a place, or without it."""
    copy = json.loads(json.dumps(whole))
    if not path:
        return value
    target = copy
    for key in path[:-1]:
        target = target[key]
    if value is KeyError:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return copy


def test_a_broken_file_is_a_typed_error_and_says_where():
    made = bench_data.results(row(Work.ragged(4, 2, 3, 5), {"fastlstm": 1e-3}, {"jax": "failed"}))
    whole = json.loads(results.text_of(made))
    accepted = set()
    for path in places(whole):
        for value in (None, [], {}, "", "x", -1, 0, 1.5, True, KeyError, [[]], {"x": 1}, 1e400, 10**400):
            if value is KeyError and (not path or isinstance(path[-1], int)):
                continue
            try:
                found = results.read(json.dumps(changed(whole, path, value)))
            except ResultsFileError as error:
                assert "\n" not in str(error)
            else:
                accepted.add(path[0])
                list(table.text(found))  # what is accepted can be shown
    # These may hold any text, a number may be another number, and any object of texts may be empty.
    assert accepted <= {
        "machine",
        "threads",
        "rows",
        "ceilings",
        "absent",
        "denormals",
        "method",
        "made",
        "interrupted",
    }
    with pytest.raises(ResultsFileError, match=r"rows\[0\]\.sides\.fastlstm\.seconds\.1"):
        results.read(json.dumps(changed(whole, ("rows", 0, "sides", "fastlstm", "seconds", 1), -1.0)))
    with pytest.raises(ResultsFileError, match="different numbers of rounds"):
        results.read(json.dumps(changed(whole, ("rows", 0, "sides", "torch"), dataclasses.asdict(timing(1, (1, 1))))))
    for text in (
        "",
        "{",
        "[]",
        "nonsense",
        "[" * 100_000,
        results.text_of(made).replace('"version": 1', '"version": 2'),
    ):
        with pytest.raises(ResultsFileError):
            results.read(text)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'{"format": "other"}', b'{"x": NaN}'])
def test_the_command_says_in_one_line_which_file_is_broken(content, tmp_path, capsys):
    bad = tmp_path / "bad.json"
    bad.write_bytes(content)
    for arguments in (["--compare", str(bad)], ["--report", str(bad), "--page", str(tmp_path / "x.html")]):
        assert cli.main(["bench", *arguments]) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"fastlstm bench: {bad}") and message.count("\n") == 1
    assert not (tmp_path / "x.html").exists()


# The table.


def test_the_table_has_time_rate_share_and_ratios():
    seconds = 0.02
    made = bench_data.results(row(WORK, {"fastlstm": seconds, "torch": 0.03, "jax": 0.01, "openvino": seconds}))
    (line,) = table.lines(made)
    assert line.seconds.middle == seconds and line.steps == pytest.approx(100 * 32 / seconds)
    assert line.operations == pytest.approx(8 * 128 * (3200 * 64 + 3168 * 128) / seconds)
    assert line.share == pytest.approx(line.operations / 1e11)
    assert line.ratios["torch"].middle == pytest.approx(1.5)
    lines = list(table.text(made))
    head = next(n for n, text in enumerate(lines) if "T,B,I,H" in text)
    cells = dict(zip(re.split(r"  +", lines[head].strip()), re.split(r"  +", lines[head + 1].strip()), strict=True))
    assert cells == {
        "T,B,I,H": "100,32,64,128", "time": "20 ms", "spread": "2 %", "steps/s": "160,000", "GFLOP/s": "31.2",
        "of peak": "31.2 %", "torch": "1.50", "jax": "0.50 LOSS", "openvino": "no difference",
    }  # fmt: skip
    text = "\n".join(lines)
    assert (
        "against jax: faster in 0 of 1 rows, no difference in 0, slower in 1; geometric mean of the ratios 0.50" in text
    )
    assert "LOSS at 100,32,64,128 infer float32: 0.50 (quartiles 0.50 to 0.50)" in text


def test_the_table_says_what_is_missing_refused_flushed_and_interrupted():
    made = bench_data.results(
        row(WORK, {"fastlstm": 1.0}, {"torch": "computes something else"}),
        absent={"jax": "pip install jax"}, denormals={"fastlstm": "kept"}, interrupted=True,
    )  # fmt: skip
    text = "\n".join(table.text(made))
    for expected in (
        "jax is not measured: pip install jax",
        "torch is not timed at 100,32,64,128 infer float32: computes something else",
        "fastlstm: denormals kept",
        "fastlstm: built in 250 ms, first results 500 ms later",
        "Interrupted",
    ):
        assert expected in text


def test_a_gpu_has_lines_of_its_own():
    lines = table.lines(gpu_results())
    assert {line.side for line in lines} == {"fastlstm", "fastlstm cuda", "fastlstm cuda with copies"}
    by = {(line.side, line.row.work.batch, line.row.work.hidden): line for line in lines}
    device = by["fastlstm cuda", 64, 512]
    assert set(device.ratios) == {"fastlstm", "torch cuda"} and device.ratios["fastlstm"].middle == pytest.approx(8)
    assert device.share == pytest.approx(device.operations / 1e13)
    assert by["fastlstm", 64, 512].ratios == {}
    assert any(
        text.split()[:1] == ["50,64,512,512"] and "cuda with copies" in text for text in table.text(gpu_results())
    )


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(2.345, "2.35 s"), (1.0, "1 s"), (0.9996, "1000 ms"), (1e-3, "1 ms"), (2.5e-5, "25 us"), (3e-8, "0.03 us")],
)
def test_times_have_the_unit_that_suits_them(seconds, expected):
    assert table.time_of(seconds) == expected


# The comparison.


def test_what_got_slower_beyond_the_spread_of_both_runs():
    before = bench_data.results(
        row(WORK, {"fastlstm": 1.0, "torch": 1.0, "jax": 1.0}),
        row(dataclasses.replace(WORK, dtype="float64"), {"fastlstm": 1.0}),
        row(dataclasses.replace(WORK, kind="train"), {"fastlstm": timing(1.0, (0.5, 0.8, 1, 1.2, 1.5))}),
        row(Work(1, 1, 1, 1), {"fastlstm": 1.0}),
    )
    now = bench_data.results(
        row(WORK, {"fastlstm": 1.1, "torch": 0.9, "openvino": 1.0}),
        row(dataclasses.replace(WORK, dtype="float64"), {"fastlstm": 1.015}),
        row(dataclasses.replace(WORK, kind="train"), {"fastlstm": 1.1}),
    )
    changes, alone = results.compare(before, now)
    verdicts = {(change.work.dtype, change.work.kind, change.side): change.verdict for change in changes}
    assert verdicts == {
        ("float32", "infer", "fastlstm"): "slower",
        ("float32", "infer", "torch"): "faster",
        ("float64", "infer", "fastlstm"): "no difference",
        ("float32", "train", "fastlstm"): "no difference",
    }
    assert len(alone) == 3 and "100,32,64,128 infer float32, 2 thread(s), openvino: only now" in alone
    text = list(table.changes(changes, alone))
    assert text[0] == "SLOWER: fastlstm at 100,32,64,128 infer float32, 2 thread(s): 1 s before, 1.1 s now (1.10 of it)"
    assert text[-2].startswith("4 figures are in both; 2 of them differ by no more")


def test_other_threads_lengths_or_sides_are_other_figures():
    one = row(Work.ragged(6, 3, 4, 5), {"fastlstm": 1.0})
    others = [
        dataclasses.replace(one, threads=1),
        dataclasses.replace(one, work=dataclasses.replace(one.work, lengths=(6, 6, 6))),
        dataclasses.replace(one, sides={"torch": timing(1.0)}),
    ]
    for other in others:
        changes, alone = results.compare(bench_data.results(one), bench_data.results(other))
        assert not changes and len(alone) == 2


# The pictures.


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason="Matplotlib is not installed")


@pytest.fixture(autouse=True, scope="module")
def draw_once():
    """Drawing takes seconds: what was drawn for one test serves for the next."""
    drawn, real = {}, pictures.draw

    def draw(made):
        key = results.text_of(made)
        if key not in drawn:
            drawn[key] = real(made)
        return drawn[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "draw", draw)
        yield


def size_of(png):
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", png[16:24])


def test_pictures_are_drawn_or_the_reason_is_given(matplotlib):
    for made, drawn in ((cpu_results(), {"scaling", "roofline", "peers"}), (gpu_results(), set(pictures.PICTURES))):
        found = pictures.draw(made)
        assert set(found) == set(pictures.PICTURES)
        assert {name for name, picture in found.items() if isinstance(picture, bytes)} == drawn
        assert all(min(size_of(found[name])) > 200 for name in drawn)
    assert "no GPU was measured" in pictures.draw(cpu_results())["crossover"]
    empty = pictures.draw(bench_data.results())
    assert all(isinstance(reason, str) for reason in empty.values())


def test_curves_have_every_point_and_side(matplotlib):
    made = cpu_results()
    figure = pictures.scaling(made)
    assert len(figure.axes) == 3
    for panel, (name, place) in zip(
        figure.axes, {"time steps T": 0, "batch B": 1, "hidden units H": 3}.items(), strict=True
    ):
        assert panel.get_xlabel() == name
        lines = {line.get_label(): line for line in panel.get_lines()}
        assert set(lines) == {"fastlstm", "torch", "onnxruntime"}
        expected = {}
        for given in made.rows:
            if all(given.work.shape[n] == bench_data.CENTRE[n] for n in range(4) if n != place):
                expected[given.work.shape[place]] = given.sides["torch"].spread.middle
        assert set(expected) >= {1, 10, 100}
        np.testing.assert_array_equal(lines["torch"].get_xdata(), sorted(expected))
        np.testing.assert_allclose(lines["torch"].get_ydata(), [expected[size] for size in sorted(expected)])


def test_the_map_has_the_line_where_the_gpu_starts_to_pay(matplotlib):
    figure = pictures.crossover(gpu_results())
    maps = [panel for panel in figure.axes if panel.get_title()]
    assert [panel.get_title() for panel in maps] == ["infer, copies not counted", "infer, copies in and out counted"]
    for panel, limit in zip(maps, (4096, 16384), strict=True):
        mesh, contour = panel.collections[:2]
        ratios = 2.0 ** mesh.get_array().reshape(3, 3)
        np.testing.assert_allclose(ratios, np.outer([32, 128, 512], [1, 16, 64]) / limit)
        (line,) = [path for path in contour.get_paths() if len(path.vertices)]
        # The line runs where batch * hidden is the limit, between the columns 1, 16, 64 and the rows 32, 128, 512.
        across, up = line.vertices.T
        batches = np.interp(across, range(3), np.log2([1, 16, 64]))
        hiddens = np.interp(up, range(3), np.log2([32, 128, 512]))
        np.testing.assert_allclose(batches + hiddens, np.log2(limit), atol=0.5)


def test_the_map_wants_two_batches_and_two_sizes(matplotlib):
    one_batch = [row(Work(50, 4, h, h), {"fastlstm": 1.0, "fastlstm cuda": 2.0}) for h in (8, 16)]
    assert "--grid full" in pictures.crossover(bench_data.results(*one_batch))


def test_the_roofline_has_a_point_for_each_line_below_the_roof(matplotlib):
    made = gpu_results()
    figure = pictures.roofline(made)
    for panel, device, side in zip(figure.axes, ("cpu", "cuda"), ("fastlstm", "fastlstm cuda"), strict=True):
        assert panel.get_title() == device
        (points,) = panel.collections
        expected = [
            (row.work.operations / row.work.bytes, row.work.operations / row.sides[side].spread.middle)
            for row in made.rows
        ]
        np.testing.assert_allclose(points.get_offsets(), expected)
        (roof,) = panel.get_lines()
        ceiling = made.ceilings[device]
        slope = roof.get_xdata() * ceiling.bandwidth
        np.testing.assert_allclose(roof.get_ydata(), np.minimum(slope, ceiling.operations["float32"]))


def test_losses_are_red_bars_to_the_left(matplotlib):
    made = bench_data.results(
        row(WORK, {"fastlstm": 1.0, "torch": 3.0, "jax": 0.5, "openvino": timing(1, (1, 1, 2, 0.5, 1))})
    )
    figure = pictures.bars(made)
    found = {}
    for panel in figure.axes:
        (bar,) = panel.patches
        ends = sorted((bar.get_x(), bar.get_x() + bar.get_width()))
        found[panel.get_title().partition("\n")[0]] = (*ends, bar.get_facecolor())
    to_rgba = importlib.import_module("matplotlib.colors").to_rgba
    assert found["torch"] == (1, 3, to_rgba(pictures.WIN))
    assert found["jax"] == (0.5, 1, to_rgba(pictures.LOSS))
    assert found["openvino"][2] == to_rgba(pictures.LEVEL)


def test_without_matplotlib_the_reason_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = pictures.draw(bench_data.results(made="without Matplotlib"))
    assert set(found.values()) == {'pictures need Matplotlib: pip install "fastlstm[bench]"'}


# The page.


def test_a_page_of_several_machines_stands_alone_and_escapes_names():
    evil = "<script>alert('&')</script>"
    second = bench_data.results(
        row(WORK, {"fastlstm": 1.0, f"{evil} $\\frac$": 2.0}, {evil: evil}), absent={evil: evil}, method={evil: evil},
        machine={evil: evil, "processor": f"$\\frac {evil}", "GPU": "$"}, denormals={evil: evil}, made=evil,
    )  # fmt: skip
    text = page.html({"one.json": cpu_results(), f"{evil}.json": second})
    assert evil not in text and "&lt;script&gt;" in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text) and "<link" not in text
    assert text.count("<h2>") == 3 and "All machines" in text
    assert "0.80 LOSS" in text and "pip install jax" in text and "no GPU was measured" in text
    if importlib.util.find_spec("matplotlib"):
        found = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
        assert len(found) == 5 and all(min(size_of(base64.b64decode(data))) > 200 for data in found)


def test_a_report_is_made_of_files(tmp_path, capsys):
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for path, made in zip(files, (cpu_results(), bench_data.results()), strict=True):
        results.save(path, made)
    out = tmp_path / "deep" / "page.html"
    assert cli.main(["bench", "--report", *map(str, files), "--page", str(out)]) == 0
    assert "one.json" in out.read_text() and "two.json" in out.read_text()
    assert f"wrote {out}" in capsys.readouterr().out


# The command.


@pytest.fixture
def made(monkeypatch):
    """What a run would find, without one; and what the command asked for."""
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
    arguments = (
        "--shape 3,2,4,5 --shape 7,1,1,1 --train --stream --dtype float64 --peers none --threads 3 --seconds 0.5"
    )
    assert cli.main(["bench", *arguments.split()]) == 0
    assert made["works"] == [
        Work(3, 2, 4, 5, "float64", "train"), Work(7, 1, 1, 1, "float64", "train"),
        Work(1, 2, 4, 5, "float64", "stream"), Work(1, 1, 1, 1, "float64", "stream"),
    ]  # fmt: skip
    assert (made["names"], made["threads"], made["seconds"]) == (peers.chosen("none"), 3, 0.5)
    assert made["ours_only"] == ()


def test_files_and_pictures_are_written(made, tmp_path, capsys):
    found = tmp_path / "a" / "x.json"
    assert cli.main(["bench", "--json", str(found), "--plot", str(tmp_path / "plots")]) == 0
    assert results.load(found) == made["found"]
    printed = capsys.readouterr().out
    assert "no picture crossover: " in printed
    if importlib.util.find_spec("matplotlib"):
        assert {path.name for path in (tmp_path / "plots").iterdir()} == {"scaling.png", "roofline.png", "peers.png"}


def test_the_comparison_decides_the_status(made, tmp_path, capsys):
    old = tmp_path / "old.json"
    results.save(old, made["found"])
    assert cli.main(["bench", "--compare", str(old)]) == 0
    slower = {"fastlstm": timing(2e-5), "onnxruntime": timing(1e-5, bench_data.NOISE[::-1])}
    rows = (*made["found"].rows[:-1], dataclasses.replace(made["found"].rows[-1], sides=slower))
    made["found"] = dataclasses.replace(made["found"], rows=rows, machine={"processor": "another"})
    assert cli.main(["bench", "--compare", str(old)]) == 1
    printed = capsys.readouterr().out
    assert "SLOWER: fastlstm at 1,1,32,64 stream float32" in printed and "ANOTHER PROCESSOR" in printed
    # A peer that got slower is said, but is no fault of ours.
    slower = {"fastlstm": timing(1e-5), "onnxruntime": timing(2e-5)}
    made["found"] = dataclasses.replace(made["found"], rows=(dataclasses.replace(rows[-1], sides=slower),))
    assert cli.main(["bench", "--compare", str(old)]) == 0
    assert "SLOWER: onnxruntime" in capsys.readouterr().out


@pytest.mark.parametrize(("refused", "status"), [("fastlstm", 1), ("torch", 0), (run.EVERYBODY, 1)])
def test_if_ours_failed_the_status_says_so(made, refused, status):
    made["found"] = bench_data.results(row(WORK, {}, {refused: "failed"}))
    assert cli.main(["bench"]) == status


def test_an_interrupted_run_prints_what_there_is(made, tmp_path, capsys):
    made["found"] = dataclasses.replace(cpu_results(), interrupted=True)
    assert cli.main(["bench", "--json", str(tmp_path / "x.json")]) == 130
    assert "Interrupted" in capsys.readouterr().out and results.load(tmp_path / "x.json").interrupted


@pytest.mark.skipif(peers.missing("fastlstm", 1) is not None, reason="the compiled kernels do not run")
def test_the_whole_command_on_a_tiny_shape(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ceilings, "SECONDS", 0.02)
    monkeypatch.setattr(ceilings, "CPU_BYTES", 1 << 22)
    out = tmp_path / "x.json"
    tiny = ["--shape", "3,2,4,5", "--seconds", "0", "--threads", "1"]
    assert cli.main(["bench", *tiny, "--peers", "none", "--json", str(out)]) == 0
    found = results.load(out)
    assert [row.work for row in found.rows] == [
        Work(3, 2, 4, 5), Work(3, 2, 4, 5, kind="train"), Work(1, 2, 4, 5, kind="stream")
    ]  # fmt: skip
    assert all("fastlstm" in row.sides and not row.refused for row in found.rows)
    assert found.denormals["fastlstm"] == "kept" and "processor" in found.machine and not found.interrupted
    shares = [found.share_of_peak(row, "fastlstm") for row in found.rows]
    assert all(0 < share < 1 for share in shares)
    assert capsys.readouterr().out.count("3,2,4,5") == 2
    assert cli.main(["bench", *tiny, "--infer", "--peers", "none", "--compare", str(out)]) in (0, 1)
    assert "1 figures are in both" in capsys.readouterr().out


@pytest.mark.parametrize("peer", ["openvino", "jax"])
def test_peers_that_start_threads_of_their_own_agree(peer, tmp_path):
    """In a process of their own: they do not bear that later tests fork this one."""
    if any(importlib.util.find_spec(package) is None for package in peers.CONTENDERS[peer].packages):
        pytest.skip(f"{peer} is not installed")
    out = tmp_path / "x.json"
    code = "import sys; from fastlstm.cli import main; sys.exit(main())"
    arguments = ["bench", "--shape", "3,2,4,5", "--seconds", "0", "--threads", "2", "--peers", peer, "--json", out]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = results.load(out)
    assert {row.work.kind for row in found.rows if peer in row.sides} >= {"infer", "stream"}
    assert not any(row.refused for row in found.rows)


@pytest.mark.parametrize(
    "option", ["--json {0}", "--compare {0}", "--compare {0}/no", "--plot {0}/x", "--report {0}/no"]
)
def test_a_file_that_cannot_be_used_is_one_line_before_anything_is_measured(option, made, tmp_path, capsys):
    (tmp_path / "x").touch()
    assert cli.main(["bench", *option.format(tmp_path).split()]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"fastlstm bench: {tmp_path}") and message.count("\n") == 1
    assert "works" not in made


@pytest.mark.parametrize(
    "arguments",
    [
        "--shape 1,2,3",
        "--shape a,b,c,d",
        "--shape 0,1,1,1",
        "--peers nobody",
        "--threads 0",
        "--seconds nan",
        "--seconds -1",
    ],
)
def test_a_bad_option_is_one_line_and_status_2(arguments, capsys):
    assert cli.main(["bench", *arguments.split()]) == 2
    message = capsys.readouterr().err
    assert message.startswith("fastlstm bench: ") and message.count("\n") == 1


def test_the_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    printed = capsys.readouterr().out
    for option in (
        "shape",
        "grid",
        "peers",
        "threads",
        "dtype",
        "train",
        "stream",
        "json",
        "plot",
        "compare",
        "report",
    ):
        assert f"--{option}" in printed


def test_without_tqdm_there_is_no_bar(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(command._progress()([WORK])) == [WORK]


def test_spreads_are_shown_as_ratios_or_their_absence():
    assert table.cell(None) == "-" and table.cell(Spread(2, 2.5, 3)) == "2.50"
