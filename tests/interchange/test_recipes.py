"""Recipes: EA-LSTM by a mask and a hydrology model behind BMI, of fastlstm.demo; tied weights, which are here alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from harness import REFERENCE
from tolerances import assert_close

from fastlstm import LSTM, ArgumentError, ArrayTypeError, BackendError, ModelFileError, ShapeError
from fastlstm.demo import ealstm
from fastlstm.training import Adam, join, mean_squared_error

# --- EA-LSTM ----------------------------------------------------------------------------------------------------------

H, D, S = 4, 3, 2


def ealstm_weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"input_gate.weight": (H, S), "input_gate.bias": (H,), "dynamic_gates.weight_ih": (D, 3 * H),
              "dynamic_gates.weight_hh": (H, 3 * H), "dynamic_gates.bias": (3 * H,)}  # fmt: skip
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def ealstm_by_the_book(w, x_d, x_s):
    """Kratzert et al. (2019), equations 3 to 9, in neuralhydrology's order of gates f, o, g."""
    sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    i = sigmoid(x_s @ w["input_gate.weight"].T + w["input_gate.bias"])
    h, c, found = np.zeros_like(i), np.zeros_like(i), []
    for x_t in x_d:
        a = x_t @ w["dynamic_gates.weight_ih"] + h @ w["dynamic_gates.weight_hh"] + w["dynamic_gates.bias"]
        f, o, g = np.split(a, 3, axis=1)
        c = sigmoid(f) * c + i * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        found.append(h)
    return np.array(found)


def test_ea_lstm_is_a_masked_lstm():
    rng, weights = np.random.default_rng(1), ealstm_weights()
    x_d, x_s = rng.normal(size=(6, 5, D)), rng.normal(size=(5, S))
    lstm, mask = ealstm.from_neuralhydrology({f"a.{name}": value for name, value in weights.items()}, "a.")
    with REFERENCE.active():
        y, _ = lstm(ealstm.joined(x_d, x_s))
    expected = ealstm_by_the_book(weights, x_d, x_s)
    assert_close("agreement", {"y": y}, {"y": expected}, backend="reference", dtype=np.float64)
    assert sum(int(value.sum()) for value in mask.values()) == sum(value.size for value in weights.values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_gate.bias": None}, ArgumentError, r"lacks a\.input_gate\.bias"),
        ({"dynamic_gates.weight_ih": np.ones((D, 10))}, ShapeError, r"a\.dynamic_gates\.weight_ih .*\(3, 10\)"),
        ({"input_gate.weight": np.ones(H)}, ShapeError, r"a\.input_gate\.weight"),
        ({"dynamic_gates.bias": [0.0] * 12}, ArrayTypeError, "NumPy"),
        ({"dynamic_gates.weight_hh": np.ones((H, 9))}, ShapeError, "one shape|must have shape"),
    ],
    ids=["missing", "rows", "axes", "list", "size"],
)
def test_other_weights_than_those_of_an_ea_lstm_are_refused(change, error, message):
    weights = {f"a.{n}": v for n, v in (ealstm_weights() | change).items() if v is not None}
    with pytest.raises(error, match=message):
        ealstm.from_neuralhydrology(weights, "a.")


def test_ea_lstm_stays_one_in_training():
    rng = np.random.default_rng(1)
    lstm, mask = ealstm.from_neuralhydrology(ealstm_weights())
    x = ealstm.joined(rng.normal(size=(6, 5, D)), rng.normal(size=(5, S)))
    target = 0.5 * np.tanh(rng.normal(size=(6, 5, H)))
    optimiser, losses = Adam(join(lstm=lstm), lr=0.02), []
    for _ in range(40):
        y, _, tape = lstm.forward(x)
        loss, dy = mean_squared_error(y, target)
        optimiser.step({f"lstm.{name}": g for name, g in ealstm.masked(lstm.backward(tape, dy).params, mask).items()})
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    for name, value in lstm.params.items():
        assert not np.any(value[mask[name] == 0]), name
        assert np.all(value[mask[name] == 1]), name


# --- Tied weights -----------------------------------------------------------------------------------------------------


def test_models_with_tied_weights_are_trained_as_one():
    """An encoder and a decoder with the same recurrent weights: one array under two names, the sum of two gradients."""
    rng = np.random.default_rng(2)
    encoder, decoder = LSTM(3, 4, dtype=np.float64, seed=0), LSTM(3, 4, dtype=np.float64, seed=1)
    decoder.params["weight_hh_l0"] = encoder.params["weight_hh_l0"]
    x, target = rng.normal(size=(5, 2, 3)), rng.normal(size=(5, 2, 4)) * 0.3

    def gradients():
        _, state, first = encoder.forward(x)
        y, _, second = decoder.forward(x, state)
        loss, dy = mean_squared_error(y, target)
        back = decoder.backward(second, dy)
        return loss, join(encoder=encoder.backward(first, None, back.state), decoder=back)

    loss, grads = gradients()
    # The derivative by an entry of the shared matrix is the sum of both.
    shared, step = encoder.params["weight_hh_l0"], 1e-6
    shared[2, 1] += step
    higher, _ = gradients()
    shared[2, 1] -= step
    both = sum(grads[f"{name}.weight_hh_l0"][2, 1] for name in ("encoder", "decoder"))
    assert abs((higher - loss) / step - both) < 1e-5
    optimiser, losses = Adam(join(encoder=encoder, decoder=decoder), lr=0.02), []
    for _ in range(30):
        loss, grads = gradients()
        optimiser.step(grads)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert encoder.params["weight_hh_l0"] is decoder.params["weight_hh_l0"]


# --- A run folder of neuralhydrology behind BMI -----------------------------------------------------------------------

INPUTS, ATTRIBUTES, TARGET = ["rain", "temp"], ["slope", "elev"], "runoff"
CENTER, SCALE = {"rain": 2.0, "temp": 10.0, "runoff": 1.5}, {"rain": 3.0, "temp": 8.0, "runoff": 2.5}


def hydrology():
    pytest.importorskip("yaml", reason="PyYAML is not installed: the extra hydrology")
    from fastlstm.demo import hydrology

    return hydrology


@pytest.fixture
def run_folder(tmp_path):
    """Write a run folder as neuralhydrology does; returns it, and the state dict of torch."""
    torch = pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")
    import yaml

    with torch.random.fork_rng():
        torch.manual_seed(2)
        head = torch.nn.ModuleDict({"net": torch.nn.Sequential(torch.nn.Linear(6, 1))})
        model = torch.nn.ModuleDict({"lstm": torch.nn.LSTM(4, 6), "head": head})
    folder = tmp_path / "run"
    (folder / "train_data").mkdir(parents=True)
    torch.save({name: value * 0 for name, value in model.state_dict().items()}, folder / "model_epoch009.pt")
    torch.save(model.state_dict(), folder / "model_epoch010.pt")
    config = {"model": "cudalstm", "head": "regression", "dynamic_inputs": INPUTS, "static_attributes": ATTRIBUTES,
              "target_variables": [TARGET], "clip_targets_to_zero": [TARGET], "hidden_size": 6}  # fmt: skip
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    of_xarray = lambda values: {"data_vars": {n: {"attrs": {}, "data": v, "dims": []} for n, v in values.items()}}  # noqa: E731
    scaler = {"attribute_means": {"slope": 5.0, "elev": 100.0}, "attribute_stds": {"slope": 2.0, "elev": 50.0},
              "xarray_feature_center": of_xarray(CENTER), "xarray_feature_scale": of_xarray(SCALE)}  # fmt: skip
    (folder / "train_data" / "train_data_scaler.yml").write_text(yaml.safe_dump(scaler))
    return folder, model


def configured(folder, attributes):
    import yaml

    path = folder.parent / "catchment.yml"
    path.write_text(yaml.safe_dump({"run_dir": folder.name, "static_attributes": attributes, "time_step_seconds": 60}))
    return str(path)


def test_a_run_folder_is_stepped_as_torch_runs_it(run_folder):
    torch = pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")
    folder, model = run_folder
    attributes = [{"slope": 4.0, "elev": 150.0}, {"slope": 9.0, "elev": 20.0, "other": 3.0}]
    bmi = hydrology().RunoffBmi()
    bmi.initialize(configured(folder, attributes))
    forcing = np.random.default_rng(1).normal(size=(30, 2, 2)) * [3, 8] + [2, 10]
    outputs = []
    for t, row in enumerate(forcing):
        bmi.set_value("rain", row[:, 0])
        bmi.set_value_at_indices("temp", np.array([0, 1]), row[:, 1])
        assert bmi.get_current_time() == 60 * t
        bmi.update()
        outputs.append(bmi.get_value(TARGET, np.empty(2)))
    # The attributes come sorted by name, after the inputs.
    static = [[(a["elev"] - 100) / 50, (a["slope"] - 5) / 2] for a in attributes]
    x = np.concatenate([(forcing - [2, 10]) / [3, 8], np.broadcast_to(static, (30, 2, 2))], axis=2)
    with torch.no_grad():
        y = model["head"]["net"](model["lstm"](torch.from_numpy(x).float())[0])[..., 0].numpy()
    expected = np.maximum(y * 2.5 + 1.5, 0)
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=2e-6)
    assert expected.std() > 0.01
    before = bmi.get_value_ptr(TARGET).copy()
    bmi.update_until(60 * 32)
    assert bmi.get_current_time() == 60 * 32 and not np.array_equal(before, bmi.get_value_ptr(TARGET))


def test_the_last_epoch_is_that_of_the_largest_number(run_folder):
    """By their names, model_epoch999.pt would come after model_epoch1000.pt."""
    folder, model = run_folder
    (folder / "model_epoch010.pt").rename(folder / "model_epoch1000.pt")
    (folder / "model_epoch009.pt").rename(folder / "model_epoch999.pt")
    (folder / "model_epoch_best.pt").write_bytes(b"no epoch")
    run = hydrology().RunFolder(folder)
    np.testing.assert_array_equal(run.lstm.params["weight_hh_l0"], model["lstm"].weight_hh_l0.detach().numpy())


def test_the_interface_is_that_of_bmipy(run_folder):
    bmipy = pytest.importorskip("bmipy", reason="bmipy is not installed: the extra hydrology")
    folder, _ = run_folder
    bmi = hydrology().RunoffBmi()
    assert isinstance(bmi, bmipy.Bmi)
    bmi.initialize(configured(folder, {"slope": 4.0, "elev": 150.0}))
    assert (bmi.get_input_var_names(), bmi.get_output_var_names()) == (("rain", "temp"), ("runoff",))
    assert (bmi.get_input_item_count(), bmi.get_output_item_count(), bmi.get_grid_size(0)) == (2, 1, 1)
    assert (bmi.get_var_type("rain"), bmi.get_var_itemsize("rain"), bmi.get_var_nbytes("rain")) == ("float64", 8, 8)
    assert (bmi.get_time_step(), bmi.get_time_units(), bmi.get_start_time()) == (60.0, "s", 0.0)
    assert bmi.get_grid_type(bmi.get_var_grid("temp")) == "points" and bmi.get_grid_rank(0) == 1
    with pytest.raises(ArgumentError, match="no variable 'snow'"):
        bmi.get_value_ptr("snow")
    with pytest.raises(NotImplementedError):
        bmi.get_grid_x(0, np.empty(1))
    bmi.finalize()


@pytest.mark.parametrize(
    "change",
    [
        {"run_dir": 3}, {"run_dir": None}, {"static_attributes": [1, 2]}, {"static_attributes": "elev"},
        {"static_attributes": {"slope": 4.0, "elev": "a"}}, {"static_attributes": {"slope": 4.0, "elev": float("nan")}},
        {"time_step_seconds": 0}, {"time_step_seconds": -1}, {"time_step_seconds": "1h"},
        {"time_step_seconds": float("inf")},
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_configuration_is_refused_by_name(run_folder, change):
    path = configured(run_folder[0], {"slope": 4.0, "elev": 150.0})
    edited(Path(path), **change)
    bmi = hydrology().RunoffBmi()
    with pytest.raises(ArgumentError, match=next(iter(change))):
        bmi.initialize(path)
    with pytest.raises(ArgumentError, match="not initialised"):
        bmi.update()


USES = {
    "update": (), "update_until": (9.0,), "get_input_var_names": (), "get_output_var_names": (), "get_time_step": (),
    "get_current_time": (), "get_grid_size": (0,), "get_value_ptr": ("rain",), "get_value": ("rain", np.empty(1)),
    "set_value": ("rain", 1.0), "get_var_type": ("rain",), "set_value_at_indices": ("rain", [0], 1.0),
}  # fmt: skip


@pytest.mark.parametrize("method", USES)
def test_a_model_is_used_between_initialize_and_finalize_only(run_folder, method):
    bmi = hydrology().RunoffBmi()
    bmi.finalize()  # which may be called at any time
    with pytest.raises(ArgumentError, match="not initialised"):
        getattr(bmi, method)(*USES[method])
    bmi.initialize(configured(run_folder[0], {"slope": 4.0, "elev": 150.0}))
    getattr(bmi, method)(*USES[method])
    bmi.finalize()
    with pytest.raises(ArgumentError, match="not initialised"):
        getattr(bmi, method)(*USES[method])


def test_values_and_times_that_do_not_fit_are_refused(run_folder):
    bmi = hydrology().RunoffBmi()
    bmi.initialize(configured(run_folder[0], [{"slope": 4.0, "elev": 150.0}] * 2))
    for method, arguments in (
        ("set_value", ("rain", np.ones(3))), ("set_value", ("rain", "much")), ("get_value", ("rain", np.empty(3))),
        ("set_value_at_indices", ("rain", [2], 1.0)), ("get_value_at_indices", ("rain", np.empty(1), [5])),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match="do not fit rain, of 2 catchments"):
            getattr(bmi, method)(*arguments)
    for time in (float("nan"), float("inf"), "1h", None):
        with pytest.raises(ArgumentError, match="time must be a finite number"):
            bmi.update_until(time)
    with pytest.raises(ArgumentError, match=r"no variable \['rain'\]"):
        bmi.set_value(["rain"], 1.0)


def test_numbers_without_a_point_are_read(run_folder):
    """PyYAML reads them as strings."""
    path = Path(configured(run_folder[0], {"slope": 4.0, "elev": 150.0}))
    path.write_text(path.read_text().replace("150.0", "15e1").replace(": 60", ": 6e1"))
    bmi = hydrology().RunoffBmi()
    bmi.initialize(str(path))
    assert bmi.get_time_step() == 60.0
    np.testing.assert_array_equal(bmi._now.static, [[1.0, -0.5]])


@pytest.mark.parametrize(
    ("file", "change", "error", "message"),
    [
        ("config.yml", {"static_attributes": {"slope": 1}}, ArgumentError, "static_attributes must be a list"),
        ("config.yml", {"clip_targets_to_zero": 3}, ArgumentError, "clip_targets_to_zero must be a list"),
        ("config.yml", {"dynamic_inputs": []}, ArgumentError, "dynamic_inputs must be a list"),
        ("scaler", {"attribute_means": [1, 2]}, ModelFileError, "lacks elev, slope"),
        ("scaler", {"attribute_stds": {"slope": "a", "elev": 1}}, ModelFileError, "no finite numbers"),
        ("scaler", {"xarray_feature_scale": {"data_vars": {"rain": {"data": 1.0}, "temp": {"data": 1.0}}}},
         ModelFileError, "lacks runoff"),
    ],
)  # fmt: skip
def test_damaged_run_folders_raise_typed_errors(run_folder, file, change, error, message):
    folder, _ = run_folder
    edited(folder / ("train_data/train_data_scaler.yml" if file == "scaler" else file), **change)
    with pytest.raises(error, match=message):
        hydrology().RunFolder(folder)


@pytest.mark.parametrize("change", ["another head", "two targets"])
def test_weights_of_another_head_are_refused(run_folder, change):
    torch = pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")
    folder, model = run_folder
    weights = dict(model.state_dict())
    if change == "another head":
        weights = {name.replace("head.net.0", "head.fc"): value for name, value in weights.items()}
    else:
        weights["head.net.0.weight"] = torch.zeros(2, 6)
    torch.save(weights, folder / "model_epoch010.pt")
    with pytest.raises(ModelFileError, match=r"no linear head head\.net\.0"):
        hydrology().RunFolder(folder)


def edited(path, **changes):
    import yaml

    config = yaml.safe_load(path.read_text()) | changes
    path.write_text(yaml.safe_dump(config))


@pytest.mark.parametrize(
    "change",
    [{"model": "ealstm"}, {"head": "gmm"}, {"output_activation": "relu"}, {"statics_embedding": {"type": "fc"}},
     {"target_variables": ["a", "b"]}, {"dynamic_inputs": {"1h": ["rain"]}}, {"use_basin_id_encoding": True}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_other_models_are_refused_by_name(run_folder, change):
    folder, _ = run_folder
    edited(folder / "config.yml", **change)
    with pytest.raises(ArgumentError, match=next(iter(change))):
        hydrology().RunFolder(folder)


def test_what_a_run_folder_lacks_is_named(run_folder, monkeypatch):
    folder, _ = run_folder
    module = hydrology()
    with pytest.raises(ArgumentError, match="lacks elev"):
        module.RunoffBmi().initialize(configured(folder, {"slope": 4.0}))
    edited(folder / "train_data" / "train_data_scaler.yml", attribute_means={"slope": 1.0})
    with pytest.raises(ModelFileError, match="lacks elev"):
        module.RunFolder(folder)
    for path in folder.glob("*.pt"):
        path.unlink()
    with pytest.raises(ModelFileError, match="no model_epoch"):
        module.RunFolder(folder)
    with pytest.raises(ModelFileError, match="cannot be read"):
        module.RunFolder(folder / "train_data")
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(BackendError, match=r"fastlstm\[hydrology\]"):
        module.RunFolder(folder)


def test_recipes_differ_where_gates_are_swapped():
    """The test of the test: neuralhydrology's order f, o, g, and no other."""
    rng, weights = np.random.default_rng(1), ealstm_weights()
    x = ealstm.joined(rng.normal(size=(6, 5, D)), rng.normal(size=(5, S)))
    with REFERENCE.active():
        expected = ealstm.from_neuralhydrology(weights)[0](x)[0]
        for order in itertools.permutations(range(3)):
            if order == (0, 1, 2):
                continue
            mixed = {n: np.concatenate([np.split(v, 3, -1)[k] for k in order], -1) if "dynamic" in n else v
                     for n, v in weights.items()}  # fmt: skip
            assert np.abs(ealstm.from_neuralhydrology(mixed)[0](x)[0] - expected).max() > 1e-2
