"""Callers of compiled steps: cached on disk by Numba, and in C."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys

import numpy as np
import pytest
from harness import BackendUnderTest
from tolerances import assert_identical

from fastlstm import DTypeError

if BackendUnderTest("cpu").missing:
    pytest.skip(str(BackendUnderTest("cpu").missing), allow_module_level=True)

import numba
from kernel_process import copy_package, start, variables
from loop_tools import arrays, model_of
from numba import carray, types
from numba.extending import intrinsic

from fastlstm import compiled

# --- the caller's cache ----------------------------------------------------------------------------------------------

CALLER = """
import json
import numpy as np
from numba import njit
import fastlstm
from fastlstm import compiled

@njit(cache=True)
def loop(kit, x, h, c, y, h_next, c_next):
    compiled.step(kit, x, h, c, y, h_next, c_next)
    compiled.step(kit, x, h_next, c_next, y, h, c)

@njit(cache=True)
def train(kit, tape, x, y, dx, gradients):
    compiled.step_taped(kit, tape, 0, x, y)
    compiled.step_back(kit, tape, 0, y, dx)
    compiled.finish(kit, tape, gradients)

lstm = fastlstm.LSTM(3, 4, seed=0)
kit, frozen = lstm.compiled(), lstm.freeze()
x, y = np.ones((1, 3), np.float32), np.empty((1, 4), np.float32)
h, c, h_next, c_next = np.zeros((4, 1, 1, 4), np.float32)
loop(kit, x, h, c, y, h_next, c_next)
tape, dx, gradients = kit.tape(1, 1), np.empty((1, 3), np.float32), kit.gradients()
_, state = frozen.step(x)
expected, _ = frozen.step(x, state)
result = {"same": bool((y == expected).all()), "y": y.tobytes().hex()}
train(kit, tape, x, y, dx, gradients)
for name, function in (("loop", loop), ("train", train)):
    stats = function.stats
    result[name] = [sum(stats.cache_hits.values()), sum(stats.cache_misses.values())]
result["sum"] = float(gradients.sum())
result["stamp"] = type(kit).__name__
print(json.dumps(result))
"""


@pytest.mark.slow
def test_a_cached_caller_notices_another_fastlstm(tmp_path):
    kernels = copy_package(tmp_path / "package")
    script, cache = tmp_path / "caller.py", tmp_path / "cache"
    script.write_text(CALLER)

    def call():
        done = subprocess.run(
            [sys.executable, str(script)], env=variables(tmp_path / "package", cache), cwd=tmp_path,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    first, second = call(), call()
    assert first["same"] and first["loop"] == first["train"] == [0, 1]
    assert second == first | {"loop": [1, 0], "train": [1, 0]}, "the caller was cached"
    source = kernels / "cell_step.py"
    text = source.read_text()
    assert "return held * tanh(c)" in text
    source.write_text(text.replace("return held * tanh(c)", "return held * tanh(c + c)"))
    third = call()
    assert third["same"] and third["loop"] == third["train"] == [0, 1], "the caller was compiled anew"
    assert third["y"] != first["y"] and third["stamp"] != first["stamp"]
    source.write_text(text)
    fourth = call()
    assert fourth == second, "what was cached for the version before is still right"


def test_sources_that_cannot_be_read_are_no_version(tmp_path):
    copy_package(tmp_path / "package")
    code = """
import json
from fastlstm.kernels.cpu import kernel_cache
kernel_cache.SOURCES = None
from fastlstm.backends.cpu import kit
print(json.dumps({"stamp": kit.STAMP}))
"""
    stamps = {start(tmp_path / "package", tmp_path / "cache", code)[0]["stamp"] for _ in range(2)}
    assert len(stamps) == 2


def test_importing_the_package_does_not_load_numba(tmp_path):
    code = "import sys, fastlstm; assert 'numba' not in sys.modules; fastlstm.compiled; assert 'numba' in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], timeout=120, check=True)


# --- C ---------------------------------------------------------------------------------------------------------------


def addresses(*given):
    return [array.ctypes.data for array in given]


@pytest.mark.parametrize("layers", [1, 2])
def test_the_step_is_a_c_function(dtype, layers):
    lstm = model_of(dtype, 3, 20, layers)
    x, h, c, y, h_next, c_next = arrays(lstm, 2)
    kit, pointer = lstm.compiled(), ctypes.POINTER(np.ctypeslib.as_ctypes_type(dtype))
    prototype = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_int64), ctypes.c_int64, *[pointer] * 6)
    function = prototype(compiled.c_step(dtype).address)
    pointers = [array.ctypes.data_as(pointer) for array in (x, h, c, y, h_next, c_next)]
    function(kit.record.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)), 2, *pointers)
    expected, state = lstm.freeze().step(x, (h, c))
    assert_identical({"y": y, "h": h_next, "c": c_next}, {"y": expected, "h": state[0], "c": state[1]})
    y[...] = 0
    compiled.c_step(dtype).ctypes(kit.record.ctypes.data, 2, *addresses(x, h, c, y, h_next, c_next))
    np.testing.assert_array_equal(y, expected)


def test_a_c_function_of_another_dtype_is_refused():
    for dtype in (np.float16, np.int64, "foo", None, int, [1]):
        with pytest.raises(DTypeError, match="dtype must be float32 or float64"):
            compiled.c_step(dtype)


@intrinsic
def address_of(typingctx, pointer):
    def codegen(context, builder, signature, args):
        return builder.ptrtoint(args[0], context.get_value_type(types.int64))

    return types.int64(pointer), codegen


@intrinsic
def pointer_to(typingctx, number):
    kind = types.CPointer(types.float64)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.int64), codegen


def test_scipy_calls_a_step_through_a_low_level_callable():
    scipy = pytest.importorskip("scipy", reason="SciPy is not installed")
    integrate = pytest.importorskip("scipy.integrate")
    lstm = model_of(np.float64, 1, 6)
    x, h, c, y, h_next, c_next = arrays(lstm, 1)
    kit, c_step = lstm.compiled(), compiled.c_step(np.float64).ctypes
    words = np.array(addresses(kit.record, x, h, c, y, h_next, c_next), np.int64)

    @numba.cfunc("float64(intc, CPointer(float64), voidptr)")
    def output(count, values, user):
        """The first hidden unit after a step, as a function of the input."""
        found = carray(user, 7, np.int64)
        c_step(found[0], 1, address_of(values), found[2], found[3], found[4], found[5], found[6])
        return carray(pointer_to(found[4]), 1)[0]

    integrand = scipy.LowLevelCallable(output.ctypes, words.ctypes.data_as(ctypes.c_void_p))
    found, _ = integrate.quad(integrand, -1.0, 1.0)
    frozen = lstm.freeze()
    expected, _ = integrate.quad(lambda value: float(frozen.step(np.array([[value]]), (h, c))[0][0, 0]), -1.0, 1.0)
    assert found == expected and abs(found) > 1e-3
