"""class Recurrent: the calls that LSTM and RNN have in common."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any, Self

import numpy as np

from fastlstm import checks, dispatch, functional, parameters, unroll
from fastlstm.backends.base import Array, Dropout, State
from fastlstm.cell import VARIANTS, Cell
from fastlstm.errors import ArgumentError, ArrayTypeError, shown
from fastlstm.frozen import FrozenParams
from fastlstm.functional import Gradients, Tape
from fastlstm.mask_keys import MaskKeys, new_key
from fastlstm.precision import EXACT, HasPrecision
from fastlstm.stored import Stored, on_host
from fastlstm.unroll import Run

__all__ = ["Recurrent", "on_host"]


class Recurrent(Stored, HasPrecision):
    """The parameters of a model, and the calls on them.

    Attributes
    ----------
    params : dict of str to array
        The live parameters.
    cell : Cell
        Sizes, dtype and variant of the model.
    batch_first : bool
        Whether input and output are (B, T, features) in place of (T, B, features).
    """

    def _initialise(self, cell: Cell, batch_first: Any, seed: Any, forget_bias: float = 1.0) -> None:
        checks.flag("batch_first", batch_first)  # before the parameters are drawn
        rng = parameters.generator(seed)
        self._assemble(cell, parameters.initialise(cell, rng, forget_bias), batch_first, new_key(rng))

    def _assemble(self, cell: Cell, params: dict[str, Array], batch_first: bool, dropout_key: int) -> Self:
        self.batch_first = checks.flag("batch_first", batch_first)
        self.cell = cell
        self.params: dict[str, Array] = params
        self._dropout_key = dropout_key
        return self

    @classmethod
    def _from(cls, cell: Cell, params: dict[str, Array], batch_first: bool, dropout_key: int = 0) -> Self:
        return cls.__new__(cls)._assemble(cell, params, batch_first, dropout_key)

    def __call__(
        self, x: Array, state: State | None = None, lengths: Any = None, resets: Any = None
    ) -> tuple[Array, State]:
        """Run the model for inference: no dropout, and nothing kept for a backward pass.

        Parameters and results are those of :meth:`forward`, without the tape.
        """
        y, state, _ = functional.run(
            self.cell, self.params, x, state, lengths, resets,
            batch_first=self.batch_first, dropout=None, keep_tape=False,
        )  # fmt: skip
        return y, state

    def forward(
        self, x: Array, state: State | None = None, lengths: Any = None, resets: Any = None, *, recompute: bool = False
    ) -> tuple[Array, State, Tape]:
        """Run the model for training, with dropout, and keep what :meth:`backward` needs.

        Parameters
        ----------
        x : array, (T, B, I), (B, T, I) with `batch_first`, or (T, I)
            The input: T time steps of B sequences with I features, in the model's dtype.
        state : tuple of array, optional
            ``(h0, c0)``, each (L*D, B, H), or (L*D, H) for unbatched input; zeros by default.
        lengths : (B,) integers, optional
            The length of each sequence, in 0..T, in any order; all T by default.
        resets : array of bool, (T, B), (B, T) with `batch_first`, or (T,), optional
            Where the state of a sequence is zero before a time step; no gradient crosses it. A reverse direction has
            it before that step in its own order.
        recompute : bool
            Save memory: keep only the states h and c, and compute the gates again in :meth:`backward`, which
            then takes longer; the gradients are bit-identical. It needs at most ``4.25 * T * B * H`` numbers, in place
            of the ``7 * T * B * H`` that :meth:`backward` documents. The backends `cuda` and `reference`, calls of a
            few steps, every RNN and the cells that take more than 7 (see :meth:`backward`) keep all nonetheless.

        Returns
        -------
        y : array, (T, B, F), (B, T, F) or (T, F)
            The last layer's h, zero past each length; F is D*H, D*P with `proj_size`, without D if `merge` combines.
        state : tuple of array
            ``(h_n, c_n)``, shaped as `state`: each sequence's state at its own end. A sequence of length 0
            returns its initial state.
        tape : Tape
            For :meth:`backward`. It refers to `x`, which must not be changed before that.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, ArrayTypeError, BackendError
            Before any work, if an argument does not fit.
        """
        dropout = None
        try:
            if self.cell.draws:
                dropout = Dropout(self.cell.dropout, self._mask_keys.take())
            y, state, tape = functional.run(
                self.cell, self.params, x, state, lengths, resets,
                batch_first=self.batch_first, dropout=dropout, keep_tape=True, recompute=recompute,
            )  # fmt: skip
        except BaseException:
            if dropout is not None:  # the next call draws the same masks
                self._mask_keys.give_back(dropout.key)
            raise
        assert tape is not None
        return y, state, tape

    @property
    def _dropout_key(self) -> int:
        """The key of the next masks: each forward pass takes another. A copy with it draws the same masks."""
        return self._mask_keys.next

    @_dropout_key.setter
    def _dropout_key(self, key: int) -> None:
        self._mask_keys = MaskKeys(key)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name != "_mask_keys"}
        return state | {"_dropout_key": self._dropout_key}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def backward(
        self, tape: Tape, dy: Array | None, dstate: tuple[Array | None, Array | None] | None = None, *,
        keep_state_gradients: bool = False, input_gradient: bool = True,
    ) -> Gradients:  # fmt: skip
        """Back-propagate through the forward pass that left `tape`, with the parameters unchanged since.

        Parameters
        ----------
        tape : Tape
            From :meth:`forward`. It stays valid: a second call gives the same result.
        dy : array or None
            The loss's gradient by `y`, shaped as it; ignored past each length. None for zero.
        dstate : tuple of array, optional
            ``(dh_n, dc_n)``, the loss's gradients by the final states; either may be None.
        keep_state_gradients : bool
            Whether to return the gradients by the states after each time step too, as ``grads.steps``: to look at how
            they grow or vanish. Takes longer.
        input_gradient : bool
            Whether to compute the gradient by the input too; ``grads.x`` is None without it. Nothing needs it where
            `x` is data. It takes up to a third of the time of a layer's training, the more the larger I is beside H.

        Returns
        -------
        Gradients
            ``grads.x``, ``grads.state = (dh0, dc0)`` and ``grads.params[name]``; ``grads.steps = (dh, dc)``, each
            (T, L*D, B, H), if asked for.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, ArrayTypeError
            Before any work, if an argument does not fit or the tape is of another model.

        Notes
        -----
        Forward and backward pass together allocate on the CPU, beyond inputs and outputs, at most ``7 * T * B * H``
        numbers of the model's dtype for each layer and direction (six of the tape, one of this call), H rounded up to
        whole vectors of the processor. With projection, layer norm, zoneout, recurrent dropout or peepholes of shared
        gates it is 8, 9 with a projection, 11 more with layer norm, 2 more with a `merge` but ``concat``; of an RNN, 3.
        Each layer but the last adds twice its output, and a mask with dropout; a ragged batch, one copy of a layer's
        input and the places of its rows. Packed weights and scratch memory do not grow with T.
        """
        if isinstance(tape, Tape) and tape.cell is not self.cell and tape.cell != self.cell:
            raise ArgumentError("the tape is of another model")
        return functional.lstm_backward(
            self.params, tape, dy, dstate, keep_state_gradients=keep_state_gradients, input_gradient=input_gradient
        )

    def step(self, x_t: Array, state: State | None = None) -> tuple[Array, State]:
        """Advance by one time step: streaming inference, which a CUDA graph can capture (see the notes of ``LSTM``).

        Parameters
        ----------
        x_t : array, (B, I) or (I,)
            The input at this step.
        state : tuple of array, optional
            ``(h, c)``, each (L, B, H) or (L, H): what the step before returned; zeros by default.

        Returns
        -------
        h : array, (B, H) or (H,)
            The output at this step: the hidden state of the last layer.
        state : tuple of array
            The new ``(h, c)``; new arrays, the given ones are unchanged.

        Raises
        ------
        ArgumentError
            If the model runs backwards in time: bidirectional, or with `reverse`.
        ShapeError, DTypeError, ArrayTypeError, BackendError
            Before any work, if an argument does not fit, or a CUDA graph is to capture a step that calls cuBLAS.
        """
        return functional.step(self.cell, self.params, x_t, state)

    def unroll(self, state: State | None = None, *, steps: int, batch: int) -> Run:
        """Begin a closed loop for training: time steps, each of whose inputs may depend on the output before.

        Take the steps with ``run.step(x_t)``, and then ``back = run.backward()``, ``back.step(dh_t)`` from the last to
        the first, and ``back.finish()``: see :class:`fastlstm.unroll.Run` and :class:`fastlstm.unroll.RunBackward`, and
        :mod:`fastlstm.unroll` for what is done once for all steps. To truncate the gradient to windows,
        start a new run from ``run.state``. All random masks are those of :meth:`forward`.

        Parameters
        ----------
        state : tuple of array, optional
            ``(h0, c0)``, each (L, B, H); zeros by default.
        steps : int
            The most steps T that the run may have.
        batch : int
            The number of sequences B.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, ArrayTypeError, BackendError
            Before any work, if an argument does not fit, or the model is bidirectional or reversed.

        Examples
        --------
        >>> import numpy as np
        >>> from fastlstm import LSTM
        >>> lstm = LSTM(input_size=2, hidden_size=2, seed=0)
        >>> run, x = lstm.unroll(steps=3, batch=1), np.ones((1, 2), np.float32)
        >>> for _ in range(3):
        ...     x = run.step(x)
        >>> back, dx = run.backward(), np.ones((1, 2), np.float32)  # the loss is the sum of the last output
        >>> for _ in range(3):
        ...     dx = back.step(dx)
        >>> sorted(back.finish().params)
        ['bias_l0', 'weight_hh_l0', 'weight_ih_l0']
        """
        dropout = Dropout(self.cell.dropout, self._mask_keys.take()) if unroll.draws(self.cell) else None
        try:
            return unroll.begin(self, state, steps, batch, dropout)
        except BaseException:
            if dropout is not None:
                self._mask_keys.give_back(dropout.key)
            raise

    def compiled(self) -> Any:
        """Pack the weights for use inside code that Numba compiles: see :mod:`fastlstm.compiled`.

        Later changes of the parameters do not show in it. Callers are compiled once for all models of a dtype.

        Returns
        -------
        Kit
            A named tuple: an argument for functions decorated with ``numba.njit``, which call
            ``fastlstm.compiled.step(kit, ...)`` and the like.

        Raises
        ------
        ArgumentError
            If the model is bidirectional or reversed, or of a variant whose step is not compiled.
        ArrayTypeError
            If the parameters are CuPy arrays.
        BackendError
            If the CPU kernels cannot run here.

        Examples
        --------
        >>> import numpy as np
        >>> from fastlstm import LSTM, compiled
        >>> kit = LSTM(input_size=3, hidden_size=8, seed=0).compiled()
        >>> x, y = np.ones((2, 3), np.float32), np.empty((2, 8), np.float32)
        >>> h, c, h_next, c_next = np.zeros((4, 1, 2, 8), np.float32)
        >>> compiled.step(kit, x, h, c, y, h_next, c_next)  # the same in your own @njit function
        >>> np.array_equal(y, h_next[0])
        True
        """
        dispatch.backend_named("cpu")
        frozen = self.freeze()
        assert isinstance(frozen.params, FrozenParams)
        return import_module("fastlstm.compiled").make_kit(self.cell, frozen.params, self._mask_keys)

    def plan(self, x: Array, lengths: Any = None) -> str:
        """Say how a call for inference would be run: backend, threads, and how each layer is divided.

        Parameters
        ----------
        x, lengths
            As for :meth:`forward`; the contents of `x` do not matter.

        Examples
        --------
        >>> import numpy as np
        >>> from fastlstm import LSTM
        >>> print(LSTM(4, 8, seed=0).plan(np.ones((40, 1, 4), np.float32)))
        cpu backend
        layer 0: on one thread; input products 40 steps ahead
        """
        return functional.plan(self.cell, self.params, x, lengths, batch_first=self.batch_first)

    def freeze(self) -> Self:
        """Copy the model to one whose parameters cannot change: for inference, where it is faster.

        A model that is not frozen packs its weights in each call, or uses them unpacked, because they may have changed.
        A frozen model packs them once, at its first call. That saves most in calls of few steps, and in :meth:`step` of
        many sequences or of large models.

        Returns
        -------
        LSTM
            The same model. Its `params` cannot change, nor can their contents; it can be pickled and copied, :meth:`to`
            makes a copy that can change, and gradients are computed as before. It holds each weight twice.

        Raises
        ------
        ArrayTypeError
            If the parameters are CuPy arrays: the CUDA kernels keep nothing between calls.

        Notes
        -----
        Sums are taken in the same order for any number of rows: the results of :meth:`step`, step by step, and of one
        call for the whole sequence agree to the last bit. They agree with those of the original model within rounding.

        Examples
        --------
        >>> import numpy as np
        >>> from fastlstm import LSTM
        >>> lstm = LSTM(input_size=3, hidden_size=8, seed=0)
        >>> frozen = lstm.freeze()
        >>> frozen
        LSTM(3, 8, dtype=float32).freeze()  # 384 parameters
        >>> x = np.ones((5, 2, 3), np.float32)
        >>> np.allclose(frozen(x)[0], lstm(x)[0])
        True
        """
        given = checks.params(self.cell, self.params)
        if dispatch.kind_of("params", given["weight_hh_l0"]).library != "numpy":
            raise ArrayTypeError("freeze() takes a model of NumPy arrays: the CUDA kernels keep nothing between calls")
        params = given if isinstance(given, FrozenParams) else FrozenParams(self.cell, given)
        return self._from(self.cell, params, self.batch_first, self._dropout_key)

    @property
    def num_parameters(self) -> int:
        """Number of trainable numbers in the model."""
        return sum(int(np.prod(shape)) for shape in parameters.shapes(self.cell).values())

    def to(self, library: ModuleType) -> Self:
        """Copy the model to another array library.

        Parameters
        ----------
        library : module
            ``numpy`` or ``cupy``. With ``cupy``, the parameters go to the current device.

        Returns
        -------
        LSTM
            The same model; it shares nothing with this one.

        Raises
        ------
        ArrayTypeError
            If `library` is neither of them.
        BackendError
            If CuPy finds no device; the message says what is missing.
        """
        name = getattr(library, "__name__", None)
        if name not in ("numpy", "cupy"):
            raise ArrayTypeError(f"to() takes the module numpy or cupy, got {shown(library)}")
        if name == "cupy":
            dispatch.backend_named("cuda")  # says what is missing, if there is no device
        params = {key: library.array(on_host(key, value) if name == "numpy" else value)
                  for key, value in self.params.items()}  # fmt: skip
        # A cell of its own: the calls that are prepared for it are those of one array library.
        return self._from(replace(self.cell), params, self.batch_first, self._dropout_key)

    def __repr__(self) -> str:
        cell = self.cell
        options = [
            f"{name}={value!r}"
            for name, value, default in (
                ("num_layers", cell.num_layers, 1),
                ("bias", cell.bias, True),
                ("batch_first", self.batch_first, False),
                ("dropout", cell.dropout, 0.0),
                ("bidirectional", cell.bidirectional, False),
                *((name, getattr(cell, name), default) for name, default in (VARIANTS | EXACT).items()),
            )
            if value != default
        ]
        arguments = ", ".join([str(cell.input_size), str(cell.hidden_size), *options, f"dtype={cell.dtype.name}"])
        frozen = ".freeze()" if isinstance(self.params, FrozenParams) else ""
        return f"{type(self).__name__}({arguments}){frozen}  # {self.num_parameters:,} parameters"
