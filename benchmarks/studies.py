"""Studies beyond the grids of ``fastlstm bench``: each supports a promise of the documentation.

    python benchmarks/studies.py loop
    python benchmarks/studies.py all --out benchmarks/results/NAME-OF-THE-MACHINE

A study is a function that gives cases; its docstring says what is measured. All use the timing loop of
``fastlstm.bench.clock``. With ``--out`` the cases are kept in ``FOLDER/STUDY.json``.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import math
import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import bounds
import closed_loop as loops
import numpy as np

import fastlstm
from fastlstm import LSTM, RNN
from fastlstm.bench import clock, grid, peers, report, results, run, sides
from fastlstm.bench.results import Case, Results
from fastlstm.bench.sides import Side
from fastlstm.bench.work import DTYPES, Problem, Work

OURS = peers.CPU
ON_CPU = tuple(name for name, contender in peers.CONTENDERS.items() if contender.device == "cpu")
PADDED, RECOMPUTED, LIVE, NUMBA = (
    "fastlstm, padded", "fastlstm, recompute", "fastlstm, not frozen", "importing Numba")  # fmt: skip
GROWING, FIXED, SAVED = "numbers per unit, step and sequence", "bytes that do not grow with T", "share of the memory"


def _here(names: tuple[str, ...] = ON_CPU) -> list[str]:
    return [name for name in names if peers.missing(name) is None]


def _case(name: str, builders: run.Builders, seconds: float, tolerances: Any = None, **fields: Any) -> Case:
    """Measure sides; an interrupt or a failure of our own side ends the study."""
    dtype = fields.pop("dtype", "float32")
    case, interrupted = run.measure_sides(name, builders, dtype, seconds, tolerances)
    if interrupted:
        raise KeyboardInterrupt
    if OURS not in case.values:
        raise RuntimeError(f"{name}: {case.refused.get(OURS, 'the CPU backend cannot run here')}")
    facts = fields.pop("facts", {})
    return replace(case, facts=facts, **fields)  # first results belong to the study of starts


def _work_case(work: Work, name: str, threads: int, seconds: float, names: list[str] | None = None) -> Case:
    problem, able = Problem.of(work), [side for side in names or _here() if peers.able(side, work)]
    builders = {side: functools.partial(peers.contender(side).build, problem, threads) for side in able}
    return _case(name, builders, seconds, dtype=work.dtype, threads=threads, work=work)


def hydrology(threads: int, seconds: float) -> Iterator[Case]:
    """A rainfall-runoff model in float32: a year of days (T=365) for B=256 catchments, I=32, H=256."""
    for kind, words in (("infer", "inference"), ("train", "a training pass")):
        yield _work_case(Work(365, 256, 32, 256, kind=kind), words, threads, seconds)


def ragged(threads: int, seconds: float) -> Iterator[Case]:
    """Ragged batches in float32, lengths between T/2 and T, unsorted.

    PyTorch packs and unpacks them in each call. The last cases are our ragged batches against the same batches padded.
    """
    for shape in (grid.RAGGED, grid.RAGGED_GOAL):
        for kind, words in (("train", "a training pass"), ("infer", "inference")):
            yield _work_case(Work.ragged(*shape, kind=kind), f"{words}, T up to {shape[0]}", threads, seconds)
    for shape in (grid.RAGGED, grid.RAGGED_GOAL):
        both = {OURS: Problem.of(Work.ragged(*shape)), PADDED: Problem.of(Work(*shape, kind="train"))}
        builders = {name: functools.partial(sides.cpu, problem, threads) for name, problem in both.items()}
        facts = {"share of the padded steps": both[OURS].work.rows / both[PADDED].work.rows}
        name = f"a training pass, T up to {shape[0]}, against ourselves padded"
        yield _case(name, builders, seconds, {PADDED: math.inf}, facts=facts, threads=threads)


def freeze(threads: int, seconds: float) -> Iterator[Case]:
    """A frozen model, whose weights are packed once, against the same model as it was, in float32."""
    streams = ((1, 1, 32, 64), (1, 8, 32, 64), (1, 1, 128, 256), (1, 32, 10, 100), (1, 64, 64, 128), (1, 32, 128, 256))
    sequences = ((1, 1, 128, 256), (10, 1, 32, 64), (100, 1, 32, 64), (10, 32, 64, 128), (100, 32, 64, 128))
    for work in [*(Work(*shape, kind="stream") for shape in streams), *(Work(*shape) for shape in sequences)]:
        problem = Problem.of(work)
        ways = {OURS: sides.cpu, LIVE: sides.not_frozen}
        builders = {name: functools.partial(way, problem, threads) for name, way in ways.items()}
        yield _case(f"{work.name} {work.kind}", builders, seconds, threads=threads)


STEP_VARIANTS: dict[str, dict[str, Any]] = {
    "peepholes": {"peephole": True},
    "no forget gate": {"forget_gate": False},
    "coupled gates": {"coupled": True},
    "1997, blocks of 2": {"forget_gate": False, "block_size": 2, "activations": ("sigmoid", "1997", "1997")},
    "activations": {"activations": ("hard_sigmoid", "softsign", "relu")},
    "clips": {"clip": 3.0, "cell_clip": 3.0},
}
TRUNCATED, RNN_NAME = "truncated", "plain RNN"
PHASES: dict[str, dict[str, Any]] = {
    "projection to H/2": {"proj_size": None},  # by H
    "layer norm": {"layer_norm": True},
    "zoneout": {"zoneout": (0.1, 0.1)},
    "recurrent dropout": {"recurrent_dropout": 0.25},
}


def family(threads: int, seconds: float) -> Iterator[Case]:
    """The family of cells against the plain LSTM of the same sizes, in float32: what a variant costs."""
    fields = STEP_VARIANTS | {TRUNCATED: {"truncated": True}} | PHASES
    for shape in ((100, 32, 64, 128), (50, 64, 128, 256)):
        for kind in ("infer", "train"):
            plain = Problem.of(Work(*shape, kind=kind))
            inputs, hidden = plain.work.inputs, plain.work.hidden
            models: dict[str, Any] = {}
            for name, given in fields.items():
                size = {"proj_size": hidden // 2} if "proj_size" in given else given
                models[name] = LSTM(inputs, hidden, seed=0, **size)
            models[RNN_NAME] = RNN(inputs, hidden, seed=0)
            builders = {OURS: functools.partial(sides.cpu, plain, threads)} | {
                name: functools.partial(sides.cpu, _with_model(plain, model), threads) for name, model in models.items()
            }
            unlike = dict.fromkeys(models, math.inf)  # they compute something else: nothing is compared
            yield _case(plain.work.title, builders, seconds, unlike, threads=threads)


def _with_model(problem: Problem, model: Any) -> Problem:
    """Return a problem with another model, of which the output may have other features."""
    return replace(problem, model=model, dy=np.ascontiguousarray(problem.dy[..., : model.cell.output_size]))


def extra_bytes(model: LSTM, steps: int, batch: int, lengths: Any = None, *, recompute: bool = False) -> int:
    """Most bytes that a training pass holds at once beyond its inputs and outputs, as tracemalloc sees them."""
    from fastlstm.backends.cpu.workspace import POOL

    rng = np.random.default_rng(0)
    x, dy = (
        rng.standard_normal((steps, batch, width)).astype(model.cell.dtype)
        for width in (model.cell.input_size, model.cell.output_size)
    )

    def train() -> tuple[Any, ...]:
        y, state, tape = model.forward(x, lengths=lengths, recompute=recompute)
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
    for dtype in DTYPES:
        for steps, batch, inputs, hidden in (
            (100, 32, 64, 128),
            (365, 64, 32, 256),
            (1000, 32, 10, 128),
            (16384, 8, 16, 64),
        ):
            model = LSTM(inputs, hidden, dtype=dtype, seed=0)
            once, twice = extra_bytes(model, steps, batch), extra_bytes(model, 2 * steps, batch)
            growing = (twice - once) / (steps * batch * hidden * model.cell.dtype.itemsize)
            facts = {GROWING: growing, FIXED: float(max(0, 2 * once - twice))}
            yield Case(
                f"{steps},{batch},{inputs},{hidden} {dtype}", {OURS: (float(once),)}, "bytes", threads, facts=facts
            )


def recompute(threads: int, seconds: float) -> Iterator[Case]:
    """A training pass that computes the gates again (`recompute=True`) against one that keeps all; equal gradients."""

    def side(problem: Problem, again: bool) -> Side:
        def train() -> tuple[Any, ...]:
            y, _, tape = problem.model.forward(problem.x, recompute=again)
            grads = problem.model.backward(tape, problem.dy)
            return y, grads.x, *grads.params.values()

        return Side(train, train)

    for dtype in DTYPES:
        for shape in ((100, 1, 128, 256), (100, 32, 64, 128), (365, 64, 32, 256), (50, 64, 512, 512)):
            problem = Problem.of(Work(*shape, dtype, "train"))
            with sides.cpu(problem, threads):  # sets the threads
                built = {OURS: side(problem, False), RECOMPUTED: side(problem, True)}
                builders = {name: functools.partial(nullcontext, made) for name, made in built.items()}
                less, whole = (extra_bytes(problem.model, *shape[:2], recompute=again) for again in (True, False))
                name, facts = f"{problem.work.name} {dtype}", {SAVED: less / whole}
                yield _case(name, builders, seconds, dtype=dtype, facts=facts, threads=threads)


def growth(threads: int, seconds: float) -> Iterator[Case]:
    """A training pass in float32, one size varied at a time: the time has to be linear in T, however long."""
    sweeps = {
        "T": [(t, 4, 8, 16) for t in (512, 2048, 8192, 32768, 65536, 131072)],
        "B": [(50, b, 64, 64) for b in (1, 4, 16, 64, 256, 1024)],
        "H": [(50, 16, 64, h) for h in (16, 32, 64, 128, 256, 512, 1024)],
    }
    for axis, shapes in sweeps.items():
        for shape in shapes:
            size = shape["TBIH".index(axis)]
            case = _work_case(Work(*shape, kind="train"), f"{axis}={size:,}", threads, seconds, _here((OURS, "torch")))
            yield replace(case, group=f"training pass against {axis}")


def threads(threads: int, seconds: float) -> Iterator[Case]:
    """The same work on one thread, two, and so on, in turn; our results are compared bit by bit first."""
    counts = range(1, threads + 1)
    for shape in ((100, 32, 64, 128), (365, 64, 32, 256)):
        for kind in ("infer", "train"):
            problem = Problem.of(Work(*shape, kind=kind))
            bits = set()
            for count in counts:
                with sides.cpu(problem, count) as side:
                    bits.add(b"".join(array.tobytes() for array in side.outputs()))
            if len(bits) > 1:
                raise RuntimeError(f"{problem.work.title}: not bit-identical on 1 to {threads} threads")
            pairs = [(name, count) for name in _here((OURS, "torch")) for count in counts]
            builders = {f"{name} {count}": functools.partial(_held, name, problem, count) for name, count in pairs}
            case, interrupted = run.measure_sides(problem.work.title, builders, "float32", seconds * threads)
            if interrupted:
                raise KeyboardInterrupt
            for count in counts:
                values = {side.rpartition(" ")[0]: v for side, v in case.values.items() if side.endswith(f" {count}")}
                facts = {"speed-up": clock.ratio(case.values[f"{OURS} 1"], values[OURS]).middle}
                name = f"{problem.work.name} {kind}, {count} thread{'s' * (count > 1)}"
                yield Case(name, values, threads=count, work=problem.work, facts=facts, refused=case.refused)


@contextmanager
def _held(name: str, problem: Problem, count: int) -> Iterator[Side]:
    """Build a side that sets its number of threads before each sample: sides in turn have different ones."""
    set_threads = fastlstm.set_num_threads if name == OURS else import_module("torch").set_num_threads

    def first(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: (set_threads(count), function(*given))[1]

    with peers.contender(name).build(problem, count) as side:
        yield Side(side.call, first(side.outputs), first(side.seconds))


def loop(threads: int, seconds: float) -> Iterator[Case]:
    """A closed loop of 1,000 steps, float32: the next input is the first I units of h, plus noise.

    Our model is frozen, and called once a step from Python, or in `@njit`. PyTorch is called as nn.LSTM with T=1 and as
    nn.LSTMCell, ONNX Runtime as a graph of one step.
    """
    work = loops.INFER
    name = f"{loops.STEPS:,} steps, B={work.batch}, H={work.hidden}"
    yield _loop_case(loops.inference, work, name, threads, seconds)


def closed_loop(threads: int, seconds: float) -> Iterator[Case]:
    """The same loop trained, float32: forward and backward through 1,000 steps; and steps of one small sequence.

    We are called once a step from Python, or the loop is in `@njit`; PyTorch is nn.LSTM with T=1, once a step. The open
    loop is one call for the same inputs, without the feedback.
    """
    work = loops.TRAIN
    name = f"training, B={work.batch}, I={work.inputs}, H={work.hidden}"
    yield _loop_case(loops.training, work, name, threads, seconds, {loops.OPEN: math.inf})
    work = loops.SMALL
    name = f"{loops.STEPS:,} small steps, B={work.batch}, I={work.inputs}, H={work.hidden}"
    yield _loop_case(loops.inference, work, name, 1, seconds, names=[])


def _loop_case(
    build: Callable[..., dict[str, Side]], work: Work, name: str, threads: int, seconds: float,
    tolerances: Any = None, names: list[str] | None = None,
) -> Case:  # fmt: skip
    problem = Problem.of(work)
    with sides.cpu(problem, threads):  # sets the threads
        built = build(problem, threads, _here((OURS, "torch", "onnxruntime")) if names is None else names)
        builders = {side: functools.partial(nullcontext, made) for side, made in built.items()}
        return _case(name, builders, seconds, tolerances, threads=threads)


def roofs(threads: int, seconds: float) -> Iterator[Case]:
    """Whole calls in float32, in turn with lower bounds of the machine (``bounds.py``), on one thread and on all."""
    works = [Work(*shape, kind=kind) for kind in ("infer", "train") for shape in grid.GOALS]
    works += [Work(*shape, kind="stream") for shape in grid.GOALS[:2]]
    for count in sorted({1, threads}):
        for work in works:
            builders = {OURS: functools.partial(sides.cpu, Problem.of(work), count)} | bounds.of(work, count)
            name = f"{work.name} {work.kind}, {count} thread{'s' * (count > 1)}"
            never = dict.fromkeys(builders, math.inf)
            yield _case(name, builders, seconds, never, threads=count, bounds=tuple(builders)[1:])


# The sides print the seconds of each of PARTS, and how many kernels they compiled.
PARTS = ("import", "training pass", "inference", "step")
_CLOCK = """
import json, sys, time
import numpy as np
x = np.random.default_rng(0).standard_normal((100, 32, 64), np.float32)
times, compiled = [time.perf_counter()], 0
def lap():
    times.append(time.perf_counter())
"""
SCRIPTS = {
    OURS: """
import fastlstm
lap()
model = fastlstm.LSTM(64, 128, seed=0)
y, _, tape = model.forward(x)
model.backward(tape, y)
lap()
model(x)
lap()
model.step(x[0, :1])
model.freeze().step(x[0, :1])
lap()
from fastlstm.kernels.cpu.jit import KERNELS
compiled = sum(sum(kernel.stats.cache_misses.values()) for kernel in KERNELS)
""",
    "torch": """
import torch
lap()
torch.set_num_threads(int(sys.argv[1]))
model = torch.nn.LSTM(64, 128)
leaf = torch.from_numpy(x).requires_grad_()
y = model(leaf)[0]
y.backward(y.detach())
lap()
with torch.inference_mode():
    model(torch.from_numpy(x))
    lap()
    for _ in range(2):
        model(torch.from_numpy(x[:1, :1]))
lap()
""",
    NUMBA: "\nimport numba\nlap()\n",
}
_PRINT = '\nprint(json.dumps({"seconds": [b - a for a, b in zip(times, times[1:])], "compiled": compiled}))\n'


def start(threads: int, seconds: float, rounds: int = 5) -> Iterator[Case]:
    """Seconds in a new process, float32, T=100, B=32, I=64, H=128: import, training pass, inference, single steps.

    Cold is a process that finds no compiled kernel, warm the next one. A first call includes all that it loads, such as
    Numba, whose import is also measured by itself. Medians of five processes, the sides in turn.
    """
    names = [*_here((OURS, "torch")), NUMBA]
    found: dict[tuple[str, str], list[list[float]]] = {(when, name): [] for when in ("cold", "warm") for name in names}
    for turn in range(rounds + 1):
        for name in names if turn % 2 == 0 else names[::-1]:
            with tempfile.TemporaryDirectory() as folder:
                for when in ("cold", "warm"):
                    times, compiled = started(name, threads, Path(folder))
                    if name == OURS and bool(compiled) != (when == "cold"):
                        raise RuntimeError(f"a {when} process compiled {compiled} kernels")
                    if turn:  # the first brings every file into the system's cache
                        found[when, name].append(times)
    names.remove(NUMBA)
    for when in ("cold", "warm"):
        for number, part in enumerate(PARTS):
            values = {name: tuple(times[number] for times in found[when, name]) for name in names}
            yield Case(f"{when}: {part}", values, threads=threads)
        values = {name: tuple(sum(times[1:]) for times in found[when, name]) for name in names}
        values |= {NUMBA: tuple(times[0] for times in found[when, NUMBA])}
        yield Case(f"{when}: all three calls", values, threads=threads, bounds=(NUMBA,))
        values = {name: tuple(sum(times) for times in found[when, name]) for name in names}
        yield Case(f"{when}: import and calls", values, threads=threads)


def started(name: str, threads: int, cache: Path) -> tuple[list[float], int]:
    """Start a process of one side; the seconds of each part, and how many kernels it compiled."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("NUMBA_", "FASTLSTM_"))}
    environment |= {"NUMBA_CACHE_DIR": str(cache), "FASTLSTM_NUM_THREADS": str(threads), "FASTLSTM_QUIET": "1"}
    # -P: its folder is not searched for modules, so that the fastlstm that is installed is measured.
    command = [sys.executable, "-P", "-c", _CLOCK + SCRIPTS[name] + _PRINT, str(threads)]
    done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed to start: {done.stderr.strip().splitlines()[-1:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    return result["seconds"], result["compiled"]


STUDIES: dict[str, Callable[[int, float], Iterator[Case]]] = {
    study.__name__: study
    for study in (
        loop,
        closed_loop,
        ragged,
        hydrology,
        memory,
        recompute,
        freeze,
        family,
        roofs,
        start,
        threads,
        growth,
    )
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
    study = STUDIES[options.study]
    found: Results = run.begin(options.study, ON_CPU, options.threads, inspect.getdoc(study) or "")[0]
    for case in study(options.threads, options.seconds):
        found = found.with_case(case)
        print(f"{case.name}: " + ", ".join(f"{side} {report.cell(case, side)}" for side in case.values), flush=True)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            results.save(options.out / f"{options.study}.json", found)
    print(found.about, *report.text(found), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
