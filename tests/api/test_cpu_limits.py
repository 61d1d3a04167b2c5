"""The limits on the number of threads: environment variables, and the CPU quotas of control groups."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import fastlstm
from fastlstm import diagnostics
from fastlstm.backends import cpu_limits, threads
from fastlstm.backends.cpu_limits import Limit, cgroup_cpus, limits

VARIABLES = ("FASTLSTM_NUM_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS")
CORES = "the cores this process may run on"


@pytest.fixture
def machine(monkeypatch):
    """Sets cores, quota and variables, and has them looked up."""

    def set_up(cores, quota=None, **variables):
        monkeypatch.setattr(threads, "usable_cores", lambda: cores)
        monkeypatch.setattr(threads, "cgroup_cpus", lambda: quota)
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        fastlstm.set_num_threads(None)
        return fastlstm.get_num_threads(), threads.describe_num_threads().partition(": ")[2]

    yield set_up
    monkeypatch.undo()
    fastlstm.set_num_threads(None)


@pytest.mark.parametrize(
    ("given", "expected", "reason"),
    [
        ({}, 8, CORES),
        ({"OMP_NUM_THREADS": "3"}, 3, "OMP_NUM_THREADS=3"),
        ({"OMP_NUM_THREADS": " 3 "}, 3, "OMP_NUM_THREADS=3"),
        ({"OMP_NUM_THREADS": "4,2"}, 4, "OMP_NUM_THREADS=4"),  # of nested teams: the first is the outermost
        ({"OMP_NUM_THREADS": "64"}, 8, CORES),
        ({"NUMBA_NUM_THREADS": "5"}, 5, "NUMBA_NUM_THREADS=5"),
        ({"OMP_NUM_THREADS": "6", "NUMBA_NUM_THREADS": "5"}, 5, "NUMBA_NUM_THREADS=5"),
        ({"quota": 2.0}, 2, "a cgroup's quota of 2 CPUs"),
        ({"quota": 2.9}, 2, "a cgroup's quota of 2.9 CPUs"),  # a third thread would be halted
        ({"quota": 0.25}, 1, "a cgroup's quota of 0.25 CPUs"),
        ({"quota": 100.0}, 8, CORES),
        ({"quota": 3.0, "OMP_NUM_THREADS": "2"}, 2, "OMP_NUM_THREADS=2"),
        ({"quota": 1.0, "OMP_NUM_THREADS": "2"}, 1, "a cgroup's quota of 1 CPUs"),
        ({"quota": 1.0, "OMP_NUM_THREADS": "1", "FASTLSTM_NUM_THREADS": "12"}, 12, "FASTLSTM_NUM_THREADS=12"),
        *(
            ({"OMP_NUM_THREADS": wrong, "NUMBA_NUM_THREADS": wrong}, 8, CORES)
            for wrong in ("", "0", "-2", "many", "1.5", "0x2", "\u0663", "9" * 40, ",3", "3;4")
        ),
    ],
    ids=str,
)
def test_the_least_limit_holds_unless_fastlstm_s_own_says_otherwise(machine, given, expected, reason):
    assert machine(8, **given) == (expected, reason)


@pytest.mark.parametrize("wrong", ["0", "-2", "many", "1.5", "\u0663", "9" * 40])
def test_a_wrong_number_of_our_own_is_ignored_with_a_warning(machine, wrong):
    with pytest.warns(UserWarning, match="FASTLSTM_NUM_THREADS=.*is ignored"):
        assert machine(8, FASTLSTM_NUM_THREADS=wrong) == (8, CORES)


def test_set_num_threads_holds_until_the_default_is_restored(machine):
    machine(8, quota=2.0, OMP_NUM_THREADS="4")
    fastlstm.set_num_threads(6)
    assert fastlstm.get_num_threads() == 6 and "set_num_threads" in threads.describe_num_threads()
    fastlstm.set_num_threads(None)
    assert fastlstm.get_num_threads() == 2


def test_cores_are_counted_at_each_call_and_files_are_not_read(machine, monkeypatch):
    machine(8, OMP_NUM_THREADS="4")
    monkeypatch.setattr(threads, "cgroup_cpus", lambda: pytest.fail("files were read"))
    for cores, expected in ((2, 2), (16, 4)):
        monkeypatch.setattr(threads, "usable_cores", lambda cores=cores: cores)
        assert fastlstm.get_num_threads() == expected


def test_info_says_which_limit_holds(machine):
    machine(8, quota=2.0)
    if diagnostics.backends()["cpu"] is not None:
        pytest.skip("the CPU backend does not run here")
    assert diagnostics.describe()["threads"] == "at most 2 per call: a cgroup's quota of 2 CPUs"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({"OMP_NUM_THREADS": "1"}, "1"), ({"OMP_NUM_THREADS": "1", "FASTLSTM_NUM_THREADS": "3"}, "3")],
    ids=str,
)
def test_the_environment_of_a_process_is_heeded(variables, expected):
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
    command = "import fastlstm; print(fastlstm.get_num_threads())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", command], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == expected, done.stderr


@pytest.fixture
def files(tmp_path):
    """Write the files that stand for /proc/self/cgroup and below /sys/fs/cgroup; return what they allow."""

    def write(membership, contents):
        for name, text in contents.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        (tmp_path / "membership").write_text(membership)
        return cgroup_cpus(tmp_path / "membership", tmp_path / "cgroup")

    return write


V1 = "12:cpuset:/a\n4:cpu,cpuacct:/docker/1f\n1:name=systemd:/docker/1f\n"
V1_FILES = ("cpu.cfs_quota_us", "cpu.cfs_period_us")


def version_1(folder, quota, period="100000\n"):
    return {f"{folder}/{V1_FILES[0]}": quota, f"{folder}/{V1_FILES[1]}": period}


@pytest.mark.parametrize(
    ("membership", "contents", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),  # the root of a container's own namespace
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n"}, 4.0),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/a/b\n", {"a/b/cpu.max": "800000 100000\n", "a/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000\n", "a/cpu.max": "800000 100000\n"}, 2.0),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/c/cpu.max": "200000 100000\n"}, None),  # of another process
        ("0::/../../a\n", {"cpu.max": "300000 100000\n"}, 3.0),  # beyond what this namespace shows
        ("0::/docker/1f\n", {"cpu.max": "50000 100000\n"}, 0.5),  # named as outside, mounted as the root
        (V1, version_1("cpu,cpuacct/docker/1f", "250000\n"), 2.5),
        (V1, version_1("cpu,cpuacct/docker", "250000\n") | version_1("cpu,cpuacct/docker/1f", "-1\n"), 2.5),
        (V1, version_1("cpu", "250000\n"), 2.5),
        (V1, version_1("cpu,cpuacct/docker/1f", "-1\n"), None),
        ("1:cpuacct:/\n2:cpuset:/\n", version_1("cpuacct", "100000\n") | version_1("cpu", "100000\n"), None),
        (V1 + "0::/x\n", version_1("cpu/docker/1f", "300000\n") | {"unified/x/cpu.max": "200000 100000\n"}, 2.0),
    ],
    ids=str,
)
def test_the_least_quota_of_a_process_s_groups_and_those_above_counts(files, membership, contents, expected):
    assert files(membership, contents) == expected


@pytest.mark.parametrize(
    "text",
    ["", "max\n", "200000\n", "x 100000\n", "200000 0\n", "200000 x\n", "-5 100000\n", "0 100000\n", "1 2 3\n",
     "2e5 100000\n", b"\xff\x00", "9" * 5000 + " 1\n"],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_a_quota_that_makes_no_sense_is_no_limit(files, text):
    assert files("0::/a\n", {"a/cpu.max": text}) is None
    if isinstance(text, str):
        quota, _, period = text.partition(" ")
        assert files(V1, version_1("cpu/docker/1f", quota, period)) is None


@pytest.mark.parametrize("membership", ["", "no colons\n", "::\n", "0:\n", "4:cpu\n", "0::/a\0b\n", "0::" + "/x" * 500])
def test_a_membership_that_makes_no_sense_is_no_limit(files, membership):
    assert files(membership, {"a/cpu.max": "100000 100000\n"}) is None


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert cgroup_cpus(tmp_path / "none", tmp_path) is None
    assert cgroup_cpus(tmp_path, tmp_path) is None  # a folder in the file's place


def test_this_machine_s_own_files_are_understood():
    cpus = cgroup_cpus()
    assert cpus is None or cpus > 0
    assert cpu_limits.usable_cores() >= 1
    assert all(isinstance(limit, Limit) and limit.threads >= 1 for limit in limits(os.environ, cpus))
