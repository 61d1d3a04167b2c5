"""Small programs from data to result, written to be read: ``fastlstm demo --task NAME`` runs ``fastlstm.demo.NAME``.

They use the public API as any program would. Nothing is downloaded: the data are simulated or in the folder ``data``,
whose ``SOURCES.txt`` names sources and licences.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from fastlstm.demo.tools import DemoResult, Options, array_library
from fastlstm.errors import ArgumentError
from fastlstm.training import arguments

__all__ = ["TASKS", "DemoResult", "Options", "run_demo"]

# A task is a module of this package with PACKAGES (what it needs besides fastlstm's own dependencies) and
# run(options) -> DemoResult. A "-" in its name is a "_" in the module's name.
TASKS = {
    "lorenz": "forecast a chaotic system from noisy measurements of one of its three variables",
    "vowels": "tell nine speakers apart by their vowels (JapaneseVowels, sequences of different lengths)",
    "separation": "separate two mixed sources, by an LSTM that sets the weights of the layer it watches",
    "gradients": "show how gradients flow back in time: plain RNNs, LSTMs, the cell of 1997",
    "temporal-order": "tell the order of two symbols, with the cell of 1997 (task 6a of its paper)",
    "adding": "add two marked numbers, with the cell of 1997 (task 4 of its paper)",
    "co2": "forecast the weekly CO2 record of Mauna Loa, where a simple baseline is hard to beat",
}


def run_demo(
    task: str = "lorenz",
    device: str = "cpu",
    seed: int = 0,
    out: str | Path = Path("fastlstm-demo"),
    batches: int | None = None,
) -> DemoResult:
    """Train, evaluate and save one demo, with a progress bar on stderr.

    Parameters
    ----------
    task : str
        One of :data:`TASKS`, which describes them.
    device : {"cpu", "cuda"}
        Train on NumPy or on CuPy arrays.
    seed : int
        Determines the initial parameters, the batches and the simulated data; at least 0.
    out : path
        Folder for the files that the demo writes; created if it does not exist.
    batches : int, optional
        Batches to train on, at least 1; for `gradients` updates, for `temporal-order` and `adding` the most sequences.
        Each task has its own default.

    Returns
    -------
    DemoResult
        The report to print, the scores in it, and the files written.

    Raises
    ------
    ArgumentError
        If there is no such task or device, `seed` is not an integer of at least 0, `batches` is not an integer of at
        least 1, or `out` is not a folder.
    BackendError
        If the demo's packages or the device are missing; the message says what to install.
    """
    if task not in TASKS:
        raise ArgumentError(f"there is no task {task!r}; choose one of {', '.join(TASKS)}")
    seed = arguments.count("seed", seed)
    if batches is not None:
        batches = arguments.count("batches", batches, least=1)
    module = import_module(f"fastlstm.demo.{task.replace('-', '_')}")
    xp = array_library(device, module.PACKAGES)
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"cannot create the folder {out}: {error.strerror}") from error
    result: DemoResult = module.run(Options(xp, seed, out, batches))
    return result
