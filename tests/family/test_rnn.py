"""The plain RNN: against the reference, against torch, streaming, frozen, and what it may cost."""

from __future__ import annotations

import numpy as np
import pytest
from harness import REFERENCE, BackendUnderTest, Case, problem, solve
from tolerances import assert_close, assert_identical

import fastlstm
from fastlstm import RNN
from fastlstm.backends.cpu.backend import is_phased

CPU = BackendUnderTest("cpu")
SIZES = [  # steps, batch, inputs, hidden: less than a vector, not whole groups of four, more rows than a microkernel
    (5, 3, 2, 3), (4, 70, 3, 37), (40, 1, 4, 8), (7, 16, 33, 64), (1, 1, 3, 16), (6, 26, 5, 130), (3, 2, 150, 20),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _needs_cpu():
    if CPU.missing:
        pytest.skip(CPU.missing)


def case_of(sizes, nonlinearity="tanh", **more):
    return Case(*sizes, **more, fields=(("nonlinearity", nonlinearity), *more.pop("fields", ())))


CASES = [
    *(case_of(sizes, kind) for sizes in SIZES for kind in ("tanh", "relu")),
    *(case_of(sizes, bidirectional=True, lengths="zeros", layers=2) for sizes in SIZES[:2]),
    *(case_of(sizes, "relu", lengths="zeros", resets=True, bias=False) for sizes in SIZES[:2]),
    case_of((5, 4, 3, 10), resets=True, bidirectional=True, batch_first=True, state=False),
    case_of((5, 4, 3, 10), lengths=(0, 0, 0, 0)),
    case_of((6, 30, 3, 10), lengths="positive", dropout=0.3, layers=3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_result_is_the_reference_s(case, dtype):
    assert is_phased(case.cell)
    p = problem(case)
    assert_close("agreement", solve(p.astype(dtype), CPU), solve(p, REFERENCE), backend="cpu", dtype=dtype)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (3, False), (1, True), (3, True)])
def test_torch_agrees(layers, bidirectional, nonlinearity):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng([layers, bidirectional])
    model = RNN(5, 9, layers, nonlinearity, bidirectional=bidirectional, dtype=np.float64, seed=rng)
    other = torch.nn.RNN(5, 9, layers, nonlinearity, bidirectional=bidirectional, dtype=torch.float64)
    with torch.no_grad():
        for name, value in other.named_parameters():
            if name.startswith("bias_hh"):
                value.zero_()
            else:
                value.copy_(torch.from_numpy(model.params[name.replace("bias_ih", "bias")]))
    x, h0 = rng.standard_normal((6, 4, 5)), rng.standard_normal((layers * (1 + bidirectional), 4, 9))
    dy, dh_n = rng.standard_normal((6, 4, 9 * (1 + bidirectional))), rng.standard_normal(h0.shape)
    y, h_n, tape = model.forward(x, h0)
    grads = model.backward(tape, dy, dh_n)
    given, state = torch.tensor(x, requires_grad=True), torch.tensor(h0, requires_grad=True)
    expected, final = other(given, state)
    ((expected * torch.tensor(dy)).sum() + (final * torch.tensor(dh_n)).sum()).backward()
    found = {"y": y, "h_n": h_n, "dx": grads.x, "dh0": grads.state}
    true = {"y": expected.detach(), "h_n": final.detach(), "dx": given.grad, "dh0": state.grad}
    for name, value in other.named_parameters():
        if not name.startswith("bias_hh"):
            true[name], found[name] = value.grad, grads.params[name.replace("bias_ih", "bias")]
    true = {name: value.numpy() for name, value in true.items()}
    assert_close("torch", found, true, backend="cpu", dtype=np.float64)


@pytest.mark.parametrize("layers", [1, 3])
def test_steps_and_chunks_give_the_whole_sequence(layers, dtype):
    rng = np.random.default_rng(layers)
    model = RNN(5, 21, layers, dtype=dtype, seed=rng)
    x = rng.standard_normal((12, 2, 5)).astype(dtype)
    for each in (model, model.freeze()):
        y, h_n = each(x)
        h, state, steps = None, None, []
        for t in range(12):
            h, state = each.step(x[t], state)
            steps.append(h)
        first, between = each(x[:5])
        second, final = each(x[5:], between)
        found = {"steps": np.stack(steps), "h": state, "chunks": np.concatenate((first, second)), "h_n": final}
        # Rows are summed in one order, whatever their number: also without freezing.
        assert_identical(found, {"steps": y, "h": h_n, "chunks": y, "h_n": h_n})


def test_a_frozen_model_is_bit_identical_and_trains(dtype):
    rng = np.random.default_rng(0)
    model = RNN(5, 21, 2, bidirectional=True, dtype=dtype, seed=rng)
    x = rng.standard_normal((6, 3, 5)).astype(dtype)
    frozen = model.freeze()
    for _ in range(2):  # the first call packs
        assert_identical({"y": frozen(x)[0]}, {"y": model(x)[0]})
    results = []
    for each in (model, frozen):
        y, h_n, tape = each.forward(x)
        grads = each.backward(tape, y, h_n)
        results.append({"y": y, "x": grads.x, "h": grads.state, **grads.params})
    assert_identical(*results)


def test_results_are_bit_identical_on_any_number_of_threads(dtype):
    case = case_of((9, 50, 20, 70), lengths="positive")
    p, found = problem(case).astype(dtype), []
    before = fastlstm.get_num_threads()
    try:
        for threads in (1, 2, 3):
            fastlstm.set_num_threads(threads)
            found.append(solve(p, CPU))
    finally:
        fastlstm.set_num_threads(before)
    assert_identical(found[1], found[0])
    assert_identical(found[2], found[0])


def test_a_saved_model_gives_the_same(tmp_path):
    model = RNN(4, 10, 2, "relu", seed=3)
    x = np.ones((5, 2, 4), np.float32)
    model.save(tmp_path / "rnn.safetensors")
    loaded = RNN.load(tmp_path / "rnn.safetensors")
    assert_identical({"y": loaded(x)[0]}, {"y": model(x)[0]})


def test_nothing_else_is_written_and_nan_stays_in_its_sequence(dtype):
    """Padding may hold anything; a NaN reaches no other sequence's output."""
    rng = np.random.default_rng(1)
    model = RNN(3, 13, dtype=dtype, seed=rng)
    x, lengths = rng.standard_normal((6, 4, 3)).astype(dtype), np.array([6, 2, 4, 1])
    y, h_n, tape = model.forward(x, None, lengths)
    grads = model.backward(tape, y, h_n)
    dirty = x.copy()
    for sequence, length in enumerate(lengths):
        dirty[length:, sequence] = np.nan
    y2, h2, tape = model.forward(dirty, None, lengths)
    grads2 = model.backward(tape, y2, h2)
    assert_identical({"y": y2, "h": h2, **grads2.params}, {"y": y, "h": h_n, **grads.params})
    x[:, 1] = np.nan
    others = np.array([0, 2, 3])
    assert_identical({"y": model(x)[0][:, others]}, {"y": model(x[:, others])[0]})


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_gradients_by_the_states_of_each_step(nonlinearity):
    rng = np.random.default_rng(2)
    model = RNN(3, 7, 2, nonlinearity, bidirectional=True, dtype=np.float64, seed=rng)
    x, lengths = rng.standard_normal((6, 4, 3)), np.array([6, 2, 4, 1])
    dy = rng.standard_normal((6, 4, 14))
    found = []
    for backend in (CPU, REFERENCE):
        with backend.active():
            _, _, tape = model.forward(x, None, lengths)
            found.append(model.backward(tape, dy, keep_state_gradients=True).steps)
    assert found[0].shape == (6, 4, 4, 7)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12, atol=1e-14)
