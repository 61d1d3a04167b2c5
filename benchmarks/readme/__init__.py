"""The README's section of figures, made of results: ``kernels`` and ``beyond`` them, of ``cells``, with ``reasons``."""
