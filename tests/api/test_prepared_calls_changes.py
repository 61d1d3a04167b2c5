"""What a caller may change between two calls of one signature: layouts, states, parameters, backend, library."""

from __future__ import annotations

import types

import numpy as np
import pytest
from harness import BackendUnderTest
from layouts import LAYOUTS, cleaned, lay_out
from prepared_calls import CPU, Model, error_of, frozen_if, gradients, host, infer, named, needs_cpu, step, train
from tolerances import assert_identical

import fastlstm
from fastlstm import LSTM, calls
from fastlstm.backends.plain_arrays import as_plain


def replaced(given, name, array):
    """Put an array in the place of one of the arguments."""
    if name in ("x", "dy"):
        return given._replace(**{name: array})
    if name in ("h0", "c0"):
        return given._replace(
            state=tuple(array if n == name else s for n, s in zip(("h0", "c0"), given.state, strict=True))
        )
    return given._replace(params=given.params | {name: array})


LAID_OUT = {
    "small batch": Model(2, 3, 4, 18),
    "large batch": Model(20, 3, 4, 18),
    "peepholes": Model(2, 3, 4, 18, {"peephole": True}),
    "batch first": Model(20, 3, 4, 18, batch_first=True),
    "two layers": Model(2, 3, 4, 18, {"num_layers": 2}),
    "bidirectional": Model(6, 3, 4, 18, {"bidirectional": True}),
    "layer norm": Model(2, 3, 4, 18, {"layer_norm": True, "num_layers": 2}),
    "projection": Model(2, 3, 4, 18, {"proj_size": 6}),
    "peepholes of shared gates": Model(2, 3, 4, 18, {"peephole": True, "block_size": 2}),
}


@needs_cpu
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "clean"])
@pytest.mark.parametrize("name", LAID_OUT)
@pytest.mark.sampled
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
@pytest.mark.parametrize("fields", [{}, {"layer_norm": True}, {"peephole": True, "block_size": 2}], ids=str)
@pytest.mark.sampled
def test_an_input_of_a_frozen_model_may_have_another_layout_than_in_the_call_before(dtype, fields, steps, layout):
    model = Model(steps, 3, 4, 18, {"num_layers": 2, **fields}, frozen=True)
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


@needs_cpu
@pytest.mark.parametrize("run", [infer, train, step], ids=lambda run: run.__name__)
def test_memory_mapped_arrays_do_not_prepare_a_call_each_time(dtype, run, monkeypatch):
    model = Model(3, 2, 5, 19)
    given, lstm = model.given(dtype, CPU), model.new(dtype)
    mapped = given
    for name, value in named(given).items():
        mapped = replaced(mapped, name, lay_out("mapped", value))
    with CPU.active():
        expected = run(lstm, given)
        monkeypatch.setattr(calls.Call, "__init__", None)  # no other call can be prepared
        assert_identical(run(lstm, mapped), expected)
        assert_identical(run(lstm, given), expected)
