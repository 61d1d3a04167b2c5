"""The CUDA kernels, ``*.cu``, and ``loader.py``, which makes one source of them. The twins are in ``kernels/cpu``."""
