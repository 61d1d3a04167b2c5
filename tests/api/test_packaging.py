"""The wheel and the sdist: what is in them, that they work when installed, and what importing them costs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastlstm

ROOT = Path(__file__).parents[2]
IGNORED = ("__pycache__", ".*", "build", "dist", "*.egg-info", "*.py[cod]", "*.nb[ic]")


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command that has to succeed, in a folder far from the checkout, and return what it printed."""
    arguments = [str(part) for part in command]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    result = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Copy what git would hand out, so that no old build/ in the checkout has a say."""
    copy = tmp_path_factory.mktemp("source") / "fastlstm"
    return Path(shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*IGNORED)))


@pytest.fixture(scope="module")
def dist(source, tmp_path_factory) -> Path:
    """Build the sdist, and from it the wheel; without isolation, which would need the network."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    return folder


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def shipped(source: Path) -> set[str]:
    """Every file of the package, as the checkout has it: kernels/ is fastlstm/kernels/ once installed."""
    files = {path for top in ("fastlstm", "kernels") for path in (source / top).rglob("*") if path.is_file()}
    names = {path.relative_to(source).as_posix() for path in files}
    return {f"fastlstm/{name}" if name.startswith("kernels/") else name for name in names}


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_the_package_and_nothing_else(source, dist):
    info = f"fastlstm-{fastlstm.__version__}.dist-info"
    metadata = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    wheel = only(dist, "*.whl")
    assert names_in(wheel) == shipped(source) | {f"{info}/{name}" for name in metadata}
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"{info}/top_level.txt").split() == [b"fastlstm"]
        assert b"Root-Is-Purelib: true" in archive.read(f"{info}/WHEEL")
        assert f"\nVersion: {fastlstm.__version__}\n".encode() in archive.read(f"{info}/METADATA")


def test_the_list_of_files_is_not_an_empty_promise(source):
    """The test above compares with the checkout: so let the checkout have what matters, and no more than that."""
    names = shipped(source)
    wanted = {
        "fastlstm/py.typed",
        "fastlstm/lstm.py",
        "fastlstm/kernels/__init__.py",
        "fastlstm/kernels/cpu/cell_step.py",
        "fastlstm/backends/cuda/backend.py",
        "fastlstm/kernels/cuda/cell_step.cuh",
    }
    assert wanted <= names
    data = {name for name in names if name.startswith("fastlstm/demo/data/")}
    assert {Path(name).name for name in data} == {"SOURCES.txt", "co2.npz", "japanese-vowels.npz"}
    assert {Path(name).suffix for name in names - data} <= {".py", ".typed", ".cu", ".cuh"}
    assert not any(part.startswith("test") for name in names for part in Path(name).parts)


def test_the_wheel_is_the_same_without_the_detour_by_the_sdist(source, dist, tmp_path):
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, source, cwd=tmp_path)
    assert names_in(only(tmp_path, "*.whl")) == names_in(only(dist, "*.whl"))


def test_the_sdist_can_be_built_from_and_read(source, dist):
    with tarfile.open(only(dist, "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kernels = {name.replace("fastlstm/kernels/", "kernels/") for name in shipped(source)}
    assert kernels | {"pyproject.toml", "README.md", "LICENSE"} <= names


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory) -> Path:
    """Install the wheel into a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    options = ["--no-deps", "--no-index", "--disable-pip-version-check", "--quiet", "--target", folder]
    run(sys.executable, "-m", "pip", "install", *options, only(dist, "*.whl"), cwd=folder)
    return folder


IMPORT_ALL = """
import json, pkgutil, sys
from importlib import import_module
from importlib.metadata import entry_points
import fastlstm, fastlstm.kernels, numpy

lstm = fastlstm.LSTM(3, 8, seed=0)
y, (h_n, c_n) = lstm(numpy.ones((5, 2, 3), numpy.float32))
found = [module.name for module in pkgutil.walk_packages(fastlstm.__path__, "fastlstm.")]
(command,) = [point for point in entry_points(group="console_scripts", name="fastlstm")]
print(json.dumps({
    "files": [fastlstm.__file__, fastlstm.kernels.__file__], "shape": y.shape, "modules": found,
    "cpu": import_module("fastlstm.backends.cpu").__file__, "command": callable(command.load()),
}))
"""


def test_the_installed_wheel_works_away_from_the_checkout(source, installed, tmp_path):
    assert not (installed / "kernels").exists(), "there is no top-level kernels"
    variables = {"PYTHONPATH": str(installed), "FASTLSTM_BACKEND": "reference"}
    found = json.loads(run(sys.executable, "-c", IMPORT_ALL, cwd=tmp_path, **variables))
    assert all(Path(name).is_relative_to(installed) for name in [*found["files"], found["cpu"]])
    assert found["shape"] == [5, 2, 8]
    assert found["command"] is True
    modules = {name.removesuffix(".py").removesuffix("/__init__") for name in shipped(source) if name.endswith(".py")}
    assert {"fastlstm", *found["modules"]} == {name.replace("/", ".") for name in modules}


@pytest.mark.parametrize("named", ["cpu", "reference"])
def test_python_works_in_the_folder_of_the_checkout(source, dist, tmp_path, named):
    """Which is where a newcomer types it, after ``pip install .``; it finds the checkout before the installation."""
    code = IMPORT_ALL.partition("found =")[0] + "print(fastlstm.kernels.__path__[0], *y.shape)"
    variables = {"PYTHONSAFEPATH": "", "FASTLSTM_BACKEND": named, "NUMBA_CACHE_DIR": str(tmp_path)}
    assert run(sys.executable, "-c", code, cwd=source, **variables).split() == [str(source / "kernels"), "5", "2", "8"]
    with zipfile.ZipFile(only(dist, "*.whl")) as archive:  # where fastlstm/kernels is kernels/, not what stands there
        installed = archive.read("fastlstm/kernels/__init__.py")
    assert installed == (source / "kernels" / "__init__.py").read_bytes()


def test_the_package_under_test_is_whole():
    """Fails if pytest finds the checkout in place of an installation, as ``python -m pytest`` does."""
    result = run(sys.executable, "-c", "import fastlstm.kernels; print(fastlstm.__file__)", cwd=Path(os.sep))
    assert Path(result.strip()) == Path(fastlstm.__file__)


HEAVY = ("numba", "llvmlite", "cupy", "torch", "scipy", "pandas", "matplotlib", "sklearn", "onnx", "onnxruntime",
         "h5py", "xarray", "dask", "mpi4py", "jax")  # fmt: skip


def test_importing_loads_neither_numba_nor_cupy(tmp_path):
    loaded = run(sys.executable, "-c", "import sys, fastlstm; print(*sys.modules)", cwd=tmp_path).split()
    assert "fastlstm.lstm" in loaded
    assert {name.partition(".")[0] for name in loaded}.isdisjoint(HEAVY)


TIME_IMPORT = """
from time import thread_time
start = thread_time()
import numpy
between = thread_time()
import fastlstm
print(thread_time() - start, between - start)
"""


def test_importing_takes_less_than_a_fifth_of_a_second(tmp_path):
    """NumPy's own import, more than half of it, is counted too.

    The time is that of the thread on a processor, which is what a clock shows if the machine has nothing else to do
    and the files are in its memory; and the shortest of some runs, because the tests may share the machine.
    """
    runs = [run(sys.executable, "-c", TIME_IMPORT, cwd=tmp_path).split() for _ in range(5)]
    total, numpy_alone = min((float(total), float(numpy_alone)) for total, numpy_alone in runs)
    assert total < 0.2, f"import fastlstm took {total:.3f} s at best, of which NumPy took {numpy_alone:.3f} s"
