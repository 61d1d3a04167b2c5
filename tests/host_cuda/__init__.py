"""A machine without a GPU, made to look like one: the kernels compiled for the CPU, and a CuPy over NumPy's memory."""

from host_cuda.build import CompilationError, HostModule, compiler
from host_cuda.fake_cupy import FakeCupy

__all__ = ["CompilationError", "FakeCupy", "HostModule", "compiler"]
