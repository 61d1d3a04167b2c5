"""What only a real device can show: streams, waiting, memory that is full, grids and indices beyond their first limit.

The tests of layout run on the stand-in, too. The others are skipped without a GPU; ``.ci/gpu`` runs them.
"""

from __future__ import annotations

import cuda_row
import numpy as np
import pytest
from harness import BackendUnderTest, Case, problem, results
from tolerances import assert_close, assert_identical, normalised_error

from fastlstm import LSTM, dispatch
from fastlstm.backends.cuda import plans
from fastlstm.functional import lstm_backward, lstm_forward

CUDA = BackendUnderTest("cuda")
GIB = 2**30

pytestmark = pytest.mark.skipif(bool(cuda_row.missing()), reason=str(cuda_row.missing()))
needs_gpu = pytest.mark.skipif(not cuda_row.on_gpu(), reason="there is no GPU")
one_process = pytest.mark.xdist_group("most of the GPU's memory")  # with pytest-xdist, one after the other


@pytest.fixture
def xp():
    with cuda_row.installed() as library:
        yield library


def free(xp, gibibytes):
    """Skip unless the device has so much memory left; give CuPy's unused blocks back first."""
    xp.get_default_memory_pool().free_all_blocks()
    if xp.cuda.Device().mem_info[0] < gibibytes * GIB:
        pytest.skip(f"less than {gibibytes} GiB of the GPU's memory is free")


def solve_with(p, to):
    """Forward and backward with arrays made by `to`; every result, on the host."""
    params = {name: to(value) for name, value in p.params.items()}
    y, (h_n, c_n), tape = lstm_forward(params, to(p.x), tuple(map(to, p.state)), p.lengths)
    return results(CUDA, y, h_n, c_n, lstm_backward(params, tape, to(p.dy), tuple(map(to, p.dstate))))


@pytest.mark.parametrize("hidden", [8, 9])
@pytest.mark.parametrize("lengths", [None, "zeros"])
def test_no_argument_has_to_be_aligned(xp, dtype, hidden, lengths):
    p = problem(Case(4, 5, 3, hidden, 2, True, lengths=lengths)).astype(dtype)

    def shifted(value):
        whole = xp.empty(value.size + 1, value.dtype)
        view = whole[1:].reshape(value.shape)
        view[...] = xp.array(value)
        assert view.data.ptr % 16 and view.flags.c_contiguous
        return view

    # cuBLAS may take another kernel for addresses that are no multiples of 16, with another order of summation.
    assert_close("alone", solve_with(p, shifted), solve_with(p, xp.array), backend="cuda", dtype=dtype)


# CUBLAS_POINTER_MODE_DEVICE, and CUBLAS_TF32_TENSOR_OP_MATH, for which CuPy has no name.
MODES = {"pointers on the device": ("PointerMode", 1), "TF32": ("MathMode", 3)}


@pytest.mark.parametrize("changed", MODES)
def test_modes_that_the_caller_set_on_the_cublas_handle_change_no_result_and_stay(xp, dtype, changed):
    p = problem(Case(6, 5, 3, 8, 2, True, lengths="zeros")).astype(dtype)
    expected = solve_with(p, xp.array)
    kind, value = MODES[changed]
    cublas, handle = xp.cuda.cublas, xp.cuda.device.get_cublas_handle()
    get, change = getattr(cublas, f"get{kind}"), getattr(cublas, f"set{kind}")
    before = get(handle)
    assert before != value
    change(handle, value)
    try:
        found = solve_with(p, xp.array)
        assert get(handle) == value
    finally:
        change(handle, before)
    assert_identical(found, expected)


def rows_of_a_large_batch(xp, steps, batch, hidden, ragged):
    """Solve a batch made on the device, and its last sequences alone; y, c_n and dx of these, both ways."""
    few = 40
    p = problem(Case(1, 1, 4, hidden, state=False)).astype(np.float32)
    params = {name: xp.array(value) for name, value in p.params.items()}
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, steps + 1, batch) if ragged else None
    x = xp.array(rng.random((steps, batch, 4), np.float32))
    found = []
    for part in (slice(0, batch), slice(batch - few, batch)):
        y, (_, c_n), tape = lstm_forward(params, x[:, part], None, None if lengths is None else lengths[part])
        dx = lstm_backward(params, tape, y).x
        found.append({"y": y[:, -few:].get(), "c_n": c_n[:, -few:].get(), "dx": dx[:, -few:].get()})
        del y, c_n, tape, dx
    return found


@pytest.mark.parametrize("ragged", [False, True])
def test_the_last_sequences_of_a_batch_are_what_they_are_alone(xp, ragged):
    whole, alone = rows_of_a_large_batch(xp, 3, 70, 8, ragged)
    assert_close("alone", whole, alone, backend="cuda", dtype=np.float32)


@needs_gpu
@one_process
@pytest.mark.parametrize("ragged", [False, True])
def test_more_rows_than_a_grid_has_blocks(xp, ragged):
    free(xp, 6)
    whole, alone = rows_of_a_large_batch(xp, 2, 270_000, 128, ragged)  # four rows a block, and 65,535 blocks
    assert_close("alone", whole, alone, backend="cuda", dtype=np.float32)


@needs_gpu
@one_process
@pytest.mark.parametrize("ragged", [False, True])
def test_indices_beyond_32_bits(xp, ragged):
    steps, batch, hidden = (66 if ragged else 33), 65_536, 256  # half of the steps are padding in a ragged batch
    assert steps * batch * 4 * hidden > 2**31
    free(xp, 50)
    whole, alone = rows_of_a_large_batch(xp, steps, batch, hidden, ragged)
    assert_close("alone", whole, alone, backend="cuda", dtype=np.float32)


@needs_gpu
def test_work_goes_to_the_current_stream(xp, dtype):
    p = problem(Case(20, 16, 8, 64, 2, True, lengths="zeros")).astype(dtype)
    expected = solve_with(p, xp.array)
    streams = [xp.cuda.Stream(non_blocking=True) for _ in range(3)]
    for stream in streams:
        with stream:
            for _ in range(3):
                assert_identical(solve_with(p, xp.array), expected)
        assert stream.done


@needs_gpu
def test_nothing_waits_for_the_device(xp, dtype):
    import cupyx

    p = problem(Case(12, 6, 4, 8, 2, True, lengths="zeros", dropout=0.3)).astype(dtype)
    params = {name: xp.array(value) for name, value in p.params.items()}
    x, dy, state = xp.array(p.x), xp.array(p.dy), tuple(map(xp.array, p.state))
    for _ in range(2):  # compiling is done in the first
        with cupyx.allow_synchronize(False):
            _, _, tape = lstm_forward(params, x, state, p.lengths, dropout=0.3)
            lstm_backward(params, tape, dy, state)
    with cupyx.allow_synchronize(False), pytest.raises(cupyx.DeviceSynchronized):
        x.get()  # it would have been noticed


@needs_gpu
def test_when_memory_runs_out_the_next_call_is_right(xp, dtype):
    p = problem(Case(30, 40, 8, 64, 2, True)).astype(dtype)
    expected = solve_with(p, xp.array)
    pool = xp.get_default_memory_pool()
    before = pool.used_bytes()
    failed = 0
    try:
        for share in range(1, 12):
            pool.free_all_blocks()
            pool.set_limit(size=pool.total_bytes() + share * 2**20)
            try:
                solve_with(p, xp.array)
            except MemoryError:
                failed += 1
            assert pool.used_bytes() == before
    finally:
        pool.set_limit(size=0)
    assert failed
    assert_identical(solve_with(p, xp.array), expected)


@needs_gpu
@pytest.mark.parametrize(("batch", "hidden"), [(5, 64), (70, 100), (7, 200), (9, 500), (3, 1000)])
def test_persistent_kernels_give_what_steps_give_and_always_the_same_bits(xp, monkeypatch, batch, hidden):
    p = problem(Case(12, batch, 8, hidden, 1, True, lengths="zeros", peephole=True)).astype(np.float32)
    found = {}
    for path in ("step", "persistent"):
        monkeypatch.setattr(plans, "FORCED", path)
        found[path] = solve_with(p, xp.array)
    assert not dispatch.backend_named("cuda").device.refusals
    # Sums over 1,000 units in another order, through 12 steps.
    assert all(normalised_error(value, found["step"][name]) < 1e-5 for name, value in found["persistent"].items())
    for _ in range(20):
        assert_identical(solve_with(p, xp.array), found["persistent"])


@needs_gpu
def test_a_graph_replays_a_step(xp, dtype):
    lstm = LSTM(16, 64, 2, dtype=dtype, seed=0).to(xp)
    rng = np.random.default_rng(0)
    first, second = (xp.array(rng.random((3, 16)).astype(dtype)) for _ in range(2))
    x, state = first.copy(), tuple(xp.array(rng.random((2, 3, 64)).astype(dtype)) for _ in range(2))
    expected = [lstm.step(value, state)[0].get() for value in (first, second)]
    with xp.cuda.Stream(non_blocking=True) as stream:
        for _ in range(2):  # what is compiled and allocated then is there
            lstm.step(x, state)
        stream.begin_capture()
        h, _ = lstm.step(x, state)
        graph = stream.end_capture()
        for value, right in zip((first, second), expected, strict=True):
            x[...] = value
            graph.launch()
            np.testing.assert_array_equal(h.get(), right)
