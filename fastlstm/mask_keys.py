"""The keys of dropout masks: no two calls use the same key."""

from __future__ import annotations

import itertools
from collections import deque

import numpy as np

__all__ = ["MaskKeys", "new_key"]


class MaskKeys:
    """Successive keys, each taken once; a key that is given back is taken next.

    Taking and giving back are one operation of the interpreter each, so no lock is needed: calls from other threads,
    from a signal handler or from a finaliser may run at any point. A call that is interrupted between two of these
    operations leaves a key unused.

    Parameters
    ----------
    first : int
        The first key.

    Examples
    --------
    >>> keys = MaskKeys(7)
    >>> keys.take(), keys.take(), keys.next
    (7, 8, 9)
    >>> keys.give_back(8)
    >>> keys.next, keys.take(), keys.take()
    (8, 8, 9)
    """

    def __init__(self, first: int) -> None:
        self._fresh = itertools.count(first)
        self._returned: deque[int] = deque()

    def take(self) -> int:
        """Take a key."""
        try:
            return self._returned.popleft()
        except IndexError:
            return next(self._fresh)

    def give_back(self, key: int) -> None:
        """Give back a key that was not used for a mask."""
        self._returned.appendleft(key)

    @property
    def next(self) -> int:
        """The key that is taken next, if no other call comes first."""
        key = self.take()
        self.give_back(key)
        return key


def new_key(rng: np.random.Generator) -> int:
    """Draw where the dropout masks of a new model start."""
    return int(rng.integers(2**63))
