"""What ``lstm.compiled()`` returns: packed weights and sizes as a named tuple, which Numba takes as an argument.

Numba compiles a caller for the types of its arguments, and finds what it has cached by them. So the name of a kit's
class contains a stamp of fastlstm's sources: a caller is compiled again for another version.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import weakref
from collections import namedtuple
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastlstm import checks
from fastlstm.backends.base import Array, Dropout
from fastlstm.backends.cpu import unroll
from fastlstm.backends.cpu.thread_pool import NO_TEAM, own_team
from fastlstm.backends.cpu.weights import size_of
from fastlstm.backends.threads import get_num_threads
from fastlstm.cell import VARIANTS, Cell
from fastlstm.errors import ArgumentError, DTypeError, ShapeError, shown
from fastlstm.frozen import FrozenParams
from fastlstm.kernels.cpu import kernel_cache
from fastlstm.kernels.cpu import unrolled_back as back
from fastlstm.kernels.cpu import unrolled_step as forth
from fastlstm.kernels.cpu.jit import VECTOR_BYTES, address_of
from fastlstm.mask_keys import MaskKeys
from fastlstm.unroll import StaysHere, check_room, positive

__all__ = [
    "DROPOUT", "FINISH", "KIT", "KIT_OF_RUN", "NUMBER", "OWN_PLACE", "STAMP", "STEP", "STEP_BACK", "STEP_TAPED", "TAPE",
    "TAPE_DROPOUT", "TAPE_PLACE", "make_kit",
]  # fmt: skip

# What callers read in the records, after what `unrolled_step.py` knows: addresses of functions; where the record itself
# is, since Numba freezes a global kit or tape to a constant, a copy in the caller's code and in its cache, whose
# addresses another process does not have; the number of a kit, and in a tape that of the run's kit, 0 before the first
# run; and the bits of the probability of dropout between layers, 0.0 for none.
STEP, OWN_PLACE, NUMBER, DROPOUT = range(forth.KIT, forth.KIT + 4)
STEP_TAPED, STEP_BACK, FINISH, TAPE_PLACE, KIT_OF_RUN, TAPE_DROPOUT = range(forth.TAPED, forth.TAPED + 6)

_numbers = itertools.count(1)  # not the address of a record: memory that is freed is used again


class _Model(NamedTuple):
    """What the methods of a kit need of its model."""

    cell: Cell
    keys: MaskKeys


# By the number of a kit, as long as its record lives: Numba makes a new tuple of the same record when it returns a kit.
_models: dict[int, _Model] = {}


def _make_stamp() -> str:
    """Return what changes with our code; different in each process if the sources cannot be read."""
    try:
        package = Path(__file__).parents[2]
        files = [*sorted((package / "backends" / "cpu").glob("*.py")), package / "compiled.py"]
        sources = kernel_cache.SOURCES, [file.read_bytes() for file in files], VECTOR_BYTES
    except OSError:
        sources = None, [], 0
    if sources[0] is None:
        return os.urandom(8).hex()
    return hashlib.sha256(repr(sources).encode()).hexdigest()[:16]


FIELDS_OF_KIT = "inputs", "hidden", "layers", "parameters", "record", "weights", "bias", "own", "for_back"
FIELDS_OF_TAPE = "inputs", "steps", "batch", "record", "h", "c", "dh", "dc", "team", "masks"


# Numba pickles what a cached function closes over.
_AS_ARGUMENT = "; compiled code has to take it as an argument"


class _KitMethods(StaysHere):
    record: Array
    parameters: int
    _instead = _AS_ARGUMENT

    def __copy__(self) -> Any:
        return self  # it does not change

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    @property
    def _model(self) -> _Model:
        found = _models.get(int(self.record[NUMBER]))
        if found is None:
            raise ArgumentError("this is a constant of compiled code, whose kit is gone: pass the kit as an argument")
        return found

    @property
    def cell(self) -> Cell:
        """The model's description."""
        return self._model.cell

    def tape(self, steps: int, batch: int, *, threads: int = 1) -> Any:
        """Allocate the memory of a run for training, to be used for any number of runs.

        Its fields are `h` and `c`, (L, T + 1, B, H), the states before each step and after the last, of which
        ``h[:, 0]`` and ``c[:, 0]`` are to be set before a run, and are zero at first; and `dh` and `dc`, (L, B, H), the
        gradients by the states, which are zero when the way back begins, unless they were set after the first step.
        With `threads`, each call is shared by as many at most: worth it for a large model or batch, not under prange.
        """
        steps, batch, threads = positive("steps", steps), positive("batch", batch), positive("threads", threads)
        check_room(self.cell, steps, batch)
        sizes = tuple(size_of(self.cell, layer) for layer in range(self.cell.num_layers))
        team = _team(threads)
        masks = unroll.new_masks(self.cell, steps, batch)
        made = unroll.tape_of(self.cell, sizes, steps, batch, masks, threads=len(team) - 1, lasting=True)
        made.h[:, 0] = made.c[:, 0] = 0
        made.dh[...] = made.dc[...] = 0
        made.record[forth.UNDRAWN] = masks is not None
        functions = forth.unrolled_step_taped, back.unrolled_back, back.unrolled_finish
        addresses = [_function_address(function, self.cell.dtype) for function in functions]
        record = np.append(made.record, [*addresses, 0, 0, self.record[DROPOUT]])
        record[TAPE_PLACE] = unroll.address_of(record)
        no_masks = np.empty((0, 0, 0, 0), self.cell.dtype)
        arrays = made.h, made.c, made.dh, made.dc, team, no_masks if masks is None else masks
        return TAPE(self.cell.input_size, steps, batch, record, *arrays)

    def draw(self, tape: Any) -> None:
        """Draw the masks of dropout between the layers for the next run on a tape: before each run, from Python.

        They are those of the model's next ``forward`` or ``unroll``. A model without dropout needs none.
        """
        if not isinstance(tape, TAPE):
            raise ArgumentError(f"draw() takes a tape, from kit.tape(), got {shown(tape)}")
        cell, keys = self._model
        if tape.dh.shape != (cell.num_layers, tape.batch, cell.hidden_size) or tape.inputs != cell.input_size:
            raise ArgumentError("the tape is of another kit's sizes")
        if tape.dh.dtype != cell.dtype:
            raise DTypeError(f"the tape is of {tape.dh.dtype}, the kit of {cell.dtype}")
        if tape.record[TAPE_DROPOUT] != self.record[DROPOUT]:
            raise ArgumentError("the tape was made for another dropout than the kit's: make it by this kit's tape()")
        if tape.masks.size:
            unroll.draw(tape.masks, Dropout(cell.dropout, keys.take()))
            tape.record[forth.UNDRAWN] = 0

    def gradients(self) -> Array:
        """Allocate an array for :func:`finish`: a number for each parameter, with rows for all gates."""
        return np.empty(self.parameters, self.cell.dtype)

    def named(self, gradients: Array) -> dict[str, Array]:
        """Return what :func:`finish` wrote by name: views, unless gates share or lack rows."""
        if getattr(gradients, "shape", None) != (self.parameters,):
            raise ShapeError("gradients must have a number for each parameter, such as kit.gradients()")
        return unroll.named_gradients(self.cell, gradients)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.layers} layers, I={self.inputs}, H={self.hidden}>"  # type: ignore[attr-defined]


class _TapeMethods(StaysHere):
    _instead = _AS_ARGUMENT

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: T={self.steps}, B={self.batch}>"  # type: ignore[attr-defined]


def _team(threads: int) -> Array:
    """Return a team of so many threads, within the limit."""
    threads = min(threads, get_num_threads())
    return own_team(threads - 1) if threads > 1 else NO_TEAM


@functools.cache
def _class_named(name: str) -> Any:
    """Make the class of a kit or a tape of some version of this package."""
    fields, methods = (FIELDS_OF_KIT, _KitMethods) if name.startswith("Kit") else (FIELDS_OF_TAPE, _TapeMethods)
    return type(name, (methods, namedtuple(name, fields)), {"__module__": __name__, "__qualname__": name})


def __getattr__(name: str) -> Any:
    """Find the classes of other versions, too: Numba looks them up when it reads what it cached for a caller."""
    if re.fullmatch(r"(Kit|Tape)_[0-9a-f]{16}", name):
        return _class_named(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


STAMP = _make_stamp()
KIT, TAPE = _class_named(f"Kit_{STAMP}"), _class_named(f"Tape_{STAMP}")


def make_kit(cell: Cell, params: FrozenParams, keys: MaskKeys) -> Any:
    """Pack a model's weights for compiled code: see :meth:`fastlstm.LSTM.compiled`."""
    checks.direction(cell)
    if cell.nonlinearity:
        raise ArgumentError("compiled code has no step of a plain RNN: use rnn.step or rnn.unroll")
    if not unroll.can_unroll(cell):
        names = ["peephole and block_size together"] if cell.sees_blocks else []
        others = VARIANTS.keys() - unroll.IN_THE_STEP
        names += [name for name, plain in VARIANTS.items() if name in others and getattr(cell, name) != plain]
        raise ArgumentError(
            f"compiled code has no step of a cell with {', '.join(names)}: use lstm.step or lstm.unroll"
        )
    made = unroll.kit_of(cell, params)
    number = next(_numbers)
    dropout = np.float64(cell.dropout if cell.num_layers > 1 else 0.0).view(np.int64)
    record = np.append(made.record, [_function_address(forth.unrolled_step, cell.dtype), 0, number, dropout])
    record[OWN_PLACE] = unroll.address_of(record)
    _models[number] = _Model(cell, keys)
    weakref.finalize(record, _models.pop, number).atexit = False
    sizes = cell.input_size, cell.hidden_size, cell.num_layers, unroll.size_of_gradients(cell)
    return KIT(*sizes, record, *made.kept)


def _function_address(function: Any, dtype: Any) -> int:
    """Compile or load one of the kernels' functions of pointers."""
    module = forth if function in (forth.unrolled_step, forth.unrolled_step_taped) else back
    address: int = address_of(function, module.signatures(dtype, by_pointers=True)[function])
    return address
