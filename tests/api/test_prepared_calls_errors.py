"""Prepared calls raise the errors that a first call raises, and leave nothing behind."""

from __future__ import annotations

import numpy as np
import pytest
from harness import BackendUnderTest
from prepared_calls import Model, error_of, host, infer, step, train
from tolerances import assert_identical


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
