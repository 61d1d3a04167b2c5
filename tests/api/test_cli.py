"""The command line: what it prints, and its exit status."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

import fastlstm
from fastlstm import cli, diagnostics
from fastlstm.errors import BackendError


@pytest.fixture
def few_cases(monkeypatch):
    """Two cases in place of sixty, the second ragged."""
    chosen = [diagnostics.Case(3, 2, 5, 3, 1, False, True, False), diagnostics.Case(7, 5, 4, 17, 2, True, True, True)]
    monkeypatch.setattr(diagnostics, "cases", lambda: iter(chosen))


def here():
    return [name for name, reason in diagnostics.backends().items() if reason is None]


def test_info_names_versions_backends_and_the_reason_why_one_is_missing(capsys, monkeypatch):
    def no_cuda(name, backend_named=fastlstm.dispatch.backend_named):
        if name == "cuda":
            raise BackendError("install something")
        return backend_named(name)

    monkeypatch.setattr(fastlstm.dispatch, "backend_named", no_cuda)
    assert cli.main(["info"]) == 0
    facts = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    facts = {name: value.strip() for name, value in facts.items()}
    assert facts["fastlstm"] == fastlstm.__version__
    assert facts["backend reference"] == "runs here"
    assert facts["backend cuda"] == "missing: install something"
    assert "cores usable" in facts["processor"]
    if facts["backend cpu"] == "runs here":
        assert {"threads", "vectors", "kernel cache"} <= facts.keys()


def test_published_facts_name_the_machine_and_no_folder():
    whole, public = diagnostics.describe(), diagnostics.describe_for_others()
    assert {"fastlstm", "python", "numpy", "processor"} <= public.keys() < whole.keys()
    folder = whole["kernel cache"]
    assert Path(folder).is_absolute()
    assert not any(folder in text or platform.release() in text for text in public.values())


def test_info_says_how_a_shape_would_be_run(capsys):
    assert cli.main(["info", "--shape", "9,2,3,4"]) == 0
    assert "T=9 B=2 I=3 H=4" in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["1,2,3", "1,2,3,0", "a,b,c,d", "1,2,3,4,5"])
def test_a_bad_shape_is_a_usage_error(shape, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["info", "--shape", shape])
    assert stopped.value.code == 2
    assert "--shape" in capsys.readouterr().err


@pytest.mark.usefixtures("few_cases")
def test_check_lists_every_backend_dtype_and_quantity(capsys):
    assert cli.main(["check"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    listed = {tuple(row[:3]) for row in rows if len(row) == 5 and row[1].startswith("float")}
    quantities = {"y", "h_n", "c_n", "dx", "dh0", "dc0", "dweight_ih", "dweight_hh", "dbias"}
    assert listed == {(name, dtype, q) for name in here() for dtype in diagnostics.BOUNDS for q in quantities}
    assert ["All", "within", "bounds."] in rows


@pytest.mark.usefixtures("few_cases")
def test_check_fails_when_an_error_is_out_of_its_bound(capsys, monkeypatch):
    monkeypatch.setitem(diagnostics.BOUNDS, "float32", 1e-9)
    assert cli.main(["check", "--backend", "reference"]) == 1
    printed = capsys.readouterr().out
    assert "OUT OF BOUND at Case(steps=" in printed and "out of bound." in printed


@pytest.mark.usefixtures("few_cases")
def test_check_sees_a_gradient_that_is_wrong_or_no_number(monkeypatch):
    right = diagnostics._run

    for wrong in (lambda v: v * 1.001, lambda v: v * float("nan")):

        def run(model, backend, data, lengths, wrong=wrong):
            result = right(model, backend, data, lengths)
            if model.cell.dtype == "float32":
                result["dh0"] = [wrong(value) for value in result["dh0"]]
            return result

        monkeypatch.setattr(diagnostics, "_run", run)
        failed = {(row.dtype, row.quantity) for row in diagnostics.compare("reference") if not row.within_bound}
        assert failed == {("float32", "dh0")}


@pytest.mark.parametrize("command", [["check", "--backend", "nope"], ["demo", "--seed", "-1"]])
def test_an_error_is_one_line_and_status_2(command, capsys, tmp_path):
    if command[0] == "demo":
        command = [*command, "--out", str(tmp_path)]
    assert cli.main(command) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"fastlstm {command[0]}: ") and printed.err.count("\n") == 1
    assert not printed.out


def test_ctrl_c_ends_quietly(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(diagnostics, "describe", interrupt)
    assert cli.main(["info"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_grid_has_ones_odd_sizes_ragged_and_every_kind_of_model():
    grid = list(diagnostics.cases())
    assert {1, 17, 65} <= {case.hidden_size for case in grid}
    for field in ("bidirectional", "bias", "ragged"):
        assert {getattr(case, field) for case in grid} == {False, True}
    assert {case.num_layers for case in grid} == {1, 2, 3}
    assert {"peephole", "coupled", "forget_gate", "proj_size"} <= {name for case in grid for name in case.variant}
