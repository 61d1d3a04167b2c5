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
from fastlstm.demo.tools import DemoResult, Options
from fastlstm.training import SGD, Linear, clip_by_global_norm, join, softmax_cross_entropy

PACKAGES = ("matplotlib", "tqdm")

STEPS, BATCH, INPUTS, HIDDEN = 200, 8, 4, 64
RADII = {"tanh": (0.9, 3.0), "relu": (3.0,)}  # of the plain RNNs
BIASES = (0.0, 1.0, 3.0)  # of the forget gates
SHOWN = (10, 50, 100, 199)  # distances in the report
UPDATES, MEMORY, UNITS, RATE, GAIN = 300, 50, 32, 0.02, 1.1  # of the network that is trained with clipping

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
    lines.append(f"A relu network that remembers for {MEMORY} steps, share right in the last 20 of {updates} updates:")
    for name, right in clipping.items():
        scores[name] = float(np.mean(right[-20:]))
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
            grads: Any = join(rnn=rnn.backward(tape, dy), head=head_grads)
            if most:
                grads, _ = clip_by_global_norm(grads, most)
            optimiser.step(grads)
        right[update] = (logits.argmax(axis=1) == first).mean()
    return right


def plot(path: Path, flows: dict[str, tuple[Array, Array | None]], clipping: dict[str, Array]) -> None:
    """Draw the gradients by h, those by c, and the trainings."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # a canvas of its own leaves pyplot and its settings alone
    of_h, of_c, trained = figure.subplots(1, 3)
    for number, (name, (by_h, by_c)) in enumerate(flows.items()):
        for axes, sizes in ((of_h, by_h), (of_c, by_c)):
            if sizes is not None:
                axes.semilogy(np.maximum(sizes, 1e-30), color=f"C{number}", linewidth=1.0, label=name)
    for axes, kind in ((of_h, "h"), (of_c, "c")):
        axes.set_xlabel("steps from the loss")
        axes.set_ylabel(f"size of dL/d{kind}, relative")
        axes.set_ylim(1e-20, 1e20 if kind == "h" else 1e4)
        axes.legend(fontsize="small")
    for name, right in clipping.items():
        trained.plot(np.convolve(right, np.ones(10) / 10, mode="valid"), linewidth=1.0, label=name)
    trained.set_xlabel("update")
    trained.set_ylabel("share right, relu RNN, 50 steps")
    trained.legend(fontsize="small")
    figure.savefig(path, dpi=120)
