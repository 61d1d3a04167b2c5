"""Estimators of scikit-learn: a classifier and a regressor of sequences, and a forecaster of one series.

They need scikit-learn: ``pip install "fastlstm[sklearn]"``. X may be

- an array (n, T, C) of n sequences with T time steps and C channels; with ``channels_first=True`` (n, C, T), the layout
  of sktime and aeon;
- a list of n sequences of different lengths, (T_i, C) each; with ``channels_first=True`` (C, T_i);
- a list of n 1-D arrays (T_i,), of one length or several: one channel;
- a table (n, T): one channel, too. What scikit-learn calls a feature is then a time step, of which there are always T.

>>> import numpy as np
>>> from fastlstm.sklearn import LSTMClassifier
>>> rng = np.random.default_rng(0)
>>> X = [rng.normal(size=(steps, 2)) for steps in rng.integers(5, 20, 80)]  # 80 sequences with 2 channels
>>> y = np.where([x[:, 0].mean() > 0 for x in X], "up", "down")
>>> classifier = LSTMClassifier(hidden_size=8, output="mean", random_state=0).fit(X, y)
>>> classifier.score(X, y) > 0.9
True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.metrics import r2_score
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_array, check_is_fitted, column_or_1d, validate_data
except ImportError as missing:
    raise ImportError(
        'fastlstm.sklearn needs scikit-learn: pip install "fastlstm[sklearn]"', name="sklearn"
    ) from missing

from fastlstm import checks
from fastlstm.errors import ArgumentError, DTypeError, ShapeError, shown
from fastlstm.lstm import LSTM
from fastlstm.training import (
    AdamW,
    History,
    Linear,
    Model,
    arguments,
    fit,
    huber_loss,
    mean_absolute_error,
    mean_squared_error,
    sequence_input,
    softmax_cross_entropy,
    windows,
)

__all__ = ["LSTMClassifier", "LSTMForecaster", "LSTMRegressor"]

Array = np.ndarray[Any, Any]
LOSSES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "squared": mean_squared_error,
    "absolute": mean_absolute_error,
    "huber": huber_loss,
}
_DTYPES = ("float64", "float32")

_PARAMETERS = """
    Parameters
    ----------
    hidden_size : int
        Number of hidden units H of each layer and direction.
    num_layers : int
        Number of stacked layers.
    bidirectional : bool
        Whether each layer also runs backwards in time.
    dropout : float
        Probability of dropping an output between layers, in training.
    output : {"last", "mean"}
        What the linear layer reads: the last hidden state, or the mean of all outputs.
    channels_first : bool
        Whether X is (n, channels, time) in place of (n, time, channels).
    epochs, batch_size, validation, patience, schedule, clip_norm
        As for :func:`fastlstm.training.fit`; `validation` is a share of the sequences.
    learning_rate, weight_decay : float
        Those of :class:`fastlstm.training.AdamW`.
    dtype : {"float64", "float32"}
        What is computed in; float32 takes half the time.
    random_state : int, RandomState or None
        Determines initial parameters, order of the sequences, and dropout masks.
    verbose : bool or int
        Whether to show a progress bar; any number above 0 does."""


class _Estimator(BaseEstimator):  # type: ignore[misc]
    """The common part of classifier and regressor: options, the reading of X, and training."""

    n_features_in_: int
    _table: bool

    def __init__(
        self,
        hidden_size: int = 32,
        num_layers: int = 1,
        *,
        bidirectional: bool = False,
        dropout: float = 0.0,
        output: str = "last",
        channels_first: bool = False,
        epochs: int = 100,
        batch_size: int = 32,
        learning_rate: float = 0.01,
        weight_decay: float = 0.0,
        schedule: str = "cosine",
        clip_norm: float | None = 1.0,
        validation: float | None = None,
        patience: int | None = None,
        dtype: str = "float64",
        random_state: Any = None,
        verbose: bool | int = False,
    ) -> None:
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bidirectional = bidirectional
        self.dropout = dropout
        self.output = output
        self.channels_first = channels_first
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.clip_norm = clip_norm
        self.validation = validation
        self.patience = patience
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    def _sequences(self, X: Any, y: Any = None, *, first: bool) -> tuple[Any, Any]:
        """Return X as (n, T, C) or a list of (T_i, C), and y.

        The first call remembers how many features there are, and whether X is a table: then a list of 1-D arrays is
        a table in later calls, too, and otherwise it has sequences, also if all have the same length or it has one.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, ValueError
            If they do not fit, ValueError where scikit-learn's own check says so.
        """
        channels_first = checks.flag("channels_first", self.channels_first)
        dtype = _dtype(self.dtype) if first else self.model_.dtype
        listed = sequence_input.listed(X, table=not first and self._table)
        table = listed is None and sequence_input.axes(X) != 3
        if first:
            self._table = table
        elif table and not self._table and self.n_features_in_ == 1:
            return check_array(X, dtype=dtype)[..., None], None
        if table:
            if y is None:
                return validate_data(self, X, dtype=dtype, reset=first)[..., None], None
            X, y = validate_data(self, X, y, dtype=dtype, reset=first, multi_output=True, y_numeric=False)
            return X[..., None], y
        if listed is None:
            found: Any = check_array(X, dtype=dtype, allow_nd=True, ensure_2d=False)
            found = found.swapaxes(1, 2) if channels_first else found
            features, count = found.shape[2], len(found)
        else:
            found = sequence_input.arrays(listed, dtype, channels_first)
            features, count = found[0].shape[1], len(found)
        if first:
            self.n_features_in_ = features
            self.__dict__.pop("feature_names_in_", None)
        elif features != self.n_features_in_:
            raise ShapeError(
                f"X has {features} channels, but {type(self).__name__} is expecting {self.n_features_in_} as input"
            )
        if y is not None:
            y = check_array(y, ensure_2d=False, allow_nd=True, dtype=None)
            if len(y) != count:
                raise ShapeError(f"X has {count} sequences, and y has {len(y)} targets")
        return found, y

    def _train(self, x: Any, y: Array, outputs: int, loss: Callable[..., Any]) -> Self:
        features = (x[0] if isinstance(x, list) else x).shape[-1]
        if self.output not in ("last", "mean"):
            raise ArgumentError(f"output must be 'last' or 'mean', got {shown(self.output)}")
        rate = arguments.number("learning_rate", self.learning_rate, least=0.0)
        verbose = self.verbose  # scikit-learn's own take numbers, too
        verbose = bool(verbose) if isinstance(verbose, bool | np.bool_) else arguments.count("verbose", verbose) > 0
        draw = check_random_state(self.random_state)
        seeds = [int(seed) for seed in draw.randint(2**31 - 1, size=3)]
        lstm = LSTM(
            features, self.hidden_size, self.num_layers, batch_first=True, dropout=self.dropout,
            bidirectional=self.bidirectional, dtype=self.dtype, seed=seeds[0],
        )  # fmt: skip
        head = Linear(lstm.cell.output_size, outputs, dtype=self.dtype, seed=seeds[1])
        model = Model(lstm, head, output=self.output, scale=True)
        self.history_: History = fit(
            model, x, y, loss=loss, epochs=self.epochs, batch_size=self.batch_size, schedule=self.schedule,
            optimiser=AdamW(model, lr=rate, weight_decay=self.weight_decay), clip_norm=self.clip_norm,
            validation=self.validation, patience=self.patience, seed=seeds[2], progress=verbose,
        )  # fmt: skip
        self.model_ = model
        return self

    def _outputs(self, X: Any) -> Array:
        check_is_fitted(self, "model_")
        x, _ = self._sequences(X, first=False)
        found: Array = self.model_.predict(x).astype(np.float64)  # as scikit-learn's own do, whatever they compute in
        return found


class LSTMRegressor(RegressorMixin, _Estimator):  # type: ignore[misc]  # noqa: D101
    __doc__ = f"""An LSTM with a linear layer that predicts one number, or several, for each sequence.
{_PARAMETERS}
    loss : {{"squared", "absolute", "huber"}}
        What is minimised, on scaled targets.

    Attributes
    ----------
    model_ : fastlstm.training.Model
        The trained model; its `save` writes one file.
    history_ : fastlstm.training.History
        Losses and times of each epoch.
    n_features_in_ : int
        Number of channels, or of columns if X is a table.

    Examples
    --------
    >>> import numpy as np
    >>> X = np.random.default_rng(0).normal(size=(200, 10, 2))
    >>> y = X[:, -3:, 0].sum(axis=1)
    >>> LSTMRegressor(hidden_size=8, random_state=0).fit(X[:150], y[:150]).score(X[150:], y[150:]) > 0.9
    True
    """

    def __init__(
        self, hidden_size: int = 32, num_layers: int = 1, *, bidirectional: bool = False, dropout: float = 0.0,
        output: str = "last", channels_first: bool = False, loss: str = "squared", epochs: int = 100,
        batch_size: int = 32, learning_rate: float = 0.01, weight_decay: float = 0.0, schedule: str = "cosine",
        clip_norm: float | None = 1.0, validation: float | None = None, patience: int | None = None,
        dtype: str = "float64", random_state: Any = None, verbose: bool | int = False,
    ) -> None:  # fmt: skip
        super().__init__(
            hidden_size, num_layers, bidirectional=bidirectional, dropout=dropout, output=output,
            channels_first=channels_first, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate,
            weight_decay=weight_decay, schedule=schedule, clip_norm=clip_norm, validation=validation,
            patience=patience, dtype=dtype, random_state=random_state, verbose=verbose,
        )  # fmt: skip
        self.loss = loss

    def fit(self, X: Any, y: Any) -> Self:
        """Train on sequences X and targets y, (n,) or (n, K)."""
        loss = _loss(self.loss)
        if y is None:
            raise ArgumentError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        x, y = self._sequences(X, y, first=True)
        y = check_array(y, ensure_2d=False, allow_nd=True, dtype=_dtype(self.dtype))
        if y.ndim > 2:
            raise ShapeError(f"y must have shape (n,) or (n, K), got {y.shape}")
        self._single_output = y.ndim == 1
        targets = y.reshape(len(y), -1)
        return self._train(x, targets, targets.shape[1], loss)

    def predict(self, X: Any) -> Array:
        """Predict the targets of sequences, (n,) or (n, K) as they were in training."""
        found = self._outputs(X)
        return found[:, 0] if self._single_output else found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        tags.target_tags.single_output = True
        tags.input_tags.three_d_array = True
        return tags


class LSTMClassifier(ClassifierMixin, _Estimator):  # type: ignore[misc]  # noqa: D101
    __doc__ = f"""An LSTM with a linear layer and softmax that tells the class of each sequence.
{_PARAMETERS}

    Attributes
    ----------
    classes_ : array
        The classes, sorted.
    model_ : fastlstm.training.Model
        The trained model, which predicts logits.
    history_ : fastlstm.training.History
        Losses and times of each epoch.
    n_features_in_ : int
        Number of channels, or of columns if X is a table.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Train on sequences X and their classes y, (n,) of numbers or strings."""
        if y is None:
            raise ArgumentError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        x, y = self._sequences(X, y, first=True)
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        self.classes_, classes = np.unique(y, return_inverse=True)
        return self._train(x, classes.astype(np.int64), len(self.classes_), softmax_cross_entropy)

    def predict_proba(self, X: Any) -> Array:
        """Return the probability of each class, (n, K), in the order of `classes_`."""
        logits = self._outputs(X)
        p: Array = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        return p

    def predict(self, X: Any) -> Array:
        """Return the most probable class of each sequence."""
        chosen = self._outputs(X).argmax(axis=1)
        found: Array = self.classes_[chosen]
        return found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags


class LSTMForecaster(BaseEstimator):  # type: ignore[misc]
    """Forecast a series: an :class:`LSTMRegressor` from each window of it to the values that come next.

    All steps of the horizon are predicted at once, from the last `window` values. It reads one series, and not a table
    of samples, so that scikit-learn's check_estimator does not apply.

    Parameters
    ----------
    window, horizon : int
        How many values a forecast reads, and how many it predicts.
    regressor : LSTMRegressor, optional
        Whose options to use; a copy of it is trained.

    Attributes
    ----------
    regressor_ : LSTMRegressor
        The trained regressor.
    window_, horizon_ : int
        What it was trained for: later changes of `window` and `horizon` count from the next `fit` on.

    Examples
    --------
    >>> import numpy as np
    >>> series = np.sin(np.arange(300) / 5)
    >>> forecaster = LSTMForecaster(20, 10, LSTMRegressor(hidden_size=8, random_state=0)).fit(series[:280])
    >>> bool(np.abs(forecaster.predict() - series[280:290]).max() < 0.3)
    True
    """

    def __init__(self, window: int = 24, horizon: int = 1, regressor: LSTMRegressor | None = None) -> None:
        self.window = window
        self.horizon = horizon
        self.regressor = regressor

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on one series, (T,) or (T, C); y is ignored."""
        from sklearn.base import clone

        window = arguments.count("window", self.window, least=1)
        horizon = arguments.count("horizon", self.horizon, least=1)
        series = windows.series(X, window + horizon)
        if self.regressor is not None and not isinstance(self.regressor, LSTMRegressor):
            raise ArgumentError(f"regressor must be an LSTMRegressor, got {shown(self.regressor)}")
        regressor = LSTMRegressor() if self.regressor is None else clone(self.regressor)
        x, targets = windows.split(series, window, horizon)
        regressor.set_params(channels_first=False).fit(x, targets.reshape(len(targets), -1))
        # All at once: after an error, what was trained before is still whole.
        self.regressor_, self.window_, self.horizon_ = regressor, window, horizon
        self.n_features_in_, self._one, self._last = series.shape[1], np.ndim(X) == 1, series[-window:].copy()
        return self

    def predict(self, X: Any = None) -> Array:
        """Return what comes after a series, by default that of the training: (horizon,) or (horizon, C)."""
        check_is_fitted(self, "regressor_")
        series = self._last if X is None else windows.series(X, self.window_, self.n_features_in_)
        found: Array = self.regressor_.predict(series[None, -self.window_ :]).reshape(self.horizon_, -1)
        return found[:, 0] if self._one else found

    def score(self, X: Any, y: Any = None) -> float:
        """Return the coefficient of determination of all forecasts within a series, the mean over its channels."""
        check_is_fitted(self, "regressor_")
        series = windows.series(X, self.window_ + self.horizon_, self.n_features_in_)
        x, targets = windows.split(series, self.window_, self.horizon_)
        channels = targets.shape[2]
        return float(r2_score(targets.reshape(-1, channels), self.regressor_.predict(x).reshape(-1, channels)))


def _dtype(given: Any) -> Any:
    if not isinstance(given, str) or given not in _DTYPES:
        raise DTypeError(f"dtype must be 'float64' or 'float32', got {shown(given)}")
    return np.dtype(given)


def _loss(name: Any) -> Callable[..., tuple[Any, Any]]:
    if not isinstance(name, str) or name not in LOSSES:
        raise ArgumentError(f"loss must be one of {', '.join(map(repr, LOSSES))}, got {shown(name)}")
    return LOSSES[name]
