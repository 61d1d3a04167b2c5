"""An interrupt at any bytecode of saving or loading leaves no temporary file and no descriptor, and a whole file."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import subprocess
import sys
import textwrap
import warnings

import pytest

from fastlstm import LSTM, cell, errors, files, lstm, storage

TRACED = {module.__file__ for module in (cell, errors, files, lstm, storage)}
needs_descriptors = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the test reads /proc/self/fd")


class Interrupt(BaseException):
    """What Ctrl-C raises is no Exception."""


class Timeout(TimeoutError):
    """What a signal handler raises may be an OSError, and must not be taken for one of the system's."""


class InterruptAt:
    """Raise an error at the n-th line or bytecode of saving or loading."""

    def __init__(self, number: int, events: str, error: type[BaseException]) -> None:
        self.number, self.events, self.error, self.seen, self.where = number, events, error, 0, None

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename not in TRACED:
            return None
        frame.f_trace_opcodes = self.events == "opcode"
        return self.local

    def local(self, frame, event, argument):
        if event == self.events:
            self.seen += 1
            if self.seen > self.number:
                self.where = f"{frame.f_code.co_name}:{frame.f_lineno} at bytecode {frame.f_lasti}"
                raise self.error
        return self.local


@contextlib.contextmanager
def tracing(tracer):
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        yield
    finally:
        sys.settrace(before)


def descriptors() -> set[str]:
    """List the files and folders that this process has open, but for the folder that is read to find out.

    Sockets and events are left out: saving opens none, and threads that other tests left behind may at any time.
    """
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            target = os.readlink(f"/proc/self/fd/{name}")
            if not target.startswith(("socket:", "anon_inode:", "pipe:")):
                found.add(f"{name} -> {target}")
    return found


def interrupt_everywhere(action, check, events, error=Interrupt):
    """Do `action` with an error at each event in turn, and `check` after each; return the number of interrupts.

    The traceback is alive during the check: what is closed only with the frames that it holds counts as open.
    """
    gc.collect()
    open_before, number = descriptors(), 0
    while True:
        tracer = InterruptAt(number, events, error)
        try:
            with tracing(tracer):
                action()
        except error:
            check(tracer.where)
            assert descriptors() == open_before, f"a descriptor was left open by an interrupt in {tracer.where}"
        else:
            assert tracer.where is None, f"an interrupt in {tracer.where} was swallowed"
            return number
        number += 1


@needs_descriptors
@pytest.mark.parametrize("before", ["old file", "no file"])
@pytest.mark.parametrize("error", [Interrupt, Timeout])
@pytest.mark.parametrize("events", ["line", "opcode"])
def test_save_interrupted_anywhere_leaves_nothing_behind(tmp_path, monkeypatch, events, error, before):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # thousands of saves, and no test of the disk
    old, new = LSTM(2, 1, seed=0), LSTM(2, 1, seed=1)
    path, expected = tmp_path / "model", []
    for model in (old, new):
        model.save(path)
        expected.append(path.read_bytes())
    found = set()

    def restore():
        if before == "old file":
            path.write_bytes(expected[0])
        else:
            path.unlink(missing_ok=True)

    def check(where):
        names = os.listdir(tmp_path)
        assert names in (["model"], []), f"a temporary file was left behind by an interrupt in {where}"
        data = path.read_bytes() if names else None
        assert data in (expected if before == "old file" else [None, expected[1]]), where
        found.add(data)
        restore()

    restore()
    count = interrupt_everywhere(lambda: new.save(path), check, events, error)
    assert count > 100
    assert len(found) == 2, "some interrupts came before the renaming, and some after it"
    assert path.read_bytes() == expected[1]


@needs_descriptors
@pytest.mark.parametrize("error", [Interrupt, Timeout])
@pytest.mark.parametrize("events", ["line", "opcode"])
def test_load_interrupted_anywhere_leaves_nothing_open(tmp_path, events, error):
    LSTM(2, 1, seed=0).save(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a ResourceWarning would say that a file was closed by chance
        assert interrupt_everywhere(lambda: LSTM.load(tmp_path / "model"), lambda where: None, events, error) > 100


SIGNALLED = """
    import os, signal, sys
    from fastlstm import LSTM

    class Alarm(Exception):
        pass

    def ring(number, frame):
        raise Alarm

    signal.signal(signal.SIGALRM, ring)
    folder, count, done = sys.argv[1], int(sys.argv[2]), 0
    lstm = LSTM(64, 128, seed=0)
    path = os.path.join(folder, "model")
    lstm.save(path)
    before = len(os.listdir("/proc/self/fd"))
    for k in range(count):
        try:
            signal.setitimer(signal.ITIMER_REAL, 1e-6 + 3e-3 * k / count)
            while True:
                lstm.save(path)
                LSTM.load(path)
        except Alarm:
            done += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert os.listdir(folder) == ["model"], os.listdir(folder)
        assert len(os.listdir("/proc/self/fd")) == before
        LSTM.load(path)
    print(done)
"""


@needs_descriptors
def test_real_signals_leave_nothing_behind(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SIGNALLED), str(tmp_path), "300"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == 300


@needs_descriptors
@pytest.mark.parametrize("error", [Interrupt, Timeout])
@pytest.mark.parametrize("events", ["line", "opcode"])
def test_an_interrupt_of_the_clean_up_itself_leaves_nothing_behind(tmp_path, monkeypatch, events, error):
    """A full disk, and Ctrl-C while the temporary file is closed and removed."""

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    model = LSTM(2, 1, seed=0)

    def save():
        with pytest.raises(OSError) as caught:
            model.save(tmp_path / "model")
        if caught.value.errno != errno.ENOSPC:  # the interrupt, where that is a TimeoutError
            raise caught.value

    def check(where):
        assert os.listdir(tmp_path) == [], f"a temporary file was left behind by an interrupt in {where}"

    assert interrupt_everywhere(save, check, events, error) > 100
    check("nothing")
