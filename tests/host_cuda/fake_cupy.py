"""As much of CuPy as fastlstm uses, over NumPy's memory: what is a mistake on a GPU is one here.

An array is no NumPy array and mixes with none; it lives on one device, and a kernel runs on the current one. New
memory is poisoned with ones, which read as NaN, and fenced, so that a write beyond its end is found. What would
wait for the GPU is counted. An allocation can be made to fail.
"""

from __future__ import annotations

import contextlib
import operator
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from host_cuda.build import MOST_SHARED, CompilationError, HostModule, LaunchError, folder
from host_cuda.fake_cublas import cublas
from host_cuda.memory import Allocation, OutOfMemoryError, Pool
from host_cuda.streams import CUDARuntimeError, Event, Logged, Stream


class Device:
    """A device, current inside a ``with`` block."""

    current = threading.local()
    compute_capability = "00"

    def __init__(self, number: int | None = None) -> None:
        self.id = self.now() if number is None else number
        self.before: list[int] = []

    @classmethod
    def now(cls) -> int:
        return getattr(cls.current, "id", 0)

    def __enter__(self) -> Device:
        self.before.append(self.now())
        Device.current.id = self.id
        return self

    def __exit__(self, *_: object) -> None:
        Device.current.id = self.before.pop()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"


def _unpickle(host: np.ndarray) -> ndarray:
    return sys.modules["cupy"].array(host)


class ndarray:
    """As ``cupy.ndarray``."""

    __slots__ = ("_allocation", "_device", "_view", "_xp")
    __module__ = "cupy"
    __array_ufunc__ = None  # NumPy's operators give up, as they do with CuPy

    def __init__(self, xp: FakeCupy, view: np.ndarray, allocation: Allocation, device: int) -> None:
        self._xp, self._view, self._allocation, self._device = xp, view, allocation, device

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = getattr(self._view, name)
        if callable(value):
            return self._xp.lift(value, self)
        return self._xp.wrap(value, self) if isinstance(value, np.ndarray) else value

    @property
    def device(self) -> Device:
        return Device(self._device)

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self._view.ctypes.data, device=self.device)

    def __dlpack__(self, **options: Any) -> Any:
        return self._view.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._view.__dlpack_device__()

    def get(self) -> np.ndarray:
        self._xp.pool.waits.append("get")
        return self._view.copy()

    def item(self) -> Any:
        self._xp.pool.waits.append("item")
        return self._view.item()

    def __len__(self) -> int:
        return len(self._view)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[k] for k in range(len(self)))

    def __getitem__(self, key: Any) -> ndarray:
        return self._xp.lift(operator.getitem, self)(self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._xp.lift(operator.setitem, self)(self, key, value)

    def __repr__(self) -> str:
        return repr(self._view)

    def __reduce__(self) -> Any:
        return _unpickle, (self._view.copy(),)

    def __deepcopy__(self, memo: Any) -> ndarray:
        return self.copy()

    def __bool__(self) -> bool:
        return bool(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    __hash__ = None  # type: ignore[assignment]


def _operators() -> None:
    def method(function: Callable[..., Any], swapped: bool) -> Callable[..., Any]:
        if swapped:
            return lambda self, other: self._xp.lift(function, self)(other, self)
        return lambda self, *others: self._xp.lift(function, self)(self, *others)

    names = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift"]
    for name in names:
        function = getattr(operator, f"__{name}__")
        setattr(ndarray, f"__{name}__", method(function, False))
        setattr(ndarray, f"__r{name}__", method(function, True))
        setattr(ndarray, f"__i{name}__", method(getattr(operator, f"__i{name}__"), False))
    for name in ["lt", "le", "eq", "ne", "gt", "ge", "neg", "pos", "abs", "invert"]:
        setattr(ndarray, f"__{name}__", method(getattr(operator, f"__{name}__"), False))


_operators()


def _lower(value: Any, seen: list[ndarray]) -> Any:
    """Replace our arrays by NumPy's, however deep they lie, and refuse any that were NumPy's before."""
    if isinstance(value, ndarray):
        seen.append(value)
        return value._view
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, tuple | list):
        return type(value)(_lower(part, seen) for part in value)
    if isinstance(value, dict):
        return {key: _lower(part, seen) for key, part in value.items()}
    return value


class FakeCupy(types.ModuleType):
    """The module; each has its own pool."""

    ndarray = ndarray
    __version__ = "0 (stand-in)"

    def __init__(
        self,
        devices: int = 1,
        change: Callable[[str], str] | None = None,
        *,
        fibers: bool = False,
        options: tuple[str, ...] = (),
        seed: int = 0,
        architecture: str = "00",
        multiprocessors: int = 4,
    ) -> None:
        super().__init__("cupy")
        folder()  # made now, so that processes started from here find it
        self.how = {"fibers": fibers, "seed": seed, "multiprocessors": multiprocessors}
        self.options = options  # for the compiler, besides those that the loader gives
        self.pool = Pool()
        self.pool.launched, self.pool.own = Logged(), Logged()
        self.change = change or (lambda code: code)  # what a test does to the kernels' source
        properties = {"name": b"no GPU, but a stand-in", "multiProcessorCount": multiprocessors,
                      "totalGlobalMem": 0}  # fmt: skip
        runtime = types.SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError, getDeviceCount=lambda: self._count(devices),
            getDeviceProperties=lambda number: properties, driverGetVersion=lambda: 0, runtimeGetVersion=lambda: 0,
            getDevice=Device.now, CUDA_R_32F=0, deviceGetAttribute=lambda attribute, number: attribute,
            cudaDevAttrMultiProcessorCount=multiprocessors, cudaDevAttrMaxSharedMemoryPerBlockOptin=MOST_SHARED,
        )  # fmt: skip
        self.cuda = types.SimpleNamespace(
            Device=type("Device", (Device,), {"compute_capability": architecture}), runtime=runtime,
            driver=types.SimpleNamespace(CUDADriverError=LaunchError),
            compiler=types.SimpleNamespace(CompileException=CompilationError),
            cublas=cublas(self.pool.launched, Device.now, CUDARuntimeError, lambda: Stream.now().captures),
            nvrtc=types.SimpleNamespace(getVersion=lambda: (13, 0)),
            device=types.SimpleNamespace(get_cublas_handle=lambda: Device.now() + 1000),
            memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError), is_available=lambda: devices > 0,
            Event=Event, Stream=Stream, get_current_stream=Stream.now, set_allocator=lambda allocator: None,
            get_elapsed_time=lambda start, end: 1e3 * (end.time - start.time),
        )  # fmt: skip

    @staticmethod
    def get_default_memory_pool() -> Any:
        return types.SimpleNamespace(free_all_blocks=lambda: None)

    @staticmethod
    def _count(devices: int) -> int:
        if not devices:
            raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return devices

    def RawModule(self, *, code: str, options: tuple[str, ...], enable_cooperative_groups: bool = False) -> HostModule:
        how = self.how | {"launched": self.pool.launched, "cooperative": enable_cooperative_groups}
        return HostModule(self.change(code), (*options, *self.options), self._value, **how)

    @staticmethod
    def _value(argument: Any) -> bytes:
        """Return an argument of a kernel as CuPy passes it: addresses, 64 bits, or one element by value."""
        if isinstance(argument, ndarray):
            if not argument._view.flags.c_contiguous:
                raise ValueError("a kernel takes no strides")
            if argument._device != Device.now():
                raise ValueError(f"an array of device {argument._device} for a kernel on {Device.now()}")
            argument = argument._view.ctypes.data
        if isinstance(argument, np.ndarray):
            if argument.size != 1:
                raise TypeError(f"You are trying to pass a numpy.ndarray of shape {argument.shape}")
            return argument.tobytes()
        if argument is None:
            argument = 0
        if type(argument) is not int:
            raise TypeError(f"Unsupported type {type(argument)}")
        return (argument & (2**64 - 1)).to_bytes(8, sys.byteorder)

    def wrap(self, value: Any, source: ndarray | None, name: str = "") -> Any:
        """Make an array of NumPy's result: a view of `source` if it is one, else new memory."""
        if (
            source is not None
            and isinstance(value, np.ndarray)
            and np.may_share_memory(value, source._allocation.whole)
        ):
            return ndarray(self, value, source._allocation, source._device)
        value = np.asarray(value)
        result = self.empty(value.shape, value.dtype)
        result._view[...] = value
        self.pool.own.append(name)
        return result

    def lift(self, function: Callable[..., Any], source: ndarray | None = None) -> Callable[..., Any]:
        """Make a function of NumPy one of CuPy: arrays of this module in and out, and none of NumPy."""
        seen, name = [] if source is None else [source], function.__name__

        def lifted(*args: Any, **kwargs: Any) -> Any:
            lowered = _lower(args, seen), _lower(kwargs, seen)
            if len({array._device for array in seen}) > 1:
                raise ValueError("arrays of different devices")
            with np.errstate(all="ignore"), Device(seen[0]._device) if seen else contextlib.nullcontext():
                result = function(*lowered[0], **lowered[1])
                if isinstance(result, tuple | list):
                    return type(result)(self.wrap(part, None, name) for part in result)
                changed = [array for array in seen if result is array._view]  # x += 1 returns x
                if result is None or changed:
                    self.pool.own.append(name)
                    return changed[0] if changed else None
                owner = seen[0] if seen else None
                return self.wrap(result, owner, name) if isinstance(result, np.ndarray | np.generic) else result

        return lifted

    def __getattr__(self, name: str) -> Any:
        value = getattr(np, name)
        if isinstance(value, type) or not callable(value):
            return value
        return self.lift(value)

    def empty(self, shape: Any, dtype: Any = float) -> ndarray:
        shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
        dtype = np.dtype(dtype)
        allocation = self.pool.allocate(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        return ndarray(self, allocation.memory.view(dtype).reshape(shape), allocation, Device.now())

    def empty_like(self, like: ndarray) -> ndarray:
        return self.empty(like.shape, like.dtype)

    def array(self, value: Any, dtype: Any = None, copy: bool = True) -> ndarray:
        if isinstance(value, ndarray):
            host = value._view
            self.pool.own.append("copy")
        else:
            host = np.asarray(value)
            self.pool.copies.append(host.nbytes)
        result = self.empty(host.shape, (dtype and np.dtype(dtype)) or host.dtype.newbyteorder("="))
        result._view[...] = host
        return result

    def asarray(self, value: Any, dtype: Any = None) -> ndarray:
        if hasattr(value, "__cuda_array_interface__"):
            return self.of_interface(value.__cuda_array_interface__)
        fits = isinstance(value, ndarray) and dtype in (None, value.dtype)
        return value if fits else self.array(value, dtype)

    def of_interface(self, interface: dict[str, Any]) -> ndarray:
        view = np.asarray(types.SimpleNamespace(__array_interface__=interface | {"version": 3}))
        return ndarray(self, view, self.pool.allocate(0), Device.now())

    def ascontiguousarray(self, value: Any) -> ndarray:
        fits = isinstance(value, ndarray) and value._view.flags.c_contiguous
        return value if fits else self.array(value)

    def asnumpy(self, value: Any) -> np.ndarray:
        return value.get() if isinstance(value, ndarray) else np.asarray(value)

    def from_dlpack(self, value: Any) -> ndarray:
        """View memory that says it is on a device."""

        class OnHost:  # NumPy takes only such
            __dlpack_device__ = staticmethod(lambda: (1, 0))
            __dlpack__ = staticmethod(lambda **_: value.__dlpack__())

        return ndarray(self, np.from_dlpack(OnHost()), self.pool.allocate(0), value.__dlpack_device__()[1])

    def strided(self, flat: ndarray, start: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> ndarray:
        """View flat memory with any strides."""
        view = np.lib.stride_tricks.as_strided(flat._view[start:], shape, strides)
        return ndarray(self, view, flat._allocation, flat._device)
