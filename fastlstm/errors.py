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
