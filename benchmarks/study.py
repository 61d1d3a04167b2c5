"""Beyond kernels: training end to end, the closed loop, ragged batches, memory, start, threads, growth.

    python benchmarks/study.py loop
    python benchmarks/study.py all --out benchmarks/results/NAME-OF-THE-MACHINE

Each study is a module of ``benchmarks/studies`` that says what it measures, pairs all sides in one run by the method of
``fastlstm.bench.clock``, and gives its cases one by one. With ``--out`` they are kept in ``FOLDER/STUDY.json``, from
which ``benchmarks/figures.py`` makes the figures of the README.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from studies import NAMES, record, show
from studies.record import Study

import fastlstm
from fastlstm.bench import peers
from fastlstm.diagnostics import describe_for_others


def begin(name: str, module: Any, threads: int) -> Study:
    """Return a study without cases: the machine, and who is not here."""
    # Starts a process, which has to be before some of the peers start their threads.
    machine = describe_for_others()
    sides = [side for side in module.SIDES if side in peers.CONTENDERS]
    reasons = {side: peers.missing(side, threads) for side in sides}
    packages = {package for side in sides if reasons[side] is None for package in peers.CONTENDERS[side].packages}
    return Study(
        name,
        module.ABOUT,
        machine | {package: version(package) for package in sorted(packages)},
        threads,
        absent={side: reason for side, reason in reasons.items() if reason is not None},
        made=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def run(name: str, threads: int, seconds: float, keep: Callable[[Study], Any]) -> Study:
    """Run one study; `keep` is given what there is, after each case."""
    module = import_module(f"studies.{name}")
    study = begin(name, module, threads)
    for case in module.measure(threads, seconds):
        study = study.with_case(case)
        keep(study)
    return study


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=(*NAMES, "all"))
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write STUDY.json there, anew after each case")
    parser.add_argument("--threads", type=int, default=fastlstm.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for each case; default: %(default)s")
    options = parser.parse_args(arguments)
    if options.study == "all":  # each in a process of its own: no study meets the threads or the memory of another
        given = ["--threads", str(options.threads), "--seconds", str(options.seconds)]
        given += ["--out", str(options.out)] if options.out else []
        return max(subprocess.run([sys.executable, __file__, name, *given], check=False).returncode for name in NAMES)

    def keep(study: Study) -> None:
        for line in show.lines_of(study.cases[-1]):
            print(line, flush=True)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            record.save(options.out / f"{study.study}.json", study)

    print(import_module(f"studies.{options.study}").ABOUT)
    study = run(options.study, options.threads, options.seconds, keep)
    for side, reason in study.absent.items():
        print(f"{side} is not measured: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
