"""``fastlstm check``: every backend that runs here against the reference in float64, over a grid of cases."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from fastlstm import dispatch
from fastlstm.lstm import LSTM

__all__ = ["BOUNDS", "Agreement", "Case", "cases", "compare"]

# Largest error allowed, as a share of the largest true value of its array. Float32 keeps 24 bits (6e-8), and
# the longest sums here have some hundred terms of either sign; float64 keeps 53 bits (1e-16).
BOUNDS = {"float32": 1e-5, "float64": 1e-13}


class Case(NamedTuple):
    """One model and batch to compare on."""

    steps: int
    batch: int
    input_size: int
    hidden_size: int
    num_layers: int
    bidirectional: bool
    bias: bool
    ragged: bool


class Agreement(NamedTuple):
    """The largest error of one quantity on one backend, over all cases."""

    backend: str
    dtype: str
    quantity: str
    error: float
    case: Case

    @property
    def within_bound(self) -> bool:
        """Whether the error is in its bound; an error that is no number is not."""
        return bool(self.error <= BOUNDS[self.dtype])


def cases() -> Iterator[Case]:
    """The grid: sizes of one, odd sizes and whole vectors, layers, directions, bias, ragged batches."""
    sizes = [(1, 1, 1, 1), (3, 2, 5, 3), (7, 5, 4, 17), (12, 8, 16, 32), (9, 13, 3, 65)]
    for steps, batch, inputs, hidden in sizes:
        for num_layers, bidirectional in ((1, False), (1, True), (2, False), (3, True)):
            for bias, ragged in ((True, False), (False, True), (True, True)):
                yield Case(steps, batch, inputs, hidden, num_layers, bidirectional, bias, ragged)


def compare(backend: str) -> list[Agreement]:
    """Compare one backend with the float64 reference; the largest error of each quantity, per dtype.

    Raises
    ------
    BackendError
        If there is no such backend, or it cannot run here.
    """
    dispatch.backend_named(backend)
    worst: dict[tuple[str, str], Agreement] = {}
    library = import_module(dispatch.library_of(backend))
    for number, case in enumerate(cases()):
        for dtype in BOUNDS:
            for quantity, error in _errors(case, backend, library, dtype, seed=number).items():
                found = worst.get((dtype, quantity))
                if found is None or not error <= found.error:
                    worst[dtype, quantity] = Agreement(backend, dtype, quantity, error, case)
    return sorted(worst.values())


def _errors(case: Case, backend: str, library: Any, dtype: str, seed: int) -> dict[str, float]:
    """Run one case on the backend and on the reference; the error of each quantity."""
    rng = np.random.default_rng(seed)
    model = LSTM(
        case.input_size, case.hidden_size, case.num_layers, case.bias, bidirectional=case.bidirectional, dtype=dtype,
        seed=rng,
    )  # fmt: skip
    features = model.cell.output_size
    state_shape = (case.num_layers * model.cell.num_directions, case.batch, case.hidden_size)
    drawn = {
        "x": (case.steps, case.batch, case.input_size), "dy": (case.steps, case.batch, features),
        "h0": state_shape, "c0": state_shape, "dh_n": state_shape, "dc_n": state_shape,
    }  # fmt: skip
    data = {name: rng.normal(size=shape).astype(dtype) for name, shape in drawn.items()}
    lengths = rng.integers(0, case.steps + 1, case.batch) if case.ragged else None
    exact = LSTM._from(
        model.cell.with_dtype("float64"), {name: p.astype("float64") for name, p in model.params.items()}, False
    )
    truth = _run(exact, "reference", {name: v.astype("float64") for name, v in data.items()}, lengths)
    found = _run(model.to(library), backend, {name: library.asarray(v) for name, v in data.items()}, lengths)
    return {name: _error(_host(found[name]), truth[name]) for name in truth}


def _run(model: LSTM, backend: str, data: dict[str, Any], lengths: Any) -> dict[str, Any]:
    """Output, states and every gradient by name; parameters of all layers and directions under one name each."""
    with dispatch.use_backend(backend):
        y, (h_n, c_n), tape = model.forward(data["x"], (data["h0"], data["c0"]), lengths)
        grads = model.backward(tape, data["dy"], (data["dh_n"], data["dc_n"]))
    result = {"y": [y], "h_n": [h_n], "c_n": [c_n], "dx": [grads.x]}
    result |= {"dh0": [grads.state[0]], "dc0": [grads.state[1]]}
    for name, value in grads.params.items():
        result.setdefault("d" + name.partition("_l")[0], []).append(value)
    return result


def _host(values: list[Any]) -> list[Any]:
    return [value if isinstance(value, np.ndarray) else value.get() for value in values]


def _error(found: list[Any], truth: list[Any]) -> float:
    """Return the largest error of each array relative to its largest true value, over all arrays; NaN stays."""
    errors = [
        float(np.abs(f - t).max() / max(float(np.abs(t).max()), np.finfo(np.float32).tiny))
        for f, t in zip(found, truth, strict=True)
        if t.size
    ]
    return float(np.max(errors)) if errors else 0.0
