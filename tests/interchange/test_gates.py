"""Weights gate by gate, or stacked in any order: every layout gives the model that the equations describe."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from harness import REFERENCE
from tolerances import BOUNDS, assert_identical, normalised_error

from fastlstm import LSTM, ArgumentError, ArrayTypeError, DTypeError, FastLSTMError, ShapeError

INPUTS, H = 3, 4


def gates(dtype=np.float64, seed=0, inputs=INPUTS, names="ifgo", peephole=False, bias=True):
    """Draw W, U, b and p of each gate."""
    rng = np.random.default_rng(seed)
    shapes = [(H, inputs), (H, H)] + [(H,)] * (bias + peephole)
    found = {}
    for name in names:
        arrays = [rng.normal(size=shape).astype(dtype) for shape in shapes]
        found[name] = tuple(arrays[:-1] if peephole and name == "g" else arrays)
    return found


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def by_the_book(weights, x):
    """The equations as a paper writes them, one sequence (T, I), gate by gate."""
    h, c, found = np.zeros(H), np.zeros(H), []
    for x_t in x:
        a = {name: w[0] @ x_t + w[1] @ h + (w[2] if len(w) > 2 else 0) for name, w in weights.items()}
        p = {name: w[3] if len(w) > 3 else 0 for name, w in weights.items()}
        i, f = sigmoid(a["i"] + p["i"] * c), sigmoid(a["f"] + p["f"] * c)
        c = f * c + i * np.tanh(a["g"])
        h = sigmoid(a["o"] + p["o"] * c) * np.tanh(c)
        found.append(h)
    return np.array(found)


def stacked(weights, order, interleaved=False, transposed=False):
    """Stack gates in an order, as another library would."""
    columns = []
    for k in range(max(map(len, weights.values()))):
        parts = [weights[name][k] for name in order if len(weights[name]) > k]
        if k == 3:
            columns.append(np.stack(parts))
            continue
        array = np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:]) if interleaved else np.concatenate(parts)
        columns.append(array.T if transposed else array)
    return tuple(columns)


@pytest.mark.parametrize("peephole", [False, True], ids=["plain", "peephole"])
def test_gates_by_name_compute_what_the_equations_say(peephole, dtype):
    weights = gates(dtype, peephole=peephole)
    x = np.random.default_rng(1).normal(size=(7, INPUTS)).astype(dtype)
    lstm = LSTM.from_gates(weights)
    assert lstm.cell.peephole is peephole and lstm.cell.dtype == dtype
    with REFERENCE.active():
        y, _ = lstm(x)
    assert normalised_error(y, by_the_book(weights, x)) < getattr(BOUNDS["agreement"], np.dtype(dtype).name)


@pytest.mark.parametrize("order", ["".join(p) for p in itertools.permutations("ifgo")])
def test_every_order_of_stacked_gates_gives_the_same_model(order):
    weights = gates(peephole=True)
    expected = LSTM.from_gates(weights).params
    given = stacked(weights, order)
    assert_identical(LSTM.from_gates(given, order).params, expected)
    assert_identical(LSTM.from_gates(given, order.replace("g", "c")).params, expected)
    assert_identical(LSTM.from_gates({name: weights[name] for name in order}).params, expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_layouts_of_stacked_gates(transposed, interleaved):
    """Keras stacks columns, Chainer goes unit by unit (a i f o), cuDNN and PyTorch stack rows."""
    weights = gates()
    given = stacked(weights, "gifo", interleaved, transposed)
    lstm = LSTM.from_gates(given, "aifo", interleaved=interleaved, transposed=transposed)
    assert_identical(lstm.params, LSTM.from_gates(weights).params)
    flipped = {name: tuple(a.T for a in arrays) for name, arrays in weights.items()}
    assert_identical(LSTM.from_gates(flipped, transposed=True).params, lstm.params)


def test_layers_directions_and_fields():
    forward = [gates(seed=k, inputs=INPUTS if k == 0 else 2 * H) for k in (0, 1)]
    back = [gates(seed=k + 5, inputs=INPUTS if k == 0 else 2 * H) for k in (0, 1)]
    lstm = LSTM.from_gates(forward, backward=back, dropout=0.5, activations=("sigmoid", "tanh", "relu"), seed=3)
    assert (lstm.cell.num_layers, lstm.cell.bidirectional, lstm.cell.dropout) == (2, True, 0.5)
    assert lstm.cell.activations == ("sigmoid", "tanh", "relu")
    np.testing.assert_array_equal(lstm.params["weight_hh_l1_reverse"][H : 2 * H], back[1]["f"][1])
    np.testing.assert_array_equal(lstm.params["bias_l0"][3 * H :], forward[0]["o"][2])


@pytest.mark.parametrize("field", [{"coupled": True}, {"forget_gate": False}], ids=str)
def test_a_cell_without_a_forget_gate_of_its_own(field):
    weights = gates(names="igo")
    lstm = LSTM.from_gates(weights, **field)
    assert lstm.params["weight_ih_l0"].shape == (3 * H, INPUTS)
    assert_identical(LSTM.from_gates(stacked(weights, "ogi"), "ogi", **field).params, lstm.params)
    with pytest.raises(ArgumentError, match="i, g, o"):
        LSTM.from_gates(gates(), **field)


W, U, B = np.ones((H, INPUTS)), np.ones((H, H)), np.ones(H)
ALL = {name: (W, U) for name in "ifgo"}
REFUSED = {
    "a missing gate": (({k: (W, U) for k in "ifg"},), {}, ArgumentError, "i, f, g, o"),
    "an unknown gate": (({k: (W, U) for k in "ifxo"},), {}, ArgumentError, "i, f, g, o"),
    "one gate under two names": (({k: (W, U) for k in "ifgc"},), {}, ArgumentError, "each once"),
    "no order": (((W, U),), {}, ArgumentError, "order is missing"),
    "an order that is not that of the mapping": ((ALL, "iofg"), {}, ArgumentError, "order is"),
    "rows that do not divide": (((np.ones((6, INPUTS)), U), "ifgo"), {}, ShapeError, "4 gates"),
    "a vector as a matrix": (({k: (B, U) for k in "ifgo"},), {}, ShapeError, "2 axes"),
    "gates of several sizes": ((ALL | {"o": (W[:2], U)},), {}, ShapeError, "one shape"),
    "gates of several dtypes": (
        (ALL | {"o": (W.astype("f4"), U)},), {}, DTypeError, "one dtype"
    ),
    "matrices of two dtypes": (({k: (W.astype("f4"), U) for k in "ifgo"},), {}, DTypeError, "one dtype"),
    "a bias of one gate": ((ALL | {"i": (W, U, B)},), {}, ArgumentError, "only: i"),
    "float16": (({k: (W.astype("f2"), U.astype("f2")) for k in "ifgo"},), {}, DTypeError, "float16"),
    "lists of numbers": (({k: (W.tolist(), U.tolist()) for k in "ifgo"},), {}, ArrayTypeError, "numpy.asarray"),
    "an order that is a number": (((W, U), 3), {}, ArgumentError, "order must be a string"),
    "a flag that is no bool": (((W, U), "ifgo"), {"transposed": "no"}, ArgumentError, "transposed must be True"),
    "another flag that is no bool": (((W, U), "ifgo"), {"interleaved": 1}, ArgumentError, "interleaved must be True"),
    "no layers": (([],), {}, ArgumentError, "at least one layer"),
    "an array": ((W, "ifgo"), {}, ArgumentError, "mapping"),
    "a number": ((3,), {}, ArgumentError, "mapping"),
    "another number of reverse layers": (
        (ALL,), {"backward": [1, 2]}, ArgumentError, "backward has 2"
    ),
    "a field that shows in the weights": ((ALL,), {"layer_norm": True}, ArgumentError, "layer_norm"),
    "two biases for each gate": (({k: (W, U, B, B) for k in "ifgo"},), {}, ArgumentError, "g has no peephole.*add"),
    "a peephole of g, called c": (({k: (W, U, B, B) for k in "ifco"},), {}, ArgumentError, "g has no peephole"),
    "stacked peepholes of four gates": (
        ((np.ones((4 * H, INPUTS)), np.ones((4 * H, H)), np.ones(4 * H), np.ones((4, H))), "ifgo"), {}, ShapeError,
        "one row for each of i, f, o",
    ),
    "two stacked biases": (
        ((np.ones((4 * H, INPUTS)), np.ones((4 * H, H)), *[np.ones(4 * H)] * 2), "ifgo"), {}, ShapeError, "2 axes"
    ),
    "a mapping, interleaved": ((ALL,), {"interleaved": True}, ArgumentError, "interleaved=True is for stacked"),
    "a recurrent matrix that is not square": (({k: (W, W) for k in "ifgo"},), {}, ShapeError, "shape"),
}  # fmt: skip


def test_a_fourth_array_of_g_may_be_none():
    weights = gates(peephole=True)
    padded = weights | {"g": (*weights["g"], None)}
    assert_identical(LSTM.from_gates(padded).params, LSTM.from_gates(weights).params)


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    arguments, options, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as caught:
        LSTM.from_gates(*arguments, **options)
    assert isinstance(caught.value, FastLSTMError)


@pytest.mark.parametrize("pair", list(itertools.combinations("ifgo", 2)), ids="".join)
def test_swapping_any_two_gates_would_be_seen(pair):
    """The test of the test: in any one array, exchanged gates give something else."""
    weights = gates(peephole=True)
    x = np.random.default_rng(1).normal(size=(7, INPUTS))
    expected = by_the_book(weights, x)
    for k in range(3):
        swapped = {name: list(arrays) for name, arrays in weights.items()}
        one, other = pair
        swapped[one][k], swapped[other][k] = swapped[other][k], swapped[one][k]
        with REFERENCE.active():
            y, _ = LSTM.from_gates({name: tuple(arrays) for name, arrays in swapped.items()})(x)
        assert normalised_error(y, expected) > 1e6 * BOUNDS["agreement"].float64, k
