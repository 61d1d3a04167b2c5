"""The limits of the code's form: files have at most 400 lines, and functions at most 60 without their docstring."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ["fastlstm", "kernels", "benchmarks", "tests"]
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 400, 60


def lines_of_code(function):
    """Count the lines of a function without its docstring: numpydoc gives one line or more to each argument."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    return lines


def too_long(source):
    """Find what is too long in Python source: "" for the file itself, and the names of functions."""
    if len(source.splitlines()) > MOST_LINES_OF_A_FILE:
        yield ""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines_of_code(node) > MOST_LINES_OF_A_FUNCTION:
            yield node.name


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_and_functions_are_short(folder):
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert len(paths) > 5
    found = {
        path.relative_to(ROOT).as_posix() + (name and f": {name}")
        for path in paths
        for name in too_long(path.read_text(encoding="utf-8"))
    }
    assert not found


def test_a_line_too_many_is_found():
    docstring = '    """A summary.\n\n    More.\n    """\n'
    body = "    a = 1\n" * (MOST_LINES_OF_A_FUNCTION - 1)
    assert list(too_long("def f():\n" + docstring + body)) == []
    assert list(too_long("def f():\n" + docstring + body + "    a = 2\n")) == ["f"]
    assert list(too_long("class A:\n    async def f():\n" + "        a = 1\n" * MOST_LINES_OF_A_FUNCTION)) == ["f"]
    assert list(too_long("a = 1\n" * MOST_LINES_OF_A_FILE)) == []
    assert list(too_long("a = 1\n" * (MOST_LINES_OF_A_FILE + 1))) == [""]
