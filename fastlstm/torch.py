"""A drop-in for ``torch.nn.LSTM`` on the CPU that runs fastlstm's kernels, forward and backward.

Only this module of fastlstm imports PyTorch. Tensors and arrays share memory in both directions: no copies are made.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastlstm import functional
from fastlstm.backends.base import Dropout
from fastlstm.cell import Cell
from fastlstm.errors import ArgumentError, ArrayTypeError, DTypeError, ShapeError
from fastlstm.interchange.torch import add

__all__ = ["LSTM"]

_DTYPES = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}


class LSTM(torch.nn.LSTM):  # type: ignore[misc]
    """``torch.nn.LSTM`` on fastlstm's CPU kernels: the same arguments, calls, parameters and state dict.

    Differences: it runs on the CPU only, in float32 and float64, also under ``torch.autocast``; it has no second
    derivatives, and no transforms of ``torch.func``; ``torch.export`` and ``torch.jit.script`` do not take it; dropout
    is below 1, and its masks are seeded by PyTorch's generator, but differ from those of PyTorch.

    Parameters
    ----------
    *args, **kwargs
        As for ``torch.nn.LSTM``.

    Examples
    --------
    >>> import torch
    >>> from fastlstm.torch import LSTM
    >>> lstm = LSTM(3, 8, batch_first=True)
    >>> y, (h_n, c_n) = lstm(torch.ones(2, 5, 3))
    >>> y.shape
    torch.Size([2, 5, 8])
    >>> y.sum().backward()
    >>> lstm.weight_hh_l0.grad.shape
    torch.Size([32, 8])
    """

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled graph calls it as it is
    def forward(self, input: Any, hx: Any = None) -> Any:  # torch's name
        """Run whole sequences: see ``torch.nn.LSTM``.

        Raises
        ------
        ArrayTypeError
            If a tensor is not on the CPU.
        ArgumentError, ShapeError, DTypeError
            If an argument does not fit.
        """
        if not isinstance(input, PackedSequence):
            y, h_n, c_n = self._run(input, hx, None, self.batch_first)
            return y, (h_n, c_n)
        batch_sizes, order, back = input.batch_sizes, input.sorted_indices, input.unsorted_indices
        _check("input", input.data)
        # The rows stay sorted by length, as in the packed data.
        padded, lengths = pad_packed_sequence(PackedSequence(input.data, batch_sizes))
        if order is not None and hx is not None:
            h0, c0 = _pair(hx)
            for name, state in (("h_0", h0), ("c_0", c0)):
                if state.dim() != 3 or state.shape[1] != len(lengths):
                    raise ShapeError(f"{name} must have shape (L*D, {len(lengths)}, H), got {tuple(state.shape)}")
            hx = self.permute_hidden((h0, c0), order)
        y, h_n, c_n = self._run(padded, hx, lengths.numpy(), False)
        data = pack_padded_sequence(y, lengths).data
        return PackedSequence(data, batch_sizes, order, back), self.permute_hidden((h_n, c_n), back)

    def _run(self, x: Any, hx: Any, lengths: Any, batch_first: bool) -> Any:
        names = [name for layer in self._all_weights for name in layer]
        weights = [getattr(self, name) for name in names]
        state = (None, None) if hx is None else _pair(hx)
        for name, tensor in (("input", x), *zip(names, weights, strict=True)):
            _check(name, tensor)
        # A module that is evaluated, or has one layer, may have any dropout.
        dropout = float(self.dropout) if self.training and self.num_layers > 1 else 0.0
        cell = _cell(
            self.input_size, self.hidden_size, self.num_layers, self.bias, dropout, self.bidirectional,
            _DTYPES[weights[0].dtype], self.proj_size,
        )  # fmt: skip
        key = None
        if cell.dropout:
            key = int(torch.randint(2**62, ()).item())
        call = _Call(cell, tuple(names), lengths, batch_first, key)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *state, *weights)):
            return _Function.apply(call, x, *state, *weights)
        y, (h_n, c_n), _ = call.forward(x, state, weights, False)
        return tuple(map(torch.from_numpy, (y, h_n, c_n)))


def _pair(hx: Any) -> tuple[Any, Any]:
    if not isinstance(hx, tuple | list) or len(hx) != 2:
        raise ArgumentError(f"hx must be a pair (h_0, c_0), got {type(hx).__qualname__}")
    h0, c0 = hx
    _check("h_0", h0)
    _check("c_0", c0)
    return h0, c0


def _check(name: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise ArrayTypeError(f"{name} must be a tensor, got {type(tensor).__qualname__}")
    if tensor.device.type != "cpu":
        raise ArrayTypeError(f"{name} is on {tensor.device}: fastlstm.torch.LSTM runs on the CPU")
    if tensor.dtype not in _DTYPES:
        raise DTypeError(f"{name} must be float32 or float64, got {tensor.dtype}")


def _array(tensor: Any) -> Any:
    """Return a tensor's memory; a copy if the tensor stands for its negative, as the imaginary part of a conjugate."""
    return tensor.detach().resolve_neg().numpy()


@functools.lru_cache(maxsize=64)
def _cell(
    inputs: int, hidden: int, layers: int, bias: bool, dropout: float, bidirectional: bool, dtype: Any, proj_size: int
) -> Cell:
    """Return the cell of a module; the calls that are prepared for it are kept in it."""
    return Cell(inputs, hidden, layers, bias, dropout, bidirectional, dtype, proj_size=proj_size)


class _Call:
    """The arguments of one call that are not tensors."""

    def __init__(self, cell: Cell, names: tuple[str, ...], lengths: Any, batch_first: bool, key: int | None) -> None:
        self.cell, self.names, self.lengths, self.batch_first = cell, names, lengths, batch_first
        self.dropout = None if key is None else Dropout(cell.dropout, key)

    def params(self, weights: Any) -> dict[str, Any]:
        """Return our parameters: the tensors' memory, and the sums of the two biases."""
        found: dict[str, Any] = {}
        for name, weight in zip(self.names, weights, strict=True):
            ours, array = name.replace("bias_ih", "bias").replace("bias_hh", "bias"), _array(weight)
            found[ours] = add(found[ours], array) if name.startswith("bias_hh") else array
        return found

    def forward(self, x: Any, state: Any, weights: Any, keep_tape: bool) -> Any:
        given = None if state[0] is None else tuple(map(_array, state))
        return functional.run(
            self.cell, self.params(weights), _array(x), given, self.lengths, batch_first=self.batch_first,
            dropout=self.dropout, keep_tape=keep_tape,
        )  # fmt: skip

    def gradients(self, grads: Any) -> list[Any]:
        """Return the gradients of the weights: the two biases have the same one, in memory of its own each."""
        found = []
        for name in self.names:
            array = grads.params[name.replace("bias_ih", "bias").replace("bias_hh", "bias")]
            found.append(torch.from_numpy(array.copy() if name.startswith("bias_hh") else array))
        return found


class _Function(torch.autograd.Function):  # type: ignore[misc]
    """fastlstm's forward and backward pass, as PyTorch's autograd calls them."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Any, h0: Any, c0: Any, *weights: Any) -> Any:
        y, (h_n, c_n), ctx.tape = call.forward(x, (h0, c0), weights, True)
        ctx.call, ctx.has_state = call, h0 is not None
        # PyTorch then notices when one of them is changed before the backward pass.
        ctx.save_for_backward(x, *weights)
        ctx.set_materialize_grads(False)
        return tuple(map(torch.from_numpy, (y, h_n, c_n)))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Any, dh_n: Any, dc_n: Any) -> Any:
        _, *weights = ctx.saved_tensors
        dy, dh_n, dc_n = (None if d is None else _array(d) for d in (dy, dh_n, dc_n))
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * (4 + len(weights))
        wanted = ctx.needs_input_grad[1]  # not if the input is data
        grads = functional.lstm_backward(
            ctx.call.params(weights), ctx.tape, dy, (dh_n, dc_n), input_gradient=wanted
        )  # fmt: skip
        state = tuple(map(torch.from_numpy, grads.state)) if ctx.has_state else (None, None)
        return None, torch.from_numpy(grads.x) if wanted else None, *state, *ctx.call.gradients(grads)
