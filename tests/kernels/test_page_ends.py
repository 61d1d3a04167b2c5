"""The kernels read nothing beyond the end of an array, not even unused elements.

Each array that a model is given ends here at a page that may not be read; so a process of its own does the work, which
the system would end.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import subprocess
import sys

import numpy as np
import pytest
from harness import BackendUnderTest

from fastlstm import LSTM, use_backend

# Small and large batches, one and several at a time; I and H below, at and beyond whole vectors.
ROWS = [(1, 1), (1, 3), (2, 7), (9, 1), (5, 8)]
SIZES = [(1, 1), (3, 7), (16, 16), (17, 33), (5, 100)]


def at_the_end_of_a_page(value):
    """Copy an array to where the memory after it must not be touched."""
    page = mmap.PAGESIZE
    size = -(-max(1, value.nbytes) // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start + size), page, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    array = np.frombuffer(memory, value.dtype, value.size, size - value.nbytes).reshape(value.shape)
    array[...] = value
    return array


def results(lstm, place, steps, batch):
    """Everything that a model computes, its arguments where `place` puts them."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return place(rng.normal(size=shape).astype(lstm.cell.dtype))

    state = draw(1, batch, lstm.cell.hidden_size), draw(1, batch, lstm.cell.hidden_size)
    x, dy = draw(steps, batch, lstm.cell.input_size), draw(steps, batch, lstm.cell.hidden_size)
    h, _ = lstm.step(place(x[0]), state)
    y, last, tape = lstm.forward(x, state)
    grads = lstm.backward(tape, dy, state)
    return [h, y, *last, lstm(x, state)[0], grads.x, *grads.state, *grads.params.values()]


def compare():
    """Compare what is computed at the ends of pages with what is computed elsewhere; how many arrays were."""
    compared = 0
    for (steps, batch), (inputs, hidden), dtype in itertools.product(ROWS, SIZES, (np.float32, np.float64)):
        lstm = LSTM(inputs, hidden, dtype=dtype, seed=0)
        with use_backend("cpu"):
            expected = results(lstm, np.copy, steps, batch)
            lstm.params.update({name: at_the_end_of_a_page(value) for name, value in lstm.params.items()})
            found = results(lstm, at_the_end_of_a_page, steps, batch)
            frozen = lstm.freeze()
            found += results(frozen, at_the_end_of_a_page, steps, batch)
            expected += results(frozen, np.copy, steps, batch)
        for one, other in zip(found, expected, strict=True):
            assert np.array_equal(one, other)
            compared += 1
    return compared


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects a page as Linux does")
def test_nothing_beyond_the_end_of_an_array_is_read():
    if BackendUnderTest("cpu").missing:
        pytest.skip(str(BackendUnderTest("cpu").missing))
    path = os.pathsep.join(filter(None, [os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, __file__], env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr}"
    assert int(done.stdout) > 500


if __name__ == "__main__":
    sys.stdout.write(str(compare()))
