"""Time steps of an LSTM, forward and backward, inside a caller's own ``@njit`` code.

::

    from numba import njit
    from fastlstm import compiled

    kit = lstm.compiled()  # packed weights and sizes: an argument for Numba

    @njit
    def simulate(kit, x, h, c, h_next, c_next, y, steps):
        for _ in range(steps):
            compiled.step(kit, x, h, c, y, h_next, c_next)
            h, h_next = h_next, h
            c, c_next = c_next, c
            x[:] = ...  # the next input, which depends on y

Training is the same as with ``lstm.unroll``, on a `tape` that ``kit.tape(steps, batch)`` makes once: :func:`step_taped`
for t = 0, 1, ..., then :func:`step_back` from the last t to 0, and :func:`finish`. A model with dropout between its
layers needs ``kit.draw(tape)`` before each run, which Python calls. The functions allocate nothing and need no lock of
the interpreter. They are called by their addresses, which the kit holds: a caller compiles in little more than its own
time, and a caller that is cached on disk (``cache=True``) contains no code of fastlstm. The name of the kit's type
contains a stamp of fastlstm's sources, so that such a caller is compiled again for another version.

Under ``prange``, each iteration has arrays, or a tape, of its own. The tapes are a list, such as a typed list of Numba:
Numba takes no tuple of them there. It raises an error under ``prange``, such as ShapeError, as the cause of a
SystemError.

Kits and tapes are arguments of the caller. Numba would freeze a global or closed-over one to a constant, whose
addresses are wrong in the next process that loads the caller from a cache: each function raises ArgumentError then.

Shapes are checked at each call. Arrays are C-contiguous and of the model's dtype, which Numba checks when it compiles.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cfunc, extending, njit
from numba import types as numba_types

from fastlstm.backends.cpu.kit import (
    DROPOUT,
    FINISH,
    KIT_OF_RUN,
    NUMBER,
    OWN_PLACE,
    STEP,
    STEP_BACK,
    STEP_TAPED,
    TAPE_DROPOUT,
    TAPE_PLACE,
    make_kit,
)
from fastlstm.backends.cpu.numba_calls import in_python, tell
from fastlstm.cell import float_dtype
from fastlstm.errors import ArgumentError, ShapeError
from fastlstm.kernels.cpu.atomics import pointer_at
from fastlstm.kernels.cpu.jit import caller
from fastlstm.kernels.cpu.unrolled_step import LEFT, MASKS, TAKEN, UNDRAWN

# Numba's types are incomplete: its own extensions do not pass.
types: Any = numba_types
intrinsic: Any = extending.intrinsic

__all__ = ["c_step", "finish", "make_kit", "step", "step_back", "step_taped"]

_call = caller(lambda *_: types.none)


@intrinsic  # type: ignore[untyped-decorator]
def _number(typingctx: Any, pointer: Any) -> Any:
    """Return a pointer as an integer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(args[0], context.get_value_type(types.int64))

    return types.int64(pointer), codegen


@njit(inline="always")  # type: ignore[untyped-decorator]
def _overlap(a: Any, b: Any, size: Any, other_size: Any) -> Any:
    """Say whether so many bytes at two pointers share memory."""
    start, other = _number(a), _number(b)
    return start < other + other_size and other < start + size


def step(kit: Any, x: Any, h: Any, c: Any, y: Any, h_next: Any, c_next: Any) -> None:
    """Advance by one time step: bit-identical to ``lstm.freeze().step``.

    Parameters
    ----------
    kit : Kit
        From ``lstm.compiled()``.
    x : array, (B, I), IN
        The input.
    h, c : array, (L, B, H), IN
        The state before.
    y : array, (B, H), OUT
        The hidden state of the last layer.
    h_next, c_next : array, (L, B, H), OUT
        The state after. `h_next` must be another array than `h`; `c_next` may be `c`.

    Raises
    ------
    ShapeError
        If a shape does not fit.
    ArgumentError
        If what is written overlaps what is still read, or the kit is not an argument of the caller.
    numba.TypingError
        When the caller is compiled, if an array has another dtype or layout.
    """
    _steps(kit, x, h, c, y, h_next, c_next)


def _step(kit: Any, x: Any, h: Any, c: Any, y: Any, h_next: Any, c_next: Any) -> None:
    _check_kit(kit)
    record, inputs, hidden, layers, _ = kit
    batch, state = x[1], (layers, x[1], hidden)
    if x[2] != inputs:
        raise ShapeError("x must have shape (B, I)")
    if h[1:4] != state or c[1:4] != state or h_next[1:4] != state or c_next[1:4] != state:
        raise ShapeError("h, c, h_next and c_next must have shape (L, B, H), with the B of x")
    if y[1:3] != (batch, hidden):
        raise ShapeError("y must have shape (B, H), with the B of x")
    of_x, of_y, of_state = x[3], y[3], h[4]
    if (
        _overlap(h_next[0], h[0], of_state, of_state) or _overlap(h_next[0], x[0], of_state, of_x)
        or _overlap(y[0], x[0], of_y, of_x) or _overlap(y[0], h[0], of_y, of_state)
    ):  # fmt: skip
        raise ArgumentError("h_next and y must not overlap h or x, which are still read when these are written")
    if (
        _overlap(h_next[0], c[0], of_state, of_state) or _overlap(y[0], c[0], of_y, of_state)
        or _overlap(c_next[0], h[0], of_state, of_state) or _overlap(c_next[0], x[0], of_state, of_x)
    ):  # fmt: skip
        raise ArgumentError("what is written must not overlap what is read; c_next alone may be c")
    if _overlap(c_next[0], h_next[0], of_state, of_state) or _overlap(c_next[0], y[0], of_state, of_y):
        raise ArgumentError("c_next must not overlap h_next or y")
    _call(record[STEP], (record, batch, x[0], h[0], c[0], y[0], h_next[0], c_next[0]))


def step_taped(kit: Any, tape: Any, t: int, x: Any, y: Any) -> None:
    """Run step number t, and keep what :func:`step_back` needs.

    Parameters
    ----------
    kit : Kit
    tape : Tape
        From ``kit.tape(steps, batch)``. Step 0 starts a new run, from ``tape.h[:, 0]`` and ``tape.c[:, 0]``; the states
        after step t are ``tape.h[:, t + 1]`` and ``tape.c[:, t + 1]``.
    t : int
        0, or the step after the last one.
    x : array, (B, I), IN
        The input; it is copied.
    y : array, (B, H), OUT
        The hidden state of the last layer.

    Raises
    ------
    ArgumentError
        If `t` is not the step that is next; the tape is of other sizes or another dropout than the kit, or its run of
        another kit; the masks of dropout are not drawn; or kit or tape is not an argument of the caller.
    ShapeError
        If a shape does not fit.
    """
    _steps_taped(kit, tape, t, x, y)


def _step_taped(kit: Any, tape: Any, t: Any, x: Any, y: Any) -> None:
    _check_kit(kit)
    _check_place(tape)
    record, steps, batch, size = tape[0], tape[2], tape[3], tape[6]
    if t != 0 and (t != record[TAKEN] or record[LEFT] != -1):
        raise ArgumentError("t must be 0, which starts a new run, or the step after the last one")
    if t == 0:
        _check_tape(kit, tape)
    else:
        _check_run(kit, record)
    if x[1:3] != (batch, kit[1]):
        raise ShapeError("x must have shape (B, I), with the B of the tape")
    if y[1:3] != (batch, kit[2]):
        raise ShapeError("y must have shape (B, H), with the B of the tape")
    if _overlap(x[0], y[0], x[3], y[3]):
        raise ArgumentError("y must not overlap x")
    if t >= steps:
        raise ArgumentError("the tape has no room for another step")
    if t == 0:
        if record[UNDRAWN]:
            raise ArgumentError("the masks of dropout have to be drawn before each run: kit.draw(tape)")
        record[TAKEN], record[LEFT], record[UNDRAWN] = 0, -1, record[MASKS] != 0
        record[KIT_OF_RUN] = kit[0][NUMBER]
        for n in range(size):
            tape[7][n] = tape[8][n] = 0
    _call(record[STEP_TAPED], (kit[0], record, x[0], y[0], tape[9], 0))


def step_back(kit: Any, tape: Any, t: int, dh: Any, dx: Any) -> None:
    """Take the gradients back through step number t.

    Parameters
    ----------
    kit : Kit
        That of the run: after a change of the parameters, a new kit begins a new run.
    tape : Tape
        Its `dh` and `dc` are the loss's gradients by the states after step t, and then by those before. They are zero
        when the way back begins, unless they were set after the first step.
    t : int
        The last step of the run, then the one before, down to 0.
    dh : array, (B, H), IN
        The loss's gradient by the output of step t, without the part through the model's own state, which is added
        here.
    dx : array, (B, I), OUT
        The loss's gradient by its input.

    Raises
    ------
    ArgumentError
        If `t` is not the step that is next, the run is of another kit, or kit or tape is not an argument of the caller.
    ShapeError
        If a shape does not fit.
    """
    _steps_back(kit, tape, t, dh, dx)


def _step_back(kit: Any, tape: Any, t: Any, dh: Any, dx: Any) -> None:
    _check_kit(kit)
    _check_place(tape)
    record, batch = tape[0], tape[3]
    left = record[LEFT] if record[LEFT] != -1 else record[TAKEN]
    if left == 0 or t != left - 1:
        raise ArgumentError("t must be the last step of the run, and then the one before the last")
    _check_run(kit, record)
    if dh[1:3] != (batch, kit[2]):
        raise ShapeError("dh must have shape (B, H), with the B of the tape")
    if dx[1:3] != (batch, kit[1]):
        raise ShapeError("dx must have shape (B, I), with the B of the tape")
    if _overlap(dh[0], dx[0], dh[3], dx[3]):
        raise ArgumentError("dx must not overlap dh")
    record[LEFT] = left
    _call(record[STEP_BACK], (kit[0], record, dh[0], dx[0], tape[9], 0))


def finish(kit: Any, tape: Any, gradients: Any) -> None:
    """Compute the gradients by the parameters, one product over all steps.

    Parameters
    ----------
    kit : Kit
        That of the run.
    tape : Tape
        Of which all steps have been taken back.
    gradients : array, (P,), OUT
        A number for each parameter, such as ``kit.gradients()``; ``kit.named(gradients)`` views them under the names of
        the parameters.

    Raises
    ------
    ArgumentError
        If steps are left, the run is of another kit, or kit or tape is not an argument of the caller.
    ShapeError
        If `gradients` has another size.
    """
    _finishes(kit, tape, gradients)


def _finish(kit: Any, tape: Any, gradients: Any) -> None:
    _check_kit(kit)
    _check_place(tape)
    if tape[0][LEFT] != 0:
        raise ArgumentError("not all steps have been taken back")
    _check_run(kit, tape[0])
    if gradients[1] != kit[4]:
        raise ShapeError("gradients must have a number for each parameter, such as kit.gradients()")
    _call(tape[0][FINISH], (kit[0], tape[0], gradients[0], tape[9], 0))


@njit(inline="always")  # type: ignore[untyped-decorator]
def _check_kit(kit: Any) -> None:
    """Refuse a kit that Numba has frozen to a constant: its addresses may be those of another process."""
    if kit[0][OWN_PLACE] != _number(kit[0]):
        raise ArgumentError("the kit is a global or closed-over variable of compiled code: pass it as an argument")


@njit(inline="always")  # type: ignore[untyped-decorator]
def _check_place(tape: Any) -> None:
    """Refuse a tape that Numba has frozen to a constant, which cannot be written."""
    if tape[0][TAPE_PLACE] != _number(tape[0]):
        raise ArgumentError("the tape is a global or closed-over variable of compiled code: pass it as an argument")


@njit(inline="always")  # type: ignore[untyped-decorator]
def _check_tape(kit: Any, tape: Any) -> None:
    """Refuse a tape of a model of other sizes or dropout."""
    if tape[1] != kit[1] or tape[4] != kit[3] or tape[5] != kit[2]:
        raise ArgumentError("the tape is of another kit's sizes")
    if tape[0][TAPE_DROPOUT] != kit[0][DROPOUT]:
        raise ArgumentError("the tape was made for another dropout than the kit's: make it by this kit's tape()")


@njit(inline="always")  # type: ignore[untyped-decorator]
def _check_run(kit: Any, record: Any) -> None:
    """Refuse another kit than that of step 0: its weights may be others."""
    if record[KIT_OF_RUN] != kit[0][NUMBER]:
        raise ArgumentError("the tape is of another kit's run: a run has one kit from step 0 to finish")


tell(step, _step, x=(2, False), h=(3, False), c=(3, False), y=(2, True), h_next=(3, True), c_next=(3, True))
tell(step_taped, _step_taped, x=(2, False), y=(2, True))
tell(step_back, _step_back, dh=(2, False), dx=(2, True))
tell(finish, _finish, gradients=(1, True))

_steps, _steps_taped = in_python(step), in_python(step_taped)
_steps_back, _finishes = in_python(step_back), in_python(finish)


# --- what C, Cython, Fortran and SciPy call -------------------------------------------------------------------


@intrinsic  # type: ignore[untyped-decorator]
def _numbers_at(typingctx: Any, number: Any, kind: Any) -> Any:
    """Take an integer for the address of numbers of a kind."""
    pointer = types.CPointer(kind.instance_type)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(types.int64, kind), codegen


@functools.cache  # kept for the process: its machine code is freed with it
def _c_function(dtype: np.dtype[Any]) -> Any:
    number: Any = dtype.type

    def c_step_of_dtype(
        record: Any, batch: Any, x: Any, h: Any, c: Any, y: Any, h_next: Any, c_next: Any
    ) -> None:  # fmt: skip
        kit = pointer_at(record)
        _call(
            kit[STEP],
            (kit, batch, _numbers_at(x, number), _numbers_at(h, number), _numbers_at(c, number),
             _numbers_at(y, number), _numbers_at(h_next, number), _numbers_at(c_next, number)),
        )  # fmt: skip

    return cfunc(types.void(*[types.int64] * 8), error_model="numpy")(c_step_of_dtype)


def c_step(dtype: Any) -> Any:
    """Return the step as a C function, for C, Cython, Fortran, ctypes and SciPy's LowLevelCallable.

    ::

        void step(const int64_t *record, int64_t batch, const T *x, const T *h, const T *c,
                  T *y, T *h_next, T *c_next);

    where T is float or double, ``record`` is ``kit.record.ctypes.data``, and the arrays are those of :func:`step`. It
    checks nothing. The kit has to be kept as long as it is called, and its address is that of this process.

    Parameters
    ----------
    dtype : dtype
        float32 or float64, that of the model.

    Returns
    -------
    CFunc
        Its attribute `address` is the function's, and `ctypes` the function for ctypes, which takes addresses as
        integers. That can be called in nopython mode, too.

    Raises
    ------
    DTypeError
        If `dtype` is neither.

    Examples
    --------
    As other languages call it, by a pointer to the function and pointers to the numbers:

    >>> import ctypes
    >>> import numpy as np
    >>> from fastlstm import LSTM, compiled
    >>> lstm = LSTM(input_size=3, hidden_size=8, seed=0)
    >>> kit, batch = lstm.compiled(), 2
    >>> x, y = np.ones((batch, 3), np.float32), np.empty((batch, 8), np.float32)
    >>> h, c, h_next, c_next = np.zeros((4, 1, batch, 8), np.float32)
    >>> floats, words = ctypes.POINTER(ctypes.c_float), ctypes.POINTER(ctypes.c_int64)
    >>> prototype = ctypes.CFUNCTYPE(None, words, ctypes.c_int64, floats, floats, floats, floats, floats, floats)
    >>> c_function = prototype(compiled.c_step(np.float32).address)
    >>> pointers = [array.ctypes.data_as(floats) for array in (x, h, c, y, h_next, c_next)]
    >>> c_function(kit.record.ctypes.data_as(words), batch, *pointers)
    >>> np.array_equal(y, lstm.freeze().step(x)[0])
    True
    """
    return _c_function(float_dtype(dtype))
