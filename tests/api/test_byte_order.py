"""An array of any byte order, alignment, layout or class gives the bits of a plain one, whatever Numba has seen before.

Numba remembers the type of an unaligned array by its number of axes, contiguity and kind of dtype, and from then on
takes a byte-swapped array for a plain one. One unaligned array is enough, in whichever function of whichever package,
for the rest of the process: so each test is a process of its own.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import warnings

import layouts
import numpy as np
import pytest
from harness import BackendUnderTest

from fastlstm import LSTM, use_backend
from fastlstm.functional import lstm_backward, lstm_forward

PARAMS = ("weight_ih_l0", "weight_hh_l0", "bias_l0")
STATES = ("h0", "c0", "dh_n", "dc_n")
NAMES = ("x", "dy", *STATES, *PARAMS)
# T, B, I, H: run by the kernels for small batches, and by those for large ones on packed and on unpacked weights.
SIZES = [(1, 2, 3, 4), (2, 2, 3, 4), (30, 12, 5, 20), (20, 1, 5, 20)]


class Subclass(np.ndarray):
    """A subclass of ndarray of which nothing is known."""


def _of_class(a):
    return a.copy().view(Subclass)


LAYOUTS = {name: make for name, (make, _) in layouts.LAYOUTS.items() if name not in ("broadcast", "overlapping")}
LAYOUTS |= {
    "foreign and unaligned": lambda a: layouts.unaligned(layouts.foreign(a)),
    "foreign and read-only": lambda a: layouts.read_only(layouts.foreign(a)),
    "foreign and reversed": lambda a: layouts.negative(layouts.foreign(a)),
    "foreign and in Fortran order": lambda a: layouts.fortran(layouts.foreign(a)),
    "a foreign subclass": lambda a: _of_class(layouts.foreign(a)),
    "a subclass": _of_class,
}


def arguments(size, dtype):
    """Every array that enters a call of a model of one layer."""
    steps, batch, inputs, hidden = size
    rng = np.random.default_rng(size)
    state = (1, batch, hidden)
    sizes = [(steps, batch, inputs), (steps, batch, hidden), *[state] * 4]
    sizes += [(4 * hidden, inputs), (4 * hidden, hidden), (4 * hidden,)]
    scale = {"weight_hh_l0": hidden**-0.5, "weight_ih_l0": inputs**-0.5}
    return {name: (scale.get(name, 1.0) * rng.normal(size=shape)).astype(dtype)
            for name, shape in zip(NAMES, sizes, strict=True)}  # fmt: skip


def _named(y, state, grads=None):
    found = {"y": y, "h_n": state[0], "c_n": state[1]}
    if grads is not None:
        found |= {"dx": grads.x, "dh0": grads.state[0], "dc0": grads.state[1]} | grads.params
    return found


def _model(a):
    """A model with these parameters, some of which may be odd."""
    lstm = LSTM(a["weight_ih_l0"].shape[1], a["weight_hh_l0"].shape[1], dtype=a["x"].dtype.newbyteorder("="))
    lstm.params = {name: a[name] for name in PARAMS}
    return lstm


def _inference(a, lstm):
    state = a["h0"], a["c0"]
    return _named(*lstm(a["x"], state)) | {f"{name} from zeros": v for name, v in _named(*lstm(a["x"])).items()}


def _step(a, lstm):
    return _named(*lstm.step(a["x"][0], (a["h0"], a["c0"])))


def _training(a, lstm):
    y, state, tape = lstm.forward(a["x"], (a["h0"], a["c0"]))
    short, whole = lstm.backward(tape, a["dy"]), lstm.backward(tape, a["dy"], (a["dh_n"], a["dc_n"]))
    return _named(y, state, short) | {f"{name} with dstate": v for name, v in _named(y, state, whole).items()}


def _functions(a, _):
    params = {name: a[name] for name in PARAMS}
    y, state, tape = lstm_forward(params, a["x"], (a["h0"], a["c0"]))
    return _named(y, state, lstm_backward(params, tape, a["dy"]))


CALLS = {
    "inference": lambda a: _inference(a, _model(a)),
    "step": lambda a: _step(a, _model(a)),
    "training": lambda a: _training(a, _model(a)),
    "functions": lambda a: _functions(a, None),
    "frozen inference": lambda a: [_inference(a, frozen) for frozen in [_model(a).freeze()] for _ in range(2)][1],
    "frozen step": lambda a: [_step(a, frozen) for frozen in [_model(a).freeze()] for _ in range(2)][1],
    "frozen training": lambda a: _training(a, _model(a).freeze()),
}


def prime_by_calls(dtype):
    """Show Numba unaligned arrays by calls of the library."""
    for size, call in itertools.product(SIZES, CALLS.values()):
        plain = arguments(size, dtype)
        for name in NAMES:
            call(plain | {name: layouts.unaligned(plain[name])})


def prime_by_a_function_of_the_user(dtype):
    """Show Numba unaligned arrays by a function that has nothing to do with the library."""
    from numba import njit

    @njit
    def ndim(array):
        return array.ndim

    for axes in (1, 2, 3, 4):
        array = layouts.unaligned(np.ones((2, 3, 4, 5)[:axes], dtype))
        for given in (array, array.T, array[..., ::-1], array[..., ::2]):
            ndim(given)
        array.flags.writeable = False
        ndim(array)


PRIMES = {"calls": prime_by_calls, "a user's function": prime_by_a_function_of_the_user}


def compare(prime, dtype):
    """Return what differs from the results of plain arrays, and how many results were compared."""
    wrong, compared = [], 0
    with use_backend("cpu"):
        expected = {(size, name): call(arguments(size, dtype)) for size in SIZES for name, call in CALLS.items()}
        PRIMES[prime](dtype)
        for size, (layout, make), name in itertools.product(SIZES, LAYOUTS.items(), NAMES):
            plain = arguments(size, dtype)
            given = plain | {name: make(plain[name])}
            before = layouts.snapshot(given[name])
            for call, run in CALLS.items():
                found, right = run(given), expected[size, call]
                assert found.keys() == right.keys()
                for result, value in found.items():
                    compared += 1
                    same = type(value) is np.ndarray and value.dtype == dtype
                    if not same or value.tobytes() != right[result].tobytes():
                        wrong.append(f"{size}: {layout} {name}: {call}: {result}")
            if layouts.snapshot(given[name]) != before:
                wrong.append(f"{size}: {layout} {name} was changed")
    return wrong, compared


@pytest.mark.parametrize("prime", PRIMES)
def test_an_array_of_any_kind_gives_the_bits_of_a_plain_one(dtype, prime):
    if BackendUnderTest("cpu").missing:
        pytest.skip(BackendUnderTest("cpu").missing)
    path = os.pathsep.join(filter(None, [os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, __file__, prime, dtype.name], env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert int(done.stdout) > 10_000


if __name__ == "__main__":
    warnings.simplefilter("error")
    differences, count = compare(sys.argv[1], np.dtype(sys.argv[2]))
    if differences:
        some = differences[:: 1 + len(differences) // 25]
        sys.exit("\n".join([f"{len(differences)} of {count} results differ, such as", *some]))
    sys.stdout.write(str(count))
