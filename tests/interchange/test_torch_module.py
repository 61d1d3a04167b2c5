"""fastlstm.torch.LSTM in the place of torch.nn.LSTM: the same outputs, gradients, packed sequences and state dict."""

from __future__ import annotations

import copy
import io
import itertools

import numpy as np
import pytest
from tolerances import assert_close

from fastlstm import ArgumentError, ArrayTypeError, DTypeError, ShapeError

torch = pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")

import fastlstm.torch  # noqa: E402

T, B, I, H = 7, 4, 3, 5  # noqa: E741
pack, pad = torch.nn.utils.rnn.pack_padded_sequence, torch.nn.utils.rnn.pad_packed_sequence
GRID = list(itertools.product((1, 2), (True, False), (False, True), (False, True)))
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")


def pair(dtype=torch.float64, **options):
    """Return torch's module and ours, with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        theirs = torch.nn.LSTM(I, H, dtype=dtype, **options)
    ours = fastlstm.torch.LSTM(I, H, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def leaf(tensor):
    return tensor.clone().requires_grad_()


def solve(module, x, hx=None, packed=None):
    """Run a module, take a loss of all its outputs, and return everything."""
    module.zero_grad()
    x = leaf(x)
    hx = None if hx is None else tuple(map(leaf, hx))
    given = x if packed is None else pack(x, packed, batch_first=module.batch_first, enforce_sorted=False)
    y, (h_n, c_n) = module(given, hx)
    if packed is not None:
        y, lengths = pad(y, batch_first=module.batch_first)
        assert lengths.tolist() == packed
    loss = sum((value * draw(*value.shape, dtype=value.dtype, seed=k)).sum() for k, value in enumerate((y, h_n, c_n)))
    loss.backward()
    found = {"y": y, "h_n": h_n, "c_n": c_n, "dx": x.grad}
    found |= {} if hx is None else {"dh0": hx[0].grad, "dc0": hx[1].grad}
    found |= {name: value.grad for name, value in module.named_parameters()}
    return {name: value.detach().numpy().copy() for name, value in found.items()}


def states(options, batch=B, dtype=torch.float64):
    rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    return draw(rows, batch, options.get("proj_size") or H, dtype=dtype, seed=5), draw(
        rows, batch, H, dtype=dtype, seed=6
    )


@pytest.mark.parametrize("packed", [None, [7, 3, 1, 7]], ids=["padded", "packed"])
@pytest.mark.parametrize("state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize(("layers", "bias", "batch_first", "bidirectional"), GRID)
def test_outputs_and_gradients_are_torchs(layers, bias, batch_first, bidirectional, state, packed):
    options = {"num_layers": layers, "bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    theirs, ours = pair(**options)
    x = draw(B, T, I) if batch_first else draw(T, B, I)
    hx = states(options) if state else None
    found, expected = solve(ours, x, hx, packed), solve(theirs, x, hx, packed)
    assert_close("torch", found, expected, backend="cpu", dtype=np.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 2}], ids=str)
def test_float32_and_projections(options, dtype):
    theirs, ours = pair(dtype, **options)
    x, hx = draw(T, B, I, dtype=dtype), states(options, dtype=dtype)
    claim, kind = ("torch", np.float64) if dtype == torch.float64 else ("agreement", np.float32)
    assert_close(claim, solve(ours, x, hx), solve(theirs, x, hx), backend="cpu", dtype=kind)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 2}], ids=str)
def test_gradcheck_passes(options):
    _, ours = pair(**options)
    x, (h0, c0) = leaf(draw(3, 2, I)), map(leaf, states(options, 2))
    names = [name for name, _ in ours.named_parameters()]

    def run(x, h0, c0, *weights):
        y, (h_n, c_n) = torch.func.functional_call(ours, dict(zip(names, weights, strict=True)), (x, (h0, c0)))
        return y, h_n, c_n

    assert torch.autograd.gradcheck(run, (x, h0, c0, *ours.parameters()))


def test_it_is_a_torch_lstm_with_its_state_dict(tmp_path):
    theirs, ours = pair(num_layers=2, bidirectional=True)
    assert isinstance(ours, torch.nn.LSTM)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    x = draw(T, B, I)
    expected = solve(ours, x)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        found = solve(other, x)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_unbatched_input():
    theirs, ours = pair()
    x, hx = draw(T, I), tuple(state[:, 0] for state in states({}))
    assert_close("torch", solve(ours, x, hx), solve(theirs, x, hx), backend="cpu", dtype=np.float64)


def test_without_gradients_nothing_is_kept():
    theirs, ours = pair()
    x = draw(T, B, I)
    with torch.no_grad():
        y, (h_n, _) = ours(x)
    assert not y.requires_grad and y.grad_fn is None and not h_n.requires_grad
    assert_close("torch", {"y": y.numpy()}, {"y": theirs(x)[0].detach().numpy()}, backend="cpu", dtype=np.float64)


def test_only_what_needs_a_gradient_gets_one():
    _, ours = pair()
    ours.requires_grad_(False)
    x = leaf(draw(T, B, I))
    ours(x)[0].sum().backward()
    assert x.grad is not None and all(value.grad is None for value in ours.parameters())
    theirs, ours = pair()
    x = draw(T, B, I)
    for module in (theirs, ours):
        module(x)[0].square().sum().backward()
    assert x.grad is None
    by_name = [{name: value.grad.numpy() for name, value in m.named_parameters()} for m in (ours, theirs)]
    assert_close("torch", *by_name, backend="cpu", dtype=np.float64)


def test_the_two_biases_have_gradients_of_their_own():
    """An optimiser or clipping changes gradients in place: were they one memory, it would happen twice."""
    _, ours = pair()
    ours(draw(T, B, I))[0].sum().backward()
    one, other = ours.bias_ih_l0.grad, ours.bias_hh_l0.grad
    before = other.clone()
    one.mul_(2)
    assert torch.equal(other, before)


def test_a_loss_of_the_final_states_alone():
    theirs, ours = pair()
    x = draw(T, B, I)
    for module in (theirs, ours):
        module.zero_grad()
        module(x)[1][1].sum().backward()
    np.testing.assert_allclose(ours.weight_hh_l0.grad, theirs.weight_hh_l0.grad, rtol=0, atol=1e-12)


def test_weights_that_change_before_the_backward_pass_are_noticed():
    _, ours = pair()
    y = ours(draw(T, B, I))[0]
    with torch.no_grad():
        ours.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivatives_are_refused():
    _, ours = pair()
    x = leaf(draw(T, B, I))
    (gradient,) = torch.autograd.grad(ours(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_training_goes_as_with_torch():
    """Twenty steps of Adam on packed sequences: the losses and the weights stay those of torch."""
    lengths = [T, 2, 5, 1]
    x, target = draw(T, B, I), draw(T, B, H, seed=9)
    losses = []
    modules = pair()
    for module in modules:
        optimiser = torch.optim.Adam(module.parameters(), 0.05)
        losses.append([])
        for _ in range(20):
            optimiser.zero_grad()
            y, _ = pad(module(pack(x, lengths, enforce_sorted=False))[0])
            loss = (y - target).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            optimiser.step()
            losses[-1].append(loss.item())
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-9)
    assert losses[0][-1] < 0.9 * losses[0][0]


def test_dropout_follows_torchs_seed_and_acts_in_training_only():
    _, ours = pair(num_layers=2, dropout=0.5)
    x = draw(T, B, I)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(ours(x)[0].detach())
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    with torch.no_grad():
        torch.manual_seed(1)
        assert torch.equal(ours(x)[0], outputs[0]), "also without gradients, as in torch"
    plain, _ = pair(num_layers=2)
    np.testing.assert_allclose(ours.eval()(x)[0].detach(), plain(x)[0].detach(), rtol=0, atol=1e-12)


def test_weights_of_a_parametrisation_are_used():
    theirs, ours = pair()
    for module in (theirs, ours):
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    x = draw(T, B, I)
    assert_close("torch", solve(ours, x), solve(theirs, x), backend="cpu", dtype=np.float64)


def test_strided_and_expanded_tensors():
    theirs, ours = pair()
    negated = torch.complex(draw(T, B, I), draw(T, B, I, seed=1)).conj().imag  # PyTorch keeps the sign as a flag
    for x in (draw(B, T, I).transpose(0, 1), draw(T, B, 2 * I)[..., ::2], draw(1, 1, I).expand(T, B, I), negated):
        with torch.no_grad():
            np.testing.assert_allclose(ours(x)[0], theirs(x)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: draw(T, B, I + 1), ShapeError, "x must have shape"),
        (lambda: draw(T, B, I, dtype=torch.float32), DTypeError, "float32"),
        (lambda: draw(T, B, I).to(torch.bfloat16), DTypeError, "input must be float32 or float64"),
        (lambda: draw(T, B, I).numpy(), ArrayTypeError, "input must be a tensor"),
        (lambda: torch.empty(T, B, I, device="meta"), ArrayTypeError, "input is on meta"),
        (lambda: None, ArrayTypeError, "input must be a tensor, got NoneType"),
        (lambda: draw(T, I, 1, 1), ShapeError, "x must have shape"),
        (lambda: pack(draw(T, B, I + 1), [2, 7, 1, 3], enforce_sorted=False), ShapeError, "x must have shape"),
        (lambda: pack(draw(T, B, I).long(), [2, 7, 1, 3], enforce_sorted=False), DTypeError, "input must be float32"),
    ],
)
def test_what_does_not_fit_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        pair()[1](make())


def test_a_state_that_does_not_fit_is_refused():
    good = draw(1, B, H)
    for x in (draw(T, B, I), pack(draw(T, B, I), [2, 7, 1, 3], enforce_sorted=False)):
        for bad in (good, (good,), 3):
            with pytest.raises(ArgumentError, match="hx must be a pair"):
                pair()[1](x, bad)
        for bad in (None, good.numpy(), 3):
            for hx, name in (((bad, good), "h_0"), ((good, bad), "c_0")):
                with pytest.raises(ArrayTypeError, match=f"{name} must be a tensor"):
                    pair()[1](x, hx)
        for bad in (draw(1, B, H + 1), draw(1, B - 1, H), draw(1, B + 1, H), draw(2, B, H), draw(B, H), draw(H)):
            with pytest.raises(ShapeError, match=r"h_?0"):
                pair()[1](x, (bad, good))
            with pytest.raises(ShapeError, match=r"c_?0"):
                pair()[1](x, (good, bad))


def test_a_weight_that_is_missing_is_refused():
    _, ours = pair()
    ours.weight_hh_l0 = None
    with pytest.raises(ArrayTypeError, match="weight_hh_l0 must be a tensor"):
        ours(draw(T, B, I))


def test_a_dropout_of_one_is_refused_only_where_it_acts():
    theirs, ours = pair(num_layers=2, dropout=1.0)
    x = draw(T, B, I)
    np.testing.assert_allclose(ours.eval()(x)[0].detach(), theirs.eval()(x)[0].detach(), rtol=0, atol=1e-12)
    with pytest.raises(ArgumentError, match="dropout"):
        ours.train()(x)
