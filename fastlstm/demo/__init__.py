"""Small tasks from data to result, written to be read: two on real data, and three about the cell of 1997.

``fastlstm demo`` runs them. All use the public API as any program would; their data comes inside Python packages
(``pip install "fastlstm[demo]"``), so nothing is downloaded.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from fastlstm.demo.tools import DemoResult, array_library
from fastlstm.errors import ArgumentError
from fastlstm.training import arguments

__all__ = ["TASKS", "DemoResult", "run_demo"]

TASKS = {
    "co2": "forecast the weekly CO2 record of Mauna Loa",
    "vowels": "tell nine speakers apart by how they say two vowels (JapaneseVowels)",
    "gradients": "show how gradients flow back in time: plain RNNs, LSTMs, the cell of 1997",
    "temporal-order": "tell the order of two symbols, with the cell of 1997 (task 6a of its paper)",
    "adding": "add two marked numbers, with the cell of 1997 (task 4 of its paper)",
}


def run_demo(task: str = "co2", device: str = "cpu", seed: int = 0, out: Path = Path("fastlstm-demo")) -> DemoResult:
    """Train, evaluate and save one demo, with a progress bar on stderr.

    Parameters
    ----------
    task : {"co2", "vowels", "gradients", "temporal-order", "adding"}
        Which demo; :data:`TASKS` describes them.
    device : {"cpu", "cuda"}
        Whether to train on NumPy or on CuPy arrays.
    seed : int
        Determines the initial parameters and the batches, at least 0.
    out : path
        Folder for the files that the demo writes; created if it is not there.

    Returns
    -------
    DemoResult
        The report to print, the scores in it, and the files written.

    Raises
    ------
    ArgumentError
        If there is no such task or device, or `seed` is no integer of at least 0.
    BackendError
        If the demo's packages or the device are missing; the message says what to install.
    """
    if task not in TASKS:
        raise ArgumentError(f"there is no task {task!r}; choose one of {', '.join(TASKS)}")
    seed = arguments.count("seed", seed)
    module = import_module(f"fastlstm.demo.{task.replace('-', '_')}")
    xp = array_library(device, module.PACKAGES)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    result: DemoResult = module.run(xp, seed, out)
    return result
