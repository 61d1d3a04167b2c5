"""The family on the NumPy reference: its own derivatives, its masks, and what a field means."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from derivatives import complex_step
from harness import REFERENCE, Case, problem, solve
from tolerances import assert_close

import fastlstm
from fastlstm import LSTM, RNN, ArgumentError
from fastlstm.cell import ACTIVATIONS, VARIANTS, Cell

FIELDS = [
    {"forget_gate": False},
    {"coupled": True},
    {"block_size": 2},
    {"peephole": True, "forget_gate": False},
    {"peephole": True, "coupled": True},
    {"peephole": True, "block_size": 2},
    {"peephole": True, "block_size": 4, "coupled": True, "layer_norm": True, "cell_clip": 0.3},
    *({"activations": (gate, "tanh", "tanh")} for gate in ACTIVATIONS if gate != "1997"),
    *({"activations": ("sigmoid", candidate, "tanh")} for candidate in ACTIVATIONS),
    *({"activations": ("sigmoid", "tanh", output)} for output in ACTIVATIONS),
    {"clip": 0.4},
    {"clip": 0.4, "peephole": True},
    {"cell_clip": 0.3},
    {"cell_clip": 0.3, "peephole": True},
    {"proj_size": 3},
    {"layer_norm": True},
    {"layer_norm": True, "block_size": 2, "proj_size": 2},
    {"recurrent_dropout": 0.4},
    {"zoneout": (0.3, 0.0)},
    {"zoneout": (0.0, 0.4)},
    {"zoneout": (0.3, 0.4), "proj_size": 3, "peephole": True},
    {"reverse": True},
    {"nonlinearity": "tanh"},
    {"nonlinearity": "relu"},
    {"forget_gate": False, "block_size": 2, "activations": ("sigmoid", "1997", "1997")},
]
MERGES = [{"merge": merge} for merge in ("sum", "mean", "product")]


def case_of(fields, **more):
    given = {"steps": 4, "batch": 3, "inputs": 2, "hidden": 4, "lengths": "zeros", "resets": True} | more
    return Case(**given, fields=tuple(fields.items()))


def random_case(number):
    """Draw a combination of fields that means something."""
    rng = np.random.default_rng([2025, number])
    choices = {
        "peephole": [True], "forget_gate": [False], "coupled": [True], "block_size": [2, 4], "clip": [0.5],
        "activations": [tuple(map(str, rng.choice([a for a in ACTIVATIONS if a != "1997"], 3)))], "cell_clip": [0.4],
        "proj_size": [1, 3], "layer_norm": [True], "recurrent_dropout": [0.3], "zoneout": [(0.2, 0.3), (0.0, 0.5)],
        "reverse": [True], "merge": ["sum", "mean", "product"], "nonlinearity": ["tanh", "relu"],
    }  # fmt: skip
    while True:
        chosen = {name: rng.choice(np.array(values, object)) for name, values in choices.items() if rng.random() < 0.3}
        fields = {name: tuple(v) if isinstance(v, np.ndarray | tuple | list) else v for name, v in chosen.items()}
        bidirectional = bool(rng.random() < 0.4)
        try:
            Cell(2, 4, bidirectional=bidirectional, **fields)
        except ArgumentError:
            continue
        return case_of(
            fields, layers=int(rng.integers(1, 3)), bidirectional=bidirectional, bias=bool(rng.random() < 0.7),
            lengths="zeros" if rng.random() < 0.5 else None, resets=bool(rng.random() < 0.5), seed=number, steps=3,
            batch=2,
        )  # fmt: skip


CASES = [
    *map(case_of, FIELDS),
    *(case_of(fields, layers=2, bidirectional=True) for fields in MERGES),
    *(case_of(fields, layers=2) for fields in ({"proj_size": 2}, {"layer_norm": True}, {"nonlinearity": "relu"})),
    *map(random_case, range(200)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.sampled
def test_gradients_are_those_of_the_complex_step(case):
    p = problem(case)
    expected = complex_step(REFERENCE.implementation, p)
    found = {name: value for name, value in solve(p, REFERENCE).items() if name in expected}
    assert found.keys() == expected.keys()
    claim = "layer norm" if p.cell.layer_norm else "agreement"
    assert_close(claim, found, expected, backend="reference", dtype=np.float64)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_truncated_gradient_takes_h_for_a_constant(fields):
    """Each step alone, from the h of a run before as a constant and a c that carries the gradient."""
    if fields.get("nonlinearity") or fields.get("zoneout") or fields.get("recurrent_dropout"):
        pytest.skip("a plain RNN has no truncated gradient; masks depend on the time step")
    case = case_of({**fields, "truncated": True}, lengths=None, resets=False)
    p = problem(case)
    implementation = REFERENCE.implementation
    whole = implementation.forward(p.cell, p.params, p.x, *p.state, None, None, keep_tape=False)
    order = range(case.steps)[::-1] if p.cell.reverse else range(case.steps)

    class OneStepAfterTheOther:
        """A backend whose forward pass has the h of `whole` before each step but the first."""

        def forward(self, cell, params, x, h, c, lengths, dropout, keep_tape, resets=None):
            del lengths, dropout, keep_tape, resets
            y = np.zeros_like(whole.y, dtype=x.dtype)
            h = whole_h0
            for t in order:
                result = implementation.forward(cell, params, x[t : t + 1], h, c, None, None, keep_tape=False)
                y[t], c = result.y[0], result.c_n
                h = whole.y[None, t]
            return dataclasses.replace(result, y=y) if dataclasses.is_dataclass(result) else result._replace(y=y)

    whole_h0 = p.state[0]
    expected = complex_step(OneStepAfterTheOther(), p)
    found = {name: value for name, value in solve(p, REFERENCE).items() if name in expected}
    assert_close("agreement", found, expected, backend="reference", dtype=np.float64)
    assert not found["dh0"].any()


@pytest.mark.parametrize("fields", [f for f in FIELDS if "nonlinearity" not in f and not f.get("reverse")], ids=str)
def test_any_chunking_gives_the_whole_sequence_s_result(fields):
    cell_fields = dict(fields)
    model = LSTM(3, 4, 2, seed=0, dtype=np.float64, **cell_fields)
    rng = np.random.default_rng(3)
    x, resets = rng.standard_normal((7, 2, 3)), rng.random((7, 2)) < 0.3
    with fastlstm.use_backend("reference"):
        y, state = model(x, resets=resets)
        first, between = model(x[:3], resets=resets[:3])
        second, last = model(x[3:], between, resets=resets[3:])
    np.testing.assert_allclose(np.concatenate([first, second]), y, rtol=1e-12)  # products of other shapes round anew
    for found, expected in zip(last, state, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("model", [LSTM(2, 4, seed=0, dtype=np.float64), RNN(2, 4, seed=0, dtype=np.float64)], ids=str)
def test_a_reset_is_the_start_of_another_sequence(model):
    x = np.random.default_rng(1).standard_normal((6, 2, 2))
    resets = np.zeros((6, 2), bool)
    resets[4] = True
    y, _ = model(x, resets=resets)
    first, _ = model(x[:4])
    second, _ = model(x[4:])
    np.testing.assert_allclose(np.concatenate([first, second]), y, rtol=1e-12)


def test_zoneout_and_recurrent_dropout_draw_anew_in_each_pass_and_not_in_inference():
    model = LSTM(2, 8, seed=0, zoneout=(0.3, 0.3), recurrent_dropout=0.3)
    x = np.ones((5, 3, 2), np.float32)
    one, two = model.forward(x)[0], model.forward(x)[0]
    assert (one != two).any()
    assert (model(x)[0] == model(x)[0]).all()


WRONG = [
    {"coupled": True, "forget_gate": False}, {"block_size": 3}, {"block_size": 0}, {"proj_size": 4},
    {"proj_size": -1}, {"activations": "tanh"}, {"activations": ("tanh", "tanh")},
    {"activations": ("1997", "tanh", "tanh")}, {"activations": ("sigmoid", "swish", "tanh")}, {"clip": 0},
    {"clip": -1.0},
    {"cell_clip": float("nan")}, {"recurrent_dropout": 1.0}, {"zoneout": 0.5}, {"zoneout": (0.5, 1.0)},
    {"reverse": True, "bidirectional": True}, {"merge": "sum"}, {"merge": "max", "bidirectional": True},
    {"forget_bias": 3.0, "forget_gate": False}, {"forget_bias": 3.0, "bias": False}, {"forget_bias": float("inf")},
    {"truncated": 1}, {"layer_norm": None},
]  # fmt: skip


@pytest.mark.parametrize("fields", WRONG, ids=str)
def test_fields_that_mean_nothing_are_refused(fields):
    with pytest.raises(ArgumentError) as caught:
        LSTM(3, 4, **fields)
    assert any(name in str(caught.value) for name in fields)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("reverse", "merge", "nonlinearity")])
def test_a_plain_rnn_refuses_what_is_about_gates(name):
    values = {"block_size": 2, "proj_size": 2, "activations": ("relu", "relu", "relu"), "clip": 1.0, "cell_clip": 1.0,
              "recurrent_dropout": 0.5, "zoneout": (0.5, 0.5), "forget_gate": False}  # fmt: skip
    with pytest.raises(ArgumentError, match=name):
        Cell(3, 4, nonlinearity="tanh", **{name: values.get(name, True)})


def test_forget_bias_is_where_the_forget_gate_starts():
    lstm = LSTM(3, 4, forget_bias=3.0, seed=0)
    assert (lstm.params["bias_l0"][4:8] == 3.0).all()
    assert not lstm.params["bias_l0"][:4].any()


@pytest.mark.parametrize("fields", [{}, *FIELDS], ids=str)
def test_a_file_keeps_every_field(fields, tmp_path):
    if fields.get("nonlinearity"):
        model = RNN(3, 4, seed=0, nonlinearity=fields["nonlinearity"])
    else:
        model = LSTM(3, 4, seed=0, **fields)
    model.save(tmp_path / "model.safetensors")
    loaded = type(model).load(tmp_path / "model.safetensors")
    assert loaded.cell == model.cell
    assert all((loaded.params[name] == value).all() for name, value in model.params.items())
    other = LSTM if type(model) is RNN else RNN
    with pytest.raises(fastlstm.ModelFileError, match="load"):
        other.load(tmp_path / "model.safetensors")


def test_gradients_by_the_states_of_each_step():
    p = problem(case_of({}, lengths=None, resets=False, layers=2, bidirectional=True))
    model = LSTM(2, 4, 2, bidirectional=True, dtype=np.float64, seed=0)
    model.params.update(p.params)
    with fastlstm.use_backend("reference"):
        _, _, tape = model.forward(p.x, p.state)
        grads = model.backward(tape, p.dy, p.dstate, keep_state_gradients=True)
    dh, dc = grads.steps
    assert dh.shape == dc.shape == (4, 4, 3, 4)
    # The last layer's states after the last step: by the output and by the final state.
    np.testing.assert_allclose(dh[-1, 2], p.dy[-1, :, :4] + p.dstate[0][2])
    np.testing.assert_allclose(dc[-1, 2], p.dstate[1][2])
    np.testing.assert_allclose(dc[0, 3], p.dstate[1][3])
