"""``fastlstm.compiled``: a step, and training, inside the caller's own compiled code."""

from __future__ import annotations

import copy
import ctypes
import json
import pickle
import resource
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from harness import BackendUnderTest
from tolerances import assert_identical
from variants import DETERMINISTIC

import fastlstm
from fastlstm import LSTM, ArgumentError, BackendError, DTypeError, ShapeError

if BackendUnderTest("cpu").missing:
    pytest.skip(str(BackendUnderTest("cpu").missing), allow_module_level=True)

import numba
from kernel_process import copy_package, start, variables
from numba import carray, njit, prange, types
from numba.core.runtime import _nrt_python, rtsys
from numba.extending import intrinsic

from fastlstm import compiled
from fastlstm.backends.cpu import kit
from fastlstm.backends.cpu.unroll import can_unroll


@njit(nogil=True)
def closed_loop(kit, x, h, c, y, h_next, c_next, steps):
    """The next input is the first part of the last output."""
    for _ in range(steps):
        compiled.step(kit, x, h, c, y, h_next, c_next)
        h, h_next = h_next, h
        c, c_next = c_next, c
        for b in range(x.shape[0]):
            for k in range(x.shape[1]):
                x[b, k] = y[b, k]


@njit
def one_simulation(kit, x, y, steps):
    shape = (kit.layers, x.shape[0], kit.hidden)
    h, c = np.zeros(shape, x.dtype), np.zeros(shape, x.dtype)
    h_next, c_next = np.empty(shape, x.dtype), np.empty(shape, x.dtype)
    closed_loop(kit, x.copy(), h, c, y, h_next, c_next, steps)


@njit(parallel=True)
def simulate_at_once(kit, x, outputs, steps):
    for n in prange(x.shape[0]):
        one_simulation(kit, x[n], outputs[n], steps)


@njit
def forth_and_back(kit, tape, x, dy, y, dx, dh, dc, gradients):
    for t in range(len(x)):
        compiled.step_taped(kit, tape, t, x[t], y[t])
    tape.dh[:], tape.dc[:] = dh, dc
    for t in range(len(x) - 1, -1, -1):
        compiled.step_back(kit, tape, t, dy[t], dx[t])
    compiled.finish(kit, tape, gradients)


def model_of(dtype, inputs, hidden, layers=1, **options):
    """A model whose biases and peepholes are drawn, too."""
    lstm, rng = LSTM(inputs, hidden, layers, dtype=dtype, seed=0, **options), np.random.default_rng(1)
    for value in lstm.params.values():
        value[...] = rng.uniform(-0.5, 0.5, value.shape)
    return lstm


def arrays(lstm, batch, seed=0):
    """x, h, c, y, h_next and c_next of a step."""
    cell, rng = lstm.cell, np.random.default_rng(seed)
    shapes = (batch, cell.input_size), *[(cell.num_layers, batch, cell.hidden_size)] * 2
    x, h, c = (rng.uniform(-1, 1, shape).astype(cell.dtype) for shape in shapes)
    return x, h, c, np.empty((batch, cell.hidden_size), cell.dtype), np.empty_like(h), np.empty_like(c)


STEP_VARIANTS = [
    pytest.param(options, id=name) for name, options in DETERMINISTIC if can_unroll(LSTM(3, 6, seed=0, **options).cell)
]
OTHER_VARIANTS = [
    pytest.param(options, id=name)
    for name, options in DETERMINISTIC
    if not can_unroll(LSTM(3, 6, seed=0, **options).cell)
]


@pytest.mark.parametrize("options", STEP_VARIANTS)
@pytest.mark.parametrize("sizes", [(1, 3, 20, 1), (3, 10, 33, 2), (70, 4, 9, 3), (2, 130, 130, 1)], ids=str)
def test_steps_are_bit_identical_to_a_frozen_model_s(dtype, sizes, options):
    batch, inputs, hidden, layers = sizes
    lstm = model_of(dtype, inputs, hidden, layers, **options)
    x, h, c, y, h_next, c_next = arrays(lstm, batch)
    frozen, kit = lstm.freeze(), lstm.compiled()
    (of_frozen, (h_frozen, c_frozen)), given = frozen.step(x, (h, c)), (x.copy(), h.copy(), c.copy())
    compiled.step(kit, x, h, c, y, h_next, c_next)
    found = {"y": y, "h": h_next, "c": c_next}
    assert_identical(found, {"y": of_frozen, "h": h_frozen, "c": c_frozen})
    assert_identical(dict(zip("xhc", (x, h, c), strict=True)), dict(zip("xhc", given, strict=True)))


@pytest.mark.parametrize("layers", [1, 2])
def test_a_closed_loop_is_bit_identical_to_one_in_python(dtype, layers):
    lstm = model_of(dtype, 3, 20, layers)
    x, h, c, y, h_next, c_next = arrays(lstm, 2)
    frozen, x_t, state = lstm.freeze(), x.copy(), (h.copy(), c.copy())
    for _ in range(20):
        expected, state = frozen.step(x_t, state)
        x_t = np.ascontiguousarray(expected[:, :3])
    closed_loop(lstm.compiled(), x, h, c, y, h_next, c_next, 20)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(h, state[0])
    np.testing.assert_array_equal(c, state[1])


def test_the_new_cell_state_may_take_the_place_of_the_old(dtype):
    lstm = model_of(dtype, 3, 20, 2)
    x, h, c, y, h_next, c_next = arrays(lstm, 2)
    kit = lstm.compiled()
    compiled.step(kit, x, h, c, y, h_next, c_next)
    compiled.step(kit, x, h, c, y, h_next, c)
    np.testing.assert_array_equal(c, c_next)


def test_iterations_of_prange_run_simulations_of_their_own(dtype):
    lstm = model_of(dtype, 3, 20, 2)
    x = np.random.default_rng(5).uniform(-1, 1, (16, 2, 3)).astype(dtype)
    found, expected, kit = np.empty((16, 2, 20), dtype), np.empty((16, 2, 20), dtype), lstm.compiled()
    simulate_at_once(kit, x, found, 30)
    for n in range(16):
        one_simulation(kit, x[n], expected[n], 30)
    np.testing.assert_array_equal(found, expected)
    assert len({row.tobytes() for row in found}) == 16


@pytest.mark.parametrize("options", STEP_VARIANTS)
@pytest.mark.parametrize("sizes", [(5, 1, 3, 20, 1), (7, 3, 10, 33, 3), (300, 3, 2, 5, 1)], ids=str)
def test_training_is_bit_identical_to_a_run_in_python(dtype, sizes, options):
    fastlstm.set_num_threads(1)
    try:
        steps, batch, inputs, hidden, layers = sizes
        lstm, rng = model_of(dtype, inputs, hidden, layers, **options), np.random.default_rng(2)
        draw = lambda *shape: rng.uniform(-1, 1, shape).astype(dtype)  # noqa: E731
        x, dy = draw(steps, batch, inputs), draw(steps, batch, hidden)
        h, c, dh, dc = draw(4, layers, batch, hidden)
        kit = lstm.compiled()
        tape, gradients = kit.tape(steps + 2, batch), kit.gradients()
        y, dx = np.empty_like(dy), np.empty_like(x)
        run = lstm.unroll((h, c), steps=steps, batch=batch)
        expected = {"y": np.stack([run.step(x_t) for x_t in x])}
        back = run.backward((dh, dc))
        expected["dx"] = np.stack([back.step(d) for d in dy[::-1]])[::-1]
        grads = back.finish()
        expected |= {"dh": grads.state[0], "dc": grads.state[1], **grads.params}
        for _ in range(2):  # a tape serves many runs
            tape.h[:, 0], tape.c[:, 0] = h, c
            forth_and_back(kit, tape, x, dy, y, dx, dh, dc, gradients)
            found = {"y": y, "dx": dx, "dh": tape.dh, "dc": tape.dc, **kit.named(gradients)}
            assert_identical(found, expected)
            np.testing.assert_array_equal(tape.h[:, steps], run.state[0])
            np.testing.assert_array_equal(tape.c[:, steps], run.state[1])
    finally:
        fastlstm.set_num_threads(None)


def test_gradients_by_the_last_state_count_once(dtype):
    lstm = model_of(dtype, 3, 6)
    kit = lstm.compiled()
    tape, gradients = kit.tape(2, 1), kit.gradients()
    x, dy = np.ones((2, 1, 3), dtype), np.ones((2, 1, 6), dtype)
    y, dx, zero = np.empty_like(dy), np.empty_like(x), np.zeros((1, 1, 6), dtype)
    forth_and_back(kit, tape, x, dy, y, dx, zero, zero, gradients)
    first = gradients.copy()
    forth_and_back(kit, tape, x, dy, y, dx, zero + 1, zero, gradients)
    assert (gradients != first).any()
    forth_and_back(kit, tape, x, dy, y, dx, zero, zero, gradients)
    np.testing.assert_array_equal(gradients, first)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OTHER_VARIANTS)
def test_a_cell_without_a_compiled_step_is_refused(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        LSTM(3, 6, seed=0, **options).compiled()


def test_a_bidirectional_model_is_refused():
    with pytest.raises(ArgumentError, match="bidirectional"):
        LSTM(3, 6, bidirectional=True, seed=0).compiled()


def test_dropout_is_refused_for_training_alone():
    lstm = model_of(np.float32, 3, 6, 2, dropout=0.5)
    x, h, c, y, h_next, c_next = arrays(lstm, 2)
    kit = lstm.compiled()
    compiled.step(kit, x, h, c, y, h_next, c_next)
    np.testing.assert_array_equal(y, lstm.freeze().step(x, (h, c))[0])
    with pytest.raises(ArgumentError, match="dropout"):
        kit.tape(3, 2)


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("axis", [0, 1])
def test_each_wrong_shape_raises(number, axis):
    lstm = model_of(np.float32, 3, 6, 2)
    given, kit = list(arrays(lstm, 2)), lstm.compiled()
    wrong = list(given[number].shape)
    wrong[axis] += 1
    given[number] = np.zeros(wrong, np.float32)
    for array in given[3:]:
        array[...] = 7
    with pytest.raises(ShapeError):
        compiled.step(kit, *given)
    assert all((array == 7).all() for array in given[3:] if array is not given[number]), "nothing is written"
    with pytest.raises(ShapeError):
        closed_loop(kit, *given, 1)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({0: np.float64}, "x"), ({3: np.float64}, "y"), ({4: "strided"}, "h_next"), ({1: "read-only"}, None),
        ({5: "read-only"}, "c_next"), ({2: "flat"}, "c"),
    ],
    ids=str,
)  # fmt: skip
def test_odd_arrays_are_refused_when_the_caller_is_compiled(change, what):
    lstm = model_of(np.float32, 3, 6)
    given, kit = list(arrays(lstm, 2)), lstm.compiled()
    for number, how in change.items():
        if how == "strided":
            given[number] = np.zeros((1, 2, 12), np.float32)[..., ::2]
        elif how == "flat":
            given[number] = given[number].ravel()
        elif how == "read-only":
            given[number].flags.writeable = False
        else:
            given[number] = given[number].astype(how)
    if what is None:
        compiled.step(kit, *given)
        return
    with pytest.raises(numba.TypingError, match=f"{what} must be a C-contiguous"):
        compiled.step(kit, *given)


def test_what_is_no_kit_is_refused():
    given = arrays(LSTM(3, 6, seed=0), 2)
    with pytest.raises(numba.TypingError, match=r"takes a kit, from lstm.compiled\(\)"):
        compiled.step((1, 2), *given)


OVERLAPS = [("h_next", "h"), ("h_next", "x"), ("h_next", "c"), ("y", "x"), ("y", "h"), ("y", "c"), ("c_next", "h"),
            ("c_next", "x"), ("c_next", "h_next"), ("c_next", "y")]  # fmt: skip


@pytest.mark.parametrize(("written", "read"), OVERLAPS)
def test_outputs_that_overlap_what_is_read_are_refused(written, read):
    lstm = model_of(np.float32, 6, 6)
    names = ["x", "h", "c", "y", "h_next", "c_next"]
    given = dict(zip(names, arrays(lstm, 2), strict=True))
    memory = np.zeros(23, np.float32)  # the arrays have 12 elements each, and share one
    given[written] = memory[:12].reshape(given[written].shape)
    given[read] = memory[11:].reshape(given[read].shape)
    with pytest.raises(ArgumentError, match="overlap"):
        compiled.step(lstm.compiled(), **given)
    given[read] = np.zeros_like(given[read])
    compiled.step(lstm.compiled(), **given)


def test_steps_out_of_turn_are_refused():
    lstm = model_of(np.float32, 3, 6)
    kit = lstm.compiled()
    tape, gradients = kit.tape(2, 1), kit.gradients()
    x, y, dx = np.ones((1, 3), np.float32), np.ones((1, 6), np.float32), np.empty((1, 3), np.float32)
    with pytest.raises(ArgumentError, match="t must be 0"):
        compiled.step_taped(kit, tape, 1, x, y)
    with pytest.raises(ArgumentError, match="last step"):
        compiled.step_back(kit, tape, 0, y, dx)
    compiled.step_taped(kit, tape, 0, x, y)
    compiled.step_taped(kit, tape, 1, x, y)
    with pytest.raises(ArgumentError, match="no room"):
        compiled.step_taped(kit, tape, 2, x, y)
    with pytest.raises(ArgumentError, match="t must be 0"):
        compiled.step_taped(kit, tape, -1, x, y)
    for wrong in (0, 2, -1):
        with pytest.raises(ArgumentError, match="last step"):
            compiled.step_back(kit, tape, wrong, y, dx)
    with pytest.raises(ArgumentError, match="not all steps"):
        compiled.finish(kit, tape, gradients)
    compiled.step_back(kit, tape, 1, y, dx)
    with pytest.raises(ArgumentError, match="t must be 0"):
        compiled.step_taped(kit, tape, 2, x, y)
    with pytest.raises(ArgumentError, match="not all steps"):
        compiled.finish(kit, tape, gradients)
    compiled.step_back(kit, tape, 0, y, dx)
    compiled.finish(kit, tape, gradients)
    with pytest.raises(ArgumentError, match="last step"):
        compiled.step_back(kit, tape, 1, y, dx)
    compiled.step_taped(kit, tape, 0, x, y)  # a new run
    with pytest.raises(ArgumentError, match="not all steps"):
        compiled.finish(kit, tape, gradients)


def test_wrong_shapes_in_training_raise():
    lstm = model_of(np.float32, 3, 6)
    kit = lstm.compiled()
    tape = kit.tape(2, 2)
    x, y, dx = np.ones((2, 3), np.float32), np.ones((2, 6), np.float32), np.empty((2, 3), np.float32)
    for wrong in (x[:1], np.ones((2, 4), np.float32)):
        with pytest.raises(ShapeError, match="x must"):
            compiled.step_taped(kit, tape, 0, wrong, y)
        with pytest.raises(ShapeError, match="y must"):
            compiled.step_taped(kit, tape, 0, x, wrong)
    compiled.step_taped(kit, tape, 0, x, y)
    for wrong in (y[:1], np.ones((2, 4), np.float32)):
        with pytest.raises(ShapeError, match="dh must"):
            compiled.step_back(kit, tape, 0, wrong, dx)
        with pytest.raises(ShapeError, match="dx must"):
            compiled.step_back(kit, tape, 0, y, wrong)
    compiled.step_back(kit, tape, 0, y, dx)
    with pytest.raises(ShapeError, match="each parameter"):
        compiled.finish(kit, tape, kit.gradients()[1:])
    for sizes in ((4, 6), (3, 7), (3, 6, 2)):
        other = LSTM(*sizes, seed=0).compiled()
        with pytest.raises(ArgumentError, match="another kit's"):
            compiled.finish(other, tape, other.gradients())


def test_odd_sizes_of_a_tape_are_refused():
    kit = model_of(np.float32, 3, 6).compiled()
    for sizes in ((0, 1), (1, 0), (1.5, 2), (True, 2), (None, 1)):
        with pytest.raises(ArgumentError, match="must be an integer"):
            kit.tape(*sizes)


def test_a_kit_stays_in_its_process():
    kit = model_of(np.float32, 3, 6).compiled()
    for each in (kit, kit.tape(2, 1)):
        with pytest.raises(ArgumentError, match="belongs to the process"):
            pickle.dumps(each)
        assert copy.copy(each) is copy.deepcopy(each) is each


def test_a_module_of_that_name_has_no_other_attributes():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = kit.nonsense
    with pytest.raises(AttributeError, match="nonsense"):
        _ = fastlstm.nonsense


# --- what a step does not do ----------------------------------------------------------------------------------------


@njit
def allocate(times):
    total = 0.0
    for n in range(times):
        total += np.full(n + 3, 1.0)[n]
    return total


def test_nothing_is_allocated_in_a_step():
    lstm = model_of(np.float32, 3, 20, 2)
    kit = lstm.compiled()
    tape, gradients = kit.tape(50, 2), kit.gradients()
    given = arrays(lstm, 2)
    x, dy = np.ones((50, 2, 3), np.float32), np.ones((50, 2, 20), np.float32)
    y, dx, zero = np.empty_like(dy), np.empty_like(x), np.zeros((2, 2, 20), np.float32)
    counts, with_others = [], []
    was_counting = _nrt_python.memsys_stats_enabled()
    _nrt_python.memsys_enable_stats()
    try:
        for steps in (1, 50):  # the arguments of a call from Python take some, whatever the steps
            before = rtsys.get_allocation_stats().alloc
            closed_loop(kit, *given, steps)
            forth_and_back(kit, tape, x[:steps], dy[:steps], y[:steps], dx[:steps], zero, zero, gradients)
            counts.append(rtsys.get_allocation_stats().alloc - before)
            allocate(steps)
            with_others.append(rtsys.get_allocation_stats().alloc - before)
    finally:
        if not was_counting:
            _nrt_python.memsys_disable_stats()
    assert counts[0] == counts[1] and with_others[1] == with_others[0] + 49, (counts, with_others)


def test_a_million_steps_take_no_more_memory():
    lstm = model_of(np.float32, 1, 4, 2)
    kit, given = lstm.compiled(), arrays(lstm, 1)
    tape, x, y = kit.tape(10, 1), given[0], given[3]
    closed_loop(kit, *given, 1000)
    run_windows(kit, tape, x, y, np.empty_like(x), kit.gradients(), 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    closed_loop(kit, *given, 1_000_000)
    run_windows(kit, tape, x, y, np.empty_like(x), kit.gradients(), 20_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2048  # kilobytes


@njit
def run_windows(kit, tape, x, y, dx, gradients, windows):
    for _ in range(windows):
        for t in range(tape.steps):
            compiled.step_taped(kit, tape, t, x, y)
        for t in range(tape.steps - 1, -1, -1):
            compiled.step_back(kit, tape, t, y, dx)
        compiled.finish(kit, tape, gradients)
        tape.h[:, 0], tape.c[:, 0] = tape.h[:, tape.steps], tape.c[:, tape.steps]


def test_the_interpreter_is_free_meanwhile():
    lstm = model_of(np.float32, 3, 20)
    kit, given = lstm.compiled(), arrays(lstm, 2)
    closed_loop(kit, *given, 1)
    thread = threading.Thread(target=closed_loop, args=(kit, *given, 3_000_000))
    thread.start()
    turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 20


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
    for dtype in (np.float16, np.int64):
        with pytest.raises(DTypeError):
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


def test_a_model_on_another_library_is_refused(backend):
    if backend.is_numpy:
        pytest.skip("a model of NumPy arrays")
    lstm = model_of(np.float32, 3, 6)
    lstm.params.update({name: backend.array(value) for name, value in lstm.params.items()})
    with pytest.raises((fastlstm.ArrayTypeError, BackendError)):
        lstm.compiled()
