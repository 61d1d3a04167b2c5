"""A live torch.nn.LSTM: with the weights of the other, each library computes the same."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from harness import REFERENCE, Case, problem
from tolerances import BOUNDS, assert_close, assert_identical, normalised_error

from fastlstm import LSTM, ArgumentError, ArrayTypeError, DTypeError, ModelFileError, ShapeError, parameters
from fastlstm.cell import Cell

torch = pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")

CELLS = [
    Cell(3, 5, layers, bias, 0.0, bidirectional)
    for layers, bias, bidirectional in itertools.product((1, 2), (True, False), (False, True))
]


def torch_lstm(cell: Cell, batch_first: bool = False, seed: int = 0):
    torch.manual_seed(seed)
    module = torch.nn.LSTM(
        cell.input_size,
        cell.hidden_size,
        cell.num_layers,
        cell.bias,
        batch_first,
        bidirectional=cell.bidirectional,
        dtype=getattr(torch, cell.dtype.name),
    )
    return module.requires_grad_(False)


def to_numpy(module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def outputs(y, state) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in zip(("y", "h_n", "c_n"), (y, *state), strict=True)}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_an_imported_lstm_computes_what_torch_computes(cell, batch_first, dtype):
    module = torch_lstm(Cell(3, 5, cell.num_layers, cell.bias, 0.0, cell.bidirectional, dtype), batch_first)
    x = np.random.default_rng(4).normal(size=(4, 7, 3)).astype(dtype)
    with REFERENCE.active():
        found = outputs(*LSTM.from_torch_state_dict(to_numpy(module), batch_first=batch_first)(x))
    expected = outputs(*module(torch.from_numpy(x)))
    claim = "torch" if dtype == np.float64 else "agreement"
    assert_close(claim, found, expected, backend="reference", dtype=dtype)


@pytest.mark.parametrize("prefix", ["", "cell."])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_an_imported_lstm_cell_computes_what_torch_computes(bias, prefix, dtype):
    with torch.random.fork_rng():
        torch.manual_seed(8)
        cell = torch.nn.LSTMCell(3, 5, bias=bias, dtype=torch.from_numpy(np.zeros(0, dtype)).dtype).requires_grad_(
            False
        )
    module = torch.nn.ModuleDict({"cell": cell}) if prefix else cell
    x, h, c = np.random.default_rng(4).normal(size=(9, 7, 5)).astype(dtype)[:3]
    x = np.ascontiguousarray(x[:, :3])
    lstm = LSTM.from_torch_state_dict(to_numpy(module), prefix=prefix)
    assert lstm.cell == Cell(3, 5, bias=bias, dtype=dtype)
    with REFERENCE.active():
        h_n, (_, c_n) = lstm.step(x, (h[None], c[None]))
    expected = cell(torch.from_numpy(x), (torch.from_numpy(h), torch.from_numpy(c)))
    expected = {name: value.numpy() for name, value in zip(("h_n", "c_n"), expected, strict=True)}
    claim = "torch" if dtype == np.float64 else "agreement"
    assert_close(claim, {"h_n": h_n, "c_n": c_n[0]}, expected, backend="reference", dtype=dtype)
    if prefix:
        with pytest.raises(ArgumentError, match=r"prefix='cell\.'"):
            LSTM.from_torch_state_dict(to_numpy(module))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_torch_loads_an_exported_lstm_and_computes_the_same(cell, dtype):
    lstm = LSTM(3, 5, cell.num_layers, cell.bias, bidirectional=cell.bidirectional, dtype=dtype, seed=5)
    module = torch_lstm(lstm.cell, seed=6)
    module.load_state_dict({name: torch.from_numpy(value) for name, value in lstm.to_torch_state_dict().items()})
    x = np.random.default_rng(7).normal(size=(4, 2, 3)).astype(dtype)
    with REFERENCE.active():
        found = outputs(*lstm(x))
    expected = outputs(*module(torch.from_numpy(x)))
    claim = "torch" if dtype == np.float64 else "agreement"
    assert_close(claim, found, expected, backend="reference", dtype=dtype)
    again = LSTM.from_torch_state_dict(to_numpy(module))
    assert_identical(again.params, lstm.params)


def test_weights_exported_by_torch_survive_a_round_trip(dtype):
    """Only the split of the bias is lost; the sum is bit-identical."""
    module = torch_lstm(Cell(3, 5, 2, bidirectional=True, dtype=dtype))
    state_dict = to_numpy(module)
    lstm = LSTM.from_torch_state_dict(state_dict)
    back = lstm.to_torch_state_dict()
    assert list(back) == list(state_dict)
    for name, value in back.items():
        if name.startswith("weight"):
            assert_identical({name: value}, {name: state_dict[name]})
        elif name.startswith("bias_ih"):
            other = name.replace("_ih", "_hh")
            assert_identical({name: value + back[other]}, {name: state_dict[name] + state_dict[other]})


def test_importing_shares_no_memory_with_the_module(dtype):
    module = torch_lstm(Cell(3, 5, dtype=dtype))
    lstm = LSTM.from_torch_state_dict(to_numpy(module))
    before = {name: value.copy() for name, value in lstm.params.items()}
    for tensor in module.parameters():
        tensor.add_(1)
    assert_identical(lstm.params, before)


@pytest.mark.parametrize(
    "pair", list(itertools.combinations(range(4), 2)), ids=lambda p: "".join(parameters.GATES[k] for k in p)
)
def test_swapping_any_two_gates_would_be_seen(pair):
    """The test of the test: with two gates exchanged, in any one array, the outputs are far from torch's."""
    module = torch_lstm(Cell(3, 5, dtype=np.dtype(np.float64)))
    x = torch.from_numpy(problem(Case(7, 4, 3, 5)).x)
    expected = outputs(*module(x))
    order = np.arange(4)
    order[list(pair)] = order[list(pair[::-1])]
    for swapped in to_numpy(module):
        state_dict = to_numpy(module)
        blocks = state_dict[swapped].reshape(4, 5, -1)[order]
        state_dict[swapped] = blocks.reshape(state_dict[swapped].shape)
        with REFERENCE.active():
            found = outputs(*LSTM.from_torch_state_dict(state_dict)(x.numpy()))
        for name, value in found.items():
            assert normalised_error(value, expected[name]) > 1e6 * BOUNDS["torch"].float64, (swapped, name)


def test_a_tensor_says_how_to_convert_it():
    module = torch_lstm(Cell(3, 5))
    for state_dict in (module.state_dict(), dict(module.named_parameters())):
        with pytest.raises(ArrayTypeError, match=r"weight_ih_l0 is a (Tensor|Parameter) of torch: .*\.numpy\(\)"):
            LSTM.from_torch_state_dict(state_dict)


def test_other_recurrent_modules_are_refused():
    for other in (torch.nn.GRU, torch.nn.RNN, torch.nn.GRUCell, torch.nn.RNNCell):
        with pytest.raises(ShapeError, match=r"\(4H, H\)"):
            LSTM.from_torch_state_dict(to_numpy(other(3, 5)))
    with pytest.raises(DTypeError, match="float16"):
        LSTM.from_torch_state_dict(to_numpy(torch.nn.LSTM(3, 5, dtype=torch.float16)))


def test_an_lstm_inside_a_module():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LSTM(3, 5), torch.nn.Linear(5, 1))
    lstm = LSTM.from_torch_state_dict(to_numpy(module), prefix="1.")
    assert_identical(lstm.params, LSTM.from_torch_state_dict(to_numpy(module[1])).params)
    exported = {name: torch.from_numpy(value) for name, value in lstm.to_torch_state_dict(prefix="1.").items()}
    missing, unexpected = module.load_state_dict(exported, strict=False)
    assert not unexpected and all(not name.startswith("1.") for name in missing)


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")  # of torch: it has no fast way for them
@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (2, True)])
def test_projections_go_both_ways(layers, bidirectional, dtype):
    options = {"num_layers": layers, "bidirectional": bidirectional, "proj_size": 2}
    with torch.random.fork_rng():
        torch.manual_seed(8)
        module = torch.nn.LSTM(3, 5, **options, dtype=getattr(torch, np.dtype(dtype).name)).requires_grad_(False)
    lstm = LSTM.from_torch_state_dict(to_numpy(module))
    assert lstm.cell.proj_size == 2
    x = np.random.default_rng(7).normal(size=(4, 2, 3)).astype(dtype)
    with REFERENCE.active():
        found = outputs(*lstm(x))
    claim = "torch" if dtype == np.float64 else "agreement"
    assert_close(claim, found, outputs(*module(torch.from_numpy(x))), backend="reference", dtype=dtype)
    assert list(lstm.to_torch_state_dict()) == list(module.state_dict())
    again = LSTM.from_torch_state_dict(lstm.to_torch_state_dict())
    assert_identical(again.params, lstm.params)


@pytest.mark.parametrize("make", ["GRU", "GRUCell", "RNN", "RNNCell"])
def test_files_of_other_recurrent_modules_are_refused_by_name(make):
    file = io.BytesIO()
    torch.save({f"m.{k}": v for k, v in getattr(torch.nn, make)(3, 5).state_dict().items()}, file)
    file.seek(0)
    with pytest.raises(ShapeError, match=f"m.weight_hh_l0 .* weights of a {'GRU' if 'GRU' in make else 'plain RNN'};"):
        LSTM.load_torch(file, "m.")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dtype", ["qint8", "float16"])
@pytest.mark.parametrize("kind", ["LSTM", "Linear"])
def test_state_dicts_of_quantised_modules_are_refused_by_name(kind, dtype):
    """As quantize_dynamic makes them; of Linear in float16, PyTorch keeps plain tensors, and the LSTM is read."""
    module = torch.nn.ModuleDict({"lstm": torch.nn.LSTM(3, 4), "head": torch.nn.Linear(4, 1)})
    try:
        module = torch.ao.quantization.quantize_dynamic(module, {getattr(torch.nn, kind)}, getattr(torch, dtype))
    except RuntimeError as error:  # an engine that this build of PyTorch lacks
        pytest.skip(f"this PyTorch cannot quantise: {error}")
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    if (kind, dtype) == ("Linear", "float16"):
        assert LSTM.load_torch(file, "lstm.").cell.hidden_size == 4
        return
    with pytest.raises(ModelFileError, match="quantised") as caught:
        LSTM.load_torch(file, "lstm.")
    assert "torch.save(model.state_dict()" not in str(caught.value)
