"""sigmoid and tanh of the CUDA kernels, in units in the last place: CUDA's on a GPU, elsewhere the C library's."""

from __future__ import annotations

import cuda_row
import numpy as np
import pytest

from fastlstm import dispatch
from fastlstm.backends.cuda.launch import geometry, step_records
from fastlstm.backends.ragged import Packing
from fastlstm.kernels.cuda import loader

pytestmark = pytest.mark.skipif(bool(cuda_row.missing()), reason=str(cuda_row.missing()))

# tanh: CUDA documents 2 ulp for tanhf and 1 for tanh, glibc comes to 2.2 and 2. sigmoid: that of exp (2 for expf, 1 for
# exp), a sum and a division, half a unit each, where e is the larger summand or the only one.
MOST_ULP = {"sigmoid": 4.0, "tanh": 2.5}


def sample(dtype):
    """Numbers of every exponent and sign: every so many bit patterns, NaN left out."""
    bits = np.dtype(dtype.str.replace("f", "u"))
    stride, count = (4099, 2**32 // 4099) if dtype.itemsize == 4 else (2**64 // 200_003, 200_003)
    values = (np.arange(count, dtype=bits) * bits.type(stride)).view(dtype)
    edges = np.array([0, -0.0, np.inf, -np.inf, np.finfo(dtype).tiny, np.finfo(dtype).max, -np.finfo(dtype).max])
    return np.concatenate([values[~np.isnan(values)], np.linspace(-20, 20, 4000), edges.astype(dtype)]).astype(dtype)


def activated(values, width):
    """Let step_forward activate `values` as input gate and as candidate."""
    dtype, hidden = values.dtype, 4
    values = np.resize(values, (-(-values.size // hidden), hidden))
    rows = len(values)
    with cuda_row.installed() as xp:
        device = dispatch.backend_named("cuda").device
        a = xp.array(np.concatenate([values, np.zeros_like(values), values, values], axis=1))
        zeros = lambda *shape: xp.zeros(shape, dtype)  # noqa: E731
        packing = Packing.of(None, 1, rows)
        (record,) = step_records(packing, packing.step_rows(False), hidden, 1, 0, keep_tape=False)
        state, y = (zeros(rows, hidden) for _ in range(5)), zeros(1, rows, 1, hidden)
        c_prev, c, h_rows, h_n, c_n = state
        device.kernel("step_forward", dtype, width)(
            *geometry(rows, hidden // width),
            (a, None, None, None, None, None, c_prev, c, h_rows, y, h_n, c_n, record),
        )
        gates = a.get()
    return values, gates[:, :hidden], gates[:, 2 * hidden : 3 * hidden]


def ulps(found, true):
    """Error in units in the last place of the true value; a denormal may be flushed to zero, as CuPy has it."""
    tiny = np.finfo(found.dtype).tiny
    error = np.abs(found.astype(true.dtype) - true)
    return np.where(error < tiny, 0, error / np.maximum(np.spacing(np.abs(true).astype(found.dtype)), tiny))


@pytest.mark.parametrize("width", ["narrow", "wide"])
def test_activations_are_accurate(dtype, width):
    exact = np.float64 if dtype.itemsize == 4 else np.longdouble
    if np.finfo(exact).eps >= np.finfo(dtype).eps / 100:
        pytest.skip("there is no type more precise than float64")
    values, sigmoid, tanh = activated(sample(dtype), 1 if width == "narrow" else loader.wide(dtype))
    with np.errstate(all="ignore"):
        e = np.exp(-np.abs(values.astype(exact)))
        true = {"sigmoid": np.where(values >= 0, 1, e) / (1 + e), "tanh": np.tanh(values.astype(exact))}
    for name, found in (("sigmoid", sigmoid), ("tanh", tanh)):
        assert np.abs(found).max() <= 1
        worst = ulps(found, true[name])
        assert worst.max() <= MOST_ULP[name], f"{name}({values.flat[worst.argmax()]!r}): {worst.max():.3g} ulp"


def test_nan_stays_nan(dtype):
    _, sigmoid, tanh = activated(np.full(4, np.nan, dtype), 1)
    assert np.isnan(sigmoid).all() and np.isnan(tanh).all()
