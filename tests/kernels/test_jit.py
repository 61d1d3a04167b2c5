"""Private parts of Numba: all in one file, each checked at import, with a fallback to plain njit."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba", reason="the CPU kernels need Numba")

from kernel_process import start

import fastlstm
from fastlstm.kernels.cpu import jit, private_numba
from fastlstm.kernels.cpu.plain_njit import PlainKernel

PACKAGE, KERNELS = Path(fastlstm.__file__).parent, Path(jit.__file__).parent.parent
# Documented are numba, numba.types, numba.extending and numba.config. A dispatcher's own names begin with _.
PRIVATE = re.compile(
    r"numba\.(core|np|misc|cpython|typed|_\w+)\b|from numba import _|\._(can_compile|cache|compiler|nrt)\b"
)


def test_private_parts_of_numba_are_imported_by_one_file():
    sources = [*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")]
    found = {path.name for path in sources if PRIVATE.search(path.read_text(encoding="utf-8"))}
    assert found == {"private_numba.py", "jit.py"}


def test_this_numba_is_known():
    assert jit.PLAIN is None and private_numba._problems == []


REPORT = """
import json, warnings
import numba
{change}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from fastlstm.kernels.cpu import jit, sequence_forward, small_batch, thread_team
print(json.dumps({{
    "plain": jit.PLAIN, "warnings": [f"{{w.category.__name__}}: {{w.message}}" for w in caught],
    "kinds": sorted({{type(kernel).__name__ for kernel in jit.KERNELS}}),
}}))
"""
CHANGES = {
    "import numba._dynfunc as part; del part.make_function": "numba._dynfunc.make_function is missing",
    "import numba.core.codegen as part; del part.JITCodeLibrary": "numba.core.codegen.JITCodeLibrary is missing",
    "from numba.core.codegen import CPUCodeLibrary as part; del part._optimize_functions": (
        "numba.core.codegen.JITCodeLibrary._optimize_functions is missing"
    ),
    "from numba.core.typed_passes import BaseNativeLowering as part; part.run_pass = lambda self: True": (
        "NativeLowering.run_pass takes other arguments than (self, state)"
    ),
    "from numba.core.caching import NullCache as part; part.load_overload = lambda self, sig: None": (
        "NullCache.load_overload takes other arguments than (self, sig, target_context)"
    ),
    "from numba.core.lowering import Lower as part; part.storevar = lambda self, value, name: None": (
        "Lower.storevar takes other arguments than (self, value, name, argidx)"
    ),
    "import importlib.util as part; part.find_spec = lambda name: None": "numba.np.arrayobj is missing",
    "from numba.core.cpu import CPUTargetOptions as part; del part.__bases__[0]._nrt": (
        "CPUTargetOptions._nrt is missing"
    ),
    "import numba.core.compiler as part; part.NativeLowering = part.NativeParforLowering": (
        "has not exactly one pass NativeLowering"
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_private_part_that_has_changed_is_named_and_done_without(change, tmp_path):
    if "typed_passes" in change or "compiler as part" in change:
        change = f"import numba.core.compiler\n{change}"
    found, _ = start(tmp_path / "nowhere", tmp_path / "cache", REPORT.format(change=change), timeout=120)
    assert CHANGES[change.rpartition("\n")[2]] in found["plain"]
    (warning,) = found["warnings"]
    assert warning.startswith("RuntimeWarning: numba ") and found["plain"] in warning
    assert found["kinds"] == ["PlainKernel"]


def test_without_compilation_the_backend_says_so(tmp_path):
    code = """
import json
import numpy as np, fastlstm
try:
    with fastlstm.use_backend("cpu"):
        fastlstm.LSTM(3, 4)(np.ones((2, 1, 3), np.float32))
except fastlstm.BackendError as error:
    print(json.dumps(str(error)))
"""
    found, _ = start(tmp_path / "nowhere", tmp_path / "cache", code, timeout=120, NUMBA_DISABLE_JIT="1")
    assert "NUMBA_DISABLE_JIT" in found


COMPILED = """
import gc, json, sys
import numpy as np, fastlstm
fastlstm.use_backend("cpu").__enter__()
from fastlstm.kernels.cpu import kernel_cache
kernel_cache.folders = kernel_cache.folders[:1]  # kernels that stand beside the package are not to be found
model = fastlstm.LSTM(3, 4, seed=0)
before = set(sys.modules)
if sys.argv[1:]:
    gc.disable()
y, _, tape = model.forward(np.ones((40, 8, 3), np.float32))
model.backward(tape, y)
jit = sys.modules["fastlstm.kernels.cpu.jit"]
compiled = [each for kernel in jit.KERNELS for each in kernel.overloads.values()]
print(json.dumps({
    "compiled": len(compiled), "counting": [b"NRT_" in each.library._get_compiled_object() for each in compiled],
    "collecting": gc.isenabled(), "numba": sorted(set(sys.modules) - before), "scipy": "scipy.linalg" in sys.modules,
}))
"""


def test_compiling_loads_what_kernels_need_of_numba_and_no_more(tmp_path):
    """Kernels count no references, for whose code Numba's runtime would have to be loaded."""
    found, _ = start(tmp_path / "nowhere", tmp_path / "cache", COMPILED)
    assert found["compiled"] >= 2 and not any(found["counting"])
    assert "numba.np.arrayobj" in found["numba"]
    unneeded = {"numba.np.arraymath", "numba.np.linalg", "numba.np.npyimpl", "numba.cpython.mathimpl"}
    assert not unneeded & set(found["numba"]) and not found["scipy"]


@pytest.mark.parametrize("off", [False, True])
def test_compiling_leaves_the_garbage_collector_as_it_was(tmp_path, off):
    found, _ = start(tmp_path / "nowhere", tmp_path / "cache", COMPILED, *(["off"] if off else []))
    assert found["collecting"] is not off


# Every kind of call: on two threads and one, training and inference, small and large batches, ragged, and both
# directions.
BITS = """
import hashlib, json, sys
import numpy as np
import fastlstm
from fastlstm.backends.cpu import launch

rng = np.random.default_rng(0)
digests = {}

def note(name, *arrays):
    digests[name] = hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()

def train(name, model, *arguments, **options):
    y, state, tape = model.forward(*arguments, **options)
    grads = model.backward(tape, y, state)
    note(name, y, *state, grads.x, *grads.state, *grads.params.values())

teams = []
run_team = launch.run_team
launch.run_team = lambda kernel, arguments, wanted: teams.append(wanted) or run_team(kernel, arguments, wanted)
model = fastlstm.LSTM(64, 128, seed=0)
both = fastlstm.LSTM(5, 7, 2, bidirectional=True, seed=1)
x, few = rng.standard_normal((60, 32, 64), np.float32), rng.standard_normal((3, 1, 64), np.float32)
small = rng.standard_normal((40, 3, 5), np.float32)
lengths = np.array([3, 40, 0])
for threads in (1, 2):
    fastlstm.set_num_threads(threads)
    train(f"training {threads}", model, x)
    for name, each in (("plain", model), ("frozen", model.freeze())):
        note(f"{name} {threads}", each(x)[0])
        note(f"{name} step {threads}", *each.step(few[0])[1])
        note(f"{name} few {threads}", each(few)[0])
    train(f"few {threads}", model, few)
    train(f"recompute {threads}", model, x, recompute=True)
    train(f"ragged {threads}", both, small, None, lengths)
    note(f"ragged inference {threads}", both(small, lengths=lengths)[0])
jit = sys.modules["fastlstm.kernels.cpu.jit"]
print(json.dumps({
    "digests": digests, "plain": jit.PLAIN, "teams": max(teams),
    "hits": sum(sum(kernel.stats.cache_hits.values()) for kernel in jit.KERNELS),
}))
"""


def test_plain_kernels_give_the_same_bits(tmp_path):
    """With float32 alone: plain kernels take half a minute to compile, in every process."""
    usual, _ = start(tmp_path / "nowhere", tmp_path / "cache", BITS)
    plain, _ = start(tmp_path / "nowhere", tmp_path / "cache", BITS, timeout=600, FASTLSTM_PLAIN_NJIT="1")
    assert (usual["plain"], plain["plain"], plain["hits"]) == (None, "FASTLSTM_PLAIN_NJIT is set", 0)
    assert usual["teams"] == plain["teams"] == 1, "a worker beside this thread"
    assert plain["digests"] == usual["digests"]
    for name, digest in plain["digests"].items():
        assert digest == plain["digests"][f"{name[:-1]}1"], "on two threads as on one"


def double(target):
    for n in range(target.size):
        target[n] *= 2


def test_a_plain_kernel_refuses_types_that_it_was_not_compiled_for(monkeypatch):
    monkeypatch.setattr(jit, "PLAIN", "for this test")
    made = PlainKernel(double)
    jit.refuse_others(made)
    single, wide = np.ones(3, np.float32), np.ones(3)
    with pytest.raises(TypeError):
        made(single)
    jit.compile_for(made, (single,))
    assert made.signatures == [], "what refuses others is compiled by compile_once alone"
    jit.compile_once(made, (jit.types.float32[::1],))
    with pytest.raises(TypeError):
        made(wide)
    made(single)
    jit.compile_once(made, (jit.types.float64[::1],))
    made(wide)
    assert single.tolist() == wide.tolist() == [2, 2, 2]
    assert len(made.signatures) == 2 and made.__name__ == "double"
    with pytest.raises(TypeError):
        made(np.ones(3, np.int64))


def test_a_plain_kernel_is_compiled_for_arguments_without_a_call(monkeypatch):
    monkeypatch.setattr(jit, "PLAIN", "for this test")
    made, target = PlainKernel(double), np.ones(3)
    jit.compile_for(made, (target,))
    assert len(made.signatures) == 1 and target.tolist() == [1, 1, 1]
    made(target)
    assert len(made.signatures) == 1 and target.tolist() == [2, 2, 2]
