"""Each option of the training loop, by what it promises."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from fit_problems import assert_same_params, build, params_of, problem

from fastlstm import BackendError
from fastlstm.training import SGD, Adam, fit, length_mask, mean_squared_error


@pytest.fixture
def rng():
    return np.random.default_rng(41)


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
    seen = {"check_losses": set(), "_step": set(), "_validate": set()}

    def watch(prediction, target, mask=None):
        seen[sys._getframe(2).f_code.co_name] |= set(target[:, 0].tolist())
        return mean_squared_error(prediction, target, mask)

    fit(build(), x, np.arange(20.0), epochs=1, batch_size=4, validation=0.25, seed=0, loss=watch)
    assert len(seen["_validate"]) == 5 and len(seen["_step"]) == 15
    assert seen["_step"] | seen["_validate"] == set(range(20))


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
