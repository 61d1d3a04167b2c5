"""Known slips, put into the persistent kernels on purpose: comparing bits must notice each of them.

A right kernel gives the same bits whatever the schedule is, so a mutant is noticed by any difference from it, or by an
error: a barrier that not all threads reach, a write outside shared memory, a wait for a step that never comes. Slips in
the synchronisation show in some schedules only; four are tried.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_row
import numpy as np
import pytest
from harness import Case, model_of, problem
from host_cuda import FakeCupy, compiler
from host_cuda.build import folder

from fastlstm import dispatch
from fastlstm.functional import lstm_backward, lstm_forward
from fastlstm.kernels.cuda import loader

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")

# Two blocks a group; both directions, ragged, with a length of 0; several waves. Both directions at once, with resets.
# Eight blocks, for the exchange.
PLACES = Case(4, 21, 3, 100, 1, True, lengths="zeros", peephole=True)
BOTH = Case(4, 5, 3, 40, 1, True, lengths="zeros", peephole=True, resets=True)
EXCHANGE = Case(6, 4, 3, 256)
TRUNCATED = Case(4, 3, 3, 40, lengths="zeros", fields=(("truncated", True),))
WIDER = dataclasses.replace(BOTH, hidden=100)  # two blocks a group, which wait for each other
MULTIPROCESSORS = {
    PLACES: 4,
    BOTH: 8,
    TRUNCATED: 8,
    WIDER: 8,
    EXCHANGE: 8,
}  # a direction takes two waves; both take one; one group
SEEDS = (0, 1000, 2000, 3000)

# what slipped: (pattern, replacement), everywhere it stands
SLIPS_OF_PLACES = {
    "rows of another wave": (r"d\.row \+ \(number - half", "(number - half"),
    "steps of the last sequence": (r"lengths\[group\.row\] :", "lengths[d.batch - 1] :"),
    "packed rows taken for equal lengths": (r"offsets \? offsets\[step\] : ", ""),
    "reverse runs forwards": (r"return reverse \? length - 1 - step : step;", "return step;"),
    "y of the other direction": (r"\* d\.directions \+ d\.direction;", "* d.directions;"),
    "sequences not sorted back": (r"int\(sequence_of\(row, order\)\)", "int(row)"),
    "a step too many": (r"if \(step < items\[n\]\.length\) \{", "if (step <= items[n].length) {"),
    "weights of another gate": (r"weight \+ \(\(j % GATES\)", "weight + ((j + 1) % GATES"),
    "columns of a vector in another order": (r"lane % SPLIT\) \* 4 \+ k % 4", "lane % SPLIT) * 4 + (k + 1) % 4"),
    "bias of the first unit": (r"bias\[gate \* d\.hidden \+ unit\]", "bias[gate * d.hidden]"),
    "unit weights of another gate": (r"= unit_weights\[n \* d\.hidden", "= unit_weights[(n + 1) % 3 * d.hidden"),
    "two warps' shares left out": (r"k < WARPS; \+\+k\) \{", "k < WARPS - 2; ++k) {"),
    "one warp's share left out, backward": (r"\? 1 : WARPS\); \+\+k\) dh", "? 1 : WARPS - 1); ++k) dh"),
    "dh through the padding": (r"turn && step \+ 1 < item\.length", "turn"),
    "c of the step before": (r"if \(step \+ 1 == item\.length\) c\[n\]", "if (false) c[n]"),
    "h of this step on the tape": (r"h_rows\[\(next \+ item\.row\)", "h_rows[(first + item.row)"),
    "the initial h not on the tape": (r"if \(h_rows && item\.length\)", "if (false)"),
    "rows of dp overlap": (r"\(group\.half \* d\.batch \+ items\[n\]\.row\) \* UNIT_WEIGHTS", "items[n].row"),
    "dy not added": (r"dh\[n\] \+= dy_t\[n\]", "dh[n] += 0"),
}  # fmt: skip
SLIPS_OF_RESETS = {
    "a reset forgets no c": (r"if \(reset\[n\]\) c\[n\] = 0;", ""),
    "a reset forgets no h": (r"const real handed = reset\[n\] \? real\(0\) : h", "const real handed = h"),
    "a reset forgets no initial h": (r"  handed = reset\[n\] \? real\(0\) : h", "  handed = h"),
    "h on the tape in spite of a reset": (r"unit\] = reset\[n\] \? real\(0\) : h", "unit] = h"),
    "the reset of the first step at each": (r"reset\[n\] = reset_next\[n\];", ""),
    "resets of another time": (r"resets\[time_of\(step, item\.length, d\.reverse\)", "resets[step"),
    "resets of another sequence": (r"d\.batch \+ item\.sequence\];", "d.batch + item.row];"),
    "dh through a reset": (r"if \(reset >> n & 1\) dh\[n\] = 0;", ""),
    "dc through a reset": (r"if \(forgotten\) dc\[n\] = 0;", ""),
    "c before a reset": (r"forgotten \? real\(0\) : c_prev\[n\];", "c_prev[n];"),
    "resets of the step before, backward": (r"reset = reset_now;", ""),
    "c after a reset": (r"c\[n\] = c_prev\[n\];\n", "c[n] = c_seen;\n"),
    "the reset of another step, backward": (r"reset_before\(resets, item, step, d\)",
                                            "reset_before(resets, item, step + 1, d)"),
    "gradients by states of another time": (r"\(time_of\(step, item\.length, d\.reverse\) \* d\.directions \+",
                                            "(step * d.directions +"),
    "gradients by states of one direction": (r"directions \+ d\.direction\) \* d\.batch", "directions) * d.batch"),
    "gradients by states not sorted back": (r"\* d\.batch \+ item\.sequence;\n\}\n\n// Its row",
                                            "* d.batch + item.row;\n}\n\n// Its row"),
    "dh by step without dy": (r"dh_steps\[at\] = dh\[n\]", "dh_steps[at] = dh[n] - dy_t[n]"),
    "dc of the step before": (r"dc_steps\[at\] = dc_t\[n\]", "dc_steps[at] = dc[n]"),
}  # fmt: skip
SLIPS_OF_TRUNCATION = {
    "dh of the step after": (r"dh\[n\] = TRUNCATES \? real\(0\) : share\[0\]", "dh[n] += 0"),
    "sums that no thread has written": (r"TRUNCATES \? 1 : WARPS", "WARPS"),
    "a product backward": (r"constexpr bool TRUNCATES = true", "constexpr bool TRUNCATES = false"),
}  # fmt: skip
SLIPS_OF_DIRECTIONS = {
    "weights of the first direction": (r"weight = weight_2, ", ""),
    "bias of the first direction": (r"bias = bias_2, ", ""),
    "unit weights of the first direction": (r"unit_weights = unit_weights_2;", "(void)0;"),
    "output of the first direction": (r"d\.direction \+= group\.half, ", ""),
    "time of the first direction": (r"d\.reverse \|= group\.half", "(void)0"),
    "all groups work on the first direction": (r"half = number / d\.groups", "half = 0"),
    "sequences counted on": (r"\(number - half \* d\.groups\) \* ROWS", "number * ROWS"),
    "rows of the first direction": (r"group\.half \* d\.rows \+ \(offsets", "(offsets"),
    "states of the first direction": (r"return group\.half \* d\.batch \+ item\.sequence", "return item.sequence"),
    "initial c of the first direction": (r"return group\.half \* \(d\.batch \+ d\.rows\)", "return 0"),
    "tape of c of the first direction": (r"\(group\.half \+ 1\) \* d\.batch \+ row", "d.batch + row"),
    "rows of dp of the first direction": (r"\(group\.half \* d\.batch \+ items\[n\]\.row\)", "(items[n].row)"),
    "scratch of the first direction": (r"vectors \+ number \*", "vectors + (number - half * d.groups) *"),
    "flags of the first direction": (r"flags \+ number \*", "flags + (number - half * d.groups) *"),
}  # fmt: skip
FLAG_SLIPS = {
    "a place beyond the group": (r"if \(place_of\(n\) < ROWS\) publish", "publish"),
    "one buffer": (r"\(step % 2\) \* ROWS \* P::INNER", "0"),
    "flag before the block is done": (r"__syncthreads\(\);  // all of the block's", "// all of the block's"),
    "wait for one flag less": (r"block <= last", "block < last"),
    "wait for the step before": (r"word_t\(step \+ 1\)\);\n    fetch", "word_t(step));\n    fetch"),
    "wait for a step that never comes": (r"word_t\(step \+ 1\)\);\n    fetch", "word_t(step + 2));\n    fetch"),
    "cell before all products": (r"product<P>\(w, group, stage, sums, step\);\n        __syncthreads\(\);",
                                 "product<P>(w, group, stage, sums, step);"),
    "product of a tile that is not there": (r"settle<P>\(next, tile, lane\);\n        __syncwarp\(\);",
                                            "settle<P>(next, tile, lane);"),
    "data before the flag is seen": (r"SPIN\(tries\);\n    \}\n    __syncwarp\(\);", "SPIN(tries);\n    }"),
    "slices of the other pass": (r"P::INNER == SIZE \? WARPS : WARPS / GATES", "WARPS"),
}  # fmt: skip
CLUSTER_SLIPS = {
    "one buffer": (r"\(step % 2\) \* ROWS \* P::INNER", "0"),
    "writes to a block that has not begun": (r"cluster_arrive\(\);  // a block that.*\n    cluster_wait\(\);", ""),
    "no wait for the others": (r"wait_for_group\(\) \{\n#ifdef CLUSTER\n    cluster_wait\(\);",
                               "wait_for_group() {\n#ifdef CLUSTER\n"),
    "ends while others write": (r"wait_for_group\(\);  // no block may end", "// no block may end"),
}  # fmt: skip


def results(case, architecture, seed, change=None):
    """Bits of a forward and backward pass."""
    p = problem(case).astype(np.float32)
    how = {"architecture": architecture, "seed": seed, "change": change, "options": ("-O1",)}
    with cuda_row.installed(FakeCupy(**how, multiprocessors=MULTIPROCESSORS[case])) as xp:
        params = {name: xp.array(value) for name, value in p.params.items()}
        resets = None if p.resets is None else xp.array(p.resets)
        state = tuple(map(xp.array, p.state))
        y, last, tape = lstm_forward(params, xp.array(p.x), state, p.lengths, **model_of(p), resets=resets)
        dstate = tuple(map(xp.array, p.dstate))
        grads = lstm_backward(params, tape, xp.array(p.dy), dstate, keep_state_gradients=case.resets)
        assert not dispatch.backend_named("cuda").device.refusals
        assert xp.pool.launched.count("persistent_forward") == (2 * 2 if case == PLACES else 1)
    arrays = (y, *last, grads.x, *grads.state, *grads.params.values(), *(grads.steps or ()))
    return b"".join(array.get().tobytes() for array in arrays)


def hash_in_its_own_process(case, architecture, seed, slip=None):
    """Return the hash of the bits, or what went wrong: a mutant may write where the process has no memory."""
    folder()  # made here, so that a mutant is compiled once for all seeds
    given = repr((case, architecture, seed, slip))
    environment = os.environ | {"FASTLSTM_TEST_SPIN_SECONDS": "10", "FASTLSTM_CUDA_RECURRENCE": "persistent"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, __file__, given]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        return "no end"
    return done.stdout if done.returncode == 0 else f"status {done.returncode}: {done.stderr[-300:]}"


def main(given):
    """Print the hash of a mutant's bits."""
    case, architecture, seed, slip = eval(given)

    def change(code):
        if slip is None or code != loader.persistent_source():
            return code
        changed, count = re.subn(slip[0], lambda _: slip[1], code)
        assert count
        return changed

    sys.stdout.write(hashlib.sha256(results(case, architecture, seed, change)).hexdigest())


@functools.cache
def truth(case, architecture):
    found = hash_in_its_own_process(case, architecture, 0)
    assert re.fullmatch(r"\w{64}", found), found
    return found


def noticed(case, architecture, slip):
    assert re.search(slip[0], loader.persistent_source()), f"{slip[0]!r} is not there"
    expected = truth(case, architecture)
    return any(hash_in_its_own_process(case, architecture, seed, slip) != expected for seed in SEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("slip", SLIPS_OF_PLACES)
def test_a_slip_in_what_stands_where_is_noticed(slip):
    assert noticed(PLACES, "80", SLIPS_OF_PLACES[slip])


@pytest.mark.slow
@pytest.mark.parametrize("slip", SLIPS_OF_RESETS)
def test_a_slip_in_resets_and_gradients_by_states_is_noticed(slip):
    assert noticed(BOTH, "80", SLIPS_OF_RESETS[slip])


@pytest.mark.slow
@pytest.mark.parametrize("slip", SLIPS_OF_TRUNCATION)
def test_a_slip_in_a_truncated_gradient_is_noticed(slip):
    assert noticed(TRUNCATED, "80", SLIPS_OF_TRUNCATION[slip])


@pytest.mark.slow
@pytest.mark.parametrize("slip", SLIPS_OF_DIRECTIONS)
def test_a_slip_in_what_belongs_to_which_direction_is_noticed(slip):
    case = WIDER if slip.startswith("flags") else BOTH
    assert noticed(case, "80", SLIPS_OF_DIRECTIONS[slip])


@pytest.mark.parametrize("slip", FLAG_SLIPS)
def test_a_slip_in_the_exchange_by_flags_is_noticed(slip):
    assert noticed(EXCHANGE, "80", FLAG_SLIPS[slip])


@pytest.mark.parametrize("slip", CLUSTER_SLIPS)
def test_a_slip_in_the_exchange_of_a_cluster_is_noticed(slip):
    assert noticed(EXCHANGE, "90", CLUSTER_SLIPS[slip])


@pytest.mark.parametrize(
    ("case", "architecture"),
    [*(pytest.param(c, "80", marks=pytest.mark.slow) for c in (PLACES, BOTH)), (EXCHANGE, "80"), (EXCHANGE, "90")],
    ids=str,
)
def test_the_unchanged_kernels_pass(case, architecture):
    assert not noticed(case, architecture, ("typedef", "typedef"))


if __name__ == "__main__":
    main(sys.argv[1])
