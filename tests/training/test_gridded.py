"""Inference over grids: the same bits for any blocks, axes in any order, and a cluster of two processes."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from own_process import run_script

from fastlstm import LSTM, ArgumentError, ArrayTypeError, DTypeError, ShapeError, get_num_threads
from fastlstm.backends.threads import at_most
from fastlstm.gridded import predict
from fastlstm.training import Linear, Model

da = pytest.importorskip("dask.array", reason="dask is not installed")
xr = pytest.importorskip("xarray", reason="xarray is not installed")


@pytest.fixture
def rng():
    return np.random.default_rng(61)


def build(output="last", batch_first=False, dtype=np.float32):
    lstm = LSTM(3, 16, 2, bidirectional=True, batch_first=batch_first, dtype=dtype, seed=1)
    return Model(lstm, Linear(32, 2, dtype=dtype, seed=2), output=output)


def grid(rng, dtype=np.float32):
    return rng.normal(size=(7, 9, 12, 3)).astype(dtype)  # latitude, longitude, time, feature


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["last", "mean", "sequence", "LSTM"])
def test_any_blocks_give_the_bits_of_one_call(rng, dtype, kind, batch_first):
    if kind == "LSTM":
        model = LSTM(3, 16, bidirectional=True, batch_first=batch_first, dtype=dtype, seed=1)
    else:
        model = build(kind, batch_first, dtype)
    data = grid(rng, dtype)
    flat = data.reshape(63, 12, 3)
    frozen = model.freeze()
    whole = (frozen.predict if isinstance(model, Model) else lambda x: frozen(x)[0])(
        flat if batch_first else flat.swapaxes(0, 1).copy()
    )
    stepwise = kind in ("sequence", "LSTM")
    whole = whole.swapaxes(0, 1) if stepwise and not batch_first else whole
    expected = whole.reshape(7, 9, *whole.shape[1:])
    np.testing.assert_array_equal(predict(model, data), expected)
    np.testing.assert_array_equal(predict(model, data, batch=5), expected)
    for chunks in ((7, 9), (1, 1), (3, 4), (7, 2)):
        lazy = predict(model, da.from_array(data, chunks=(*chunks, 12, 3)))
        assert isinstance(lazy, da.Array) and lazy.shape == expected.shape and lazy.dtype == dtype
        for scheduler in ("synchronous", "threads"):
            np.testing.assert_array_equal(lazy.compute(scheduler=scheduler), expected)


@pytest.mark.parametrize("output", ["last", "sequence"])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    "dims", ["lat lon time feature", "time feature lat lon", "feature lat time lon"], ids=lambda dims: dims[:7]
)
def test_dimensions_may_stand_in_any_order(rng, dims, lazy, output):
    model, data = build(output), grid(rng)
    named = xr.DataArray(
        data, dims=["lat", "lon", "time", "feature"],
        coords={"lat": np.linspace(-3, 3, 7), "time": np.arange(12), "cell": (("lat", "lon"), np.ones((7, 9)))},
        name="forcing", attrs={"units": "mm"},
    ).transpose(*dims.split())  # fmt: skip
    found = predict(model, named.chunk(lat=2, lon=4) if lazy else named)
    assert isinstance(found.data, da.Array if lazy else np.ndarray)
    steps = ("time",) * (output == "sequence")
    assert found.dims == ("lat", "lon", *steps, "output")
    np.testing.assert_array_equal(found.values, predict(model, data))
    assert set(found.coords) == {"lat", "cell", *steps}
    one = predict(model, named.isel(lat=0, lon=0), output="flow")
    assert one.dims == (*steps, "flow")
    np.testing.assert_array_equal(one.values, found.values[0, 0])


@pytest.mark.parametrize("kind", ["last", "mean", "sequence", "LSTM"])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("shape", [(5, 6, 0, 3), (0, 6, 4, 3), (0, 6, 0, 3), (0, 3)])
def test_no_time_steps_and_no_series(shape, lazy, kind):
    model = LSTM(3, 2, seed=0) if kind == "LSTM" else build(kind)
    data = np.zeros(shape, np.float32)
    found = predict(model, da.from_array(data, chunks=-1) if lazy else data)
    stepwise = kind in ("sequence", "LSTM")
    assert found.shape == (*shape[:-2], *shape[-2:-1] * stepwise, 2)
    if not stepwise:
        bias = np.broadcast_to(model.params["head.bias"], found.shape)
        np.testing.assert_array_equal(np.asarray(found), bias)


@pytest.mark.parametrize("output", ["last", "sequence"])
@pytest.mark.parametrize("lazy", [False, True])
def test_outputs_may_take_the_name_of_the_features(rng, lazy, output):
    model, data = build(output), grid(rng)
    named = xr.DataArray(
        data, dims=["lat", "lon", "time", "feature"],
        coords={"feature": ["a", "b", "c"], "unit": ("feature", ["mm", "K", "m"]), "time": np.arange(12),
                "weight": (("time", "feature"), np.ones((12, 3))), "lat": np.arange(7), "member": 3},
    )  # fmt: skip
    for name in ("feature", "unit", "flow"):
        found = predict(model, named.chunk(lat=2) if lazy else named, output=name)
        assert found.dims == ("lat", "lon", *("time",) * (output == "sequence"), name)
        assert set(found.coords) == {"lat", "member", *("time",) * (output == "sequence")}
        np.testing.assert_array_equal(found.isel({name: 0}).values, predict(model, data)[..., 0])


def test_output_is_checked_before_any_work(monkeypatch):
    monkeypatch.setattr("fastlstm.gridded._of_array", lambda *args: pytest.fail("computes"))
    data = xr.DataArray(DATA, dims=["n", "time", "feature"], coords={"output": 3.0, "flow": ("n", np.arange(4.0))})
    stacked = xr.DataArray(DATA.reshape(2, 2, 12, 3), dims=["output", "b", "time", "feature"]).stack(n=("output", "b"))
    for given, output in ((data, "output"), (data, "flow"), (stacked, "output"), (stacked, "n"), (data, None),
                          (data, 3), (DATA, None), (DATA, ["a"])):  # fmt: skip
        with pytest.raises(ArgumentError, match=r"output|flow|'n'"):
            predict(build(), given, output=output)


def test_a_nan_stays_in_its_series(rng):
    model, data = build(), grid(rng)
    expected = predict(model, data)
    data[2, 3, 5, 1] = np.nan
    found = predict(model, da.from_array(data, chunks=(7, 3, 12, 3))).compute()
    assert np.isnan(found[2, 3]).all()
    found[2, 3] = expected[2, 3]
    np.testing.assert_array_equal(found, expected)


def test_arrays_on_disk_and_of_any_layout(rng, tmp_path):
    model, data = build(), grid(rng)
    expected = predict(model, data)
    np.save(tmp_path / "data.npy", data)
    for other in (
        np.load(tmp_path / "data.npy", mmap_mode="r"),
        np.asfortranarray(data),
        data.astype(">f4"),
        da.from_array(data.astype(">f4"), chunks=(2, 9, 12, 3)),
    ):
        found = np.asarray(predict(model, other))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


def test_blocks_are_held_to_their_threads(rng, monkeypatch):
    seen = []
    predicted = Model.predict
    monkeypatch.setattr(Model, "predict", lambda *args: (seen.append(get_num_threads()), predicted(*args))[1])
    before = get_num_threads()
    with at_most(before + 3):
        assert get_num_threads() == before + 3
        predict(build(), da.from_array(grid(rng), chunks=(7, 3, 12, 3)), threads=1).compute(scheduler="threads")
        predict(build(), grid(rng), threads=2)
    assert seen == [1, 1, 1, 2]
    assert get_num_threads() == before


def test_limits_of_several_threads_do_not_get_in_each_others_way():
    before, errors = get_num_threads(), []

    def work(limit):
        try:
            for _ in range(2000):
                with at_most(limit):
                    assert get_num_threads() <= limit
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[limit]) for limit in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and get_num_threads() == before


DATA = np.zeros((4, 12, 3), np.float32)
ERRORS = {
    "no model": (lambda: predict(None, DATA), ArgumentError),
    "two heads": (lambda: predict(Model(LSTM(3, 2), {"a": Linear(2, 1), "b": Linear(2, 1)}), DATA), ArgumentError),
    "a list": (lambda: predict(build(), DATA.tolist()), ArrayTypeError),
    "a masked array": (lambda: predict(build(), np.ma.masked_invalid(DATA)), ArrayTypeError),
    "a data set": (lambda: predict(build(), xr.Dataset({"a": (("n", "time", "feature"), DATA)})), ArrayTypeError),
    "another dtype": (lambda: predict(build(), DATA.astype("f8")), DTypeError),
    "another dtype in blocks": (lambda: predict(build(), da.from_array(DATA.astype("f8"))), DTypeError),
    "other features": (lambda: predict(build(), DATA[..., :2]), ShapeError),
    "one axis": (lambda: predict(build(), DATA[0, 0]), ShapeError),
    "blocks of parts of series": (lambda: predict(build(), da.from_array(DATA, chunks=(4, 6, 3))), ArgumentError),
    "blocks of features": (lambda: predict(build(), da.from_array(DATA, chunks=(4, 12, 1))), ArgumentError),
    "no such dimension": (lambda: predict(build(), xr.DataArray(DATA, dims=["n", "t", "feature"])), ArgumentError),
    "time is the features": (
        lambda: predict(build(), xr.DataArray(DATA, dims=["n", "time", "feature"]), time="feature"), ArgumentError),
    "output is a dimension": (
        lambda: predict(build(), xr.DataArray(DATA, dims=["output", "time", "feature"])), ArgumentError),
    "no threads": (lambda: predict(build(), DATA, threads=0), ArgumentError),
    "no batch": (lambda: predict(build(), DATA, batch=0), ArgumentError),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_raises_a_typed_error(case):
    call, error = ERRORS[case]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error and re.search(r"\w{3}", str(caught.value))


# Two processes

CLUSTER = """
import os, signal, sys, time
import numpy as np
import dask, dask.array as da
from distributed import Client, LocalCluster
from fastlstm import LSTM
from fastlstm.gridded import predict
from fastlstm.training import Linear, Model

dask.config.set({"distributed.comm.timeouts.connect": "20s", "distributed.scheduler.allowed-failures": 2})
rng = np.random.default_rng(0)
data = rng.normal(size=(400, 30, 3)).astype(np.float32)
model = Model(LSTM(3, 256, seed=1), Linear(256, 2, seed=2))  # 1 MB
expected = predict(model, data)

def watch():
    "In a worker: count the models that it is sent, and note the threads of its calls."
    import builtins, fastlstm, fastlstm.training
    from fastlstm.training import Model
    builtins.arrivals, builtins.threads = [], []
    predicted = Model.predict
    def predict(self, x, lengths=None):
        builtins.threads.append(fastlstm.get_num_threads())
        return predicted(self, x, lengths)
    Model.predict = predict
    Model.__setstate__ = lambda self, state: (builtins.arrivals.append(1), self.__dict__.update(state))[1]
    return os.getpid()

def seen():
    import builtins
    return len(builtins.arrivals), sorted(set(builtins.threads)), len(builtins.threads)

def slowly(block):
    time.sleep(0.05)
    return block

def deadly(block):
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None) as cluster, Client(cluster) as client:
        pids = set(client.run(watch).values())
        assert len(pids) == 2 and os.getpid() not in pids

        lazy = predict(model, da.from_array(data, chunks=(10, 30, 3)))
        np.testing.assert_array_equal(lazy.compute(), expected)
        found = client.run(seen).values()
        assert sum(calls for _, _, calls in found) == 40 and min(calls for _, _, calls in found) > 0, found
        assert all(arrivals <= 2 for arrivals, _, _ in found), found  # not one for each block
        assert all(threads == [1] for _, threads, _ in found), found
        print("equal, one thread each, model shipped once", flush=True)

        lazy = predict(model, da.from_array(data, chunks=(10, 30, 3)).map_blocks(slowly, dtype=data.dtype))
        future = client.compute(lazy)
        time.sleep(0.3)
        os.kill(min(pids), signal.SIGKILL)
        np.testing.assert_array_equal(future.result(timeout=60), expected)
        print("equal after a worker has died", flush=True)

        lazy = predict(model, da.from_array(data, chunks=(400, 30, 3)).map_blocks(deadly, meta=data[:0]))
        try:
            client.compute(lazy).result(timeout=90)
        except TimeoutError:
            raise
        except Exception as error:
            print(type(error).__name__, flush=True)
        # Dask fails to close a worker that is being started again: "can only join a started process".
        client.wait_for_workers(2, timeout=150)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the test kills a worker by SIGKILL")
def test_two_processes_of_which_one_dies(tmp_path):
    pytest.importorskip("distributed", reason="distributed is not installed")
    program = tmp_path / "cluster.py"  # its workers import it
    program.write_text(CLUSTER)
    code = f"import runpy; runpy.run_path({str(program)!r}, run_name='__main__')"
    shown = run_script(code, timeout=300, prelude="")
    assert shown.split("\n")[:3] == ["equal, one thread each, model shipped once", "equal after a worker has died",
                                     "KilledWorker"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not say how large a process was")
def test_a_hundred_thousand_series_on_disk_take_the_memory_of_some_blocks(tmp_path):
    pytest.importorskip("zarr", reason="zarr is not installed")
    script = Path(__file__).with_name("gridded_program.py")
    command = [sys.executable, script, "--series", "100000", "--folder", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    found = re.match(r"100000 series, (\d+) MB, in .* s; the process grew by (\d+) MB", result.stdout)
    assert found, result.stdout
    size, grown = map(int, found.groups())
    assert size > 180
    assert grown < size / 3  # two blocks at once, of 4 MB each, and the outputs of 256 series of each
    flow = xr.open_zarr(tmp_path / "flow.zarr", consolidated=False)["flow"]
    forcing = xr.open_zarr(tmp_path / "forcing.zarr", consolidated=False)["forcing"]
    some = forcing[[5, 49_999, 99_999]].values
    model = Model(LSTM(4, 32, seed=0), Linear(32, 1, seed=1))
    np.testing.assert_array_equal(flow[[5, 49_999, 99_999]].values, predict(model, some))
