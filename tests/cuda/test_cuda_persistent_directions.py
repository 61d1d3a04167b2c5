"""Both directions of a layer in one launch of a persistent kernel, run on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
from harness import Case, problem
from host_cuda import compiler
from persistent_run import EXCHANGES, FLOAT32, assert_agrees, forced, kernels, run
from tolerances import assert_identical

from fastlstm import dispatch
from fastlstm.backends.cuda import persistent
from fastlstm.functional import lstm_backward, lstm_forward

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")

# Case, and multiprocessors that hold one direction at once, but not both.
CASES = (
    (Case(5, 7, 3, 40, 2, True, lengths="zeros", peephole=True, resets=True), 1),
    (Case(4, 5, 3, 100, 1, True, bias=False), 3),
    (Case(3, 5, 3, 150, 1, True, lengths="positive", resets=True), 11),
    (Case(4, 3, 3, 30, 1, True, lengths=(0, 0, 0)), 1),
)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(("case", "few"), CASES, ids=str)
def test_both_at_once_give_the_bits_of_one_after_the_other(case, few, exchange):
    how = {"architecture": EXCHANGES[exchange], "keep_steps": True}
    one_by_one, after = run(case, multiprocessors=few, **how)
    at_once, once = run(case, **how)
    assert_identical(at_once, one_by_one)
    assert kernels(once) == ["persistent_forward"] * 2 * case.layers + ["persistent_backward"] * case.layers
    for name in ("persistent_forward", "persistent_backward"):
        assert kernels(after).count(name) >= 2 * kernels(once).count(name)


def test_any_schedule_of_both_directions_gives_the_same_bits():
    case = Case(5, 3, 3, 100, 1, True, lengths="zeros")
    truth, _ = run(case, architecture="80")
    for seed in (1000, 2000, 3000, 4000):
        for architecture in EXCHANGES.values():
            assert_identical(run(case, architecture=architecture, seed=seed)[0], truth)


@pytest.mark.slow
def test_both_directions_of_a_large_layer_are_those_of_the_reference():
    _, launched = assert_agrees(Case(3, 3, 3, 384, 1, True, lengths="zeros"), architecture="80")
    assert launched == ["persistent_forward"] * 2 + ["persistent_backward"]


@pytest.mark.parametrize("changed", ["fewer", "more"])
def test_backward_runs_on_a_device_that_holds_another_number_of_groups_than_forward(changed, monkeypatch):
    """The tape of both directions at once is read one by one, and the other way round."""
    case = Case(4, 5, 3, 40, 1, True, lengths="zeros", peephole=True)
    p = problem(case).astype(FLOAT32)
    truth, _ = run(case, architecture="80")
    with forced("persistent", architecture="80") as xp:
        device = dispatch.backend_named("cuda").device
        many = device.limits()
        few = many._replace(multiprocessors=1)
        begin, end = (many, few) if changed == "fewer" else (few, many)
        params = {name: xp.array(value) for name, value in p.params.items()}
        monkeypatch.setattr(device, "limits", lambda: begin)
        _, _, tape = lstm_forward(params, xp.array(p.x), tuple(map(xp.array, p.state)), p.lengths)
        monkeypatch.setattr(device, "limits", lambda: end)
        grads = lstm_backward(params, tape, xp.array(p.dy), tuple(map(xp.array, p.dstate)))
        found = {"dx": grads.x, "dh0": grads.state[0], **{f"d{name}": value for name, value in grads.params.items()}}
        found = {name: value.get() for name, value in found.items()}
    assert_identical(found, {name: truth[name] for name in found})


def test_what_is_refused_at_once_runs_one_after_the_other(monkeypatch):
    """The first call takes the step path: another launch might be refused as well."""
    case = Case(4, 3, 3, 40, 1, True, lengths="zeros")
    truth, _ = run(case, architecture="80")
    p = problem(case).astype(FLOAT32)
    with forced("persistent", architecture="80") as xp:
        device = dispatch.backend_named("cuda").device
        launch, blocks_seen = device.launch_resident, []

        def no_more_than_two_blocks(name, options, shared, cooperative, blocks, args):
            blocks_seen.append(blocks)
            if blocks > 2:
                raise persistent.RefusedLaunchError("busy")
            launch(name, options, shared, cooperative, blocks, args)

        monkeypatch.setattr(device, "launch_resident", no_more_than_two_blocks)
        params = {name: xp.array(value) for name, value in p.params.items()}
        x, state = xp.array(p.x), tuple(map(xp.array, p.state))
        lstm_forward(params, x, state, p.lengths)
        assert set(kernels(xp)) == {"step_forward"} and blocks_seen == [4]
        xp.pool.launched.clear()
        y, _, _ = lstm_forward(params, x, state, p.lengths)
        assert kernels(xp) == ["persistent_forward"] * 2 and blocks_seen == [4, 2, 2]
        np.testing.assert_array_equal(y.get(), truth["y"])
        assert persistent.choice_of(device, p.cell, len(p.x), 3).plan.directions == 1
