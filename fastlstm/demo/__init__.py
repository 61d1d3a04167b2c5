"""Small tasks from data to result, written to be read: ``co2.py``, ``vowels.py`` and ``separation.py``.

``fastlstm demo`` runs them. They use the public API as any program would; their data comes inside Python packages
(``pip install "fastlstm[demo]"``) or is made, so nothing is downloaded.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from fastlstm.demo.tools import DEVICES, DemoResult, array_library
from fastlstm.errors import ArgumentError, BackendError
from fastlstm.training import arguments
from fastlstm.unroll import positive

__all__ = ["TASKS", "DemoResult", "run_demo"]

TASKS = {
    "co2": "forecast the weekly CO2 record of Mauna Loa",
    "vowels": "tell nine speakers apart by how they say two vowels (JapaneseVowels)",
    "separation": "separate two mixed sources, by an LSTM that sets the weights of the layer it watches",
}


def run_demo(
    task: str = "co2",
    device: str = "cpu",
    seed: int = 0,
    out: Path = Path("fastlstm-demo"),
    batches: int | None = None,
) -> DemoResult:
    """Train, evaluate and save one demo, with a progress bar on stderr.

    Parameters
    ----------
    task : {"co2", "vowels", "separation"}
        Which demo; :data:`TASKS` describes them.
    device : {"cpu", "cuda"}
        Whether to train on NumPy or on CuPy arrays.
    seed : int
        Determines the initial parameters and the batches, at least 0.
    out : path
        Folder for the files that the demo writes; created if it is not there.
    batches : int, optional
        How many batches to train on, for the task ``separation``.

    Returns
    -------
    DemoResult
        The report to print, the scores in it, and the files written.

    Raises
    ------
    ArgumentError
        If there is no such task or device, `seed` is no integer of at least 0, or `batches` no positive one, or is
        given for another task.
    BackendError
        If the demo's packages or the device are missing; the message says what to install.
    """
    if task not in TASKS:
        raise ArgumentError(f"there is no task {task!r}; choose one of {', '.join(TASKS)}")
    seed = arguments.count("seed", seed)
    if batches is not None:
        if task != "separation":
            raise ArgumentError(f"batches are for the task separation, and the task is {task!r}")
        batches = positive("batches", batches)
    module = import_module(f"fastlstm.demo.{task}")
    if device in DEVICES and device not in getattr(module, "DEVICES", DEVICES):
        raise BackendError(f"the task {task} runs on the CPU alone, got device {device!r}")
    xp = array_library(device, module.PACKAGES)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    result: DemoResult = module.run(xp, seed, out, *(() if batches is None else (batches,)))
    return result
