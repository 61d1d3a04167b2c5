"""Training the cell of 1997 with one head on one sequence at a time, for the demos of its paper's tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fastlstm import LSTM
from fastlstm.demo.tools import new_figure
from fastlstm.errors import ArgumentError
from fastlstm.training import Linear, initialise_1997

Array = np.ndarray[Any, Any]

RATE = 0.5  # the paper's learning rate; it is for a squared error without the factor 2 of its derivative
SCALE = 0.1  # of the first weights
BLOCKS, SIZE = 2, 2  # memory blocks, and cells in each
WINDOW = 2000  # of the latest sequences, which the paper's criteria are about
TESTS = 2560


class Net:
    """Two memory blocks of two cells, without a forget gate, and logistic outputs after the last time step.

    The gradient is the paper's: truncated at h, while c carries it over all the steps.
    """

    def __init__(self, inputs: int, outputs: int, input_gates: tuple[float, ...], rng: np.random.Generator) -> None:
        self.lstm = LSTM(
            inputs, BLOCKS * SIZE, forget_gate=False, block_size=SIZE, truncated=True,
            activations=("sigmoid", "1997", "1997"), seed=rng,
        )  # fmt: skip
        initialise_1997(self.lstm, rng, scale=SCALE, input_gates=input_gates)
        self.head = Linear(BLOCKS * SIZE, outputs, seed=rng)
        for array in self.head.params.values():
            array[:] = rng.uniform(-SCALE, SCALE, array.shape)

    def predict(self, x: Array, lengths: Array | None = None) -> Array:
        """Return the outputs (B, outputs) after the last step of some sequences (T, B, inputs)."""
        _, (h, _) = self.lstm(x, lengths=lengths)
        return logistic(self.head(h[-1]))

    def learn(self, x: Array, target: Array) -> Array:
        """Learn from one sequence (T, 1, inputs): one step down the gradient of half the squared error."""
        y, _, tape = self.lstm.forward(x)
        output = logistic(self.head(y[-1]))
        error = output - target
        head_grads = self.head.backward(y[-1], error * output * (1 - output))
        dy = np.zeros_like(y)
        dy[-1] = head_grads.x
        grads = self.lstm.backward(tape, dy, input_gradient=False)
        for name, gradient in grads.params.items():
            self.lstm.params[name] -= RATE * gradient
        for array, gradient in zip(self.head.params.values(), head_grads.params.values(), strict=True):
            np.subtract(array, RATE * gradient, out=array)
        return output


def logistic(a: Array) -> Array:
    """Return 1 / (1 + exp(-a))."""
    found: Array = 1 / (1 + np.exp(-a))
    return found


class Learned(NamedTuple):
    """How a training went."""

    sequences: int  # until the criterion was met, or the limit
    met: bool
    errors: Array  # the mean squared error of each thousand sequences


def train(
    net: Net, draw: Callable[[], tuple[Array, Array]], is_met: Callable[[Array, Array], bool], limit: int, title: str
) -> Learned:
    """Train until the last :data:`WINDOW` sequences meet a criterion.

    Parameters
    ----------
    net : Net
    draw : callable
        Returns a sequence (T, 1, inputs) and its target (outputs,).
    is_met : callable
        Says so, of the largest errors and the squared ones, each (WINDOW,) in any order.
    limit : int
        Give up after so many sequences.
    title : str
        Of the progress bar.
    """
    from tqdm import tqdm

    largest, squared = np.ones(WINDOW), np.ones(WINDOW)  # of the latest sequences
    means = []
    sequences, met = 0, False
    progress = tqdm(total=limit, desc=title, unit="sequence", mininterval=0.5)
    while sequences < limit and not met:
        x, target = draw()
        errors = net.learn(x, target)[0] - target
        place = sequences % WINDOW
        largest[place], squared[place] = np.abs(errors).max(), (errors * errors).sum()
        sequences += 1
        if sequences % 1000 == 0:
            means.append(squared[place - 999 : place + 1].mean())
        progress.update()
        if sequences >= WINDOW and sequences % 10 == 0:
            met = is_met(largest, squared)
    progress.close()
    return Learned(sequences, met, np.array(means))


def errors_of_tests(net: Net, draw: Callable[[], tuple[Array, Array]]) -> Array:
    """Return the errors (TESTS, outputs) on new sequences, in one call for all of them."""
    drawn = [draw() for _ in range(TESTS)]
    lengths = np.array([len(x) for x, _ in drawn])
    batch = np.zeros((lengths.max(), TESTS, drawn[0][0].shape[2]), np.float32)
    for number, (x, _) in enumerate(drawn):
        batch[: len(x), number] = x[:, 0]
    found: Array = net.predict(batch, lengths) - np.stack([target for _, target in drawn])
    return found


def check_library(xp: ModuleType) -> None:
    """Refuse a GPU: a step of one sequence and four cells has nothing for it to do at once."""
    if xp is not np:
        raise ArgumentError("this task learns from one sequence at a time, on the CPU: use device='cpu'")


def plot(path: Path, title: str, runs: dict[str, Learned], goal: float, paper: tuple[int, str]) -> None:
    """Draw the errors of each thousand sequences, and after how many sequences the paper's nets succeeded.

    `paper` is that number, and what it is.
    """
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for name, learned in runs.items():
        thousands = np.arange(1, len(learned.errors) + 1)
        label = f"{name}, {learned.sequences:,} sequences" if learned.met else f"{name}, criterion not met"
        (line,) = axes.semilogy(thousands, learned.errors, linewidth=1.5, label=label)
        if learned.met:
            axes.plot(thousands[-1:], learned.errors[-1:], "o", color=line.get_color())
    if not any(len(learned.errors) for learned in runs.values()):  # fewer than a thousand sequences each
        axes.set_ylim(goal / 10, goal * 10)
    axes.axhline(goal, color="0.5", linewidth=1.0, linestyle="--", label=f"goal for the error, {goal}")
    axes.axvline(paper[0] / 1000, color="0.5", linewidth=1.0, linestyle=":", label=f"{paper[1]}, {paper[0]:,}")
    axes.set_title(title)
    axes.set_xlabel("sequences learned from, in thousands (a dot: the criterion is met)")
    axes.set_ylabel("squared error, mean of each 1,000")
    axes.set_xlim(left=0)
    axes.legend()
    figure.savefig(path, dpi=120)
