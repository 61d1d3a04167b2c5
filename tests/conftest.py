"""The parametrisation of every test over backend x dtype, and the tables printed after a run.

``FASTLSTM_TEST_BACKENDS=reference,cpu`` chooses the backends; one that is named there and cannot run fails.
``FASTLSTM_TEST_EXAMPLES=1000`` sets the number of examples of each hypothesis test. ``FASTLSTM_EXHAUSTIVE=2/4`` runs,
of the tests marked ``exhaustive``, the second quarter alone: ``.ci/run`` takes one quarter after the other.
"""

from __future__ import annotations

import collections
import os
from pathlib import Path

# Before NumPy is imported: a BLAS with threads is slower on these small products, on busy machines many times slower,
# because its idle threads spin on the cores that the backend's own threads, or other processes, need.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# For the processes that tests start: the folder they stand in is the checkout, and its fastlstm/ is not what is tested.
os.environ["PYTHONSAFEPATH"] = "1"
# Tests read stderr, where the first one that compiles a kernel would find a line about that.
os.environ.setdefault("FASTLSTM_QUIET", "1")

import cuda_row
import numpy as np
import pytest
import tolerances
from harness import CHOSEN_BACKENDS, KNOWN_BACKENDS, BackendUnderTest
from hypothesis import HealthCheck, settings

# Derandomised: every run has the same examples, so a failure is caused by a change. `backend` is function-scoped but
# the same for all examples, which is what that health check asks for; compilation may fall into any one example
# (deadline).
settings.register_profile(
    "fastlstm",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=int(os.environ.get("FASTLSTM_TEST_EXAMPLES", "40")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("fastlstm")

# `pytest -m "not slow"` takes less than two minutes in two processes. It leaves out these folders and files, the tests
# with the marker `slow`, the CUDA kernels on the CPU, and of the tests with the marker `sampled` six of seven cases, as
# exhaustive: seven is prime, so few values of a parameter are left out whole.
SLOW_FILES = {
    "bench",
    "cuda",
    "api/test_bounded_caches.py",
    "api/test_byte_order.py",
    "api/test_mutations.py",
    "api/test_packaging.py",
    "api/test_storage_interrupts.py",
    "backends/test_interrupts.py",
    "backends/test_memory.py",
    "backends/test_nested_calls.py",
    "backends/test_team.py",
    "backends/test_threads.py",
    "backends/test_waiting.py",
    "kernels/test_cell_step_mutations.py",
    "kernels/test_damaged_caches.py",
    "kernels/test_jit.py",
    "kernels/test_kernel_cache.py",
    "kernels/test_page_ends.py",
    "kernels/test_vector_widths.py",
    "kernels/test_warm.py",
    "loops/test_compiled_constants.py",
    "loops/test_loop_threads.py",
    "loops/test_released_memory.py",
    "loops/test_warm_loops.py",
}

# Each test compiles kernels of its own, and there are hundreds: these are marked `exhaustive`, as are the tests of CUDA
# kernels that are marked `slow` by themselves.
EXHAUSTIVE_FILES = {
    "cuda/test_cuda_mutations.py",
    "cuda/test_cuda_phased_mutations.py",
    "kernels/test_phased_mutations.py",
}

_skipped: collections.Counter[str] = collections.Counter()
_ran: collections.Counter[str] = collections.Counter()


@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.slow] * (name == "cuda")) for name in CHOSEN_BACKENDS or KNOWN_BACKENDS
    ]
)
def backend(request):
    """Each backend in turn, forced for the length of the test."""
    under_test = BackendUnderTest(request.param)
    if under_test.missing:
        if CHOSEN_BACKENDS:
            pytest.fail(f"FASTLSTM_TEST_BACKENDS asks for {under_test.name}, but {under_test.missing}")
        _skipped[f"{under_test.name} ({under_test.missing})"] += 1
        pytest.skip(under_test.missing)
    _ran[under_test.name] += 1
    with under_test.active():
        yield under_test


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Each dtype of a model in turn."""
    return np.dtype(request.param)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(config, items):
    """Mark slow files and cases, and leave out exhaustive tests that are not this run's part.

    Names of tests that differ from run to run are refused: pytest-xdist's processes need equal names.
    """
    slow, exhaustive_files = (
        {Path(__file__).parent / name for name in names} for names in (SLOW_FILES, EXHAUSTIVE_FILES)
    )
    for item in items:
        is_heavy = item.path.parent.name == "cuda" and any(mark.name == "slow" for mark in item.own_markers)
        if item.path in exhaustive_files or is_heavy:
            item.add_marker("exhaustive")
        if item.path in slow or item.path.parent in slow or item.get_closest_marker("exhaustive"):
            item.add_marker("slow")
    places: collections.Counter[tuple[object, bool]] = collections.Counter()
    for item in items:
        if item.get_closest_marker("sampled"):  # quick cases and slow ones alike
            kind = item.function, bool(item.get_closest_marker("slow"))
            if places[kind] % 7:
                item.add_marker("exhaustive")
                item.add_marker("slow")
            places[kind] += 1
    if named := [item.nodeid for item in items if " at 0x" in item.nodeid]:
        raise pytest.UsageError(f"an address is a part of a test's name: {named[0]}")
    if part := os.environ.get("FASTLSTM_EXHAUSTIVE"):
        number, of = map(int, part.split("/"))
        exhaustive = [item for item in items if item.get_closest_marker("exhaustive")]
        left_out = {item for place, item in enumerate(exhaustive) if place % of != number % of}
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter):
    """Print which backends ran, how many tests were skipped for want of one, and the largest errors."""
    write = terminalreporter.write_line
    if _ran or _skipped:
        terminalreporter.section("backends")
        for name, count in sorted(_ran.items()):
            write(f"ran     {count:5} tests on {name}" + (f": {cuda_row.describe()}" if name == "cuda" else ""))
        for name, count in sorted(_skipped.items()):
            write(f"SKIPPED {count:5} tests on {name}")
    if tolerances.measured:
        terminalreporter.section("largest normalised errors")
        for (claim, name, dtype), (error, where) in sorted(tolerances.measured.items()):
            write(f"{claim:40} {name:10} {dtype:8} {error:9.2e}  in {where}")
