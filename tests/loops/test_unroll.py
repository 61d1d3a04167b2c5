"""``LSTM.unroll``: the steps of a closed loop give what one call for the whole sequence gives, forward and back."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from harness import BackendUnderTest
from tolerances import assert_close, assert_identical, normalised_error
from unroll_tools import at_once, by_steps, given, model_of, named
from variants import DETERMINISTIC, RANDOM_HERE, test_every_variant_has_an_example  # noqa: F401

from fastlstm import unroll
from fastlstm.training import SGD, clip_by_global_norm, join

NEEDS_CPU = pytest.mark.skipif(bool(BackendUnderTest("cpu").missing), reason=str(BackendUnderTest("cpu").missing))

# T, B, I, H, L: of one row and several, one vector of units and several, more than 64 rows, and more than one slice of
# the weights' rows; the last has more rows than the weights' gradients take at a time.
SIZES = [(5, 3, 4, 6, 1), (6, 1, 3, 40, 3), (3, 70, 9, 34, 2), (3, 2, 150, 8, 2), (300, 2, 1, 4, 1)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("variant", "options"), DETERMINISTIC, ids=lambda value: value if type(value) is str else "")
@pytest.mark.sampled
def test_steps_give_what_one_call_gives(backend, dtype, sizes, variant, options):
    steps, batch, inputs, hidden, layers = sizes
    if backend.is_slow and steps * layers > 50:
        steps = 50
    lstm = model_of(backend, dtype, inputs, hidden, layers, **options)
    problem = given(lstm, backend, steps, batch)
    found, expected = by_steps(lstm, backend, *problem), at_once(lstm, backend, *problem)
    assert found.keys() == expected.keys()
    assert list(found)[6:] == [f"d{name}" for name in lstm.params]
    assert_close("agreement", found, expected, backend=backend.name, dtype=dtype)


@pytest.mark.parametrize("bias", [False, True])
def test_nothing_given_counts_as_zero(backend, dtype, bias):
    lstm = model_of(backend, dtype, 3, 6, 2, bias=bias)
    x, state, dy, _ = given(lstm, backend, 4, 2)
    zeros = tuple(0 * part for part in state)
    expected = at_once(lstm, backend, x, zeros, 0 * dy, (zeros[0], state[1]))
    run = lstm.unroll(steps=4, batch=2)
    ys = [run.step(x_t) for x_t in x]
    last, back = run.state, run.backward((None, state[1]))
    found = named(backend, ys, last, [back.step(None) for _ in range(4)][::-1], back.finish())
    assert_close("agreement", found, expected, backend=backend.name, dtype=dtype)


ALL_RANDOM = {name: value for _, options in RANDOM_HERE for name, value in options.items()}
MASKS = [{"dropout": 0.4}, *(options for _, options in RANDOM_HERE), ALL_RANDOM,
         {"dropout": 0.4, "proj_size": 2, "layer_norm": True} | ALL_RANDOM]  # fmt: skip


@pytest.mark.parametrize("options", MASKS, ids=str)
def test_masks_are_those_of_a_whole_call(backend, dtype, options):
    lstm = model_of(backend, dtype, 3, 6, 3, **options)
    same, problem = copy.copy(lstm), given(lstm, backend, 5, 4)
    found = by_steps(lstm, backend, *problem)
    assert_close("agreement", found, at_once(same, backend, *problem), backend=backend.name, dtype=dtype)
    assert normalised_error(found["y"], by_steps(lstm, backend, *problem)["y"]) > 1e-3, "the next run draws other masks"


@pytest.mark.parametrize("options", [*(options for _, options in RANDOM_HERE), ALL_RANDOM], ids=str)
def test_masks_within_a_layer_are_drawn_and_kept_for_the_way_back(backend, options):
    lstm = model_of(backend, np.float64, 3, 6, 2, **options)
    x, state, dy, _ = given(lstm, backend, 4, 2)

    def loss(shift):
        run = copy.copy(lstm).unroll(state, steps=4, batch=2)  # a copy draws the same masks
        ys = [run.step(x_t + shift) for x_t in x]
        return sum(float((y * d).sum()) for y, d in zip(ys, dy, strict=True))

    run = copy.copy(lstm).unroll(state, steps=4, batch=2)
    ys = [run.step(x_t) for x_t in x]
    back = run.backward()
    slope = sum(float(back.step(d).sum()) for d in dy[::-1])
    assert abs((loss(1e-5) - loss(-1e-5)) / 2e-5 - slope) < 1e-8 * max(1.0, abs(slope))  # truncated at 1e-10
    assert normalised_error(np.stack([backend.host(y) for y in ys]), backend.host(lstm(x, state)[0])) > 1e-3


def test_windows_of_a_loop_continue_from_the_state_of_the_last_one(backend, dtype):
    lstm = model_of(backend, dtype, 3, 6, 2)
    x, state, _, _ = given(lstm, backend, 6, 2)
    whole, ys = lstm.unroll(state, steps=6, batch=2), []
    expected = [whole.step(x_t) for x_t in x]
    for start in (0, 2, 4):
        run = lstm.unroll(state, steps=9, batch=2)  # with room for more
        ys += [run.step(x_t) for x_t in x[start : start + 2]]
        state = run.state
        back = run.backward()
        assert back.left == 2
        for _ in range(2):
            back.step(None)
        back.finish()
    for y, y_expected in zip(ys, expected, strict=True):
        np.testing.assert_array_equal(backend.host(y), backend.host(y_expected))


def test_a_run_without_steps_has_gradients_of_zero(backend, dtype):
    lstm = model_of(backend, dtype, 3, 6, 2, peephole=True)
    _, state, _, dstate = given(lstm, backend, 1, 2)
    grads = lstm.unroll(state, steps=4, batch=2).backward(dstate).finish()
    for found, expected in zip(grads.state, dstate, strict=True):
        np.testing.assert_array_equal(backend.host(found), backend.host(expected))
    assert all(not backend.host(value).any() for value in grads.params.values())


def test_results_do_not_share_memory_with_the_run(backend, dtype):
    lstm = model_of(backend, dtype, 3, 6)
    x, state, dy, dstate = given(lstm, backend, 4, 2)
    expected = by_steps(lstm, backend, x, state, dy, dstate)
    run, ys, dxs = lstm.unroll(state, steps=4, batch=2), [], []
    for x_t in x:
        mine = x_t.copy()
        ys.append(run.step(mine))
        run.state[0][...] = 7
        run.state[1][...] = 7
        mine[...] = 7
        ys[-1] = ys[-1].copy(), ys[-1].fill(7)
    last, back = run.state, run.backward(dstate)
    for t in reversed(range(4)):
        mine = dy[t].copy()
        dx = back.step(mine)
        dxs.append(dx.copy())
        mine[...] = dx[...] = 7
        back.state[0][...] = 7
    found = named(backend, [y for y, _ in ys], last, dxs[::-1], back.finish())
    assert_identical(found, expected)


@pytest.mark.parametrize("layout", ["strided", "reversed", "transposed", "read-only", "other byte order"])
def test_arrays_in_any_layout_are_taken(backend, dtype, layout):
    if not backend.is_numpy:
        pytest.skip("layouts are NumPy's")
    lstm = model_of(backend, dtype, 3, 6)
    x, state, dy, dstate = given(lstm, backend, 4, 2)
    expected = by_steps(lstm, backend, x, state, dy, dstate)

    def other(array):
        if layout == "read-only":
            array = array.copy()
            array.flags.writeable = False
            return array
        if layout == "other byte order":
            return array.astype(array.dtype.newbyteorder())
        if layout == "transposed":
            return np.array(array, order="F")
        room = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
        view = room[..., ::2] if layout == "strided" else room[..., ::-2]
        view[...] = array
        return view

    pairs = (tuple(map(other, pair)) for pair in (state, dstate))
    found = by_steps(lstm, backend, other(x), next(pairs), other(dy), next(pairs))
    assert_close("agreement", found, expected, backend=backend.name, dtype=dtype)


# --- with other parts --------------------------------------------------------------------------------------------


def test_gradients_are_what_optimisers_take(backend, dtype):
    lstm = model_of(backend, dtype, 3, 6)
    x, _, dy, _ = given(lstm, backend, 2, 2)
    run = lstm.unroll(steps=2, batch=2)
    for x_t in x:
        run.step(x_t)
    back = run.backward()
    for d in dy:
        back.step(d)
    clipped, _ = clip_by_global_norm(join(lstm=back.finish()), 1.0)
    before = backend.host(lstm.params["bias_l0"]).copy()
    SGD(join(lstm=lstm), lr=0.1).step(clipped)
    assert (backend.host(lstm.params["bias_l0"]) != before).any()


@NEEDS_CPU
@pytest.mark.parametrize("sizes", [(1, 3, 20, 1), (3, 10, 33, 2), (130, 4, 9, 3), (16, 200, 40, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"peephole": True}], ids=str)
def test_steps_are_bit_identical_to_a_frozen_model_s(dtype, sizes, options):
    batch, inputs, hidden, layers = sizes
    backend = BackendUnderTest("cpu")
    lstm = model_of(backend, dtype, inputs, hidden, layers, **options)
    x, state, *_ = given(lstm, backend, 5, batch)
    run, frozen = lstm.unroll(state, steps=5, batch=batch), lstm.freeze()
    of_frozen = frozen.unroll(state, steps=5, batch=batch)
    for x_t in x:
        y, state = frozen.step(x_t, state)
        np.testing.assert_array_equal(run.step(x_t), y)
        np.testing.assert_array_equal(of_frozen.step(x_t), y)
        for found, expected in zip(run.state, state, strict=True):
            np.testing.assert_array_equal(found, expected)


@NEEDS_CPU
def test_the_documentation_names_the_variants_whose_steps_are_calls_of_their_own():
    from fastlstm.backends.cpu.unroll import can_unroll
    from fastlstm.backends.cuda.phased import is_phased

    cells = {name: model_of(BackendUnderTest("cpu"), np.float32, 3, 6, **options).cell
             for name, options in DETERMINISTIC + RANDOM_HERE}  # fmt: skip
    named_here = {name for name in cells if f"`{name}`" in unroll.__doc__} | {"peepholes of shared gates"}
    others = {name for name, cell in cells.items() if not can_unroll(cell)}
    assert others == {name for name, cell in cells.items() if is_phased(cell)}, "the same on a GPU"
    assert others == named_here - {"peephole", "block_size"} and "`peephole` with `block_size`" in unroll.__doc__
