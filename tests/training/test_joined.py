"""Optimisers hold models and not arrays: joined models, parameters that are replaced, clashes of names."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from tolerances import assert_identical

from fastlstm import LSTM, ArgumentError, ArrayTypeError, DTypeError, ShapeError
from fastlstm.training import SGD, Adam, Linear, clip_by_global_norm, clip_by_value, join

OPTIMISERS = {
    "SGD": lambda params: SGD(params, 0.1),
    "SGD momentum": lambda params: SGD(params, 0.1, momentum=0.9),
    "Adam": lambda params: Adam(params, 0.1),
}
optimisers = pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)


def models():
    return LSTM(3, 4, seed=0), Linear(4, 2, seed=1), Linear(4, 5, seed=2)


def gradients(params, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=value.shape).astype(value.dtype) for name, value in params.items()}


def copies(params):
    return {name: value.copy() for name, value in params.items()}


# Joining


def test_no_parameter_is_lost_when_models_are_joined():
    lstm, one, other = models()
    assert len(lstm.params | one.params | other.params) == 5, "a union of dicts loses two"
    joined = join(lstm=lstm, one=one, other=other)
    parts = {"lstm": lstm, "one": one, "other": other}
    assert list(joined) == [f"{part}.{name}" for part, model in parts.items() for name in model.params]
    assert len(joined) == 7
    for part, model in parts.items():
        for name, value in model.params.items():
            assert joined[f"{part}.{name}"] is value


@optimisers
def test_joined_models_learn_as_each_alone(make):
    together, alone = models(), models()
    names = ("lstm", "one", "other")
    optimiser = make(join(**dict(zip(names, together, strict=True))))
    single = [make(model) for model in alone]
    for k in range(3):
        grads = [gradients(model.params, k) for model in alone]
        optimiser.step(join(**dict(zip(names, grads, strict=True))))
        for one, grad in zip(single, grads, strict=True):
            one.step(grad)
    for one, other in zip(together, alone, strict=True):
        assert_identical(one.params, other.params)


def test_results_of_backward_are_joined_clipped_and_stepped_with():
    lstm, head, _ = models()
    x = np.ones((5, 2, 3), np.float32)
    y, _, tape = lstm.forward(x)
    head_grads = head.backward(y, np.ones((5, 2, 2), np.float32))
    lstm_grads = lstm.backward(tape, head_grads.x)
    grads = join(lstm=lstm_grads, head=head_grads)
    union = {f"lstm.{name}": value for name, value in lstm_grads.params.items()}
    union |= {f"head.{name}": value for name, value in head_grads.params.items()}
    assert_identical(dict(grads), union)
    (clipped, norm), (expected, expected_norm) = clip_by_global_norm(grads, 0.5), clip_by_global_norm(union, 0.5)
    assert norm == expected_norm
    assert_identical(clipped, expected)
    assert_identical(clip_by_value(grads, 0.5), clip_by_value(union, 0.5))
    before = copies(join(lstm=lstm, head=head))
    SGD(join(lstm=lstm, head=head), 1.0).step(grads)
    after = join(lstm=lstm, head=head)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value - union[name])
    Adam(lstm).step(lstm_grads)  # one model needs no joining


def test_joined_models_can_be_joined():
    lstm, one, other = models()
    joined = join(encoder=lstm, heads=join(one=one, other=other))
    assert "heads.other.weight" in joined
    assert joined["heads.other.weight"] is other.params["weight"]


@pytest.mark.parametrize("name", ["one.weight", "lstm", "weight_ih_l0", "lstm.", ".weight_ih_l0", "", 3, None])
def test_names_that_are_not_joined_are_not_found(name):
    lstm, _, _ = models()
    joined = join(lstm=lstm)
    assert name not in joined
    with pytest.raises(KeyError):
        joined[name]


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"": Linear(1, 1)},
        {"a.b": Linear(1, 1)},  # with a part a that has a name b.weight, names would clash
        {"a": None},
        {"a": [np.zeros(3)]},
        {"a": np.zeros(3)},
        {"a": {1: np.zeros(3)}},
        {"a": "weight"},
    ],
    ids=str,
)
def test_join_refuses_bad_parts(parts):
    with pytest.raises(ArgumentError, match="part"):
        join(**parts)


def test_a_joined_mapping_cannot_be_changed_and_is_no_dict_to_unite():
    joined = join(head=Linear(1, 1))
    with pytest.raises(TypeError):
        joined["head.weight"] = np.zeros((1, 1), np.float32)
    with pytest.raises(TypeError):
        joined | joined
    assert "head.weight" in repr(joined)


# Parameters that are replaced


def joined_models(model):
    return join(model=model)


HOLDERS = {
    "model": lambda model: model,
    "params": lambda model: model.params,
    "joined models": joined_models,
    "joined params": lambda model: join(model=model.params),
}


def named(holder, grads):
    return {f"model.{name}": value for name, value in grads.items()} if holder.startswith("joined") else grads


@optimisers
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_replaced_parameter_is_trained_on_with_the_state_of_its_name(make, holder):
    model, untouched = models()[0], models()[0]
    optimiser, expected = make(HOLDERS[holder](model)), make(untouched)
    for k in range(4):
        if k == 2:
            old = model.params["weight_hh_l0"]
            model.params["weight_hh_l0"] = old.copy()
            left = old.copy()
        grads = gradients(model.params, k)
        optimiser.step(named(holder, grads))
        expected.step(grads)
    assert_identical(model.params, untouched.params)
    np.testing.assert_array_equal(old, left)


@optimisers
@pytest.mark.parametrize("holder", ["model", "joined models"])
def test_all_parameters_may_be_replaced_at_once(make, holder):
    model, untouched = models()[0], models()[0]
    optimiser, expected = make(HOLDERS[holder](model)), make(untouched)
    for k in range(4):
        if k == 2:
            model.params = copies(model.params)
        grads = gradients(model.params, k)
        optimiser.step(named(holder, grads))
        expected.step(grads)
    assert_identical(model.params, untouched.params)


REPLACED = {
    "another shape": (lambda p: p.update(bias=np.zeros(3, np.float32)), ShapeError),
    "another dtype": (lambda p: p.update(bias=p["bias"].astype(np.float64)), DTypeError),
    "a list": (lambda p: p.update(bias=[0.0, 0.0]), ArrayTypeError),
    "None": (lambda p: p.update(bias=None), ArrayTypeError),
    "missing": (lambda p: p.pop("bias"), ArgumentError),
    "one more": (lambda p: p.update(more=np.zeros(2, np.float32)), ArgumentError),
    "one name": (lambda p: p.update(bias=p["weight"]), ArgumentError),
}


@pytest.mark.parametrize("make", [OPTIMISERS["SGD momentum"], OPTIMISERS["Adam"]], ids=["SGD momentum", "Adam"])
@pytest.mark.parametrize("case", REPLACED)
def test_a_replacement_that_does_not_fit_the_state_changes_nothing(make, case):
    change, error = REPLACED[case]
    model = Linear(4, 2, seed=0)
    optimiser = make(model)
    optimiser.step(gradients(model.params))
    change(model.params)
    before, state = copy.deepcopy(model.params), optimiser.state_dict()
    grads = {name: np.ones_like(value) for name, value in model.params.items() if value is not None}
    with pytest.raises(error):
        optimiser.step(grads)
    with pytest.raises(error):
        optimiser.load_state_dict(state)
    np.testing.assert_equal(model.params, before)
    np.testing.assert_equal(optimiser.state_dict(), state)


def test_a_model_whose_params_were_replaced_by_a_non_mapping():
    model = Linear(4, 2, seed=0)
    optimiser = Adam(model)
    for wrong in (None, ["weight", "bias"], 3):
        model.params = wrong
        with pytest.raises(ArgumentError, match="params"):
            optimiser.step({})


@optimisers
def test_an_optimiser_pickles_with_its_model(make):
    lstm, head, _ = models()
    optimiser = make(join(lstm=lstm, head=head))
    grads = gradients(join(lstm=lstm, head=head))
    optimiser.step(grads)
    again, other, _ = pickle.loads(pickle.dumps((optimiser, lstm, head)))
    again.step(grads)
    optimiser.step(grads)
    assert_identical(other.params, lstm.params)
