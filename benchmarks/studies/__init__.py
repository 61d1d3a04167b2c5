"""The studies of ``benchmarks/study.py``, one module each.

A module has ``ABOUT``, what it measures in words; ``SIDES``, whom it compares; and ``measure(threads, seconds)``, which
gives one :class:`~studies.record.Case` after the other.
"""

NAMES = (
    "vowels", "loop", "ragged", "hydrology", "memory", "recompute", "freeze", "roofs", "start", "threads", "growth",
)  # fmt: skip
