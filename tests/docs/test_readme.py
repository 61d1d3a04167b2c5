"""README.md: every code block runs, every command and link works, and it stays short."""

from __future__ import annotations

import contextlib
import re
import shlex
import tomllib
from pathlib import Path

import cuda_row
import numpy as np
import pytest

from fastlstm import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [match.groups() for match in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)]


def blocks(language):
    return [text for found, text in BLOCKS if found == language]


def test_the_python_blocks_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    if cuda_row.missing():
        pytest.skip(cuda_row.missing())
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks("python"):
        if "import torch" in block:
            pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")
        with cuda_row.installed() if "import cupy" in block else contextlib.nullcontext():
            exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "model.safetensors").exists()
    error, variance = map(float, re.search(r"error (\S+), of the targets (\S+)", capsys.readouterr().out).groups())
    assert error < 0.05 * variance  # the training loop learns


def test_the_training_loop_is_short():
    (block,) = (block for block in blocks("python") if "optimiser" in block)
    assert len([line for line in block.splitlines() if line.strip()]) <= 20


def test_the_state_dict_goes_to_torch_and_back():
    torch = pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")
    names = {"LSTM": __import__("fastlstm").LSTM}
    (block,) = (block for block in blocks("python") if "import torch" in block)
    exec(compile(block, "README.md", "exec"), names)
    x = np.random.default_rng(0).normal(size=(5, 2, 12)).astype(np.float32)
    with torch.no_grad():
        expected = names["module"](torch.from_numpy(x))[0].numpy()
    # Five steps of float32 numbers of order one.
    np.testing.assert_allclose(names["lstm"](x)[0], expected, rtol=0, atol=1e-6)


def commands():
    """Every command of the shell and Docker blocks, and those that are in the text."""
    lines = [line.removeprefix("RUN ") for line in "".join(blocks("sh") + blocks("dockerfile")).splitlines()]
    lines += re.findall(r"`((?:fastlstm|pip install|pytest) [^`]+)`", README)
    for line in lines:
        if not line.startswith("ENV "):
            yield from (shlex.split(part) for part in line.split("&&"))


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
def test_each_command_is_one_that_exists(command, monkeypatch):
    while "=" in command[0]:
        assert re.match(r"(NUMBA|FASTLSTM)_[A-Z_]+=", command.pop(0))
    program, *arguments = command
    if program == "fastlstm" and "--help" not in arguments:
        for name in ("_info", "_check", "_warm", "_demo"):
            monkeypatch.setattr(cli, name, lambda options: 0)
        monkeypatch.setattr(cli.command, "bench", lambda options: 0)
        assert cli.main(arguments) == 0
    elif program == "fastlstm":
        with pytest.raises(SystemExit, match="0"):
            cli.main(arguments)
    elif program == "pip":
        extras = re.fullmatch(r"\.(?:\[(.*)\])?", arguments[-1]).group(1) or ""
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert arguments[0] == "install" and set(filter(None, extras.split(","))) <= known.keys()
    else:
        assert program == "pytest" and arguments in ([], ["-n", "2", "-m", "not slow"])


def test_the_test_command_stands_on_one_line():
    assert re.findall(r"^pip install .*&& pytest$", README, re.MULTILINE) == ['pip install ".[test]" && pytest']


def test_every_language_of_a_block_is_tested():
    assert {language for language, _ in BLOCKS} == {"python", "sh", "dockerfile", ""}  # "": the data flow


DOCUMENTS = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/RESULTS.md"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_to_a_file_finds_it(name):
    document = ROOT / name
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8"))
    for link in links:
        if not link.startswith(("https://", "#")):
            assert (document.parent / link.partition("#")[0]).exists(), f"{name} links to {link}"
        else:
            assert re.match(r"https://[\w.-]+/|#[\w-]+$", link), f"{name} links to {link}"
    assert links or name in ("CONTRIBUTING.md", "benchmarks/RESULTS.md")


def test_every_file_that_is_named_exists():
    for name in re.findall(r"`((?:fastlstm|kernels|tests|benchmarks)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name


def test_the_readme_is_short_and_has_a_place_for_the_table():
    assert len(README.splitlines()) <= 200
    assert max(map(len, README.splitlines())) <= 200
    assert README.index("<!-- bench:begin -->") < README.index("<!-- bench:end -->")
