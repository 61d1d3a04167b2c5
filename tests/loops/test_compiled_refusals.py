"""What ``fastlstm.compiled`` refuses, before any work."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from harness import BackendUnderTest

import fastlstm
from fastlstm import LSTM, RNN, ArgumentError, BackendError, DTypeError, ShapeError

if BackendUnderTest("cpu").missing:
    pytest.skip(str(BackendUnderTest("cpu").missing), allow_module_level=True)

import numba
from loop_tools import OTHER_VARIANTS, arrays, closed_loop, model_of

from fastlstm import compiled
from fastlstm.backends.cpu import kit as kit_module


@pytest.mark.parametrize("options", OTHER_VARIANTS)
def test_a_cell_without_a_compiled_step_is_refused(options):
    with pytest.raises(ArgumentError, match=rf"a cell with {' and '.join(options)}( together)?: "):
        LSTM(3, 6, seed=0, clip=2.0, **options).compiled()


def test_a_bidirectional_model_is_refused():
    with pytest.raises(ArgumentError, match="bidirectional"):
        LSTM(3, 6, bidirectional=True, seed=0).compiled()


@pytest.mark.parametrize("model", [LSTM, RNN])
def test_a_model_backwards_in_time_is_refused(model):
    with pytest.raises(ArgumentError, match="a model with reverse=True cannot"):
        model(3, 6, reverse=True, seed=0).compiled()


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_a_plain_rnn_is_refused(nonlinearity):
    with pytest.raises(ArgumentError, match=r"no step of a plain RNN: use rnn.step or rnn.unroll"):
        RNN(3, 6, nonlinearity=nonlinearity, seed=0).compiled()


def test_masks_of_dropout_that_are_not_drawn_are_refused():
    lstm = model_of(np.float32, 3, 6, 2, dropout=0.5)
    x, h, c, y, h_next, c_next = arrays(lstm, 2)
    kit = lstm.compiled()
    compiled.step(kit, x, h, c, y, h_next, c_next)  # inference draws none
    np.testing.assert_array_equal(y, lstm.freeze().step(x, (h, c))[0])
    tape = kit.tape(3, 2)
    for _ in range(2):  # at first, and for the next run
        with pytest.raises(ArgumentError, match="have to be drawn before each run"):
            compiled.step_taped(kit, tape, 0, x, y)
        kit.draw(tape)
        compiled.step_taped(kit, tape, 0, x, y)
        compiled.step_taped(kit, tape, 1, x, y)
    with pytest.raises(ArgumentError, match="another kit's"):
        model_of(np.float32, 3, 8, 2, dropout=0.5).compiled().draw(tape)


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("axis", [0, 1])
def test_each_wrong_shape_raises(number, axis):
    lstm = model_of(np.float32, 3, 6, 2)
    given, kit = list(arrays(lstm, 2)), lstm.compiled()
    wrong = list(given[number].shape)
    wrong[axis] += 1
    given[number] = np.zeros(wrong, np.float32)
    for array in given[3:]:
        array[...] = 7
    with pytest.raises(ShapeError):
        compiled.step(kit, *given)
    assert all((array == 7).all() for array in given[3:] if array is not given[number]), "nothing is written"
    with pytest.raises(ShapeError):
        closed_loop(kit, *given, 1)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({0: np.float64}, "x"), ({3: np.float64}, "y"), ({4: "strided"}, "h_next"), ({1: "read-only"}, None),
        ({5: "read-only"}, "c_next"), ({2: "flat"}, "c"),
    ],
    ids=str,
)  # fmt: skip
def test_odd_arrays_are_refused_when_the_caller_is_compiled(change, what):
    lstm = model_of(np.float32, 3, 6)
    given, kit = list(arrays(lstm, 2)), lstm.compiled()
    for number, how in change.items():
        if how == "strided":
            given[number] = np.zeros((1, 2, 12), np.float32)[..., ::2]
        elif how == "flat":
            given[number] = given[number].ravel()
        elif how == "read-only":
            given[number].flags.writeable = False
        else:
            given[number] = given[number].astype(how)
    if what is None:
        compiled.step(kit, *given)
        return
    with pytest.raises(numba.TypingError, match=f"{what} must be a C-contiguous"):
        compiled.step(kit, *given)


def test_what_is_no_kit_is_refused():
    given = arrays(LSTM(3, 6, seed=0), 2)
    with pytest.raises(numba.TypingError, match=r"takes a kit, from lstm.compiled\(\)"):
        compiled.step((1, 2), *given)


OVERLAPS = [("h_next", "h"), ("h_next", "x"), ("h_next", "c"), ("y", "x"), ("y", "h"), ("y", "c"), ("c_next", "h"),
            ("c_next", "x"), ("c_next", "h_next"), ("c_next", "y")]  # fmt: skip


@pytest.mark.parametrize(("written", "read"), OVERLAPS)
def test_outputs_that_overlap_what_is_read_are_refused(written, read):
    lstm = model_of(np.float32, 6, 6)
    names = ["x", "h", "c", "y", "h_next", "c_next"]
    given = dict(zip(names, arrays(lstm, 2), strict=True))
    memory = np.zeros(23, np.float32)  # the arrays have 12 elements each, and share one
    given[written] = memory[:12].reshape(given[written].shape)
    given[read] = memory[11:].reshape(given[read].shape)
    with pytest.raises(ArgumentError, match="overlap"):
        compiled.step(lstm.compiled(), **given)
    given[read] = np.zeros_like(given[read])
    compiled.step(lstm.compiled(), **given)


def test_steps_out_of_turn_are_refused():
    lstm = model_of(np.float32, 3, 6)
    kit = lstm.compiled()
    tape, gradients = kit.tape(2, 1), kit.gradients()
    x, y, dx = np.ones((1, 3), np.float32), np.ones((1, 6), np.float32), np.empty((1, 3), np.float32)
    with pytest.raises(ArgumentError, match="t must be 0"):
        compiled.step_taped(kit, tape, 1, x, y)
    with pytest.raises(ArgumentError, match="last step"):
        compiled.step_back(kit, tape, 0, y, dx)
    compiled.step_taped(kit, tape, 0, x, y)
    compiled.step_taped(kit, tape, 1, x, y)
    with pytest.raises(ArgumentError, match="no room"):
        compiled.step_taped(kit, tape, 2, x, y)
    with pytest.raises(ArgumentError, match="t must be 0"):
        compiled.step_taped(kit, tape, -1, x, y)
    for wrong in (0, 2, -1):
        with pytest.raises(ArgumentError, match="last step"):
            compiled.step_back(kit, tape, wrong, y, dx)
    with pytest.raises(ArgumentError, match="not all steps"):
        compiled.finish(kit, tape, gradients)
    compiled.step_back(kit, tape, 1, y, dx)
    with pytest.raises(ArgumentError, match="t must be 0"):
        compiled.step_taped(kit, tape, 2, x, y)
    with pytest.raises(ArgumentError, match="not all steps"):
        compiled.finish(kit, tape, gradients)
    compiled.step_back(kit, tape, 0, y, dx)
    compiled.finish(kit, tape, gradients)
    with pytest.raises(ArgumentError, match="last step"):
        compiled.step_back(kit, tape, 1, y, dx)
    compiled.step_taped(kit, tape, 0, x, y)  # a new run
    with pytest.raises(ArgumentError, match="not all steps"):
        compiled.finish(kit, tape, gradients)


def test_wrong_shapes_in_training_raise():
    lstm = model_of(np.float32, 3, 6)
    kit = lstm.compiled()
    tape = kit.tape(2, 2)
    x, y, dx = np.ones((2, 3), np.float32), np.ones((2, 6), np.float32), np.empty((2, 3), np.float32)
    for wrong in (x[:1], np.ones((2, 4), np.float32)):
        with pytest.raises(ShapeError, match="x must"):
            compiled.step_taped(kit, tape, 0, wrong, y)
        with pytest.raises(ShapeError, match="y must"):
            compiled.step_taped(kit, tape, 0, x, wrong)
    compiled.step_taped(kit, tape, 0, x, y)
    for wrong in (y[:1], np.ones((2, 4), np.float32)):
        with pytest.raises(ShapeError, match="dh must"):
            compiled.step_back(kit, tape, 0, wrong, dx)
        with pytest.raises(ShapeError, match="dx must"):
            compiled.step_back(kit, tape, 0, y, wrong)
    compiled.step_back(kit, tape, 0, y, dx)
    with pytest.raises(ShapeError, match="each parameter"):
        compiled.finish(kit, tape, kit.gradients()[1:])
    for sizes in ((4, 6), (3, 7), (3, 6, 2)):
        other = LSTM(*sizes, seed=0).compiled()
        with pytest.raises(ArgumentError, match="another kit's"):
            compiled.finish(other, tape, other.gradients())


@pytest.mark.parametrize("dtypes", [(np.float32, np.float64), (np.float64, np.float32)], ids=str)
def test_a_tape_of_another_dtype_is_refused(dtypes):
    (kit, other), dtype = (LSTM(3, 6, dtype=dtype, seed=0).compiled() for dtype in dtypes), dtypes[0]
    x, y, dx = np.full((2, 3), 7, dtype), np.full((2, 6), 7, dtype), np.full((2, 3), 7, dtype)
    calls = (compiled.step_taped, 0, x, y), (compiled.step_back, 0, y, dx), (compiled.finish, kit.gradients())
    for function, *arguments in calls:
        with pytest.raises(numba.TypingError, match="the tape is of float"):
            function(kit, other.tape(3, 2), *arguments)
    assert (y == 7).all() and (dx == 7).all()


def test_a_run_has_one_kit():
    lstm, changed = model_of(np.float32, 3, 6, 2), model_of(np.float32, 3, 6, 2)
    changed.params["bias_l1"] += 1
    kit, others = lstm.compiled(), [changed.compiled(), lstm.compiled(), LSTM(3, 6, 2, peephole=True).compiled()]
    tape, gradients, x = kit.tape(2, 1), np.full(kit.parameters, 7, np.float32), np.ones((1, 3), np.float32)
    y, dx = np.full((1, 6), 7, np.float32), np.full((1, 3), 7, np.float32)

    def refused(function, *arguments):
        for other in others:
            before = tape.record.copy()
            with pytest.raises(ArgumentError, match="one kit from step 0 to finish"):
                function(other, tape, *arguments, *([other.gradients()] if function is compiled.finish else []))
            np.testing.assert_array_equal(tape.record, before)
        assert (y == 7).all() and (dx == 7).all()

    compiled.step_taped(kit, tape, 0, x, y.copy())
    refused(compiled.step_taped, 1, x, y)
    compiled.step_taped(kit, tape, 1, x, y.copy())
    for t in (1, 0):
        refused(compiled.step_back, t, y, dx)
        compiled.step_back(kit, tape, t, y, dx.copy())
    refused(compiled.finish)
    compiled.finish(kit, tape, gradients)
    compiled.step_taped(others[0], tape, 0, x, y)  # the next run may have another
    np.testing.assert_array_equal(y, changed.freeze().step(x)[0])


def test_a_kit_in_the_memory_of_one_that_is_gone_is_another():
    lstm, x, y = model_of(np.float32, 3, 6), np.ones((1, 3), np.float32), np.ones((1, 6), np.float32)
    first = lstm.compiled()
    tape = first.tape(1, 1)
    compiled.step_taped(first, tape, 0, x, y)
    place = first.record.ctypes.data
    del first
    kits = [lstm.compiled() for _ in range(50)]
    assert place in [kit.record.ctypes.data for kit in kits], "the allocator gives freed memory out again"
    for kit in kits:
        with pytest.raises(ArgumentError, match="another kit's run"):
            compiled.step_back(kit, tape, 0, y, np.empty_like(x))


DROPOUTS = [(3, 6, 2, {}), (3, 6, 2, {"dropout": 0.5}), (3, 6, 2, {"dropout": 0.25})]


@pytest.mark.parametrize("of_kit", range(3))
@pytest.mark.parametrize("of_tape", range(3))
def test_a_tape_for_another_dropout_is_refused(of_kit, of_tape):
    kits = [model_of(np.float32, *sizes, **options).compiled() for *sizes, options in DROPOUTS]
    kit, tape = kits[of_kit], kits[of_tape].tape(2, 1)
    x, y = np.ones((1, 3), np.float32), np.full((1, 6), 7, np.float32)
    if of_kit == of_tape:
        kit.draw(tape)
        compiled.step_taped(kit, tape, 0, x, y)
        return
    kits[of_tape].draw(tape)
    for refused in (lambda: kit.draw(tape), lambda: compiled.step_taped(kit, tape, 0, x, y)):
        with pytest.raises(ArgumentError, match="made for another dropout"):
            refused()
    assert (y == 7).all()


def test_dropout_between_no_layers_is_none():
    x, y = np.ones((1, 3), np.float32), np.empty((1, 6), np.float32)
    kit = model_of(np.float32, 3, 6, dropout=0.5).compiled()
    tape = model_of(np.float32, 3, 6).compiled().tape(2, 1)
    kit.draw(tape)
    compiled.step_taped(kit, tape, 0, x, y)


@pytest.mark.parametrize("what", [None, 3, (), "a kit"], ids=str)
def test_masks_of_what_is_no_tape_are_not_drawn(what):
    kit = model_of(np.float32, 3, 6, 2, dropout=0.5).compiled()
    with pytest.raises(ArgumentError, match=r"draw\(\) takes a tape"):
        kit.draw(kit if what == "a kit" else what)


def test_masks_of_a_tape_of_another_dtype_are_not_drawn():
    kit = model_of(np.float32, 3, 6, 2, dropout=0.5).compiled()
    with pytest.raises(DTypeError, match="float64"):
        kit.draw(model_of(np.float64, 3, 6, 2, dropout=0.5).compiled().tape(2, 1))


def test_odd_sizes_of_a_tape_are_refused():
    kit = model_of(np.float32, 3, 6).compiled()
    for sizes in ((0, 1), (1, 0), (1.5, 2), (True, 2), (None, 1)):
        with pytest.raises(ArgumentError, match="must be an integer"):
            kit.tape(*sizes)


@pytest.mark.parametrize("sizes", [(10**15, 10**6), (10**15, 100), (10**17, 1), (1, 10**17), (2**62, 2**62)], ids=str)
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}], ids=str)
def test_a_tape_that_no_machine_can_address_is_refused(sizes, options):
    kit = model_of(np.float32, 3, 6, 2, **options).compiled()
    with pytest.raises(ArgumentError, match="steps and batch are too large"):
        kit.tape(*sizes)


@pytest.mark.parametrize(
    "wrong", [np.zeros(5, np.float32), np.zeros((1, 240), np.float32), None, 3], ids=lambda wrong: str(np.shape(wrong))
)
def test_gradients_of_another_size_have_no_names(wrong):
    kit = model_of(np.float32, 3, 6).compiled()
    assert kit.parameters == 240
    with pytest.raises(ShapeError, match="a number for each parameter"):
        kit.named(wrong)


def test_a_kit_stays_in_its_process():
    kit = model_of(np.float32, 3, 6).compiled()
    assert copy.copy(kit) is copy.deepcopy(kit) is kit  # it does not change
    with pytest.raises(ArgumentError, match="a kit belongs to the process"):
        pickle.dumps(kit)
    for copied in (pickle.dumps, copy.copy, copy.deepcopy, lambda tape: copy.deepcopy([tape])):
        with pytest.raises(ArgumentError, match="a tape belongs to the process"):
            copied(kit.tape(2, 1))


def test_a_module_of_that_name_has_no_other_attributes():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = kit_module.nonsense
    with pytest.raises(AttributeError, match="nonsense"):
        _ = fastlstm.nonsense


def test_a_model_on_another_library_is_refused(backend):
    if backend.is_numpy:
        pytest.skip("a model of NumPy arrays")
    lstm = model_of(np.float32, 3, 6)
    lstm.params.update({name: backend.array(value) for name, value in lstm.params.items()})
    with pytest.raises((fastlstm.ArrayTypeError, BackendError)):
        lstm.compiled()
