"""What CuPy's users share with other libraries: arrays without a copy, and one array for all gradients."""

from __future__ import annotations

import copy
import pickle

import cuda_row
import numpy as np
import pytest
from cuda_run import RAGGED, WHOLE, Run
from host_cuda import FakeCupy, compiler

import fastlstm
from fastlstm import LSTM
from fastlstm.backends.cuda.foreign import from_device_memory
from fastlstm.functional import lstm_backward, lstm_forward

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")


@pytest.fixture
def xp():
    with cuda_row.installed(FakeCupy(devices=2)) as library:
        yield library


class WithDLPack:
    """As a tensor of another library on a GPU."""

    def __init__(self, value, device=(2, 0), error=None):
        self.value, self.device, self.error = value, device, error

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **_):
        if self.error:
            raise self.error
        return self.value.__dlpack__()


class WithInterface:
    def __init__(self, value):
        self.__cuda_array_interface__ = value.__array_interface__


@pytest.mark.parametrize("kind", [WithDLPack, WithInterface])
def test_an_array_of_another_library_is_shared(xp, kind):
    memory = np.arange(12, dtype=np.float32).reshape(3, 4)
    found = from_device_memory(xp, kind(memory), xp.cuda.Device(0))
    assert type(found) is xp.ndarray and found.data.ptr == memory.ctypes.data and not xp.pool.copies
    memory[1, 1] = -1
    assert found.get()[1, 1] == -1
    lstm = LSTM(4, 3, seed=0).to(xp)
    np.testing.assert_array_equal(lstm(found)[0].get(), lstm(xp.array(memory))[0].get())
    assert from_device_memory(xp, found) is found


@pytest.mark.parametrize("kind", [WithDLPack, WithInterface])
def test_as_array_shares_and_no_other_call_does(xp, kind):
    """A call that took such an array might copy it, or read it before the other library has written it."""
    memory = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    given, lstm = kind(memory), LSTM(4, 3, seed=0).to(xp)
    found = fastlstm.as_array(given)
    assert type(found) is xp.ndarray and found.data.ptr == memory.ctypes.data
    expected = lstm(xp.array(memory))[0].get()
    xp.pool.copies.clear(), xp.pool.waits.clear()
    y, _ = lstm(found)
    assert not xp.pool.copies and not xp.pool.waits
    np.testing.assert_array_equal(y.get(), expected)
    _, _, tape = lstm.forward(found)
    state = tuple(xp.zeros((1, 3, 3), np.float32) for _ in range(2))
    foreign_state = (kind(np.zeros((1, 3, 3), np.float32)), state[1])
    xp.pool.launched.clear(), xp.pool.own.clear()
    for call in (
        lambda: lstm(given),
        lambda: lstm.forward(given),
        lambda: lstm(found, foreign_state),
        lambda: lstm.step(kind(memory[0])),
        lambda: lstm.backward(tape, kind(np.ones((2, 3, 3), np.float32))),
        lambda: lstm_forward(lstm.params | {"bias_l0": kind(np.ones(12, np.float32))}, found),
    ):
        with pytest.raises(fastlstm.ArrayTypeError):
            call()
    assert not xp.pool.launched and not xp.pool.own and not xp.pool.copies


def test_as_array_takes_memory_on_a_gpu_before_a_copy_on_the_host(xp):
    class WithBoth(WithInterface):
        def __array__(self, dtype=None, copy=None):
            raise AssertionError("a copy")

    memory = np.ones((2, 3), np.float32)
    assert fastlstm.as_array(WithBoth(memory)).data.ptr == memory.ctypes.data


def test_as_array_says_why_memory_on_a_gpu_cannot_be_shared(xp):
    memory = np.ones((2, 1, 4), np.float32)
    for error, message in (
        (RuntimeError("requires grad"), r"detach\(\) it first"),
        (BufferError("strides"), "strides"),
    ):
        with pytest.raises(fastlstm.ArrayTypeError, match=message):
            fastlstm.as_array(WithDLPack(memory, error=error))
    lstm = LSTM(4, 3, seed=0).to(xp)
    with pytest.raises(
        fastlstm.ArrayTypeError, match="x is on <CUDA Device 1>"
    ):  # no copy from one GPU to another, either
        lstm(fastlstm.as_array(WithDLPack(memory, (2, 1))))


def test_an_interface_that_has_to_be_copied_is_refused(xp, monkeypatch):
    original = type(xp).asarray
    monkeypatch.setattr(type(xp), "asarray", lambda self, value: original(self, value).copy())
    with pytest.raises(fastlstm.ArrayTypeError, match="without a copy"):
        fastlstm.as_array(WithInterface(np.ones((2, 3), np.float32)))


def test_what_cannot_be_shared_is_an_error_that_says_so(xp):
    memory = np.ones((3, 4), np.float32)
    for value, message in (
        (memory, r"x, a numpy.ndarray, is not in a GPU's memory \(DLPack's device type 1\): copy it"),
        (WithDLPack(memory, (2, 1)), r"x is on <CUDA Device 1>, but <CUDA Device 0> is asked for"),
        (WithDLPack(memory, error=BufferError("requires grad: use detach()")), r"through DLPack: requires grad"),
        ([1.0], r"x, a builtins.list, has neither __dlpack__ nor __cuda_array_interface__"),
    ):
        with pytest.raises(fastlstm.ArrayTypeError, match=message):
            from_device_memory(xp, value, xp.cuda.Device(0))


@pytest.mark.parametrize("case", [RAGGED, WHOLE], ids=str)
def test_all_gradients_are_views_of_one_array(xp, case):
    run = Run(xp, case)
    _, _, tape = run.lstm.forward(run.x, run.state, run.lengths)
    grads = run.lstm.backward(tape, run.dy)
    flat = grads.flat
    assert flat.shape == (sum(value.size for value in run.lstm.params.values()),) and flat.flags.c_contiguous
    assert list(grads.params) == list(run.lstm.params)
    np.testing.assert_array_equal(flat.get(), np.concatenate([value.get().ravel() for value in grads.params.values()]))
    flat *= 2.0  # as an all-reduce would, in place
    again = run.lstm.backward(tape, run.dy)
    for name, value in grads.params.items():
        assert value.shape == run.lstm.params[name].shape
        np.testing.assert_array_equal(value.get(), 2 * again.params[name].get())
    assert not xp.shares_memory(flat, again.flat)


def test_no_steps_make_gradients_of_zero_in_one_array(xp):
    lstm = LSTM(3, 4, seed=0).to(xp)
    _, _, tape = lstm_forward(lstm.params, xp.zeros((0, 2, 3), np.float32))
    grads = lstm_backward(lstm.params, tape, xp.zeros((0, 2, 4), np.float32))
    assert grads.flat.size == sum(value.size for value in lstm.params.values()) and not grads.flat.get().any()


def test_other_backends_have_no_such_array_and_copies_neither(xp):
    lstm = LSTM(3, 4, seed=0)
    y, _, tape = lstm.forward(np.ones((2, 1, 3), np.float32))
    assert lstm.backward(tape, y).flat is None
    there = lstm.to(xp)
    y, _, tape = there.forward(xp.array(np.ones((2, 1, 3), np.float32)))
    grads = there.backward(tape, y)
    for copied in (copy.copy(grads.params), copy.deepcopy(grads.params), pickle.loads(pickle.dumps(grads.params))):
        assert type(copied) is dict and copied.keys() == grads.params.keys()
