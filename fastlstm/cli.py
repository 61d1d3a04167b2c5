"""The command line: ``fastlstm info``, ``check``, ``warm``, ``bench`` and ``demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastlstm import dispatch
from fastlstm.bench import command
from fastlstm.demo import TASKS
from fastlstm.errors import FastLSTMError
from fastlstm.lstm import LSTM

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command line without the program's name; that of this process by default.

    Returns
    -------
    int
        The exit status: 0 for success, 1 if a check failed, 2 for an error.
    """
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except FastLSTMError as error:
        print(f"fastlstm {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastlstm", description="An LSTM for NumPy and CuPy arrays.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="show versions, backends, processor, threads, caches and GPU")
    info.add_argument("--shape", type=_shape, metavar="T,B,I,H", help="show how a layer of this shape would run")
    info.set_defaults(run=_info)

    check = commands.add_parser("check", help="compare every backend with the float64 reference; status 1 if one fails")
    check.add_argument("--backend", action="append", help="check only this backend; may be repeated")
    check.set_defaults(run=_check)

    warm = commands.add_parser("warm", help="compile the CPU kernels ahead; status 1 if they cannot be written to disk")
    warm.add_argument("--dtype", choices=("float32", "float64", "both"), default="both", help="default: %(default)s")
    warm.add_argument("--train", action="store_true", help="compile the kernels for training, too")
    warm.add_argument(
        "--step", action="store_true", help="make single time steps, too; they share the kernels of short calls"
    )
    warm.add_argument("--loops", action="store_true", help="also those for closed loops: lstm.unroll and lstm.compiled")
    warm.set_defaults(run=_warm)

    bench = commands.add_parser("bench", help="measure the speed here, and that of the peers that are installed")
    command.add_arguments(bench)
    bench.set_defaults(run=command.bench)

    tasks = "".join(f"\n  {name:<16}{about}" for name, about in TASKS.items())
    demo = commands.add_parser(
        "demo",
        help="train a model, compare it with baselines, save it, and draw a picture",
        description=f"Train a model, compare it with baselines, save it, and draw a picture.\n\ntasks:{tasks}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_argument(
        "--task", choices=tuple(TASKS), metavar="NAME", default=next(iter(TASKS)), help="default: %(default)s"
    )
    demo.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    demo.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    demo.add_argument(
        "--batches", type=int, metavar="N", help="batches, or sequences, to train on; default: the task's"
    )
    demo.add_argument("--out", type=Path, default=Path("fastlstm-demo"), help="folder to write; default: %(default)s")
    demo.set_defaults(run=_demo)
    return parser


def _info(options: argparse.Namespace) -> int:
    from fastlstm.diagnostics import describe

    facts = describe()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    if options.shape:
        steps, batch, inputs, hidden = options.shape
        x = np.broadcast_to(np.float32(0), (steps, batch, inputs))
        print(f"\nT={steps} B={batch} I={inputs} H={hidden}, float32:", LSTM(inputs, hidden).plan(x))
    return 0


def _shape(text: str) -> tuple[int, ...]:
    """Read T,B,I,H."""
    sizes = tuple(int(part) for part in text.split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected four sizes of at least 1, T,B,I,H, got {text!r}")
    return sizes


def _check(options: argparse.Namespace) -> int:
    from fastlstm.diagnostics import BOUNDS, backends, cases, compare

    for name in options.backend or ():
        dispatch.backend_named(name)  # raises an error if it cannot run
    here = {} if options.backend else backends()
    for name, reason in here.items():
        if reason is not None:
            print(f"{name} is not checked: {reason}")
    chosen = options.backend or [name for name, reason in here.items() if reason is None]
    print(f"Largest error over {sum(1 for _ in cases())} cases, as a share of the largest true value of its array.")
    print(f"{'backend':<10} {'dtype':<8} {'quantity':<11} {'error':>9}  {'bound':>7}")
    failed = 0
    for name in chosen:
        for row in compare(name):
            verdict = "" if row.within_bound else f"  OUT OF BOUND at {row.case}"
            bound = BOUNDS[row.dtype]
            print(f"{row.backend:<10} {row.dtype:<8} {row.quantity:<11} {row.error:9.2e}  {bound:7.0e}{verdict}")
            failed += not row.within_bound
    print(f"{failed} out of bound." if failed else "All within bounds.")
    return 1 if failed else 0


def _warm(options: argparse.Namespace) -> int:
    from fastlstm.warm import warm

    dtypes = ("float32", "float64") if options.dtype == "both" else (options.dtype,)
    report = warm(dtypes, train=options.train, step=options.step, loops=options.loops)
    print(f"{'kernel':<22} {'compiled':>8} {'loaded':>6}")
    for name in report.compiled | report.loaded:
        print(f"{name:<22} {report.compiled.get(name, 0):8} {report.loaded.get(name, 0):6}")
    compiled, loaded = sum(report.compiled.values()), sum(report.loaded.values())
    print(f"{compiled} compiled, {loaded} loaded for {' and '.join(dtypes)} in {report.seconds:.1f} s")
    print(f"kernel cache: {report.cache}")
    if report.problem:
        print(f"fastlstm warm: kernels could not be kept: {report.problem}", file=sys.stderr)
        return 1
    return 0


def _demo(options: argparse.Namespace) -> int:
    from fastlstm.demo import run_demo

    result = run_demo(options.task, options.device, options.seed, options.out, options.batches)
    print(result.report)
    for path in result.files:
        print(f"wrote {path}")
    return 0
