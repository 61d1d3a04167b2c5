"""Studies beyond the grids of ``fastlstm bench``: each supports a promise of the documentation.

    python benchmarks/studies.py memory
    python benchmarks/studies.py all --out benchmarks/results/NAME-OF-THE-MACHINE

A study is a function that gives cases; its docstring says what is measured. All use the timing loop of
``fastlstm.bench.clock``. With ``--out`` the cases are kept in ``FOLDER/STUDY.json``.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import math
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import closed_loop as loops
import numpy as np
from first_calls import start

import fastlstm
from fastlstm import LSTM, RNN
from fastlstm.bench import grid, peers, report, results, run, sides
from fastlstm.bench.results import Case, Results
from fastlstm.bench.sides import Side
from fastlstm.bench.work import DTYPES, Problem, Work

OURS = peers.CPU
ON_CPU = tuple(name for name in peers.CONTENDERS if results.device_of(name) == "cpu")
PADDED, RECOMPUTED, LIVE = "fastlstm, padded", "fastlstm, recompute", "fastlstm, not frozen"
GROWING, FIXED, SAVED = "numbers per unit, step and sequence", "bytes that do not grow with T", "share of the memory"


def _here(names: tuple[str, ...] = ON_CPU) -> list[str]:
    return [name for name in names if peers.missing(name) is None]


def _checked(case: Case, **fields: Any) -> Case:
    """Return a case with other fields; a failure of our own side ends the study."""
    if OURS not in case.values:
        raise RuntimeError(f"{case.name}: {case.refused or 'the CPU backend cannot run here'}")
    return replace(case, **{"facts": {}} | fields)  # first results belong to the study of starts


def _case(name: str, builders: run.Builders, *given: Any, dtype: str = "float32", **fields: Any) -> Case:
    return _checked(run.measure_sides(name, builders, *given, dtype=dtype), **fields)


def _on_cpu(threads: int, problems: Mapping[str, Problem]) -> run.Builders:
    """Return builders of our CPU side for problems by name."""
    return {name: functools.partial(sides.cpu, problem, threads) for name, problem in problems.items()}


def ragged(threads: int, seconds: float) -> Iterator[Case]:
    """Ragged batches in float32, lengths between T/2 and T, unsorted.

    PyTorch packs and unpacks them in each call. The last cases are our ragged batches against the same batches padded.
    """
    shapes = grid.RAGGED, grid.RAGGED_GOAL
    for shape, (kind, words) in itertools.product(shapes, (("train", "a training pass"), ("infer", "inference"))):
        case = run.measure_case(Work.ragged(*shape, kind=kind), _here(), threads, seconds)
        yield _checked(case, name=f"{words}, T up to {shape[0]}", group="")
    for shape in shapes:
        both = {OURS: Problem.of(Work.ragged(*shape)), PADDED: Problem.of(Work(*shape, kind="train"))}
        facts = {"share of the padded steps": both[OURS].work.rows / both[PADDED].work.rows}
        name = f"a training pass, T up to {shape[0]}, against ourselves padded"
        yield _case(name, _on_cpu(threads, both), threads, seconds, {PADDED: math.inf}, facts=facts)


def freeze(threads: int, seconds: float) -> Iterator[Case]:
    """A frozen model, whose weights are packed once, against the same model as it was, in float32."""
    streams = ((1, 1, 32, 64), (1, 8, 32, 64), (1, 1, 128, 256), (1, 32, 10, 100), (1, 64, 64, 128), (1, 32, 128, 256))
    sequences = ((1, 1, 128, 256), (10, 1, 32, 64), (100, 1, 32, 64), (10, 32, 64, 128), (100, 32, 64, 128))
    for work in [*(Work(*shape, kind="stream") for shape in streams), *(Work(*shape) for shape in sequences)]:
        problem = Problem.of(work)
        live = functools.partial(sides.cpu, problem, threads, frozen=False)
        builders = {**_on_cpu(threads, {OURS: problem}), LIVE: live}
        yield _case(f"{work.name} {work.kind}", builders, threads, seconds)


STEP_VARIANTS: dict[str, dict[str, Any]] = {
    "peepholes": {"peephole": True},
    "no forget gate": {"forget_gate": False},
    "coupled gates": {"coupled": True},
    "1997, blocks of 2": {"forget_gate": False, "block_size": 2, "activations": ("sigmoid", "1997", "1997")},
    "activations": {"activations": ("hard_sigmoid", "softsign", "relu")},
    "clips": {"clip": 3.0, "cell_clip": 3.0},
}
TRUNCATED, RNN_NAME, PROJECTED = "truncated", "plain RNN", "projection to H/2"
SHARED = "peepholes of shared gates"
PHASES: dict[str, dict[str, Any]] = {
    "layer norm": {"layer_norm": True},
    "zoneout": {"zoneout": (0.1, 0.1)},
    "recurrent dropout": {"recurrent_dropout": 0.25},
}


def family(threads: int, seconds: float) -> Iterator[Case]:
    """The family of cells against the plain LSTM of the same sizes, in float32: what a variant costs.

    Over whole sequences, and one step of one sequence, with frozen models.
    """
    fields = STEP_VARIANTS | {TRUNCATED: {"truncated": True}} | PHASES | {SHARED: {"peephole": True, "block_size": 2}}
    whole = itertools.product(((100, 32, 64, 128), (50, 64, 128, 256)), ("infer", "train"))
    for shape, kind in (*whole, ((1, 1, 32, 64), "stream")):
        plain = Problem.of(Work(*shape, kind=kind))
        inputs, hidden = plain.work.inputs, plain.work.hidden
        models: dict[str, Any] = {name: LSTM(inputs, hidden, seed=0, **given) for name, given in fields.items()}
        models[PROJECTED] = LSTM(inputs, hidden, proj_size=hidden // 2, seed=0)
        models[RNN_NAME] = RNN(inputs, hidden, seed=0)
        builders = _on_cpu(threads, {OURS: plain} | {name: _with_model(plain, m) for name, m in models.items()})
        unlike = dict.fromkeys(models, math.inf)  # they compute something else: nothing is compared
        yield _case(plain.work.title, builders, threads, seconds, unlike)


def _with_model(problem: Problem, model: Any) -> Problem:
    """Return a problem with another model, of which the output may have other features."""
    return replace(problem, model=model, dy=np.ascontiguousarray(problem.dy[..., : model.cell.output_size]))


def extra_bytes(model: LSTM, steps: int, batch: int, *, recompute: bool = False) -> int:
    """Most bytes that a training pass holds at once beyond its inputs and outputs, as tracemalloc sees them."""
    from fastlstm.backends.cpu.workspace import POOL

    rng = np.random.default_rng(0)
    widths = model.cell.input_size, model.cell.output_size
    x, dy = (rng.standard_normal((steps, batch, width)).astype(model.cell.dtype) for width in widths)

    def train() -> tuple[Any, ...]:
        y, state, tape = model.forward(x, recompute=recompute)
        grads = model.backward(tape, dy)
        return y, *state, grads.x, *grads.state, *grads.params.values()

    train()  # compiles, and starts the threads
    POOL.clear()  # memory kept from earlier calls would not be counted
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        outputs = train()
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return most - before - sum(array.nbytes for array in outputs)


def memory(threads: int, seconds: float) -> Iterator[Case]:
    """Most bytes allocated at once by forward and backward of one layer, beyond inputs and outputs.

    Measured for T steps and for 2 T: the difference is what grows with T, in numbers of the dtype for each hidden unit,
    step and sequence. `LSTM.backward` promises at most seven, where H is a multiple of the processor's vectors.
    """
    fastlstm.set_num_threads(threads)
    shapes = ((100, 32, 64, 128), (365, 64, 32, 256), (1000, 32, 10, 128), (16384, 8, 16, 64))
    for dtype, (steps, batch, inputs, hidden) in itertools.product(DTYPES, shapes):
        model = LSTM(inputs, hidden, dtype=dtype, seed=0)
        once, twice = extra_bytes(model, steps, batch), extra_bytes(model, 2 * steps, batch)
        growing = (twice - once) / (steps * batch * hidden * model.cell.dtype.itemsize)
        facts = {GROWING: growing, FIXED: float(max(0, 2 * once - twice))}
        name = f"{steps},{batch},{inputs},{hidden} {dtype}"
        yield Case(name, {OURS: (float(once),)}, "bytes", threads, facts=facts)


def recompute(threads: int, seconds: float) -> Iterator[Case]:
    """A training pass that computes the gates again (`recompute=True`) against one that keeps all; equal gradients."""
    shapes = ((100, 1, 128, 256), (100, 32, 64, 128), (365, 64, 32, 256), (50, 64, 512, 512))
    for dtype, shape in itertools.product(DTYPES, shapes):
        problem = Problem.of(Work(*shape, dtype, "train"))
        recomputed = functools.partial(sides.cpu, problem, threads, recompute=True)
        with sides.with_threads(threads):
            less, whole = (extra_bytes(problem.model, *shape[:2], recompute=again) for again in (True, False))
        builders, facts = {**_on_cpu(threads, {OURS: problem}), RECOMPUTED: recomputed}, {SAVED: less / whole}
        yield _case(f"{problem.work.name} {dtype}", builders, threads, seconds, dtype=dtype, facts=facts)


def growth(threads: int, seconds: float) -> Iterator[Case]:
    """A training pass in float32 over longer and longer sequences, B=4, I=8, H=16: the time has to be linear in T."""
    for steps in (512, 2048, 8192, 32768, 65536, 131072):
        case = run.measure_case(Work(steps, 4, 8, 16, kind="train"), _here((OURS, "torch")), threads, seconds)
        yield _checked(case, name=f"T={steps:,}", group="")


FORGET_BIAS = 3.0  # as neuralhydrology initialises it: with 0, gradients of T=365 underflow
# Of the initial recurrent weights. With 1, and that bias, the model is chaotic: rounding errors in float32 grow to 1e-3
# of a gradient, in both libraries.
SCALE = 0.5


def torch_lstm(threads: int, seconds: float) -> Iterator[Case]:
    """A training step with `fastlstm.torch.LSTM` (fastlstm) and with `torch.nn.LSTM` (torch), in PyTorch, float32.

    neuralhydrology's CudaLSTM: T=365 days, a linear head, the loss of the last day, backward, Adam.
    """
    if "torch" not in _here():
        return
    torch = import_module("torch")
    classes = {OURS: import_module("fastlstm.torch").LSTM, "torch": torch.nn.LSTM}
    for batch, inputs, hidden in itertools.product((64, 256), (5, 32), (64, 128)):
        work = Work(365, batch, inputs, hidden, kind="train")
        builders = {name: functools.partial(_torch_program, torch, lstm, work) for name, lstm in classes.items()}
        yield _case(f"B={batch}, I={inputs}, H={hidden}", builders, threads, seconds)


def _torch_program(torch: Any, lstm_class: Any, work: Work) -> Side:
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


def closed_loop(threads: int, seconds: float) -> Iterator[Case]:
    """A closed loop of 1,000 steps, float32: the next input is the first I units of h, plus noise.

    Trained: forward and backward, against PyTorch's nn.LSTM with T=1, and one call for the same inputs without the
    feedback (the open loop). Inference: our model is frozen; nn.LSTM with T=1, nn.LSTMCell, and a graph of one step in
    ONNX Runtime. Small: one sequence. We are called once a step from Python, or the loop is in `@njit`.
    """
    peers_here = _here((OURS, "torch", "onnxruntime"))
    for name, build, work, names in (
        ("training", loops.training, loops.TRAIN, peers_here),
        ("inference", loops.inference, loops.INFER, peers_here),
        ("small steps", loops.inference, loops.SMALL, []),
    ):
        count = threads if names else 1
        problem, unlike = Problem.of(work), {loops.OPEN: math.inf} if build is loops.training else None
        with sides.with_threads(count, names):
            made = build(problem, count, names)
        builders = {side: functools.partial(made.get, side) for side in made}
        yield _case(f"{name}, B={work.batch}, I={work.inputs}, H={work.hidden}", builders, count, seconds, unlike)


STUDIES: dict[str, Callable[[int, float], Iterator[Case]]] = {
    study.__name__: study
    for study in (ragged, memory, recompute, freeze, family, closed_loop, start, growth, torch_lstm)
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=(*STUDIES, "all"))
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write STUDY.json there, anew after each case")
    parser.add_argument("--threads", type=int, default=fastlstm.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for each case; default: %(default)s")
    options = parser.parse_args(arguments)
    if options.study == "all":  # each in a process of its own: no study meets the threads or memory of another
        given = ["--threads", str(options.threads), "--seconds", str(options.seconds)]
        given += ["--out", str(options.out)] if options.out else []
        return max(subprocess.run([sys.executable, __file__, name, *given], check=False).returncode for name in STUDIES)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    study, path = STUDIES[options.study], options.out and options.out / f"{options.study}.json"
    begun: Results = run.begin(options.study, ON_CPU, options.threads, inspect.getdoc(study) or "")
    found = run.keep(begun, study(options.threads, options.seconds), path, functools.partial(print, flush=True))
    print(found.about, *report.text(found), sep="\n\n")
    return 130 if found.interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
