"""Known slips, put into the reference on purpose: the checks of the other files must notice each of them.

Two checks are put to the proof here, on one small problem that has every feature: the forward pass against
the scalar loop, and the gradients against the complex step. A mutant is the source text of the library with
one snippet replaced, loaded as a module of its own; a snippet that is not there exactly once fails, so that
no mutant is the original in disguise.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import sys
import types
from collections.abc import Iterator

import numpy as np
import pytest
from derivatives import backward_pass, complex_step
from harness import DROPOUT_SEED, Arrays, Case, Problem, problem
from scalar_lstm import solve_forward
from tolerances import BOUNDS, normalised_error

from fastlstm.backends import layers
from fastlstm.backends.base import Dropout
from fastlstm.backends.reference import backend, cell

WITH_DROPOUT = Case(3, 3, 2, 2, 2, True, lengths=(2, 0, 3), dropout=0.4)
WITHOUT = dataclasses.replace(WITH_DROPOUT, dropout=0.0)

# name: (module, what stands there, what a slip makes of it); the forward pass goes wrong
FORWARD_SLIPS = {
    "gates i and f swapped": (cell, "c_raw = f * c_prev + i * g", "c_raw = i * c_prev + f * g"),
    "gates g and o swapped": (cell, "c_raw = f * c_prev + i * g", "c_raw = f * c_prev + i * gate(a['o'])"),
    "candidate by the sigmoid": (cell, 'g = candidate(clipped(seen["g"]', 'g = gate(clipped(seen["g"]'),
    "no tanh at the output": (backend, "squashed = squash(shown)", "squashed = shown"),
    "input and forget gate coupled": (cell, "c_raw = f * c_prev + i * g", "c_raw = f * c_prev + (1 - f) * g"),
    "no bias": (backend, "a = a + weights.bias", "pass"),
    "one step past the length": (
        backend, "active, kept = (t < lengths)[:, None], _kept(given, t, batch)",
        "active, kept = (t <= lengths)[:, None], _kept(given, t, batch)",
    ),
    "last step missing": (
        backend, "active, kept = (t < lengths)[:, None], _kept(given, t, batch)",
        "active, kept = (t + 1 < lengths)[:, None], _kept(given, t, batch)",
    ),
    "state runs on past the end": (
        backend, "h, c = np.where(active, h_new, h), np.where(active, c_new, c)", "h, c = h_new, c_new",
    ),
    "reverse runs forwards": (backend, "direction == 1 or given.cell.reverse", "given.cell.reverse"),
    "recurrence reads the cell": (backend, "h_prev = h_start * draws.recurrent", "h_prev = c_start"),
    "states of the wrong layer": (layers, "x, h0[rows], c0[rows], given", "x, h0[:2], c0[:2], given"),
    "directions side by side in the wrong order": (layers, "x = result.y", "x = result.y[..., ::-1]"),
}  # fmt: skip
# the forward pass stays right and a gradient goes wrong
BACKWARD_SLIPS = {
    "tanh applied twice": (cell, "* slope_g(g) *", "* slope_g(np.tanh(g)) *"),
    "g's derivative missing": (cell, "* slope_g(g) *", "*"),
    "i's derivative missing": (cell, "di * slope(i) *", "di *"),
    "f's derivative missing": (cell, "df * slope(f) *", "df *"),
    "o's derivative missing": (cell, "step.squashed * slope(o) *", "step.squashed *"),
    "derivative of i in place of f": (cell, "df * slope(f) *", "df * slope(i) *"),
    "derivative of the pre-activation": (cell, "di * slope(i) *", 'di * slope(step.peeped["i"]) *'),
    "tanh of c not differentiated": (backend, "d = d * slope(step.squashed)", "pass"),
    "c in place of tanh c": (backend, "d = d * slope(step.squashed)", "d = d * slope(step.c)"),
    "output gate reads c": (cell, "dout * step.squashed * slope(o)", "dout * step.c * slope(o)"),
    "output gate takes dc": (cell, "dout * step.squashed * slope(o)", "dc * step.squashed * slope(o)"),
    "dc from the next step forgotten": (cell, "dc = dc + dc_squashed(dout * o)", "dc = dc_squashed(dout * o)"),
    "dh does not reach dc": (cell, "dc = dc + dc_squashed(dout * o)", "pass"),
    "dc not times f": (cell, "dc_prev = dc * f", "dc_prev = dc"),
    "c_t in place of c_{t-1}": (cell, "df = dc * step.c_prev", "df = dc * step.c"),
    "tape holds the next h": (backend, "seen, h_prev, c_start,", "seen, out, c_start,"),
    "dy missing": (backend, "dh_t, dc_t = np.where(active, dh + dy[t], 0)", "dh_t, dc_t = np.where(active, dh, 0)"),
    "dy of the step before": (
        backend, "dh_t, dc_t = np.where(active, dh + dy[t], 0)", "dh_t, dc_t = np.where(active, dh + dy[t - 1], 0)",
    ),
    "dh from the next step forgotten": (
        backend, "dh_t, dc_t = np.where(active, dh + dy[t], 0)", "dh_t, dc_t = np.where(active, dy[t], 0)",
    ),
    "time runs forwards": (
        backend, "for step in reversed(tape.steps[direction]):\n        t, active",
        "for step in tape.steps[direction]:\n        t, active",
    ),
    "dW_ih dropped": (backend, 'sums["weight_ih"] += da_x.T @ x[t]', "pass"),
    "dW_ih overwritten": (backend, 'sums["weight_ih"] += da_x.T', 'sums["weight_ih"] = da_x.T'),
    "dW_ih off by one": (backend, "da_x.T @ x[t]", "da_x.T @ x[t - 1]"),
    "dW_hh dropped": (backend, 'sums["weight_hh"] += da_h.T @ zeroed.h_prev', "pass"),
    "dW_hh reads the cell": (backend, "da_h.T @ zeroed.h_prev", "da_h.T @ zeroed.c_prev"),
    "db dropped": (backend, 'sums["bias"] += da.sum(axis=0)', "pass"),
    "dx of another step": (backend, "dx[t] = np.where(", "dx[t - 1] = np.where("),
    "dx overwritten by the reverse direction": (backend, "sum(dx[1:], dx[0])", "dx[-1]"),
    "dh of ended sequences lost": (
        backend, "dh = np.where(active, np.where(passed, dh_prev, 0), dh)", "dh = np.where(passed, dh_prev, 0)",
    ),
    "dc of ended sequences lost": (
        backend,
        "dc = np.where(active, np.where(passed, dc_prev + dc_old, 0), dc)",
        "dc = np.where(passed, dc_prev, 0)",
    ),
    "truncated": (backend, "0 * dh if cell.truncated else", "0 * dh if True else"),
    "dropout forgotten on the way back": (layers, "grads.x if mask is None else grads.x * mask", "grads.x"),
    "dropout not scaled on the way back": (layers, "grads.x * mask", "grads.x * (mask > 0)"),
    "initial states' gradients in the wrong order": (layers, "self._joined(dh0[::-1])", "self._joined(dh0)"),
    "final states of the wrong layer": (layers, "dy, dh_n[rows], dc_n[rows]", "dy, dh_n[rows] * 0, dc_n[rows]"),
    "initial states swapped": (
        layers,
        "self._joined(dh0[::-1]), self._joined(dc0[::-1])",
        "self._joined(dc0[::-1]), self._joined(dh0[::-1])",
    ),
}  # fmt: skip


MODULES = {"mutant_layers": layers, "mutant_cell": cell, "mutant_backend": backend}


def mutant(monkeypatch: pytest.MonkeyPatch, changed: types.ModuleType, source: str) -> object:
    """Load copies of the modules, the changed one from `source`, and return the backend."""
    for name, module in MODULES.items():
        text = source if module is changed else inspect.getsource(module)
        copy = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, copy)
        for other, original in MODULES.items():
            text = text.replace(f"from {original.__name__} import", f"from {other} import")
        exec(compile(text, name, "exec"), vars(copy))
    return copy.BACKEND


def replaced(module: types.ModuleType, old: str, new: str) -> str:
    """Return the module's source with the one occurrence of `old` replaced."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} is in {module.__name__} {source.count(old)} times"
    return source.replace(old, new)


def worst(actual: Arrays, expected: Arrays) -> float:
    assert actual.keys() == expected.keys()
    return max(normalised_error(actual[name], value) for name, value in expected.items())


def forward_error(implementation: object) -> float:
    """Error of the forward pass against the scalar loop."""
    return worst(backward_pass(implementation, problem(WITHOUT))[0], scalar_answer())


def gradient_error(implementation: object, p: Problem) -> float:
    """Error of the gradients against the complex step of the same forward pass."""
    return worst(backward_pass(implementation, p)[1], complex_step(implementation, p))


@functools.cache
def scalar_answer() -> Arrays:
    return solve_forward(problem(WITHOUT))


FORWARD_BOUND, GRADIENT_BOUND = BOUNDS["scalar loop"].float64, BOUNDS["complex step"].float64
NOTICED = 1e3  # a slip must stand out by this factor over the bound: no check may pass or fail by luck


@pytest.mark.parametrize("module", MODULES.values(), ids=lambda module: module.__name__)
def test_an_unchanged_copy_passes_both_checks(monkeypatch, module):
    copy = mutant(monkeypatch, module, inspect.getsource(module))
    assert forward_error(copy) <= FORWARD_BOUND
    assert gradient_error(copy, problem(WITH_DROPOUT)) <= GRADIENT_BOUND


@pytest.mark.parametrize("slip", FORWARD_SLIPS)
def test_the_scalar_loop_notices(monkeypatch, slip):
    module, old, new = FORWARD_SLIPS[slip]
    assert forward_error(mutant(monkeypatch, module, replaced(module, old, new))) > NOTICED * FORWARD_BOUND


@pytest.mark.parametrize("slip", BACKWARD_SLIPS)
def test_the_complex_step_notices(monkeypatch, slip):
    module, old, new = BACKWARD_SLIPS[slip]
    implementation = mutant(monkeypatch, module, replaced(module, old, new))
    assert gradient_error(implementation, problem(WITH_DROPOUT)) > NOTICED * GRADIENT_BOUND


# What can be exchanged without anyone noticing, each with the reason why that is no bug.
_AT_THE_BOUND = "the gradient at the bound itself is a convention"
_AT_ZERO = "both forms agree at 0"
_MASKED = "it meets da = 0, as any finite number may"
_HARD = "np.where(a.real < -2.5, 0 * a, np.where(a.real > 2.5, 0 * a + 1, 0.2 * a + 0.5)),"
_SOFTSIGN = (
    '"softsign": (lambda a: a / (1 + np.where(a.real >= 0, a, -a)), lambda s: (1 - np.where(s.real >= 0, s, -s)) ** 2),'
)
_RELU = '"relu": (lambda a: np.where(a.real > 0, a, 0 * a), lambda s: (s.real > 0).astype(s.dtype)),'
EQUIVALENT = {
    "return np.where(abs(a.real) < bound, a, np.clip(a.real, -bound, bound).astype(a.dtype)):"
    " abs(a.real) < bound -> abs(a.real) <= bound": _AT_THE_BOUND,
    "return True if bound is None else abs(a.real) < bound: abs(a.real) < bound -> abs(a.real) <= bound": _AT_THE_BOUND,
    "sign = np.where(a.real >= 0, 1, -1).astype(a.real.dtype): a.real >= 0 -> a.real > 0": _AT_ZERO,
    "return np.where(a.real >= 0, 1, e) / (1 + e): a.real >= 0 -> a.real > 0": _AT_ZERO,
    f"{_RELU}: a.real > 0 -> a.real >= 0": _AT_ZERO,
    f"{_RELU}: 0 * a -> 0 / a": "a is not 0 there",
    f"lambda a: {_HARD}: a.real < -2.5 -> a.real <= -2.5": "both forms agree at -2.5",
    f"lambda a: {_HARD}: a.real > 2.5 -> a.real >= 2.5": "both forms agree at 2.5",
    f"lambda a: {_HARD}: 0 * a -> 0 / a": "a is not 0 there",
    f"{_SOFTSIGN}: a.real >= 0 -> a.real > 0": _AT_ZERO,
    f"{_SOFTSIGN}: s.real >= 0 -> s.real > 0": _AT_ZERO,
    "x = np.where(_active(x, lengths), x, 0): 0 -> 1": _MASKED,
    "return np.where(step.active, value, 0): 0 -> 1": _MASKED,
    "dw_hh += da.T @ np.where(step.active, step.h_prev, 0): 0 -> 1": _MASKED,
    'sums["weight_hr"] += dh_t.T @ np.where(active, step.out, 0): 0 -> 1': "it meets dh = 0",
    'sums["ln_gain_c"] += (d * np.where(active, step.norms[2].normalised, 0)).sum(axis=0): 0 -> 1': _MASKED,
    "return np.where(share == 0, new, np.where(share == 1, old, share * old + (1 - share) * new)): 1 -> 2": (
        "finite numbers are mixed to the same result"
    ),
}
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.GtE: ast.Gt, ast.Gt: ast.GtE, ast.Eq: ast.NotEq,
}  # fmt: skip


def operator_mutants(module: types.ModuleType) -> Iterator[tuple[str, str]]:
    """Yield (description, source) of a module with one operator exchanged or one small constant changed."""
    source = inspect.getsource(module)
    count = sum(1 for _ in ast.walk(ast.parse(source)))
    for k in range(count):
        tree = ast.parse(source)
        functions = (ast.FunctionDef, ast.Lambda)
        inside = {id(node) for f in ast.walk(tree) if isinstance(f, functions)
                  for statement in (f.body if isinstance(f.body, list) else [f.body])
                  for node in ast.walk(statement)}  # fmt: skip
        node = next(itertools.islice(ast.walk(tree), k, None))
        if id(node) not in inside:
            continue
        before = ast.unparse(node)
        if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in OPERATORS:
            node.op = OPERATORS[type(node.op)]()
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
            node.ops[0] = OPERATORS[type(node.ops[0])]()
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            node.value += 1
        else:
            continue
        line = source.splitlines()[node.lineno - 1].strip()
        yield f"{line}: {before} -> {ast.unparse(node)}", ast.unparse(tree)


@functools.cache
def proofs() -> list[tuple[Problem, Arrays]]:
    """Return problems of the whole family, and what the reference makes of them; its own proofs are in other files."""
    given = [
        problem(Case(3, 4, 1, 2, 1, True, lengths=(2, 0, 3, 1))),
        problem(Case(3, 2, 5, 4, 1, True)),  # no two sizes equal, else one could stand for the other
        problem(Case(4, 3, 2, 3, 1, lengths=(2, 4, 1), resets=True, peephole=True)),
        *(problem(Case(3, 2, 3, 4, 1, lengths=(3, 2), resets=True, fields=tuple(fields.items()))) for fields in FAMILY),
        *(problem(Case(3, 2, 2, 4, 1, True, fields=(("merge", merge),))) for merge in ("sum", "mean", "product")),
    ]
    given.append(problem(Case(3, 2, 3, 4, 1, fields=(("nonlinearity", "tanh"),))))
    hard = problem(Case(3, 2, 2, 4, 1, fields=(("activations", ("hard_sigmoid", "hard_sigmoid", "tanh")),)))
    given.append(dataclasses.replace(hard, params={name: 6.0 * value for name, value in hard.params.items()}))
    found = [(p, worked_out(backend.BACKEND, p)) for p in given]
    ragged, answer = found[0]
    x, dy, h0 = ragged.x.copy(), ragged.dy.copy(), ragged.state[0].copy()
    past = np.arange(len(x))[:, None] >= ragged.lengths
    x[past], dy[past], h0[:, 1] = np.nan, np.nan, np.nan  # a slip may also let padding, or a state unused, leak
    answer["h_n"][:, 1] = np.nan  # that sequence has no step
    found[0] = dataclasses.replace(ragged, x=x, dy=dy, state=(h0, ragged.state[1])), answer
    return [*found, (dataclasses.replace(found[1][0], dy=None), worked_out(backend.BACKEND, undriven(found[1][0])))]


def undriven(p: Problem) -> Problem:
    """Return a problem whose gradient by the output is zero."""
    return dataclasses.replace(p, dy=np.zeros_like(p.dy))


FAMILY = [
    {"forget_gate": False, "block_size": 2, "activations": ("sigmoid", "1997", "1997")}, {"coupled": True},
    {"activations": ("hard_sigmoid", "softsign", "identity"), "clip": 0.6}, {"cell_clip": 0.3, "peephole": True},
    {"activations": ("sigmoid", "relu", "hard_sigmoid")}, {"proj_size": 3, "zoneout": (0.4, 0.4)},
    {"layer_norm": True, "recurrent_dropout": 0.4}, {"truncated": True}, {"reverse": True},
    {"nonlinearity": "tanh"}, {"nonlinearity": "relu"}, {"peephole": True, "block_size": 2},
]  # fmt: skip


def worked_out(implementation: object, p: Problem) -> Arrays:
    """Return outputs and gradients, in training; and the outputs of inference and the gradients by all states."""
    outputs, gradients = backward_pass(implementation, p)
    assert p.state is not None
    run = functools.partial(implementation.forward, p.cell, p.params, p.x, *p.state, p.lengths)
    inferred = run(None, keep_tape=False, resets=p.resets)
    draws = Dropout(p.cell.dropout, DROPOUT_SEED) if p.cell.draws else None
    tape = run(draws, keep_tape=True, resets=p.resets).tape
    steps = implementation.backward(p.cell, p.params, tape, p.dy, *p.dstate, keep_steps=True).steps
    return outputs | gradients | {"inferred": inferred.y, "dh_steps": steps.h, "dc_steps": steps.c}


def survives(implementation: object, proof: tuple[Problem, Arrays]) -> bool:
    """Whether a mutant gives the right answer to one problem."""
    p, truth = proof
    try:
        return worst(worked_out(implementation, p), truth) <= GRADIENT_BOUND
    except Exception:  # shapes that no longer fit
        return False


@pytest.mark.exhaustive
@pytest.mark.parametrize("module", [cell, backend], ids=lambda module: module.__name__)
def test_every_exchanged_operator_is_noticed(monkeypatch, module):
    assert all(survives(backend.BACKEND, case) for case in proofs())
    noticed, survivors = 0, []
    for description, source in operator_mutants(module):
        implementation = mutant(monkeypatch, module, source)
        if all(survives(implementation, case) for case in proofs()):
            survivors.append(description)
        else:
            noticed += 1
    assert noticed >= 60
    assert set(survivors) <= EQUIVALENT.keys()
