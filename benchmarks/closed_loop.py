"""Closed loops, for ``studies.py``: training and inference, in Python and in ``@njit``, beside other libraries.

The next input is the first I units of the output, plus noise. Without noise the state runs down to zero, through
numbers that processors are slow with. A call of a side is the whole loop.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from numba import njit

from fastlstm import compiled
from fastlstm.bench import peers
from fastlstm.bench.peers import CPU
from fastlstm.bench.sides import Side
from fastlstm.bench.work import Problem, Work

STEPS = 1000
INFER, SMALL, TRAIN = (Work(1, 32, 10, 100, kind="stream"), Work(1, 1, 10, 32, kind="stream"),
                       Work(STEPS, 32, 4, 100, kind="train"))  # fmt: skip
NJIT, OPEN, CELL = "fastlstm @njit", "fastlstm, open loop", "torch LSTMCell"


@njit
def train_compiled(kit, tape, drive, x, y, dh, dx, dy, gradients):
    y[:] = 0
    for t in range(len(drive)):
        for b in range(x.shape[0]):
            for i in range(x.shape[1]):
                x[b, i] = drive[t, b, i] + y[b, i]
        compiled.step_taped(kit, tape, t, x, y)
    dx[:] = 0
    for t in range(len(drive) - 1, -1, -1):
        dh[:] = dy[t]
        for b in range(x.shape[0]):
            for i in range(x.shape[1]):
                dh[b, i] += dx[b, i]
        compiled.step_back(kit, tape, t, dh, dx)
    compiled.finish(kit, tape, gradients)


@njit
def infer_compiled(kit, drive, x, y, h, c, h_next, c_next):
    y[:] = 0
    for t in range(len(drive)):
        for b in range(x.shape[0]):
            for i in range(x.shape[1]):
                x[b, i] = drive[t, b, i] + y[b, i]
        compiled.step(kit, x, h, c, y, h_next, c_next)
        h, h_next = h_next, h
        c, c_next = c_next, c


def _side(call: Callable[[], Any], shape: tuple[int, ...] | None = None) -> Side:
    return Side(call, lambda: (np.asarray(call()).reshape(shape or -1).copy(),))


def training(problem: Problem, threads: int, names: list[str]) -> dict[str, Side]:
    """Return forward and backward through all steps; the outputs are the gradient by the recurrent weights."""
    model, drive, dy = problem.model, problem.x, problem.dy
    (steps, batch, inputs), hidden, dtype = drive.shape, dy.shape[-1], drive.dtype
    kit, zero = model.compiled(), np.zeros((batch, inputs), dtype)
    tape, gradients = kit.tape(steps, batch, threads=threads), kit.gradients()
    x, dx = np.empty((2, batch, inputs), dtype)
    y, dh = np.empty((2, batch, hidden), dtype)

    def in_python() -> Any:
        run, fed = model.unroll(steps=steps, batch=batch), zero
        for noise in drive:
            fed = run.step(noise + fed)[:, :inputs]
        back, dx = run.backward(), zero
        for given in dy[::-1]:
            dh = given.copy()
            dh[:, :inputs] += dx
            dx = back.step(dh)
        return back.finish().params["weight_hh_l0"]

    def in_njit() -> Any:
        kit = model.compiled()  # the parameters have changed since the last batch
        train_compiled(kit, tape, drive, x, y, dh, dx, dy, gradients)
        return kit.named(gradients)["weight_hh_l0"]

    run, fed = model.unroll(steps=steps, batch=batch), [zero]
    for noise in drive:
        fed.append(run.step(noise + fed[-1])[:, :inputs])
    of_open = drive + np.stack(fed[:-1])

    def open_loop() -> Any:
        return model.backward(model.forward(of_open)[2], dy).params["weight_hh_l0"]

    found = {CPU: _side(in_python), NJIT: _side(in_njit), OPEN: _side(open_loop)}
    if "torch" in names:
        torch = import_module("torch")
        module, given = peers.torch_module(torch, problem), torch.from_numpy(dy)
        noises, first = torch.from_numpy(drive), torch.from_numpy(zero)

        def by_torch() -> Any:
            module.zero_grad()
            fed, state, ys = first, None, []
            for noise in noises:
                y, state = module((noise + fed)[None], state)
                ys.append(y[0])
                fed = y[0, :, :inputs]
            torch.autograd.backward([torch.stack(ys)], [given])
            return module.weight_hh_l0.grad.numpy()

        found["torch"] = _side(by_torch)
    return found


def inference(problem: Problem, threads: int, names: list[str]) -> dict[str, Side]:
    """Return the loop without gradients, our model frozen; the outputs are those of the last step."""
    work, kit = problem.work, problem.model.compiled()
    shape = work.batch, work.hidden
    drive = np.random.default_rng(2).standard_normal((STEPS, work.batch, work.inputs), np.float32)

    def looped(step: Callable[[Any, Any], tuple[Any, Any]], noises: Any) -> Side:
        def call() -> Any:
            fed, state = noises[0] * 0, None
            for noise in noises:
                h, state = step(noise + fed, state)
                fed = h[..., : work.inputs]
            return h

        return _side(call, shape)

    def in_njit() -> Any:
        y, x = np.empty(shape, np.float32), np.empty(drive.shape[1:], np.float32)
        infer_compiled(kit, drive, x, y, *np.zeros((4, 1, *shape), np.float32))
        return y

    found = {CPU: looped(problem.model.freeze().step, drive), NJIT: _side(in_njit, shape)}
    if "torch" in names:
        torch, weights = import_module("torch"), problem.model.to_torch_state_dict()
        cell, noises = torch.nn.LSTMCell(work.inputs, work.hidden), torch.from_numpy(drive)
        cell.load_state_dict({name.removesuffix("_l0"): torch.from_numpy(value) for name, value in weights.items()})
        cell.requires_grad_(False)

        def cell_step(x: Any, state: Any) -> Any:
            state = cell(x, state)
            return state[0], state

        found["torch"] = looped(peers.torch_module(torch, problem).requires_grad_(False), noises[:, None])
        found[CELL] = looped(cell_step, noises)
    if "onnxruntime" in names:
        found["onnxruntime"] = looped(peers.onnx_calls(problem, threads).step, drive[:, None])
    return found
