"""A tape can be pickled and copied: its backward pass is that of the original, in another process, too."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from harness import BackendUnderTest
from own_process import run_script
from unroll_tools import model_of
from variants import DETERMINISTIC, RANDOM_HERE

from fastlstm import LSTM

# Few rows, many, with each sequence's own length, and without the gates.
CALLS = [(4, 2, {}), (60, 40, {}), (60, 40, {"lengths": np.arange(1, 41)}), (60, 40, {"recompute": True})]
WHOLE = [("both directions", {"bidirectional": True}), ("dropout", {"dropout": 0.3})]

READ = """
import pickle, sys
import numpy as np

memory = [np.zeros(1 << n, np.int8) for n in range(4, 20)]  # the addresses are others in each process
for number in range(int(sys.argv[2])):
    with open(f"{sys.argv[1]}/{number}", "rb") as file:
        name, lstm, tape, dy, dx = pickle.load(file)
    print(name, flush=True)  # which one it was, if it crashes
    np.testing.assert_array_equal(lstm.backward(tape, dy).x, dx)
"""


def problem(options, steps, batch, given):
    lstm, rng = LSTM(3, 6, 2, seed=0, **options), np.random.default_rng(0)
    y, _, tape = lstm.forward(rng.normal(size=(steps, batch, 3)).astype(np.float32), **given)
    return lstm, tape, y, lstm.backward(tape, y).x


def test_tapes_are_read_by_another_process(tmp_path):
    if missing := BackendUnderTest("cpu").missing:
        pytest.skip(str(missing))
    count = 0
    for variant, options in DETERMINISTIC + RANDOM_HERE + WHOLE:
        for steps, batch, given in CALLS:
            name = f"{variant}, T={steps}, {', '.join(given)}"
            (tmp_path / str(count)).write_bytes(pickle.dumps((name, *problem(options, steps, batch, given))))
            count += 1
    run_script(READ, tmp_path, count, prelude="", timeout=300)


@pytest.mark.parametrize("options", [{}, {"peephole": True}, {"layer_norm": True}, {"bidirectional": True}], ids=str)
def test_a_copied_tape_gives_the_gradients_of_the_original(backend, options):
    if not backend.is_numpy:
        pytest.skip("a tape of CuPy arrays refers to kernels on its device, which cannot be copied")
    lstm = model_of(backend, np.float32, 3, 6, 2, **options)
    x = backend.array(np.random.default_rng(0).normal(size=(4, 2, 3)).astype(np.float32))
    y, _, tape = lstm.forward(x)
    copied, expected = copy.deepcopy(tape), lstm.backward(tape, y)
    x[...] = 7  # the original refers to it
    found = lstm.backward(copied, y)
    for name, gradient in (found.params | {"x": found.x}).items():
        of_original = expected.x if name == "x" else expected.params[name]
        np.testing.assert_array_equal(backend.host(gradient), backend.host(of_original))


OTHER_VECTORS = """
import pickle, sys
import pytest
from fastlstm import ArgumentError

for name in ("plain", "layer_norm"):
    with open(sys.argv[1] + "/" + name, "rb") as file, pytest.raises(ArgumentError, match="vectors of 16 bytes"):
        pickle.load(file)
"""

WRITE = """
import os, pickle, sys
os.environ["FASTLSTM_VECTOR_BYTES"] = "16"
import numpy as np
from fastlstm import LSTM

for name, options in (("plain", {}), ("layer_norm", {"layer_norm": True})):
    lstm = LSTM(3, 6, seed=0, **options)
    with open(sys.argv[1] + "/" + name, "wb") as file:
        pickle.dump(lstm.forward(np.ones((4, 2, 3), np.float32))[2], file)
"""


@pytest.mark.slow
def test_a_tape_of_other_vectors_is_refused(tmp_path):
    run_script(WRITE, tmp_path, prelude="", timeout=300)
    run_script("import os\nos.environ['FASTLSTM_VECTOR_BYTES'] = '32'\n" + OTHER_VECTORS, tmp_path, prelude="")
