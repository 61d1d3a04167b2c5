"""The sides of the study ``torch_lstm`` of ``studies.py``: one training program of PyTorch with either LSTM."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from fastlstm.bench import peers, run
from fastlstm.bench.sides import Side, our_threads
from fastlstm.bench.work import Work

FORGET_BIAS = 3.0  # as neuralhydrology initialises it: with 0, gradients of T=365 underflow
# Of the initial recurrent weights. With 1, and that bias, the model is chaotic: rounding errors in float32 grow to 1e-3
# of a gradient, in both libraries.
SCALE = 0.5


def sides(work: Work, threads: int) -> run.Builders:
    """Return the builders of both sides, with equal weights and data."""
    modules = {peers.CPU: "fastlstm.torch", "torch": "torch.nn"}
    return {name: functools.partial(_side, module, work, threads) for name, module in modules.items()}


@contextlib.contextmanager
def _side(module: str, work: Work, threads: int) -> Iterator[Side]:
    """Build a training program, in which both libraries have so many threads."""
    with peers.torch_with(threads) as torch, our_threads(threads):
        yield _program(torch, import_module(module).LSTM, work)


def _program(torch: Any, lstm_class: Any, work: Work) -> Side:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lstm, head = lstm_class(work.inputs, work.hidden), torch.nn.Linear(work.hidden, 1)
        x, target = torch.randn(work.steps, work.batch, work.inputs), torch.randn(work.batch, 1)
    with torch.no_grad():
        lstm.bias_hh_l0[work.hidden : 2 * work.hidden] = FORGET_BIAS
        lstm.weight_hh_l0.mul_(SCALE)
    weights = [*lstm.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(weights)

    def gradients() -> Any:
        optimiser.zero_grad()
        loss = torch.nn.functional.mse_loss(head(lstm(x)[0][-1]), target)
        loss.backward()
        return loss

    def step() -> None:
        gradients()
        optimiser.step()

    def outputs() -> tuple[Any, ...]:
        loss = gradients().detach()
        return loss.numpy(), *(weight.grad.numpy() for weight in weights)

    return Side(step, outputs)
