"""The kernels of the CPU backend, compiled by Numba.

From the bottom: ``jit`` (compiling), ``vector`` and ``vector_arithmetic`` (SIMD), ``activations``, ``gemm_microkernel``
and ``gemv`` (products), ``weight_packing``, ``cell_step`` (the equations), ``thread_team``; then the drivers
``sequence_forward``, ``sequence_backward`` and ``small_batch``.
"""
