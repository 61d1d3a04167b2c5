"""The closed loop, in Python and in compiled code: training, one small step, and inference, beside other libraries.

    python benchmarks/closed_loop.py --threads 2 --json closed_loop.json

The world that answers is as small as can be: the next input are the first I units of the output. All sides of a row are
measured in turn, round by round, in one process, and must agree on the result first. A ratio is the median over the
rounds of the side's time / our time, so that a slow phase of the machine meets both. Nothing else should run on the
machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

import fastlstm
from fastlstm import LSTM, compiled
from fastlstm.diagnostics import describe_for_others

Run = Callable[[], Any]
DTYPE = np.float32


@njit
def train_compiled(kit, tape, x, y, dh, dx, dy, gradients):
    steps, batch, inputs = tape.steps, x.shape[0], x.shape[1]
    for t in range(steps):
        compiled.step_taped(kit, tape, t, x, y)
        for b in range(batch):
            for i in range(inputs):
                x[b, i] = y[b, i]
    dx[:] = 0
    for t in range(steps - 1, -1, -1):
        dh[:] = dy[t]
        for b in range(batch):
            for i in range(inputs):
                dh[b, i] += dx[b, i]
        compiled.step_back(kit, tape, t, dh, dx)
    compiled.finish(kit, tape, gradients)


@njit
def infer_compiled(kit, x, h, c, y, h_next, c_next, steps):
    for _ in range(steps):
        compiled.step(kit, x, h, c, y, h_next, c_next)
        h, h_next = h_next, h
        c, c_next = c_next, c
        for b in range(x.shape[0]):
            for i in range(x.shape[1]):
                x[b, i] = y[b, i]


def torch_module(lstm: LSTM, kind: str) -> Any:
    """Return torch's LSTM, or its LSTMCell, with the weights of a model."""
    import torch

    module = getattr(torch.nn, kind)(lstm.cell.input_size, lstm.cell.hidden_size)
    suffix = "_l0" if kind == "LSTM" else ""
    state = {name.replace("_l0", suffix): torch.from_numpy(v) for name, v in lstm.to_torch_state_dict().items()}
    module.load_state_dict(state)
    return module


def training(steps: int, batch: int, inputs: int, hidden: int) -> tuple[dict[str, Run], str]:
    """Forward and backward through all steps; each side returns the gradient by the recurrent weights."""
    lstm, rng = LSTM(inputs, hidden, dtype=DTYPE, seed=0), np.random.default_rng(0)
    x0 = rng.normal(size=(batch, inputs)).astype(DTYPE)
    dy = rng.normal(size=(steps, batch, hidden)).astype(DTYPE) / steps
    kit = lstm.compiled()
    tape, gradients = kit.tape(steps, batch, threads=fastlstm.get_num_threads()), kit.gradients()
    y, dh, dx = np.empty((batch, hidden), DTYPE), np.empty((batch, hidden), DTYPE), np.empty((batch, inputs), DTYPE)

    def in_python() -> Any:
        run, x = lstm.unroll(steps=steps, batch=batch), x0
        for _ in range(steps):
            x = run.step(x)[:, :inputs]
        back, dx = run.backward(), np.zeros((batch, inputs), DTYPE)
        for t in reversed(range(steps)):
            dh = dy[t].copy()
            dh[:, :inputs] += dx
            dx = back.step(dh)
        return back.finish().params["weight_hh_l0"]

    def in_njit() -> Any:
        kit = lstm.compiled()  # the parameters have changed since the last batch
        train_compiled(kit, tape, x0.copy(), y, dh, dx, dy, gradients)
        return kit.named(gradients)["weight_hh_l0"]

    sides: dict[str, Run] = {"fastlstm in @njit": in_njit, "fastlstm in Python": in_python}
    # The inputs of the closed loop, for one call over all of them.
    run, x, inputs_of_all = lstm.unroll(steps=steps, batch=batch), x0, []
    for _ in range(steps):
        inputs_of_all.append(x)
        x = run.step(x)[:, :inputs]
    open_x = np.stack(inputs_of_all)

    def open_loop() -> Any:
        _, _, tape = lstm.forward(open_x)
        lstm.backward(tape, dy)
        return None  # without the feedback, other gradients

    sides["fastlstm, open loop in one call"] = open_loop
    if find_spec("torch"):
        import torch

        module, first = torch_module(lstm, "LSTM"), torch.from_numpy(x0)
        given = torch.from_numpy(dy)

        def by_torch() -> Any:
            module.zero_grad()
            x, state, hs = first, None, []
            for _ in range(steps):
                y, state = module(x[None], state)
                hs.append(y[0])
                x = y[0, :, :inputs]
            torch.autograd.backward([torch.stack(hs)], [given])
            return module.weight_hh_l0.grad.numpy()

        sides["torch nn.LSTM, a call a step"] = by_torch
    return sides, f"train, T={steps} B={batch} I={inputs} H={hidden}"


def small_step(steps: int, batch: int, inputs: int, hidden: int) -> tuple[dict[str, Run], str]:
    """One step many times: in compiled code, and called from Python."""
    sides, name = inference(steps, batch, inputs, hidden)
    return {key: sides[key] for key in list(sides)[:2]}, name


def inference(steps: int, batch: int, inputs: int, hidden: int) -> tuple[dict[str, Run], str]:
    """The loop without gradients; each side returns the last output."""
    lstm, rng = LSTM(inputs, hidden, dtype=DTYPE, seed=0), np.random.default_rng(0)
    frozen, kit = lstm.freeze(), lstm.compiled()
    x0 = rng.normal(size=(batch, inputs)).astype(DTYPE)

    def in_njit() -> Any:
        h, c, h_next, c_next = np.zeros((4, 1, batch, hidden), DTYPE)
        y = np.empty((batch, hidden), DTYPE)
        infer_compiled(kit, x0.copy(), h, c, y, h_next, c_next, steps)
        return y

    def in_python() -> Any:
        x, state = x0, None
        for _ in range(steps):
            h, state = frozen.step(x, state)
            x = h[:, :inputs]
        return h

    sides: dict[str, Run] = {"fastlstm in @njit": in_njit, "fastlstm step from Python": in_python}
    if find_spec("torch"):
        import torch

        cell, first = torch_module(lstm, "LSTMCell"), torch.from_numpy(x0)

        def by_torch() -> Any:
            with torch.inference_mode():
                x, state = first, None
                for _ in range(steps):
                    state = cell(x, state)
                    x = state[0][:, :inputs]
            return state[0].numpy()

        sides["torch LSTMCell"] = by_torch
    if find_spec("onnxruntime") and find_spec("onnx"):
        sides["onnxruntime, a graph of one step"] = by_onnxruntime(lstm, x0, steps)
    return sides, f"infer, T={steps} B={batch} I={inputs} H={hidden}"


def by_onnxruntime(lstm: LSTM, x0: Any, steps: int) -> Run:
    """A session whose graph is one step that takes and returns the states."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    (batch, inputs), hidden = x0.shape, lstm.cell.hidden_size

    def gates(name: str) -> Any:
        i, f, g, o = np.split(lstm.params[name], 4)  # ONNX has i, o, f, g
        return np.concatenate([i, o, f, g])

    bias = gates("bias_l0")
    weights = {"W": gates("weight_ih_l0")[None], "R": gates("weight_hh_l0")[None],
               "B": np.concatenate([bias, np.zeros_like(bias)])[None]}  # fmt: skip
    node = helper.make_node(
        "LSTM", ["x", "W", "R", "B", "", "h", "c"], ["", "h_n", "c_n"], hidden_size=hidden, direction="forward"
    )
    shapes = {"x": [1, batch, inputs], "h": [1, batch, hidden], "c": [1, batch, hidden]}
    described = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()}
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shapes["h"]) for n in ("h_n", "c_n")]
    initial = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph([node], "step", list(described.values()), outputs, initial)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = fastlstm.get_num_threads(), 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run() -> Any:
        x, h, c = x0[None], *np.zeros((2, 1, batch, hidden), DTYPE)
        for _ in range(steps):
            h, c = session.run(None, {"x": x, "h": h, "c": c})
            x = h[:, :, :inputs]
        return h[0]

    return run


# The goals: of which side the time is divided by which other's, and what comes of it at least, or at most.
GOALS = [
    ("train", "torch nn.LSTM, a call a step", "fastlstm in Python", "at least", 4.0),
    ("train", "torch nn.LSTM, a call a step", "fastlstm in @njit", "at least", 8.0),
    ("train", "fastlstm in @njit", "fastlstm, open loop in one call", "at most", 1.6),
    ("step", "fastlstm step from Python", "fastlstm in @njit", "at least", 8.0),
    ("infer", "torch LSTMCell", "fastlstm in @njit", "at least", 1.0),
    ("infer", "onnxruntime, a graph of one step", "fastlstm in @njit", "at least", 1.0),
    ("infer", "torch LSTMCell", "fastlstm step from Python", "at least", 1.0),
    ("infer", "onnxruntime, a graph of one step", "fastlstm step from Python", "at least", 1.0),
]


def biased(lstm: LSTM) -> LSTM:
    """Draw biases: without them the loop runs down to zero, through numbers that processors are slow with."""
    lstm.params["bias_l0"] += np.random.default_rng(2).normal(0, 0.5, lstm.params["bias_l0"].shape).astype(DTYPE)
    return lstm


def measure(sides: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Check that the sides agree, and time them in turn."""
    found = {name: run() for name, run in sides.items()}
    first = next(iter(found.values()))
    for name, value in found.items():
        if value is not None:
            # Two float32 results of a loop that feeds its errors back.
            error = float(np.abs(value - first).max() / max(np.abs(first).max(), 1e-3))
            assert error < 1e-2, f"{name} is off by {error:.1e}"
    times: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    gc.enable()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=1000, help="of the loops with B=32")
    parser.add_argument("--json", type=Path, help="where to keep what was measured")
    options = parser.parse_args()
    machine = describe_for_others()
    fastlstm.set_num_threads(options.threads)
    if find_spec("torch"):
        import torch

        torch.set_num_threads(options.threads)
    rows = {
        "train": training(options.steps, 32, 4, 100),
        "step": small_step(20 * options.steps, 1, 10, 32),
        "infer": inference(options.steps, 32, 10, 100),
    }
    kept: dict[str, Any] = {"format": "fastlstm closed loop", "version": 1, "machine": machine,
                            "threads": options.threads, "rows": {}}  # fmt: skip
    for key, (sides, title) in rows.items():
        times = measure(sides, options.rounds)
        kept["rows"][key] = {"title": title, "seconds": times}
        print(title)
        for name, seconds in times.items():
            print(f"  {name:36} {statistics.median(seconds) * 1e3:10.3f} ms")
    print("goals")
    kept["goals"] = []
    for key, above, below, direction, goal in GOALS:
        times = kept["rows"][key]["seconds"]
        if above in times and below in times:
            ratio = statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))
            met = ratio >= goal if direction == "at least" else ratio <= goal
            print(f"  {key:6} {above} / {below}: {ratio:.2f}, {direction} {goal}: {'met' if met else 'MISSED'}")
            kept["goals"].append({"row": key, "ratio": [above, below], "value": ratio, "goal": [direction, goal]})
    if options.json:
        options.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
