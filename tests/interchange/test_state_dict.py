"""State dicts of PyTorch, without PyTorch: weights go through bit for bit, and what does not fit is refused."""

from __future__ import annotations

import itertools
import types

import numpy as np
import pytest
from tolerances import assert_identical

from fastlstm import LSTM, ArgumentError, ArrayTypeError, DTypeError, ShapeError, parameters
from fastlstm.cell import Cell
from fastlstm.interchange import from_torch_state_dict, to_torch_state_dict

CELLS = [
    Cell(3, 5, layers, bias, 0.0, bidirectional)
    for layers, bias, bidirectional in itertools.product((1, 2), (True, False), (False, True))
]


def draw(cell: Cell, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Draw a state dict as PyTorch would have it, without PyTorch."""
    rng = np.random.default_rng(3)
    return {name: rng.normal(size=a.shape).astype(dtype) for name, a in template(cell).items()}


def template(cell: Cell) -> dict[str, np.ndarray]:
    """Write down the names and shapes by hand: PyTorch's documentation, not our tables."""
    found = {}
    for layer in range(cell.num_layers):
        inputs = cell.input_size if layer == 0 else cell.hidden_size * (2 if cell.bidirectional else 1)
        for suffix in ("", "_reverse") if cell.bidirectional else ("",):
            found[f"weight_ih_l{layer}{suffix}"] = np.zeros((4 * cell.hidden_size, inputs))
            found[f"weight_hh_l{layer}{suffix}"] = np.zeros((4 * cell.hidden_size, cell.hidden_size))
            if cell.bias:
                found[f"bias_ih_l{layer}{suffix}"] = np.zeros(4 * cell.hidden_size)
                found[f"bias_hh_l{layer}{suffix}"] = np.zeros(4 * cell.hidden_size)
    return found


def bits(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value.view(f"i{value.itemsize}") for name, value in arrays.items()}


# --- Round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_import_takes_the_weights_bit_for_bit_and_adds_the_biases(cell, dtype):
    state_dict = draw(cell, dtype)
    found_cell, params = from_torch_state_dict(state_dict, dropout=0.25)
    assert found_cell == Cell(3, 5, cell.num_layers, cell.bias, 0.25, cell.bidirectional, dtype)
    assert list(params) == list(parameters.shapes(cell))
    expected = {}
    for name, value in state_dict.items():
        if name.startswith("weight"):
            expected[name] = value
        elif name.startswith("bias_ih"):
            expected[name.replace("_ih", "")] = value + state_dict[name.replace("_ih", "_hh")]
    assert_identical(bits(params), bits({name: expected[name] for name in params}))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_export_and_import_again_changes_no_bit(cell, dtype):
    _, params = from_torch_state_dict(draw(cell, dtype))
    special = np.array([-0.0, np.nan, np.inf, -np.inf, np.finfo(dtype).smallest_subnormal], dtype)
    for value in params.values():
        value.flat[: special.size] = special
    state_dict = to_torch_state_dict(Cell(3, 5, cell.num_layers, cell.bias, 0.0, cell.bidirectional, dtype), params)
    assert list(state_dict) == list(template(cell)), "PyTorch's names, in its order"
    assert all(not np.any(value) for name, value in state_dict.items() if name.startswith("bias_hh"))
    _, again = from_torch_state_dict(state_dict)
    assert_identical(bits(again), bits(params))


def test_a_prefix_chooses_one_lstm_of_a_module(dtype):
    first, second = draw(CELLS[0], dtype), draw(CELLS[1], dtype)
    module = {f"encoder.lstm.{name}": value for name, value in first.items()}
    module |= {f"decoder.{name}": value for name, value in second.items()}
    module |= {"head.weight": np.ones((2, 2), np.float16), "head.steps": 3}
    for prefix, alone in (("encoder.lstm.", first), ("decoder.", second)):
        cell, params = from_torch_state_dict(module, prefix=prefix)
        alone_cell, alone_params = from_torch_state_dict(alone)
        assert cell == alone_cell
        assert_identical(params, alone_params)
        back = to_torch_state_dict(cell, params, prefix=prefix)
        assert {name.removeprefix(prefix) for name in back} == set(alone)
        assert_identical(from_torch_state_dict(back, prefix=prefix)[1], alone_params)


@pytest.mark.parametrize(
    "arrange",
    [
        np.asfortranarray,
        lambda a: np.repeat(a, 2, axis=0)[::2],
        lambda a: a.astype(a.dtype.newbyteorder(">")) if a.ndim == 2 else a,
        lambda a: a.view(np.memmap),
    ],
    ids=["column major", "strided", "big-endian matrices", "subclass"],
)
def test_results_share_nothing_and_are_plain_arrays(dtype, arrange):
    cell = Cell(3, 5, dtype=dtype)
    state_dict = {name: arrange(value) for name, value in draw(cell, dtype).items()}
    expected = from_torch_state_dict(draw(cell, dtype))[1]
    found_cell, params = from_torch_state_dict(state_dict)
    back = to_torch_state_dict(found_cell, {name: arrange(value) for name, value in params.items()})
    assert_identical(bits(params), bits(expected))
    exported = to_torch_state_dict(cell, params)
    for value in [*params.values(), *exported.values(), *back.values()]:
        assert type(value) is np.ndarray
        assert value.flags.c_contiguous and value.flags.writeable and value.dtype == dtype and value.dtype.isnative
    arrays = [*state_dict.values(), *params.values(), *exported.values()]
    for one, other in itertools.combinations(arrays, 2):
        assert not np.shares_memory(one, other)


# --- What does not fit ------------------------------------------------------------------------------------------------


def without(*names):
    return lambda state_dict: {name: value for name, value in state_dict.items() if name not in names}


def put(**arrays):
    return lambda state_dict: state_dict | arrays


def float32(*shape):
    return np.zeros(shape, np.float32)


class Tensor:
    """Stands in for torch.Tensor, which the machine may lack."""

    __module__ = "torch"


class CuPyArray:
    """Stands in for cupy.ndarray."""


CuPyArray.__module__, CuPyArray.__name__ = "cupy", "ndarray"

REFUSED = {
    "nothing at all": (lambda s: {}, ArgumentError, "weight_ih_l0 is missing"),
    "a list": (lambda s: list(s.items()), ArrayTypeError, "state_dict"),
    "names that are no strings": (lambda s: s | {1: float32(2)}, ArgumentError, "strings"),
    "input weights missing": (without("weight_ih_l0"), ArgumentError, "weight_ih_l0 is missing"),
    "recurrent weights missing": (without("weight_hh_l0"), ArgumentError, "weight_hh_l0 is missing"),
    "upper weights missing": (without("weight_hh_l1"), ArgumentError, "weight_hh_l1 is missing"),
    "first bias missing": (without("bias_ih_l0"), ArgumentError, "bias_ih_l0 is missing"),
    "second bias missing": (without("bias_hh_l0"), ArgumentError, "bias_hh_l0 is missing"),
    "upper bias missing": (without("bias_ih_l1", "bias_hh_l1"), ArgumentError, r"bias_ih_l1 is missing \(and 1 more"),
    "one layer reversed": (put(weight_ih_l0_reverse=float32(20, 3)), ArgumentError, "weight_hh_l0_reverse is missing"),
    "upper layer reversed": (
        put(weight_ih_l1_reverse=float32(20, 5)),
        ArgumentError,
        "weight_ih_l1_reverse has no counterpart",
    ),
    "a gap in the layers": (put(weight_ih_l3=float32(20, 5)), ArgumentError, "weight_ih_l2 is missing"),
    "a billion layers": (put(weight_ih_l999999999=float32(20, 5)), ArgumentError, "too few"),
    "a layer beyond any integer": (
        lambda s: s | {"weight_ih_l" + "9" * 5000: float32(20, 5)},
        ArgumentError,
        "no param",
    ),
    "a layer with a leading zero": (put(weight_ih_l00=float32(20, 5)), ArgumentError, "weight_ih_l00 is no parameter"),
    "projections of another size": (put(weight_hr_l0=float32(2, 5)), ShapeError, r"\(4H, H\)"),
    "our own bias": (put(bias_l0=float32(20)), ArgumentError, "bias_l0 is no parameter"),
    "names of an LSTMCell beside an LSTM's": (put(weight_ih=float32(20, 3)), ArgumentError, "weight_ih is no param"),
    "half an LSTMCell": (lambda s: {"weight_ih": s["weight_ih_l0"]}, ArgumentError, "weight_hh.* is missing"),
    "an LSTMCell with one bias": (
        lambda s: {
            name[:-3]: value for name, value in s.items() if name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0")
        },
        ArgumentError,
        "bias_hh.* is missing",
    ),
    "another module's": (put(weight=float32(2, 2)), ArgumentError, "weight is no parameter"),
    "a GRU's": (lambda s: {name: value[: 3 * 5] for name, value in s.items()}, ShapeError, "weights of a GRU"),
    "a plain RNN's": (lambda s: {name: value[:5] for name, value in s.items()}, ShapeError, "weights of a plain RNN"),
    "input weights transposed": (lambda s: s | {"weight_ih_l0": s["weight_ih_l0"].T}, ShapeError, "weight_ih_l0"),
    "input weights flat": (put(weight_ih_l0=float32(60)), ShapeError, "weight_ih_l0"),
    "recurrent weights with too few columns": (
        put(weight_hh_l1=float32(20, 4)),
        ShapeError,
        r"\(20, 5\), got \(20, 4\)",
    ),
    "first bias too long": (put(bias_ih_l0=float32(21)), ShapeError, r"bias_ih_l0.*\(20,\), got \(21,\)"),
    "second bias would broadcast": (put(bias_hh_l0=float32(1)), ShapeError, r"bias_hh_l0.*\(20,\), got \(1,\)"),
    "no units": (
        lambda s: {"weight_ih_l0": float32(0, 3), "weight_hh_l0": float32(0, 0)},
        ArgumentError,
        "hidden_size",
    ),
    "float16": (lambda s: {name: a.astype(np.float16) for name, a in s.items()}, DTypeError, "float16"),
    "integers": (lambda s: {name: a.astype(np.int64) for name, a in s.items()}, DTypeError, "int64"),
    "one array of another dtype": (put(bias_hh_l1=np.zeros(20)), DTypeError, "bias_hh_l1 has float64"),
    "a list of numbers": (put(bias_hh_l0=[0.0] * 20), ArrayTypeError, "bias_hh_l0"),
    "a masked array": (put(bias_hh_l0=np.ma.zeros(20)), ArrayTypeError, "mask"),
    "a tensor": (put(bias_hh_l0=Tensor()), ArrayTypeError, r"\.numpy\(\)"),
    "a CuPy array": (put(bias_hh_l0=CuPyArray()), ArrayTypeError, r"\.get\(\)"),
}


@pytest.mark.parametrize("prefix", ["", "lstm."])
@pytest.mark.parametrize("case", REFUSED)
def test_mismatched_arguments_are_refused(case, prefix):
    change, error, message = REFUSED[case]
    state_dict = change(draw(Cell(3, 5, 2), np.float32))
    if isinstance(state_dict, dict) and case != "names that are no strings":
        state_dict = {prefix + name: value for name, value in state_dict.items()}
    elif prefix:
        return  # there is nothing to put a prefix before
    with pytest.raises(error, match=message) as caught:
        from_torch_state_dict(state_dict, prefix=prefix)
    if "missing" in message:
        assert str(caught.value).startswith(prefix), "a missing name is given in full"


def test_a_missing_prefix_is_suggested():
    module = {f"encoder.{name}": value for name, value in draw(Cell(3, 5), np.float32).items()} | {"a": float32(1)}
    with pytest.raises(ArgumentError, match=r"prefix='encoder\.'"):
        from_torch_state_dict(module)
    with pytest.raises(ArgumentError, match=r"decoder\.weight_ih_l0 is missing"):
        from_torch_state_dict(module, prefix="decoder.")
    for bad in (None, 1, b"encoder."):
        with pytest.raises(ArgumentError, match="prefix must be a string"):
            from_torch_state_dict(module, prefix=bad)
        with pytest.raises(ArgumentError, match="prefix must be a string"):
            to_torch_state_dict(*from_torch_state_dict(module, prefix="encoder."), prefix=bad)


@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh_l0"])
def test_functions_explain_names_of_pytorch(name):
    params = parameters.initialise(Cell(3, 5), 0) | {name: float32(20)}
    with pytest.raises(ArgumentError, match=f"unknown parameter {name};.*from_torch_state_dict"):
        parameters.cell_of(params)


def test_names_that_are_no_strings_do_not_hinder_a_prefix():
    module = {f"lstm.{name}": value for name, value in draw(Cell(3, 5), np.float32).items()} | {0: None}
    assert from_torch_state_dict(module, prefix="lstm.")[0] == Cell(3, 5)


def test_any_mapping_will_do():
    assert from_torch_state_dict(types.MappingProxyType(draw(Cell(3, 5), np.float32)))[0] == Cell(3, 5)


@pytest.mark.parametrize(
    "fields",
    [{"peephole": True}, {"coupled": True}, {"forget_gate": False}, {"clip": 1.0}, {"layer_norm": True},
     {"activations": ("sigmoid", "tanh", "relu")}, {"reverse": True}, {"zoneout": (0.1, 0.0)}],
    ids=str,
)  # fmt: skip
def test_variants_that_torch_lacks_are_refused_by_name(fields):
    (name,) = fields
    with pytest.raises(ArgumentError, match=rf"torch\.nn\.LSTM has no counterpart of {name}="):
        LSTM(3, 4, **fields, seed=0).to_torch_state_dict()
