"""precision="tf32" and "bf16": which products they round, and where this is shown; on the stand-in for a GPU.

How far results may be from the reference follows from the formats. That products do round is seen where one product
decides the result: there it is that of rounded factors, to the last bits of float32.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import cuda_row
import numpy as np
import pytest
from harness import REFERENCE, Case, problem, solve
from host_cuda import FakeCupy, compiler
from host_cuda.fake_cublas import bf16, tf32
from tolerances import assert_close, assert_identical, normalised_error

import fastlstm
from fastlstm import LSTM, RNN
from fastlstm.backends.cuda import plans
from fastlstm.cell import Cell
from fastlstm.functional import lstm_backward, lstm_forward

needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
ROUND = {"tf32": tf32, "bf16": bf16}
FLOAT = np.dtype(np.float32)

# Both directions, several layers, ragged with lengths of 0, peepholes, more rows than a tile of the product has.
CASES = (
    Case(5, 3, 4, 8),
    Case(3, 5, 3, 20, 2, True, lengths="zeros", peephole=True),
    Case(2, 11, 3, 100, bias=False),
    Case(6, 2, 3, 20, resets=True),
)
OTHERS = (  # what runs in array operations
    Case(4, 3, 3, 8, fields=(("proj_size", 3),)),
    Case(4, 3, 3, 8, fields=(("nonlinearity", "tanh"),)),
)


@pytest.fixture(params=["tf32", "bf16"])
def precision(request):
    return request.param


@pytest.fixture(autouse=True)
def free(monkeypatch):
    monkeypatch.setattr(plans, "FORCED", None)


def rounded_solution(case, precision, **how):
    """Solve a case in a precision; all results on the host, and the library with its log."""
    p = problem(case).astype(np.float32)
    cell = dataclasses.replace(p.cell, precision=precision)
    with cuda_row.installed(FakeCupy(**{"architecture": "80", "multiprocessors": 132} | how)) as xp:
        params = {name: xp.array(value) for name, value in p.params.items()}
        state = p.state and tuple(map(xp.array, p.state))
        resets = None if p.resets is None else xp.array(p.resets)
        y, (h_n, c_n), tape = lstm_forward(params, xp.array(p.x), state, p.lengths, cell=cell, resets=resets)
        grads = lstm_backward(params, tape, xp.array(p.dy), tuple(map(xp.array, p.dstate)))
    found = {"y": y, "h_n": h_n, "c_n": c_n, "dx": grads.x, "dh0": grads.state[0], "dc0": grads.state[1]}
    found |= {f"d{name}": value for name, value in grads.params.items()}
    return {name: value.get() for name, value in found.items()}, xp


@needs_compiler
@pytest.mark.parametrize("path", ["step", "persistent"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_those_of_the_reference_within_the_format(monkeypatch, case, precision, path):
    monkeypatch.setattr(plans, "FORCED", path)
    found, _ = rounded_solution(case, precision)
    assert_close(precision, found, solve(problem(case), REFERENCE), backend="cuda", dtype=FLOAT)
    exact, _ = rounded_solution(case, "float32")
    assert normalised_error(found["y"], exact["y"]) > 1e-5  # it does round


@needs_compiler
@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_cells_of_several_phases_round_their_products_too(case, precision):
    found, _ = rounded_solution(case, precision)
    assert_close(precision, found, solve(problem(case), REFERENCE), backend="cuda", dtype=FLOAT)
    assert normalised_error(found["y"], rounded_solution(case, "float32")[0]["y"]) > 1e-5


def first_step(p, round_to):
    """The first step's h and c by NumPy, in float64 but for the factors of the products."""
    factor = lambda value: round_to(value.astype(np.float32)).astype(np.float64)  # noqa: E731
    a = factor(p.x[0]) @ factor(p.params["weight_ih_l0"]).T + factor(p.state[0][0]) @ factor(p.params["weight_hh_l0"]).T
    i, f, g, o = np.split(a + p.params["bias_l0"], 4, axis=1)
    i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
    c = f * p.state[1][0] + i * np.tanh(g)
    return o * np.tanh(c), c


@needs_compiler
@pytest.mark.parametrize(
    ("hidden", "path", "architecture"),  # blocks that exchange through flags, and a cluster
    [(8, "step", "80"), (8, "persistent", "80"), (100, "persistent", "80"), (100, "persistent", "90")],
)
def test_one_step_is_that_of_rounded_factors(monkeypatch, hidden, precision, path, architecture):
    monkeypatch.setattr(plans, "FORCED", path)
    case = Case(1, 11, 5, hidden)
    found, _ = rounded_solution(case, precision, architecture=architecture)
    h, c = first_step(problem(case), ROUND[precision])
    assert_close("agreement", {"y": found["y"][0], "c": found["c_n"][0]}, {"y": h, "c": c}, backend="cuda", dtype=FLOAT)


@needs_compiler
@pytest.mark.parametrize("architecture", ["00", "75"])
def test_older_gpus_compute_in_float32_and_say_so(precision, architecture):
    case = CASES[1]
    exact, _ = rounded_solution(case, "float32", architecture=architecture)
    assert_identical(rounded_solution(case, precision, architecture=architecture)[0], exact)
    with cuda_row.installed(FakeCupy(architecture=architecture)) as xp:
        said = LSTM(3, 8, precision=precision).to(xp).plan(xp.array(np.ones((9, 2, 3), np.float32)))
        assert said.endswith(f"; products in float32: {plans._FORMATS[precision]} needs compute capability 8.0")


@needs_compiler
def test_a_plan_says_what_products_round(precision):
    name = {"tf32": "TF32", "bf16": "bfloat16"}[precision]
    with cuda_row.installed(FakeCupy(architecture="90", multiprocessors=132)) as xp:
        x = xp.array(np.ones((9, 2, 3), np.float32))
        for model in (LSTM(3, 8, 2), LSTM(3, 8, proj_size=2), RNN(3, 8)):
            model.precision = precision
            assert all(line.endswith(f"; products in {name}") for line in model.to(xp).plan(x).splitlines()[1:])
            model.precision = "float32"
            assert "products in" not in model.to(xp).plan(x)


@needs_compiler
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_the_callers_cublas_modes_and_thread_are_left_as_they_were(precision):
    with cuda_row.installed(FakeCupy(architecture="80")) as xp:
        cublas, handle = xp.cuda.cublas, xp.cuda.device.get_cublas_handle()
        lstm, x = LSTM(3, 8, precision=precision, seed=0).to(xp), xp.array(np.ones((4, 2, 3), np.float32))
        expected = lstm(x)[0].get()
        cublas.setPointerMode(handle, 1)
        cublas.setMathMode(handle, 2)
        np.testing.assert_array_equal(lstm(x)[0].get(), expected)
        assert (cublas.getPointerMode(handle), cublas.getMathMode(handle)) == (1, 2)


@needs_compiler
def test_a_step_is_exact_and_a_backward_pass_has_the_precision_of_its_tape(precision):
    with cuda_row.installed(FakeCupy(architecture="80", multiprocessors=132)) as xp:
        lstm = LSTM(3, 8, seed=0).to(xp)
        x = xp.array(np.linspace(-1, 1, 30, dtype=np.float32).reshape(5, 2, 3))
        exact = lstm.step(x[0])[0].get()
        lstm.precision = precision
        np.testing.assert_array_equal(lstm.step(x[0])[0].get(), exact)
        y, _, tape = lstm.forward(x)
        expected = lstm.backward(tape, y).x.get()
        lstm.precision = "float32"
        np.testing.assert_array_equal(lstm.backward(tape, y).x.get(), expected)
        y_exact, _, tape_exact = lstm.forward(x)
        assert np.any(y_exact.get() != y.get()) and np.any(lstm.backward(tape_exact, y).x.get() != expected)


def test_numpy_arrays_are_computed_in_float32(precision):
    """A permission to round: a model that was trained with it runs on a CPU as it is, and better."""
    x = np.random.default_rng(0).random((6, 3, 4), np.float32)
    exact, rounded = (LSTM(4, 8, 2, precision=name, seed=0) for name in ("float32", precision))
    found = {}
    for name, model in (("exact", exact), ("rounded", rounded), ("frozen", rounded.freeze())):
        y, _, tape = model.forward(x)
        grads = model.backward(tape, y)
        found[name] = {"y": y, "dx": grads.x, **grads.params}
    assert_identical(found["rounded"], found["exact"])
    assert normalised_error(found["frozen"]["y"], found["exact"]["y"]) < 1e-6


def test_it_is_a_property_of_the_model_and_no_part_of_its_file(precision):
    lstm = LSTM(4, 8, precision=precision, seed=0)
    assert lstm.precision == precision and f"precision={precision!r}" in repr(lstm)
    assert LSTM(4, 8, seed=0).precision == "float32" and "precision" not in repr(LSTM(4, 8, seed=0))
    for other in (copy.copy(lstm), copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm)), lstm.freeze(), lstm.to(np)):
        assert other.precision == precision
    file, exact = io.BytesIO(), io.BytesIO()
    lstm.save(file)
    file.seek(0)
    assert LSTM.load(file).precision == "float32"
    LSTM(4, 8, seed=0).save(exact)
    assert file.getvalue() == exact.getvalue()
    assert "precision" not in lstm.cell.describe() and lstm.cell == Cell(**lstm.cell.describe())
    with pytest.raises(fastlstm.ModelFileError, match="does not know 'precision'"):
        fastlstm.storage.cell_from(lstm.cell.describe() | {"precision": "tf32"})


@pytest.mark.parametrize("wrong", ["fp16", "TF32", "", None, 32, True, np.float16, ["tf32"], b"tf32"])
@pytest.mark.parametrize("kind", [LSTM, RNN])
def test_another_name_is_an_error_and_changes_nothing(kind, wrong):
    with pytest.raises(fastlstm.ArgumentError, match="precision must be one of float32, tf32, bf16"):
        kind(3, 8, precision=wrong)
    model = kind(3, 8, precision="tf32")
    with pytest.raises(fastlstm.ArgumentError, match="precision must be one of float32, tf32, bf16"):
        model.precision = wrong
    assert model.precision == "tf32"


def test_float64_rounds_nothing(precision):
    with pytest.raises(fastlstm.ArgumentError, match=f"precision='{precision}' is for float32: a float64 model"):
        LSTM(3, 8, dtype=np.float64, precision=precision)
    model = LSTM(3, 8, dtype=np.float64)
    with pytest.raises(fastlstm.ArgumentError, match="is for float32"):
        model.precision = precision
    assert LSTM(3, 8, precision=precision).cell.with_dtype(np.float64).precision == "float32"
