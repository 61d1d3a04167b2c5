"""What only the CUDA backend promises: nothing waits, nothing stays, the right device, errors that say what to do."""

from __future__ import annotations

import collections
import copy
import pickle
import subprocess
import sys

import cuda_row
import numpy as np
import pytest
from cuda_run import RAGGED, WHOLE, Run, on_host
from harness import Case
from host_cuda import FakeCupy, compiler
from tolerances import assert_identical

import fastlstm
from fastlstm import LSTM, dispatch
from fastlstm.backends import cuda
from fastlstm.backends.cuda import launch

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")


@pytest.fixture
def xp():
    """A new stand-in for CuPy with two devices."""
    library = FakeCupy(devices=2)
    with cuda_row.installed(library):
        yield library


@pytest.mark.parametrize("case", [RAGGED, WHOLE], ids=str)
def test_nothing_waits_and_nothing_comes_from_the_host_inside_the_loop(xp, case):
    counts = {}
    for steps in (6, 30):
        run = Run(xp, Case(**(vars(case) | {"steps": steps})))
        xp.pool.waits.clear(), xp.pool.copies.clear()
        run()
        assert xp.pool.waits == []
        counts[steps] = len(xp.pool.copies)
    assert counts[6] == counts[30] == (case.layers if case.lengths else 0)  # a ragged packing, once for each layer


@pytest.mark.parametrize("case", [RAGGED, WHOLE], ids=str)
def test_a_step_in_time_is_one_kernel_and_one_product(xp, case):
    counts = {}
    for steps in (6, 7):
        run = Run(xp, Case(**(vars(case) | {"steps": steps, "lengths": None})))
        xp.pool.launched.clear()
        run.lstm(run.x, run.state)
        forward, before = list(xp.pool.launched), xp.pool.allocations
        run()
        counts[steps] = (
            collections.Counter(forward),
            collections.Counter(xp.pool.launched),
            xp.pool.allocations - before,
        )
    cells = 2 * case.layers
    (short, short_training, few), (long, long_training, more) = counts[6], counts[7]
    assert long - short == {"step_forward": cells, "product": cells}
    assert long_training - short_training == {"step_forward": 2 * cells, "step_backward": cells, "product": 3 * cells}
    assert few == more  # nothing is allocated for a step


@pytest.mark.parametrize("given", [True, False], ids=["state", "no state"])
def test_cupy_itself_launches_little(xp, given):
    """Besides kernels and products: a fill for a state that is missing."""
    run = Run(xp, Case(1, 3, 4, 8, 3))
    state, fills = (run.state, []) if given else (None, ["zeros"])
    for call, own in (
        (lambda: run.lstm.step(run.x[0], state), []),
        (lambda: run.lstm(run.x, state), [*fills, "concatenate", "concatenate"]),  # the states of three layers
        (lambda: run.lstm.forward(run.x, state), [*fills, "concatenate", "concatenate"]),
    ):
        xp.pool.own.clear()
        call()
        assert xp.pool.own == own


@pytest.mark.parametrize("lengths", [None, (4, 1, 0)], ids=["equal lengths", "ragged"])
def test_states_are_sorted_only_in_a_ragged_batch(xp, lengths):
    run = Run(xp, Case(4, 3, 4, 8, 1, True, lengths=lengths))
    _, _, tape = run.lstm.forward(run.x, run.state, run.lengths)
    counts = {}
    for name, call in (
        ("inference", lambda: run.lstm(run.x, run.state, run.lengths)),
        ("forward", lambda: run.lstm.forward(run.x, run.state, run.lengths)),
        ("backward", lambda: run.lstm.backward(tape, run.dy, run.dstate)),
    ):
        xp.pool.launched.clear(), xp.pool.copies.clear()
        call()
        counts[name] = sum(launched in ("gather_rows", "scatter_rows") for launched in xp.pool.launched)
        assert len(xp.pool.copies) == (lengths is not None and name != "backward")  # of the packing
    # For h and c of both directions: into sorted rows, or onto the tape, and gradients back from sorted rows.
    ragged = {"inference": 4, "forward": 4, "backward": 8}
    assert counts == (ragged if lengths else {"inference": 0, "forward": 4, "backward": 0})


def test_a_prepared_product_holds_its_arrays(xp):
    left = np.arange(6, dtype=np.float32).reshape(2, 3)
    out = xp.empty((2, 2), np.float32)
    product = dispatch.backend_named("cuda").device.product(xp.array(left), xp.array(left), out, transpose_b=True)
    others = [xp.empty((2, 3), np.float32) for _ in range(50)]  # would lie where the arrays lay
    product()
    np.testing.assert_array_equal(out.get(), left @ left.T)
    product(1, 1, 0)
    np.testing.assert_array_equal(out.get()[0], (left @ left.T)[1])
    assert len(others) == 50


def test_a_product_that_fails_leaves_the_cublas_handle_as_it_was(xp):
    device = dispatch.backend_named("cuda").device
    handle, cublas = xp.cuda.device.get_cublas_handle(), xp.cuda.cublas
    cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_DEVICE)
    seen = []

    def fails(*arguments):
        seen.append((cublas.getPointerMode(handle), cublas.getMathMode(handle)))
        raise RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED")

    device._gemm["float32"] = fails
    square = xp.array(np.ones((2, 2), np.float32))
    with pytest.raises(RuntimeError, match="EXECUTION_FAILED"):
        device.product(square, square, square)()
    assert seen == [(cublas.CUBLAS_POINTER_MODE_HOST, cublas.CUBLAS_DEFAULT_MATH)]
    assert cublas.getPointerMode(handle) == cublas.CUBLAS_POINTER_MODE_DEVICE


@pytest.mark.parametrize("case", [RAGGED, WHOLE], ids=str)
def test_nothing_stays_allocated(xp, case):
    run = Run(xp, case)
    before = xp.pool.live
    for _ in range(3):
        run()
        assert xp.pool.live == before
    found = run()
    assert xp.pool.live >= before + sum(value.nbytes for value in found)  # the count is one of this memory
    del found
    assert xp.pool.live == before


@pytest.mark.parametrize("case", [RAGGED, WHOLE], ids=str)
def test_whichever_allocation_fails_the_next_call_is_right(xp, case):
    run = Run(xp, case)
    before, start = xp.pool.live, xp.pool.allocations
    expected = on_host(run())
    needed = xp.pool.allocations - start
    assert needed > 20
    for number in range(needed):
        xp.pool.fail_at = xp.pool.allocations + number
        with pytest.raises(MemoryError, match="Out of memory"):
            run()
        xp.pool.fail_at = None
        assert xp.pool.live == before, f"allocation {number} failed and left something behind"
        if number % 5 == 0:
            assert_identical(on_host(run()), expected)
    assert_identical(on_host(run()), expected)


def test_work_goes_to_the_device_of_the_arrays(xp):
    first = on_host(Run(xp, RAGGED)())
    with xp.cuda.Device(1):
        run = Run(xp, RAGGED)
    assert xp.cuda.Device().id == 0
    found = run()
    assert {value.device.id for value in found} == {1}
    assert xp.cuda.Device().id == 0
    assert_identical(on_host(found), first)


def test_another_device_and_another_library_are_refused(xp):
    run = Run(xp, WHOLE)
    with xp.cuda.Device(1):
        elsewhere = xp.array(run.x.get())
    with pytest.raises(fastlstm.ArrayTypeError, match=r"x is on <CUDA Device 1>, but .* <CUDA Device 0>"):
        run.lstm(elsewhere)
    with pytest.raises(fastlstm.ArrayTypeError, match="x is a numpy array, but the parameters are cupy arrays"):
        run.lstm(run.x.get())
    with pytest.raises(fastlstm.ArrayTypeError, match="x is a cupy array, but the parameters are numpy arrays"):
        run.lstm.to(np)(run.x)
    with pytest.raises(fastlstm.ArrayTypeError, match="h0 is a numpy array"):
        run.lstm(run.x, tuple(value.get() for value in run.state))
    with pytest.raises(fastlstm.DTypeError, match="x has dtype float64"):
        run.lstm(run.x.astype(np.float64))
    with pytest.raises(fastlstm.BackendError, match="cupy arrays run on cuda"), fastlstm.use_backend("reference"):
        run.lstm(run.x)


def test_models_move_and_copy(xp):
    host = LSTM(3, 5, 2, bidirectional=True, seed=0)
    there = host.to(xp)
    again, back = there.to(xp), there.to(np)
    for name, value in host.params.items():
        assert type(there.params[name]) is xp.ndarray and type(back.params[name]) is np.ndarray
        for other in (there.params[name].get(), again.params[name].get(), back.params[name]):
            np.testing.assert_array_equal(other, value)
        again.params[name][...] = 7
        assert (there.params[name].get() == value).all()
    for clone in (copy.deepcopy(there), pickle.loads(pickle.dumps(there.to(np))).to(xp)):
        x = xp.array(np.ones((4, 2, 3), np.float32))
        np.testing.assert_array_equal(clone(x)[0].get(), there(x)[0].get())
    with xp.cuda.Device(1):
        assert host.to(xp).params["bias_l0"].device.id == 1


def test_wide_and_narrow_loads_give_the_same_bits(xp, dtype):
    # A bias and a dy that do not lie at multiples of 16 bytes; everything else is the same.
    case = Case(5, 4, 3, 8, bidirectional=True)
    run = Run(xp, case, dtype)
    expected = on_host(run())
    shifted = xp.empty(run.dy.size + 1, dtype)[1:].reshape(run.dy.shape)
    shifted[...] = run.dy
    run.dy = shifted
    for name in ("bias_l0", "bias_l0_reverse"):
        moved = xp.empty(33, dtype)[1:]
        moved[...] = run.lstm.params[name]
        run.lstm.params[name] = moved
        assert moved.data.ptr % 16
    assert_identical(on_host(run()), expected)


@pytest.mark.parametrize("shifted", ["h0", "c0", "dy", "dh_n", "dc_n", "weight_peephole_l0", "bias_l0"])
def test_what_a_kernel_reads_wide_is_aligned(xp, monkeypatch, shifted):
    """Each array of the caller that is not at a multiple of 16 bytes makes the kernels that read it load narrowly."""
    lstm = LSTM(4, 8, peephole=True, seed=0).to(xp)
    rng = np.random.default_rng(0)
    given = {name: xp.array(rng.random((2, 3, 8), np.float32)[:rows]) for name, rows in
             (("h0", 1), ("c0", 1), ("dy", 2), ("dh_n", 1), ("dc_n", 1))}  # fmt: skip
    arrays = lstm.params if shifted in lstm.params else given
    whole = xp.empty(arrays[shifted].size + 1, np.float32)
    view = whole[1:].reshape(arrays[shifted].shape)
    view[...] = arrays[shifted]
    assert view.data.ptr % 16
    arrays[shifted] = view

    device, widths = dispatch.backend_named("cuda").device, {}

    def kernel(name, dtype, width=1, variant=(), compiled=device.kernel):
        widths.setdefault(call, {})[name] = width
        return compiled(name, dtype, width, variant)

    monkeypatch.setattr(device, "kernel", kernel)
    x, state = xp.array(rng.random((2, 3, 4), np.float32)), (given["h0"], given["c0"])
    call = "inference"
    lstm(x, state)
    call = "step"
    lstm.step(x[0], state)
    call = "training"
    _, _, tape = lstm.forward(x, state)
    lstm.backward(tape, given["dy"], (given["dh_n"], given["dc_n"]))
    parameter = shifted in lstm.params
    forward = 1 if parameter or shifted == "c0" else 4
    assert widths["inference"]["step_forward"] == forward
    assert widths["step"] == {"single_step": 1}
    # A tape has its own copy of c0. Only a product reads h0; the bias is part of the gates on the tape.
    assert widths["training"]["step_forward"] == (1 if parameter else 4)
    assert widths["training"]["step_backward"] == (4 if shifted in ("h0", "c0", "bias_l0") else 1)


@pytest.mark.parametrize("seed", range(3))
def test_any_schedule_gives_the_same_bits(dtype, seed):
    found = []
    for library in (FakeCupy(), FakeCupy(fibers=True, seed=1000 * (seed + 1))):
        with cuda_row.installed(library):
            found.append(on_host(Run(library, Case(4, 5, 3, 8, 1, True, lengths="zeros"), dtype)()))
    assert_identical(found[1], found[0])


@pytest.mark.parametrize("most", [1, 3])
def test_more_rows_than_a_grid_holds(xp, monkeypatch, most):
    expected = on_host(Run(xp, Case(9, 70, 5, 33, lengths="zeros"))())
    launch.geometry.cache_clear()
    monkeypatch.setattr(launch, "_MOST_BLOCKS", most)
    try:
        assert launch.geometry(70, 33)[0][1] == most
        found = on_host(Run(xp, Case(9, 70, 5, 33, lengths="zeros"))())
    finally:
        launch.geometry.cache_clear()
    assert_identical(found, expected)


def test_column_sum_over_many_slabs(xp, dtype):
    rng = np.random.default_rng(0)
    for rows, columns in [(0, 4), (1, 1), (256, 32), (257, 33), (256 * 256 + 1, 3), (1000, 100)]:
        values = rng.normal(size=(rows, columns)).astype(dtype)
        found = xp.empty(columns, dtype)
        launch.column_sum(dispatch.backend_named("cuda").device, xp.array(values), found)
        exact = values.sum(axis=0, dtype=np.float64)
        # Each sum is rounded about 32 + 3 times a slab and stage, however many rows there are.
        assert np.abs(found.get() - exact).max() <= 64 * np.finfo(dtype).eps * max(1, np.abs(values).sum(axis=0).max())
        assert found.shape == (columns,)


def test_missing_pieces_are_named(monkeypatch):
    monkeypatch.delitem(dispatch._loaded, "cuda", raising=False)
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it raises ImportError
    with pytest.raises(fastlstm.BackendError, match=r'needs CuPy.*pip install "fastlstm\[cuda13\]"'):
        dispatch.backend_named("cuda")
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy(devices=0))
    with pytest.raises(fastlstm.BackendError, match="finds no CUDA device"):
        dispatch.backend_named("cuda")
    library = FakeCupy()

    class Cuda:
        def __getattr__(self, name):
            if name == "cublas":
                raise ImportError("libcublas.so.13")
            return getattr(library.cuda, name)

    broken = FakeCupy()
    broken.cuda = Cuda()
    monkeypatch.setitem(sys.modules, "cupy", broken)
    with pytest.raises(fastlstm.BackendError, match=r"lacks libraries .*\(libcublas.*fastlstm\[cuda13\]"):
        dispatch.backend_named("cuda")
    assert "cuda" not in dispatch._loaded  # it is tried again
    with pytest.raises(AttributeError):
        _ = cuda.OTHER


def test_importing_the_backend_loads_neither_cupy_nor_numba():
    code = "import sys, fastlstm.backends.cuda; assert not {'numba', 'cupy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
