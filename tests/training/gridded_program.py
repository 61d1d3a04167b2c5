"""Inference over a data set larger than the memory it may use: series in a Zarr store, read and written block by block.

    python tests/training/gridded_program.py --series 100000 --folder /tmp/grid

writes random series if the folder has none, predicts from all of them with Dask and xarray, writes the predictions to
a second store, and prints how much the process grew meanwhile. It needs ``pip install "fastlstm[dask]" zarr``.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import dask
import numpy as np
import xarray as xr

from fastlstm import LSTM
from fastlstm.gridded import predict
from fastlstm.training import Linear, Model

STEPS, FEATURES, BLOCK = 120, 4, 2_000  # a block has 3.8 MB


def write(path: Path, count: int) -> None:
    """Write random forcing, a block of series at a time."""
    for first in range(0, count, BLOCK):
        series = np.arange(first, min(first + BLOCK, count))
        values = np.random.default_rng(first).standard_normal((len(series), STEPS, FEATURES), dtype=np.float32)
        block = xr.Dataset({"forcing": (("series", "time", "feature"), values)}, coords={"series": series})
        if first:
            block.to_zarr(path, append_dim="series", consolidated=False)
        else:
            encoding = {"forcing": {"chunks": (BLOCK, STEPS, FEATURES)}, "series": {"chunks": (BLOCK,)}}
            block.to_zarr(path, mode="w", encoding=encoding, consolidated=False)


def peak() -> float:
    """Return the largest size that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--series", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    forcing, flow = options.folder / "forcing.zarr", options.folder / "flow.zarr"
    if not forcing.exists():
        write(forcing, options.series)
    model = Model(LSTM(FEATURES, 32, seed=0), Linear(32, 1, seed=1))

    # Not before all is imported and compiled: what remains is what the data take.
    predict(model, np.zeros((BLOCK, STEPS, FEATURES), np.float32), batch=256)
    with dask.config.set(scheduler="threads", num_workers=2):
        xr.open_zarr(forcing, consolidated=False)["forcing"][:BLOCK].load()
        before, begin = peak(), time.perf_counter()
        data = xr.open_zarr(forcing, consolidated=False)["forcing"]
        predict(model, data, batch=256).rename("flow").to_zarr(flow, mode="w", consolidated=False)
    seconds, grown = time.perf_counter() - begin, peak() - before
    size = data.size * 4 / 2**20
    print(f"{data.sizes['series']} series, {size:.0f} MB, in {seconds:.1f} s; the process grew by {grown:.0f} MB")


if __name__ == "__main__":
    main()
