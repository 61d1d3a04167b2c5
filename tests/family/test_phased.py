"""Cells with a phase of the time step on the CPU kernels: layer norm, projection, zoneout, recurrent dropout."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from harness import DROPOUT_SEED, REFERENCE, BackendUnderTest, Case, problem, solve
from tolerances import assert_close, assert_identical

import fastlstm
from fastlstm import LSTM, ArgumentError
from fastlstm.backends.base import Dropout, Signature
from fastlstm.backends.cpu.backend import is_phased
from fastlstm.backends.layers import RECURRENT, ZONEOUT_C, ZONEOUT_H, Given, chosen, kept_mask, mask_key
from fastlstm.cell import ACTIVATIONS, Cell
from fastlstm.functional import lstm_backward, lstm_forward

CPU = BackendUnderTest("cpu")
FIELDS = [
    {"proj_size": 1},
    {"proj_size": 7},
    {"proj_size": 8, "peephole": True},
    {"proj_size": 3, "truncated": True},
    {"layer_norm": True},
    {"layer_norm": True, "peephole": True},
    {"layer_norm": True, "proj_size": 6, "truncated": True},
    {"zoneout": (0.3, 0.0)},
    {"zoneout": (0.0, 0.4)},
    {"zoneout": (0.3, 0.4), "peephole": True},
    {"zoneout": (0.3, 0.4), "truncated": True},
    {"zoneout": (0.3, 0.4), "proj_size": 5, "layer_norm": True},
    {"recurrent_dropout": 0.4},
    {"recurrent_dropout": 0.4, "zoneout": (0.2, 0.3), "proj_size": 5},
    {"recurrent_dropout": 0.4, "layer_norm": True, "reverse": True},
    {"peephole": True, "block_size": 2},
    {"peephole": True, "block_size": 3, "coupled": True, "truncated": True, "clip": 0.8},
    {"peephole": True, "block_size": 3, "layer_norm": True, "proj_size": 5, "cell_clip": 0.5},
    {"peephole": True, "block_size": 5, "forget_gate": False, "zoneout": (0.3, 0.4), "recurrent_dropout": 0.3},
]


@pytest.fixture(autouse=True)
def _needs_cpu():
    if CPU.missing:
        pytest.skip(CPU.missing)


def units(least, fields):
    """Return a number of hidden units that the blocks divide."""
    return least + -least % fields.get("block_size", 1)


def case_of(fields, *sizes, **more):
    steps, batch, inputs, hidden = sizes or (5, 4, 3, 11)
    return Case(steps, batch, inputs, units(hidden, fields), fields=tuple(fields.items()), **more)


def step_fields(rng):
    """Draw fields of the cell's own step, which every phase goes with; two that do not go together are drawn anew."""
    others = [str(name) for name in rng.choice([name for name in ACTIVATIONS if name != "1997"], 3)]
    choices = {
        "forget_gate": [False], "coupled": [True], "clip": [0.5, 0.9], "cell_clip": [0.3, 0.6],
        "activations": [("sigmoid", "1997", "1997"), tuple(others)],
    }  # fmt: skip
    return {name: values[rng.integers(len(values))] for name, values in choices.items() if rng.random() < 0.25}


def random_case(number):
    """Draw a combination of fields that these kernels have, and sizes."""
    rng, of_blocks, of_step = (np.random.default_rng([seed, number]) for seed in (25, 26, 27))
    choices = {
        "proj_size": [1, 3, 9], "layer_norm": [True], "recurrent_dropout": [0.3], "zoneout": [(0.2, 0.3), (0.0, 0.5)],
        "peephole": [True], "truncated": [True], "reverse": [True], "merge": ["sum", "mean", "product"],
    }  # fmt: skip
    while True:
        chance = rng.random(len(choices)) < 0.4
        drawn = {name: values[rng.integers(len(values))] for name, values in choices.items()}
        fields = {name: value for (name, value), is_in in zip(drawn.items(), chance, strict=True) if is_in}
        if fields.get("layer_norm") and "proj_size" in fields:  # of one feature, W_hh h hardly depends on its size
            fields["proj_size"] = max(3, fields["proj_size"])
        if "peephole" in fields and of_blocks.random() < 0.5:
            fields["block_size"] = int(of_blocks.choice([2, 3]))
        fields |= step_fields(of_step)
        bidirectional = bool(rng.random() < 0.4)
        try:
            if not is_phased(Cell(3, 12, bidirectional=bidirectional, **fields)):
                continue
        except ArgumentError:
            continue
        hidden = units(int(rng.choice([10, 11, 16, 20, 37, 70])), fields)
        sizes = int(rng.integers(1, 8)), int(rng.choice([1, 2, 5, 13, 40])), int(rng.integers(1, 9)), hidden
        return case_of(
            fields, *sizes, layers=int(rng.integers(1, 4)), bidirectional=bidirectional, bias=bool(rng.random() < 0.7),
            lengths=str(rng.choice(["zeros", "positive"])) if rng.random() < 0.5 else None, seed=number,
            resets=bool(rng.random() < 0.4), state=bool(rng.random() < 0.7), dropout=0.3 * (rng.random() < 0.3),
            batch_first=bool(rng.random() < 0.3),
        )  # fmt: skip


CASES = [
    *(case_of(fields) for fields in FIELDS),
    *(case_of(fields, 9, 26, 5, 37, lengths="zeros", resets=True, layers=2) for fields in FIELDS),
    *(case_of(f, 7, 70, 3, 20, lengths="positive", bidirectional=True) for f in FIELDS if "reverse" not in f),
    case_of({"layer_norm": True}, 3, 2, 150, 20),
    case_of({"proj_size": 130}, 3, 20, 4, 140),
    case_of({"proj_size": 3}, 2, 700, 3, 9),  # more rows in a step than are added to the weights' gradients at a time
    case_of({"proj_size": 3}, lengths=(0, 0, 0, 0)),
    case_of({"layer_norm": True}, lengths=(0, 0, 0, 0)),
    *map(random_case, range(60)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.sampled
def test_every_result_is_the_reference_s(case, dtype):
    assert is_phased(case.cell)
    p = problem(case)
    claim = "layer norm" if case.cell.layer_norm else "agreement"
    assert_close(claim, solve(p.astype(dtype), CPU), solve(p, REFERENCE), backend="cpu", dtype=dtype)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_without_masks_every_result_is_the_reference_s(fields, dtype):
    """No recurrent dropout, and zoneout by its expectation: inference, and a tape without a source of masks."""
    p = problem(case_of(fields, 6, 30, 3, 21, lengths="zeros", layers=2))
    found = []
    for backend, q in ((CPU, p.astype(dtype)), (REFERENCE, p)):
        given = backend.implementation.prepare(q.cell, Signature(6, 30, True, False))
        y, h_n, c_n, tape = given.forward(q.params, q.x, *q.state, q.lengths, None, False)
        grads = given.backward(q.params, tape, q.dy, *q.dstate)
        with backend.active():
            inferred, state = LSTM._from(q.cell, dict(q.params), False, 0)(q.x, q.state, q.lengths)
        results = {"y": y, "h": h_n, "c": c_n}
        if backend is CPU:
            assert_identical({"y": inferred, "h": state[0], "c": state[1]}, results)
        found.append(results | {"x": grads.x, "h0": grads.h0, "c0": grads.c0} | grads.params)
    claim = "layer norm" if p.cell.layer_norm else "agreement"
    assert_close(claim, found[0], found[1], backend="cpu", dtype=dtype)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_steps_and_chunks_give_the_whole_sequence(fields, dtype):
    if fields.get("reverse"):
        pytest.skip("a model that runs backwards in time cannot step")
    rng = np.random.default_rng(4)
    model = LSTM(5, units(21, fields), 2, dtype=dtype, seed=rng, **fields)
    x = rng.standard_normal((12, 2, 5)).astype(dtype)
    for each in (model, model.freeze()):
        y, (h_n, c_n) = each(x)
        state, steps = None, []
        for t in range(12):
            h, state = each.step(x[t], state)
            steps.append(h)
        first, between = each(x[:5])
        second, final = each(x[5:], between)
        found = {"steps": np.stack(steps), "h": state[0], "chunks": np.concatenate((first, second)), "c": final[1]}
        # Rows are summed in one order, whatever their number: also without freezing.
        assert_identical(found, {"steps": y, "h": h_n, "chunks": y, "c": c_n})


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_frozen_model_is_bit_identical_and_trains(fields, dtype):
    rng = np.random.default_rng(0)
    model = LSTM(5, units(21, fields), 2, dtype=dtype, seed=rng, **fields)
    x = rng.standard_normal((6, 3, 5)).astype(dtype)
    frozen, results = model.freeze(), []
    for each in (model, frozen, frozen):  # the first call of a frozen model packs
        each._dropout_key = 5
        y, state, tape = each.forward(x)
        grads = each.backward(tape, y, state)
        results.append({"y": y, "h": state[0], "x": grads.x, "c": grads.state[1], **grads.params})
    assert_identical(results[1], results[0])
    assert_identical(results[2], results[0])
    if is_phased(model.cell.in_inference):
        assert_identical({"y": frozen(x)[0]}, {"y": model(x)[0]})
    else:  # the kernels of a cell without phases sum in another order where weights are packed
        assert_close("agreement", {"y": frozen(x)[0]}, {"y": model(x)[0]}, backend="cpu", dtype=dtype)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_results_are_bit_identical_on_any_number_of_threads(fields, dtype):
    p, found = problem(case_of(fields, 9, 50, 20, 70, lengths="positive")).astype(dtype), []
    before = fastlstm.get_num_threads()
    try:
        for threads in (1, 2, 3):
            fastlstm.set_num_threads(threads)
            found.append(solve(p, CPU))
    finally:
        fastlstm.set_num_threads(before)
    assert_identical(found[1], found[0])
    assert_identical(found[2], found[0])


def test_each_mask_has_a_key_of_its_own():
    cell = Cell(2, 4, 3, zoneout=(0.3, 0.6), recurrent_dropout=0.25)
    for first, layer in ((0, 0), (0, 2), (2, 0)):  # the layer of a call, and that where the call stands in a run
        given = Given(cell, layer, None, None, Dropout(0.0, 11, first, 5), True, False)
        for direction in (0, 1):
            for kind in (RECURRENT, ZONEOUT_C, ZONEOUT_H):
                assert mask_key(given, direction, kind) == [11, first + layer, direction, kind]


def test_a_part_of_a_mask_is_that_part_of_the_whole():
    whole = chosen(np, 0.4, [11, 0, 0, ZONEOUT_C], (6, 50))
    for t in range(6):
        np.testing.assert_array_equal(chosen(np, 0.4, [11, 0, 0, ZONEOUT_C], (50,), 50 * t), whole[t])


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_models_are_saved_copied_and_pickled(fields, tmp_path):
    model = LSTM(4, units(10, fields), 2, seed=3, **fields)
    x = np.random.default_rng(0).standard_normal((5, 3, 4)).astype(np.float32)
    model.save(tmp_path / "model.safetensors")
    others = LSTM.load(tmp_path / "model.safetensors"), copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    y, trained = model(x)[0], model.forward(x)[0]
    for other in others:
        assert_identical({"y": other(x)[0], "trained": other.forward(x)[0]}, {"y": y, "trained": trained})


def test_masks_are_those_of_the_generator():
    """A state that is kept has the bits of the one before, and another has not: so the mask shows."""
    steps, batch, hidden, seed = 3, 5, 37, 11
    cell = Cell(2, hidden, dtype=np.float64, zoneout=(0.3, 0.6), recurrent_dropout=0.25)
    rng = np.random.default_rng(0)
    model = LSTM(2, hidden, dtype=np.float64, seed=0, zoneout=(0.3, 0.6), recurrent_dropout=0.25)
    x = rng.standard_normal((steps, batch, 2))
    state = tuple(rng.standard_normal((1, batch, hidden)) for _ in range(2))
    with CPU.active():
        y, (_, _), tape = lstm_forward(model.params, x, state, dropout_seed=seed, cell=cell)
    c_kept = chosen(np, 0.3, [seed, 0, 0, ZONEOUT_C], (steps, batch, hidden))
    h_kept = chosen(np, 0.6, [seed, 0, 0, ZONEOUT_H], (steps, batch, hidden))
    factors = kept_mask(np, 0.25, [seed, 0, 0, RECURRENT], (batch, hidden), np.float64)
    of_direction = tape.record.layers[0].directions[0]
    h = np.concatenate((state[0], y))
    c = of_direction.c_rows.reshape(steps, batch, -1)[..., :hidden]
    assert ((h[1:] == h[:-1]) == h_kept).all()
    assert ((c[1:] == c[:-1]) == c_kept[:-1]).all()
    assert_identical({"h": of_direction.h_rows.reshape(steps, batch, -1)[..., :hidden]}, {"h": h[:-1] * factors})


@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (3, False), (1, True), (2, True)])
@pytest.mark.parametrize("size", [1, 4, 6])
def test_projections_agree_with_torch(layers, bidirectional, size):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng([layers, bidirectional, size])
    directions = 1 + bidirectional
    given = {"bidirectional": bidirectional, "proj_size": size}
    model = LSTM(5, 9, layers, dtype=np.float64, seed=rng, **given)
    other = torch.nn.LSTM(5, 9, layers, dtype=torch.float64, **given)
    with torch.no_grad():
        for name, value in other.named_parameters():
            if name.startswith("bias_hh"):
                value.zero_()
            else:
                value.copy_(torch.from_numpy(model.params[name.replace("bias_ih", "bias")]))
    x, dy = rng.standard_normal((6, 4, 5)), rng.standard_normal((6, 4, size * directions))
    shapes = [(layers * directions, 4, features) for features in (size, 9)]
    states, dstates = ([rng.standard_normal(shape) for shape in shapes] for _ in range(2))
    y, (h_n, c_n), tape = model.forward(x, tuple(states))
    grads = model.backward(tape, dy, tuple(dstates))
    inputs = [torch.tensor(array, requires_grad=True) for array in (x, *states)]
    expected, final = other(inputs[0], tuple(inputs[1:]))
    loss = sum((one * torch.tensor(d)).sum() for one, d in zip((expected, *final), (dy, *dstates), strict=True))
    loss.backward()
    found = {"y": y, "h_n": h_n, "c_n": c_n, "dx": grads.x, "dh0": grads.state[0], "dc0": grads.state[1]}
    true = dict(zip(found, (expected.detach(), *(s.detach() for s in final), *(i.grad for i in inputs)), strict=True))
    for name, value in other.named_parameters():
        if not name.startswith("bias_hh"):
            true[name], found[name] = value.grad, grads.params[name.replace("bias_ih", "bias")]
    assert_close("torch", found, {n: v.numpy() for n, v in true.items()}, backend="cpu", dtype=np.float64)


AUTOGRAD = [
    {"layer_norm": True},
    {"layer_norm": True, "proj_size": 4},
    {"zoneout": (0.3, 0.4)},
    {"recurrent_dropout": 0.4},
    {"recurrent_dropout": 0.4, "zoneout": (0.3, 0.4), "proj_size": 4, "layer_norm": True},
]


def torch_loop(torch, cell, p, x, h, c, key):
    """One layer as a loop over time of torch's operations, with our masks."""
    steps, batch = x.shape[:2]
    shapes = {ZONEOUT_C: (steps, batch, cell.hidden_size), ZONEOUT_H: (steps, batch, cell.h_size)}
    kept = {
        kind: torch.tensor(chosen(np, cell.zoneout[kind - ZONEOUT_C], [key, 0, 0, kind], shape))
        for kind, shape in shapes.items()
    }
    factors = kept_mask(np, cell.recurrent_dropout, [key, 0, 0, RECURRENT], (batch, cell.h_size), np.float64)
    norm, outputs = torch.nn.functional.layer_norm, []
    for t in range(steps):
        a_x, a_h = x[t] @ p["weight_ih_l0"].T, (h * torch.tensor(factors)) @ p["weight_hh_l0"].T
        if cell.layer_norm:
            rows = a_x.shape[1:]
            a_x, a_h = norm(a_x, rows, p["ln_gain_ih_l0"]), norm(a_h, rows, p["ln_gain_hh_l0"])
        i, f, g, o = (a_x + a_h + p["bias_l0"]).chunk(4, dim=1)
        c_new = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        shown = norm(c_new, c_new.shape[1:], p["ln_gain_c_l0"], p["ln_bias_c_l0"]) if cell.layer_norm else c_new
        h_new = torch.sigmoid(o) * torch.tanh(shown)
        h_new = h_new @ p["weight_hr_l0"].T if cell.proj_size else h_new
        h, c = torch.where(kept[ZONEOUT_H][t], h, h_new), torch.where(kept[ZONEOUT_C][t], c, c_new)
        outputs.append(h)
    return torch.stack(outputs), h, c


@pytest.mark.parametrize("fields", AUTOGRAD, ids=str)
def test_torch_s_autograd_of_a_loop_agrees(fields):
    torch = pytest.importorskip("torch")
    p = problem(case_of(fields, 6, 5, 3, 9))
    with CPU.active():
        y, (h_n, c_n), tape = lstm_forward(p.params, p.x, p.state, dropout_seed=DROPOUT_SEED, cell=p.cell)
        grads = lstm_backward(p.params, tape, p.dy, p.dstate)
    params = {name: torch.tensor(value, requires_grad=True) for name, value in p.params.items()}
    x, h0, c0 = (torch.tensor(value, requires_grad=True) for value in (p.x, p.state[0][0], p.state[1][0]))
    out, h, c = torch_loop(torch, p.cell, params, x, h0, c0, DROPOUT_SEED)
    ((out * torch.tensor(p.dy)).sum() + (h * torch.tensor(p.dstate[0][0])).sum()
     + (c * torch.tensor(p.dstate[1][0])).sum()).backward()  # fmt: skip
    found = {"y": y, "h": h_n[0], "c": c_n[0], "dx": grads.x, "dh0": grads.state[0][0], "dc0": grads.state[1][0]}
    true = {"y": out.detach(), "h": h.detach(), "c": c.detach(), "dx": x.grad, "dh0": h0.grad, "dc0": c0.grad}
    found |= {f"d{name}": value for name, value in grads.params.items()}
    true |= {f"d{name}": value.grad for name, value in params.items()}
    assert_close("torch", found, {n: v.numpy() for n, v in true.items()}, backend="cpu", dtype=np.float64)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_gradients_by_the_states_of_each_step(fields):
    p = problem(case_of(fields, 6, 14, 3, 11, lengths="zeros", layers=2))
    found = []
    for backend in (CPU, REFERENCE):
        with backend.active():
            tape = lstm_forward(p.params, p.x, p.state, p.lengths, dropout_seed=5, cell=p.cell)[2]
            steps = lstm_backward(p.params, tape, p.dy, p.dstate, keep_state_gradients=True).steps
        found.append({"h": steps[0], "c": steps[1]})
    claim = "layer norm" if p.cell.layer_norm else "agreement"
    assert_close(claim, found[0], found[1], backend="cpu", dtype=np.float64)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_padding_reaches_nothing_and_nan_stays_in_its_sequence(fields, dtype):
    rng = np.random.default_rng(1)
    model = LSTM(3, units(13, fields), dtype=dtype, seed=rng, **fields)
    x, lengths = rng.standard_normal((6, 4, 3)).astype(dtype), np.array([6, 2, 4, 1])
    dirty, results = x.copy(), []
    for sequence, length in enumerate(lengths):
        dirty[length:, sequence] = np.nan
    for given in (x, dirty):
        model._dropout_key = 3
        y, state, tape = model.forward(given, None, lengths)
        grads = model.backward(tape, y, state)
        results.append({"y": y, "h": state[0], "c": state[1], **grads.params})
    assert_identical(results[1], results[0])
    y = model(x)[0]
    x[:, 1] = np.nan
    others = np.array([0, 2, 3])
    assert_identical({"y": model(x)[0][:, others]}, {"y": y[:, others]})
    assert np.isnan(model(x)[0][:, 1]).any()
