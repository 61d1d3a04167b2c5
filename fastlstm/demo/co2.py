"""Forecast the weekly CO2 record of Mauna Loa, 52 weeks at a time.

The record (C. D. Keeling and T. P. Whorf, 1958 to 2001, in ppm) rises by one or two ppm a year, under a yearly
cycle. What is hard to know is the difference to the same week of the year before, so that is what the LSTM reads and
what it predicts: at each week, the yearly change of each of the next 52 weeks. The last five years take no part in
training or scaling, and the settings below were chosen on forecasts of the years before them.

The baselines repeat the year before each forecast (seasonal-naive), and add to it the mean of all yearly changes so far
(with drift) or the most recent one alone (with last drift).
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fastlstm import LSTM
from fastlstm.demo.tools import DemoResult, compile_first
from fastlstm.training import Adam, Linear, clip_by_global_norm, join, mean_squared_error

PACKAGES = ("statsmodels", "matplotlib", "tqdm")

YEAR = 52  # weeks
HELD_OUT = 5 * YEAR
HIDDEN = 32
WINDOW, BATCH, STEPS = 3 * YEAR, 32, 150  # each step of training sees BATCH windows of WINDOW weeks
WARM_UP = YEAR // 2  # weeks of each window that the state is given before its predictions count
RATE, DECAY = 5e-3, 1e-2

Array = np.ndarray[Any, Any]


def run(xp: ModuleType, seed: int, out: Path) -> DemoResult:
    """Train, save, load, forecast the held-out years, and compare with the baselines."""
    weeks, record = load_record()
    cut = len(record) - HELD_OUT
    yearly = np.full_like(record, np.nan)
    yearly[YEAR:] = record[YEAR:] - record[:-YEAR]
    weekly = np.diff(record, prepend=np.nan)
    mean, scale = yearly[YEAR:cut].mean(), yearly[YEAR:cut].std()
    change = ((yearly - mean) / scale).astype(np.float32)  # (weeks,), the first YEAR are NaN
    features = np.stack([change, (weekly / weekly[1:cut].std()).astype(np.float32)], axis=-1)  # (weeks, 2)

    lstm, head = train(xp, np.random.default_rng(seed), features[:cut], change[:cut])
    files = out / "co2.png", out / "co2-lstm.safetensors", out / "co2-head.npz"
    lstm.save(files[1])
    np.savez(files[2], **head.to(np).params)

    # From here on, the model is the one in the files.
    lstm = LSTM.load(files[1]).to(xp)
    with np.load(files[2]) as saved:
        head.params = {name: xp.asarray(saved[name]) for name in saved}
    naive = record[cut - YEAR : -YEAR]  # the same week of the year before
    forecast = naive + mean + scale * np.concatenate(forecast_years(xp, lstm, head, features, cut))

    origins = range(cut, len(record), YEAR)
    forecasts = {
        "LSTM": forecast,
        "seasonal-naive": naive,
        "seasonal-naive with drift": naive + np.repeat([yearly[YEAR:origin].mean() for origin in origins], YEAR),
        "seasonal-naive with last drift": naive + np.repeat([yearly[origin - 1] for origin in origins], YEAR),
    }
    scores = {name: float(np.sqrt(np.mean((values - record[cut:]) ** 2))) for name, values in forecasts.items()}
    plot(files[0], weeks, record, cut, forecast)
    lines = [f"Weekly CO2 at Mauna Loa, {weeks[cut]} to {weeks[-1]}, forecast {YEAR} weeks at a time; RMSE in ppm:"]
    lines += [f"  {name:32}{score:6.3f}" for name, score in scores.items()]
    return DemoResult("\n".join(lines), scores, files)


def load_record() -> tuple[Array, Array]:
    """Return the weeks (dates) and the CO2 (float64, ppm); gaps, all of them before 1986, are interpolated."""
    from statsmodels.datasets import co2

    series = co2.load_pandas().data["co2"]
    values, number = series.to_numpy(), np.arange(len(series))
    there = ~np.isnan(values)
    return series.index.to_numpy().astype("datetime64[D]"), np.interp(number, number[there], values[there])


def train(xp: ModuleType, rng: np.random.Generator, features: Array, change: Array) -> tuple[LSTM, Linear]:
    """Train on random windows of the weeks given."""
    from tqdm import tqdm

    lstm = LSTM(features.shape[1], HIDDEN, seed=rng).to(xp)
    head = Linear(HIDDEN, YEAR, seed=rng).to(xp)
    optimiser = Adam(join(lstm=lstm, head=head), lr=RATE, weight_decay=DECAY)
    counts = xp.asarray(np.arange(WINDOW) >= WARM_UP)
    compile_first(lstm, xp.zeros((WINDOW, BATCH, features.shape[1]), lstm.cell.dtype))
    progress = tqdm(range(STEPS), desc="training", unit="step")
    for _ in progress:
        first = rng.integers(YEAR, len(change) - WINDOW - YEAR + 1, BATCH)
        week = first + np.arange(WINDOW)[:, None]  # (WINDOW, BATCH)
        ahead = week[..., None] + np.arange(1, YEAR + 1)  # (WINDOW, BATCH, YEAR)
        x, target = xp.asarray(features[week]), xp.asarray(change[ahead])

        y, _, tape = lstm.forward(x)
        loss, dprediction = mean_squared_error(head(y), target, counts)
        head_grads = head.backward(y, dprediction)
        lstm_grads = lstm.backward(tape, head_grads.x)
        grads, _ = clip_by_global_norm(join(lstm=lstm_grads, head=head_grads), 1.0)
        optimiser.step(grads)
        progress.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
    return lstm, head


def forecast_years(xp: ModuleType, lstm: LSTM, head: Linear, features: Array, cut: int) -> list[Array]:
    """Predict the scaled yearly changes of one year after another, from the weeks before each."""
    known, state, forecasts = YEAR, None, []
    for origin in range(cut, len(features), YEAR):
        # The state is carried on: only the weeks since the last forecast are new.
        y, state = lstm(xp.asarray(features[known:origin]), state)
        forecasts.append(np.array(head(y[-1]).tolist()))  # a list is the way to the host from any library
        known = origin
    return forecasts


def plot(path: Path, weeks: Array, record: Array, cut: int, forecast: Array) -> None:
    """Draw the record and, enlarged, the held-out years with their forecast."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)  # a canvas of its own leaves pyplot and its settings alone
    whole, part = figure.subplots(1, 2)
    whole.plot(weeks[:cut], record[:cut], color="0.5", linewidth=0.8, label="record")
    part.plot(weeks[cut - YEAR : cut], record[cut - YEAR : cut], color="0.5", linewidth=0.8, label="record")
    for axes in (whole, part):
        axes.plot(weeks[cut:], record[cut:], color="black", linewidth=0.8, label="held-out truth")
        axes.plot(weeks[cut:], forecast, color="tab:red", linewidth=0.8, label="forecast")
        axes.set_ylabel("CO2 at Mauna Loa (ppm)")
        axes.legend()
    for origin in range(cut, len(weeks), YEAR):
        part.axvline(weeks[origin], color="0.85", linewidth=0.8, zorder=0)
    figure.savefig(path, dpi=120)
