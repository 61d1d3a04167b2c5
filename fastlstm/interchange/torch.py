"""Weights from and to PyTorch: the state dict of a ``torch.nn.LSTM`` as NumPy arrays, without PyTorch.

Names, shapes and gate order are the same, so weights are copied bit for bit. The bias differs: PyTorch has two,
``bias_ih`` and ``bias_hh``, and adds them. Import adds them; export writes the sum to ``bias_ih`` and zeros to
``bias_hh``. Export and import give bit-identical weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastlstm import parameters
from fastlstm.cell import Cell
from fastlstm.dispatch import kind_of
from fastlstm.errors import ArgumentError, ArrayTypeError, DTypeError, ShapeError
from fastlstm.interchange.gates import refuse_variants

__all__ = ["add", "check_prefix", "from_torch_state_dict", "select", "to_torch_state_dict"]

HostArray = np.ndarray[Any, Any]

_NAME = re.compile(r"(?:weight_ih|weight_hh|weight_hr|bias_ih|bias_hh)_l(?P<layer>0|[1-9][0-9]{0,8})(?:_reverse)?")
_CELL_NAMES = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}  # of a torch.nn.LSTMCell


def from_torch_state_dict(
    state_dict: Mapping[str, HostArray], *, prefix: str = "", dropout: float = 0.0
) -> tuple[Cell, dict[str, HostArray]]:
    """Turn the state dict of a ``torch.nn.LSTM`` or ``LSTMCell`` into the description and the parameters of a model.

    Parameters
    ----------
    state_dict : mapping of str to numpy.ndarray
        ``{name: tensor.numpy() for name, tensor in module.state_dict().items()}``, all float32 or all float64. An
        ``LSTMCell``, whose names have no layer, becomes a model of one layer.
    prefix : str
        What stands before each name, such as ``"lstm."`` for an LSTM inside a larger module; names without it are left
        out.
    dropout : float
        The dropout between layers, which a state dict does not hold.

    Returns
    -------
    cell : Cell
        The model's description.
    params : dict of str to numpy.ndarray
        New arrays in native byte order; they share nothing with the given ones.

    Raises
    ------
    ArgumentError
        If a name is missing or unknown.
    ArrayTypeError
        If `state_dict` is no mapping, or a value in it is no NumPy array.
    DTypeError
        If the arrays are not all float32 or all float64.
    ShapeError
        If a shape does not fit the others.

    Examples
    --------
    >>> import numpy as np
    >>> state_dict = {"weight_ih_l0": np.ones((8, 3)), "weight_hh_l0": np.ones((8, 2))}
    >>> cell, params = from_torch_state_dict(state_dict)
    >>> cell.input_size, cell.hidden_size, cell.bias, cell.dtype
    (3, 2, False, dtype('float64'))
    """
    given = select(state_dict, prefix)
    _check_arrays(given, prefix)
    if given.keys() <= _CELL_NAMES:
        given = {f"{name}_l0": value for name, value in given.items()}
    cell = _cell(given, prefix, dropout)
    params = {}
    for name, shape in parameters.shapes(cell).items():
        arrays = []
        for source in _torch_names(name):
            if given[source].shape != shape:
                raise ShapeError(f"{prefix}{source} must have shape {shape}, got {given[source].shape}")
            arrays.append(given[source].astype(cell.dtype, order="C", subok=False))
        params[name] = arrays[0] if len(arrays) == 1 else add(*arrays)
    return cell, params


def to_torch_state_dict(cell: Cell, params: Mapping[str, HostArray], *, prefix: str = "") -> dict[str, HostArray]:
    """Turn the parameters of a model into the state dict of a ``torch.nn.LSTM``.

    Parameters
    ----------
    cell : Cell
        The model's description.
    params : mapping of str to numpy.ndarray
        Its parameters, of the names, shapes and dtype that `cell` asks for.
    prefix : str
        What to put before each name, for an LSTM inside a larger module.

    Returns
    -------
    dict of str to numpy.ndarray
        New arrays, in PyTorch's order, for
        ``module.load_state_dict({name: torch.from_numpy(array) for name, array in state_dict.items()})``.
    """
    check_prefix(prefix)
    refuse_variants(cell, ("proj_size",), "torch.nn.LSTM")
    state_dict = {}
    for name in parameters.shapes(cell):
        first, *second = (prefix + target for target in _torch_names(name))
        state_dict[first] = np.array(params[name], cell.dtype, order="C")
        state_dict |= {target: np.zeros_like(state_dict[first]) for target in second}
    return state_dict


def _torch_names(name: str) -> tuple[str, ...]:
    """Return PyTorch's names of our parameter `name`: its two biases are our one."""
    if not name.startswith("bias"):
        return (name,)
    return name.replace("bias", "bias_ih"), name.replace("bias", "bias_hh")


def add(bias_ih: HostArray, bias_hh: HostArray) -> HostArray:
    """Add the two biases; zero changes no bit."""
    # Adding zero is not quite the identity: it turns -0.0 into 0.0, and then a round trip would change a bit.
    with np.errstate(all="ignore"):  # infinities of a broken model are its own
        return np.where(bias_hh == 0, bias_ih, bias_ih + bias_hh)


def check_prefix(prefix: Any) -> None:
    """Check what stands before each name."""
    if not isinstance(prefix, str):
        raise ArgumentError(f"prefix must be a string, got {prefix!r}")


def select(state_dict: Any, prefix: Any) -> dict[str, Any]:
    """Return the entries that `prefix` selects, without it: the parameters of an LSTM or of an LSTMCell."""
    check_prefix(prefix)
    if not isinstance(state_dict, Mapping):
        raise ArrayTypeError(f"state_dict must map names to arrays, got {type(state_dict).__qualname__}")
    names = [name for name in state_dict if isinstance(name, str) and name.startswith(prefix)]
    if not prefix and len(names) != len(state_dict):
        raise ArgumentError("the names in state_dict must be strings")
    given = {name.removeprefix(prefix): state_dict[name] for name in names}
    if given.keys() <= _CELL_NAMES:
        return given
    unknown = sorted(name for name in given if not _NAME.fullmatch(name))
    if unknown:
        inside = [match[1] for match in map(re.compile(r"(.+)weight_ih(?:_l0)?").fullmatch, unknown) if match]
        hint = f"; use prefix={prefix + inside[0]!r}" if inside else ""
        raise ArgumentError(f"{prefix}{unknown[0]} is no parameter of a torch.nn.LSTM{hint}")
    return given


def _check_arrays(given: dict[str, Any], prefix: str) -> None:
    first: Any = None
    for name, value in given.items():
        if type(value).__module__.partition(".")[0] == "torch":
            raise ArrayTypeError(
                f"{prefix}{name} is a {type(value).__qualname__} of torch: convert each with .numpy(), or"
                " .detach().cpu().numpy() if it requires gradients or is on a GPU"
            )
        library = kind_of(prefix + name, value).library
        if library != "numpy":
            raise ArrayTypeError(f"{prefix}{name} is an array of {library}, not NumPy: convert each with .get()")
        dtype = value.dtype.newbyteorder("=")
        first = dtype if first is None else first
        if dtype != first:
            raise DTypeError(f"all arrays must have one dtype: {prefix}{name} has {dtype}, the ones before {first}")


def _cell(given: dict[str, HostArray], prefix: str, dropout: float) -> Cell:
    """Work out the description; `given` has just the names that it asks for."""
    for name in ("weight_ih_l0", "weight_hh_l0"):
        if name not in given:
            raise ArgumentError(f"{prefix}{name} is missing")
    rows, columns = given["weight_hh_l0"].shape if given["weight_hh_l0"].ndim == 2 else (0, 0)
    for gates, other in ((3, "a GRU"), (1, "a plain RNN")):
        if rows and rows == gates * columns:  # an LSTM has 4H rows, and at most H columns
            raise ShapeError(
                f"{prefix}weight_hh_l0 has shape {(rows, columns)}: these are the weights of {other}; those of an LSTM"
                " have shape (4H, H)"
            )
    layers = [int(match["layer"]) for match in map(_NAME.fullmatch, given) if match]
    # A layer has at least two arrays, so a higher number leaves a gap; without this, naming what is missing has no end.
    if max(layers) >= len(given):
        raise ArgumentError(f"there are {len(given)} arrays, too few for a layer number {max(layers)}")
    cell = parameters.cell_of({re.sub("^bias_(ih|hh)", "bias", name): array for name, array in given.items()}, dropout)
    expected = [source for name in parameters.shapes(cell) for source in _torch_names(name)]
    missing = [name for name in expected if name not in given]
    if missing:
        raise ArgumentError(f"{prefix}{missing[0]} is missing" + f" (and {len(missing) - 1} more)" * (len(missing) > 1))
    extra = sorted(given.keys() - set(expected))
    if extra:
        raise ArgumentError(f"{prefix}{extra[0]} has no counterpart in the first layer")
    return cell
