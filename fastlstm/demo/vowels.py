"""Tell nine speakers apart by how they say two vowels: sequences of different lengths, in one batch.

JapaneseVowels (M. Kudo, J. Toyama and M. Shimbo, 1999) holds 640 utterances of 7 to 29 frames with 12 LPC cepstrum
coefficients each. A bidirectional LSTM reads them all at once, padded at the end, with their `lengths`; a linear
layer classifies the mean of its outputs. The 370 test utterances take no part in training or scaling, and the settings
below were chosen by cross-validation within the 270 training utterances.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fastlstm import LSTM
from fastlstm.demo.tools import DemoResult, compile_first
from fastlstm.training import Adam, Linear, clip_by_global_norm, join, softmax_cross_entropy

PACKAGES = ("sktime", "tqdm")

SPEAKERS = 9
HIDDEN = 64
BATCH, EPOCHS = 30, 40
RATE, DECAY = 5e-3, 1e-4

Array = np.ndarray[Any, Any]


class Utterances(NamedTuple):
    """A ragged batch: padded frames, how many of them are real, and who spoke."""

    frames: Array  # (T, B, 12) float32, zero past each length
    lengths: Array  # (B,) int64
    speakers: Array  # (B,) int64, in 0..8

    def select(self, chosen: Array) -> Utterances:
        """Return some of the utterances."""
        return Utterances(self.frames[:, chosen], self.lengths[chosen], self.speakers[chosen])


def run(xp: ModuleType, seed: int, out: Path) -> DemoResult:
    """Train, save, load, and classify the test utterances."""
    learned, tested = load_utterances()
    lstm, head = train(xp, np.random.default_rng(seed), learned)
    files = out / "vowels-lstm.safetensors", out / "vowels-head.npz"
    lstm.save(files[0])
    np.savez(files[1], **head.to(np).params)

    # From here on, the model is the one in the files.
    lstm = LSTM.load(files[0]).to(xp)
    with np.load(files[1]) as saved:
        head.params = {name: xp.asarray(saved[name]) for name in saved}
    scores = {"accuracy": accuracy(xp, lstm, head, tested), "training accuracy": accuracy(xp, lstm, head, learned)}
    report = (
        f"JapaneseVowels: {scores['accuracy']:.1%} of {len(tested.lengths)} test utterances are given to their speaker"
        f" ({scores['training accuracy']:.1%} of the {len(learned.lengths)} training utterances)"
    )
    return DemoResult(report, scores, files)


def load_utterances() -> tuple[Utterances, Utterances]:
    """Return the training and the test utterances, scaled by the mean and the deviation of the former's frames."""
    from sktime.datasets import load_japanese_vowels

    sets = []
    for split in ("train", "test"):
        table, speakers = load_japanese_vowels(split=split)  # a table of series: one row per utterance
        utterances = [np.stack([series.to_numpy() for series in row], axis=-1) for row in table.to_numpy()]
        sets.append((utterances, speakers.astype(np.int64) - 1))
    frames = np.concatenate(sets[0][0])
    mean, deviation = frames.mean(axis=0), frames.std(axis=0)

    def padded(utterances: list[Array], speakers: Array) -> Utterances:
        lengths = np.array([len(utterance) for utterance in utterances])
        batch = np.zeros((lengths.max(), len(lengths), len(mean)), np.float32)
        for b, utterance in enumerate(utterances):
            batch[: lengths[b], b] = (utterance - mean) / deviation
        return Utterances(batch, lengths, speakers)

    return padded(*sets[0]), padded(*sets[1])


def train(xp: ModuleType, rng: np.random.Generator, utterances: Utterances) -> tuple[LSTM, Linear]:
    """Train on random batches of the utterances."""
    from tqdm import tqdm

    lstm, head = new_model(rng, utterances.frames.shape[-1])
    lstm, head = lstm.to(xp), head.to(xp)
    optimiser = Adam(join(lstm=lstm, head=head), lr=RATE, weight_decay=DECAY)
    frames = utterances.frames
    compile_first(lstm, xp.zeros((frames.shape[0], BATCH, frames.shape[2]), lstm.cell.dtype))
    progress = tqdm(range(EPOCHS), desc="training", unit="epoch")
    for epoch in progress:
        optimiser.lr = rate(epoch)
        for batch in batches(rng, utterances):
            loss = learn(xp, lstm, head, optimiser, batch)
        progress.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
    return lstm, head


def new_model(rng: np.random.Generator, features: int) -> tuple[LSTM, Linear]:
    """Return an LSTM and a linear layer with initial weights."""
    return LSTM(features, HIDDEN, bidirectional=True, seed=rng), Linear(2 * HIDDEN, SPEAKERS, seed=rng)


def rate(epoch: int) -> float:
    """Learning rate of an epoch: it falls to zero along a line."""
    return RATE * (1 - epoch / EPOCHS)


def batches(rng: np.random.Generator, utterances: Utterances) -> Iterator[Utterances]:
    """Give all utterances once, in random batches."""
    count = len(utterances.lengths)
    for chosen in np.array_split(rng.permutation(count), count // BATCH):
        yield utterances.select(chosen)


def learn(xp: ModuleType, lstm: LSTM, head: Linear, optimiser: Adam, batch: Utterances) -> Any:
    """Make one step of the optimiser, and return the loss before it."""
    x, speakers = xp.asarray(batch.frames), xp.asarray(batch.speakers)
    share = xp.asarray(1 / batch.lengths[:, None], dtype=x.dtype)

    y, _, tape = lstm.forward(x, lengths=batch.lengths)
    mean = y.sum(axis=0) * share  # (B, 2 * HIDDEN): y is zero past each length
    loss, dlogits = softmax_cross_entropy(head(mean), speakers)
    head_grads = head.backward(mean, dlogits)
    dy = xp.broadcast_to(head_grads.x * share, y.shape)  # what it says past each length is ignored
    lstm_grads = lstm.backward(tape, dy)
    grads, _ = clip_by_global_norm(join(lstm=lstm_grads, head=head_grads), 1.0)
    optimiser.step(grads)
    return loss


def accuracy(xp: ModuleType, lstm: LSTM, head: Linear, utterances: Utterances) -> float:
    """Share of the utterances that are given to their speaker."""
    y, _ = lstm(xp.asarray(utterances.frames), lengths=utterances.lengths)
    mean = y.sum(axis=0) / xp.asarray(utterances.lengths[:, None], dtype=y.dtype)
    return float((head(mean).argmax(axis=-1) == xp.asarray(utterances.speakers)).mean())
