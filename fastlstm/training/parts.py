"""The parts of a model: their names, and that they fit each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastlstm.errors import ArgumentError, DTypeError, ShapeError, shown
from fastlstm.lstm import LSTM
from fastlstm.training import arguments, model_file
from fastlstm.training.linear import Linear

__all__ = ["check_sizes", "named_heads", "named_lstms"]


def named_lstms(given: Any) -> dict[str, LSTM]:
    """Return one LSTM as ``lstm``, or those of a list as ``lstm0``, ``lstm1`` and so on."""
    found = list(given) if isinstance(given, list | tuple) else [given]
    if not found or not all(isinstance(lstm, LSTM) for lstm in found):
        raise ArgumentError(f"lstm must be an LSTM, or a list of at least one, got {shown(given)}")
    if len({id(lstm) for lstm in found}) != len(found):
        raise ArgumentError("the same LSTM stands twice in the list: make a copy of it")
    return {"lstm": found[0]} if isinstance(given, LSTM) else {f"lstm{k}": lstm for k, lstm in enumerate(found)}


def named_heads(given: Any) -> dict[str, Linear]:
    """Return one head as ``head``, or those of a mapping under their names."""
    if isinstance(given, Linear):
        return {"head": given}
    if not isinstance(given, Mapping) or not given or not all(isinstance(head, Linear) for head in given.values()):
        raise ArgumentError(f"head must be a Linear, or a mapping from names to at least one, got {shown(given)}")
    for name in given:
        if not model_file.is_name(name):
            raise ArgumentError(
                "the name of a head must be a word of letters, digits and underscores, at most"
                f" {model_file.LONGEST_NAME} of them, and neither 'x' nor 'scaler' nor start with 'lstm',"
                f" got {shown(name)}"
            )
    if len({id(head) for head in given.values()}) != len(given):
        raise ArgumentError("the same Linear has two names in the mapping of heads: make a copy of it")
    return dict(given)


def check_sizes(lstms: dict[str, LSTM], heads: dict[str, Linear]) -> None:
    """Check that each part can read what the one before it puts out."""
    first = next(iter(lstms.values()))
    size = first.cell.input_size
    for name, lstm in lstms.items():
        if lstm.cell.dtype != first.cell.dtype:
            raise DTypeError(f"{name} is {lstm.cell.dtype}, but the first LSTM is {first.cell.dtype}")
        if lstm.batch_first != first.batch_first:
            raise ArgumentError("all LSTMs must have the same batch_first")
        if lstm.cell.input_size != size:
            raise ShapeError(f"{name} must have an input_size of {size}, got {lstm.cell.input_size}")
        size = lstm.cell.output_size
    for name, head in heads.items():
        weight, label = head.params["weight"], name if name == "head" else f"head {name}"
        arguments.same_library(label, weight, "the LSTM's weight", first.params["weight_ih_l0"])
        if weight.dtype != first.cell.dtype:
            raise DTypeError(f"{label} is {weight.dtype}, but the LSTM is {first.cell.dtype}")
        if weight.shape[1] != size:
            raise ShapeError(f"{label} must have {size} in_features, got {weight.shape[1]}")
