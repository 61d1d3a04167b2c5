"""The real CuPy, as far as a machine without a device goes: its arrays, its errors, its compiler, and the stand-in."""

from __future__ import annotations

import ctypes
import types

import numpy as np
import pytest
from host_cuda import FakeCupy, compiler

import fastlstm
from fastlstm import LSTM, dispatch
from fastlstm.backends.cuda import CupyDevice
from fastlstm.backends.cuda.launch import FIELDS, step_records
from fastlstm.backends.ragged import Packing
from fastlstm.kernels.cuda import loader

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")


@pytest.fixture
def cupy():
    module = pytest.importorskip("cupy", reason="CuPy is not installed")
    if module.cuda.is_available():
        pytest.skip("there is a device: the whole suite runs on it")
    return module


@pytest.fixture
def real_array(cupy):
    """An array of CuPy's own type, over the host's memory: it can be asked everything but its contents."""
    memory = np.ones(24, np.float32)
    pointer = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(memory.ctypes.data, memory.nbytes, memory, 0), 0)
    return cupy.ndarray((2, 3, 4), np.float32, pointer)


def test_cupys_own_arrays_are_recognised(cupy, real_array, monkeypatch):
    monkeypatch.delitem(dispatch._loaded, "cuda", raising=False)
    assert dispatch.kind_of("x", real_array).library == "cupy"
    assert dispatch.array_namespace(real_array) is cupy
    with pytest.raises(fastlstm.BackendError, match=r"CuPy .* finds no CUDA device"):
        dispatch.backend_for(real_array)
    with pytest.raises(fastlstm.ArrayTypeError, match="x is a cupy array, but the parameters are numpy arrays"):
        LSTM(4, 3)(real_array)


def test_cupy_without_a_device_is_an_error_that_says_so(cupy, monkeypatch):
    monkeypatch.delitem(dispatch._loaded, "cuda", raising=False)
    for call in (CupyDevice, lambda: dispatch.backend_named("cuda"), lambda: LSTM(4, 3).to(cupy)):
        with pytest.raises(fastlstm.BackendError, match="finds no CUDA device"):
            call()


def test_the_stand_in_is_like_cupy(cupy, real_array):
    fake = FakeCupy()
    ours = fake.zeros((2, 3, 4), np.float32)
    for attribute in ("shape", "dtype", "ndim", "size", "nbytes", "strides", "itemsize"):
        assert getattr(ours, attribute) == getattr(real_array, attribute)
    assert type(ours).__name__ == type(real_array).__name__ and type(ours).__module__ == type(real_array).__module__
    assert repr(ours.device) == repr(real_array.device)
    for array in (ours, real_array):
        assert array[:, 1].strides == (48, 4) and array.reshape(-1, 4).shape == (6, 4)
        with pytest.raises(TypeError, match="Implicit conversion to a NumPy array is not allowed"):
            np.asarray(array)
    for operation in (np.add, lambda a, b: a + b):  # CuPy asks for a device first
        with pytest.raises(TypeError):
            operation(ours, np.ones(4, np.float32))
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError)
    assert issubclass(cupy.cuda.runtime.CUDARuntimeError, RuntimeError)


@pytest.mark.parametrize("private", [True, False], ids=["CPointer", "array of one element"])
def test_the_record_of_a_step_is_passed_by_value(cupy, private):
    from cupy.cuda import function

    packing = Packing.of(np.array([3, 0, 2]), 3, 3)
    records = step_records(packing, packing.step_rows(True), 8, 2, 1, keep_tape=True)
    library = cupy if private else types.SimpleNamespace(cuda=None)
    arguments = CupyDevice.by_value(types.SimpleNamespace(xp=library), records)
    assert len(arguments) == len(records) == 3
    for argument, numbers in zip(arguments, records.view(np.int64).tolist(), strict=True):
        # A launch takes the address of a CPointer as it is, and makes a CNumpyArray of an array of one element.
        assert isinstance(argument, function.CPointer) is private
        address = (argument if private else function.CNumpyArray(argument)).ptr
        assert list((ctypes.c_int64 * len(FIELDS)).from_address(address)) == numbers
    assert dict(zip(FIELDS, records.view(np.int64).T.tolist(), strict=True)) == {
        "first": [0, 2, 4], "c_from": [0, 3, 5], "c_to": [3, 5, 7], "h_to": [2, 4, 0], "rows": [2, 2, 1],
        "step": [0, 1, 2], "steps": [3] * 3, "batch": [3] * 3, "hidden": [8] * 3, "directions": [2] * 3,
        "direction": [1] * 3, "reverse": [1] * 3,
    }  # fmt: skip


@pytest.mark.parametrize("broken", [lambda address: types.SimpleNamespace(ptr=address + 1), lambda address: object()])
def test_a_cpointer_that_is_not_as_known_is_not_used(broken):
    records = np.zeros((2, 11), np.int64).view("V88")
    library = types.SimpleNamespace(cuda=types.SimpleNamespace(function=types.SimpleNamespace(CPointer=broken)))
    arguments = CupyDevice.by_value(types.SimpleNamespace(xp=library), records)
    assert [(type(a), a.shape, a.ctypes.data - records.ctypes.data) for a in arguments] == [
        (np.ndarray, (1,), 0), (np.ndarray, (1,), 88),
    ]  # fmt: skip


def test_a_cubin_of_cupys_own_compiler(cupy):
    # What CuPy makes of our source and options, without a device: its NVRTC takes them as they are.
    from cupy.cuda import compiler as of_cupy

    program = of_cupy._NVRTCProgram(loader.source(), method="cubin")
    options = (*loader.options(np.dtype("float32"), 4), "-ftz=true", "-arch=sm_90")
    assert program.compile(options)[0].startswith(b"\x7fELF")
