"""Known slips, put into the array operations of cells with phases on purpose: comparing results must notice each."""

from __future__ import annotations

import inspect

import cuda_row
import numpy as np
import pytest
from harness import DROPOUT_SEED, REFERENCE, Case, model_of, problem, solve
from host_cuda import FakeCupy, compiler
from tolerances import BOUNDS, normalised_error

from fastlstm.backends.cuda import backend, phased, phased_cell
from fastlstm.functional import lstm_backward, lstm_forward

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")


def case(**fields):
    return Case(4, 3, 2, 6, 2, "reverse" not in fields, lengths="zeros", resets=True, fields=tuple(fields.items()))


NORM = case(layer_norm=True, peephole=True, clip=0.5)
PROJECTION = case(proj_size=3, peephole=True, cell_clip=0.3, merge="product")
SHARED = case(peephole=True, block_size=2)
BLOCKS = case(proj_size=2, block_size=2, coupled=True, clip=0.4)
PAPER = case(proj_size=2, block_size=3, forget_gate=False, truncated=True, activations=("sigmoid", "1997", "1997"))
RANDOM = case(recurrent_dropout=0.3, zoneout=(0.2, 0.4))
RNN = case(nonlinearity="relu")
ODD, SOFT = (
    case(proj_size=3, activations=("hard_sigmoid", "relu", "identity")),
    case(proj_size=3, activations=("softsign", "softsign", "softsign")),
)
REVERSE = case(proj_size=3, reverse=True)

# what slipped: (module, what stands there, what the slip makes of it, the case that shows it)
SLIPS = {
    "reverse runs forwards": (phased, "self.direction == 1 or self.cell.reverse", "self.direction == 1", REVERSE),
    "no reset of h": (phased, "run.unreset(t, h), run", "h, run", RNN),
    "no reset of c": (phased, "run.unreset(t, c)", "c", PROJECTION),
    "dh through a reset": (phased, "run.unreset(t, dh_prev)", "dh_prev", RNN),
    "dc through a reset": (phased, "run.unreset(t, dc_prev)", "dc_prev", PROJECTION),
    "states of padding": (phased, "h, c = run.going_on(t, h_new, h), ", "h, c = h_new, ", RNN),
    "output in the padding": (phased, "y[t] = run.live(t, h)", "y[t] = h", RNN),
    "gradient of the padding": (phased, "dh = run.going_on(t, run", "dh = (lambda t, new, old: new)(t, run", RNN),
    "no recurrent dropout": (phased, "h_start * run.recurrent", "h_start", RANDOM),
    "its mask left out backward": (phased, "dh_prev = dh_prev * run.recurrent", "pass", RANDOM),
    "zoneout of another step": (phased, "(self.given.draws.steps + t) * size", "self.given.draws.steps * size", RANDOM),
    "zoneout the other way round": (phased, "d.shape).astype(d.dtype)", "d.shape).astype(d.dtype) * 0", RANDOM),
    "h kept without gradient": (phased, "dh_prev if dh_old is None else dh_prev + dh_old", "dh_prev", RANDOM),
    "c kept without gradient": (phased, "dc_prev if dc_old is None else dc_prev + dc_old", "dc_prev", RANDOM),
    "masks of another direction": (phased, "mask_key(self.given, self.direction", "mask_key(self.given, 0", RANDOM),
    "masks of another layer": (phased, "mask_key(self.given,", "mask_key(self.given._replace(layer=0),", RANDOM),
    "bias before the norm": (phased, "a_x = a_x + w.bias", "a_x = a_x + 2 * w.bias", NORM),
    "c shown without its bias": (phased, "shown = shown + w.ln_bias_c", "pass", NORM),
    "gain of another product": (phased, "normalise(xp, a_h, w.ln_gain_hh)", "normalise(xp, a_h, w.ln_gain_ih)", NORM),
    "norm of h not taken back": (phased, "normalise_backward(da[t], norm, w.ln_gain_hh)", "da[t]", NORM),
    "norm of x not taken back": (phased, "normalise_backward(da, tape.norm_x, w.ln_gain_ih)", "da", NORM),
    "norm of c not taken back": (phased, "normalise_backward(d_shown, one.norm_c, w.ln_gain_c)", "d_shown", NORM),
    "no truncation": (phased, "if cell.truncated:", "if False:", PAPER),
    "gradient by the projected h": (phased, "dh_rows[t], dh_t = dh_t, run", "dh_rows[t], dh_t = dh_t * 2, run", PAPER),
    "output not projected": (phased, "run.zoneout(ZONEOUT_H, t, h_start, h_new)", "h_new * 1.01", PROJECTION),
    "only the last step of dp": (phased, '["weight_peephole"][...] += dp', '["weight_peephole"][...] = dp', NORM),
    "variance of n - 1": (phased_cell, "keepdims=True) + EPSILON", "keepdims=True) * 1.1", NORM),
    "norm without the mean of d": (phased_cell, "(d - d.mean(axis=-1, keepdims=True) - n", "(d - n", NORM),
    "norm without d n": (phased_cell, " - n * (d * n).mean(axis=-1, keepdims=True))", ")", NORM),
    "f = i": (phased_cell, 'gates["f"] = 1 - i', 'gates["f"] = i', BLOCKS),
    "i's gradient without f's": (phased_cell, 'dc * (gates["g"] - step.c_prev) if', 'dc * gates["g"] if', BLOCKS),
    "gradient through a clip": (phased_cell, 'abs(step.seen[gate]) < clip', 'abs(step.seen[gate]) < 99', BLOCKS),
    "gradient through the clip of c": (phased_cell, "abs(step.c) < cell_clip", "abs(step.c) < 99", PROJECTION),
    "blocks side by side": (phased_cell, "part.reshape(part.shape[0], -1, cell.block_size).sum(axis=2)",
                            "part.reshape(part.shape[0], cell.block_size, -1).sum(axis=1)", BLOCKS),
    "o sees c before": (phased_cell, 'p["o"] * c) if "o" in p', 'p["o"] * c_prev) if "o" in p', NORM),
    "dc without o's share": (phased_cell, 'dc = dc + _over_blocks(xp, cell, da["o"]) * p["o"]', "pass", NORM),
    "dc by one copy of o": (phased_cell, '_over_blocks(xp, cell, da["o"]) * p["o"]', 'da["o"] * p["o"]', SHARED),
    "i sees one unit": (phased_cell, '_over_blocks(xp, cell, p["i"] * c_prev)', 'p["i"] * c_prev', SHARED),
    "copies of a gate not summed": (phased_cell, "of_gate = _over_blocks(xp, cell, da[gate])", "of_gate = da[gate]",
                                    SHARED),
    "dc before without peepholes": (phased_cell, "dc_prev = dc_prev + of_gate * p[gate]", "pass", NORM),
    "dp of o with c before": (phased_cell, 'step.c if gate == "o" else step.c_prev', "step.c_prev", NORM),
    "candidate of 1997 halved": (phased_cell, "else 2 * xp.tanh(0.5 * a)", "else xp.tanh(0.5 * a)", PAPER),
    "its slope": (phased_cell, "(2 - s) * (2 + s) * 0.25", "1 - s * s", PAPER),
    "slope of its output": (phased_cell, "(1 - s * s) * 0.5 if of_output", "(1 - s * s) if of_output", PAPER),
    "slope of hard sigmoid": (phased_cell, ".astype(s.dtype) * 0.2", ".astype(s.dtype) * 0.25", ODD),
    "slope of relu": (phased_cell, "return (s > 0).astype(s.dtype)\n", "return xp.ones_like(s)\n", ODD),
    "slope of softsign": (phased_cell, "return (1 - abs(s)) ** 2", "return (1 - s) ** 2", SOFT),
}  # fmt: skip


def put(monkeypatch, module, old, new):
    """Replace a snippet of a module, for whatever has imported from it."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times"
    names = dict(vars(module))
    exec(compile(source.replace(old, new), module.__file__, "exec"), names)
    for user in (phased, backend):
        for name in module.__all__:
            if user is not module and hasattr(user, name):
                monkeypatch.setattr(user, name, names[name])


def error_of(case):
    p, xp = problem(case), FakeCupy(options=("-O0",))
    params = {name: xp.array(value) for name, value in p.params.items()}
    with cuda_row.installed(xp):
        y, (h_n, c_n), tape = lstm_forward(
            params, xp.array(p.x), tuple(map(xp.array, p.state)), p.lengths, **model_of(p), dropout_seed=DROPOUT_SEED,
            resets=xp.array(p.resets),
        )  # fmt: skip
        grads = lstm_backward(params, tape, xp.array(p.dy), tuple(map(xp.array, p.dstate)))
    found = {"y": y, "h_n": h_n, "c_n": c_n, "dx": grads.x, "dh0": grads.state[0], "dc0": grads.state[1]}
    found |= {f"d{name}": value for name, value in grads.params.items()}
    true = solve(p, REFERENCE)
    return max(normalised_error(value.get(), true[name]) for name, value in found.items())


@pytest.mark.parametrize("case", list(dict.fromkeys(case for *_, case in SLIPS.values())), ids=str)
def test_the_unchanged_code_passes(case, monkeypatch):
    bound = BOUNDS["layer norm" if case.cell.layer_norm else "agreement"].float64
    assert error_of(case) <= bound
    put(monkeypatch, phased, "dh + dy[t]", "dh + 2 * dy[t]")
    assert error_of(case) > 1e-3, "the change has not reached the backend"
    monkeypatch.undo()
    assert error_of(case) <= bound


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_noticed(slip, monkeypatch):
    *change, case = SLIPS[slip]
    put(monkeypatch, *change)
    with np.errstate(all="ignore"):
        assert error_of(case) > 1e-6
