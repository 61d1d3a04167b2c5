"""Compiles CUDA source for the CPU with ``cuda_host.h``, and launches its kernels."""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

HEADER = Path(__file__).with_name("cuda_host.h")
INCLUDED = [HEADER.with_name(name) for name in ("exchange_host.h", "mma_host.h")]
KERNEL = re.compile(
    r'^extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(?:CLUSTER_OF\(\w+\) )?(\w+)\(', re.MULTILINE
)
BARRIER = re.compile(r"__(syncthreads|syncwarp|shfl_\w+)\(")
PLAIN, FIBERS, TOGETHER = 0, 1, 2  # of `launch` in cuda_host.h
UNASKED_SHARED, MOST_SHARED = 48 * 1024, 227 * 1024  # bytes that a kernel gets without a word, and at most


class CompilationError(RuntimeError):
    """The compiler refused a source."""


@functools.cache
def compiler() -> str | None:
    """Path of the C++ compiler, or None."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), None)


@functools.cache
def folder() -> Path:
    """The folder of compiled kernels until the tests end; processes that a test starts find them there too."""
    path = os.environ.get("FASTLSTM_TEST_HOST_CUDA")
    if path is None:
        path = os.environ["FASTLSTM_TEST_HOST_CUDA"] = tempfile.mkdtemp(prefix="fastlstm-host-cuda-")
        atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


@functools.cache
def library(source: str, options: tuple[str, ...]) -> ctypes.CDLL:
    """Compile a source once."""
    names = KERNEL.findall(source)
    text = f'#include "{HEADER}"\n{source}\n' + "".join(f"HOST_CUDA_EXPORT({name})\n" for name in names)
    key = hashlib.sha256(
        repr((text, *(path.read_text() for path in (HEADER, *INCLUDED)), options)).encode()
    ).hexdigest()[:16]
    compiled = folder() / f"{key}.so"
    if not compiled.exists():
        with tempfile.TemporaryDirectory(dir=folder()) as work:
            compile_with_host_compiler(text, options, Path(work))
            (Path(work) / "kernels.so").replace(compiled)
    return ctypes.CDLL(str(compiled))


def compile_with_host_compiler(text: str, options: tuple[str, ...], work: Path) -> None:
    """Write ``kernels.so`` into a folder."""
    (work / "kernels.cpp").write_text(text)
    command = [
        compiler() or "g++", "-shared", "-fPIC", "-O2", "-pthread", "-w", "-fno-strict-aliasing", "-Wl,-z,now",
        # As nvcc does: a product and a sum become one operation.
        "-march=native", "-ffp-contract=fast",
        *(option.replace("--std=c++17", "-std=c++17") for option in options),
        "-o", str(work / "kernels.so"), str(work / "kernels.cpp"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompilationError(done.stderr)


class LaunchError(RuntimeError):
    """As CuPy's CUDADriverError."""


class HostKernel:
    """One kernel; called like a CuPy kernel, with grid, block and arguments."""

    def __init__(self, module: HostModule, name: str) -> None:
        self.name = name
        self.module = module
        self.function = module.library[f"launch_{name}"]
        self.function.restype = ctypes.c_char_p
        size = module.library[f"size_of_argument_of_{name}"]
        self.sizes = [size(k) for k in range(module.library[f"arguments_of_{name}"]())]  # bytes of each argument
        body = module.code.partition(f" {name}(")[2].partition('extern "C"')[0]
        self.has_barriers = BARRIER.search(body) is not None
        self.max_dynamic_shared_size_bytes = UNASKED_SHARED

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *, shared_mem: int = 0
    ) -> None:
        """Run the kernel to its end."""
        self.module.launched.append(self.name)
        shape = (ctypes.c_uint * 6)(*(*grid, 1, 1)[:3], *(*block, 1, 1)[:3])
        if len(args) != len(self.sizes):
            raise TypeError(f"{self.name} takes {len(self.sizes)} arguments, got {len(args)}")
        if not all(shape) or shape[0] > 2**31 - 1 or max(shape[1:3]) > 65535 or shape[3] * shape[4] * shape[5] > 1024:
            raise ValueError(f"{self.name}: CUDA has no such grid {tuple(shape)}")
        if not 0 <= shared_mem <= min(self.max_dynamic_shared_size_bytes, MOST_SHARED):
            raise LaunchError(f"CUDA_ERROR_INVALID_VALUE: {self.name} with {shared_mem} bytes of shared memory")
        if self.module.cooperative and shape[0] * shape[1] * shape[2] > self.module.multiprocessors:
            if shape[1] == shape[2] == 1:
                raise RuntimeError(f"{self.name}: CuPy would take fewer blocks, with no more than a warning")
            raise ValueError(f"{self.name}: more blocks than can be resident")
        given = [self.module.value(a) for a in args]
        for k, (value, size) in enumerate(zip(given, self.sizes, strict=True)):
            if len(value) != size:  # CuPy and CUDA would read what lies there
                raise TypeError(f"argument {k} of {self.name} has {size} bytes, got {len(value)}")
        pointers = (ctypes.c_char_p * len(args))(*given)
        how = FIBERS if self.has_barriers or self.module.always_fibers else PLAIN
        how = TOGETHER if self.module.together else how
        seed, shared = ctypes.c_uint64(next(self.module.seeds)), ctypes.c_size_t(shared_mem)
        message = self.function(shape, pointers, seed, how, shared)
        if message is not None:
            raise RuntimeError(f"{self.name}: {message.decode()}")


class HostModule:
    """What ``cupy.RawModule`` is to CuPy; `value` turns an argument into the bytes that a kernel gets.

    Kernels without barriers run as plain loops unless `fibers` says otherwise.
    """

    def __init__(
        self,
        code: str,
        options: tuple[str, ...] = (),
        value: Any = bytes,
        *,
        seed: int = 0,
        fibers: bool = False,
        launched: list[str] | None = None,
        cooperative: bool = False,
        multiprocessors: int = 1024,
    ) -> None:
        self.code = code
        self.value = value
        self.launched = [] if launched is None else launched  # the name of each kernel, at each launch
        self.seeds = itertools.count(seed)
        self.always_fibers = fibers
        self.cooperative, self.multiprocessors = cooperative, multiprocessors
        self.together = cooperative or "-DCLUSTER" in options
        self.library = library(code, tuple(options))

    def get_function(self, name: str) -> HostKernel:
        return HostKernel(self, name)
