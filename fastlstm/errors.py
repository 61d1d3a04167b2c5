"""The errors that fastlstm raises on purpose.

Each one derives from :class:`FastLSTMError` and from the built-in error that a
NumPy user would expect, so both ``except ValueError`` and
``except fastlstm.FastLSTMError`` work. All of them are raised before any work
is done, so nothing has been changed when one is caught.
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
    """An argument is not an array, or arrays of different libraries or devices were mixed."""


class BackendError(FastLSTMError, RuntimeError):
    """The backend for this kind of array cannot run on this machine; the message says what to install."""


class FrozenError(FastLSTMError, TypeError):
    """An attempt to change the parameters of a frozen model."""


class ModelFileError(FastLSTMError, ValueError):
    """A model file is broken, truncated, or was not written by fastlstm."""


class ResultsFileError(FastLSTMError, ValueError):
    """A file of benchmark results is broken, or was not written by ``fastlstm bench``."""


class KernelCacheWarning(UserWarning):
    """Compiled CPU kernels cannot be written to disk; results are right, but every process compiles its own kernels."""


LONGEST = 200  # characters of a value in a message
# What the conversion of a bad value raises.
_REFUSALS = (TypeError, ValueError, ArithmeticError, AttributeError, LookupError, SyntaxError)
_SCALARS = (type(None), bool, int, float, complex, str, bytes)


def refused(value: object, error: Exception) -> bool:
    """Whether `error`, caught while `value` was converted, is about the value.

    The code of a foreign object, also inside a list, may raise anything. The conversion of a Python or NumPy scalar
    raises only _REFUSALS: any other error, such as a TimeoutError, comes from a signal handler that ran meanwhile, and
    is not about the value.
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
