"""Forecast a chaotic system from noisy measurements of one of its three variables.

The Lorenz system (E. N. Lorenz, Journal of the Atmospheric Sciences 20, 1963) with its usual constants::

    dx/dt = 10 (y - x)        dy/dt = x (28 - z) - y        dz/dt = x y - 8/3 z

is simulated with the classical Runge-Kutta method. Only x is measured, every 0.05 time units, with Gaussian noise of
standard deviation 2 (x itself has 7.9). After each measurement the LSTM forecasts the next 20, one time unit. To do
so it has to infer y and z from the history, which is what a recurrent state is for. It is trained on the measurements
alone; all forecasts are scored against the noise-free x of times that come after the training data.

The naive baselines: the mean of x, the last measurement (persistence), and a linear autoregression on the last 40
measurements. Beside them a strong one, analogues (Lorenz, 1969): the mean of what followed the 20 stretches of the
training data that are most similar to the last 40 measurements. It searches all the training data for each forecast.
The baselines' settings were chosen in their favour, on seed 0.

Root mean square errors over all lead times, for seeds 0 to 9, each with its own simulation: LSTM 3.0 to 3.9, analogues
3.5 to 4.0, linear autoregression 7.1 to 7.3, mean 7.9 to 8.0, persistence 9.3 to 10.0. The LSTM has 0.42 to 0.53 times
the error of the best naive baseline, and 0.87 to 1.03 times that of the analogues.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fastlstm import LSTM
from fastlstm.demo.tools import DemoResult, Options, compile_first, new_figure, save_and_load, to_numpy
from fastlstm.training import Adam, Linear, clip_by_global_norm, join, mean_squared_error

PACKAGES = ("matplotlib", "tqdm")

INTERVAL, SUBSTEPS = 0.05, 5  # time units between measurements; Runge-Kutta steps in each interval
NOISE = 2.0  # standard deviation of the measurements' error
TRAINING, HELD_OUT = 20_000, 3_000  # measurements
AHEAD = 20  # measurements to forecast
HIDDEN = 48
WINDOW, BATCH, BATCHES = 100, 32, 1500  # each batch has BATCH windows of WINDOW measurements
WARM_UP = 20  # measurements at the start of each window whose forecasts do not count: the state starts at zero
RATE = 1e-2
LAGS = 40  # of the linear autoregression
STRETCH, NEIGHBOURS = 40, 20  # of the analogues

Array = np.ndarray[Any, Any]


def run(options: Options) -> DemoResult:
    """Simulate, train, save, load, forecast the held-out part, and compare with the baselines."""
    xp, rng = options.xp, np.random.default_rng(options.seed)
    truth = simulate(rng, TRAINING + HELD_OUT + AHEAD)
    measured = truth + NOISE * rng.normal(size=len(truth))

    scale = measured[:TRAINING].std()
    series = (measured / scale).astype(np.float32)
    lstm, head = train(xp, rng, series[:TRAINING], options.batches or BATCHES)
    lstm, head, files = save_and_load(options, "lorenz", lstm, head)

    # One call over the whole series: each forecast depends only on the measurements up to its own time.
    y, _ = lstm(xp.asarray(series[: TRAINING + HELD_OUT, None]))
    origins = np.arange(TRAINING, TRAINING + HELD_OUT)
    forecasts = {"LSTM": scale * to_numpy(head(y[TRAINING:]))} | baselines(measured, origins)
    errors = {name: forecast - following(truth, origins) for name, forecast in forecasts.items()}
    curves = {name: np.sqrt(np.mean(error**2, axis=0)) for name, error in errors.items()}  # (AHEAD,)
    scores = {name: float(np.sqrt(np.mean(error**2))) for name, error in errors.items()}

    picture = options.out / "lorenz.png"
    plot(picture, truth, measured, forecasts["LSTM"], curves)
    leads = [4, 9, 19]
    lines = [
        f"Lorenz system, {HELD_OUT} held-out times; root mean square error of x, by lead time in time units:",
        " " * 32 + "".join(f"{(lead + 1) * INTERVAL:8.2f}" for lead in leads) + "     all",
    ]
    lines += [
        f"  {name:30}" + "".join(f"{curves[name][lead]:8.2f}" for lead in leads) + f"{score:8.2f}"
        for name, score in scores.items()
    ]
    lines.append("  (analogues, a strong baseline, search all training data for each forecast; the others are naive)")
    return DemoResult("\n".join(lines), scores, (picture, *files))


def simulate(rng: np.random.Generator, count: int) -> Array:
    """Return `count` noise-free values of x, INTERVAL apart, after 200 intervals in which the start is forgotten."""

    def slope(state: Array) -> Array:
        x, y, z = state
        return np.array([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])

    state, step = np.array([0, 0, 25]) + rng.normal(size=3), INTERVAL / SUBSTEPS
    values = np.empty(200 + count)
    for k in range(len(values)):
        for _ in range(SUBSTEPS):
            first = slope(state)
            second = slope(state + step / 2 * first)
            third = slope(state + step / 2 * second)
            fourth = slope(state + step * third)
            state = state + step / 6 * (first + 2 * second + 2 * third + fourth)
        values[k] = state[0]
    return values[200:]


def following(series: Array, origins: Array) -> Array:
    """Return the AHEAD values after each origin; (len(origins), AHEAD)."""
    found: Array = series[origins[:, None] + np.arange(1, AHEAD + 1)]
    return found


def preceding(series: Array, origins: Array, count: int) -> Array:
    """Return the `count` values up to each origin, the newest first; (len(origins), count)."""
    found: Array = series[origins[:, None] - np.arange(count)]
    return found


def train(xp: ModuleType, rng: np.random.Generator, series: Array, batches: int) -> tuple[LSTM, Linear]:
    """Train on random windows of the scaled measurements."""
    from tqdm import tqdm

    lstm = LSTM(1, HIDDEN, seed=rng).to(xp)
    head = Linear(HIDDEN, AHEAD, seed=rng).to(xp)
    optimiser = Adam(join(lstm=lstm, head=head))
    counts = xp.asarray(np.arange(WINDOW) >= WARM_UP)
    compile_first(lstm, xp.zeros((WINDOW, BATCH, 1), lstm.cell.dtype))
    progress = tqdm(range(batches), desc="training", unit="batch")
    for batch in progress:
        optimiser.lr = RATE * (1 - batch / batches)
        start = rng.integers(0, len(series) - WINDOW - AHEAD, BATCH)
        time = start + np.arange(WINDOW)[:, None]  # (WINDOW, BATCH)
        x = xp.asarray(series[time][..., None])
        target = xp.asarray(series[time[..., None] + np.arange(1, AHEAD + 1)])  # (WINDOW, BATCH, AHEAD)

        y, _, tape = lstm.forward(x)
        loss, dprediction = mean_squared_error(head(y), target, counts)
        head_grads = head.backward(y, dprediction)
        lstm_grads = lstm.backward(tape, head_grads.x, input_gradient=False)
        grads, _ = clip_by_global_norm(join(lstm=lstm_grads, head=head_grads), 1.0)
        optimiser.step(grads)
        progress.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
    return lstm, head


def baselines(measured: Array, origins: Array) -> dict[str, Array]:
    """Forecast without an LSTM, from the training part and the measurements up to each origin."""
    known = np.arange(LAGS, TRAINING - AHEAD)  # origins whose future lies in the training part
    targets = following(measured, known)

    def inputs(times: Array) -> Array:
        found: Array = np.c_[preceding(measured, times, LAGS), np.ones(len(times))]
        return found

    weights, *_ = np.linalg.lstsq(inputs(known), targets, rcond=None)
    patterns, analogues = preceding(measured, known, STRETCH), []
    for some in np.array_split(origins, -(-len(origins) // 100)):  # 100 origins by 20,000 patterns: 16 MB
        # |p - q|^2 without |q|^2, which is the same for all patterns p.
        distance = (patterns**2).sum(axis=1) - 2 * preceding(measured, some, STRETCH) @ patterns.T
        nearest = np.argpartition(distance, NEIGHBOURS, axis=1)[:, :NEIGHBOURS]
        analogues.append(targets[nearest].mean(axis=1))
    return {
        "analogues": np.concatenate(analogues),
        "linear autoregression": inputs(origins) @ weights,
        "persistence": np.repeat(measured[origins, None], AHEAD, axis=1),
        "mean": np.full((len(origins), AHEAD), measured[:TRAINING].mean()),
    }


def plot(path: Path, truth: Array, measured: Array, forecast: Array, curves: dict[str, Array]) -> None:
    """Draw a part of the series with forecasts half a time unit ahead, and the error by lead time."""
    figure = new_figure(10, 3.8)
    series, errors = figure.subplots(1, 2, width_ratios=[3, 2])
    lead = AHEAD // 2
    shown = np.arange(TRAINING + 200, TRAINING + 500)
    time = INTERVAL * (shown - shown[0])
    series.plot(time, measured[shown], ".", color="0.7", markersize=4, label="measured")
    series.plot(time, truth[shown], color="black", linewidth=1, label="noise-free")
    ahead = forecast[shown - TRAINING - lead, lead - 1]
    series.plot(time, ahead, color="tab:red", linewidth=1.2, label=f"LSTM, {lead * INTERVAL:g} time units ahead")
    series.set(xlabel="time (Lorenz time units)", ylabel="x (dimensionless)", title="Held-out part of the series")
    series.legend(loc="upper center", ncols=3, frameon=False, fontsize="small")
    series.set_ylim(top=30)

    leads = INTERVAL * np.arange(1, AHEAD + 1)
    colours = {"LSTM": "tab:red", "analogues": "tab:blue", "linear autoregression": "tab:orange"}
    for name, curve in curves.items():
        if name != "mean":
            errors.plot(leads, curve, color=colours.get(name, "0.5"), label=name, linewidth=1.8)
    errors.set(xlabel="lead time (Lorenz time units)", ylabel="root mean square error of x", title="Forecast error")
    errors.set_ylim(0, 15)
    errors.legend(loc="upper left", ncols=2, frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
