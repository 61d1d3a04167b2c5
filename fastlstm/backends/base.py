"""The contract between the API and a backend.

Shapes: T time steps, B sequences, I inputs, H hidden units, L layers, D directions. Everything a backend
is given has been checked: arrays of its own library, on one device, of the model's dtype and of the
right shape, in native byte order. They may have any strides and may be read-only; a backend changes none of
them, and returns new C-contiguous arrays that nobody else holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

from fastlstm.cell import Cell

__all__ = ["Array", "Backend", "BackwardResult", "ForwardResult", "Params", "State"]

Array: TypeAlias = Any  # numpy.ndarray or cupy.ndarray; the two share no common type
Params: TypeAlias = dict[str, Array]
State: TypeAlias = tuple[Array, Array]


class ForwardResult(NamedTuple):
    """What a forward pass gives back."""

    y: Array  # (T, B, D*H), zero past each sequence's length
    h_n: Array  # (L*D, B, H), each sequence's state at its own end
    c_n: Array  # (L*D, B, H)
    tape: Any  # what `backward` needs, opaque to everyone else; None without keep_tape


class BackwardResult(NamedTuple):
    """The gradients of the loss."""

    x: Array  # (T, B, I), zero past each sequence's length
    h0: Array  # (L*D, B, H)
    c0: Array  # (L*D, B, H)
    params: Params  # by parameter name, shaped as the parameters


@dataclass(frozen=True)
class Dropout:
    """Where the dropout masks of one forward pass come from: equal keys give equal masks on every backend."""

    probability: float
    key: int


class Backend(Protocol):
    """What every backend does."""

    name: str

    def forward(
        self,
        cell: Cell,
        params: Params,
        x: Array,  # (T, B, I)
        h0: Array | None,  # (L*D, B, H), zeros if None
        c0: Array | None,  # (L*D, B, H), zeros if None
        lengths: Array | None,  # (B,) int64 on the host, in 0..T, unsorted; all T if None
        dropout: Dropout | None,  # between layers; None for none
        keep_tape: bool,
        recompute: bool = False,  # keep h and c alone, and compute the gates again in `backward`; more may be kept
    ) -> ForwardResult:
        """Run the whole sequence through all layers."""
        ...

    def backward(
        self,
        cell: Cell,
        params: Params,
        tape: Any,  # from `forward`, unchanged by this
        dy: Array | None,  # (T, B, D*H), zeros if None; ignored past each length
        dh_n: Array | None,  # (L*D, B, H), zeros if None
        dc_n: Array | None,  # (L*D, B, H), zeros if None
    ) -> BackwardResult:
        """Back-propagate through time, layers and directions; every gradient."""
        ...

    def step(
        self,
        cell: Cell,
        params: Params,
        x: Array,  # (B, I)
        h: Array | None,  # (L, B, H), zeros if None
        c: Array | None,  # (L, B, H), zeros if None
    ) -> tuple[Array, Array]:
        """Advance one time step through all layers of a one-directional model; the new h and c."""
        ...

    def plan(self, cell: Cell, rows: int, batch: int, frozen: bool) -> list[str]:
        """Say in words how each layer would be run; `rows` is the number of steps of all sequences.

        `frozen` says whether the parameters cannot change (:class:`fastlstm.frozen.FrozenParams`).
        """
        ...

    def shortcut(self, cell: Cell, params: Mapping[str, Any], x: Any, state: Any) -> tuple[Array, State] | None:
        """Run a call for inference on arguments that nobody has checked, if that is sure to be right.

        For calls that take little more time than all the checks in Python. `x` is (B, I) for one step or (T, B, I), and
        `state` None or a pair of (L, B, H), if they are as they should be; the result is y (B, H) or (T, B, H),
        and (h_n, c_n). At the least doubt, None: the arguments are then checked and the other methods called, which
        give the same result.
        """
        ...

    def shortcut_forward(self, cell: Cell, params: Mapping[str, Any], x: Any, state: Any) -> ForwardResult | None:
        """Do as :meth:`shortcut` does for a call that keeps a tape; `x` is (T, B, I)."""
        ...

    def shortcut_backward(self, cell: Cell, params: Mapping[str, Any], tape: Any, dy: Any) -> BackwardResult | None:
        """Do as :meth:`shortcut` does for :meth:`backward` where the final states have no gradients.

        `tape` is one of this backend's, made with an equal cell; `dy` is (T, B, D*H), if it is as it should be.
        """
        ...
