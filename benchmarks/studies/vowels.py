"""A training run end to end, on real data: how long until 95 % of the test utterances are given to their speaker.

The data, the model and the recipe are those of :mod:`fastlstm.demo.vowels`. PyTorch has the same ones: the same initial
weights, batches in the same order, loss, clipping, Adam, falling learning rate, and one bias, its second being held at
zero. Both sides are therefore the same computation, which is checked before anything is timed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Protocol

import numpy as np

import fastlstm
from fastlstm.bench import clock
from fastlstm.bench.work import Array
from fastlstm.demo import vowels
from fastlstm.demo.vowels import Utterances, load_utterances
from fastlstm.training import Adam, join

from . import rows
from .record import OURS, Case

GOAL = 0.95
SEEDS = tuple(range(9))
ABOUT = (
    "JapaneseVowels: a bidirectional LSTM on ragged batches, trained from the same initial weights with the same"
    f" batches and optimiser on both sides; seconds of training until {GOAL:.0%} of the test utterances are right."
    " The clock stands still while the test utterances are classified, after each epoch, and it starts when everything"
    " is compiled and imported. One round for each seed; who goes first alternates."
)
SIDES = (OURS, "torch")
# Of logits, as a share of the largest. Before training they differ by rounding alone, after an epoch by what Adam has
# made of that, which divides each gradient by its own size.
BEFORE, AFTER = 1e-5, 1e-4


class Learner(Protocol):
    """A model in training."""

    def learn(self, rate: float, batch: Utterances) -> None:
        """Make one step of the optimiser."""

    def logits(self, utterances: Utterances) -> Array:
        """Classify; (B, SPEAKERS)."""


class Ours:
    """The demo's own training."""

    def __init__(self, rng: np.random.Generator, features: int) -> None:
        self.lstm, self.head = vowels.new_model(rng, features)
        self.optimiser = Adam(join(lstm=self.lstm, head=self.head), weight_decay=vowels.DECAY)

    def learn(self, rate: float, batch: Utterances) -> None:
        """Make one step of the optimiser."""
        self.optimiser.lr = rate
        vowels.learn(np, self.lstm, self.head, self.optimiser, batch)

    def logits(self, utterances: Utterances) -> Array:
        """Classify."""
        y, _ = self.lstm(utterances.frames, lengths=utterances.lengths)
        share = (1 / utterances.lengths[:, None]).astype(y.dtype)
        found: Array = self.head(y.sum(axis=0) * share)
        return found


class Torch:
    """The same in PyTorch."""

    def __init__(self, rng: np.random.Generator, features: int) -> None:
        self.torch = torch = import_module("torch")
        lstm, head = vowels.new_model(rng, features)
        self.lstm = torch.nn.LSTM(features, vowels.HIDDEN, bidirectional=True)
        weights = lstm.to_torch_state_dict()
        self.lstm.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in weights.items()})
        self.head = torch.nn.Linear(2 * vowels.HIDDEN, vowels.SPEAKERS)
        self.head.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in head.params.items()})
        for name, parameter in self.lstm.named_parameters():
            parameter.requires_grad_(not name.startswith("bias_hh"))  # it is zero, and stays it
        self.parameters = [p for p in (*self.lstm.parameters(), *self.head.parameters()) if p.requires_grad]
        self.optimiser = torch.optim.Adam(self.parameters, weight_decay=vowels.DECAY)

    def forward(self, batch: Utterances) -> Any:
        torch = self.torch
        x, lengths = torch.from_numpy(batch.frames), torch.from_numpy(batch.lengths)
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, _ = torch.nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0])
        return self.head(y.sum(dim=0) / lengths[:, None])

    def learn(self, rate: float, batch: Utterances) -> None:
        """Make one step of the optimiser."""
        self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.zero_grad()
        loss = self.torch.nn.functional.cross_entropy(self.forward(batch), self.torch.from_numpy(batch.speakers))
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()

    def logits(self, utterances: Utterances) -> Array:
        """Classify."""
        with self.torch.inference_mode():
            found: Array = self.forward(utterances).numpy()
        return found


LEARNERS: dict[str, type[Ours] | type[Torch]] = {OURS: Ours, "torch": Torch}


def measure(threads: int, seconds: float) -> Iterator[Case]:
    """Train once for each seed and side; it takes as long as it takes, so `seconds` is not needed."""
    fastlstm.set_num_threads(threads)
    names = rows.here(SIDES, threads)
    if "torch" in names:
        import_module("torch").set_num_threads(threads)
    learned, tested = load_utterances()
    check(names, learned, tested)
    reached: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    final: dict[str, list[float]] = {name: [] for name in names}
    missed = 0
    for turn, seed in enumerate(SEEDS):
        runs = {name: train(name, seed, learned, tested) for name in (names if turn % 2 == 0 else names[::-1])}
        for name, (_, accuracies) in runs.items():
            final[name].append(accuracies[-1])
        found = {name: time_to_goal(*run) for name, run in runs.items()}
        if None in found.values():
            missed += 1
            continue
        for name, pair in found.items():
            reached[name].append(pair)  # type: ignore[arg-type]
    facts = {"seeds": len(SEEDS), "seeds that a side did not get there with": missed}
    for name in names:
        facts[f"epochs, {name}"] = float(np.median([epochs for _, epochs in reached[name]] or [np.inf]))
        facts[f"final accuracy, {name}"] = float(np.median(final[name]))
    if missed == len(SEEDS):
        raise RuntimeError(f"{GOAL:.0%} was not reached with any seed: {facts}")
    yield Case(
        f"training to {GOAL:.0%}", {name: tuple(time for time, _ in reached[name]) for name in names}, facts=facts
    )


def epoch_of(learner: Learner, number: int, rng: np.random.Generator, learned: Utterances) -> None:
    """Train for one epoch."""
    for batch in vowels.batches(rng, learned):
        learner.learn(vowels.rate(number), batch)


def check(names: list[str], learned: Utterances, tested: Utterances) -> None:
    """Compare the sides before training and after an epoch, which also compiles and warms up everything.

    Raises
    ------
    RuntimeError
        If a side computes something else.
    """
    before, after = {}, {}
    for name in names:
        rng = np.random.default_rng(SEEDS[0])
        learner = LEARNERS[name](rng, learned.frames.shape[-1])
        before[name] = learner.logits(tested)
        epoch_of(learner, 0, rng, learned)
        after[name] = learner.logits(tested)
    for found, allowed, when in ((before, BEFORE, "before training"), (after, AFTER, "after an epoch")):
        for name in names:
            error = float(np.abs(found[name] - found[OURS]).max() / np.abs(found[OURS]).max())
            if not error <= allowed:
                raise RuntimeError(f"{name} computes something else {when}: off by {error:.1e}, allowed {allowed:.0e}")


def train(name: str, seed: int, learned: Utterances, tested: Utterances) -> tuple[list[float], list[float]]:
    """Train to the end; the seconds of training and the test accuracy after each epoch."""
    rng = np.random.default_rng(seed)
    learner = LEARNERS[name](rng, learned.frames.shape[-1])
    seconds, accuracies, spent = [], [], 0.0
    for number in range(vowels.EPOCHS):
        clock.wait_for_quiet()  # the idle threads of the other side, or of the classification, stop spinning
        start = time.perf_counter()
        epoch_of(learner, number, rng, learned)
        spent += time.perf_counter() - start
        seconds.append(spent)
        accuracies.append(float((learner.logits(tested).argmax(axis=-1) == tested.speakers).mean()))
    return seconds, accuracies


def time_to_goal(seconds: list[float], accuracies: list[float]) -> tuple[float, int] | None:
    """Seconds and epochs until the accuracy is reached for the first time, None if it never is.

    >>> time_to_goal([0.5, 1.0, 1.5], [0.7, 0.96, 0.94])
    (1.0, 2)
    """
    for epoch, (spent, accuracy) in enumerate(zip(seconds, accuracies, strict=True), start=1):
        if accuracy >= GOAL:
            return spent, epoch
    return None
