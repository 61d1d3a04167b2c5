"""Forecast the weekly CO2 record of Mauna Loa, 52 weeks at a time: a lesson in baselines.

The record (C. D. Keeling and T. P. Whorf, 1958 to 2001, in ppm) rises by one or two ppm a year, under a yearly
cycle. A naive forecast that repeats the last year and adds the last yearly rise is hard to beat: the remainder is close
to noise, and 40 years are short. The LSTM beats the seasonal-naive forecast and the one with the mean rise (tested for
seeds 0 to 2); the forecast with the last rise beats the LSTM. Compare with baselines before you trust a network.

The LSTM reads and predicts the differences to the same week of the year before: at each week, those of the next 52
weeks. The last five years take no part in training or scaling; the settings were chosen on forecasts of earlier years.

The baselines repeat the year before each forecast (seasonal-naive), and add to it the mean of all yearly changes so far
(with drift) or the most recent one (with last drift).
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fastlstm import LSTM
from fastlstm.demo.tools import DemoResult, Options, compile_first, load_data, new_figure, save_and_load, to_numpy
from fastlstm.training import Adam, Linear, clip_by_global_norm, join, mean_squared_error

PACKAGES = ("matplotlib", "tqdm")

YEAR = 52  # weeks
HELD_OUT = 5 * YEAR
HIDDEN = 32
WINDOW, BATCH, BATCHES = 3 * YEAR, 32, 150  # each batch has BATCH windows of WINDOW weeks
WARM_UP = YEAR // 2  # weeks at the start of each window whose predictions do not count: the state starts at zero
RATE, DECAY = 5e-3, 1e-2

Array = np.ndarray[Any, Any]


def run(options: Options) -> DemoResult:
    """Train, save, load, forecast the held-out years, and compare with the baselines."""
    xp = options.xp
    weeks, record = load_record()
    cut = len(record) - HELD_OUT
    yearly = np.full_like(record, np.nan)
    yearly[YEAR:] = record[YEAR:] - record[:-YEAR]
    weekly = np.diff(record, prepend=np.nan)
    mean, scale = yearly[YEAR:cut].mean(), yearly[YEAR:cut].std()
    change = ((yearly - mean) / scale).astype(np.float32)  # (weeks,), the first YEAR are NaN
    features = np.stack([change, (weekly / weekly[1:cut].std()).astype(np.float32)], axis=-1)  # (weeks, 2)

    rng = np.random.default_rng(options.seed)
    lstm, head = train(xp, rng, features[:cut], change[:cut], options.batches or BATCHES)
    lstm, head, files = save_and_load(options, "co2", lstm, head)
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
    picture = options.out / "co2.png"
    plot(picture, weeks, record, cut, forecast)
    lines = [f"Weekly CO2 at Mauna Loa, {weeks[cut]} to {weeks[-1]}, forecast {YEAR} weeks at a time; RMSE in ppm:"]
    lines += [f"  {name:32}{score:6.3f}" for name, score in scores.items()]
    return DemoResult("\n".join(lines), scores, (picture, *files))


def load_record() -> tuple[Array, Array]:
    """Return the weeks (dates) and the CO2 (float64, ppm); gaps, all of them before 1986, are interpolated."""
    data = load_data("co2.npz")
    tenths, number = data["tenths_of_ppm"], np.arange(len(data["tenths_of_ppm"]))
    measured = tenths >= 0
    return data["first_week"] + 7 * number, np.interp(number, number[measured], tenths[measured] / 10)


def train(
    xp: ModuleType, rng: np.random.Generator, features: Array, change: Array, batches: int
) -> tuple[LSTM, Linear]:
    """Train on random windows of the given weeks."""
    from tqdm import tqdm

    lstm = LSTM(features.shape[1], HIDDEN, seed=rng).to(xp)
    head = Linear(HIDDEN, YEAR, seed=rng).to(xp)
    optimiser = Adam(join(lstm=lstm, head=head), lr=RATE, weight_decay=DECAY)
    counts = xp.asarray(np.arange(WINDOW) >= WARM_UP)
    compile_first(lstm, xp.zeros((WINDOW, BATCH, features.shape[1]), lstm.cell.dtype))
    progress = tqdm(range(batches), desc="training", unit="batch")
    for _ in progress:
        first = rng.integers(YEAR, len(change) - WINDOW - YEAR + 1, BATCH)
        week = first + np.arange(WINDOW)[:, None]  # (WINDOW, BATCH)
        ahead = week[..., None] + np.arange(1, YEAR + 1)  # (WINDOW, BATCH, YEAR)
        x, target = xp.asarray(features[week]), xp.asarray(change[ahead])

        y, _, tape = lstm.forward(x)
        loss, dprediction = mean_squared_error(head(y), target, counts)
        head_grads = head.backward(y, dprediction)
        lstm_grads = lstm.backward(tape, head_grads.x, input_gradient=False)
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
        forecasts.append(to_numpy(head(y[-1])).astype(float))
        known = origin
    return forecasts


def plot(path: Path, weeks: Array, record: Array, cut: int, forecast: Array) -> None:
    """Draw the record and, enlarged, the held-out years with their forecast."""
    figure = new_figure(10, 3.8)
    whole, part = figure.subplots(1, 2, width_ratios=[2, 3])
    whole.plot(weeks[: cut + 1], record[: cut + 1], color="0.5", linewidth=1, label="training data")
    for axes in (whole, part):
        axes.plot(weeks[cut:], record[cut:], color="black", linewidth=1, label="measured, held out")
        axes.set(xlabel="year", ylabel="CO2 in the air (ppm)")
    part.plot(weeks[cut:], forecast, color="tab:red", linewidth=1.2, label="LSTM, from the start of each year")
    for origin in range(cut, len(weeks), YEAR):
        part.axvline(weeks[origin], color="0.85", linewidth=0.8, zorder=0)
    whole.set_xticks(np.arange("1960", "2001", 10, dtype="datetime64[Y]"), ["1960", "1970", "1980", "1990", "2000"])
    whole.set_title("Mauna Loa, weekly")
    part.set_title("Held-out years")
    whole.legend(loc="upper left", frameon=False, fontsize="small")
    part.legend(loc="upper left", frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
