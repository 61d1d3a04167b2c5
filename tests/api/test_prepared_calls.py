"""Prepared calls: a call whose signature is known skips most checks, and gives or raises what the first call would."""

from __future__ import annotations

import copy
import pickle
import types
from typing import NamedTuple

import numpy as np
import pytest
from harness import BackendUnderTest
from layouts import LAYOUTS, cleaned, lay_out
from tolerances import assert_identical

import fastlstm
from fastlstm import LSTM, calls, checks
from fastlstm.backends.plain_arrays import as_plain
from fastlstm.functional import lstm_backward, lstm_forward

CPU = BackendUnderTest("cpu")
needs_cpu = pytest.mark.skipif(bool(CPU.missing), reason=str(CPU.missing))


class Given(NamedTuple):
    """The arguments of a call, as a caller has them."""

    params: dict
    x: object
    state: object = None
    dy: object = None
    lengths: object = None


class Model(NamedTuple):
    """What makes a model, and how it is called."""

    steps: int
    batch: int
    inputs: int
    hidden: int
    options: dict = {}  # noqa: RUF012  # of LSTM's constructor
    batch_first: bool = False
    batched: bool = True
    ragged: bool = False
    frozen: bool = False
    stated: bool = True

    def new(self, dtype):
        """A model that was never called: nothing is prepared for it."""
        return LSTM(self.inputs, self.hidden, batch_first=self.batch_first, dtype=dtype, seed=0, **self.options)

    def given(self, dtype, backend, seed=0):
        """Arguments of calls; others for another seed."""
        rng, lstm = np.random.default_rng([seed, *self[:4]]), self.new(dtype)
        outer = (self.batch, self.steps) if self.batch_first else (self.steps, self.batch)
        outer, middle = (outer, (self.batch,)) if self.batched else (outer[:1], ())

        def draw(*shape):
            return backend.array(rng.normal(size=shape).astype(dtype))

        params = {name: backend.array(rng.normal(size=value.shape).astype(dtype) / 3)
                  for name, value in lstm.params.items()}  # fmt: skip
        states = lstm.cell.num_layers * lstm.cell.num_directions, *middle, self.hidden
        return Given(
            params, draw(*outer, self.inputs), (draw(*states), draw(*states)) if self.stated else None,
            draw(*outer, lstm.cell.output_size), rng.integers(0, self.steps + 1, self.batch) if self.ragged else None,
        )  # fmt: skip


def host(backend, named):
    return {name: backend.host(value) for name, value in named.items()}


def gradients(grads):
    return {"dx": grads.x, "dh0": grads.state[0], "dc0": grads.state[1]} | {
        f"d{name}": value for name, value in grads.params.items()
    }


def infer(lstm, given):
    lstm.params = given.params
    y, (h_n, c_n) = lstm(given.x, given.state, given.lengths)
    return {"y": y, "h_n": h_n, "c_n": c_n}


def train(lstm, given, **options):
    lstm.params = given.params
    y, (h_n, c_n), tape = lstm.forward(given.x, given.state, given.lengths, **options)
    return {"y": y, "h_n": h_n, "c_n": c_n} | gradients(lstm.backward(tape, given.dy))


def train_saving_memory(lstm, given):
    return train(lstm, given, recompute=True)


def step(lstm, given):
    lstm.params = given.params
    first = (slice(None), 0) if lstm.batch_first and given.x.ndim == 3 else 0
    h, (h_n, c_n) = lstm.step(given.x[first], given.state)
    return {"h": h, "h_n": h_n, "c_n": c_n}


def as_functions(lstm, given):
    options = {"batch_first": lstm.batch_first, "dropout": lstm.cell.dropout}
    y, (h_n, c_n), tape = lstm_forward(given.params, given.x, given.state, given.lengths, **options)
    return {"y": y, "h_n": h_n, "c_n": c_n} | gradients(lstm_backward(given.params, tape, given.dy))


WAYS = {
    "inference": infer,
    "training": train,
    "recompute": train_saving_memory,
    "step": step,
    "functions": as_functions,
}
MODELS = {
    "plain, short": Model(3, 2, 5, 19),
    "plain, long": Model(20, 3, 5, 19),
    "one step": Model(1, 1, 5, 8),
    "zeros": Model(3, 2, 5, 19, stated=False),
    "no bias": Model(3, 2, 5, 19, {"bias": False}),
    "batch first": Model(20, 3, 5, 19, batch_first=True),
    "unbatched": Model(4, 1, 5, 19, batched=False),
    "unbatched, batch first": Model(20, 1, 5, 8, batch_first=True, batched=False),
    "layers": Model(3, 2, 5, 19, {"num_layers": 3}),
    "layers, long": Model(20, 3, 5, 19, {"num_layers": 2}),
    "bidirectional": Model(12, 3, 5, 19, {"bidirectional": True}),
    "bidirectional layers, batch first": Model(12, 3, 5, 8, {"num_layers": 2, "bidirectional": True}, True),
    "ragged": Model(12, 4, 5, 19, ragged=True),
    "ragged bidirectional layers": Model(12, 4, 5, 8, {"num_layers": 2, "bidirectional": True}, ragged=True),
    "peepholes": Model(12, 3, 5, 19, {"peephole": True}),
    "peepholes, step": Model(1, 1, 5, 19, {"peephole": True, "num_layers": 2}),
    "frozen": Model(20, 3, 5, 19, frozen=True),
    "frozen, one step": Model(1, 2, 5, 19, {"num_layers": 2}, frozen=True),
    "frozen, unbatched": Model(2, 1, 5, 19, batched=False, frozen=True),
    "frozen peepholes, ragged": Model(12, 4, 5, 8, {"peephole": True, "bidirectional": True}, ragged=True, frozen=True),
}
# Whatever the call, these have to be looked at: they are no arrays of the model's kind.
ALWAYS = {"lengths", "flag", "dropout_seed"}


@pytest.fixture
def entered(monkeypatch):
    """Note the names of the checks that are entered."""
    found = []
    for name in checks.__all__:
        check = getattr(checks, name)
        monkeypatch.setattr(
            checks,
            name,
            lambda *given, _name=name, _check=check, **named: found.append(_name) or _check(*given, **named),
        )
    return found


def frozen_if(model, lstm, given):
    """Freeze parameters for a model that is frozen."""
    if not model.frozen:
        return given
    lstm.params = given.params
    return given._replace(params=lstm.freeze().params)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_the_second_call_enters_no_checks_and_gives_what_a_first_one_gives(backend, dtype, name, way, entered):
    model, run = MODELS[name], WAYS[way]
    if model.frozen and not backend.is_numpy:
        pytest.skip("only models of NumPy arrays can be frozen")
    if way == "step" and model.options.get("bidirectional"):
        pytest.skip("a bidirectional model takes no steps")
    calls._cells.clear()
    lstm = model.new(dtype)
    given = [frozen_if(model, lstm, model.given(dtype, backend, seed)) for seed in (0, 1)]
    entered.clear()
    run(lstm, given[0])
    assert {"params", "array"} <= set(entered), "the first call is checked"
    for arguments in (*given, given[0]):
        entered.clear()
        found = run(lstm, arguments)
        needed = {"lengths"} if model.ragged and way != "step" else set()
        assert set(entered) <= ALWAYS and needed <= set(entered)
        entered.clear()
        calls._cells.clear()
        expected = run(model.new(dtype), arguments)  # each first call is checked
        assert "array" in entered
        assert list(found) == list(expected)
        assert_identical(host(backend, found), host(backend, expected))
        # What a caller gets he may do with as he likes; those of a caller with other axes are views.
        assert not (model.batched and not model.batch_first) or all(v.flags.c_contiguous for v in found.values())


# T, B, I, H: short calls, at whose shapes the kernels look, and longer ones
SIZES = [
    (1, 1, 5, 3),
    (1, 1, 32, 64),
    (1, 8, 7, 33),
    (4, 2, 9, 20),
    (16, 1, 3, 17),
    (17, 1, 3, 17),
    (2, 2, 300, 400),  # a short call only on the way back
    (9, 1, 300, 400),
    (30, 20, 9, 40),
]


@needs_cpu
@pytest.mark.parametrize("stated", [True, False], ids=["state", "zeros"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_calls_of_any_size_are_bit_identical_to_a_first_call(dtype, size, bias, stated):
    model = Model(*size, {"bias": bias}, stated=stated)
    given = model.given(dtype, CPU)
    before = copy.deepcopy(given)
    with CPU.active():
        expected, lstm = train(model.new(dtype), given), model.new(dtype)
        assert expected["dx"].shape == given.x.shape
        for _ in range(3):
            found = train(lstm, given)
            assert_identical(found, expected)
            assert all(value.flags.carray for value in found.values())
    assert_identical({"x": given.x, "dy": given.dy} | given.params, {"x": before.x, "dy": before.dy} | before.params)


@pytest.mark.parametrize("size", [(0, 3, 4, 5), (3, 0, 4, 5)], ids=str)
def test_of_nothing_the_second_call_gives_nothing_too(backend, dtype, size):
    model = Model(*size)
    given, lstm = model.given(dtype, backend), model.new(dtype)
    for _ in range(2):
        found = host(backend, train(lstm, given))
        assert_identical(
            {"h_n": found["h_n"], "c_n": found["c_n"]},
            {name: backend.host(array) for name, array in zip(("h_n", "c_n"), given.state, strict=True)},
        )
        assert not any(value.any() for name, value in found.items() if name.startswith("dw") or name == "dbias_l0")


@pytest.mark.parametrize("size", [(2, 2, 5, 19), (20, 3, 5, 19)], ids=str)
def test_a_tape_keeps_what_its_backward_pass_needs(backend, dtype, size):
    model = Model(*size)
    given, lstm = model.given(dtype, backend), model.new(dtype)
    expected = host(backend, train(lstm, given))
    y, end, tape = lstm.forward(given.x, given.state)
    for array in (y, *given.state, *end):
        array[...] = np.nan  # nothing of which belongs to the tape
    for _ in range(2):
        found = gradients(lstm.backward(tape, given.dy))
        on_host = host(backend, found)
        assert_identical(on_host, {name: expected[name] for name in found})
        for array in found.values():
            array[...] = np.nan


# --- what a caller can change between two calls of one signature -------------------------------------------------


def replaced(given, name, array):
    """Put an array in the place of one of the arguments."""
    if name in ("x", "dy"):
        return given._replace(**{name: array})
    if name in ("h0", "c0"):
        return given._replace(
            state=tuple(array if n == name else s for n, s in zip(("h0", "c0"), given.state, strict=True))
        )
    return given._replace(params=given.params | {name: array})


def named(given):
    return {"x": given.x, "dy": given.dy, "h0": given.state[0], "c0": given.state[1]} | given.params


LAID_OUT = {
    "small batch": Model(2, 3, 4, 18),
    "large batch": Model(20, 3, 4, 18),
    "peepholes": Model(2, 3, 4, 18, {"peephole": True}),
    "batch first": Model(20, 3, 4, 18, batch_first=True),
    "two layers": Model(2, 3, 4, 18, {"num_layers": 2}),
    "bidirectional": Model(6, 3, 4, 18, {"bidirectional": True}),
}


@needs_cpu
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "clean"])
@pytest.mark.parametrize("name", LAID_OUT)
def test_an_array_may_have_another_layout_than_in_the_call_before(dtype, name, layout):
    model = LAID_OUT[name]
    given, lstm = model.given(dtype, CPU), model.new(dtype)
    ways = {"training": train, "inference": infer} | ({} if model.options.get("bidirectional") else {"step": step})
    with CPU.active():
        for run in ways.values():
            usual = run(lstm, given)
            for which, value in named(given).items():
                changed = replaced(given, which, lay_out(layout, value))
                plain = replaced(given, which, cleaned(named(changed)[which]))
                assert_identical(run(lstm, changed), run(model.new(dtype), plain))
            assert_identical(run(lstm, given), usual)


@needs_cpu
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "clean"])
@pytest.mark.parametrize("steps", [1, 20])
def test_an_input_of_a_frozen_model_may_have_another_layout_than_in_the_call_before(dtype, steps, layout):
    model = Model(steps, 3, 4, 18, {"num_layers": 2}, frozen=True)
    lstm = model.new(dtype)
    given = frozen_if(model, lstm, model.given(dtype, CPU))
    with CPU.active():
        for run in (infer, train, step):
            usual = run(lstm, given)
            for which in ("x", "dy", "h0", "c0"):
                changed = replaced(given, which, lay_out(layout, named(given)[which]))
                plain = replaced(given, which, cleaned(named(changed)[which]))
                assert_identical(run(lstm, changed), run(model.new(dtype), plain))
            assert_identical(run(lstm, given), usual)


REFUSED = {
    "a step of an input that is a part": (step, "x", "every_other"),
    "a step of an input to read only": (step, "x", "read_only"),
    "a state that is a part": (infer, "h0", "every_other"),
    "a weight in Fortran order": (infer, "weight_hh_l0", "fortran"),
    "training from a state that is a part": (train, "c0", "every_other"),
    "training with a weight in Fortran order": (train, "weight_ih_l0", "fortran"),
    "training with a bias to read only": (train, "bias_l0", "read_only"),
}


@pytest.fixture
def refused():
    """Note the kernels that refuse their arguments."""
    if CPU.missing:
        pytest.skip(str(CPU.missing))
    from fastlstm.kernels.cpu.dispatcher import RefusingKernel

    found, call = [], RefusingKernel.__call__

    def note(kernel, *arguments):
        try:
            return call(kernel, *arguments)
        except TypeError:
            found.append(kernel.__name__)
            raise

    RefusingKernel.__call__ = note
    yield found
    del RefusingKernel.__call__


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("what", REFUSED)
def test_an_array_that_numba_refuses_is_not_handed_over_again(dtype, what, frozen, refused):
    """It takes a hundred microseconds or more to say so: in a closed loop, at every step."""
    run, which, layout = REFUSED[what]
    if frozen and "weight" in which + what:
        pytest.skip("those of a frozen model are its own")
    model = Model(1, 3, 4, 18, frozen=frozen)
    lstm = model.new(dtype)
    given = frozen_if(model, lstm, model.given(dtype, CPU))
    given = replaced(given, which, lay_out(layout, named(given)[which]))
    with CPU.active():
        run(lstm, given)
        refused.clear()
        for _ in range(3):
            run(lstm, given)
    assert not refused


@pytest.mark.parametrize("layout", ["foreign", "unaligned", "read_only", "fortran", "negative", "mapped"])
def test_as_plain_copies_to_native_numbers(dtype, layout):
    given = lay_out(layout, np.random.default_rng(0).normal(size=(3, 4, 5)).astype(dtype))
    before = given.tobytes()
    plain = as_plain(given)
    assert type(plain) is np.ndarray and plain.dtype == dtype and plain.flags.carray
    assert not np.shares_memory(plain, given) and given.tobytes() == before
    np.testing.assert_array_equal(plain, given)
    assert as_plain(plain) is plain


def _params(name, value):
    def change(given, backend):
        return given._replace(params=given.params | {name: value(given.params.get(name), backend)})

    return change


def _argument(name, value):
    return lambda given, backend: given._replace(**{name: value(getattr(given, name), backend)})


def _without(name):
    return lambda given, _: given._replace(params={key: value for key, value in given.params.items() if key != name})


def _other(array, _):
    """The other dtype that models may have: no kernel would find anything wrong."""
    return array.astype(np.float64 if array.dtype == np.float32 else np.float32)


def _half(array, _):
    return array.astype(np.float16)


def _masked(array, backend):
    return np.ma.masked_array(backend.host(array))


def _listed(array, backend):
    return backend.host(array).tolist()


def _of_the_other_library(array, backend):
    """Of NumPy for a model on the GPU; for one on the host, of the stand-in for CuPy, if it can run."""
    return backend.host(array) if not backend.is_numpy else _on_gpu(array)


def _on_gpu(array):
    other = BackendUnderTest("cuda")
    if other.missing:
        pytest.skip(other.missing)
    return other.array(array)


def _state(h=None, c=None):
    def change(state, backend):
        return (h or _same)(state[0], backend), (c or _same)(state[1], backend)

    return _argument("state", change)


def _same(array, _):
    return array


BAD = {
    "x of the other dtype": _argument("x", _other),
    "x of half precision": _argument("x", _half),
    "x a list": _argument("x", _listed),
    "x masked": _argument("x", _masked),
    "x of the other library": _argument("x", _of_the_other_library),
    "x too wide": _argument("x", lambda x, _: x[..., [0, 1, 2, 3, 4, 5, 6, 0]]),
    "h0 of the other dtype": _state(h=_other),
    "c0 of half precision": _state(c=_half),
    "h0 masked": _state(h=_masked),
    "h0 of the other library": _state(h=_of_the_other_library),
    "h0 of another batch": _state(h=lambda h, _: h[:, :1]),
    "c0 of another batch": _state(c=lambda c, _: c[:, :1]),
    "states of another batch": _state(lambda h, _: h[:, :1], lambda c, _: c[:, :1]),
    "states of more layers": _state(*(2 * [lambda s, backend: backend.array(np.repeat(backend.host(s), 2, axis=0))])),
    "states without a batch": _state(*(2 * [lambda s, _: s[:, 0]])),
    "a state that is a list of wrong things": _argument("state", lambda state, _: [state[0], 3]),
    "a state of three": _argument("state", lambda state, _: (*state, state[0])),
    "a state of one": _argument("state", lambda state, _: state[:1]),
    "a state of one and None": _argument("state", lambda state, _: (state[0], None)),
    "one array for a state": _argument("state", lambda state, _: state[0]),
    "dy of the other dtype": _argument("dy", _other),
    "dy of half precision": _argument("dy", _half),
    "dy of the other library": _argument("dy", _of_the_other_library),
    "no dy": _argument("dy", lambda dy, _: None),
    "dy a list": _argument("dy", _listed),
    "dy masked": _argument("dy", _masked),
    "dy of other axes, as many numbers": _argument("dy", lambda dy, _: dy.swapaxes(0, 1)),
    "dy without a batch": _argument("dy", lambda dy, _: dy[:, 0]),
    "weight_hh missing": _without("weight_hh_l0"),
    "no bias": _without("bias_l0"),
    "a parameter too many": _params("bias_l1", lambda _, backend: backend.array(np.zeros(3))),
    "another name": lambda given, _: given._replace(
        params={"bias" if name == "bias_l0" else name: value for name, value in given.params.items()}
    ),
    "weight_ih of the other dtype": _params("weight_ih_l0", _other),
    "weight_ih of the other library": _params("weight_ih_l0", _of_the_other_library),
    "weight_ih transposed": _params("weight_ih_l0", lambda value, _: value.T),
    "weight_ih masked": _params("weight_ih_l0", _masked),
    "weight_hh too small": _params("weight_hh_l0", lambda value, _: value[:-4]),
    "weight_hh of half precision": _params("weight_hh_l0", _half),
    "weight_hh None": _params("weight_hh_l0", lambda _, __: None),
    "bias too short": _params("bias_l0", lambda value, _: value[:-1]),
    "bias of two axes": _params("bias_l0", lambda value, _: value[None]),
    "bias a list": _params("bias_l0", _listed),
    "all of the other dtype": lambda given, backend: given._replace(
        params={name: _other(value, backend) for name, value in given.params.items()}
    ),
}
OF_FORWARD = [name for name in BAD if "dy" not in name.split()[:2]]
OF_BACKWARD = [name for name in BAD if name.split()[0] not in ("x", "h0", "c0") and "state" not in name]


def error_of(call):
    with pytest.raises(fastlstm.FastLSTMError) as found:
        call()
    return type(found.value), str(found.value)


@pytest.mark.parametrize("change", OF_FORWARD)
@pytest.mark.parametrize("steps", [3, 30])
def test_prepared_calls_raise_the_errors_of_a_first_call(backend, dtype, steps, change):
    model = Model(steps, 2, 7, 5)
    given, lstm = model.given(dtype, backend), model.new(dtype)
    for run in (infer, train, step):
        usual = host(backend, run(lstm, given))
        bad = BAD[change](given, backend)
        assert error_of(lambda run=run, bad=bad: run(lstm, bad)) == error_of(
            lambda run=run, bad=bad: run(model.new(dtype), bad)
        )
        assert_identical(host(backend, run(lstm, given)), usual)


@pytest.mark.parametrize("change", OF_BACKWARD)
@pytest.mark.parametrize("steps", [3, 30])
def test_errors_after_the_forward_pass_are_reported(backend, dtype, steps, change):
    model = Model(steps, 2, 7, 5)
    given, lstm = model.given(dtype, backend), model.new(dtype)
    bad = BAD[change](given, backend)

    def late(lstm):
        lstm.params = given.params
        tape = lstm.forward(given.x, given.state)[2]
        lstm.params = bad.params
        lstm.backward(tape, bad.dy)

    usual = host(backend, train(lstm, given))
    expected = error_of(lambda: late(model.new(dtype)))
    assert error_of(lambda: late(lstm)) == expected
    assert_identical(host(backend, train(lstm, given)), usual)


def test_a_state_may_be_a_list_or_missing_and_come_back(backend, dtype):
    model = Model(3, 2, 5, 19)
    given, lstm = model.given(dtype, backend), model.new(dtype)
    for run in (infer, train, step):
        for state in (given.state, None, list(given.state), given.state):
            changed = given._replace(state=state)
            assert_identical(host(backend, run(lstm, changed)), host(backend, run(model.new(dtype), changed)))


def test_parameters_may_be_changed_in_place_or_replaced(backend, dtype):
    model = Model(20, 3, 5, 19, {"num_layers": 2})
    given, lstm = model.given(dtype, backend), model.new(dtype)
    first = host(backend, train(lstm, given))
    given.params["weight_hh_l1"] *= 2
    second = host(backend, train(lstm, given))
    assert_identical(second, host(backend, train(model.new(dtype), given)))
    given.params["weight_hh_l1"] = given.params["weight_hh_l1"] / 2
    assert_identical(host(backend, train(lstm, given)), first)
    assert not np.array_equal(first["y"], second["y"])
    read_only = given._replace(params=types.MappingProxyType(dict(given.params)))
    for _ in range(2):
        assert_identical(host(backend, train(lstm, read_only)), first)


def test_the_tape_of_one_mapping_goes_back_through_an_equal_one(backend, dtype):
    model = Model(6, 3, 5, 19)
    given, lstm = model.given(dtype, backend), model.new(dtype)
    expected = host(backend, train(lstm, given))
    tape = lstm.forward(given.x, given.state)[2]
    lstm.params = {name: value.copy() for name, value in reversed(given.params.items())}
    found = host(backend, gradients(lstm.backward(tape, given.dy)))
    assert_identical(found, {name: expected[name] for name in found})


@needs_cpu
def test_another_backend_may_be_forced_between_two_calls(dtype):
    model = Model(6, 3, 5, 19)
    given, lstm = model.given(dtype, CPU), model.new(dtype)
    expected = {}
    for name in ("cpu", "reference"):
        with fastlstm.use_backend(name):
            expected[name] = {way.__name__: way(model.new(dtype), given) for way in (infer, train, step)}
    assert not np.array_equal(expected["cpu"]["train"]["dx"], expected["reference"]["train"]["dx"])
    for name in ("cpu", "reference", "reference", "cpu", "cpu"):
        with fastlstm.use_backend(name):
            for way in (infer, train, step):
                assert_identical(way(lstm, given), expected[name][way.__name__])
            assert lstm.forward(given.x)[2].call.backend == name
    tape = lstm.forward(given.x, given.state)[2]
    with fastlstm.use_backend("reference"):  # a tape stays its backend's
        found = gradients(lstm.backward(tape, given.dy))
    assert_identical(found, {name: expected["cpu"]["train"][name] for name in found})
    if not BackendUnderTest("cuda").missing:
        with BackendUnderTest("cuda").active():
            error = error_of(lambda: infer(lstm, given))
        assert error[0] is fastlstm.BackendError and "'cuda' was forced" in error[1]
    assert_identical(infer(lstm, given), expected["cpu"]["infer"])


@needs_cpu
def test_a_model_may_be_moved_between_two_calls(dtype):
    gpu = BackendUnderTest("cuda")
    if gpu.missing:
        pytest.skip(gpu.missing)
    model = Model(6, 3, 5, 19)
    given, there = model.given(dtype, CPU), model.given(dtype, gpu)
    lstm = model.new(dtype)
    lstm.params = given.params
    with gpu.active():
        moved = lstm.to(__import__("cupy"))
        expected = {way: gpu.host(way(model.new(dtype), there)["h_n"]) for way in (infer, train, step)}
    moved.cell = lstm.cell  # so that both look among the same prepared calls
    for _ in range(3):
        for way in (infer, train, step):
            with gpu.active():
                np.testing.assert_array_equal(gpu.host(way(moved, there)["h_n"]), expected[way])
            with CPU.active():
                found = way(lstm, given)
                assert_identical(found, way(model.new(dtype), given))
    with gpu.active():
        error = error_of(lambda: infer(moved, there._replace(x=given.x)))
        assert error[0] is fastlstm.ArrayTypeError and "numpy" in error[1]


@needs_cpu
def test_frozen_parameters_may_be_given_to_other_models(dtype):
    model = Model(3, 2, 5, 19)
    given = [model.given(dtype, CPU, seed) for seed in (0, 1)]
    other = Model(3, 2, 5, 19, {"bias": False})
    with CPU.active():
        frozen = [frozen_if(model._replace(frozen=True), model.new(dtype), each) for each in given]
        expected = [{way: way(model.new(dtype), each) for way in (infer, train, step)} for each in frozen]
        changeable = [{way: way(model.new(dtype), each) for way in (infer, train, step)} for each in given]
        lstm, unbiased, dropping = model.new(dtype), other.new(dtype), LSTM(5, 19, dropout=0.5, dtype=dtype, seed=0)
        plain = other.given(dtype, CPU)
        for turn in (0, 1, 0, 0):
            for way in (infer, train, step):
                assert_identical(way(lstm, frozen[turn]), expected[turn][way])
                # Of a model that is not the one that was frozen, they are parameters like any others.
                assert_identical(way(dropping, frozen[turn]), changeable[turn][way])
                assert_identical(way(lstm, given[turn]), changeable[turn][way])
                way(unbiased, plain)
                for _ in range(2):
                    error = error_of(lambda way=way, turn=turn: way(unbiased, frozen[turn]))
                    assert error[0] is fastlstm.ArgumentError and "bias_l0" in error[1]
        # The tape of one kind of parameters goes back through the other.
        for one, two in ((frozen[0], given[0]), (given[0], frozen[0])):
            lstm.params = one.params
            tape = lstm.forward(one.x, one.state)[2]
            lstm.params = two.params
            found = gradients(lstm.backward(tape, one.dy))
            right = (expected if one is frozen[0] else changeable)[0][train]
            assert_identical(found, {name: right[name] for name in found})


@needs_cpu
def test_frozen_parameters_with_and_without_peepholes_are_told_apart(dtype):
    plain, with_peepholes = Model(3, 2, 5, 19, frozen=True), Model(3, 2, 5, 19, {"peephole": True}, frozen=True)
    models = [(model, model.new(dtype)) for model in (plain, with_peepholes)]
    given = [frozen_if(model, lstm, model.given(dtype, CPU)) for model, lstm in models]
    with CPU.active():
        for (_, lstm), own, foreign in zip(models, given, given[::-1], strict=True):
            expected = infer(lstm, own)
            for _ in range(2):
                assert error_of(lambda lstm=lstm, foreign=foreign: infer(lstm, foreign))[0] is fastlstm.ArgumentError
                assert_identical(infer(lstm, own), expected)


# --- what is kept --------------------------------------------------------------------------------------------------


def test_calls_are_kept_for_a_bounded_number_of_signatures(backend):
    lstm = LSTM(2, 3, seed=0)
    params = {name: backend.array(value) for name, value in lstm.params.items()}
    lstm.params = params
    for steps in range(1, 2 * calls._MOST_CALLS + 9):
        lstm(backend.array(np.ones((steps, 1, 2), np.float32)))
        assert len(lstm.cell.calls) <= calls._MOST_CALLS
    assert len(lstm.cell.calls) > 1


def test_cells_of_the_functions_are_kept_for_a_bounded_number_of_models():
    with fastlstm.use_backend("reference"):
        for hidden in range(1, 2 * calls._MOST_CELLS + 9):
            lstm_forward(LSTM(1, hidden).params, np.ones((1, 1, 1), np.float32))
            assert len(calls._cells) <= calls._MOST_CELLS


@pytest.mark.parametrize("again", [copy.deepcopy, lambda cell: pickle.loads(pickle.dumps(cell))])
def test_prepared_calls_are_not_copied_or_pickled_with_a_cell(backend, dtype, again):
    model = Model(3, 2, 5, 19)
    given, lstm = model.given(dtype, backend), model.new(dtype)
    expected = infer(lstm, given)
    other = again(lstm.cell)
    assert other == lstm.cell and hash(other) == hash(lstm.cell) and "calls" not in vars(other)
    assert lstm.cell.calls and lstm.cell == model.new(dtype).cell
    copied = model.new(dtype)
    copied.cell = other
    for _ in range(2):
        assert_identical(host(backend, infer(copied, given)), host(backend, expected))
