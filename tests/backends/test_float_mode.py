"""The floating-point mode of a caller is that of its workers."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest
from harness import BackendUnderTest

import fastlstm
from fastlstm import LSTM, use_backend
from fastlstm.kernels.cpu import atomics
from fastlstm.kernels.cpu.atomics import float_mode, set_float_mode
from fastlstm.kernels.cpu.jit import kernel


@pytest.fixture(autouse=True)
def two_threads():
    """Allow two threads, whatever the number of cores; and as before in the end."""
    fastlstm.set_num_threads(2)
    yield
    fastlstm.set_num_threads(None)


def train(lstm, x):
    """Return the bits of a training call's results."""
    with use_backend("cpu"):
        y, _, tape = lstm.forward(x)
        return np.concatenate([y.ravel(), lstm.backward(tape, y).x.ravel()]).tobytes()


@kernel
def mode_of_this_thread():
    return float_mode()


@kernel
def set_mode_of_this_thread(mode):
    set_float_mode(mode)


FLUSH, TOWARDS_ZERO = 0x8040, 0x6000  # bits of MXCSR


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the bits are those of x86-64")
@pytest.mark.parametrize("bits", [FLUSH, TOWARDS_ZERO], ids=["flush", "round towards zero"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_workers_take_the_floating_point_mode_of_their_caller(bits, bidirectional):
    if missing := BackendUnderTest("cpu").missing:
        pytest.skip(str(missing))
    lstm = LSTM(16, 64, bidirectional=bidirectional, seed=0)
    x = np.random.default_rng(0).normal(size=(40, 16, 16) if bidirectional else (40, 64, 16)).astype(np.float32)
    for name, value in lstm.params.items():
        if name.startswith("weight_ih") and bits == FLUSH:
            value[...] = value * np.float32(2e-39)  # so that all of the results are denormal
        if name.startswith("bias"):
            value[...] = 0
    usual, found = mode_of_this_thread(), {}
    for mode in (usual, usual | bits, usual):
        for threads in (1, 2, 3):
            fastlstm.set_num_threads(threads)
            set_mode_of_this_thread(mode)
            try:
                flushes = not np.float32(1e-39) * np.array([1], np.float32)
                bytes_of_calls = {train(lstm, x) for _ in range(4)}
            finally:
                set_mode_of_this_thread(usual)
            assert flushes == (mode == usual | FLUSH)
            found.setdefault(mode, set()).update(bytes_of_calls)
    assert [len(results) for results in found.values()] == [1, 1], "the bits do not depend on the number of threads"
    assert found[usual] != found[usual | bits], "but on the mode"


def test_the_floating_point_mode_is_known_to_llvm_on_arm64_too():
    """Which the processor here need not be: LLVM compiles for it."""
    binding = pytest.importorskip("llvmlite.binding")
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    try:
        target = binding.Target.from_triple("aarch64-unknown-linux-gnu")
    except RuntimeError as error:
        pytest.skip(str(error))
    names = "llvm.aarch64.get.fpcr", "llvm.aarch64.set.fpcr"
    source = Path(atomics.__file__).read_text(encoding="utf-8")
    assert all(name in source for name in names)
    module = binding.parse_assembly(
        f"declare i64 @{names[0]}() declare void @{names[1]}(i64)"
        f" define void @same() {{ %mode = call i64 @{names[0]}() call void @{names[1]}(i64 %mode) ret void }}"
    )
    code = target.create_target_machine().emit_assembly(module).lower()
    assert "mrs" in code and "msr" in code and code.count("fpcr") == 2
