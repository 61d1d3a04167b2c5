"""Inference over grids and ensembles, also larger than memory, with Dask and xarray.

:func:`predict` runs a model over all series of an array: of a NumPy array at once, of a Dask array block by block when
it is computed, by any scheduler, and of an xarray.DataArray with either in it. It needs ``pip install
"fastlstm[dask]"`` for the latter two. On a cluster, the model goes to each worker once.

>>> import numpy as np
>>> from fastlstm import LSTM
>>> from fastlstm.training import Linear, Model
>>> model = Model(LSTM(3, 8, seed=0), Linear(8, 1, seed=1))
>>> forcing = np.ones((10, 20, 365, 3), np.float32)  # latitude, longitude, time, feature
>>> predict(model, forcing).shape
(10, 20, 1)
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from fastlstm.backends.threads import at_most
from fastlstm.errors import ArgumentError, ArrayTypeError, DTypeError, ShapeError, shown
from fastlstm.frozen import FrozenParams
from fastlstm.lstm import LSTM
from fastlstm.training import Model, arguments

__all__ = ["predict"]

Array = np.ndarray[Any, Any]


def predict(
    model: LSTM | Model,
    data: Any,
    *,
    time: str = "time",
    feature: str = "feature",
    output: str = "output",
    threads: int = 1,
    batch: int = 1024,
) -> Any:
    """Run a model over all series of an array.

    Results are bit-identical however the series are cut into blocks: the model is frozen, see
    :meth:`fastlstm.LSTM.freeze`. A NaN in one series stays in it.

    Parameters
    ----------
    model : LSTM or Model
        An LSTM, whose outputs at each step are returned, or a whole model with one head, whose predictions are.
    data : numpy.ndarray, dask.array.Array or xarray.DataArray
        The inputs, in the model's dtype. The last two axes of an array are time and feature. A DataArray has dimensions
        of these names, and others such as latitude, longitude and member, in any order. Blocks of Dask arrays must hold
        whole series.
    time, feature : str
        Names of dimensions of a DataArray.
    output : str
        Name of the dimension of the results that has outputs in place of features; it may be that of the features,
        whose coordinates the results do not have.
    threads : int
        The most threads of one block's computation. A worker runs several blocks at once, so that it is one.
    batch : int
        Number of series that are computed together: more take less time and more memory.

    Returns
    -------
    numpy.ndarray, dask.array.Array or xarray.DataArray
        As `data`, with K outputs in place of the features; without the axis of time if the model has one prediction
        for each series. Of a Dask array nothing is computed yet.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, ArrayTypeError
        Before any work, if an argument does not fit.
    """
    frozen = _frozen(model)
    threads = arguments.count("threads", threads, least=1)
    batch = arguments.count("batch", batch, least=1)
    if not isinstance(output, str):
        raise ArgumentError(f"output must be a string, got {shown(output)}")
    xarray = sys.modules.get("xarray")
    if xarray is None or not isinstance(data, xarray.DataArray):
        return _of_array(frozen, data, threads, batch)
    for name, value in (("time", time), ("feature", feature)):
        if value not in data.dims:
            raise ArgumentError(f"{name} must be a dimension of data, {tuple(data.dims)}, got {shown(value)}")
    if time == feature:
        raise ArgumentError("time and feature must be two dimensions")
    others = [name for name in data.dims if name not in (time, feature)]
    if output in (*others, time):
        raise ArgumentError(f"data has a dimension {output!r}: give another name for output")
    kept = [*others, time] if _sizes(frozen)[3] else others
    coords = {name: values for name, values in data.coords.items() if set(values.dims) <= set(kept)}
    if output in coords:
        raise ArgumentError(f"data has a coordinate {output!r}: give another name for output")
    found = _of_array(frozen, data.transpose(*others, time, feature).data, threads, batch)
    return xarray.DataArray(found, dims=[*kept, output], coords=coords)


def _frozen(model: Any) -> LSTM | Model:
    if not isinstance(model, LSTM | Model):
        raise ArgumentError(f"model must be an LSTM or a fastlstm.training.Model, got {shown(model)}")
    if isinstance(model, Model) and not model.single_head:
        raise ArgumentError(f"model must have one head, not {', '.join(model.heads)}: make one model for each")
    lstms = [model] if isinstance(model, LSTM) else list(model.lstms.values())
    return model if all(isinstance(lstm.params, FrozenParams) for lstm in lstms) else model.freeze()


def _sizes(model: LSTM | Model) -> tuple[np.dtype[Any], int, int, bool]:
    """Return dtype, number of features and of outputs, and whether there is an output at each step."""
    if isinstance(model, LSTM):
        return model.cell.dtype, model.cell.input_size, model.cell.output_size, True
    weight = next(iter(model.heads.values())).params["weight"]
    features = next(iter(model.lstms.values())).cell.input_size
    return model.dtype, features, weight.shape[0], model.output == "sequence"


def _of_array(model: LSTM | Model, data: Any, threads: int, batch: int) -> Any:
    dtype, features, outputs, stepwise = _sizes(model)
    dask = sys.modules.get("dask.array")
    lazy = dask is not None and isinstance(data, dask.Array)
    if not lazy and (not isinstance(data, np.ndarray) or isinstance(data, np.ma.MaskedArray)):
        kinds = "numpy.ndarray, dask.array.Array or xarray.DataArray"
        raise ArrayTypeError(f"data must be a {kinds}, got {type(data).__module__}.{type(data).__qualname__}")
    if data.dtype.newbyteorder("=") != dtype:
        raise DTypeError(
            f"data has dtype {data.dtype}, but the model is {dtype}: convert it by data.astype({str(dtype)!r})"
        )
    if data.ndim < 2 or data.shape[-1] != features:
        raise ShapeError(f"data must have shape (..., T, I) = (..., T, {features}), got {tuple(data.shape)}")
    if not lazy:
        return _block(data, model, threads, batch)
    if any(len(chunks) > 1 for chunks in data.chunks[-2:]):
        raise ArgumentError(
            "blocks must hold whole series, with all features: use data.rechunk({-2: -1, -1: -1}), or of a DataArray"
            " data.chunk(time=-1, feature=-1)"
        )
    return _lazily(model, data, dtype, outputs, stepwise, threads, batch)


def _lazily(
    model: LSTM | Model, data: Any, dtype: np.dtype[Any], outputs: int, stepwise: bool, threads: int, batch: int
) -> Any:
    from dask.delayed import delayed

    # A task of its own, on which all blocks depend: a worker is sent it once, and keeps it until the blocks are done.
    shipped = delayed(model, traverse=False, pure=False, name=None)
    kept = data.chunks[:-1] if stepwise else data.chunks[:-2]
    return data.map_blocks(
        _block, model=shipped, threads=threads, batch=batch, dtype=dtype, chunks=(*kept, (outputs,)),
        drop_axis=None if stepwise else [data.ndim - 2], meta=np.empty((0,) * (len(kept) + 1), dtype),
    )  # fmt: skip


def _block(data: Array, model: LSTM | Model, threads: int, batch: int) -> Array:
    """Run the model over a block (..., T, I), some series at a time."""
    dtype, features, outputs, stepwise = _sizes(model)
    steps = data.shape[-2]
    rows = data.reshape(math.prod(data.shape[:-2]), steps, features)  # -1 would not do for no time steps
    shape = (len(rows), steps, outputs) if stepwise else (len(rows), outputs)
    found = np.empty(shape, dtype)
    with at_most(threads):
        for first in range(0, len(rows), batch):
            found[first : first + batch] = _series(model, rows[first : first + batch], stepwise)
    return found.reshape(*data.shape[:-2], *shape[1:])


def _series(model: LSTM | Model, x: Array, stepwise: bool) -> Array:
    """Run the model over series (N, T, I)."""
    batch_first = model.batch_first
    given = x if batch_first else x.swapaxes(0, 1)
    y: Array = model(given)[0] if isinstance(model, LSTM) else model.predict(given)
    return y if batch_first or not stepwise else y.swapaxes(0, 1)
