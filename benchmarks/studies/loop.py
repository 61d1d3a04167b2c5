"""The closed loop: what the network says decides what it is shown next, so there is one call for each time step.

The world that answers is as small as can be, the first I units of h: what is measured are the steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np

import fastlstm
from fastlstm.bench import clock, peers
from fastlstm.bench.sides import Side
from fastlstm.bench.work import Array, Problem, Work

from . import rows
from .record import OURS, Case

STEPS, BATCH, INPUTS, HIDDEN = 1000, 32, 10, 100
WORK = Work(1, BATCH, INPUTS, HIDDEN, kind="stream")
ABOUT = (
    f"T={STEPS} steps, one call each, B={BATCH}, H={HIDDEN}, float32: the next input are the first I={INPUTS} units"
    " of the output. Our model is frozen. PyTorch is called as nn.LSTM with T=1 and as nn.LSTMCell, ONNX Runtime as a"
    " graph of one step that hands its states in and out. After the last step h is compared."
)
CELL = "torch LSTMCell"


def measure(threads: int, seconds: float) -> Iterator[Case]:
    """Measure the loop on all sides that are here."""
    problem = Problem.of(WORK)
    with contextlib.ExitStack() as stack:
        built: dict[str, Side] = {}
        refused: dict[str, str] = {}
        for name, (contender, build) in SIDES.items():
            if not rows.here([contender], threads):
                continue
            # The engine's own side holds the number of threads while this one runs.
            stack.enter_context(peers.CONTENDERS[contender].build(problem, threads))
            run = build(problem, threads)
            side = Side(run, lambda run=run: (run(),))
            wrong = clock.disagreement(built[OURS].outputs(), side.outputs(), "float32") if built else None
            if wrong is None:
                built[name] = side
            else:
                refused[name] = wrong
        values, _, interrupted = clock.take_turns(built, seconds)
    if interrupted:
        raise KeyboardInterrupt
    yield Case(f"{STEPS:,} steps, B={BATCH}, H={HIDDEN}", values, facts={"steps": STEPS}, refused=refused)


def ours(problem: Problem, threads: int) -> Callable[[], Array]:
    """Our step."""
    model, first = problem.frozen_or_trained, problem.x[0]

    def run() -> Array:
        x, state = first, None
        for _ in range(STEPS):
            h, state = model.step(x, state)
            x = h[:, :INPUTS]
        return h

    return run


def torch_lstm(problem: Problem, threads: int) -> Callable[[], Array]:
    """nn.LSTM on sequences of one step."""
    torch = import_module("torch")
    module = torch.nn.LSTM(INPUTS, HIDDEN)
    module.load_state_dict(_tensors(torch, problem.model))
    first = torch.from_numpy(problem.x)

    def run() -> Array:
        x, state = first, None
        with torch.inference_mode():
            for _ in range(STEPS):
                h, state = module(x, state)
                x = h[:, :, :INPUTS]
            return h[0].numpy()

    return run


def torch_cell(problem: Problem, threads: int) -> Callable[[], Array]:
    """nn.LSTMCell."""
    torch = import_module("torch")
    module = torch.nn.LSTMCell(INPUTS, HIDDEN)
    weights = _tensors(torch, problem.model)
    module.load_state_dict({name.removesuffix("_l0"): value for name, value in weights.items()})
    first = torch.from_numpy(problem.x[0])

    def run() -> Array:
        x, state = first, None
        with torch.inference_mode():
            for _ in range(STEPS):
                state = module(x, state)
                x = state[0][:, :INPUTS]
            return state[0].numpy()

    return run


def _tensors(torch: Any, model: fastlstm.LSTM) -> dict[str, Any]:
    return {name: torch.from_numpy(value.copy()) for name, value in model.to_torch_state_dict().items()}


def onnxruntime(problem: Problem, threads: int) -> Callable[[], Array]:
    """ONNX Runtime's LSTM operator, one step a call."""
    ort = import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(peers.onnx_model(problem), options, providers=["CPUExecutionProvider"])
    zero = np.zeros((1, BATCH, HIDDEN), problem.x.dtype)

    def run() -> Array:
        x, h, c = problem.x, zero, zero
        for _ in range(STEPS):
            _, h, c = session.run(None, {"X": x, "h": h, "c": c})
            x = h[:, :, :INPUTS]
        return h[0]

    return run


SIDES: dict[str, tuple[str, Callable[[Problem, int], Callable[[], Array]]]] = {
    OURS: (OURS, ours),
    "torch": ("torch", torch_lstm),
    CELL: ("torch", torch_cell),
    "onnxruntime": ("onnxruntime", onnxruntime),
}
