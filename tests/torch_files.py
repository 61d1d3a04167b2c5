"""Files of torch.save, written without PyTorch: what its versions write, and what they never would."""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import ClassVar

import numpy as np


class Global:
    """Pickles as a reference to a name, whether or not there is such a thing."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickles as a call of a name."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


class StorageId:
    def __init__(self, *identity):
        self.identity = identity


class Pickler(pickle._Pickler):  # the one in Python, which can be told how to write a name
    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def persistent_id(self, value):
        return value.identity if type(value) is StorageId else None

    def save_global(self, value, name=None):
        self.write(b"c" + value.module.encode() + b"\n" + value.name.encode() + b"\n")

    def save_call(self, value):
        self.save(value.function)
        self.save(value.arguments)
        self.write(b"R")

    dispatch[Global] = save_global
    dispatch[Call] = save_call


def pickled(value) -> bytes:
    file = io.BytesIO()
    Pickler(file, 2).dump(value)
    return file.getvalue()


STORAGES = {"<f4": "FloatStorage", "<f8": "DoubleStorage", "<f2": "HalfStorage"}


def tensor(key, array, offset=0, shape=None, strides=None, count=None, kind=None):
    """Describe a view of a storage as torch.save does."""
    shape = array.shape if shape is None else shape
    strides = tuple(s // array.itemsize for s in array.strides) if strides is None else strides
    kind = Global("torch", kind or STORAGES[array.dtype.str])
    storage = StorageId("storage", kind, key, "cpu", array.size if count is None else count)
    hooks = Call(Global("collections", "OrderedDict"))
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), storage, offset, shape, strides, False, hooks)


def archive(value, storages, extra=(), name="weights", compression=zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as entries:
        entries.writestr(f"{name}/data.pkl", value if isinstance(value, bytes) else pickled(value))
        entries.writestr(f"{name}/byteorder", "little")
        for key, array in storages.items():
            entries.writestr(f"{name}/data/{key}", array.tobytes())
        entries.writestr(f"{name}/version", "3\n")
        for entry in extra:
            entries.writestr(f"{name}/{entry}", "")
    return file.getvalue()


def weights(dtype=np.float32, inputs=3, hidden=2, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"weight_ih_l0": (4 * hidden, inputs), "weight_hh_l0": (4 * hidden, hidden)}
    shapes |= {"bias_ih_l0": (4 * hidden,), "bias_hh_l0": (4 * hidden,)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def plain_file(given=None, prefix="") -> bytes:
    given = weights() if given is None else given
    described = {prefix + name: tensor(name, array) for name, array in given.items()}
    return archive(described, given)


def old_file(given, described=None) -> bytes:
    """Write what torch.save wrote before version 1.6: by default, the arrays themselves."""
    if described is None:
        described = {name: tensor(name, array) for name, array in given.items()}
        for call in described.values():
            call.arguments[0].identity += (None,)
    parts = [pickled(0x1950A86A20F9469CFC6C), pickled(1001), pickled({"little_endian": True}), pickled(described)]
    parts.append(pickled(list(given)))
    parts += [array.size.to_bytes(8, "little") + array.tobytes() for array in given.values()]
    return b"".join(parts)
