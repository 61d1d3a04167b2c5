"""The persistent CUDA kernels on stand-ins for CuPy of two architectures: what their tests share.

From compute capability 9.0 on, groups of 2 to 8 blocks are clusters; before that all groups exchange through flags. The
path is forced, so that a case that falls back to the step path is an error.
"""

from __future__ import annotations

import contextlib

import cuda_row
import numpy as np
from harness import REFERENCE, model_of, problem
from host_cuda import FakeCupy
from tolerances import assert_close, assert_identical

from fastlstm import functional
from fastlstm.backends.cuda import plans
from fastlstm.calls import cell_of
from fastlstm.functional import lstm_backward, lstm_forward

EXCHANGES = {"flags": "80", "cluster": "90"}
FLOAT32 = np.dtype(np.float32)


@contextlib.contextmanager
def forced(path, **how):
    """Put a stand-in in place of CuPy, and force a path."""
    before = plans.FORCED
    plans.FORCED = path
    try:
        library = FakeCupy(**{"multiprocessors": 132} | how)
        with cuda_row.installed(library):
            yield library
    finally:
        plans.FORCED = before


def run(case, path="persistent", change=None, keep_steps=False, **how):
    """Solve a case in float32 on a path; all results, and the library with its log."""
    p = problem(case).astype(np.float32)
    if change is not None:
        change(p)
    with forced(path, **how) as xp:
        return found_by(p, xp.array, keep_steps, lambda value: value.get()), xp


def expected(case, change=None, keep_steps=False):
    """Solve the same case on the reference, in float64."""
    p = problem(case)
    if change is not None:
        change(p)
    with REFERENCE.active():
        return found_by(p, np.asarray, keep_steps)


def found_by(p, to, keep_steps=False, host=np.asarray, compare=True):
    """A forward pass, inference and a backward pass: all results by name; both kinds of forward are bit-identical.

    Without `compare` they may take two paths, and the results of inference have names of their own.
    """
    params = {name: to(value) for name, value in p.params.items()}
    state, resets = p.state and tuple(map(to, p.state)), None if p.resets is None else to(p.resets)
    model = model_of(p)
    y, (h_n, c_n), tape = lstm_forward(params, to(p.x), state, p.lengths, **model, resets=resets)
    y_alone, state_alone, _ = functional.run(
        model.get("cell") or cell_of(params, 0.0), params, to(p.x), state, p.lengths, batch_first=False, dropout=None,
        keep_tape=False, resets=resets,
    )  # fmt: skip
    grads = lstm_backward(params, tape, to(p.dy), tuple(map(to, p.dstate)), keep_state_gradients=keep_steps)
    found = {"y": y, "h_n": h_n, "c_n": c_n, "dx": grads.x, "dh0": grads.state[0], "dc0": grads.state[1]}
    found |= {f"d{name}": value for name, value in grads.params.items()}
    if keep_steps:
        found |= {"dh by step": grads.steps.h, "dc by step": grads.steps.c}
    found = {name: host(value) for name, value in found.items()}
    alone = dict(zip(("y", "h_n", "c_n"), map(host, (y_alone, *state_alone)), strict=True))
    if not compare:
        return found | {f"{name} alone": value for name, value in alone.items()}
    assert_identical(alone, {name: found[name] for name in alone})
    return found


def assert_agrees(case, change=None, keep_steps=False, **how):
    """Compare a persistent run with the reference, and return its results and its recurrences' launches."""
    found, xp = run(case, change=change, keep_steps=keep_steps, **how)
    assert_close("agreement", found, expected(case, change, keep_steps), backend="cuda", dtype=FLOAT32)
    launched = kernels(xp)
    assert set(launched) == {"persistent_forward", "persistent_backward"}
    assert not {"gather_rows", "scatter_rows"} & set(xp.pool.launched)
    return found, launched


def kernels(xp):
    """The recurrences among the launches."""
    return [name for name in xp.pool.launched if name.startswith(("persistent", "step"))]
