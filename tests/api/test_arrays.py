"""as_array: arrays of other libraries by one explicit call, without a copy where the owner allows it."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import fastlstm
from fastlstm import LSTM, ArrayTypeError, BackendError, DTypeError, as_array


class OnDevice:
    """Speaks DLPack for a device that is not here."""

    def __init__(self, device):
        self.device = device

    def __dlpack_device__(self):
        return (self.device, 0)

    def __dlpack__(self, **_):
        raise AssertionError("nothing is to be exported")


def test_numpy_arrays_are_returned_as_they_are():
    x = np.ones((2, 3), ">f4")[:, ::2]
    assert as_array(x) is x
    with pytest.raises(ArrayTypeError, match="mask"):
        as_array(np.ma.ones(3))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_tensors_of_torch_share_their_memory(dtype):
    torch = pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")
    tensor = torch.arange(24).reshape(2, 3, 4).to(getattr(torch, np.dtype(dtype).name))
    for view in (tensor, tensor.transpose(0, 2), tensor[:, ::2]):
        array = as_array(view)
        assert type(array) is np.ndarray and array.dtype == dtype and array.shape == tuple(view.shape)
        np.testing.assert_array_equal(array, view.numpy())
        assert array.__array_interface__["data"][0] == view.data_ptr()
    as_array(tensor)[0, 0, 0] = 7
    assert tensor[0, 0, 0] == 7


def test_tensors_that_cannot_be_shared_are_refused():
    torch = pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")
    with pytest.raises(ArrayTypeError, match=r"detach\(\)"):
        as_array(torch.ones(3, requires_grad=True))
    for tensor in (torch.ones(3, dtype=torch.bfloat16), torch.ones(3, 3).to_sparse()):
        with pytest.raises(ArrayTypeError, match="cannot be shared"):
            as_array(tensor)
    with pytest.raises(ArrayTypeError, match="meta"):
        as_array(torch.ones(3, device="meta"))


def test_tables_of_pandas():
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    values = np.arange(6.0).reshape(3, 2)
    frame = pandas.DataFrame(values, columns=["a", "b"])
    np.testing.assert_array_equal(as_array(frame), values)
    np.testing.assert_array_equal(as_array(frame["b"]), values[:, 1])
    with pytest.raises(DTypeError, match="object"):
        as_array(pandas.DataFrame({"a": [1.0], "b": ["x"]}))


@pytest.mark.parametrize("device", [4, 8, 12, 14])
def test_other_devices_are_refused_and_nothing_is_moved(device):
    with pytest.raises(ArrayTypeError, match="move it first"):
        as_array(OnDevice(device))


def test_arrays_on_a_gpu_take_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BackendError, match="fastlstm\\[cuda12\\]"):
        as_array(OnDevice(2))


def test_arrays_on_a_gpu_become_cupy_arrays(monkeypatch):
    class CuPy:
        ndarray = type("ndarray", (), {})
        from_dlpack = staticmethod(lambda value: ("cupy", value))

    monkeypatch.setitem(sys.modules, "cupy", CuPy)
    given = OnDevice(2)
    assert as_array(given) == ("cupy", given)


@pytest.mark.parametrize("value", [None, 3.0, "text", [1.0, 2.0], {"a": 1}, range(3)], ids=str)
def test_what_is_no_array_is_refused(value):
    with pytest.raises(ArrayTypeError, match=r"neither __dlpack__ nor __array__"):
        as_array(value)


class Broken:
    """An array of code that fails."""

    def __init__(self, error):
        self.error = error

    def __array__(self, dtype=None, copy=None):
        raise self.error


class BrokenExport(Broken):
    def __dlpack_device__(self):
        return (1, 0)

    def __dlpack__(self, **_):
        raise self.error


class BrokenDevice(BrokenExport):
    def __dlpack_device__(self):
        raise self.error


@pytest.mark.parametrize("kind", [Broken, BrokenExport, BrokenDevice])
@pytest.mark.parametrize("error", [TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError, OSError])
def test_an_object_that_breaks_is_refused(kind, error):
    with pytest.raises(ArrayTypeError, match="not today"):
        as_array(kind(error("not today")))


@pytest.mark.parametrize("kind", [Broken, BrokenExport, BrokenDevice])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_errors_that_are_not_about_the_object_pass_through(kind, error):
    with pytest.raises(error):
        as_array(kind(error()))


def test_nothing_is_converted_without_the_call():
    """The calls themselves take no foreign arrays: a copy would be silent."""
    torch = pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")
    lstm = fastlstm.LSTM(3, 4, seed=0)
    with pytest.raises(ArrayTypeError):
        lstm(torch.ones(5, 2, 3))
    y, _ = lstm(as_array(torch.ones(5, 2, 3)))
    assert y.shape == (5, 2, 4)


@pytest.mark.parametrize("library", ["torch", "pandas", "jax.numpy", "xarray"])
def test_calls_name_as_array_for_arrays_of_other_libraries(library):
    module = pytest.importorskip(library, reason=f"{library} is not installed")
    make = {"torch": "from_numpy", "pandas": "DataFrame", "jax.numpy": "asarray", "xarray": "DataArray"}[library]
    given = getattr(module, make)(np.ones((4, 3), np.float32))
    lstm = LSTM(3, 2, seed=0)
    for call in (lambda: lstm(given), lambda: lstm(np.ones((4, 1, 3), np.float32), (given, given))):
        with pytest.raises(ArrayTypeError, match=r"fastlstm\.as_array\((x|h0|it)\)"):
            call()
    lstm.step(np.ascontiguousarray(as_array(given)))


def test_calls_name_numpy_for_what_is_no_array():
    with pytest.raises(ArrayTypeError, match=r"numpy\.asarray\(x, dtype="):
        LSTM(3, 2, seed=0)([[[1.0, 2.0, 3.0]]])
