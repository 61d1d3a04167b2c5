"""The demonstration of a closed loop: its gradients, what it learns, and a loop that was recorded elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from harness import BackendUnderTest
from tolerances import EPS, normalised_error

from fastlstm import LSTM
from fastlstm.training import Linear

if BackendUnderTest("cpu").missing:
    pytest.skip(str(BackendUnderTest("cpu").missing), allow_module_level=True)
pytest.importorskip("tqdm")

from fastlstm.demo import separation

CLIENTS = Path(__file__).parents[1] / "clients"


def test_sources_and_matrices_are_those_of_the_paper():
    sources = separation.make_sources()
    assert sources.shape == (16_000, 2) and sources.dtype == np.float32
    np.testing.assert_array_equal(np.abs(sources).max(axis=0), 1)
    spectrum = np.abs(np.fft.rfft(sources, axis=0))  # two seconds: half a hertz a bin
    for i, tones in enumerate(separation.TONES):
        assert sorted(np.argsort(spectrum[:, i])[-2:] / 2) == list(tones)
    matrices = separation.draw_mixing(np.random.default_rng(0), 500)
    # Rows were divided by their sums in float64, and rounded.
    np.testing.assert_allclose(matrices.sum(axis=2), 1, atol=2 * EPS[np.dtype(np.float32)])
    assert matrices.min() >= 0 and np.abs(np.linalg.det(matrices)).min() > 0.2 - 1e-6


def test_a_window_of_each_source_is_mixed_by_each_matrix():
    rng, sources = np.random.default_rng(0), separation.make_sources()
    mixing = separation.draw_mixing(rng, 5)
    window, mixed = separation.draw_batch(rng, sources, mixing, 200)
    assert window.shape == (200, 2) and mixed.shape == (200, 5, 2)
    error = mixed - np.einsum("bij,tj->tbi", mixing, window)
    assert 0.9e-3 < error.std() < 1.1e-3  # 2,000 draws of 0.001
    for i in range(2):
        starts = [n for n in np.flatnonzero(sources[:, i] == window[0, i]) if n + 200 <= 16_000]
        assert any(np.array_equal(sources[n : n + 200, i], window[:, i]) for n in starts)


def test_clarity_is_one_for_separated_signals_and_zero_for_mixed_ones():
    sources = separation.make_sources()
    assert separation.clarity(sources, sources) > 0.999
    assert separation.clarity(-sources[:, ::-1], sources) > 0.999
    mixed = sources @ np.array([[1, 1], [1, -1]], np.float32)
    assert separation.clarity(mixed / sources.std(), sources) < 0.2


def torch_loop(network, w, mixed, sources, tau):
    """The same loop in torch and float64: the loss, and the gradients by all parameters."""
    torch = pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")
    lstm = torch.nn.LSTM(4, network.lstm.cell.hidden_size, dtype=torch.float64)
    state_dict = network.lstm.to_torch_state_dict()
    lstm.load_state_dict({name: torch.from_numpy(value.astype(np.float64)) for name, value in state_dict.items()})
    weight, bias = (
        torch.from_numpy(network.head.params[name].astype(np.float64)).requires_grad_() for name in ("weight", "bias")
    )
    to = lambda array: torch.from_numpy(array.astype(np.float64))  # noqa: E731
    w, w0, loss, state = to(w), to(network.w0), 0, None
    loss_of = torch.nn.SmoothL1Loss()
    for x, s in zip(to(mixed), to(sources), strict=True):
        y = torch.einsum("bij,bj->bi", w, x)
        loss = loss + loss_of(y, s.expand_as(y))
        z, state = lstm(torch.cat((x, y), 1)[None], state)
        w = w + (w0 * (z[0] @ weight.T + bias).reshape(-1, 2, 2) - w) / tau
    loss.backward()
    found = {f"{name}_l0": getattr(lstm, f"{name}_l0").grad for name in ("weight_ih", "weight_hh", "bias_ih")}
    found["bias_l0"] = found.pop("bias_ih_l0")
    return loss.item(), {name: g.numpy() for name, g in (found | {"weight": weight.grad, "bias": bias.grad}).items()}


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_the_gradients_of_a_batch_are_torch_s(tau):
    rng, steps, batch, hidden = np.random.default_rng(0), 40, 3, 10
    network = separation.new_network(rng, hidden)
    window, mixed = separation.draw_batch(rng, 3 * separation.make_sources(), separation.draw_mixing(rng, batch), steps)
    world, kit = separation.World.of(steps, batch, hidden), network.kit()
    world.w[0] = rng.uniform(-1, 1, (batch, 2, 2))
    tape, gradients = kit.tape(steps, batch), kit.gradients()
    params = network.head.params
    expected_loss, expected = torch_loop(network, world.w[0].copy(), mixed, window, tau)
    loss = separation.run_forward(kit, tape, world, params["weight"], params["bias"], network.w0, tau, mixed, window)
    separation.run_back(kit, tape, world, params["weight"], network.w0, tau, gradients)
    errors = np.abs(world.x[:, :, 2:] - window[:, None])
    assert errors.min() < 1 < errors.max(), "both parts of the loss are met"
    dn = world.dn.reshape(-1, 4)
    found = kit.named(gradients) | {"weight": dn.T @ world.z.reshape(-1, hidden), "bias": dn.sum(axis=0)}
    # Float32 against float64, through 40 steps of feedback.
    assert abs(loss - expected_loss) < 1e-5 * expected_loss
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}
    for name, value in expected.items():
        assert normalised_error(found[name], value) < 2e-5, name


def test_a_batch_carries_the_state_on():
    rng, hidden = np.random.default_rng(0), 5
    network, sources = separation.new_network(rng, hidden), separation.make_sources()
    window, mixed = separation.draw_batch(rng, sources, separation.draw_mixing(rng, 2), 20)
    params, kit = network.head.params, network.kit()

    def loop(parts):
        tape, world, found = kit.tape(20 // parts, 2), separation.World.of(20 // parts, 2, hidden), []
        for x, s in zip(np.split(mixed, parts), np.split(window, parts), strict=True):
            separation.run_forward(kit, tape, world, params["weight"], params["bias"], network.w0, 1.0, x, s)
            found.append(world.w[:-1].copy())
            separation.carry_on(tape, world)
        return np.concatenate(found)

    np.testing.assert_array_equal(loop(4), loop(1))


def test_training_lowers_the_loss_and_raises_the_clarity(monkeypatch):
    draw = separation.draw_mixing

    def without_swaps(rng, batch):
        """Draw matrices that do not swap the sources, which are learned in some dozen batches."""
        found = []
        while len(found) < batch:
            found += [matrix for matrix in draw(rng, 1) if np.linalg.det(matrix) > 0]
        return np.stack(found)

    monkeypatch.setattr(separation, "draw_mixing", without_swaps)
    network, losses = separation.train(np.random.default_rng(0), 60, steps=200, batch=16, hidden=24, rate=1e-2)
    assert np.mean(losses[-10:]) < 0.4 * np.mean(losses[:10])
    found = {}
    for name, each in (("trained", network), ("fresh", separation.new_network(np.random.default_rng(0), 24))):
        trials = separation.present(np.random.default_rng(1), each, 20, 500)
        for what in ("inputs", "outputs"):
            found[name, what] = np.mean([separation.clarity(getattr(t, what), t.sources) for t in trials])
    assert found["trained", "outputs"] > found["trained", "inputs"] + 0.1 > found["fresh", "outputs"] + 0.1


def test_a_loop_that_was_recorded_elsewhere_is_reproduced():
    """A trained net of the authors' own code, 1,000 steps of one context."""
    with np.load(CLIENTS / "feedback_loop" / "one_context.npz") as saved:
        n = dict(saved)
    lstm = LSTM.from_torch_state_dict({k: v for k, v in n.items() if k.startswith("rec_net.")}, prefix="rec_net.")
    head = Linear(100, 4)
    head.params = {"weight": n["hidden2out.weight"], "bias": n["hidden2out.bias"]}
    network = separation.Modulator(lstm, head, n["w0"])
    kit, world = network.kit(), separation.World.of(1000, 1, 100)
    tape = kit.tape(1000, 1)
    weight, bias = head.params["weight"], head.params["bias"]
    separation.run_forward(kit, tape, world, weight, bias, network.w0, 1.0, n["x"][:, None].copy(), n["s"])
    # Float32 both, and errors that are fed back for 1,000 steps: as far from float64 as the original is, twice.
    for found, name in ((world.x[:, 0, 2:], "expected_y"), (world.w[1:, 0].reshape(1000, 4), "expected_W")):
        truth = n[f"{name}_float64"]
        assert normalised_error(found, truth) <= 2 * normalised_error(n[name], truth) + 8 * EPS[np.dtype(np.float32)]
    np.testing.assert_allclose(tape.h[0, -1, 0], n["h_end"], atol=1e-4)
    np.testing.assert_allclose(tape.c[0, -1, 0], n["c_end"], atol=1e-3)
