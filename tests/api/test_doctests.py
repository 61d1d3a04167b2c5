"""Every example in a docstring of the package runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import fastlstm
import fastlstm.kernels


def modules_of(package):
    """The names of all modules below a package."""
    return [module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]


# In an editable installation, kernels/ does not lie below fastlstm/.
MODULES = sorted({"fastlstm", *modules_of(fastlstm), "fastlstm.kernels", *modules_of(fastlstm.kernels)})
# These are what people touch: each has at least one example.
EXAMPLES = {"fastlstm", "fastlstm.lstm", "fastlstm.functional", "fastlstm.parameters", "fastlstm.dispatch"}


def examples_of(name):
    """Return the doctests of a module, or skip if what it needs is not installed."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if not (error.name or "").startswith("fastlstm"):
            pytest.skip(f"{name} needs {error.name}")
        raise
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_examples_print_what_they_say(name):
    found = examples_of(name)
    assert found or name not in EXAMPLES, f"{name} has no example"
    runner = doctest.DocTestRunner(verbose=False)
    for test in found:
        runner.run(test)
    assert runner.failures == 0


def test_all_public_modules_are_walked():
    assert set(MODULES) >= EXAMPLES | {"fastlstm.backends.reference", "fastlstm.kernels.cpu"}
