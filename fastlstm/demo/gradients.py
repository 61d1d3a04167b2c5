"""How gradients flow back in time: the picture behind the LSTM.

The loss depends on the output after the last of 200 steps alone. Drawn is how large its gradients by the states of the
steps before are, relative to those of the last one: by h of plain RNNs and LSTMs, and by c of LSTMs with several biases
of the forget gate and of the cell of 1997.

- A plain RNN's gradients vanish or explode, by the spectral radius of its recurrent weights.
- An LSTM's vanish too, only later, unless its forget gates are biased to stay open; wide open, they grow slowly.
- The cell of 1997 with its truncated gradient is the constant error carousel: dL/dc is a flat line. With the full
  gradient it is not.

Exploding gradients can be clipped. A relu network that copies its state has to say, after 50 steps, which of two
symbols came first; it learns that with clipped gradients, and never recovers without. For tanh networks with large
weights, clipping is no cure.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastlstm import LSTM, RNN
from fastlstm.demo.memory_1997 import check_library
from fastlstm.demo.tools import DemoResult, Options, new_figure
from fastlstm.training import SGD, Linear, clip_by_global_norm, join, softmax_cross_entropy

PACKAGES = ("matplotlib", "tqdm")

STEPS, BATCH, INPUTS, HIDDEN = 200, 8, 4, 64
RADII = {"tanh": (0.9, 3.0), "relu": (3.0,)}  # of the plain RNNs
BIASES = (0.0, 1.0, 3.0)  # of the forget gates
SHOWN = (10, 50, 100, 199)  # distances in the report
UPDATES, MEMORY, UNITS, RATE, GAIN = 300, 50, 32, 0.02, 1.1  # of the network that is trained with clipping
LAST, SMOOTHED = 20, 10  # updates that the report and the picture take the mean of

Array = np.ndarray[Any, Any]


def run(options: Options) -> DemoResult:
    """Measure and draw."""
    check_library(options.xp)
    seed, out, updates = options.seed, options.out, options.batches or UPDATES
    flows = {name: flow(model, seed) for name, model in models(seed).items()}
    clipping = {
        "not clipped": accuracies(seed, None, updates),
        "clipped to a norm of 1": accuracies(seed, 1.0, updates),
    }
    path = out / "gradients.png"
    plot(path, flows, clipping)
    lines = [f"Size of dL/dh, dL/dc relative to the last of {STEPS} steps, at a distance of"]
    lines.append(" " * 42 + "".join(f"{distance:>10}" for distance in SHOWN))
    scores = {}
    for name, (by_h, by_c) in flows.items():
        for kind, sizes in (("dh", by_h), ("dc", by_c)):
            if sizes is not None:
                lines.append(f"  {name + ', ' + kind:<40}" + "".join(f"{sizes[d]:>10.1e}" for d in SHOWN))
                scores[f"{name}, {kind}"] = float(sizes[-1])
    lines.append(f"A relu network that remembers for {MEMORY} steps, share right, last {min(LAST, updates)} updates:")
    for name, right in clipping.items():
        scores[name] = float(np.mean(right[-LAST:]))
        lines.append(f"  {name:<40}{scores[name]:>10.2f}")
    return DemoResult("\n".join(lines), scores, (path,))


def models(seed: int) -> dict[str, LSTM | RNN]:
    """Return the models whose gradients are compared."""
    rng = np.random.default_rng(seed)
    found: dict[str, LSTM | RNN] = {}
    for nonlinearity, radii in RADII.items():
        for radius in radii:
            rnn = RNN(INPUTS, HIDDEN, nonlinearity=nonlinearity, dtype=np.float64, seed=rng)
            weights = rng.standard_normal((HIDDEN, HIDDEN))
            rnn.params["weight_hh_l0"] = weights * (radius / np.abs(np.linalg.eigvals(weights)).max())
            found[f"RNN {nonlinearity}, spectral radius {radius:g}"] = rnn
    for bias in BIASES:
        found[f"LSTM, forget bias {bias:g}"] = LSTM(INPUTS, HIDDEN, forget_bias=bias, dtype=np.float64, seed=rng)
    for truncated in (False, True):
        name = f"1997 cell, {'truncated' if truncated else 'full'}"
        found[name] = LSTM(
            INPUTS, HIDDEN, forget_gate=False, truncated=truncated, activations=("sigmoid", "1997", "1997"),
            dtype=np.float64, seed=rng,
        )  # fmt: skip
    return found


def flow(model: LSTM | RNN, seed: int) -> tuple[Array, Array | None]:
    """Return the sizes of the gradients by h and c, each (STEPS,) by the distance from the last step; c may be none."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((STEPS, BATCH, INPUTS))
    y, _, tape = model.forward(x)
    dy = np.zeros_like(y)
    dy[-1] = rng.standard_normal((BATCH, HIDDEN))
    steps: Any = model.backward(tape, dy, keep_state_gradients=True).steps
    of_h, of_c = (steps, None) if isinstance(model, RNN) else steps
    by_h = _sizes(of_h)
    if of_c is None:
        return by_h / by_h[0], None
    # What arrives at c from later steps: that of the last step is what its own output sends there.
    by_c = _sizes(of_c)[1:]
    return by_h / by_h[0], np.concatenate([[1.0], by_c / by_c[0]])


def _sizes(gradients: Array) -> Array:
    """Return the Euclidean norm of each step's, the last one first."""
    found: Array = np.sqrt((gradients * gradients).sum(axis=(1, 2, 3)))[::-1]
    return found


def accuracies(seed: int, most: float | None, updates: int) -> Array:
    """Train a relu network to remember the first symbol, with gradients clipped to a norm or not; (updates,)."""
    from tqdm import tqdm

    rng = np.random.default_rng(seed)
    rnn, head = (
        RNN(2, UNITS, nonlinearity="relu", dtype=np.float64, seed=rng),
        Linear(UNITS, 2, dtype=np.float64, seed=rng),
    )
    rnn.params["weight_ih_l0"] = 0.1 * rng.standard_normal((UNITS, 2))
    rnn.params["weight_hh_l0"], rnn.params["bias_l0"] = GAIN * np.eye(UNITS), np.zeros(UNITS)
    optimiser = SGD(join(rnn=rnn, head=head), lr=RATE)
    right = np.zeros(updates)
    for update in tqdm(range(updates), desc="clipped" if most else "not clipped", unit="update"):
        first = rng.integers(0, 2, UNITS)
        x = 0.1 * rng.standard_normal((MEMORY, UNITS, 2))
        x[0] = np.eye(2)[first]
        with np.errstate(all="ignore"):  # what explodes is the point
            y, _, tape = rnn.forward(x)
            logits = head(y[-1])
            _, dlogits = softmax_cross_entropy(logits, first)
            head_grads = head.backward(y[-1], dlogits)
            dy = np.zeros_like(y)
            dy[-1] = head_grads.x
            grads: Any = join(rnn=rnn.backward(tape, dy, input_gradient=False), head=head_grads)
            if most:
                grads, _ = clip_by_global_norm(grads, most)
            optimiser.step(grads)
        right[update] = (logits.argmax(axis=1) == first).mean()
    return right


def plot(path: Path, flows: dict[str, tuple[Array, Array | None]], clipping: dict[str, Array]) -> None:
    """Draw the gradients by h, those by c, and the trainings."""
    figure = new_figure(9, 7)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.5, 1])
    of_h, of_c, trained = (figure.add_subplot(grid[place]) for place in ((0, 0), (0, 1), (1, slice(None))))
    for number, (name, (by_h, by_c)) in enumerate(flows.items()):
        for axes, sizes in ((of_h, by_h), (of_c, by_c)):
            # Zero, as of the truncated gradient by h, has no place on this axis.
            if sizes is not None and sizes[1]:
                style = "--" if name.startswith("RNN") else "-"
                axes.semilogy(sizes, style, color=f"C{number}", linewidth=1.5, label=name)
    of_h.set_title("Gradient by h (1997 cell, truncated: 0)")
    of_c.set_title("Gradient by c (RNNs have none)")
    for axes, kind in ((of_h, "h"), (of_c, "c")):
        axes.set_xlabel("steps before the loss")
        axes.set_ylabel(f"size of dL/d{kind} / that of the last step")
        axes.set_ylim(1e-20, 1e20)
        axes.grid(color="0.9")
    handles = dict(zip(*reversed(of_h.get_legend_handles_labels()), strict=True))
    handles |= dict(zip(*reversed(of_c.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, fontsize="small")
    for name, right in clipping.items():
        mean = np.convolve(right, np.ones(SMOOTHED) / SMOOTHED, mode="valid")
        trained.plot(SMOOTHED + np.arange(len(mean)), mean, linewidth=1.5, label=f"gradients {name}")
    trained.axhline(0.5, color="0.5", linewidth=1.0, linestyle=":", label="chance")
    trained.set_title(f"Training a relu RNN that has to remember a symbol for {MEMORY} steps")
    trained.set_xlabel("update")
    trained.set_ylabel(f"share right, last {SMOOTHED} updates")
    trained.set_ylim(0.3, 1.05)
    trained.legend(loc="lower right", ncols=3, fontsize="small")
    figure.savefig(path, dpi=120)
