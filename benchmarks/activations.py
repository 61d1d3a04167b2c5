"""The largest error of the float32 activations over every one of the 2^32 inputs.

Run ``python benchmarks/activations.py``; it takes a few minutes on one core. The exact value is taken in
float64, whose own error is a millionth of a float32 ulp.
"""

from __future__ import annotations

import argparse

import numpy as np

from fastlstm.kernels.cpu.activations import sigmoid_array, tanh_array

PART = 1 << 22


def exact_sigmoid(x):
    """The sigmoid in the precision of x, which must be more than that of what is measured."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


FUNCTIONS = {"sigmoid": (sigmoid_array, exact_sigmoid), "tanh": (tanh_array, np.tanh)}


def ulps(found, exact):
    """The distance from the exact values, in units of the last place that `found`'s dtype has there."""
    spacing = np.spacing(np.abs(exact).astype(found.dtype)).astype(exact.dtype)
    return np.abs(found.astype(exact.dtype) - exact) / spacing


def every_float32(name, stride=1):
    """Largest error in ulp, the input where it occurs, and the smallest and largest output, over all finite inputs.

    With a stride, over every stride-th bit pattern.
    """
    kernel, exact = FUNCTIONS[name]
    worst, at, low, high = 0.0, np.float32(0), np.inf, -np.inf
    for start in range(0, 1 << 32, PART * stride):
        x = np.arange(start, min(start + PART * stride, 1 << 32), stride, dtype=np.uint32).view(np.float32)
        x = x[np.isfinite(x)]
        if not x.size:
            continue
        x = np.concatenate([x, np.zeros(-x.size % 64, np.float32)])
        y = np.empty_like(x)
        kernel(x, y)
        error = ulps(y, exact(x.astype(np.float64)))
        where = int(np.argmax(error))
        if not error[where] <= worst:
            worst, at = float(error[where]), x[where]
        low, high = min(low, float(y.min())), max(high, float(y.max()))
    return worst, float(at), low, high


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stride", type=int, default=1, help="take every n-th bit pattern; default: all")
    options = parser.parse_args()
    for name in FUNCTIONS:
        worst, at, low, high = every_float32(name, options.stride)
        print(f"{name:8s} float32: at most {worst:.3f} ulp, at x = {at!r}; outputs in [{low!r}, {high!r}]")


if __name__ == "__main__":
    main()
