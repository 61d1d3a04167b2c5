"""Every parameter of every public function of training takes unusual arguments or raises a typed error."""

from __future__ import annotations

import copy
import decimal
import fractions
import inspect
import warnings

import numpy as np
import pytest

from fastlstm import LSTM, FastLSTMError, training
from fastlstm.errors import refused
from fastlstm.training import (
    SGD,
    Adam,
    AdamW,
    History,
    Joined,
    Linear,
    LinearGrads,
    Model,
    allreduce,
    clip_by_global_norm,
    clip_by_value,
    fit,
    huber_loss,
    join,
    length_mask,
    logistic_squared_error,
    mean_absolute_error,
    mean_squared_error,
    nash_sutcliffe_loss,
    quantile_loss,
    softmax_cross_entropy,
)


class Wicked:
    """Whatever is asked of it raises, and not what one would expect."""

    def _refuse(self, *args):
        raise RuntimeError("wicked")

    __float__ = __index__ = __int__ = __len__ = __bool__ = __repr__ = __iter__ = __array__ = _refuse


class WickedSequence(list):
    """A list until it is read."""

    def __getitem__(self, index):
        raise RuntimeError("wicked")


class NoShape:
    """Something with the attributes of an array that holds nothing."""

    ndim, shape, dtype, size = "two", None, 3, -1


WILD = {
    "None": None,
    "true": True,
    "false": False,
    "numpy true": np.True_,
    "10**40": 10**40,
    "10**400": 10**400,
    "10**5000": 10**5000,
    "-10**400": -(10**400),
    "2**62": 2**62,
    "-1": -1,
    "zero": 0,
    "half": 0.5,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "minus infinity": -float("inf"),
    "complex": 1j,
    "numpy complex": np.complex64(1),
    "numpy text": np.str_("0.1"),
    "date": np.datetime64("2020-01-01"),
    "duration": np.timedelta64(3, "s"),
    "decimal": decimal.Decimal("1e400"),
    "signalling NaN": decimal.Decimal("sNaN"),
    "fraction": fractions.Fraction(10**400, 3),
    "text": "0.1",
    "bytes": b"0.1",
    "bytearray": bytearray(b"0.1"),
    "memoryview": memoryview(b"0.1"),
    "list": [0.1],
    "list of names": ["weight", "bias"],
    "ragged list": [[1], [1, 2]],
    "empty list": [],
    "huge list": [10**400],
    "tuple": (0.5, 0.5),
    "pair of arrays": (np.zeros(2), np.zeros(2)),
    "pair of huge": (10**400, 0.5),
    "set": {0.1},
    "range": range(3),
    "dict": {},
    "dict of names": {"weight": "bias"},
    "dict of numbers": {1: np.zeros(2), "a": np.zeros(2)},
    "dict of mixed names": {("a", 1): np.zeros(2), None: np.zeros(2)},
    "dict of wicked": {"weight": Wicked()},
    "array": np.zeros(2),
    "array of one": np.array([0.5]),
    "0-d array": np.array(0.5),
    "0-d true": np.array(True),
    "empty array": np.zeros((0, 3)),
    "integers": np.arange(3),
    "booleans": np.ones(2, bool),
    "complex array": np.zeros(2, complex),
    "objects": np.array([None, 1], object),
    "wicked objects": np.full(2, None),
    "texts": np.array(["a", "b"]),
    "records": np.zeros(2, [("a", "f4")]),
    "masked array": np.ma.zeros(2),
    "big-endian": np.zeros((4, 3), ">f8"),
    "read-only": np.broadcast_to(np.zeros(3), (4, 3)),
    "7 axes": np.zeros((1,) * 7),
    "NaNs": np.full((4, 3), np.nan),
    "wicked": Wicked(),
    "wicked sequence": WickedSequence([1, 2]),
    "no shape": NoShape(),
    "function": len,
    "type": float,
    "module": np,
    "ellipsis": ...,
    "generator": np.random.default_rng(0),
}

WILD["wicked objects"][0] = Wicked()

# Every call as it is right; each of its arguments is replaced in turn by each wild value.
X = np.ones((4, 3))
CUBE = np.ones((2, 4, 3), np.float32)  # (T, N, I)


def model_of(heads=False):
    head = Linear(2, 1, seed=0)
    return Model(LSTM(3, 2, seed=0), {"a": head} if heads else head)


def fit_once(**arguments):
    """Train a model for an epoch, unless `arguments` say other."""
    return fit(model_of(), **{"x": CUBE, "y": CUBE[0, :, :1], "epochs": 1} | arguments)


RIGHT = None  # stands for what fits


class Alone:
    """Stands for a communicator of one process."""

    def __deepcopy__(self, memo):
        return self

    def Allreduce(self, send, receive):
        receive[:] = send


CALLS = {
    "Linear": (Linear, {"in_features": 3, "out_features": 2, "bias": True, "dtype": "float64", "seed": 0}),
    "Linear()": (lambda layer, x: layer(x), {"x": X}),
    "Linear.backward": (Linear.backward, {"x": X, "dy": np.ones((4, 2))}),
    "Linear.to": (Linear.to, {"library": np}),
    "Linear.params": (lambda layer, params: (setattr(layer, "params", params), layer(X)), {"params": {}}),
    "Linear.params weight": (lambda layer, weight: (layer.params.update(weight=weight), layer(X)), {"weight": X[:2]}),
    "Linear.params bias": (
        lambda layer, bias: (layer.params.update(bias=bias), layer.backward(X, np.ones((4, 2)))),
        {"bias": np.ones(2)},
    ),
    "softmax_cross_entropy": (softmax_cross_entropy, {"logits": X, "targets": np.arange(4) % 3, "mask": X[:, 0]}),
    "softmax_cross_entropy, probabilities": (softmax_cross_entropy, {"logits": X, "targets": X / 3, "mask": None}),
    "mean_squared_error": (mean_squared_error, {"prediction": X, "target": 2 * X, "mask": X}),
    "mean_absolute_error": (mean_absolute_error, {"prediction": X, "target": 2 * X, "mask": X}),
    "huber_loss": (huber_loss, {"prediction": X, "target": 2 * X, "mask": X, "delta": 1.0}),
    "logistic_squared_error": (logistic_squared_error, {"logits": X, "target": 2 * X, "mask": X}),
    "quantile_loss": (quantile_loss, {"prediction": X, "target": 2 * X, "mask": X, "quantiles": (0.1, 0.5, 0.9)}),
    "nash_sutcliffe_loss": (
        nash_sutcliffe_loss,
        {"prediction": X, "target": 2 * X, "mask": X, "deviation": np.ones(3), "eps": 0.1},
    ),
    "length_mask": (length_mask, {"lengths": [1, 2], "steps": 3, "batch_first": False}),
    "clip_by_global_norm": (clip_by_global_norm, {"grads": {"a": X}, "max_norm": 1.0, "params": {"a": 2 * X}}),
    "clip_by_value": (clip_by_value, {"grads": {"a": X}, "limit": 1.0, "params": {"a": 2 * X}}),
    "allreduce": (allreduce, {"grads": {"a": X}, "comm": Alone(), "weight": 1.0}),
    "Model": (Model, {"lstm": LSTM(3, 2), "head": Linear(2, 1), "output": "last", "scale": False}),
    "Model()": (lambda model, x, lengths: model(x, lengths), {"x": CUBE, "lengths": [1, 2, 0, 2]}),
    "Model.forward": (Model.forward, {"x": CUBE, "lengths": [1, 2, 0, 2], "recompute": False}),
    "Model.predict": (Model.predict, {"x": CUBE, "lengths": [1, 2, 0, 2]}),
    "Model.backward": (
        lambda model, dprediction: model.backward(model.forward(CUBE)[1], dprediction),
        {"dprediction": CUBE[0, :, :1]},
    ),
    "Model.backward tape": (
        lambda model, tape: model.backward(model.forward(CUBE)[1] if tape is RIGHT else tape, CUBE[0, :, :1]),
        {"tape": RIGHT},
    ),
    # Without what takes any function: an error in one is its own. See test_fit.py for these.
    "fit": (
        fit_once,
        {
            "x": CUBE, "y": CUBE[0, :, :1], "lengths": [1, 2, 0, 2], "mask": np.ones(4, bool), "loss_arrays": None,
            "optimiser": None, "epochs": 1, "batch_size": 2, "shuffle": True, "validation": 0.5, "patience": 1,
            "clip_norm": 1.0, "seed": 0, "recompute": False, "progress": False, "comm": None,
        },
    ),
    "fit model": (lambda model: fit(model, CUBE, CUBE[0, :, :1], epochs=1), {"model": model_of()}),
    "fit heads": (lambda y: fit(model_of(heads=True), CUBE, y, epochs=1), {"y": {"a": CUBE[0, :, :1]}}),
    "join": (join, {"part": {"a": X}}),
    "SGD": (SGD, {"params": {"a": X.copy()}, "lr": 0.1, "momentum": 0.5}),
    "Adam": (Adam, {"params": {"a": X.copy()}, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}),
    "AdamW": (AdamW, {"params": {"a": X.copy()}, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}),
    "Adam.step": (Adam.step, {"grads": {"weight": np.ones((2, 3)), "bias": np.ones(2)}}),
    "Adam.step one": (
        lambda optimiser, grad: optimiser.step({"weight": grad, "bias": np.ones(2)}),
        {"grad": np.ones((2, 3))},
    ),
    "Adam.load_state_dict": (Adam.load_state_dict, {"state": {}}),
    "Adam.load_state_dict steps": (
        lambda optimiser, steps: optimiser.load_state_dict(optimiser.state_dict() | {"steps": steps}),
        {"steps": 3},
    ),
    "Adam.load_state_dict mean": (
        lambda optimiser, mean: optimiser.load_state_dict(optimiser.state_dict() | {"mean": mean}),
        {"mean": {"weight": np.ones((2, 3)), "bias": np.ones(2)}},
    ),
    **{
        f"Adam.{name}": (lambda optimiser, value, name=name: setattr(optimiser, name, value), {"value": right})
        for name, right in (("lr", 0.1), ("betas", (0.9, 0.99)), ("eps", 1e-8), ("weight_decay", 0.1))
    },
    "SGD.momentum": (lambda optimiser, value: setattr(optimiser, "momentum", value), {"value": 0.5}),
    "LSTM": (LSTM, {"input_size": 3, "hidden_size": 4, "num_layers": 1, "bias": True, "batch_first": False,
                    "dropout": 0.0, "bidirectional": False, "proj_size": 0, "peephole": False, "dtype": "float32",
                    "seed": 0,
        "forget_gate": True, "coupled": False, "block_size": 1, "truncated": False,
        "activations": ("sigmoid", "tanh", "tanh"), "clip": 2.0, "cell_clip": 2.0, "layer_norm": False,
        "recurrent_dropout": 0.0, "zoneout": (0.0, 0.0), "forget_bias": 1.0, "reverse": False, "merge": "concat",
        "precision": "tf32",
    }),
}  # fmt: skip
# Whose method or attribute it is, made anew for each call.
OWNERS = {"Linear": lambda: Linear(3, 2, dtype="float64", seed=0)}
OWNERS["Model"] = model_of
OWNERS["Adam"] = lambda: Adam(OWNERS["Linear"]())
OWNERS["SGD"] = lambda: SGD(OWNERS["Linear"](), 0.1, momentum=0.5)
PAIRS = [(call, argument) for call, (_, arguments) in CALLS.items() for argument in arguments]


def owner_of(call):
    name = call.partition(" ")[0]
    return OWNERS[name.split(".")[0].rstrip("()")]() if "." in name or "()" in name else None


def run(call, arguments):
    """Do the call; return its owner's optimiser state and parameters before and after it."""
    owner, function = owner_of(call), CALLS[call][0]
    before = state_of(owner)
    failed = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numbers beyond the range of a dtype warn, as NumPy's own do
        try:
            function(**arguments) if owner is None else function(owner, **arguments)
        except FastLSTMError as error:
            failed = error
    return failed, before, state_of(owner)


def state_of(owner):
    if not isinstance(owner, (SGD, Adam)):
        return None
    options = {name: getattr(owner, name) for name in ("lr", "betas", "eps", "weight_decay", "momentum")
               if hasattr(owner, name)}  # fmt: skip
    return copy.deepcopy((dict(owner.params), owner.state_dict(), options))


def plain(value):
    """Return what two copies of a part of a model have in common."""
    return dict(value.params) if isinstance(value, (LSTM, Linear)) else value


@pytest.mark.parametrize("call", CALLS)
def test_the_calls_are_right_as_they_are(call):
    arguments = CALLS[call][1]
    if call not in ("Linear.params", "Adam.load_state_dict"):
        assert run(call, copy.deepcopy({k: v for k, v in arguments.items() if v is not np})
                   | {k: v for k, v in arguments.items() if v is np})[0] is None  # fmt: skip


@pytest.mark.parametrize(("call", "argument"), PAIRS, ids=[f"{call}, {argument}" for call, argument in PAIRS])
def test_wild_arguments_raise_typed_errors_and_change_nothing(call, argument):
    refused = 0
    for name, value in WILD.items():
        arguments = {k: v if v is np else copy.deepcopy(v) for k, v in CALLS[call][1].items()}
        untouched = {k: v if v is np else copy.deepcopy(v) for k, v in arguments.items() if k != argument}
        held = value.copy() if type(value) is np.ndarray else None
        try:
            failed, before, after = run(call, arguments | {argument: value})
        except BaseException as error:
            raise AssertionError(f"{argument} = {name}: {type(error).__name__}: {error}") from error
        if failed is not None:
            refused += 1
            assert len(str(failed)) < 1000
            np.testing.assert_equal(after, before, err_msg=name)
        np.testing.assert_equal(*({k: plain(held[k]) for k in untouched} for held in (arguments, untouched)), name)
        if held is not None:
            np.testing.assert_equal(value, held, err_msg=name)
    assert refused > len(WILD) // 2, "most of what is wild is refused"


def test_no_public_name_is_left_out():
    covered = {call.partition(" ")[0].split(".")[0].rstrip("(),") for call in CALLS}
    others = {"History", "Joined", "LinearGrads"}  # what calls return
    # tests/demo/test_demo_1997.py has the arguments of initialise_1997.
    assert set(training.__all__) - covered == others | {"initialise_1997"}
    assert History and Joined and LinearGrads
    for call, (function, arguments) in CALLS.items():
        if inspect.isfunction(function) and function.__name__ != "<lambda>" and call not in ("join", "fit"):
            names = set(inspect.signature(function).parameters) - {"self"}
            assert names == set(arguments), call
        if inspect.isclass(function):
            assert set(inspect.signature(function).parameters) == set(arguments), call


@pytest.mark.parametrize("call", [
    lambda: Linear(10**40, 3),
    lambda: Linear(3, 10**40),
    lambda: Linear(2**40, 2**40),
    lambda: LSTM(10**40, 3),
    lambda: LSTM(3, 10**40),
    lambda: LSTM(3, 2**40),
    lambda: LSTM(3, 4, num_layers=10**40),
    lambda: LSTM(3, 4, num_layers=2**62),
    lambda: LSTM(3, 4, proj_size=np.zeros(2)),
    lambda: LSTM(3, 4, proj_size=np.zeros(1)),
    lambda: LSTM(3, np.array([4])),
    lambda: LSTM(3, 4, dropout=np.array([0.5])),
    lambda: length_mask([1], 10**40),
    lambda: length_mask([1], 2**61),
    lambda: length_mask([1] * 1000, 2**55),
    lambda: length_mask(np.array(1), 3),
    lambda: length_mask([1], 3, batch_first=np.zeros(2)),
    lambda: length_mask([1], 3, 1),
    lambda: SGD({"w": np.zeros(2)}, 10**400),
    lambda: clip_by_value({"w": np.zeros(2)}, 10**400),
    lambda: clip_by_global_norm({"w": np.zeros(2)}, 10**400),
])  # fmt: skip
def test_numbers_beyond_all_ranges_and_arrays_are_refused_at_once(call):
    with pytest.raises(FastLSTMError) as caught:
        call()
    assert len(str(caught.value)) < 1000


def test_momentum_that_was_zero_cannot_be_switched_on():
    optimiser = SGD({"w": np.zeros(2)}, 0.1)
    with pytest.raises(FastLSTMError, match="make a new one"):
        optimiser.momentum = 0.5
    optimiser.momentum = 0.0
    optimiser.step({"w": np.ones(2)})


def test_a_timeout_from_a_signal_handler_is_not_taken_for_a_bad_number():
    for value in ("0.1", Wicked(), [Wicked()]):
        assert refused(value, TypeError()) and refused(10**400, OverflowError())
    objects = np.empty(1, object)
    objects[0] = Wicked()
    for value in (Wicked(), [Wicked()], {"a": Wicked()}, objects):
        assert refused(value, RuntimeError())
    for value in (None, 10**400, 0.1, "0.1", np.float32(1), np.dtype("f4")):
        assert not refused(value, TimeoutError()) and not refused(value, RuntimeError())


@pytest.mark.parametrize(
    "value", [1, 1.0, np.float32(1), np.int64(1), np.array(1.0), decimal.Decimal(1), fractions.Fraction(1)]
)
def test_any_real_number_is_a_rate(value):
    assert SGD({"w": np.zeros(2)}, value).lr == 1.0
    assert type(SGD({"w": np.zeros(2)}, value).lr) is float
