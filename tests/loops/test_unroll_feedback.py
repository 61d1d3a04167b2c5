"""Gradients of ``LSTM.unroll`` through feedback: those of PyTorch's autograd, and of finite differences."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from harness import BackendUnderTest
from tolerances import EPS, TORCH_EXTRA_EPS, TORCH_RATIO, assert_close, normalised_error
from unroll_tools import model_of
from variants import DETERMINISTIC

from fastlstm import LSTM


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
