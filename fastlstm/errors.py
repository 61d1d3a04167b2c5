"""The errors that fastlstm raises on purpose.

Each one derives from :class:`FastLSTMError` and from the built-in error that a
NumPy user would expect, so both ``except ValueError`` and
``except fastlstm.FastLSTMError`` work. All of them are raised before any work
is done: nothing has been changed when one arrives.
"""

__all__ = [
    "ArgumentError",
    "ArrayTypeError",
    "BackendError",
    "DTypeError",
    "FastLSTMError",
    "FrozenError",
    "KernelCacheWarning",
    "ModelFileError",
    "ResultsFileError",
    "ShapeError",
    "refused",
    "shown",
]


class FastLSTMError(Exception):
    """Base class of every error that fastlstm raises on purpose."""


class ArgumentError(FastLSTMError, ValueError):
    """An argument has a value that makes no sense here, such as a negative size or a foreign tape."""


class ShapeError(ArgumentError):
    """An array has the wrong number of dimensions or the wrong size; the message gives the expected shape."""


class DTypeError(FastLSTMError, TypeError):
    """An array has another dtype than the model; nothing is converted silently."""


class ArrayTypeError(FastLSTMError, TypeError):
    """An argument is no array, or arrays of different libraries or devices were mixed."""


class BackendError(FastLSTMError, RuntimeError):
    """The backend for this kind of array cannot run here; the message says what to install."""


class FrozenError(FastLSTMError, TypeError):
    """The parameters of a frozen model were to be changed."""


class ModelFileError(FastLSTMError, ValueError):
    """A model file is broken, truncated, or was not written by fastlstm."""


class ResultsFileError(FastLSTMError, ValueError):
    """A file of the benchmark's results is broken, or was not written by ``fastlstm bench``."""


class KernelCacheWarning(UserWarning):
    """Compiled CPU kernels cannot be kept on disk; results are right, but every process compiles its kernels anew."""


LONGEST = 200  # characters of a value in a message
# What the conversion of a value raises where the value is at fault.
_REFUSALS = (TypeError, ValueError, ArithmeticError, AttributeError, LookupError, SyntaxError)
_SCALARS = (type(None), bool, int, float, complex, str, bytes)


def refused(value: object, error: Exception) -> bool:
    """Whether `error`, caught while `value` was converted, is about the value.

    A foreign object's own code may raise anything, also inside a list. From the conversion of a scalar of Python or
    NumPy, any other error is that of a signal handler that ran meanwhile, such as a TimeoutError, and must not be taken
    for bad input.
    """
    kind = type(value)
    of_numpy = kind.__module__.partition(".")[0] == "numpy"
    scalar = kind in _SCALARS or (of_numpy and not kind.__name__.lower().endswith("array"))
    return isinstance(error, _REFUSALS) or not scalar


def shown(value: object) -> str:
    """Return the repr of a value for a message: cut where it is long, and never an error of its own."""
    try:
        text = repr(value)
    except Exception as error:  # such as that of an integer of 5,000 digits
        if not refused(value, error):
            raise
        return f"an object of type {type(value).__qualname__}"
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."
