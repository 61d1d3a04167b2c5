"""The interface between the API and a backend.

Shapes: T time steps, B sequences, I inputs, H hidden units, L layers, D directions. With a projection, h and y have P
features in place of H; the c of a plain RNN has none; a merged y has H in place of D*H. The arguments of a backend have
been checked: arrays of its own library, on one device, of the model's dtype and of the right shape, in native byte
order. They may have any strides and may be read-only. A backend does not change them, and returns new C-contiguous
arrays to which nothing else refers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

from fastlstm.cell import Cell

__all__ = [
    "Array", "Backend", "BackwardResult", "Dropout", "FlatArrays", "ForwardResult", "Params", "Prepared",
    "RefusedError", "Signature", "State", "Steps", "Unrolled",
]  # fmt: skip

Array: TypeAlias = Any  # numpy.ndarray or cupy.ndarray; the two share no common type
Params: TypeAlias = Mapping[str, Array]  # by parameter name
State: TypeAlias = tuple[Array, Array]


class FlatArrays(dict[str, Array]):
    """Arrays by name that are views of one array `flat` (n,), one after the other in the order of the names.

    One collective operation, such as an all-reduce of NCCL over several GPUs, is then enough for all of them.
    """

    def __init__(self, arrays: Mapping[str, Array], flat: Array) -> None:
        super().__init__(arrays)
        self.flat = flat

    def __reduce__(self) -> Any:
        return dict, (dict(self),)  # a copy's arrays are no views of its `flat`


class ForwardResult(NamedTuple):
    """The result of a forward pass."""

    y: Array  # (T, B, D*H), zero past each sequence's length
    h_n: Array  # (L*D, B, H), each sequence's state at its own end
    c_n: Array  # (L*D, B, H)
    tape: Any  # for `backward`, opaque elsewhere; None without keep_tape


class Steps(NamedTuple):
    """The gradients by the states after each time step."""

    h: Array  # (T, L*D, B, H), zero past each sequence's length
    c: Array  # (T, L*D, B, H)


class BackwardResult(NamedTuple):
    """The gradients of the loss."""

    x: Array | None  # (T, B, I), zero past each sequence's length; None if it was not asked for
    h0: Array  # (L*D, B, H)
    c0: Array  # (L*D, B, H)
    params: dict[str, Array]  # by parameter name, shaped as the parameters
    steps: Steps | None = None  # if they were asked for


@dataclass(frozen=True)
class Dropout:
    """The source of the random masks of one forward pass: equal keys give equal masks on every backend.

    The key also determines the masks of recurrent dropout and zoneout, whose probabilities stand in the cell. A call
    for one layer and some steps of a longer pass says which, so that it draws its part of the masks of the whole.
    """

    probability: float  # of dropout between layers, 0 for none
    key: int
    layer: int = 0  # of the whole: the first of the call
    steps: int = 0  # of the whole, before those of the call


class RefusedError(Exception):
    """A kernel that checks shapes itself found a wrong one; nothing was computed."""


class Signature(NamedTuple):
    """The properties of a call that decide which prepared call runs it."""

    steps: int  # T
    batch: int  # B
    keep_tape: bool  # without a tape, it is a call for inference, which draws no masks
    frozen: bool  # whether the parameters cannot change (:class:`fastlstm.frozen.FrozenParams`)


class Prepared(Protocol):
    """A prepared call: all decisions that depend on its signature alone have been made.

    With `checks_itself`, a call without lengths and resets checks the shapes of states, and the parameters unless they
    are frozen, and raises :class:`RefusedError` if one is not as it has to be: its kernel compares shapes in less time
    than Python.
    """

    checks_itself: bool

    def forward(
        self,
        params: Params,
        x: Array,  # (T, B, I)
        h0: Array | None,  # (L*D, B, H), zeros if None
        c0: Array | None,  # (L*D, B, H), zeros if None; None if h0 is
        lengths: Array | None,  # (B,) int64 on the host, in 0..T, unsorted; all T if None
        dropout: Dropout | None,  # None for inference: no dropout, and zoneout by its expectation
        recompute: bool,  # keep h and c alone, and compute the gates again in `backward`; more may be kept
        resets: Array | None = None,  # (T, B) bool: the state of a sequence is zero before that step
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
        keep_steps: bool = False,  # also return the gradients by the states after each step
        input_gradient: bool = True,  # whether to compute that by the input
    ) -> BackwardResult:
        """Back-propagate through time, layers and directions; every gradient."""
        ...


class Unrolled(Protocol):
    """A run whose steps are taken one by one, forward and then back; the caller counts them.

    The parameters are those at its start. Nothing else refers to what it returns.
    """

    def step(self, x: Array) -> Array:
        """Run the next step on x (B, I), through all layers; return y (B, H)."""
        ...

    def state(self) -> tuple[Array, Array]:
        """Return h and c after the last step, each (L, B, H)."""
        ...

    def begin_back(self, dh: Array | None, dc: Array | None) -> None:
        """Start the way back, from gradients by the last state, each (L, B, H); zeros if None."""
        ...

    def step_back(self, dh: Array | None) -> Array:
        """Take the gradients back through the last step that is left.

        Given the loss's gradient by the step's y, zeros if None; returns that by its x.
        """
        ...

    def state_gradient(self) -> tuple[Array, Array]:
        """Return the gradients by the h and c before the step that was taken back last."""
        ...

    def finish(self) -> dict[str, Array]:
        """Return the gradients by the parameters, once all steps have been taken back."""
        ...


class Backend(Protocol):
    """The methods of every backend."""

    name: str

    def prepare(self, cell: Cell, signature: Signature) -> Prepared:
        """Decide how a model runs on arrays of the signature's shapes, once for many calls."""
        ...

    def unroll(
        self,
        cell: Cell,  # of one direction
        params: Params,
        steps: int,  # at most
        batch: int,
        h0: Array | None,  # (L, B, H), zeros if None
        c0: Array | None,  # (L, B, H), zeros if None
        dropout: Dropout | None,
    ) -> Unrolled:
        """Begin a run for training whose steps are taken one by one."""
        ...

    def plan(self, cell: Cell, steps: int, rows: int, batch: int, frozen: bool) -> list[str]:
        """Describe how each layer would run; `steps` is T and `rows` the number of steps of all sequences.

        `frozen` says whether the parameters cannot change (:class:`fastlstm.frozen.FrozenParams`).
        """
        ...
