"""Keras itself, where it is installed, and files of Keras 2, written without it."""

from __future__ import annotations

import functools
import io
import json
import os
import sys

import numpy as np
import pytest

h5py = pytest.importorskip("h5py", reason="h5py is not installed: the extra keras")


@functools.cache
def import_keras():
    """Import Keras on PyTorch; without either, the test is skipped."""
    pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")
    if "keras" not in sys.modules:
        os.environ.setdefault("KERAS_BACKEND", "torch")
    return pytest.importorskip("keras", reason="the oracle is missing: keras is not installed")


def weights(inputs=3, hidden=4, dtype=np.float32, seed=0, bias=True):
    rng = np.random.default_rng(seed)
    shapes = [(inputs, 4 * hidden), (hidden, 4 * hidden), (4 * hidden,)][: 3 if bias else 2]
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def legacy_file(version="2.15.0", config=None, links=False):
    """Write what Keras 2 writes: names with :0, and the configuration in an attribute."""
    file = io.BytesIO()
    config = {"activation": "tanh", "recurrent_activation": "hard_sigmoid", "units": 4} | (config or {})
    with h5py.File(file, "w") as h5:
        layer = {"class_name": "LSTM", "config": {"name": "rnn", **config}}
        h5.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": {"name": "s", "layers": [layer]}})
        h5.attrs["keras_version"] = version
        group = h5.create_group("model_weights")
        group.attrs["layer_names"] = [b"rnn"]
        names = [f"rnn/lstm_cell/{part}:0" for part in ("kernel", "recurrent_kernel", "bias")]
        own = group.create_group("rnn")
        own.attrs["weight_names"] = [name.encode() for name in names]
        for name, array in zip(names, weights(), strict=True):
            own.create_dataset(name, data=array)
        if links:
            del own[names[0]]
            own[names[0]] = links
    return file.getvalue()
