"""NVRTC, NVIDIA's runtime compiler, from its pip wheel: needs neither a GPU nor a driver."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any, NamedTuple

# What CuPy adds to the options that it is given (cupy/cuda/compiler.py), besides folders of headers.
OPTIONS_OF_CUPY = ("-ftz=true", "--device-as-default-execution-space")

# Variants to compile: each macro, and those with the most work at once.
_ALL = ("GATE_ACTIVATION=HardSigmoid", "CANDIDATE_ACTIVATION=Softsign", "OUTPUT_ACTIVATION=Relu", "CLIP=0.5",
        "CELL_CLIP=0.25")  # fmt: skip
VARIANTS: list[tuple[str, ...]] = [
    (), ("RESETS",), ("PEEPHOLE",), ("PEEPHOLE", *_ALL, "RESETS"), ("PEEPHOLE", "COUPLED", *_ALL),
    ("NO_FORGET_GATE", "CANDIDATE_ACTIVATION=Candidate1997", "OUTPUT_ACTIVATION=Output1997"),
    ("GATE_ACTIVATION=Identity", "CLIP=1e-05"),
]  # fmt: skip


class Resources(NamedTuple):
    """What a kernel takes of a multiprocessor."""

    registers: int  # of a thread
    stack: int  # bytes of a thread: spilled registers, and arrays that did not fit into registers
    spills: int  # bytes of a thread, stored and loaded
    shared: int  # bytes of a block


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library of the wheel ``nvidia-cuda-nvrtc``, or None."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(path) for path in (spec.submodule_search_locations or [])] if spec else []
    found = sorted(path for folder in folders for path in folder.glob("*/lib/libnvrtc.so.*"))
    return ctypes.CDLL(str(found[-1])) if found else None


def compile_source(source: str, options: tuple[str, ...], form: str = "CUBIN") -> tuple[bytes, str]:
    """Compile to a cubin, or to PTX; the result and the compiler's messages. Raises RuntimeError with these."""
    nvrtc, program = library(), ctypes.c_void_p()
    assert nvrtc is not None
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = nvrtc.nvrtcCompileProgram(program, len(options), given)
        log = _fetch(nvrtc, program, "ProgramLog").rstrip(b"\0").decode()
        if failed:
            raise RuntimeError(log)
        return _fetch(nvrtc, program, form), log
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _fetch(nvrtc: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    assert nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size)) == 0
    text = ctypes.create_string_buffer(size.value)
    assert nvrtc[f"nvrtcGet{what}"](program, text) == 0
    return text.raw


def resources(log: str) -> dict[str, Resources]:
    """Read what each kernel takes off the messages of ``--ptxas-options=-v``."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]
        stack, *spilled = (int(number) for number in re.findall(r"(\d+) bytes (?:stack|spill)", part)[:3])
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert registers is not None and len(spilled) == 2, part
        found[name] = Resources(int(registers[1]), stack, sum(spilled), int(shared[1]) if shared else 0)
    return found
