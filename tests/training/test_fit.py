"""The training loop: against torch, against a loop by hand, and its losses."""

from __future__ import annotations

import copy
import functools
import re
import runpy
from pathlib import Path

import cuda_row
import numpy as np
import pytest
from fit_problems import assert_same_params, build, problem

from fastlstm import LSTM
from fastlstm.training import (
    Adam,
    AdamW,
    Linear,
    Model,
    clip_by_global_norm,
    fit,
    length_mask,
    mean_absolute_error,
    mean_squared_error,
    nash_sutcliffe_loss,
    quantile_loss,
    softmax_cross_entropy,
)

PROGRAM = Path(__file__).parent / "training_program.py"
# Two float64 training loops with sums in another order: some 1e-16 a step, which 30 steps of Adam, whose first ones
# divide small numbers by each other, enlarge by some thousands.
SAME = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture
def rng():
    return np.random.default_rng(41)


# The whole program


@pytest.fixture
def torch():
    """PyTorch on one thread: on busy machines its idle threads take the time of those that work."""
    module = pytest.importorskip("torch")
    before = module.get_num_threads()
    module.set_num_threads(1)
    yield module
    module.set_num_threads(before)


def torch_program(torch, x, y, model, seed, epochs, batch_size, patience, rate, first_epochs=None):
    """Do what the program does, or its first epochs, with torch's LSTM, Linear and Adam, from `model`'s weights."""
    dtype = getattr(torch, np.dtype(model.dtype).name)
    lstm = torch.nn.LSTM(3, model.lstms["lstm"].cell.hidden_size, batch_first=True, dtype=dtype)
    head = torch.nn.Linear(lstm.hidden_size, 1, dtype=dtype)
    state = model.lstms["lstm"].to_torch_state_dict()
    lstm.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    head.load_state_dict({name: torch.tensor(value) for name, value in model.heads["head"].params.items()})
    lstm.bias_hh_l0.requires_grad = False  # fastlstm has one bias
    trained = [p for p in [*lstm.parameters(), *head.parameters()] if p.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=rate)

    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    held_out, kept = np.sort(order[: len(x) // 5]), np.sort(order[len(x) // 5 :])
    means, deviations = [], []
    for values in (x[kept].reshape(-1, 3), y[kept][:, None]):
        means.append(values.mean(axis=0, dtype=np.float64).astype(x.dtype))
        deviations.append(values.std(axis=0, dtype=np.float64).astype(x.dtype))
    x = torch.tensor((x - means[0]) / deviations[0])
    y = torch.tensor((y[:, None] - means[1]) / deviations[1])
    losses, validation_losses = [], []
    for epoch in range(first_epochs or epochs):
        optimiser.param_groups[0]["lr"] = rate * 0.5 * (1 + np.cos(np.pi * epoch / epochs))
        total = 0.0
        shuffled = rng.permutation(len(kept))
        for first in range(0, len(kept), batch_size):
            chosen = kept[shuffled[first : first + batch_size]]
            optimiser.zero_grad()
            loss = torch.nn.functional.mse_loss(head(lstm(x[chosen])[0][:, -1]), y[chosen])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            total += loss.item() * len(chosen)
        losses.append(total / len(kept))
        with torch.no_grad():
            validation_losses.append(
                torch.nn.functional.mse_loss(head(lstm(x[held_out])[0][:, -1]), y[held_out]).item()
            )
        if epoch - int(np.argmin(validation_losses)) >= patience:
            break
    return losses, validation_losses


def test_the_program_is_short_and_learns_what_torch_learns(torch, tmp_path, monkeypatch, capsys):
    lines = PROGRAM.read_text().splitlines()[1:]  # without its docstring
    assert 0 < sum(bool(line.strip()) for line in lines) <= 20
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(PROGRAM))
    assert float(re.search(r"R2 = (\S+)", capsys.readouterr().out)[1]) > 0.9
    start = Model(LSTM(3, 16, seed=1), Linear(16, 1, seed=2))
    losses, validation = torch_program(
        torch, found["x"][:800], found["y"][:800], start, 3, 40, 32, 8, 1e-2, first_epochs=10
    )
    # Two float32 runs of 200 steps: roundings of 1e-7 grow by some hundreds in ten epochs.
    history = found["history"]
    np.testing.assert_allclose(history.loss[0], losses[0], rtol=1e-5)
    np.testing.assert_allclose(history.loss[:10], losses, rtol=1e-3)
    np.testing.assert_allclose(history.validation_loss[:10], validation, rtol=1e-3)


def test_float64_training_has_the_losses_of_torch(torch, rng):
    x = rng.normal(2, 3, size=(60, 9, 3))
    y = x[:, -3:].mean(axis=(1, 2))
    lstm, head = LSTM(3, 8, batch_first=True, dtype="float64", seed=1), Linear(8, 1, dtype="float64", seed=2)
    model = Model(lstm, head, scale=True)
    losses, validation = torch_program(torch, x, y, copy.deepcopy(model), 5, 12, 16, 12, 0.03)
    history = fit(
        model, x, y, optimiser=Adam(model, lr=0.03), epochs=12, batch_size=16, schedule="cosine",
        validation=0.2, patience=12, clip_norm=1.0, seed=5,
    )  # fmt: skip
    np.testing.assert_allclose(history.loss, losses, **SAME)
    np.testing.assert_allclose(history.validation_loss, validation, **SAME)
    assert history.loss[-1] < 0.7 * history.loss[0]


# Against a loop by hand


def by_hand(model, x, y, lengths, mask, *, epochs, batch_size, clip):
    """Train without shuffling, in the caller's layout, with the functions below `fit`."""
    optimiser, losses = Adam(model), []
    axis = 0 if model.batch_first else 1
    stepwise = model.output == "sequence"
    for _ in range(epochs):
        total = weights = 0.0
        for first in range(0, x.shape[axis], batch_size):
            part = np.arange(first, min(first + batch_size, x.shape[axis]))
            target = y.take(part, axis=axis if stepwise else 0)
            counts = None if mask is None else mask.take(part, axis=axis if stepwise else 0)
            prediction, tape = model.forward(x.take(part, axis=axis), None if lengths is None else lengths[part])
            if stepwise and lengths is not None:
                inside = length_mask(lengths[part], x.shape[1 - axis], model.batch_first)
                counts = inside if counts is None else counts * inside
            loss, gradient = mean_squared_error(prediction, np.nan_to_num(target), counts)
            grads, _ = clip_by_global_norm(model.backward(tape, gradient), clip, params=model)
            optimiser.step(grads)
            weight = target.size if counts is None else counts.sum()
            total, weights = total + loss * weight, weights + weight
        losses.append(total / weights)
    return losses


@pytest.mark.parametrize("masked", ["", "bool", "weights"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("output", ["last", "mean", "sequence"])
def test_fit_is_the_loop_by_hand(rng, output, batch_first, ragged, masked):
    x, y = problem(rng, output, batch_first)
    lengths = rng.integers(1, 8, 20) if ragged else None
    mask = None
    if masked:
        keep = rng.uniform(size=y.shape[:-1]) < 0.7
        mask = keep if masked == "bool" else keep * rng.uniform(0.5, 2, keep.shape)
        y[~keep] = np.nan
    one, other = build(output, batch_first), build(output, batch_first)
    expected = by_hand(other, x, y, lengths, mask, epochs=3, batch_size=6, clip=0.5)
    history = fit(one, x, y, lengths=lengths, mask=mask, epochs=3, batch_size=6, clip_norm=0.5, shuffle=False)
    np.testing.assert_allclose(history.loss, expected, **SAME)
    for name, value in one.params.items():
        np.testing.assert_allclose(value, other.params[name], **SAME)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("output", ["last", "mean", "sequence"])
def test_lists_of_sequences_train_as_padded_arrays_do(rng, output, batch_first):
    x, y = problem(rng, output, batch_first)
    lengths = rng.integers(1, 8, 20)

    def rows(values):
        return list(values if batch_first else values.swapaxes(0, 1))

    listed = [row[:length] for row, length in zip(rows(x), lengths, strict=True)]
    targets = [row[:length] for row, length in zip(rows(y), lengths, strict=True)] if output == "sequence" else y
    one, other = build(output, batch_first, scale=True), build(output, batch_first, scale=True)
    found = fit(one, listed, targets, epochs=3, batch_size=6, seed=2, validation=0.2)
    expected = fit(other, x, y, lengths=lengths, epochs=3, batch_size=6, seed=2, validation=0.2)
    np.testing.assert_allclose(found.loss, expected.loss, **SAME)
    np.testing.assert_allclose(found.validation_loss, expected.validation_loss, **SAME)


def test_padding_may_hold_anything(rng):
    x, y = problem(rng, "sequence")
    lengths = rng.integers(1, 8, 20)
    one, other = build("sequence", scale=True), build("sequence", scale=True)
    expected = fit(one, x, y, lengths=lengths, epochs=2, seed=0)
    outside = ~length_mask(lengths, 7)
    x[outside] = y[outside] = np.nan
    assert fit(other, x, y, lengths=lengths, epochs=2, seed=0).loss == expected.loss
    assert_same_params(one, other)


# Losses


def test_classes_are_learned(rng):
    x = rng.normal(size=(9, 60, 3))
    classes = (x.mean(axis=0)[:, 0] > 0).astype(np.int64) + (x.mean(axis=0)[:, 1] > 0)
    model = build(outputs=3, scale=True)
    fit(model, x, classes, loss=softmax_cross_entropy, epochs=60, optimiser=AdamW(model, lr=0.02), seed=0)
    assert (model.predict(x).argmax(axis=1) == classes).mean() > 0.95
    assert model.scaler.heads == ()
    stepwise = build("sequence", outputs=3)
    history = fit(stepwise, x, np.broadcast_to(classes, (9, 60)), loss=softmax_cross_entropy, epochs=3,
                  lengths=rng.integers(1, 10, 60))  # fmt: skip
    assert history.loss[-1] < history.loss[0]


def test_arrays_of_the_loss_go_with_their_sequences(rng):
    x, y = problem(rng, "sequence")
    deviation = y.std(axis=0) + np.arange(20)[:, None]
    total = []

    def loss(prediction, target, mask, deviation):
        total.append(deviation[:, 0].copy())
        assert target.shape[1] == len(deviation)
        return nash_sutcliffe_loss(prediction, target, mask, deviation=deviation)

    model = build("sequence")
    history = fit(model, x, y, loss=loss, loss_arrays={"deviation": deviation}, epochs=1, batch_size=7, seed=0)
    assert len(total[0]) == 7  # the trial before the run
    np.testing.assert_array_equal(np.sort(np.concatenate(total[1:])), np.sort(deviation[:, 0]))
    whole = build("sequence")
    prediction = whole(x)
    expected = nash_sutcliffe_loss(prediction, y, deviation=deviation)[0]
    found = fit(whole, x, y, loss=nash_sutcliffe_loss, loss_arrays={"deviation": deviation}, epochs=1, batch_size=20)
    np.testing.assert_allclose(found.loss[0], expected, rtol=1e-12)
    assert history.loss[0] > 0


def test_quantiles_of_one_target(rng):
    x, _ = problem(rng, count=300)
    y = rng.normal(3, 2, size=300)  # nothing to learn but the quantiles
    model = build(outputs=3, scale=True)
    loss = functools.partial(quantile_loss, quantiles=(0.1, 0.5, 0.9))
    fit(model, x, y, loss=loss, epochs=40, optimiser=Adam(model, lr=0.01), seed=0)
    below = (y[:, None] < model.predict(x)).mean(axis=0)
    np.testing.assert_allclose(below, [0.1, 0.5, 0.9], atol=0.12)


def test_several_heads_add_their_losses(rng):
    x, y = problem(rng)
    lstm = LSTM(3, 6, dtype="float64", seed=1)
    heads = {"flow": Linear(6, 1, dtype="float64", seed=2), "kind": Linear(6, 2, dtype="float64", seed=3)}
    model = Model(lstm, heads, scale=True)
    kinds = (y[:, 0] > 0).astype(int)
    losses = {"flow": mean_absolute_error, "kind": softmax_cross_entropy}
    start = copy.deepcopy(model)
    history = fit(model, x, {"flow": y, "kind": kinds}, loss=losses, epochs=1, batch_size=20)
    start.scaler = model.scaler
    found = start(x)
    expected = mean_absolute_error(found["flow"], model.scaler.scale("flow", y))[0]
    expected += softmax_cross_entropy(found["kind"], kinds)[0]
    np.testing.assert_allclose(history.loss[0], expected, rtol=1e-12)
    assert model.scaler.heads == ("flow",)
    again = fit(model, x, {"flow": y, "kind": kinds}, loss=losses, epochs=20)
    assert again.loss[-1] < history.loss[0]


def test_batches_in_which_nothing_counts_change_nothing(rng):
    x, y = problem(rng)
    mask = np.arange(20) >= 10
    model, other = build(), build()
    history = fit(model, x, y, mask=mask, epochs=2, batch_size=10, shuffle=False)
    expected = fit(other, x[:, 10:], y[10:], epochs=2, batch_size=10, shuffle=False)
    assert history.loss == expected.loss
    assert_same_params(model, other)


def test_inputs_are_not_changed(rng):
    x, y = problem(rng)
    mask, lengths = np.ones(20, bool), np.full(20, 7)
    for value in (x, y, mask, lengths):
        value.flags.writeable = False
    fit(build(scale=True), x, y, lengths=lengths, mask=mask, epochs=1, validation=0.2)


def test_recomputing_the_gates_gives_the_same_model(rng):
    x, y = problem(rng, steps=40)
    one, other = build(), build()
    assert fit(one, x, y, epochs=2, seed=0).loss == fit(other, x, y, epochs=2, seed=0, recompute=True).loss
    assert_same_params(one, other)


@pytest.mark.skipif(bool(cuda_row.missing()), reason=str(cuda_row.missing()))
@pytest.mark.parametrize("output", ["last", "mean", "sequence"])
def test_cupy_trains_as_numpy_does(rng, output):
    x, y = problem(rng, output)
    lengths, mask = rng.integers(1, 8, 20), rng.uniform(size=y.shape[:-1]) < 0.8
    model = build(output, scale=True)

    def run(model, xp):
        return fit(model, xp.asarray(x), xp.asarray(y), lengths=lengths, mask=xp.asarray(mask), epochs=2,
                   batch_size=6, validation=0.2, clip_norm=1.0, seed=0)  # fmt: skip

    with cuda_row.installed() as cupy:
        moved = model.to(cupy)
        found = run(moved, cupy)
        expected = run(model, np)
        np.testing.assert_allclose(found.loss, expected.loss, **SAME)
        np.testing.assert_allclose(found.validation_loss, expected.validation_loss, **SAME)
        assert all(isinstance(value, cupy.ndarray) for value in moved.params.values())
