"""``fastlstm.compiled``: a step, and training, inside the caller's own compiled code."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from harness import BackendUnderTest
from tolerances import assert_identical

import fastlstm

if BackendUnderTest("cpu").missing:
    pytest.skip(str(BackendUnderTest("cpu").missing), allow_module_level=True)

from loop_tools import (
    STEP_VARIANTS,
    arrays,
    closed_loop,
    forth_and_back,
    model_of,
    one_simulation,
    simulate_at_once,
    train_at_once,
)
from numba.typed import List

from fastlstm import compiled


@pytest.mark.parametrize("options", STEP_VARIANTS)
@pytest.mark.parametrize("sizes", [(1, 3, 20, 1), (3, 10, 33, 2), (70, 4, 9, 3), (2, 130, 130, 1)], ids=str)
@pytest.mark.sampled
def test_steps_are_bit_identical_to_a_frozen_model_s(dtype, sizes, options):
    batch, inputs, hidden, layers = sizes
    hidden += hidden % options.get("block_size", 1)
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


# Numba warns that lists of Python will go, and of the index that it makes itself for a typed one.
@pytest.mark.filterwarnings("ignore::numba.core.errors.NumbaPendingDeprecationWarning")
@pytest.mark.filterwarnings("ignore::numba.core.errors.NumbaTypeSafetyWarning")
@pytest.mark.parametrize("list_of", [list, List], ids=["list", "typed list"])
@pytest.mark.slow
def test_iterations_of_prange_train_on_tapes_of_their_own(list_of):
    dtype = np.float32
    lstm, rng = model_of(dtype, 3, 20, 2), np.random.default_rng(5)
    kit, zero = lstm.compiled(), np.zeros((2, 2, 20), dtype)
    x, dy = (rng.uniform(-1, 1, (16, 7, 2, size)).astype(dtype) for size in (3, 20))
    found, expected = (
        {"y": np.empty_like(dy), "dx": np.empty_like(x), "gradients": np.empty((16, kit.parameters), dtype)}
        for _ in range(2)
    )
    tapes = list_of([kit.tape(7, 2) for _ in range(16)])
    for _ in range(2):  # a tape serves many runs
        train_at_once(kit, tapes, x, dy, found["y"], found["dx"], zero, found["gradients"])
    tape = kit.tape(7, 2)
    for n in range(16):
        here = [expected[name][n] for name in ("y", "dx")]
        forth_and_back(kit, tape, x[n], dy[n], *here, zero, zero, expected["gradients"][n])
    assert_identical(found, expected)
    assert len({row.tobytes() for row in found["gradients"]}) == 16


def test_an_error_under_prange_is_the_cause_of_a_system_error():
    kit, y = model_of(np.float32, 3, 20).compiled(), np.empty((4, 2, 20), np.float32)
    with pytest.raises(SystemError) as caught:
        simulate_at_once(kit, np.ones((4, 2, 5), np.float32), y, 3)
    assert isinstance(caught.value.__cause__, fastlstm.ShapeError)


@pytest.mark.parametrize("options", STEP_VARIANTS)
@pytest.mark.parametrize("sizes", [(5, 1, 3, 20, 1), (7, 3, 10, 33, 3), (300, 3, 2, 5, 1)], ids=str)
@pytest.mark.sampled
def test_training_is_bit_identical_to_a_run_in_python(dtype, sizes, options):
    fastlstm.set_num_threads(1)
    try:
        steps, batch, inputs, hidden, layers = sizes
        hidden += hidden % options.get("block_size", 1)
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


def test_dropout_draws_the_masks_of_a_run_in_python(dtype):
    lstm, rng = model_of(dtype, 3, 20, 3, dropout=0.4), np.random.default_rng(2)
    x, dy = (rng.uniform(-1, 1, (5, 4, size)).astype(dtype) for size in (3, 20))
    of_python, kit = copy.copy(lstm), lstm.compiled()  # a copy draws the same masks
    tape, gradients, zero = kit.tape(5, 4), kit.gradients(), np.zeros((3, 4, 20), dtype)
    y, dx, outputs = np.empty_like(dy), np.empty_like(x), []
    for _ in range(2):
        kit.draw(tape)
        forth_and_back(kit, tape, x, dy, y, dx, zero, zero, gradients)
        run = of_python.unroll(steps=5, batch=4)
        expected = {"y": np.stack([run.step(x_t) for x_t in x])}
        back = run.backward()
        expected["dx"] = np.stack([back.step(d) for d in dy[::-1]])[::-1]
        expected |= back.finish().params
        assert_identical({"y": y, "dx": dx, **kit.named(gradients)}, expected)
        outputs.append(y.copy())
    assert (outputs[0] != outputs[1]).any(), "each run draws its own"


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
