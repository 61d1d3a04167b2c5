"""The one object through which the CUDA backend reaches a GPU, and CuPy behind it.

The backend's host code asks for nothing that is not in :class:`Device`. So it runs on any object that
offers the same: the tests have one whose memory is NumPy's and whose kernels are the same files, compiled
for the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from importlib import import_module
from typing import Any, Protocol, TypeAlias

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.backends.cuda.plans import OLDEST, Limits, Plan
from fastlstm.errors import BackendError
from fastlstm.kernels.cuda import loader

__all__ = ["CupyDevice", "Device", "Kernel", "Product", "RefusedLaunchError"]

_THREADS = 256  # of a block of a persistent kernel

# Called with grid, block and arguments: arrays, passed as pointers; None, as a null pointer; integers, as 64 bits; and
# what `Device.by_value` returns.
Kernel: TypeAlias = Callable[[tuple[int, ...], tuple[int, ...], tuple[Any, ...]], None]


class Product(Protocol):
    """A matrix product with its arrays and options settled, so that a call in a loop over time costs little."""

    def __call__(self, rows: int | None = None, a_row: int = 0, out_row: int = 0) -> None:
        """Compute `rows` rows of it, all by default: from row `a_row` of `a` on, to row `out_row` of `out` on."""
        ...


class RefusedLaunchError(Exception):
    """A kernel whose blocks wait for each other could not be compiled or launched; nothing was done."""


class Device(Protocol):
    """A GPU: memory, kernels and products. All work goes to the caller's current stream, and nothing waits for it."""

    xp: Any  # the module whose arrays live there
    refusals: dict[tuple[Limits, Plan, tuple[str, ...]], str]  # why a plan cannot run a variant, once that was seen

    def of(self, array: Array) -> AbstractContextManager[Any]:
        """Make the device that holds `array` the current one inside a ``with`` block."""
        ...

    def upload(self, host: np.ndarray[Any, Any]) -> Array:
        """Copy an array from the host."""
        ...

    def aligned(self, array: Array) -> bool:
        """Whether the array's first element lies at a multiple of 16 bytes."""
        ...

    def capturing(self) -> bool:
        """Whether the current stream's work is captured for a CUDA graph, in which cuBLAS must not be called."""
        ...

    def kernel(self, name: str, dtype: np.dtype[Any], width: int = 1, variant: tuple[str, ...] = ()) -> Kernel:
        """Return a kernel, compiled at its first use (see ``kernels/cuda/loader.py``)."""
        ...

    def limits(self) -> Limits:
        """Return what the current device has."""
        ...

    def launch_resident(
        self, name: str, options: tuple[str, ...], shared: int, cooperative: bool, blocks: int, args: tuple[Any, ...]
    ) -> None:
        """Launch a persistent kernel of `blocks` blocks with `shared` bytes of dynamic shared memory each.

        `cooperative`: all blocks have to be resident at once, since they wait for each other; else no block waits for
        one outside its cluster.

        Raises
        ------
        RefusedLaunchError
            If it cannot be compiled or launched here.
        """
        ...

    def by_value(self, records: np.ndarray[Any, Any]) -> Sequence[Any]:
        """Return each of the records (S, 1), on the host, as an argument that a kernel gets by value.

        The caller keeps `records` alive and unchanged until the kernels are launched.
        """
        ...

    def product(
        self,
        a: Array,
        b: Array,
        out: Array,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        accumulate: bool = False,
        precision: str = "float32",
    ) -> Product:
        """Prepare the product of two C-contiguous matrices, neither of them empty, that `out` is to hold or to gain.

        It is computed in the dtype's full precision, whatever the caller has set for products of their own, unless
        `precision` (see ``HasPrecision.precision``) permits to round float32 factors, and the device gains by it.

        It is for the thread and device that prepare it. Rows are chosen by number at the call: slices of
        arrays would cost more than the product's launch.
        """
        ...


class CupyDevice:
    """CuPy: its memory pool, its cache of compiled kernels, and the cuBLAS handle it keeps for each device.

    The handle is CuPy's, and user code can change its modes (``cupy.cuda.cublas.setPointerMode``, ``setMathMode``).
    With the pointer mode DEVICE, cuBLAS would read our factors 0 and 1 from the GPU's memory; with the math mode TF32,
    products would keep 10 of 23 bits. So each product runs with the modes HOST and DEFAULT, and leaves the handle as it
    was. A call reads both modes, and sets and restores them only if they differ: two reads of a field are cheap beside
    the product's launch. Products that may round say so in the call itself (``cublasGemmEx``'s compute type).
    """

    def __init__(self) -> None:
        self.xp = _cupy()
        cublas = self.xp.cuda.cublas
        self._handle = self.xp.cuda.device.get_cublas_handle
        self._operation = {False: cublas.CUBLAS_OP_N, True: cublas.CUBLAS_OP_T}
        self._gemm = {"float32": cublas.sgemm, "float64": cublas.dgemm}
        self._modes = cublas.getPointerMode, cublas.getMathMode
        self._set_modes = cublas.setPointerMode, cublas.setMathMode
        self._wanted = cublas.CUBLAS_POINTER_MODE_HOST, cublas.CUBLAS_DEFAULT_MATH
        self._float = int(self.xp.cuda.runtime.CUDA_R_32F)
        self._compute = {"tf32": cublas.CUBLAS_COMPUTE_32F_FAST_TF32, "bf16": cublas.CUBLAS_COMPUTE_32F_FAST_16BF}
        self._gemm_ex, self._algorithm = cublas.gemmEx, cublas.CUBLAS_GEMM_DEFAULT
        # 0 and 1 of each dtype, which cuBLAS reads on the host, and their addresses.
        self._numbers = {name: np.array([0, 1], name) for name in self._gemm}
        self._factors = {name: (n.ctypes.data, n.ctypes.data + n.itemsize) for name, n in self._numbers.items()}
        self.kernel = cache(self._kernel)
        self.refusals: dict[tuple[Limits, Plan, tuple[str, ...]], str] = {}
        self._limits: dict[int, Limits] = {}  # by the device's number
        # The last cooperative launch on each device. Reentrant: a signal handler may make a call.
        self._cooperative: dict[int, Any] = {}
        self._one_at_a_time = threading.RLock()

    def of(self, array: Array) -> AbstractContextManager[Any]:
        """See :class:`Device`."""
        device: AbstractContextManager[Any] = array.device
        return device

    def upload(self, host: np.ndarray[Any, Any]) -> Array:
        """See :class:`Device`; CuPy copies it through pinned memory, so that this does not wait."""
        return self.xp.asarray(host)

    def aligned(self, array: Array) -> bool:
        """See :class:`Device`."""
        return bool(array.data.ptr % 16 == 0)

    def capturing(self) -> bool:
        """See :class:`Device`."""
        return bool(self.xp.cuda.get_current_stream().is_capturing())

    def _kernel(self, name: str, dtype: np.dtype[Any], width: int = 1, variant: tuple[str, ...] = ()) -> Kernel:
        kernel: Kernel = self._module(dtype, width, variant).get_function(name)
        return kernel

    @cache  # noqa: B019, there is one such object, and it lives as long as the process
    def _module(self, dtype: np.dtype[Any], width: int, variant: tuple[str, ...]) -> Any:
        return self.xp.RawModule(code=loader.source(), options=loader.options(dtype, width, variant))

    def limits(self) -> Limits:
        """See :class:`Device`."""
        runtime = self.xp.cuda.runtime
        number = runtime.getDevice()
        found = self._limits.get(number)
        if found is None:
            attribute = runtime.deviceGetAttribute
            found = self._limits[number] = Limits(
                int(self.xp.cuda.Device(number).compute_capability),
                attribute(runtime.cudaDevAttrMultiProcessorCount, number),
                attribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, number),
            )
        return found

    def launch_resident(
        self, name: str, options: tuple[str, ...], shared: int, cooperative: bool, blocks: int, args: tuple[Any, ...]
    ) -> None:
        """See :class:`Device`.

        CuPy shrinks a cooperative grid along x that is too large, with no more than a warning, and the blocks that are
        left would wait for the others; along y it raises ValueError.

        One cooperative launch at a time on a device: on another stream, each waits for the one before. So two of them
        never hold a part of the multiprocessors each. A stream that is being captured cannot wait for what is not.
        """
        cuda = self.xp.cuda
        refusals = (
            ValueError, cuda.driver.CUDADriverError, cuda.runtime.CUDARuntimeError, cuda.compiler.CompileException,
        )  # fmt: skip
        number, stream = cuda.runtime.getDevice(), cuda.get_current_stream()
        ordered = cooperative and not stream.is_capturing()
        grid, event = (1, blocks) if cooperative else (blocks,), None
        with self._one_at_a_time if ordered else nullcontext():
            try:
                kernel = self._resident(name, options, shared, cooperative, number)
                if ordered:
                    event = self._cooperative.get(number)
                    if event is None:
                        event = self._cooperative[number] = cuda.Event(disable_timing=True)
                    else:
                        stream.wait_event(event)
                kernel(grid, (_THREADS,), args, shared_mem=shared)
            except refusals as error:
                said = str(error).strip().partition(chr(10))[0]
                raise RefusedLaunchError(f"{type(error).__name__}: {said}") from error
            if event is None:
                return
            try:
                event.record(stream)
            except refusals as error:  # no refusal: the kernel writes its results, over its inputs
                with suppress(*refusals):
                    stream.synchronize()  # the next cooperative launch cannot wait for this one
                raise BackendError(f"CUDA failed to record the end of {name}: {error}") from error

    @cache  # noqa: B019, see `_module`
    def _resident(self, name: str, options: tuple[str, ...], shared: int, cooperative: bool, _device: int) -> Any:
        """Return a kernel that may have so much shared memory on the current device."""
        kernel = self._persistent_module(options, cooperative).get_function(name)
        kernel.max_dynamic_shared_size_bytes = shared
        return kernel

    @cache  # noqa: B019, see `_module`
    def _persistent_module(self, options: tuple[str, ...], cooperative: bool) -> Any:
        code = loader.persistent_source()
        return self.xp.RawModule(code=code, options=options, enable_cooperative_groups=cooperative)

    def by_value(self, records: np.ndarray[Any, Any]) -> Sequence[Any]:
        """See :class:`Device`.

        CuPy passes a NumPy array of one element by value, which takes it 1.5 µs at each launch, most of it for NumPy's
        ``__array_interface__``. Its own ``CPointer`` takes 0.05 µs; 11 integers take 1.7 µs. That class is not
        documented: it is used if it holds the address that it is given, and can be asked for it.
        """
        pointer = getattr(getattr(self.xp.cuda, "function", None), "CPointer", None)
        if pointer is None or getattr(pointer(8), "ptr", None) != 8:
            return list(records)
        start, size = records.ctypes.data, records.itemsize
        return [pointer(start + k * size) for k in range(len(records))]

    def product(
        self,
        a: Array,
        b: Array,
        out: Array,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        accumulate: bool = False,
        precision: str = "float32",
    ) -> Product:
        """See :class:`Device`. One cuBLAS call each.

        cuBLAS counts by columns, where a matrix stored by rows is its own transpose: the product is asked
        for as out^T = b^T a^T.
        """
        name, size = a.dtype.name, a.dtype.itemsize
        (a_rows, a_columns), (b_rows, b_columns) = a.shape, b.shape
        columns, inner = (b_rows, b_columns) if transpose_b else (b_columns, b_rows)
        all_rows = a_columns if transpose_a else a_rows
        gemm, handle = self._gemm[name], self._handle()
        b_operation, a_operation = self._operation[transpose_b], self._operation[transpose_a]
        zero, one = self._factors[name]
        beta = one if accumulate else zero
        a_start, b_start, out_start = a.data.ptr, b.data.ptr, out.data.ptr
        a_stride, out_stride = a_columns * size, columns * size
        (pointer_mode, math_mode), wanted = self._modes, self._wanted
        gemm_ex, kind, algorithm = self._gemm_ex, self._float, self._algorithm
        rounded = self._compute.get(precision) if name == "float32" and self._rounds() else None

        # The arrays are held as long as their addresses may be used: one of them may be the caller's only for a moment.
        def multiply(rows: int | None = None, a_row: int = 0, out_row: int = 0, _held: Any = (a, b, out)) -> None:
            found = pointer_mode(handle), math_mode(handle)
            try:
                if found != wanted:
                    self._change_modes(handle, wanted)
                if rounded is None:
                    gemm(
                        handle, b_operation, a_operation, columns, all_rows if rows is None else rows, inner,
                        one, b_start, b_columns, a_start + a_row * a_stride, a_columns, beta,
                        out_start + out_row * out_stride, columns,
                    )  # fmt: skip
                else:
                    gemm_ex(
                        handle, b_operation, a_operation, columns, all_rows if rows is None else rows, inner,
                        one, b_start, kind, b_columns, a_start + a_row * a_stride, kind, a_columns, beta,
                        out_start + out_row * out_stride, kind, columns, rounded, algorithm,
                    )  # fmt: skip
            finally:
                if found != wanted:
                    self._change_modes(handle, found)

        return multiply

    def _rounds(self) -> bool:
        """Whether the current device has units that multiply rounded factors."""
        return self.limits().architecture >= OLDEST

    def _change_modes(self, handle: int, modes: tuple[int, int]) -> None:
        for change, mode in zip(self._set_modes, modes, strict=True):
            change(handle, mode)


def _cupy() -> Any:
    """Import CuPy and make sure that it can work here."""
    how = 'pip install "fastlstm[cuda13]" (or [cuda12], as the driver allows)'
    try:
        cupy = import_module("cupy")
    except ImportError as error:
        raise BackendError(f"the CUDA backend needs CuPy, which cannot be imported here ({error}): {how}") from error
    try:
        cupy.cuda.runtime.getDeviceCount()  # raises if there is none
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendError(f"CuPy {cupy.__version__} finds no CUDA device it can use here: {error}") from error
    try:
        cupy.cuda.cublas.getVersion  # noqa: B018, the attribute loads the library
        cupy.cuda.nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:
        raise BackendError(f"CuPy {cupy.__version__} lacks libraries of the CUDA toolkit ({error}): {how}") from error
    return cupy
