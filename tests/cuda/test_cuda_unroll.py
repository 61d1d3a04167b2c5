"""Closed loops on the CUDA backend: what a step launches, copies and allocates; devices and threads."""

from __future__ import annotations

import threading

import cuda_row
import numpy as np
import pytest
from host_cuda import FakeCupy, compiler
from tolerances import assert_close

from fastlstm import LSTM
from fastlstm.backends.cuda.unroll import Unrolled

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")

STEPS, BATCH, LAYERS = 6, 3, 2
VARIANTS = [{}, {"peephole": True}, {"coupled": True}, {"truncated": True}, {"dropout": 0.3}, {"block_size": 2}]


@pytest.fixture
def xp():
    """A new stand-in for CuPy with two devices."""
    library = FakeCupy(devices=2)
    with cuda_row.installed(library):
        yield library


def problem(xp, dtype, **options):
    lstm, rng = LSTM(4, 8, LAYERS, dtype=dtype, seed=0, **options).to(xp), np.random.default_rng(0)
    x, dy = (xp.asarray(rng.normal(size=(STEPS, BATCH, size)).astype(dtype)) for size in (4, 8))
    return lstm, x, dy


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_step_back_computes_no_gradients_by_weights(xp, options):
    lstm, x, dy = problem(xp, np.float32, **options)
    run, launched = lstm.unroll(steps=STEPS, batch=BATCH), xp.pool.launched
    xp.pool.copies.clear(), xp.pool.waits.clear()
    for x_t in x:
        launched.clear()
        run.step(x_t)
        assert launched == ["product", "product", "step_forward"] * LAYERS
    assert not xp.pool.copies and not xp.pool.waits, "no copy from the host, and nothing waits"
    back, of_state = run.backward(), [] if options.get("truncated") else ["product"]
    for d in dy[::-1]:
        launched.clear()
        back.step(d)
        assert launched == ["step_backward", *of_state, "product"] * LAYERS
    launched.clear()
    back.finish()
    sums = 1 + bool(options.get("peephole"))
    assert sorted(launched) == ["column_sum"] * sums * LAYERS + ["product"] * 2 * LAYERS


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_memory_for_all_steps_is_allocated_once(xp, options):
    lstm, x, dy = problem(xp, np.float32, **options)
    run = lstm.unroll(steps=STEPS, batch=BATCH)
    run.step(x[0])
    live = xp.pool.live
    for x_t in x[1:]:
        run.step(x_t)
        assert xp.pool.live == live
    back = run.backward()
    for d in dy[::-1]:
        back.step(d)
        assert xp.pool.live == live
    assert not xp.pool.overwritten


@pytest.mark.parametrize("options", [*VARIANTS, {"layer_norm": True, "zoneout": (0.1, 0.2)}], ids=str)
def test_a_run_goes_on_in_another_thread_and_while_another_device_is_current(xp, options):
    lstm, x, dy = problem(xp, np.float64, **options)
    y, _, tape = lstm.__class__._from(lstm.cell, lstm.params, False, lstm._dropout_key).forward(x)
    grads = lstm.backward(tape, dy)
    run, ys, dxs, found = lstm.unroll(steps=STEPS, batch=BATCH), [], [], []
    ys += [run.step(x_t) for x_t in x[:2]]
    with xp.cuda.Device(1):
        ys += [run.step(x_t) for x_t in x[2:]]
        back = run.backward()
        dxs.append(back.step(dy[-1]))

    def others():
        dxs.extend(back.step(d) for d in dy[-2::-1])
        found.append(back.finish())

    thread = threading.Thread(target=others)
    thread.start()
    thread.join()
    if run._unrolled.__class__ is Unrolled:
        assert run._unrolled._prepared[0] == thread.ident, "a product is for the thread that prepares it"
    assert all(value.device == x.device for value in (*ys, *dxs, *found[0].state, *found[0].params.values()))
    assert_close(
        "agreement",
        {"y": np.stack([a.get() for a in ys]), "dx": np.stack([a.get() for a in dxs[::-1]])}
        | {name: value.get() for name, value in found[0].params.items()},
        {"y": y.get(), "dx": grads.x.get()} | {name: value.get() for name, value in grads.params.items()},
        backend="cuda", dtype=np.float64,
    )  # fmt: skip


def test_gradients_can_be_asked_for_again(xp):
    lstm, x, dy = problem(xp, np.float32, peephole=True)
    run = lstm.unroll(steps=STEPS + 3, batch=BATCH)  # with room for more
    for x_t in x:
        run.step(x_t)
    back = run.backward()
    for d in dy[::-1]:
        back.step(d)
    first, second = back.finish(), back.finish()
    for name, value in first.params.items():
        assert not xp.shares_memory(value, second.params[name])
        np.testing.assert_array_equal(value.get(), second.params[name].get())
