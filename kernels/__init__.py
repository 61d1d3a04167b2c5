"""The kernels: ``cpu`` for Numba, ``cuda`` for CuPy. They ship inside the wheel as ``fastlstm.kernels``."""
