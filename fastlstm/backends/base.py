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

__all__ = [
    "Array", "Backend", "BackwardResult", "Dropout", "FlatArrays", "ForwardResult", "Params", "Prepared",
    "RefusedError", "Signature", "State",
]  # fmt: skip

Array: TypeAlias = Any  # numpy.ndarray or cupy.ndarray; the two share no common type
Params: TypeAlias = Mapping[str, Array]  # by parameter name
State: TypeAlias = tuple[Array, Array]


class FlatArrays(dict[str, Array]):
    """Arrays by name that are views of one array `flat` (n,), one after the other in the order of the names.

    One collective operation, such as an all-reduce of NCCL over several GPUs, then does for all of them.
    """

    def __init__(self, arrays: Mapping[str, Array], flat: Array) -> None:
        super().__init__(arrays)
        self.flat = flat

    def __reduce__(self) -> Any:
        return dict, (dict(self),)  # a copy's arrays are no views of its `flat`


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
    params: dict[str, Array]  # by parameter name, shaped as the parameters


@dataclass(frozen=True)
class Dropout:
    """Where the dropout masks of one forward pass come from: equal keys give equal masks on every backend."""

    probability: float
    key: int


class RefusedError(Exception):
    """A kernel that checks shapes itself found one that does not fit; nothing was done."""


class Signature(NamedTuple):
    """What calls have in common that can be prepared together."""

    steps: int  # T
    batch: int  # B
    keep_tape: bool
    frozen: bool  # whether the parameters cannot change (:class:`fastlstm.frozen.FrozenParams`)


class Prepared(Protocol):
    """A call of which everything is decided that its signature decides.

    Where `checks_shapes`, the kernel of a step checks the shapes of states and parameters, and :class:`RefusedError`
    says that one does not fit: a step takes less time than to compare them in Python.
    """

    checks_shapes: bool

    def forward(
        self,
        params: Params,
        x: Array,  # (T, B, I)
        h0: Array | None,  # (L*D, B, H), zeros if None
        c0: Array | None,  # (L*D, B, H), zeros if None; None if h0 is
        lengths: Array | None,  # (B,) int64 on the host, in 0..T, unsorted; all T if None
        dropout: Dropout | None,  # between layers; None for none
        recompute: bool,  # keep h and c alone, and compute the gates again in `backward`; more may be kept
    ) -> ForwardResult:
        """Run the whole sequence through all layers."""
        ...

    def step(
        self,
        params: Params,
        x: Array,  # (B, I)
        h0: Array | None,  # (L, B, H), zeros if None
        c0: Array | None,  # (L, B, H), zeros if None; None if h0 is
    ) -> tuple[Array, Array, Array]:
        """Advance one time step through all layers of a one-directional model: y (B, H), h_n and c_n.

        The three share no memory: a caller may work on the output in place.
        """
        ...

    def backward(
        self,
        params: Params,
        tape: Any,  # from `forward`, unchanged by this
        dy: Array | None,  # (T, B, D*H), zeros if None; ignored past each length
        dh_n: Array | None,  # (L*D, B, H), zeros if None
        dc_n: Array | None,  # (L*D, B, H), zeros if None
    ) -> BackwardResult:
        """Back-propagate through time, layers and directions; every gradient."""
        ...


class Backend(Protocol):
    """What every backend does."""

    name: str

    def prepare(self, cell: Cell, signature: Signature) -> Prepared:
        """Decide, once for many calls, how a model runs on arrays of the signature's shapes."""
        ...

    def plan(self, cell: Cell, rows: int, batch: int, frozen: bool) -> list[str]:
        """Say in words how each layer would be run; `rows` is the number of steps of all sequences.

        `frozen` says whether the parameters cannot change (:class:`fastlstm.frozen.FrozenParams`).
        """
        ...
