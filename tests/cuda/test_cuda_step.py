"""Streaming on the CUDA backend: one launch a layer, which a CUDA graph can capture; and the streams of all calls."""

from __future__ import annotations

import gc
import sys

import cuda_row
import numpy as np
import pytest
from cuda_run import RAGGED, WHOLE, Run, on_host
from harness import Case, problem
from host_cuda import FakeCupy, compiler
from tolerances import assert_close, assert_identical

from fastlstm import LSTM, RNN, BackendError, dispatch
from fastlstm.backends.cuda.backend import MOST_ROWS_OF_A_STEP

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")


@pytest.fixture
def xp():
    """A new stand-in for CuPy with two devices."""
    library = FakeCupy(devices=2)
    with cuda_row.installed(library):
        yield library


@pytest.mark.parametrize("given", [True, False], ids=["state", "no state"])
def test_a_call_of_step_is_one_launch_a_layer(xp, dtype, given):
    case = Case(1, 3, 4, 8, 3)
    run = Run(xp, case, dtype)
    state = run.state if given else None
    expected = run.lstm(run.x, state)[1]
    xp.pool.launched.clear(), xp.pool.own.clear()
    allocations = xp.pool.allocations
    h, found = run.lstm.step(run.x[0], state)
    assert xp.pool.launched == ["single_step"] * case.layers and xp.pool.own == []
    assert xp.pool.allocations - allocations == 3  # the output and the new states
    assert xp.pool.waits == []
    # Products summed in another order: by the kernel here, by cuBLAS there.
    assert_close("streaming", on_host(found), on_host(expected), backend="cuda", dtype=dtype)
    np.testing.assert_array_equal(h.get(), found[0][-1].get())
    kept = on_host(run.state)
    run.lstm.step(run.x[0], run.state)
    assert_identical(on_host(run.state), kept)


# What every cell has that the kernel runs: rows of all gates, of fewer, or of one for several units.
VARIANTS = [{"coupled": True}, {"forget_gate": False}, {"block_size": 4}, {"block_size": 2, "coupled": True},
            {"peephole": True, "coupled": True}, {"peephole": True, "forget_gate": False}, {"recurrent_dropout": 0.4},
            {"clip": 0.4, "cell_clip": 0.3, "activations": ("hard_sigmoid", "softsign", "relu")}]  # fmt: skip


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.sampled
def test_a_step_of_a_variant_is_one_launch_a_layer_too(xp, dtype, fields, bias):
    p = problem(Case(1, 3, 4, 8, 3, bias=bias, fields=tuple(fields.items()))).astype(dtype)
    lstm = LSTM(4, 8, 3, bias, dtype=dtype, **fields)
    lstm.params.update({name: xp.array(value) for name, value in p.params.items()})
    x, state = xp.array(p.x), tuple(map(xp.array, p.state))
    expected = lstm(x, state)[1]
    xp.pool.launched.clear(), xp.pool.own.clear()
    allocations = xp.pool.allocations
    found = lstm.step(x[0], state)[1]
    assert xp.pool.launched == ["single_step"] * 3 and xp.pool.own == []
    assert xp.pool.allocations - allocations == 3
    assert_close("streaming", on_host(found), on_host(expected), backend="cuda", dtype=dtype)


def test_a_step_of_many_sequences_takes_cublas_unless_it_is_captured(xp, dtype):
    batch = MOST_ROWS_OF_A_STEP + 1
    run = Run(xp, Case(1, batch, 4, 8, 2), dtype)
    expected = run.lstm(run.x, run.state)[1]
    xp.pool.launched.clear()
    h, found = run.lstm.step(run.x[0], run.state)
    assert xp.pool.launched == ["product", "product", "step_forward"] * 2
    assert_identical(on_host(found), on_host(expected))
    assert not xp.shares_memory(h, found[0])
    with xp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        captured = run.lstm.step(run.x[0], run.state)[1]
        assert [what for what in stream.end_capture() if what[0] == "launch"] == [("launch", "single_step")] * 2
    assert_close("streaming", on_host(captured), on_host(expected), backend="cuda", dtype=dtype)


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_a_step_can_be_captured_and_depends_on_no_other_sequence(xp, dtype, batch):
    """No cuBLAS, no copy from the host and no synchronisation: what a CUDA graph cannot hold."""
    run = Run(xp, Case(1, batch, 3, 9, 2), dtype)
    xp.pool.copies.clear(), xp.pool.waits.clear()
    with xp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        h, state = run.lstm.step(run.x[0], run.state)
        log = stream.end_capture()
    assert log == [("launch", "single_step")] * 2
    assert not xp.pool.copies and not xp.pool.waits
    last = slice(batch - 1, batch)
    alone, (h_n, c_n) = run.lstm.step(run.x[0][last], tuple(s[:, last] for s in run.state))
    for one, all_of_them in ((alone, h[last]), (h_n, state[0][:, last]), (c_n, state[1][:, last])):
        np.testing.assert_array_equal(one.get(), all_of_them.get())


PHASED = [{"proj_size": 3}, {"layer_norm": True}, {"zoneout": (0.2, 0.3)}, {"peephole": True, "block_size": 2}]


@pytest.mark.parametrize("fields", [*PHASED, {"nonlinearity": "relu"}], ids=str)
def test_a_step_with_cublas_refuses_a_capture_before_any_work(xp, fields):
    kind = RNN if "nonlinearity" in fields else LSTM
    named = "peephole with block_size" if "block_size" in fields else next(iter(fields))
    model = kind(3, 8, 2, seed=0, **fields).to(xp)
    x = xp.array(np.ones((4, 3), np.float32))
    xp.pool.launched.clear(), xp.pool.own.clear()
    with xp.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        with pytest.raises(BackendError, match=f"a CUDA graph cannot capture a step of a model with {named}"):
            model.step(x)
        assert stream.end_capture() == [] and xp.pool.launched == xp.pool.own == []
    model.step(x)


def test_a_whole_sequence_cannot_be_captured_and_says_so(xp):
    run = Run(xp, WHOLE)
    with xp.cuda.Stream(non_blocking=True) as stream, pytest.raises(NotImplementedError, match="cuBLAS"):
        stream.begin_capture()
        run.lstm(run.x)


@pytest.mark.parametrize("case", [RAGGED, WHOLE], ids=str)
def test_everything_goes_to_the_current_stream(xp, case):
    run = Run(xp, case)
    expected = on_host(run())
    streams = [xp.cuda.Stream(non_blocking=True) for _ in range(2)]
    for stream in streams:
        before = len(xp.pool.launched) + len(xp.pool.own)
        with stream:
            found = run()
        launched = [what for what in stream.log if what[0] == "launch"]
        assert len(launched) == len(xp.pool.launched) + len(xp.pool.own) - before > 0
        assert not [what for what in stream.log if what[0] == "synchronize"]
        assert_identical(on_host(found), expected)


def calls_of(function):
    """Return how many functions, of Python or C, a call calls: the least of three, without what is collected there."""
    counts = []

    def note(_frame, event, _argument):
        counts[-1] += event in ("call", "c_call")

    before = sys.getprofile()
    gc.collect()
    gc.disable()
    for _ in range(3):
        counts.append(0)
        sys.setprofile(note)
        try:
            function()
        finally:
            sys.setprofile(before)
    gc.enable()
    return min(counts)


@pytest.mark.parametrize("training", [False, True])
def test_the_host_does_little_for_a_step_of_a_sequence(xp, monkeypatch, training):
    """Five calls: the product, two modes of cuBLAS that it reads, cuBLAS itself, and the kernel.

    Counted without a GPU, Python's share is 0.9 of about 9 µs of host time; the two launches are the rest.
    """
    device = dispatch.backend_named("cuda").device
    monkeypatch.setattr(device, "kernel", lambda *_, **__: lambda *_: None)
    monkeypatch.setattr(device, "_gemm", {"float32": lambda *_: None})
    monkeypatch.setattr(device, "_modes", (lambda _: 0, lambda _: 0))
    monkeypatch.setattr(device, "_wanted", (0, 0))
    found = []
    for steps in (40, 50, 51, 70):  # the first call of a process fills the caches
        run = Run(xp, Case(steps, 2, 8, 8))
        call = lambda run=run: run.lstm(run.x, run.state)  # noqa: E731
        if training:
            _, _, tape = run.lstm.forward(run.x, run.state)
            call = lambda run=run, tape=tape: run.lstm.backward(tape, run.dy)  # noqa: E731
        call()
        found.append(calls_of(call))
    assert [count - found[1] for count in found[1:]] == [0, 5, 100]
