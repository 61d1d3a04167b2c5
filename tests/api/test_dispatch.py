"""Which backend runs: by the array's type, by ``use_backend``, by the environment; and what is loaded for it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
from harness import BackendUnderTest

import fastlstm
from fastlstm import LSTM, dispatch
from fastlstm.functional import lstm_forward

needs_cpu = pytest.mark.skipif(bool(BackendUnderTest("cpu").missing), reason=str(BackendUnderTest("cpu").missing))
X = np.ones((3, 2, 4), np.float32)


def backend_of_a_call():
    """Name of the backend that runs a NumPy array here and now."""
    return LSTM(4, 5, seed=0).forward(X)[2].backend


def test_each_backend_can_be_forced(backend):
    assert dispatch.backend_for(backend.array(X)).name == backend.name
    lstm = LSTM(4, 5, seed=0)
    lstm.params.update({name: backend.array(value) for name, value in lstm.params.items()})
    assert lstm.forward(backend.array(X))[2].backend == backend.name


@needs_cpu
def test_numpy_arrays_run_on_the_cpu_backend():
    assert backend_of_a_call() == "cpu"


@needs_cpu
def test_forcing_nests_and_ends():
    with fastlstm.use_backend("reference"):
        assert backend_of_a_call() == "reference"
        with fastlstm.use_backend("cpu"):
            assert backend_of_a_call() == "cpu"
        assert backend_of_a_call() == "reference"
        with pytest.raises(ZeroDivisionError), fastlstm.use_backend("cpu"):
            raise ZeroDivisionError
        assert backend_of_a_call() == "reference"
    assert backend_of_a_call() == "cpu"


@needs_cpu
def test_forcing_stays_in_its_thread():
    found, entered, done = {}, threading.Event(), threading.Event()

    def forced():
        with fastlstm.use_backend("reference"):
            entered.set()
            done.wait(timeout=60)
            found["thread"] = backend_of_a_call()

    thread = threading.Thread(target=forced, daemon=True)
    thread.start()
    assert entered.wait(timeout=60)
    found["here"] = backend_of_a_call()
    done.set()
    thread.join(timeout=60)
    assert found == {"thread": "reference", "here": "cpu"}


@needs_cpu
def test_forcing_stays_in_its_task():
    async def named(name):
        with fastlstm.use_backend(name):
            await asyncio.sleep(0)
            return backend_of_a_call()

    async def both():
        return await asyncio.gather(*(named(name) for name in ("reference", "cpu", "reference")))

    assert asyncio.run(both()) == ["reference", "cpu", "reference"]


@needs_cpu
def test_a_tape_goes_back_to_its_own_backend():
    lstm = LSTM(4, 5, seed=0)
    with fastlstm.use_backend("reference"):
        y, _, tape = lstm.forward(X)
        expected = lstm.backward(tape, y).x
    np.testing.assert_array_equal(lstm.backward(tape, y).x, expected)


@pytest.mark.parametrize("name", ["", "CPU", "gpu", "numpy", None, 3])
def test_unknown_backends_are_named(name):
    with pytest.raises(fastlstm.BackendError, match=r"choose one of cpu, cuda, reference"):
        fastlstm.use_backend(name).__enter__()


def test_a_backend_takes_its_own_arrays_only(monkeypatch):
    monkeypatch.setitem(dispatch._loaded, "cuda", object())
    with fastlstm.use_backend("cuda"), pytest.raises(fastlstm.BackendError, match="'cuda' was forced, but numpy"):
        LSTM(4, 5)(X)


CupyLike = type("ndarray", (), {"__module__": "cupy"})


def cupy_like(value, device="<CUDA Device 0>"):
    """Make what looks like a CuPy array to anyone who asks for its type, where there is no CuPy."""
    fake = CupyLike()
    fake.shape, fake.ndim, fake.dtype, fake.device = value.shape, value.ndim, value.dtype, device
    return fake


def test_numpy_and_cupy_do_not_mix():
    lstm = LSTM(4, 5)
    with pytest.raises(fastlstm.ArrayTypeError, match=r"x is a cupy array, but the par.* numpy arrays.*to\(cupy\)"):
        lstm(cupy_like(X))
    with pytest.raises(fastlstm.ArrayTypeError, match="h0 is a cupy array"):
        lstm(X, (cupy_like(np.zeros((1, 2, 5), np.float32)),) * 2)
    lstm.params.update({name: cupy_like(value) for name, value in lstm.params.items()})
    with pytest.raises(fastlstm.ArrayTypeError, match=r"x is a numpy array, but the par.* cupy arrays.*to\(numpy\)"):
        lstm(X)


def test_devices_do_not_mix():
    lstm = LSTM(4, 5)
    lstm.params.update({name: cupy_like(value) for name, value in lstm.params.items()})
    with pytest.raises(fastlstm.ArrayTypeError, match=r"x is on <CUDA Device 1>, but the parameters are on .* 0>"):
        lstm(cupy_like(X, "<CUDA Device 1>"))
    lstm.params["bias_l0"] = cupy_like(np.zeros(20, np.float32), "<CUDA Device 1>")
    with pytest.raises(
        fastlstm.ArrayTypeError, match=r"bias_l0 is on <CUDA Device 1>, but the parameters are on .* 0>"
    ):
        lstm(cupy_like(X))


def test_without_cupy_its_arrays_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it fails
    monkeypatch.delitem(dispatch._loaded, "cuda", raising=False)
    params = {name: cupy_like(value) for name, value in LSTM(4, 5).params.items()}
    with pytest.raises(fastlstm.BackendError, match=r"needs CuPy.*pip install"):
        lstm_forward(params, cupy_like(X))
    with pytest.raises(fastlstm.BackendError, match=r"needs CuPy.*pip install"):
        fastlstm.use_backend("cuda").__enter__()


def test_subclasses_of_arrays_are_arrays(backend):
    class Mine(np.ndarray):
        pass

    if not backend.is_numpy:
        pytest.skip("a NumPy array's subclass")
    lstm = LSTM(4, 5, seed=0)
    y, (h_n, c_n) = lstm(X.view(Mine))
    assert {type(value) for value in (y, h_n, c_n)} == {np.ndarray}
    np.testing.assert_array_equal(y, lstm(X)[0])


# In a process of its own.


def python(code, **environment):
    """Run code in a fresh interpreter; return what it prints."""
    clean = {name: value for name, value in os.environ.items() if name not in ("FASTLSTM_BACKEND", "NUMBA_DISABLE_JIT")}
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", code], env=clean | environment, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


RUN = """
import numpy as np, fastlstm
try:
    print(fastlstm.LSTM(4, 5, seed=0).forward(np.ones((3, 2, 4), np.float32))[2].backend)
except fastlstm.BackendError as error:
    print(error)
"""


@needs_cpu
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "cpu"),
        ({"FASTLSTM_BACKEND": "reference"}, "reference"),
        ({"FASTLSTM_BACKEND": "cpu"}, "cpu"),
        ({"FASTLSTM_BACKEND": ""}, "cpu"),
        ({"FASTLSTM_BACKEND": "cuda"}, "backend 'cuda' was forced, but numpy arrays run on cpu or reference"),
        ({"FASTLSTM_BACKEND": "gpu"}, "backend 'gpu' was forced, but numpy arrays run on cpu or reference"),
        ({"NUMBA_DISABLE_JIT": "1"}, "reference"),
        ({"NUMBA_DISABLE_JIT": "0"}, "cpu"),
    ],
    ids=str,
)
def test_the_environment_forces_a_backend(environment, expected):
    assert python(RUN, **environment) == expected


def test_importing_loads_no_backend():
    code = "import sys, fastlstm; print(*sorted({'numba', 'cupy', 'torch', 'onnx', 'matplotlib'} & set(sys.modules)))"
    assert python(code) == ""


def test_the_reference_needs_no_numba():
    code = RUN + "import sys; print('numba' in sys.modules)"
    assert python(code, FASTLSTM_BACKEND="reference").split() == ["reference", "False"]


def test_a_call_that_interrupts_the_import_of_its_backend_gets_a_typed_error(monkeypatch):
    """Such as one in a signal handler: the module is there, but not yet what it defines."""
    monkeypatch.delitem(dispatch._loaded, "reference", raising=False)
    monkeypatch.setitem(sys.modules, "fastlstm.backends.reference", types.ModuleType("fastlstm.backends.reference"))
    with pytest.raises(fastlstm.BackendError, match="make a call before"):
        dispatch.backend_named("reference")
