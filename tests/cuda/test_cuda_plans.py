"""The choice between a persistent kernel and a kernel a step: the table, what it says, and what a refusal does."""

from __future__ import annotations

import functools
import itertools
import re
import types

import cuda_row
import numpy as np
import nvrtc
import persistent_run
import pytest
from harness import Case, problem
from host_cuda import FakeCupy, compiler
from tolerances import assert_close, assert_identical

import fastlstm
from fastlstm import LSTM, dispatch
from fastlstm.backends.cuda import persistent, plans
from fastlstm.backends.cuda.plans import SIZES, Limits, choose, describe
from fastlstm.cell import Cell
from fastlstm.functional import lstm_forward
from fastlstm.kernels.cuda import loader

FLOAT = np.dtype(np.float32)
# Compute capability, multiprocessors and shared memory of a block: A100, H100, B200, RTX 5090.
DEVICES = {80: Limits(80, 108, 166912), 90: Limits(90, 132, 232448), 100: Limits(100, 148, 232448),
           120: Limits(120, 170, 101376)}  # fmt: skip
needs_nvrtc = pytest.mark.skipif(nvrtc.library() is None, reason="the wheel nvidia-cuda-nvrtc is not installed")
needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def free(monkeypatch):
    monkeypatch.setattr(plans, "FORCED", None)


@pytest.mark.parametrize(
    ("limits", "dtype", "hidden", "steps", "batch", "reason"),
    [
        (DEVICES[90], "float64", 128, 100, 1, "float32, not float64"),
        (DEVICES[90], "float32", 1025, 100, 1, "at most 1024 hidden units"),
        (Limits(75, 132, 65536), "float32", 128, 100, 1, "compute capability 8.0"),
        (DEVICES[90], "float32", 128, 2, 1, "fewer than 3 steps"),
        (DEVICES[80], "float32", 1024, 100, 1, "takes 128 multiprocessors, the GPU has 108"),
        (DEVICES[90], "float32", 1024, 100, 32, "cuBLAS is estimated to be faster"),
        (DEVICES[90]._replace(shared=40_000), "float32", 1024, 100, 1, "bytes of shared memory"),
    ],
)
def test_what_does_not_fit_takes_the_step_path_and_says_why(limits, dtype, hidden, steps, batch, reason):
    choice = choose(limits, np.dtype(dtype), hidden, steps * batch, batch)
    assert choice.plan is None and reason in choice.reason
    assert describe(choice) == f"a product and a kernel each step: {choice.reason}"


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
@pytest.mark.parametrize("architecture", DEVICES)
def test_every_plan_fits_its_device(architecture, precision):
    limits = DEVICES[architecture]
    for hidden in range(1, 1025):
        for batch in (1, 2, 3, 16, 64, 255, 10_000):
            plan = choose(limits, FLOAT, hidden, 100 * batch, batch, precision=precision).plan
            if plan is None:
                continue
            assert plan.precision == precision
            sizes = [size for size in SIZES if size != 768 or precision != "tf32"]
            assert plan.size == min(size for size in sizes if size >= hidden)
            assert plan.blocks * plan.groups <= limits.multiprocessors and plan.groups >= 1 and plan.directions == 1
            assert max(plan.shared(False), plan.shared(True)) <= limits.shared
            assert plan.rows == 2 or plan.rows % 4 == 0
            assert plan.cluster == (architecture >= 90 and 2 <= plan.blocks <= 8)
            # No larger part of the batch than one wave needs.
            assert plan.rows == 2 or plan.rows // 2 * plan.groups < batch


@pytest.mark.parametrize("architecture", DEVICES)
def test_two_directions_run_at_once_where_the_device_holds_the_groups_of_both(architecture):
    limits, seen = DEVICES[architecture], set()
    for hidden in (1, 64, 128, 192, 256, 384, 512, 768, 1024):
        for batch in (0, 1, 2, 3, 16, 64, 130, 255, 10_000):
            one, both = (choose(limits, FLOAT, hidden, 100 * batch, batch, directions).plan for directions in (1, 2))
            assert (one is None) == (both is None)
            if both is None:
                continue
            seen.add(both.directions)
            if both.directions == 1:
                assert both == one
                most = max(rows for rows in (2**k for k in range(1, 12)) if rows == 2 or plans._fits(
                    both.size, rows, both.cluster, limits.shared))  # fmt: skip
                assert most * (limits.multiprocessors // both.blocks // 2) < batch or one.groups == 1
                continue
            assert (both.size, both.blocks, both.cluster) == (one.size, one.blocks, one.cluster)
            assert 2 * both.blocks * both.groups <= limits.multiprocessors and both.groups >= 1
            assert both.rows * both.groups >= batch  # one wave
            assert max(both.shared(False), both.shared(True)) <= limits.shared
            assert describe(choose(limits, FLOAT, hidden, 100 * batch, batch, 2), 2).endswith("both directions at once")
    assert seen == {1, 2}


def test_a_path_can_be_forced_and_a_wrong_name_is_an_error(monkeypatch):
    limits = Limits(75, 132, 232448)
    monkeypatch.setattr(plans, "FORCED", "persistent")
    assert choose(limits, FLOAT, 128, 1, 1).plan is not None
    assert choose(limits, np.dtype(np.float64), 128, 1, 1).plan is None
    monkeypatch.setattr(plans, "FORCED", "step")
    assert "FASTLSTM_CUDA_RECURRENCE" in choose(DEVICES[90], FLOAT, 128, 100, 1).reason
    monkeypatch.setattr(plans, "FORCED", "fast")
    with pytest.raises(fastlstm.BackendError, match="must be persistent or step, got 'fast'"):
        choose(DEVICES[90], FLOAT, 128, 100, 1)


def test_rounded_products_are_worth_a_persistent_kernel_for_larger_batches():
    right = {16: {"float32", "tf32", "bf16"}, 64: {"tf32", "bf16"}, 200: {"bf16"}, 300: set()}
    for batch, expected in right.items():
        plan_of = {
            name: choose(DEVICES[90], FLOAT, 1024, 100 * batch, batch, precision=name).plan
            for name in plans.CUBLAS_FROM
        }
        assert {name for name, plan in plan_of.items() if plan} == expected
    # A bfloat16 takes half of the shared memory of a cluster's exchange.
    tf32, bf16 = (
        choose(DEVICES[90], FLOAT, 256, 10_000, 100, precision=name).plan._replace(rows=16) for name in ("tf32", "bf16")
    )
    assert tf32.shared(True) - bf16.shared(True) == 2 * 16 * 1024 * 2


@pytest.mark.parametrize(("precision", "hidden", "rows"), [("tf32", 1000, (32, 16)), ("bf16", 700, (64, 32))])
def test_a_cell_with_peepholes_has_fewer_sequences_a_group(precision, hidden, rows):
    """Its kernel would spill registers; compute capability 9.0 has none that does."""
    device = types.SimpleNamespace(refusals={})
    for architecture, expected in ((100, rows), (90, (64, 64))):
        device.limits = functools.partial(DEVICES.get, architecture)
        for peephole, most in zip((False, True), expected, strict=True):
            cell = Cell(3, hidden, 1, True, 0.0, False, FLOAT, precision=precision, peephole=peephole)
            assert persistent.choice_of(device, cell, 12_000, 120).plan.rows == most


@needs_compiler
def test_a_model_says_how_it_would_run():
    with cuda_row.installed(FakeCupy(architecture="90", multiprocessors=132)) as xp:
        x = xp.array(np.ones((40, 8, 3), np.float32))
        said = LSTM(3, 256, 2, seed=0).to(xp).plan(x)
        assert said == "\n".join(
            ["cuda backend"]
            + [
                f"layer {layer}: one launch a sequence: groups of 8 blocks, a cluster each, weights in registers"
                " (H = 256), 2 sequences a group"
                for layer in (0, 1)
            ]
        )
        two_ways = LSTM(3, 256, bidirectional=True, seed=0).to(xp)
        assert two_ways.plan(x).endswith("2 sequences a group, both directions at once")
        many = xp.array(np.ones((4, 200, 3), np.float32))
        assert two_ways.plan(many).endswith("16 sequences a group, one direction after the other")
        x = xp.array(np.ones((40, 8, 3)))
        assert "each step: persistent kernels are for float32" in LSTM(3, 256, dtype=np.float64).to(xp).plan(x)
        with cuda_row.installed(FakeCupy()):
            x = xp.array(np.ones((40, 8, 3), np.float32))
            assert "need compute capability 8.0" in LSTM(3, 256).to(xp).plan(x)


# What refuses: too much shared memory, more blocks than fit (CuPy raises ValueError), the compiler.
def too_much_shared(monkeypatch):
    monkeypatch.setattr("host_cuda.build.MOST_SHARED", 1024)


def too_many_blocks(monkeypatch):
    init = FakeCupy.__init__

    def fewer(self, *args, **options):
        init(self, *args, **options)
        self.how["multiprocessors"] = 0

    monkeypatch.setattr(FakeCupy, "__init__", fewer)


REFUSALS = {
    "shared memory": (too_much_shared, None, "LaunchError: CUDA_ERROR_INVALID_VALUE"),
    "blocks": (too_many_blocks, None, "ValueError: persistent_forward: more blocks than can be resident"),
    "compiler": (None, lambda code: code.replace("published(group, 0);", "oh no"), "CompilationError"),
}


@needs_compiler
@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_takes_the_step_path_once_and_for_all(monkeypatch, name):
    prepare, change, said = REFUSALS[name]
    hidden = 100 if name == "blocks" else 20  # only a group of several blocks asks for all of them at once
    p = problem(Case(6, 3, 3, hidden, 1, True, lengths=(6, 0, 5))).astype(np.float32)
    found = {}
    for refused in (False, True):
        monkeypatch.setattr(plans, "FORCED", None if refused else "step")
        if refused and prepare:
            prepare(monkeypatch)
        with cuda_row.installed(FakeCupy(architecture="80", change=change, multiprocessors=132)) as xp:
            params = {k: xp.array(value) for k, value in p.params.items()}
            state = tuple(map(xp.array, p.state))
            # Both directions at once are refused at the first call, each alone at the second.
            results = [lstm_forward(params, xp.array(p.x), state, p.lengths) for _ in range(3)]
            found[refused] = {
                f"{k}{n}": v.get() for n, (y, s, _) in enumerate(results) for k, v in zip("yhc", (y, *s), strict=True)
            }
            device = dispatch.backend_named("cuda").device
            assert not any(launched.startswith("persistent") for launched in xp.pool.launched[-4:])
            choice = persistent.choice_of(device, p.cell, p.lengths.sum(), 3)
            assert len(device.refusals) == 2 * refused
            if refused:
                assert "a persistent kernel was refused (" in choice.reason and said in choice.reason
                assert xp.pool.launched.count("persistent_forward") <= 2
    assert_identical(found[True], found[False])


@needs_compiler
def test_a_variant_that_is_refused_refuses_no_other_variant(monkeypatch):
    """Here, resets do not compile."""
    monkeypatch.setattr(plans, "FORCED", "persistent")
    p = problem(Case(4, 3, 3, 20, resets=True)).astype(np.float32)
    broken = "#ifdef RESETS\n    oh no\n#endif\n"

    def change(code):
        return broken + code if code == loader.persistent_source() else code

    with cuda_row.installed(FakeCupy(architecture="80", change=change, multiprocessors=132)) as xp:
        params = {k: xp.array(value) for k, value in p.params.items()}
        for resets, expected in ((xp.array(p.resets), {"step_forward"}), (None, {"persistent_forward"})):
            xp.pool.launched.clear()
            lstm_forward(params, xp.array(p.x), resets=resets)
            assert {name for name in xp.pool.launched if name.endswith("_forward")} == expected
        device = dispatch.backend_named("cuda").device
        assert len(device.refusals) == 1
        assert persistent.choice_of(device, p.cell, 12, 3).plan is not None
        assert "refused" in persistent.choice_of(device, p.cell, 12, 3, resets=True).reason


@needs_compiler
@pytest.mark.parametrize("refused", [2, 5, 8])
def test_a_refusal_in_a_later_wave_takes_the_step_path_for_all_rows(monkeypatch, refused):
    """Each call has three waves: forward, inference and backward. A tape's gates and the sums for dp are made anew."""
    p = problem(Case(3, 11, 3, 20, lengths="zeros", peephole=True)).astype(np.float32)
    found = {}
    for path in ("step", "persistent"):
        monkeypatch.setattr(plans, "FORCED", path)
        with cuda_row.installed(FakeCupy(architecture="80", multiprocessors=2)) as xp:
            device = dispatch.backend_named("cuda").device
            calls, launch = [], device.launch_resident

            def fails_once(*args, launch=launch, calls=calls):
                calls.append(args[0])
                if len(calls) == refused:
                    raise persistent.RefusedLaunchError("busy")
                launch(*args)

            monkeypatch.setattr(plans, "_rows", lambda *_: 2)
            monkeypatch.setattr(device, "launch_resident", fails_once)
            found[path] = persistent_run.found_by(p, xp.array, host=lambda value: value.get(), compare=False)
            if path == "persistent":
                assert [name.partition("_")[2] for name in calls[:refused]] == (
                    ["forward"] * min(refused, 6) + ["backward"] * (refused - 6)
                )
                assert list(device.refusals.values()) == ["busy"]
                assert persistent.choice_of(device, p.cell, p.lengths.sum(), 11).reason.endswith("refused (busy)")
    assert_close("agreement", found["persistent"], found["step"], backend="cuda", dtype=FLOAT)


# ---- the compiler ----


VARIANTS = [*nvrtc.VARIANTS, ("TRUNCATED",), ("PEEPHOLE", "TRUNCATED", "RESETS")]
MOST_OF_ALL = nvrtc.VARIANTS[3]  # peepholes, clips and resets


SOME = ((), ("RESETS",), MOST_OF_ALL)


def builds(*, all_rows, precision="float32", variants=None):
    """Plan, architecture and variant of the kernels to compile: for many sequences, or for few, too.

    By default all variants on one architecture, and some on the others.
    """
    found = []
    for architecture, limits in DEVICES.items():
        for size in SIZES:
            for batch, variant in itertools.product(
                (1, 2, 16, 64, 10_000) if all_rows else (10_000,),
                variants or (VARIANTS if architecture == 90 else SOME),
            ):
                how = {"precision": precision, "variant": variant}
                plan = plans._choose(limits, "float32", size, False, batch, "persistent", **how).plan
                if plan is None:
                    continue
                exchanges = (plan.cluster, False) if architecture == 90 and plan.cluster else (plan.cluster,)
                found += [(plan._replace(cluster=c), architecture, variant) for c in exchanges]
    return list(dict.fromkeys(found))


def name_of(build):
    plan, architecture, variant = build
    precision = [plan.precision] if plan.precision != "float32" else []
    return "-".join(
        [f"sm_{architecture}", f"{plan.size}x{plan.rows}", *["cluster"] * plan.cluster, *precision, *variant]
    )


def options_of(plan, variant):
    macros = (f"-D{macro}" for macro in plan.macros)
    return (*loader.options(FLOAT, 1, variant), *macros, *nvrtc.OPTIONS_OF_CUPY)


FEW, ALL = builds(all_rows=False), builds(all_rows=True)
# In the formats that round: the variants that take the most registers. The tightest sizes are tried each time.
ROUNDED = [
    build
    for precision in ("tf32", "bf16")
    for build in builds(all_rows=False, precision=precision, variants=(*SOME, ("PEEPHOLE",), ("PEEPHOLE", "RESETS")))
]
ALL += ROUNDED
FEW += [build for build in ROUNDED if build[2] == MOST_OF_ALL and build[0].size in (128, 1024)]


@needs_nvrtc
@pytest.mark.parametrize(
    "build", FEW + [pytest.param(b, marks=pytest.mark.slow) for b in ALL if b not in FEW], ids=name_of
)
def test_persistent_kernels_keep_their_weights_in_registers(build):
    """A spilled weight would be read again at each step. 65,536 registers are 255 for each of 256 threads."""
    plan, architecture, variant = build
    options = (*options_of(plan, variant), f"-arch=sm_{architecture}", "--ptxas-options=-v")
    cubin, log = nvrtc.compile_source(loader.persistent_source(), options)
    assert cubin.startswith(b"\x7fELF") and "warning" not in log
    found = nvrtc.resources(log)
    assert found.keys() == {"persistent_forward", "persistent_backward"}
    for kernel, taken in found.items():
        assert taken.registers <= 255 and taken.spills == 0 and taken.stack == 0, (kernel, taken)
        assert taken.shared == 0, (kernel, taken)  # all of it is dynamic
    assert max(plan.shared(False), plan.shared(True)) <= DEVICES[architecture].shared


@needs_nvrtc
@pytest.mark.parametrize("cluster", [False, True], ids=["flags", "cluster"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_what_other_blocks_write_is_read_from_l2_and_nothing_is_left_to_chance(cluster, variant):
    plan = choose(DEVICES[90], FLOAT, 256, 10_000, 100).plan._replace(cluster=cluster)
    options = (*options_of(plan, variant), "-arch=compute_90")
    ptx = nvrtc.compile_source(loader.persistent_source(), options, "PTX")[0].decode()
    assert ".nc." not in ptx and "ld.volatile" not in ptx
    assert re.search(r"\b(atom|red)\.", ptx) is None
    assert ".f64" not in ptx and "tanh.approx" not in ptx and ".approx.ftz.f32" not in re.sub(r"ex2\S+|rcp\S+", "", ptx)
    assert (
        ("ld.acquire.gpu" in ptx) is ("fence.acq_rel.gpu" in ptx) is ("ld.relaxed.gpu.global.v4" in ptx) is not cluster
    )
    assert ("st.shared::cluster" in ptx) is ("barrier.cluster.wait.acquire" in ptx) is cluster
    assert "trap" in ptx or cluster


@needs_nvrtc
@pytest.mark.parametrize("precision", ["float32", "tf32"])
@pytest.mark.parametrize("wrong", ["SIZE=200", "BLOCKS=9", "SHARED_FORWARD=1", "SHARED_BACKWARD=1", "ROWS=6"])
def test_what_the_host_counts_wrongly_does_not_compile(wrong, precision):
    plan = choose(DEVICES[90], FLOAT, 256, 10_000, 100, precision=precision).plan
    name = wrong.partition("=")[0]
    options = tuple(f"-D{wrong}" if o.startswith(f"-D{name}=") else o for o in options_of(plan, ()))
    assert options != options_of(plan, ())
    with pytest.raises(RuntimeError, match=r"static assertion failed|static_assert"):
        nvrtc.compile_source(loader.persistent_source(), (*options, "-arch=sm_90"))


def test_the_record_of_a_direction_is_the_same_on_both_sides():
    fields = re.search(r"struct Direction \{(.*?)\};", loader.persistent_source(), re.DOTALL)[1]
    names = [name for line in re.findall(r"index_t ([\w, ]+);", fields) for name in line.split(", ")]
    assert tuple(names) == persistent.FIELDS
    assert len(re.findall(";", fields)) == len(re.findall(r"index_t", fields))
