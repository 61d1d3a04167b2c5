"""The streams and events of the stand-in for CuPy: a log of what was put on each stream."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any


class CUDARuntimeError(RuntimeError):
    """As CuPy's."""


class Event:
    """As CuPy's, where all work is done at once."""

    def __init__(self, **_: bool) -> None:
        self.time = 0.0
        self.stream: int | None = None  # where it was recorded last

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or Stream.now()
        self.time, self.stream = time.perf_counter(), stream.ptr
        stream.note("record", self)

    def synchronize(self) -> None:
        pass


class Stream:
    """As CuPy's: current inside a ``with`` block, and a log of what was put on it. Work is done at once."""

    numbers = itertools.count(1)
    current = threading.local()

    def __init__(self, null: bool = False, non_blocking: bool = False, *, ptr: int | None = None) -> None:
        self.ptr = next(self.numbers) if ptr is None else ptr
        self.log: list[tuple[str, Any]] = []
        self.before: list[Stream] = []
        self.captures = False

    @classmethod
    def now(cls) -> Stream:
        found: Stream | None = getattr(cls.current, "stream", None)
        if found is None:
            found = cls.current.stream = Stream(ptr=0)
        return found

    def note(self, what: str, value: Any) -> None:
        if self.ptr:  # nothing reads the default stream's, which would grow for ever
            self.log.append((what, value))

    def __enter__(self) -> Stream:
        self.before.append(self.now())
        Stream.current.stream = self
        return self

    def __exit__(self, *_: object) -> None:
        Stream.current.stream = self.before.pop()

    def record(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.note("wait", event)

    def synchronize(self) -> None:
        self.note("synchronize", None)

    def begin_capture(self, mode: Any = None) -> None:
        if not self.ptr:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported: the default stream")
        self.captures = True

    def end_capture(self) -> list[tuple[str, Any]]:
        self.captures = False
        return self.log

    def is_capturing(self) -> bool:
        return self.captures


class Logged(list[str]):
    """Names of what was launched, which the current stream's log gets too."""

    def append(self, name: str) -> None:
        super().append(name)
        Stream.now().note("launch", name)
