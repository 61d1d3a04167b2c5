"""Tell the order of two symbols, 50 and more steps later: task 6a of the paper of 1997, with its cell.

A sequence of 100 to 110 symbols begins with E and ends with B. In between come a, b, c and d by chance, but for two: X
or Y at step 10 to 20, and again at step 50 to 60. After B, the net tells XX, XY, YX and YY apart. It learns from one
sequence at a time, with the paper's truncated gradient, until 2,000 in a row are right (no output is off by 0.3) and
their mean squared error is below 0.1.

One thing is not the paper's: there, the gates are sources of the next step, too, and so the net has 156 weights.
"""

from __future__ import annotations

import numpy as np

from fastlstm import LSTM
from fastlstm.demo.memory_1997 import TESTS, Array, Learned, Net, check_library, errors_of_tests, plot, train
from fastlstm.demo.tools import DemoResult, Options

PACKAGES = ("matplotlib", "tqdm")

SYMBOLS = "EBabcdXY"
CLASSES = ("XX", "XY", "YX", "YY")
INPUT_GATES = (-2.0, -4.0)  # the first biases of the two blocks
TOLERANCE, GOAL = 0.3, 0.1
PAPER = 31_390  # sequences, the paper's mean
RUNS, LIMIT = 3, 60_000  # seeds, and sequences of each at most

_ONE_HOT = np.eye(len(SYMBOLS), dtype=np.float32)
_TARGETS = np.eye(len(CLASSES), dtype=np.float32)


def run(options: Options) -> DemoResult:
    """Train with several seeds, test, save the last net, and draw how the errors fell."""
    check_library(options.xp)
    seed, out, limit = options.seed, options.out, options.batches or LIMIT
    runs, lines, wrong = {}, [], []
    for number in range(seed, seed + RUNS):
        net, learned, rng = learn(number, limit)
        path = out / "temporal-order-lstm.safetensors"
        net.lstm.save(path)
        net.lstm = LSTM.load(path)  # from here on, the model is the one in the file
        errors = np.abs(errors_of_tests(net, lambda rng=rng: sequence(rng))).max(axis=1)  # type: ignore[misc]
        runs[f"seed {number}"] = learned
        wrong.append(int((errors >= TOLERANCE).sum()))
        reached = f"{learned.sequences:7,} sequences" if learned.met else f"not within {limit:,} sequences"
        lines.append(f"  seed {number}: {reached}, then {wrong[-1]:,} of {TESTS:,} tests wrong")
    picture = out / "temporal-order.png"
    plot(picture, "Temporal order (task 6a), cell of 1997", runs, GOAL, (PAPER, "the paper's mean"))
    mean = float(np.mean([learned.sequences for learned in runs.values()]))
    succeeded = all(learned.met for learned in runs.values())
    report = "\n".join([
        "Temporal order (task 6a of Hochreiter and Schmidhuber 1997), truncated gradient, 2 blocks of 2 cells:",
        *lines,
        f"  mean {mean:,.0f} sequences{' to success' * succeeded};"
        f" the paper has {PAPER:,}, with gates that are sources, too",
    ])  # fmt: skip
    return DemoResult(report, {"sequences": mean, "wrong": float(np.mean(wrong))}, (picture, path))


def learn(seed: int, limit: int) -> tuple[Net, Learned, np.random.Generator]:
    """Train one net on so many sequences at most; also return the generator, for new sequences."""
    rng = np.random.default_rng(seed)
    net = Net(len(SYMBOLS), len(CLASSES), INPUT_GATES, rng)
    learned = train(net, lambda: sequence(rng), is_met, limit, f"seed {seed}")
    return net, learned, rng


def is_met(largest: Array, squared: Array) -> bool:
    """Say whether the latest sequences meet the paper's criterion."""
    return bool(largest.max() < TOLERANCE and squared.mean() < GOAL)


def sequence(rng: np.random.Generator) -> tuple[Array, Array]:
    """Draw a sequence (T, 1, 8) of symbols, and the target (4,) of its class."""
    symbols = rng.integers(2, 6, rng.integers(100, 111))
    symbols[0], symbols[-1] = 0, 1
    first, second = rng.integers(0, 2, 2)
    symbols[rng.integers(10, 21)], symbols[rng.integers(50, 61)] = 6 + first, 6 + second
    return _ONE_HOT[symbols][:, None], _TARGETS[2 * first + second]
