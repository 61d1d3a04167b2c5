"""``LSTM.unroll``: the steps of a closed loop give what one call for the whole sequence gives, forward and back."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
from harness import BackendUnderTest
from tolerances import EPS, TORCH_EXTRA_EPS, TORCH_RATIO, assert_close, assert_identical, normalised_error
from variants import DETERMINISTIC, RANDOM_HERE, test_every_variant_has_an_example  # noqa: F401

from fastlstm import LSTM, ArgumentError, ArrayTypeError, DTypeError, ShapeError
from fastlstm.training import SGD, clip_by_global_norm, join

NEEDS_CPU = pytest.mark.skipif(bool(BackendUnderTest("cpu").missing), reason=str(BackendUnderTest("cpu").missing))

# T, B, I, H, L: of one row and several, one vector of units and several, more than 64 rows, and more than one slice of
# the weights' rows; the last has more rows than the weights' gradients take at a time.
SIZES = [(5, 3, 4, 6, 1), (6, 1, 3, 40, 3), (3, 70, 9, 34, 2), (3, 2, 150, 8, 2), (300, 2, 1, 4, 1)]


def draw(rng, backend, dtype, *shape):
    return backend.array(rng.uniform(-1, 1, shape).astype(dtype))


def model_of(backend, dtype, inputs, hidden, layers=1, **options):
    """A model on the backend whose biases and peepholes are drawn, too."""
    lstm, rng = LSTM(inputs, hidden, layers, dtype=dtype, seed=0, **options), np.random.default_rng(1)
    for name, value in lstm.params.items():
        lstm.params[name] = backend.array(rng.uniform(-0.5, 0.5, value.shape).astype(dtype))
    return lstm


def state_sizes(cell):
    return getattr(cell, "h_size", cell.hidden_size), getattr(cell, "c_size", cell.hidden_size)


def given(lstm, backend, steps, batch):
    """x, the state, dy and the gradients by the last state of a problem."""
    cell, rng = lstm.cell, np.random.default_rng(2)
    x = draw(rng, backend, cell.dtype, steps, batch, cell.input_size)
    dy = draw(rng, backend, cell.dtype, steps, batch, cell.output_size)
    states = [draw(rng, backend, cell.dtype, cell.num_layers, batch, size) for size in state_sizes(cell) * 2]
    return x, tuple(states[:2]), dy, tuple(states[2:])


def named(backend, ys, state, dxs, grads):
    found = {"y": np.stack([backend.host(y) for y in ys]), "dx": np.stack([backend.host(dx) for dx in dxs])}
    found |= {"h_n": state[0], "c_n": state[1], "dh0": grads.state[0], "dc0": grads.state[1]}
    found |= {f"d{name}": value for name, value in grads.params.items()}
    return {name: value if name in ("y", "dx") else backend.host(value) for name, value in found.items()}


def by_steps(lstm, backend, x, state, dy, dstate):
    """Every result of an open loop, taken step by step."""
    run = lstm.unroll(state, steps=len(x), batch=x.shape[1])
    ys = [run.step(x_t) for x_t in x]
    last, back = run.state, run.backward(dstate)
    dxs = [back.step(dy[t]) for t in reversed(range(len(x)))][::-1]
    return named(backend, ys, last, dxs, back.finish())


def at_once(lstm, backend, x, state, dy, dstate):
    y, last, tape = lstm.forward(x, state)
    grads = lstm.backward(tape, dy, dstate)
    return named(backend, y, last, grads.x, grads)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("variant", "options"), DETERMINISTIC, ids=lambda value: value if type(value) is str else "")
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


def test_dropout_masks_are_those_of_a_whole_call(backend, dtype):
    lstm = model_of(backend, dtype, 3, 6, 3, dropout=0.4)
    same, problem = copy.copy(lstm), given(lstm, backend, 5, 4)
    found = by_steps(lstm, backend, *problem)
    assert_close("agreement", found, at_once(same, backend, *problem), backend=backend.name, dtype=dtype)
    assert normalised_error(found["y"], by_steps(lstm, backend, *problem)["y"]) > 1e-3, "the next run draws other masks"


@pytest.mark.parametrize(("variant", "options"), RANDOM_HERE, ids=lambda value: value if type(value) is str else "")
def test_masks_within_a_layer_are_drawn_and_kept_for_the_way_back(backend, variant, options):
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


def test_results_are_nobody_else_s(backend, dtype):
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


# --- what is refused --------------------------------------------------------------------------------------------


def test_a_step_too_many_is_refused(backend):
    lstm = model_of(backend, np.float32, 3, 6)
    x, *_ = given(lstm, backend, 3, 2)
    run = lstm.unroll(steps=2, batch=2)
    ys = [run.step(x[t]) for t in range(2)]
    before = [backend.host(part) for part in run.state]
    with pytest.raises(ArgumentError, match="room for 2 steps"):
        run.step(x[2])
    assert run.taken == 2
    for part, now in zip(before, run.state, strict=True):
        np.testing.assert_array_equal(backend.host(now), part)
    back = run.backward()
    with pytest.raises(ArgumentError, match="way back has begun"):
        run.step(x[2])
    with pytest.raises(ArgumentError, match="begun already"):
        run.backward()
    for y in ys:
        with pytest.raises(ArgumentError, match="have not been taken back"):
            back.finish()
        back.step(y)
    with pytest.raises(ArgumentError, match="all 2 steps"):
        back.step(ys[0])
    back.finish()


@pytest.mark.parametrize("when", ["before the way back", "before its end"])
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_parameters_that_changed_are_refused(backend, when, how):
    lstm = model_of(backend, np.float32, 3, 6)
    x, _, dy, _ = given(lstm, backend, 1, 2)

    def change():
        if how == "in place":
            lstm.params["bias_l0"][...] += 1
        else:
            lstm.params["bias_l0"] = lstm.params["bias_l0"] + 1

    run = lstm.unroll(steps=1, batch=2)
    run.step(x[0])
    if when == "before the way back":
        change()
        with pytest.raises(ArgumentError, match="bias_l0 has changed"):
            run.backward()
        return
    back = run.backward()
    back.step(dy[0])
    change()
    with pytest.raises(ArgumentError, match="bias_l0 has changed"):
        back.finish()


def test_parameters_of_nan_have_not_changed(backend):
    lstm = model_of(backend, np.float32, 3, 6)
    lstm.params["bias_l0"][0] = np.nan
    lstm.unroll(steps=1, batch=2).backward().finish()


def test_a_bidirectional_model_is_refused(backend):
    lstm = model_of(backend, np.float32, 3, 6, bidirectional=True)
    with pytest.raises(ArgumentError, match="bidirectional"):
        lstm.unroll(steps=3, batch=2)


@pytest.mark.parametrize("name", ["steps", "batch"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "3", 10**400], ids=lambda value: repr(value)[:8])
def test_odd_sizes_are_refused(backend, name, value):
    lstm = model_of(backend, np.float32, 3, 6)
    with pytest.raises(ArgumentError, match=name):
        lstm.unroll(**({"steps": 2, "batch": 2} | {name: value}))


def test_odd_arrays_are_refused_before_any_work(backend):
    lstm = model_of(backend, np.float32, 3, 6)
    x, state, dy, dstate = given(lstm, backend, 2, 2)
    with pytest.raises(ShapeError, match="h0"):
        lstm.unroll((state[0][:, :1], state[1]), steps=2, batch=2)
    with pytest.raises(ArgumentError, match="pair"):
        lstm.unroll(state[0], steps=2, batch=2)
    run = lstm.unroll(state, steps=2, batch=2)
    wrong = [(x[0, :1], ShapeError), (x[0, 0], ShapeError), (x[0].astype(np.float64), DTypeError),
             (x[0].tolist(), ArrayTypeError), (None, ArrayTypeError)]  # fmt: skip
    for value, error in wrong:
        with pytest.raises(error, match="x_t"):
            run.step(value)
    assert run.taken == 0
    run.step(x[0])
    with pytest.raises(ShapeError, match="dh_n"):
        run.backward((dstate[0][:, :1], dstate[1]))
    back = run.backward(dstate)
    for value, error in [(dy[0, :1], ShapeError), (dy[0].astype(np.float64), DTypeError), ([1.0], ArrayTypeError)]:
        with pytest.raises(error, match="dh_t"):
            back.step(value)
    assert back.left == 1


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


# --- against torch, with feedback -----------------------------------------------------------------------------------


class World:
    """A user's nonlinear world: x_{t+1} = tanh(C h_t) u_t, and the loss is the sum of w_t h_t."""

    def __init__(self, dtype, steps, batch, inputs, hidden):
        rng = np.random.default_rng(3)
        self.c, self.u, self.w, self.x0 = (
            rng.uniform(-1, 1, shape).astype(np.float32).astype(dtype)
            for shape in ((inputs, hidden), (steps, batch, inputs), (steps, batch, hidden), (batch, inputs))
        )

    def loop(self, lstm, backend):
        """The loss and all gradients through the loop, the world in NumPy."""
        steps, batch = self.u.shape[:2]
        run, x, hs, vs, loss = lstm.unroll(steps=steps, batch=batch), self.x0, [], [], 0.0
        for t in range(steps):
            hs.append(backend.host(run.step(backend.array(x))))
            vs.append(np.tanh(hs[t] @ self.c.T))
            loss += float((self.w[t] * hs[t]).sum())
            x = vs[t] * self.u[t]
        back, dx, dc = run.backward(), np.zeros_like(self.x0), np.zeros_like(self.c)
        for t in reversed(range(steps)):
            dv = dx * self.u[t] * (1 - vs[t] ** 2)
            dc += dv.T @ hs[t]
            dx = backend.host(back.step(backend.array(self.w[t] + dv @ self.c)))
        grads = back.finish()
        found = {"dx": dx, "dC": dc} | {f"d{name}": backend.host(value) for name, value in grads.params.items()}
        return loss, found

    def by_torch(self, lstm, backend):
        torch = pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")
        torch.set_num_threads(1)
        cell = lstm.cell
        module = torch.nn.LSTM(
            cell.input_size, cell.hidden_size, cell.num_layers, dtype=getattr(torch, cell.dtype.name)
        )
        host = LSTM(cell.input_size, cell.hidden_size, cell.num_layers, dtype=cell.dtype, seed=0)
        host.params.update({name: backend.host(value) for name, value in lstm.params.items()})
        module.load_state_dict({k: torch.from_numpy(v) for k, v in host.to_torch_state_dict().items()})
        c, x = torch.from_numpy(self.c).requires_grad_(), torch.from_numpy(self.x0).requires_grad_()
        first, state, loss = x, None, 0
        for t in range(len(self.u)):
            y, state = module(x[None], state)
            loss = loss + (y[0] * torch.from_numpy(self.w[t])).sum()
            x = torch.tanh(y[0] @ c.T) * torch.from_numpy(self.u[t])
        loss.backward()
        found = {"dx": first.grad, "dC": c.grad}
        gradients = {name: value.grad for name, value in module.named_parameters()}
        found |= {f"d{name}": gradients[name.replace("bias", "bias_ih")] for name in lstm.params}
        return {name: value.numpy() for name, value in found.items()}


LAYERS = [1, 2, 3]


@functools.cache
def torch_gradients(layers, name):
    """Torch's gradients for one of the dtypes."""
    world = World(np.dtype(name), 12, 3, 4, 5)
    backend = BackendUnderTest("cpu")
    return world.by_torch(model_of(backend, np.dtype(name), 4, 5, layers), backend)


@pytest.mark.parametrize("layers", LAYERS)
def test_gradients_through_feedback_are_torch_s_in_float64(backend, layers):
    found = World(np.float64, 12, 3, 4, 5).loop(model_of(backend, np.float64, 4, 5, layers), backend)[1]
    assert_close("loop", found, torch_gradients(layers, "float64"), backend=backend.name, dtype=np.float64)


@pytest.mark.parametrize("layers", LAYERS)
def test_float32_gradients_through_feedback_are_as_exact_as_torch_s(backend, layers):
    # The parameters and the world are float32 numbers in both dtypes, so float64 is the truth.
    truth, theirs = torch_truth(layers), torch_gradients(layers, "float32")
    found = World(np.float32, 12, 3, 4, 5).loop(model_of(backend, np.float32, 4, 5, layers), backend)[1]
    for name, expected in truth.items():
        bound = TORCH_RATIO * normalised_error(theirs[name], expected)
        bound += TORCH_EXTRA_EPS["gradients"] * EPS[np.dtype(np.float32)]
        assert normalised_error(found[name], expected) <= bound, name


@functools.cache
def torch_truth(layers):
    """Torch's gradients in float64, of the parameters that the float32 model has."""
    backend = BackendUnderTest("cpu")
    lstm = model_of(backend, np.float32, 4, 5, layers)
    wide = LSTM(4, 5, layers, dtype=np.float64, seed=0)
    wide.params.update({name: value.astype(np.float64) for name, value in lstm.params.items()})
    return World(np.float64, 12, 3, 4, 5).by_torch(wide, backend)


@pytest.mark.parametrize(("variant", "options"), DETERMINISTIC, ids=lambda value: value if type(value) is str else "")
def test_gradients_through_a_world_are_those_of_differences(backend, variant, options):
    if options == {"truncated": True}:
        pytest.skip("the truncated gradient is not the loss's")
    lstm = model_of(backend, np.float64, 4, 6, 2, **options)
    world = World(np.float64, 6, 2, 4, lstm.cell.output_size)
    _, found = world.loop(lstm, backend)
    # Directions along which no clip begins or ends to bite within the difference.
    rng, arrays = np.random.default_rng(5), {"dx": world.x0, "dC": world.c}
    arrays |= {f"d{name}": value for name, value in lstm.params.items()}
    for name, array in arrays.items():
        direction = rng.uniform(-1, 1, array.shape)
        start, losses = (array if type(array) is np.ndarray else backend.host(array)).copy(), []
        for sign in (1, -1):
            shifted = start + sign * 1e-5 * direction
            array[...] = shifted if type(array) is np.ndarray else backend.array(shifted)
            losses.append(world.loop(lstm, backend)[0])
        array[...] = start if type(array) is np.ndarray else backend.array(start)
        slope, expected = (losses[0] - losses[1]) / 2e-5, float((found[name] * direction).sum())
        assert abs(slope - expected) <= 1e-7 * max(1.0, abs(expected)), name
