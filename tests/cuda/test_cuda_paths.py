"""What decides how a call runs on the CUDA backend, what `plan` says of it, and what it costs in launches."""

from __future__ import annotations

import cuda_row
import numpy as np
import pytest
from host_cuda import FakeCupy, compiler
from variants import EXAMPLES

from fastlstm import LSTM
from fastlstm.backends.cuda import plans
from fastlstm.kernels.cuda import loader

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")


@pytest.fixture
def xp(monkeypatch):
    """A new stand-in for CuPy that has persistent kernels."""
    monkeypatch.setattr(plans, "FORCED", None)
    with cuda_row.installed(FakeCupy(architecture="80", multiprocessors=132)) as library:
        yield library


def array(xp, *shape):
    return xp.array(np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32))


def launches(xp, call):
    """Return what a call launches: kernels and products, then array operations."""
    xp.pool.launched.clear(), xp.pool.own.clear()
    call()
    return list(xp.pool.launched), list(xp.pool.own)


def test_recurrent_dropout_costs_nothing_in_inference(xp):
    x, found = array(xp, 6, 3, 4), []
    for probability in (0.4, 0.0):
        lstm = LSTM(4, 20, 2, recurrent_dropout=probability, seed=0).to(xp)
        found.append([launches(xp, lambda lstm=lstm: lstm(x)), launches(xp, lambda lstm=lstm: lstm.step(x[0]))])
    assert found[0] == found[1]
    assert found[0][0][0] == ["product", "persistent_forward"] * 2
    assert found[0][1][0] == ["single_step"] * 2


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        *(({name: EXAMPLES[name]}, name) for name in ("proj_size", "layer_norm")),
        ({"zoneout": (0.3, 0.2), "recurrent_dropout": 0.3}, "zoneout"),
        ({"peephole": True, "block_size": 2}, "peephole with block_size"),
        ({"proj_size": 2, "layer_norm": True}, "proj_size, layer_norm"),
    ],
    ids=str,
)
def test_a_plan_names_the_fields_that_keep_a_model_from_the_kernels(xp, fields, named):
    said = LSTM(4, 6, 2, **fields).to(xp).plan(array(xp, 6, 3, 4)).splitlines()[1:]
    assert said == [f"layer {n}: array operations step after step, for {named}" for n in (0, 1)]


def test_a_plan_tells_training_from_inference_where_these_differ(xp):
    said = LSTM(4, 20, recurrent_dropout=0.3).to(xp).plan(array(xp, 6, 3, 4))
    assert "layer 0: one launch a sequence: " in said
    assert said.endswith("; in training, array operations step after step, for recurrent_dropout")


def test_a_plan_of_a_call_with_nothing_to_do_says_so(xp):
    lstm = LSTM(4, 20).to(xp)
    assert lstm.plan(array(xp, 6, 0, 4)).endswith("layer 0: nothing to launch: the batch is empty")
    assert lstm.plan(array(xp, 0, 3, 4)).endswith("layer 0: nothing to launch: there is no time step")
    assert lstm.plan(array(xp, 6, 3, 4), [0, 0, 0]).endswith("layer 0: nothing to launch: there is no time step")


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [[6, 1, 1, 1], [6, 0, 0, 0], [2, 1, 0, 1], [6, 6, 6, 6]], ids=str)
def test_a_sequence_is_the_same_alone_and_beside_shorter_ones(xp, lengths, bidirectional):
    """The number of time steps decides the path, and not the mean length."""
    lstm = LSTM(4, 20, bidirectional=bidirectional, seed=0).to(xp)
    x = array(xp, 6, 4, 4)
    many, state = lstm(x, lengths=lengths)
    for row, length in enumerate(lengths):
        alone, of_one = lstm(x[:, row : row + 1], lengths=[length])
        np.testing.assert_array_equal(alone.get()[:, 0], many.get()[:, row])
        for one, all_of_them in zip(of_one, state, strict=True):
            np.testing.assert_array_equal(one.get()[:, 0], all_of_them.get()[:, row])
    assert "one launch a sequence" in lstm.plan(x, lengths)


@pytest.mark.parametrize("refused", ["RESETS", "PEEPHOLE"])
def test_a_plan_tells_a_refused_kernel_with_resets(monkeypatch, refused):
    """The kernel that reads resets is another one: it alone may be refused, or be left when the other one is."""
    monkeypatch.setattr(plans, "FORCED", None)

    def change(code):
        without = "" if refused == "RESETS" else "#ifndef RESETS\n"
        return without + f"#ifdef {refused}\noh no\n#endif\n" + without.replace("ifndef RESETS", "endif") + code

    with cuda_row.installed(FakeCupy(architecture="80", multiprocessors=132, change=change_persistent(change))) as xp:
        lstm, x = LSTM(4, 20, peephole=True, seed=0).to(xp), array(xp, 6, 3, 4)
        given = xp.array(np.zeros((6, 3), bool)) if refused == "RESETS" else None
        before = lstm.plan(x)
        assert "one launch a sequence" in before and "with resets" not in before
        lstm(x, resets=given)
        said = lstm.plan(x)
    one, steps = "one launch a sequence: groups", "a product and a kernel each step: a persistent kernel was refused ("
    first, second = (one, steps) if refused == "RESETS" else (steps, one)
    assert f"layer 0: {first}" in said and f"; with resets, {second}" in said


def change_persistent(change):
    """Return what changes the persistent kernels alone."""
    return lambda code: change(code) if code == loader.persistent_source() else code
