"""Separate two mixed sources for any mixing matrix: an LSTM that sets the weights of the layer it watches.

From Naumann, Keijser and Sprekeler (eLife 2022, 76096), where it models how cortical feedback makes perception
invariant to context. Two sources s of two tones each arrive mixed, x = A s + noise, and a layer of 2 x 2 weights is to
unmix them: y = W x. The LSTM sees x and y, and its readout moves W, at every time step::

    y_t     = W_t x_t
    n_t     = readout(LSTM([x_t, y_t]))
    W_{t+1} = W_t + (w0 * n_t - W_t) / tau

So its next input depends on its last output: a closed loop, which no call for a whole sequence can run. Here it runs in
compiled code, through ``fastlstm.compiled``. The loss is the Huber loss of y against s, and gradients go back through
all 1,000 steps of a batch. Each batch has new mixing matrices; W and the LSTM's state are carried on. After training,
the network meets 20 matrices that it has never seen, one after the other. The *clarity* of a signal is how much more it
correlates with one source than with the other: ``| |corr(s1, y)| - |corr(s2, y)| |``, averaged over both signals.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from fastlstm import LSTM, compiled
from fastlstm.demo.tools import DemoResult, Options
from fastlstm.errors import BackendError
from fastlstm.training import Adam, Linear, clip_by_value, join

PACKAGES = ("matplotlib", "tqdm")

BATCHES = 400  # the paper has 3,000 and more
SIGNALS, BATCH, STEPS, HIDDEN = 2, 32, 1000, 100  # D, B, T, H
SAMPLES_PER_SECOND, SECONDS = 8000, 2
TONES = (100.0, 125.0), (150.0, 210.0)  # of each source, in Hz
NOISE, TAU = 1e-3, 1.0
LEAST_DETERMINANT = 0.2  # of a mixing matrix
RATE, CLIP = 1e-3, 1.0
CONTEXTS, SETTLED = 20, 500  # mixing matrices of the test; steps of each after which W should have settled
SHOWN = 240  # steps of the signals in the picture, 30 ms

Array = np.ndarray[Any, Any]


class Modulator(NamedTuple):
    """The network: an LSTM, its readout, and the weights that the readout is multiplied with."""

    lstm: LSTM
    head: Linear
    w0: Array  # (D, D), fixed

    def kit(self) -> Any:
        """Pack the weights as they are now for compiled code."""
        return self.lstm.compiled()


class World(NamedTuple):
    """What compiled code needs beside the LSTM's tape, allocated once."""

    x: Array  # (T, B, 2 D): x and y of each step, the LSTM's inputs
    w: Array  # (T + 1, B, D, D): W before each step, and after the last
    z: Array  # (T, B, H): the LSTM's outputs
    dy: Array  # (T, B, D): the loss's gradients by y, of each step's own loss
    dn: Array  # (T, B, D * D): gradients by the readout
    dz: Array  # (B, H)
    dx: Array  # (B, 2 D)
    dw: Array  # (B, D, D)

    @classmethod
    def of(cls, steps: int, batch: int, hidden: int) -> World:
        """Allocate; W is zero at first."""
        square = SIGNALS * SIGNALS
        shapes = (
            (steps, batch, 2 * SIGNALS), (steps + 1, batch, SIGNALS, SIGNALS), (steps, batch, hidden),
            (steps, batch, SIGNALS), (steps, batch, square), (batch, hidden), (batch, 2 * SIGNALS),
            (batch, SIGNALS, SIGNALS),
        )  # fmt: skip
        return cls(*(np.zeros(shape, np.float32) for shape in shapes))


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def run_forward(
    kit: Any, tape: Any, world: Any, weight: Array, bias: Array, w0: Array, tau: float, mixed: Array, sources: Array
) -> Any:
    """Run the loop over mixed sources (T, B, D); return the loss, the sum over time of the Huber loss's mean."""
    steps, batch, signals = mixed.shape
    loss = 0.0
    for t in range(steps):
        for b in range(batch):
            for i in range(signals):
                world.x[t, b, i] = mixed[t, b, i]
            for i in range(signals):
                y = np.float32(0)
                for j in range(signals):
                    y += world.w[t, b, i, j] * mixed[t, b, j]
                world.x[t, b, signals + i] = y
                error = y - sources[t, i]
                if abs(error) < 1:
                    loss += 0.5 * error * error / (batch * signals)
                    world.dy[t, b, i] = error / (batch * signals)
                else:
                    loss += (abs(error) - 0.5) / (batch * signals)
                    world.dy[t, b, i] = np.sign(error) / (batch * signals)
        compiled.step_taped(kit, tape, t, world.x[t], world.z[t])
        for b in range(batch):
            for i in range(signals):
                for j in range(signals):
                    n, row = bias[i * signals + j], i * signals + j
                    for k in range(weight.shape[1]):
                        n += weight[row, k] * world.z[t, b, k]
                    world.w[t + 1, b, i, j] = world.w[t, b, i, j] + (w0[i, j] * n - world.w[t, b, i, j]) / tau
    return loss


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def run_back(kit: Any, tape: Any, world: Any, weight: Array, w0: Array, tau: float, gradients: Array) -> None:
    """Take the gradients back through the loop: those by the LSTM's parameters, and by the readout at each step."""
    steps, batch, signals = world.dy.shape
    world.dw[:] = 0
    for t in range(steps - 1, -1, -1):
        for b in range(batch):
            for k in range(weight.shape[1]):
                world.dz[b, k] = 0
            for i in range(signals):
                for j in range(signals):
                    dn = world.dw[b, i, j] * w0[i, j] / tau
                    world.dw[b, i, j] -= world.dw[b, i, j] / tau
                    world.dn[t, b, i * signals + j] = dn
                    for k in range(weight.shape[1]):
                        world.dz[b, k] += dn * weight[i * signals + j, k]
        compiled.step_back(kit, tape, t, world.dz, world.dx)
        for b in range(batch):
            for i in range(signals):
                dy = world.dy[t, b, i] + world.dx[b, signals + i]
                for j in range(signals):
                    world.dw[b, i, j] += dy * world.x[t, b, j]
    compiled.finish(kit, tape, gradients)


def carry_on(tape: Any, world: World) -> None:
    """Begin the next batch where this one ended, without its gradients."""
    tape.h[:, 0], tape.c[:, 0] = tape.h[:, -1], tape.c[:, -1]
    world.w[0] = world.w[-1]


def new_network(rng: np.random.Generator, hidden: int) -> Modulator:
    """Draw a network."""
    lstm, head = LSTM(2 * SIGNALS, hidden, seed=rng), Linear(hidden, SIGNALS * SIGNALS, seed=rng)
    return Modulator(lstm, head, rng.normal(1.0, NOISE, (SIGNALS, SIGNALS)).astype(np.float32))


def make_sources() -> Array:
    """Return the sources, two tones each and at most 1, (samples, D)."""
    time = np.arange(SAMPLES_PER_SECOND * SECONDS) / SAMPLES_PER_SECOND
    chords = np.stack([sum(np.sin(2 * np.pi * tone * time) for tone in tones) for tones in TONES], axis=1)
    found: Array = (chords / np.abs(chords).max(axis=0)).astype(np.float32)
    return found


def draw_mixing(rng: np.random.Generator, batch: int) -> Array:
    """Draw mixing matrices (B, D, D): positive, with rows that add up to one, and well away from singular."""
    found: list[Array] = []
    while len(found) < batch:
        matrix = rng.uniform(0.0, 1.0, (SIGNALS, SIGNALS))
        matrix /= matrix.sum(axis=1, keepdims=True)
        if abs(np.linalg.det(matrix)) > LEAST_DETERMINANT:
            found.append(matrix)
    return np.stack(found).astype(np.float32)


def draw_batch(rng: np.random.Generator, sources: Array, mixing: Array, steps: int) -> tuple[Array, Array]:
    """Draw a window of each source, (T, D), and mix it by each matrix, (T, B, D)."""
    starts = rng.integers(0, len(sources) - steps + 1, SIGNALS)
    window = np.stack([sources[start : start + steps, i] for i, start in enumerate(starts)], axis=1)
    noise = rng.normal(0.0, NOISE, (steps, len(mixing), SIGNALS))
    return window, (np.einsum("bij,tj->tbi", mixing, window) + noise).astype(np.float32)


def train(
    rng: np.random.Generator,
    batches: int,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    hidden: int = HIDDEN,
    rate: float = RATE,
) -> tuple[Modulator, list[float]]:
    """Train a network; return it, and the loss of each batch for each step."""
    from tqdm import tqdm

    network, sources, losses = new_network(rng, hidden), make_sources(), []
    optimiser = Adam(join(lstm=network.lstm, head=network.head), lr=rate)
    kit, world = network.kit(), World.of(steps, batch, hidden)
    tape, gradients = kit.tape(steps, batch), kit.gradients()
    progress = tqdm(range(batches), desc="training", unit="batch")
    for _ in progress:
        window, mixed = draw_batch(rng, sources, draw_mixing(rng, batch), steps)
        kit, weight, bias = network.kit(), network.head.params["weight"], network.head.params["bias"]
        loss = run_forward(kit, tape, world, weight, bias, network.w0, TAU, mixed, window)
        run_back(kit, tape, world, weight, network.w0, TAU, gradients)
        dn = world.dn.reshape(-1, SIGNALS * SIGNALS)
        of_head = {"weight": dn.T @ world.z.reshape(-1, hidden), "bias": dn.sum(axis=0)}
        optimiser.step(clip_by_value(join(lstm=kit.named(gradients), head=of_head), CLIP))
        carry_on(tape, world)
        losses.append(loss / steps)
        progress.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
    return network, losses


class Trial(NamedTuple):
    """What a network did with one mixing matrix."""

    mixing: Array  # (D, D)
    sources: Array  # (T, D)
    inputs: Array  # (T, D)
    outputs: Array  # (T, D)
    weights: Array  # (T, D, D): W


def present(rng: np.random.Generator, network: Modulator, contexts: int, steps: int = STEPS) -> list[Trial]:
    """Present mixing matrices one after the other, the state carried on."""
    kit, sources, trials = network.kit(), make_sources(), []
    hidden = network.lstm.cell.hidden_size
    tape, world = kit.tape(steps, 1), World.of(steps, 1, hidden)
    for _ in range(contexts):
        mixing = draw_mixing(rng, 1)
        window, mixed = draw_batch(rng, sources, mixing, steps)
        params = network.head.params
        run_forward(kit, tape, world, params["weight"], params["bias"], network.w0, TAU, mixed, window)
        outputs = world.x[:, 0, SIGNALS:].copy()
        trials.append(Trial(mixing[0], window, mixed[:, 0], outputs, world.w[:-1, 0].copy()))
        carry_on(tape, world)
    return trials


def clarity(signals: Array, sources: Array) -> float:
    """Return how much more signals (T, D) correlate with one source than with the other, 0 to 1."""
    correlations = np.abs(np.corrcoef(signals.T, sources.T)[:SIGNALS, SIGNALS:])
    return float(np.abs(correlations[:, 0] - correlations[:, 1]).mean())


def run(options: Options) -> DemoResult:
    """Train, save, load, separate sources in contexts that are new, and draw some of them."""
    if options.xp is not np:
        raise BackendError("the task separation runs on the CPU alone, where compiled code closes the loop")
    seed, out = options.seed, options.out
    rng = np.random.default_rng(seed)
    trained, losses = train(rng, options.batches or BATCHES)
    files = out / "separation.png", out / "separation-lstm.safetensors", out / "separation-head.npz"
    trained.lstm.save(files[1])
    np.savez(files[2], **trained.head.params, w0=trained.w0)

    # From here on, the model is the one in the files.
    lstm, head = LSTM.load(files[1]), Linear(HIDDEN, SIGNALS * SIGNALS)
    with np.load(files[2]) as saved:
        head.params = {name: saved[name] for name in head.params}
        network = Modulator(lstm, head, saved["w0"])
    trials = present(rng, network, CONTEXTS)
    settled = slice(SETTLED, None)
    scores = {
        "clarity of the outputs": float(np.mean([clarity(trial.outputs, trial.sources) for trial in trials])),
        "clarity of the inputs": float(np.mean([clarity(trial.inputs, trial.sources) for trial in trials])),
        "first loss": losses[0],
        "last loss": losses[-1],
        "distance": float(np.mean([distance(trial, settled) for trial in trials])),
    }
    plot(files[0], trials[-3:])
    report = (
        f"Two sources, mixed by {CONTEXTS} matrices that the network has not seen; clarity, 0 to 1:\n"
        f"  {'inputs':28}{scores['clarity of the inputs']:6.3f}\n"
        f"  {'outputs':28}{scores['clarity of the outputs']:6.3f}\n"
        f"Distance of outputs and sources over the last {STEPS - SETTLED} steps of each: {scores['distance']:.3f}\n"
        f"Loss of a step, over {len(losses)} batches: {losses[0]:.4f} to {losses[-1]:.4f}"
    )
    return DemoResult(report, scores, files)


def distance(trial: Trial, part: slice) -> float:
    """Return the mean distance of outputs and sources in some of the steps."""
    return float(np.linalg.norm(trial.outputs[part] - trial.sources[part], axis=1).mean())


def plot(path: Path, trials: list[Trial]) -> None:
    """Draw the last milliseconds of sources, mixtures and outputs, and W beside the inverse of A for all trials."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)  # a canvas of its own leaves pyplot and its settings alone
    axes = figure.subplot_mosaic([["sources", "inputs", "outputs"], ["weights"] * 3], height_ratios=(2, 3))
    steps = len(trials[0].sources)
    time = np.arange(steps * len(trials)) / SAMPLES_PER_SECOND * 1000.0
    titles = {"sources": "sources", "inputs": "mixtures, the inputs", "outputs": "outputs"}
    for field, title in titles.items():
        signal = getattr(trials[-1], field)[-SHOWN:]
        for i, colour in enumerate(("tab:blue", "tab:orange")):
            axes[field].plot(time[-SHOWN:], signal[:, i], color=colour, label=f"signal {i + 1}")
        axes[field].set(title=title, xlabel="time (ms)", ylim=(-1.5, 1.5))
    axes["sources"].set_ylabel("amplitude / largest")
    axes["sources"].legend(loc="lower left", fontsize="small", ncols=2)
    panel = axes["weights"]
    for i, j in np.ndindex(SIGNALS, SIGNALS):
        weights = np.concatenate([trial.weights[:, i, j] for trial in trials])
        inverse = np.concatenate([np.full(steps, np.linalg.inv(trial.mixing)[i, j]) for trial in trials])
        (line,) = panel.plot(time, weights, linewidth=0.8, alpha=0.6, label=f"$W_{{{i + 1}{j + 1}}}$")
        panel.plot(time, inverse, color=line.get_color(), linestyle="--", linewidth=1.5)
    for number in range(1, len(trials)):
        panel.axvline(time[number * steps], color="0.6", linewidth=0.8, zorder=0)
    panel.set(title="weights W (solid) and the inverse of the mixing matrix A (dashed); A changes at the grey lines",
              xlabel="time (ms)", ylabel="weight", xlim=(0, time[-1]))  # fmt: skip
    panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=120)
