"""A rainfall-runoff model of neuralhydrology behind the Basic Model Interface, stepped without PyTorch: a recipe.

The NextGen framework and others couple models through this interface (``bmipy.Bmi``, Hutton et al. 2020): set the
inputs of the next time step, ``update()``, read the output. The model comes from a run folder of neuralhydrology:
one LSTM layer ("cudalstm") on weather and catchment attributes, and a linear head.

The configuration file that ``initialize`` reads is YAML::

    run_dir: runs/my_run_2801_191806
    static_attributes: {elev_mean: 92.68, slope_mean: 17.79}   # of the catchment; a list of these for several
    time_step_seconds: 3600

bmipy is optional: the class derives from its ``Bmi`` if it is installed. PyYAML is required (``pip install
"fastlstm[hydrology]"``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastlstm import LSTM
from fastlstm.cell import real
from fastlstm.errors import ArgumentError, ModelFileError, shown
from fastlstm.interchange.source import need
from fastlstm.interchange.torch_file import load_arrays

__all__ = ["RunFolder", "RunoffBmi"]

HostArray = np.ndarray[Any, Any]
try:
    from bmipy import Bmi
except ImportError:
    Bmi = object

# Keys of the configuration that this recipe does not support.
_LACKING = ("statics_embedding", "dynamics_embedding", "use_basin_id_encoding", "evolving_attributes", "mass_inputs",
            "autoregressive_inputs", "hindcast_inputs")  # fmt: skip


class RunFolder:
    """A run folder of neuralhydrology: variable names, scaling, and the weights of the last epoch.

    Parameters
    ----------
    path : path
        The folder, with ``config.yml``, ``train_data/train_data_scaler.yml`` and ``model_epoch*.pt``.

    Raises
    ------
    ArgumentError
        If the model is another than this recipe steps; the key of the configuration is named.
    BackendError
        If PyYAML is missing.
    ModelFileError
        If the folder lacks something.
    """

    def __init__(self, path: str | Path) -> None:
        folder = Path(path)
        config, scaler = (_yaml(folder / name) for name in ("config.yml", "train_data/train_data_scaler.yml"))
        _check(config)
        self.inputs: list[str] = list(config["dynamic_inputs"])
        # neuralhydrology sorts the attributes by name.
        self.attributes: list[str] = sorted(_names(config, "static_attributes"))
        (self.target,) = config["target_variables"]
        self.clips = self.target in _names(config, "clip_targets_to_zero")
        weights = _last_epoch(folder)
        self.lstm = LSTM.load_torch(weights, prefix="lstm.").freeze()
        head = load_arrays(weights, "head.net.0.")
        shapes = {name: array.shape for name, array in head.items()}
        if shapes != {"weight": (1, self.lstm.cell.output_size), "bias": (1,)}:
            raise ModelFileError(f"{str(weights)!r} has no linear head head.net.0 of one target, but {shown(shapes)}")
        self.weight, self.bias = head["weight"], head["bias"]  # (1, H), (1,)
        center, scale = (_of_variables(scaler, f"xarray_feature_{name}") for name in ("center", "scale"))
        self.center, self.scale = (_row(values, self.inputs) for values in (center, scale))
        self.attribute_center, self.attribute_scale = (
            _row(scaler.get(f"attribute_{name}") or {}, self.attributes) for name in ("means", "stds")
        )
        (self.target_center,), (self.target_scale,) = (_row(values, [self.target]) for values in (center, scale))
        if self.lstm.cell.input_size != len(self.inputs) + len(self.attributes):
            raise ModelFileError(
                f"the model reads {self.lstm.cell.input_size} features, the configuration lists others"
            )

    def static(self, given: Sequence[Mapping[str, float]]) -> HostArray:
        """Scale the attributes of catchments, (B, S)."""
        for attributes in given:
            if not isinstance(attributes, Mapping):
                raise ArgumentError(
                    f"static_attributes must be names and numbers, or a list of these, got {shown(attributes)}"
                )
            missing = [name for name in self.attributes if name not in attributes]
            if missing:
                raise ArgumentError(f"static_attributes lacks {', '.join(missing)}")
            wrong = [name for name in self.attributes if not math.isfinite(_number(attributes[name]))]
            if wrong:
                raise ArgumentError(
                    f"{wrong[0]} in static_attributes must be a finite number, got {shown(attributes[wrong[0]])}"
                )
        rows = np.array([[_number(attributes[name]) for name in self.attributes] for attributes in given])
        return (rows.reshape(len(given), -1) - self.attribute_center) / self.attribute_scale

    def step(self, x_d: HostArray, static: HostArray, state: Any) -> tuple[HostArray, Any]:
        """Advance catchments by one time step: inputs (B, D) in their own units to the target (B,) in its own."""
        x = np.concatenate([(x_d - self.center) / self.scale, static], axis=1).astype(self.lstm.cell.dtype)
        h, state = self.lstm.step(x, state)
        found = (h @ self.weight.T + self.bias)[:, 0] * self.target_scale + self.target_center
        return (np.maximum(found, 0.0) if self.clips else found), state


def _last_epoch(folder: Path) -> Path:
    """Return the weights of the last epoch; their numbers have at least three digits, and four from 1000 on."""
    matches = ((re.fullmatch(r"model_epoch(\d+)\.pt", path.name), path) for path in folder.glob("model_epoch*.pt"))
    epochs = {int(match[1]): path for match, path in matches if match}
    if not epochs:
        raise ModelFileError(f"{str(folder)!r} has no model_epoch*.pt")
    return epochs[max(epochs)]


def _yaml(path: Path) -> Any:
    yaml = need("yaml", "hydrology")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ModelFileError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ModelFileError(f"{str(path)!r} does not hold names and values")
    return found


def _names(config: Mapping[str, Any], name: str) -> list[str]:
    """Return a list of names in the configuration, which may be left out."""
    given = config.get(name) or []
    if not isinstance(given, list) or not all(isinstance(item, str) for item in given):
        raise ArgumentError(f"{name} must be a list of names here, got {shown(given)}")
    return given


def _check(config: Mapping[str, Any]) -> None:
    for name in ("dynamic_inputs", "target_variables"):
        if not _names(config, name):
            raise ArgumentError(f"{name} must be a list of names here, got {shown(config.get(name))}")
    expected = {"model": "cudalstm", "head": "regression", "output_activation": "linear"}
    for name, wanted in expected.items():
        if str(config.get(name, wanted)).lower() != wanted:
            raise ArgumentError(f"{name} must be {wanted} here, got {shown(config[name])}")
    asked = [name for name in _LACKING if config.get(name)]
    if asked or len(config["target_variables"]) != 1:
        raise ArgumentError(f"this recipe steps one target and no {', '.join(asked or ['several target_variables'])}")


def _of_variables(scaler: Mapping[str, Any], name: str) -> dict[str, float]:
    """Read numbers that xarray wrote."""
    try:
        return {variable: float(entry["data"]) for variable, entry in scaler[name]["data_vars"].items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ModelFileError(f"the scaler has no numbers in {name}") from error


def _number(value: Any) -> float:
    """Return a number of a YAML file, or NaN; PyYAML reads 1e-3, without a point, as a string."""
    try:
        return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return math.nan


def _row(values: Any, names: Sequence[str]) -> HostArray:
    missing = [name for name in names if not isinstance(values, Mapping) or name not in values]
    if missing:
        raise ModelFileError(f"the scaler lacks {', '.join(missing)}")
    found = np.array([_number(values[name]) for name in names])
    if not np.all(np.isfinite(found)):
        raise ModelFileError(f"the scaler has no finite numbers for {', '.join(names)}")
    return found


@dataclass
class _Started:
    """What a model has between initialize() and finalize()."""

    run: RunFolder
    static: HostArray  # (catchments, S)
    seconds: float
    values: dict[str, HostArray]  # (catchments,) each
    steps: int = 0
    state: Any = None


@contextmanager
def _fitting(name: str, own: HostArray) -> Iterator[None]:
    """Convert NumPy's errors about shapes and indices of values."""
    try:
        yield
    except (IndexError, TypeError, ValueError) as error:
        raise ArgumentError(f"values or indices do not fit {name}, of {len(own)} catchments: {error}") from error


class RunoffBmi(Bmi):  # type: ignore[misc]
    """The model of a run folder behind the Basic Model Interface; the locations of its grid are the catchments.

    Examples
    --------
    ::

        model = RunoffBmi()
        model.initialize("catchment.yml")
        for hour in forcing:
            for name, values in hour.items():
                model.set_value(name, values)
            model.update()
            runoff = model.get_value_ptr(model.get_output_var_names()[0])[0]
    """

    _started: _Started | None = None

    @property
    def _now(self) -> _Started:
        if self._started is None:
            raise ArgumentError("the model is not initialised: call initialize(config_file) first")
        return self._started

    def initialize(self, config_file: str) -> None:
        """Read the configuration file; see the module's docstring."""
        config = _yaml(Path(config_file))
        if not isinstance(config.get("run_dir"), str):
            raise ArgumentError(f"run_dir must be the path of a run folder, got {shown(config.get('run_dir'))}")
        step = config.get("time_step_seconds", 3600)
        seconds = _number(step)
        if not 0 < seconds < math.inf:
            raise ArgumentError(f"time_step_seconds must be a positive number, got {shown(step)}")
        given = config.get("static_attributes") or {}
        run = RunFolder(Path(config_file).parent / config["run_dir"])
        static = run.static(given if isinstance(given, list) else [given])
        values = {name: np.zeros(len(static)) for name in (*run.inputs, run.target)}
        self._started = _Started(run, static, seconds, values)

    def update(self) -> None:
        """Advance by one time step, on the inputs that were set."""
        now = self._now
        x_d = np.stack([now.values[name] for name in now.run.inputs], axis=1)
        now.values[now.run.target][:], now.state = now.run.step(x_d, now.static, now.state)
        now.steps += 1

    def update_until(self, time: float) -> None:
        """Advance to a time, on the same inputs at each step."""
        end = real(time)
        if not math.isfinite(end):
            raise ArgumentError(f"time must be a finite number, got {shown(time)}")
        while self.get_current_time() < end:
            self.update()

    def finalize(self) -> None:
        """Let go of model and state."""
        self._started = None

    # Names, sizes, times.

    def get_component_name(self) -> str:
        """Name the model."""
        return "fastlstm: rainfall-runoff LSTM of neuralhydrology"

    def get_input_var_names(self) -> tuple[str, ...]:
        """Name the inputs."""
        return tuple(self._now.run.inputs)

    def get_output_var_names(self) -> tuple[str, ...]:
        """Name the outputs: the target."""
        return (self._now.run.target,)

    def get_input_item_count(self) -> int:
        """Count the inputs."""
        return len(self._now.run.inputs)

    def get_output_item_count(self) -> int:
        """Count the outputs."""
        return 1

    def get_var_grid(self, name: str) -> int:
        """Return the only grid."""
        self.get_value_ptr(name)
        return 0

    def get_var_type(self, name: str) -> str:
        """Return the dtype of a variable."""
        return str(self.get_value_ptr(name).dtype)

    def get_var_units(self, name: str) -> str:
        """Return "1": a run folder does not say in which units the data were."""
        self.get_value_ptr(name)
        return "1"

    def get_var_itemsize(self, name: str) -> int:
        """Return the bytes of one number."""
        return int(self.get_value_ptr(name).itemsize)

    def get_var_nbytes(self, name: str) -> int:
        """Return the bytes of all catchments' numbers."""
        return int(self.get_value_ptr(name).nbytes)

    def get_var_location(self, name: str) -> str:
        """Return where values are: at the nodes."""
        self.get_value_ptr(name)
        return "node"

    def get_current_time(self) -> float:
        """Return the seconds since the start."""
        return self._now.steps * self._now.seconds

    def get_start_time(self) -> float:
        """Return 0."""
        return 0.0

    def get_end_time(self) -> float:
        """Return the largest number: there is no end."""
        return float(np.finfo(np.float64).max)

    def get_time_units(self) -> str:
        """Return "s"."""
        return "s"

    def get_time_step(self) -> float:
        """Return the seconds of one step."""
        return self._now.seconds

    # Values.

    def get_value_ptr(self, name: str) -> HostArray:
        """Return a variable's own array, (catchments,): writing to it sets it."""
        values = self._now.values
        if not isinstance(name, str) or name not in values:
            raise ArgumentError(f"there is no variable {shown(name)}; there are {', '.join(values)}")
        return values[name]

    def get_value(self, name: str, dest: HostArray) -> HostArray:
        """Copy a variable to `dest`."""
        return self.get_value_at_indices(name, dest, slice(None))

    def get_value_at_indices(self, name: str, dest: HostArray, inds: Any) -> HostArray:
        """Copy some catchments' values to `dest`."""
        own = self.get_value_ptr(name)
        with _fitting(name, own):
            dest[:] = own[inds]
        return dest

    def set_value(self, name: str, src: HostArray) -> None:
        """Set a variable."""
        self.set_value_at_indices(name, slice(None), src)

    def set_value_at_indices(self, name: str, inds: Any, src: HostArray) -> None:
        """Set a variable of some catchments."""
        own = self.get_value_ptr(name)
        with _fitting(name, own):
            own[inds] = src

    # The grid: points without edges, whose places a run folder does not say.

    def get_grid_rank(self, grid: int) -> int:
        """Return the number of axes."""
        return 1

    def get_grid_size(self, grid: int) -> int:
        """Return the number of catchments."""
        return len(self._now.static)

    def get_grid_type(self, grid: int) -> str:
        """Return "points"."""
        return "points"

    def get_grid_node_count(self, grid: int) -> int:
        """Return the number of catchments."""
        return len(self._now.static)

    def get_grid_edge_count(self, grid: int) -> int:
        """Return 0."""
        return 0

    def get_grid_face_count(self, grid: int) -> int:
        """Return 0."""
        return 0

    def _no_grid(self, grid: int, *_: Any) -> HostArray:
        """Raise NotImplementedError: the grid's points have no coordinates."""
        raise NotImplementedError("the grid is of points, whose places are not known")

    get_grid_shape = get_grid_spacing = get_grid_origin = get_grid_x = get_grid_y = get_grid_z = _no_grid
    get_grid_edge_nodes = get_grid_face_nodes = get_grid_face_edges = get_grid_nodes_per_face = _no_grid
