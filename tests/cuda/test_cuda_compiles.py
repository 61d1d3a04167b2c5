"""Every kernel compiles for every generation of GPUs, with CuPy's options, and takes no more than it should.

NVRTC comes from its pip wheel; neither a GPU nor a driver is needed.
"""

from __future__ import annotations

import functools
import re

import numpy as np
import nvrtc
import pytest

from fastlstm.backends.cuda.launch import FIELDS
from fastlstm.kernels.cuda import loader

pytestmark = pytest.mark.skipif(nvrtc.library() is None, reason="the wheel nvidia-cuda-nvrtc is not installed")

ARCHITECTURES = (75, 80, 90, 100, 120)
BUILDS = [
    (np.dtype(name), width, variant)
    for name in ("float32", "float64")
    for width in (1, loader.wide(np.dtype(name)))
    for variant in nvrtc.VARIANTS
]

# Registers of a thread at most, without any spilled. A multiprocessor has 65,536: at 72 there is room for 7 blocks of
# 128 threads, at 96 (a plain cell's four units a thread, so that each has four times the loads under way) for 5, at
# 152 (a peephole cell's, with three more weights and three more sums a unit) for 3, as at 168 (the same with every
# variant and resets). A thread of a single step holds 16 sums and where four rows begin; 3 blocks have room, too, and
# its time is that of reading the weights, with a block or two a multiprocessor.
MOST_REGISTERS = {
    (): {"narrow step kernel": 72, "wide step kernel": 96, "single step": 168, "other": 64},
    ("RESETS",): {"narrow step kernel": 80, "wide step kernel": 112, "single step": 168, "other": 64},
    "variant": {"narrow step kernel": 80, "wide step kernel": 152, "single step": 168, "other": 64},
    "with resets": {"narrow step kernel": 88, "wide step kernel": 168, "single step": 168, "other": 64},
}
SHARED = {"column_sum": {"float32": 1024, "float64": 2048}}


def name_of(build: tuple[np.dtype, int, tuple[str, ...]]) -> str:
    return "-".join([build[0].name, str(build[1]), *build[2]])


@functools.cache
def compiled(architecture: int, build: tuple[np.dtype, int, tuple[str, ...]]) -> tuple[bytes, str]:
    options = (*loader.options(*build), *nvrtc.OPTIONS_OF_CUPY, f"-arch=sm_{architecture}", "--ptxas-options=-v")
    return nvrtc.compile_source(loader.source(), options)


def test_all_files_and_kernels_are_listed():
    folder = loader.files("fastlstm.kernels.cuda")
    on_disk = {path.name for path in folder.iterdir() if path.name.endswith((".cu", ".cuh"))}
    assert on_disk == {*loader.HEADERS, *loader.FILES, *loader.PERSISTENT}
    assert set(re.findall(r"__global__\s+void\s+(\w+)", loader.source())) == set(loader.kernel_names())
    assert {"step_forward", "step_backward", "column_sum"} <= set(loader.kernel_names())
    assert "#include" not in loader.source() + loader.persistent_source()  # CuPy's cache would not see a change in it


def test_the_variants_are_the_macros_of_the_cell_step():
    text = (loader.files("fastlstm.kernels.cuda") / "cell_step.cuh").read_text(encoding="utf-8")
    assert set(re.findall(r"(?:#ifn?def |defined\()(\w+)", text)) == set(loader.VARIANTS)
    assert {macro.partition("=")[0] for variant in nvrtc.VARIANTS for macro in variant} == {*loader.VARIANTS, "RESETS"}


def test_the_record_of_a_step_is_the_same_on_both_sides():
    fields = re.search(r"struct Step \{(.*?)\};", loader.source(), re.DOTALL)[1]
    names = [name for line in re.findall(r"index_t ([\w, ]+);", fields) for name in line.split(", ")]
    assert tuple(names) == FIELDS
    assert len(re.findall(";", fields)) == len(re.findall(r"index_t", fields))  # nothing of another type


@pytest.mark.parametrize("build", BUILDS, ids=name_of)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_and_keep_to_their_registers(architecture, build):
    cubin, log = compiled(architecture, build)
    assert cubin.startswith(b"\x7fELF")
    assert "warning" not in log
    found = nvrtc.resources(log)
    assert found.keys() == set(loader.kernel_names())
    name, variant = build[0].name, build[2]
    most = MOST_REGISTERS.get(variant) or MOST_REGISTERS["with resets" if "RESETS" in variant else "variant"]
    for kernel, taken in found.items():
        step = ("narrow" if build[1] == 1 else "wide") + " step kernel"
        kind = {"step_forward": step, "step_backward": step, "single_step": "single step"}.get(kernel, "other")
        assert taken.registers <= most[kind], (kernel, taken)
        assert taken.spills == 0 and taken.stack == 0, (kernel, taken)
        assert taken.shared == SHARED.get(kernel, {}).get(name, 0), (kernel, taken)


@pytest.mark.parametrize("build", BUILDS, ids=name_of)
def test_the_code_is_what_it_should_be(build):
    options = (*loader.options(*build), *nvrtc.OPTIONS_OF_CUPY, "-arch=compute_90")
    ptx = nvrtc.compile_source(loader.source(), options, "PTX")[0].decode()
    assert re.search(r"\b(atom|red)\.", ptx) is None  # nothing whose order is left to chance
    if build[0].name == "float32":
        assert ".f64" not in ptx  # no detour through double precision
        assert "tanh.approx" not in ptx and "div.full" not in ptx and "div.approx" not in ptx  # no fast-math
    if build[1] > 1:  # loads and stores of 128 bits
        form = "v4.f32" if build[1] == 4 else "v2.f64"
        for kind in ("ld.global", "st.global"):
            assert re.search(rf"{kind}(\.nc)?\.{form}", ptx) or re.search(rf"{kind}(\.nc)?\.v4\.b32", ptx), kind


def test_a_spill_is_read_off_the_log():
    # The reader of the log is what the bounds rest on: a kernel held at 24 registers has to spill, and it must see it.
    options = (*loader.options(np.dtype("float64"), 2), *nvrtc.OPTIONS_OF_CUPY, "-arch=sm_90")
    _, log = nvrtc.compile_source(loader.source(), (*options, "--maxrregcount=24", "--ptxas-options=-v"))
    taken = nvrtc.resources(log)["step_backward"]
    assert taken.registers <= 24 and taken.spills > 0


@pytest.mark.parametrize(
    ("file", "old"), [("cell_step.cuh", "h = o * OfOutput::value(c);"), ("step.cu", "store(dc + at, dc_t);")]
)
def test_an_error_is_reported_with_its_file_and_line(file, old):
    assert old in loader.source()
    broken = loader.source().replace(old, old.removesuffix(";"))
    with pytest.raises(RuntimeError, match=rf"{file}\(\d+\): error"):
        nvrtc.compile_source(broken, (*loader.options(np.dtype("float32"), 1), "-arch=sm_90"))
