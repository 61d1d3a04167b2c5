"""The training loop: against torch, against a loop by hand, and each of its options by what it promises."""

from __future__ import annotations

import copy
import functools
import re
import runpy
import sys
from pathlib import Path

import cuda_row
import numpy as np
import pytest

from fastlstm import LSTM, ArgumentError, ArrayTypeError, BackendError, DTypeError, ShapeError
from fastlstm.training import (
    SGD,
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


def build(output="last", batch_first=False, outputs=1, dtype=np.float64, **options):
    lstm = LSTM(3, 6, bidirectional=True, batch_first=batch_first, dtype=dtype, seed=1)
    return Model(lstm, Linear(12, outputs, dtype=dtype, seed=2), output=output, **options)


def problem(rng, output="last", batch_first=False, dtype=np.float64, count=20, steps=7):
    """Return inputs, and targets that an LSTM can learn."""
    x = rng.normal(size=(steps, count, 3)).astype(dtype)
    y = np.cumsum(x[..., :1], axis=0) * 0.3 if output == "sequence" else x.mean(axis=(0, 2))[:, None]
    if batch_first:
        return x.swapaxes(0, 1).copy(), (y.swapaxes(0, 1).copy() if output == "sequence" else y)
    return x, y


def params_of(model):
    return {name: value.copy() for name, value in model.params.items()}


def assert_same_params(one, other):
    for name, value in one.params.items():
        np.testing.assert_array_equal(other.params[name], value, err_msg=name)


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


# Options


def test_the_best_parameters_are_restored(rng):
    x, y = problem(rng)
    model, kept = build(), []
    history = fit(
        model, x[:, :10], y[:10], epochs=60, validation=(x[:, 10:], y[10:]), seed=0, optimiser=Adam(model, lr=0.05),
        callback=lambda model, history: kept.append(params_of(model)),
    )  # fmt: skip
    best = int(np.argmin(history.validation_loss))
    assert 0 < best < 59, "the case is what it claims to be: the model gets better and then worse"
    assert history.best_epoch == best
    for name, value in model.params.items():
        np.testing.assert_array_equal(value, kept[best][name])
    found = mean_squared_error(model(x[:, 10:]), y[10:])[0]
    np.testing.assert_allclose(found, history.validation_loss[best], rtol=1e-12)  # in one batch
    assert history.stopped == "all epochs are over"


def test_patience_stops_early(rng):
    x, y = problem(rng)
    model = build()
    history = fit(
        model, x[:, :10], y[:10], epochs=200, validation={"x": x[:, 10:], "y": y[10:]}, seed=0, patience=4,
        optimiser=Adam(model, lr=0.05),
    )  # fmt: skip
    assert len(history.loss) == history.best_epoch + 5 < 200
    assert "no smaller validation loss in 4 epochs" in history.stopped and history.stopped in repr(history)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.5 + 0.5 * np.sqrt(0.5), 0.5, 0.5 - 0.5 * np.sqrt(0.5)]),
        (lambda epoch: 0.1**epoch, [1, 0.1, 0.01, 0.001]),
    ],
    ids=["constant", "linear", "cosine", "function"],
)
def test_the_rate_follows_the_schedule_and_is_set_back(rng, schedule, factors):
    x, y = problem(rng)
    model = build()
    optimiser = SGD(model, lr=0.2)
    history = fit(model, x, y, optimiser=optimiser, schedule=schedule, epochs=4)
    np.testing.assert_allclose(history.learning_rate, 0.2 * np.array(factors), rtol=1e-12)
    assert optimiser.lr == 0.2


def test_gradients_are_clipped_and_their_norm_is_recorded(rng):
    x, y = problem(rng)
    model = build()
    before = params_of(model)
    history = fit(model, x, 100 * y, optimiser=SGD(model, lr=1.0), clip_norm=0.01, epochs=1, batch_size=20)
    moved = np.sqrt(sum(((value - before[name]) ** 2).sum() for name, value in model.params.items()))
    assert moved == pytest.approx(0.01, rel=1e-3)
    assert history.gradient_norm[0] > 1


def test_the_seed_determines_everything(rng):
    x, y = problem(rng)
    models = [build() for _ in range(4)]
    histories = [fit(m, x, y, epochs=2, batch_size=4, seed=s, validation=0.3)
                 for m, s in zip(models, (7, 7, 8, np.random.default_rng(7)), strict=True)]  # fmt: skip
    assert histories[0].loss == histories[1].loss == histories[3].loss != histories[2].loss
    assert_same_params(models[0], models[1])
    unshuffled = [fit(build(), x, y, epochs=2, batch_size=4, seed=s, shuffle=False).loss for s in (7, 8)]
    assert unshuffled[0] == unshuffled[1]


def test_a_share_for_validation_takes_each_sequence_once(rng):
    x, _ = problem(rng)
    seen = {"train": set(), "validate": set()}

    def watch(prediction, target, mask=None):
        kind = "train" if sys._getframe(2).f_code.co_name == "_step" else "validate"
        seen[kind] |= set(target[:, 0].tolist())
        return mean_squared_error(prediction, target, mask)

    fit(build(), x, np.arange(20.0), epochs=1, batch_size=4, validation=0.25, seed=0, loss=watch)
    assert len(seen["validate"]) == 5 and len(seen["train"]) == 15
    assert seen["train"] | seen["validate"] == set(range(20))


def test_the_callback_stops_and_sees_each_epoch(rng):
    x, y = problem(rng)
    model, seen = build(), []

    def callback(given, history):
        assert given is model
        seen.append(len(history.loss))
        return len(seen) == 3

    history = fit(model, x, y, epochs=10, callback=callback)
    assert seen == [1, 2, 3] and history.stopped == "the callback asked for it"
    assert len(history.seconds) == 3 and min(history.seconds) > 0


def test_a_loss_that_is_not_finite_ends_the_run_with_the_best_parameters(rng):
    x, y = problem(rng)
    model = build()
    with np.errstate(over="ignore", invalid="ignore"):
        history = fit(
            model, x, y, optimiser=SGD(model, lr=0.1), schedule=lambda epoch: 1e300 if epoch == 2 else 1.0,
            epochs=10, validation=0.2, seed=0, batch_size=4,
        )  # fmt: skip
    assert len(history.loss) == 3 and history.stopped == "the loss is not finite" and history.best_epoch == 1
    assert all(np.isfinite(value).all() for value in model.params.values())


def test_the_progress_bar_is_tqdms(rng, capsys, monkeypatch):
    x, y = problem(rng)
    fit(build(), x, y, epochs=2, progress=True, validation=0.2)
    shown = capsys.readouterr().err
    assert "2/2" in shown and "loss=" in shown and "validation=" in shown
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(BackendError, match="pip install tqdm"):
        fit(build(), x, y, epochs=2, progress=True)


def test_inputs_and_targets_are_scaled_by_the_training_data(rng):
    x, y = problem(rng, "sequence")
    x, y = 50 + 9 * x, 1000 * y
    x[..., 2] = 7.0  # constant: it cannot be scaled
    lengths, mask = rng.integers(1, 8, 20), rng.uniform(size=(7, 20)) < 0.7
    model = build("sequence", scale=True)
    fit(model, x[:, :15], y[:, :15], lengths=lengths[:15], mask=mask[:, :15], epochs=1,
        validation={"x": x[:, 15:], "y": y[:, 15:], "lengths": lengths[15:], "mask": mask[:, 15:]})  # fmt: skip
    inside = length_mask(lengths[:15], 7)
    found = model.scaler.arrays
    np.testing.assert_allclose(found["x.mean"], x[:, :15][inside].mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found["x.deviation"][:2], x[:, :15][inside].std(axis=0)[:2], rtol=1e-12)
    assert found["x.deviation"][2] == 1
    counted = y[:, :15][inside & mask[:, :15]]
    np.testing.assert_allclose(found["head.mean"], counted.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found["head.deviation"], counted.std(axis=0), rtol=1e-12)
    before = model.scaler
    fit(model, 2 * x, y, epochs=1)
    assert model.scaler is before, "a second run goes on with the same scaler"


def test_scaling_is_exact_for_large_offsets():
    x = (1e8 + np.random.default_rng(0).normal(size=(5, 200, 3))).astype(np.float64)
    model = build(scale=True)
    fit(model, x, x[0, :, 0], epochs=1)
    np.testing.assert_allclose(model.scaler.arrays["x.deviation"], x.reshape(-1, 3).std(axis=0), rtol=1e-6)


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
    np.testing.assert_array_equal(np.sort(np.concatenate(total)), np.sort(deviation[:, 0]))
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


# Bad input

X, Y = np.zeros((4, 6, 3)), np.zeros((6, 1))
NAN = np.where(np.arange(6)[:, None] == 2, np.nan, 0.0)
OTHER = build()
ERRORS = {
    "no model": ({"model": LSTM(3, 6)}, ArgumentError),
    "x of another dtype": ({"x": X.astype("f4")}, DTypeError),
    "x of another size": ({"x": X[..., :2]}, ShapeError),
    "x a list of numbers": ({"x": [1, 2]}, ArrayTypeError),
    "x empty": ({"x": X[:, :0], "y": Y[:0]}, ArgumentError),
    "x with NaN": ({"x": X + NAN[:4, :, None]}, ArgumentError),
    "y of another number": ({"y": Y[:5]}, ShapeError),
    "y of other columns": ({"y": np.zeros((6, 2))}, ShapeError),
    "y of another dtype": ({"y": Y.astype("f4")}, DTypeError),
    "y of objects": ({"y": Y.astype(object)}, DTypeError),
    "y a list": ({"y": [0.0] * 6}, ArrayTypeError),
    "y with NaN": ({"y": NAN}, ArgumentError),
    "y by head": ({"y": {"a": Y}}, ArrayTypeError),
    "mask of another shape": ({"mask": np.ones((6, 1), bool)}, ShapeError),
    "mask of integers": ({"mask": np.ones(6, int)}, DTypeError),
    "negative mask": ({"mask": -np.ones(6)}, ArgumentError),
    "NaN mask": ({"mask": np.full(6, np.nan)}, ArgumentError),
    "lengths too long": ({"lengths": [5] * 6}, ArgumentError),
    "loss is a name": ({"loss": "mse"}, ArgumentError),
    "loss by another head": ({"loss": {"a": mean_squared_error}}, ArgumentError),
    "loss that returns no pair": ({"loss": lambda p, t, m: 1.0}, ArgumentError),
    "arrays of another number": ({"loss_arrays": {"deviation": Y[:5]}}, ShapeError),
    "arrays are a list": ({"loss_arrays": [Y]}, ArgumentError),
    "optimiser of another model": ({"optimiser": Adam(OTHER)}, ArgumentError),
    "optimiser class": ({"optimiser": Adam}, ArgumentError),
    "no epochs": ({"epochs": 0}, ArgumentError),
    "epochs not whole": ({"epochs": 1.5}, ArgumentError),
    "batch of none": ({"batch_size": 0}, ArgumentError),
    "shuffle is a number": ({"shuffle": 1}, ArgumentError),
    "validation on nothing": ({"validation": 0.0}, ArgumentError),
    "validation on all": ({"validation": 1.0}, ArgumentError),
    "validation without targets": ({"validation": {"x": X}}, ArgumentError),
    "validation with more": ({"validation": {"x": X, "y": Y, "z": Y}}, ArgumentError),
    "validation of three": ({"validation": (X, Y, Y)}, ArgumentError),
    "validation that does not fit": ({"validation": (X, Y[:5])}, ShapeError),
    "validation with NaN": ({"validation": (X, NAN)}, ArgumentError),
    "a share of one sequence": ({"x": X[:, :1], "y": Y[:1], "validation": 0.5}, ArgumentError),
    "patience without validation": ({"patience": 3}, ArgumentError),
    "patience of none": ({"patience": 0, "validation": 0.5}, ArgumentError),
    "unknown schedule": ({"schedule": "step"}, ArgumentError),
    "schedule is a number": ({"schedule": 0.1}, ArgumentError),
    "clip to zero": ({"clip_norm": 0.0}, ArgumentError),
    "seed is text": ({"seed": "seed"}, ArgumentError),
    "recompute is a number": ({"recompute": 1}, ArgumentError),
    "progress is a number": ({"progress": 1}, ArgumentError),
    "callback is a number": ({"callback": 1}, ArgumentError),
    "comm is a number": ({"comm": 1}, ArgumentError),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_raises_a_typed_error_and_changes_nothing(case):
    changes, error = ERRORS[case]
    model = build(scale=True)
    before = params_of(model)
    arguments = {"model": model, "x": X, "y": Y, "epochs": 1} | changes
    with pytest.raises(error) as caught:
        fit(**arguments)
    assert type(caught.value) is error and re.search(r"\w{3}", str(caught.value))
    if "returns no pair" not in case:  # it is called after the data were measured
        assert model.scaler is None
    for name, value in model.params.items():
        np.testing.assert_array_equal(value, before[name])


def test_bad_schedules_are_found_when_they_are_asked(rng):
    x, y = problem(rng)
    for wrong in (None, -1.0, np.nan, "a"):
        with pytest.raises(ArgumentError, match="schedule"):
            fit(build(), x, y, epochs=1, schedule=lambda epoch, wrong=wrong: wrong)


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
