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
from harness import Arrays, Case, Problem, problem
from scalar_lstm import solve_forward
from tolerances import BOUNDS, normalised_error

from fastlstm.backends import layers, reference

WITH_DROPOUT = Case(3, 3, 2, 2, 2, True, lengths=(2, 0, 3), dropout=0.4)
WITHOUT = dataclasses.replace(WITH_DROPOUT, dropout=0.0)

# name: (module, what stands there, what a slip makes of it); the forward pass goes wrong
FORWARD_SLIPS = {
    "gates i and f swapped": (reference, "a_i, a_f, a_g, a_o = np.split", "a_f, a_i, a_g, a_o = np.split"),
    "gates g and o swapped": (reference, "a_i, a_f, a_g, a_o = np.split", "a_i, a_f, a_o, a_g = np.split"),
    "candidate by the sigmoid": (reference, "sigmoid(a_f), np.tanh(a_g)", "sigmoid(a_f), sigmoid(a_g)"),
    "no tanh at the output": (reference, "return o * np.tanh(c), c", "return o * c, c"),
    "input and forget gate coupled": (reference, "c = f * c_prev + i * g", "c = f * c_prev + (1 - f) * g"),
    "no bias": (reference, "a = a + weights.bias", "pass"),
    "one step past the length": (reference, "active = (t < lengths)", "active = (t <= lengths)"),
    "last step missing": (reference, "active = (t < lengths)", "active = (t + 1 < lengths)"),
    "state runs on past the end": (
        reference,
        "np.where(active, h_new, h), np.where(active, c_new, c)",
        "h_new, c_new",
    ),
    "output past the end": (reference, "y[t] = np.where(active, h, 0)", "y[t] = h"),
    "reverse runs forwards": (reference, "reversed(times) if reverse else times", "times"),
    "recurrence reads the cell": (reference, "h @ weights.weight_hh.T", "c @ weights.weight_hh.T"),
    "states of the wrong layer": (layers, "h0[rows], c0[rows], lengths", "h0[:2], c0[:2], lengths"),
    "directions side by side in the wrong order": (layers, "x = result.y", "x = result.y[..., ::-1]"),
}
# the forward pass stays right and a gradient goes wrong
BACKWARD_SLIPS = {
    "tanh applied twice": (reference, "da_g = dc * i * (1 - g * g)", "da_g = dc * i * (1 - np.tanh(g) ** 2)"),
    "g's derivative missing": (reference, "da_g = dc * i * (1 - g * g)", "da_g = dc * i"),
    "i's derivative missing": (reference, "da_i = dc * g * i * (1 - i)", "da_i = dc * g"),
    "f's derivative missing": (reference, "da_f = dc * c_prev * f * (1 - f)", "da_f = dc * c_prev"),
    "o's derivative missing": (reference, "da_o = dh * tanh_c * o * (1 - o)", "da_o = dh * tanh_c"),
    "derivative of i in place of f": (reference, "dc * c_prev * f * (1 - f)", "dc * c_prev * i * (1 - i)"),
    "tanh of c not differentiated": (reference, "dh * o * (1 - tanh_c * tanh_c)", "dh * o"),
    "c in place of tanh c": (reference, "dh * o * (1 - tanh_c * tanh_c)", "dh * o * (1 - c * c)"),
    "output gate reads c": (reference, "da_o = dh * tanh_c * o", "da_o = dh * c * o"),
    "output gate takes dc": (reference, "da_o = dh * tanh_c * o", "da_o = dc * tanh_c * o"),
    "dc from the next step forgotten": (reference, "dc = dc + dh * o", "dc = dh * o"),
    "dh does not reach dc": (reference, "dc = dc + dh * o * (1 - tanh_c * tanh_c)", "pass"),
    "dc not times f": (reference, "dc_prev = dc * f", "dc_prev = dc"),
    "c_t in place of c_{t-1}": (reference, "da_f = dc * c_prev", "da_f = dc * c"),
    "tape holds the next cell": (
        reference,
        "Step(t, active, gates, h, c, c_new)",
        "Step(t, active, gates, h, c_new, c_new)",
    ),
    "tape holds the next h": (
        reference,
        "Step(t, active, gates, h, c, c_new)",
        "Step(t, active, gates, h_new, c, c_new)",
    ),
    "gates concatenated in another order": (reference, "[da_i, da_f, da_g, da_o]", "[da_f, da_i, da_g, da_o]"),
    "dy missing": (reference, "dh + dy[step.t]", "dh"),
    "dy of the step before": (reference, "dh + dy[step.t]", "dh + dy[step.t - 1]"),
    "dh from the next step forgotten": (reference, "dh + dy[step.t]", "dy[step.t]"),
    "time runs forwards": (reference, "for step in reversed(steps)", "for step in steps"),
    "dW_ih dropped": (reference, "dw_ih += da.T @ x[step.t]", "pass"),
    "dW_ih overwritten": (reference, "dw_ih += da.T @ x[step.t]", "dw_ih = da.T @ x[step.t]"),
    "dW_ih off by one": (reference, "dw_ih += da.T @ x[step.t]", "dw_ih += da.T @ x[step.t - 1]"),
    "dW_hh dropped": (reference, "dw_hh += da.T @ np.where(step.active, step.h_prev, 0)", "pass"),
    "dW_hh reads the cell": (reference, "np.where(step.active, step.h_prev, 0)", "step.c_prev"),
    "db dropped": (reference, "db += da.sum(axis=0)", "pass"),
    "dx of another step": (reference, "dx[step.t] = np.where(", "dx[step.t - 1] = np.where("),
    "dx overwritten by the reverse direction": (reference, "sum(dx[1:], dx[0])", "dx[-1]"),
    "dh of ended sequences lost": (
        reference,
        "np.where(step.active, da @ weights.weight_hh, dh)",
        "da @ weights.weight_hh",
    ),
    "dc of ended sequences lost": (reference, "np.where(step.active, dc_prev, dc)", "dc_prev"),
    "gradient flows from padding": (
        reference,
        "dh_t = np.where(step.active, dh + dy[step.t], 0)",
        "dh_t = dh + dy[step.t]; step = Step(step.t, True, *list(vars(step).values())[2:])",
    ),
    "truncated after one step": (reference, "np.where(step.active, da @ weights.weight_hh, dh)", "0 * dh"),
    "dropout forgotten on the way back": (layers, "grads.x if mask is None else grads.x * mask", "grads.x"),
    "dropout not scaled on the way back": (layers, "grads.x * mask", "grads.x * (mask > 0)"),
    "initial states' gradients in the wrong order": (layers, "self._joined(dh0[::-1])", "self._joined(dh0)"),
    "final states of the wrong layer": (layers, "dy, dh_n[rows], dc_n[rows]", "dy, dh_n[rows] * 0, dc_n[rows]"),
    "initial states swapped": (
        layers,
        "self._joined(dh0[::-1]), self._joined(dc0[::-1])",
        "self._joined(dc0[::-1]), self._joined(dh0[::-1])",
    ),
}


def mutant(monkeypatch: pytest.MonkeyPatch, changed: types.ModuleType, source: str) -> object:
    """Load copies of layers.py and reference.py, the changed one from `source`, and return the backend."""
    for module in (layers, reference):
        name = f"mutant_{module.__name__.rpartition('.')[2]}"
        text = source if module is changed else inspect.getsource(module)
        copy = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, copy)
        exec(text.replace("from fastlstm.backends.layers import", "from mutant_layers import"), vars(copy))
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


@pytest.mark.parametrize("module", [layers, reference], ids=lambda module: module.__name__)
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
EQUIVALENT = {
    "sign = np.where(a.real >= 0, 1, -1).astype(a.real.dtype): a.real >= 0 -> a.real > 0": "both forms are 1/2 at 0",
    "return np.where(a.real >= 0, 1, e) / (1 + e): a.real >= 0 -> a.real > 0": "both forms are 1/2 at 0",
    "x = np.where(_active(x, lengths), x, 0): 0 -> 1": "it meets da = 0, as any finite number may",
    "dw_hh += da.T @ np.where(step.active, step.h_prev, 0): 0 -> 1": "it meets da = 0, as any finite number may",
    # Both of its zeros:
    "dp += peephole_gradient(da, np.where(step.active, step.c, 0), np.where(step.active, step.c_prev, 0)): 0 -> 1": (
        "they meet da = 0, as any finite number may"
    ),
    "dh_t = np.where(step.active, dh + dy[step.t], 0): 0 -> 1": "da is masked after it",
    "dc_t = np.where(step.active, dc, 0): 0 -> 1": "da and dc are masked after it",
}
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.GtE: ast.Gt, ast.Gt: ast.GtE, ast.Eq: ast.NotEq,
}  # fmt: skip
MUTATED = ("sigmoid", "cell_forward", "cell_backward", "peephole_gradient", "_active", "_direction_forward",
           "_direction_backward", "layer_forward", "layer_backward")  # fmt: skip


def operator_mutants() -> Iterator[tuple[str, str]]:
    """Yield (description, source) of the reference with one operator exchanged or one small constant changed."""
    source = inspect.getsource(reference)
    count = sum(1 for _ in ast.walk(ast.parse(source)))
    for k in range(count):
        tree = ast.parse(source)
        inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name in MUTATED
                  for statement in f.body for node in ast.walk(statement)}  # fmt: skip
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


def proofs() -> list[tuple[Problem, Arrays, Arrays]]:
    """Return problems, ragged, whole and without dy, with the outputs and gradients that are right."""
    ragged = problem(Case(3, 4, 1, 2, 1, True, lengths=(2, 0, 3, 1)))
    whole = problem(Case(3, 2, 5, 4, 1, True))  # no two sizes equal, else one could stand for the other
    undriven = dataclasses.replace(whole, dy=np.zeros_like(whole.dy))
    peephole = problem(Case(4, 3, 2, 3, 1, False, lengths=(2, 4, 1), peephole=True))
    truths = [complex_step(reference.BACKEND, p) for p in (ragged, whole, undriven, peephole)]
    x, dy, h0 = ragged.x.copy(), ragged.dy.copy(), ragged.state[0].copy()
    past = np.arange(len(x))[:, None] >= ragged.lengths
    x[past], dy[past], h0[:, 1] = np.nan, np.nan, np.nan  # a slip may also let padding, or a state unused, leak
    ragged = dataclasses.replace(ragged, x=x, dy=dy, state=(h0, ragged.state[1]))
    given = [ragged, whole, dataclasses.replace(whole, dy=None), peephole]
    answers = [solve_forward(p) for p in (ragged, whole, undriven, peephole)]
    return list(zip(given, answers, truths, strict=True))


def survives(implementation: object, proof: tuple[Problem, Arrays, Arrays]) -> bool:
    """Whether a mutant gives the right answer to one problem."""
    p, answer, truth = proof
    try:
        outputs, gradients = backward_pass(implementation, p)
    except (ValueError, IndexError, TypeError, AttributeError):  # shapes that no longer fit
        return False
    return worst(outputs, answer) <= FORWARD_BOUND and worst(gradients, truth) <= GRADIENT_BOUND


def test_every_exchanged_operator_is_noticed(monkeypatch):
    cases = proofs()
    assert all(survives(reference.BACKEND, case) for case in cases)
    noticed, survivors = 0, []
    for description, source in operator_mutants():
        implementation = mutant(monkeypatch, reference, source)
        if all(survives(implementation, case) for case in cases):
            survivors.append(description)
        else:
            noticed += 1
    assert noticed >= 65
    assert set(survivors) == set(EQUIVALENT)
