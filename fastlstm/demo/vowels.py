"""Tell nine speakers apart by how they say two vowels: sequences of different lengths, in one batch.

JapaneseVowels (M. Kudo, J. Toyama and M. Shimbo, 1999) holds 640 utterances of 7 to 29 frames, with 12 LPC cepstrum
coefficients in each. A bidirectional LSTM reads a batch of them, padded at the end, with their `lengths`; a linear
layer classifies the mean of its outputs. The 370 test utterances take no part in training or scaling; the settings
were chosen by cross-validation within the 270 training utterances.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fastlstm import LSTM
from fastlstm.demo.tools import DemoResult, Options, compile_first, load_data, new_figure, save_and_load, to_numpy
from fastlstm.training import Adam, Linear, clip_by_global_norm, join, softmax_cross_entropy

PACKAGES = ("matplotlib", "tqdm")

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


def run(options: Options) -> DemoResult:
    """Train, save, load, and classify the test utterances."""
    xp = options.xp
    learned, tested = load_utterances()
    per_epoch = len(learned.lengths) // BATCH
    epochs = EPOCHS if options.batches is None else -(-options.batches // per_epoch)
    lstm, head, losses = train(xp, np.random.default_rng(options.seed), learned, epochs)
    lstm, head, files = save_and_load(options, "vowels", lstm, head)

    given = classify(xp, lstm, head, tested)
    scores = {
        "accuracy": float((given == tested.speakers).mean()),
        "training accuracy": float((classify(xp, lstm, head, learned) == learned.speakers).mean()),
    }
    picture = options.out / "vowels.png"
    plot(picture, losses, tested.speakers, given)
    report = (
        f"JapaneseVowels: {scores['accuracy']:.1%} of {len(tested.lengths)} test utterances are given to their speaker"
        f" ({scores['training accuracy']:.1%} of the {len(learned.lengths)} training utterances)"
    )
    return DemoResult(report, scores, (picture, *files))


def load_utterances() -> tuple[Utterances, Utterances]:
    """Return the training and the test utterances, scaled by mean and standard deviation of the training frames."""
    data, sets = load_data("japanese-vowels.npz"), []
    for split in ("train", "test"):
        lengths = data[f"{split}_lengths"].astype(np.int64)
        utterances = np.split(data[f"{split}_millionths"] / 1e6, lengths.cumsum()[:-1])  # each (length, 12)
        sets.append((utterances, data[f"{split}_speakers"].astype(np.int64) - 1))
    frames = np.concatenate(sets[0][0])
    mean, deviation = frames.mean(axis=0), frames.std(axis=0)

    def padded(utterances: list[Array], speakers: Array) -> Utterances:
        lengths = np.array([len(utterance) for utterance in utterances])
        batch = np.zeros((lengths.max(), len(lengths), len(mean)), np.float32)
        for b, utterance in enumerate(utterances):
            batch[: lengths[b], b] = (utterance - mean) / deviation
        return Utterances(batch, lengths, speakers)

    return padded(*sets[0]), padded(*sets[1])


def train(
    xp: ModuleType, rng: np.random.Generator, utterances: Utterances, epochs: int
) -> tuple[LSTM, Linear, list[float]]:
    """Train on random batches of the utterances; return the model and the mean loss of each epoch."""
    from tqdm import tqdm

    lstm, head = new_model(rng, utterances.frames.shape[-1])
    lstm, head = lstm.to(xp), head.to(xp)
    optimiser = Adam(join(lstm=lstm, head=head), lr=RATE, weight_decay=DECAY)
    frames = utterances.frames
    compile_first(lstm, xp.zeros((frames.shape[0], BATCH, frames.shape[2]), lstm.cell.dtype))
    progress, losses = tqdm(range(epochs), desc="training", unit="epoch"), []
    for epoch in progress:
        optimiser.lr = rate(epoch, epochs)
        found = [float(learn(xp, lstm, head, optimiser, batch)) for batch in batches(rng, utterances)]
        losses.append(sum(found) / len(found))
        progress.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
    return lstm, head, losses


def new_model(rng: np.random.Generator, features: int) -> tuple[LSTM, Linear]:
    """Return an LSTM and a linear layer with initial weights."""
    return LSTM(features, HIDDEN, bidirectional=True, seed=rng), Linear(2 * HIDDEN, SPEAKERS, seed=rng)


def rate(epoch: int, epochs: int | None = None) -> float:
    """Learning rate of an epoch: it falls linearly to zero."""
    return RATE * (1 - epoch / (epochs or EPOCHS))


def batches(rng: np.random.Generator, utterances: Utterances) -> Iterator[Utterances]:
    """Yield all utterances once, in random batches."""
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
    lstm_grads = lstm.backward(tape, dy, input_gradient=False)
    grads, _ = clip_by_global_norm(join(lstm=lstm_grads, head=head_grads), 1.0)
    optimiser.step(grads)
    return loss


def classify(xp: ModuleType, lstm: LSTM, head: Linear, utterances: Utterances) -> Array:
    """Return the most likely speaker of each utterance; (B,)."""
    y, _ = lstm(xp.asarray(utterances.frames), lengths=utterances.lengths)
    mean = y.sum(axis=0) / xp.asarray(utterances.lengths[:, None], dtype=y.dtype)
    found: Array = to_numpy(head(mean).argmax(axis=-1))
    return found


def plot(path: Path, losses: list[float], speakers: Array, given: Array) -> None:
    """Draw the loss by epoch, and how often each speaker was taken for each."""
    figure = new_figure(9, 3.8)
    curve, table = figure.subplots(1, 2)
    curve.semilogy(np.arange(1, len(losses) + 1), losses, color="tab:red")
    curve.set(xlabel="epoch", ylabel="cross entropy (nats)", title="Loss on the training utterances")

    counts = np.zeros((SPEAKERS, SPEAKERS), np.int64)
    np.add.at(counts, (speakers, given), 1)
    table.imshow(counts > 0, cmap="Reds", vmax=4)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            table.text(column, row, count, ha="center", va="center", weight="bold" if row == column else "normal")
    names = range(1, SPEAKERS + 1)
    table.set_xticks(range(SPEAKERS), names)
    table.set_yticks(range(SPEAKERS), names)
    right = (speakers == given).mean()
    table.set(xlabel="recognised speaker", ylabel="true speaker", title=f"Test utterances: {right:.1%} right")
    figure.savefig(path, dpi=120)
