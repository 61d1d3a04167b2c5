"""The products of the persistent kernels in TF32 and bfloat16: fragments, tiles and rests, one block at a time.

The stand-in has the matrix instruction by the manual's maps of lanes and elements (tests/host_cuda/mma_host.h). One
block multiplies known numbers here: with rounded factors, only the rounding of float32 sums is left. Tensor cores sum
in another order; whole recurrences are in test_cuda_precision.py.
"""

from __future__ import annotations

import functools
import re

import numpy as np
import nvrtc
import pytest
from host_cuda import HostModule, compiler
from host_cuda.fake_cublas import bf16, tf32
from tolerances import normalised_error

from fastlstm.backends.cuda import plans
from fastlstm.backends.cuda.plans import SIZES, Plan
from fastlstm.kernels.cuda import loader

needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
needs_nvrtc = pytest.mark.skipif(nvrtc.library() is None, reason="the wheel nvidia-cuda-nvrtc is not installed")
ROUND = {"tf32": tf32, "bf16": bf16}
FLOAT = np.dtype(np.float32)

# All but the kernels of whole sequences: it compiles faster.
SOURCE = loader.persistent_source().partition('#line 1 "persistent.cu"')[0]

KERNEL = """
extern "C" __global__ void __launch_bounds__(THREADS, 1) one_product(
    const float *weight, const float *vectors, float *out, float *scratch, word_t *flags) {
    DYNAMIC_SHARED(shared);
    using P = PASS;
    const Group group = {scratch, flags, 0, 0, 0};
    float *sums = shared + P::STAGE;
    const float *part = weight + threadIdx.x / 32 * P::SLICE;
    Held<P> w;
    hold<P>(w, [=](int row, int column) { return part[row * P::INNER + column]; });
    for (int n = threadIdx.x; n < ROWS * P::INNER; n += THREADS)
        publish<P>(group, 0, n / P::INNER, n % P::INNER, vectors[n]);
    __syncthreads();
    product<P>(w, group, shared, sums, 0);
    __syncthreads();
    for (int n = threadIdx.x; n < ROWS * P::OUT; n += THREADS) {
        out[n] = 0;
        for (int k = 0; k < WARPS; ++k) out[n] += sums[(k * ROWS + n / P::OUT) * P::STRIDE + n % P::OUT];
    }
}
"""


def plan_of(precision, size, rows, cluster=False):
    split = plans._split(size)
    return Plan(size, rows, size * split // 64, 1, cluster, precision=precision)


def products(precision, size, rows, backward, change=lambda code: code):
    """One block's product, and that of NumPy with rounded factors."""
    plan = plan_of(precision, size, rows)
    macros = (*plan.macros, f"PASS={'Backward' if backward else 'Forward'}")
    options = (*loader.options(FLOAT, 1), *(f"-D{macro}" for macro in macros), "-O1")
    address = lambda array: array.ctypes.data.to_bytes(8, "little")  # noqa: E731
    kernel = HostModule(change(SOURCE) + KERNEL, options, address).get_function("one_product")
    kernel.max_dynamic_shared_size_bytes = shared = plan.shared(backward)
    inner, out = (4 * size, 64 // (4 * plan.split) * 4) if backward else (size, 256 // plan.split)
    rng = np.random.default_rng([size, rows, backward])
    weight, vectors = (rng.uniform(-1, 1, (n, inner)).astype(np.float32) for n in (out, rows))
    found, scratch = np.full((rows, out), np.nan, np.float32), np.full(2 * rows * inner, np.nan, np.float32)
    kernel((1, 1), (256,), (weight, vectors, found, scratch, np.ones(plan.blocks, np.uint32)), shared_mem=shared)
    left, right = (ROUND[precision](factor).astype(np.float64) for factor in (vectors, weight))
    return found, left @ right.T, vectors.astype(np.float64) @ weight.astype(np.float64).T


# Rows of the group: less than a tile, one, several, and a rest; tiles have 8, or 16 where a block has 8 weights' rows.
ROWS = {64: 2, 128: 8, 192: 12, 256: 16, 384: 4, 512: 20, 768: 36, 1024: 4}


@needs_compiler
@pytest.mark.parametrize("precision", ROUND)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.sampled
def test_a_product_is_that_of_rounded_factors(precision, size, backward):
    found, expected, exact = products(precision, size, ROWS[size], backward)
    # Sums of up to 4,096 products in float32; an unrounded factor is some 1e-4 off, bits cut off more.
    assert normalised_error(found, expected) < 2e-6
    assert normalised_error(exact, expected) > 2e-5


@needs_compiler
@pytest.mark.parametrize("precision", ROUND)
def test_nan_and_infinity_stay_what_they_are_and_where_they_are(precision):
    before = "rounded(value);\n#ifdef CLUSTER"
    assert before in SOURCE
    numbers = np.array([np.nan, np.inf, 3.4e38, 1e-40], np.float32)
    for number, bits in zip(numbers, numbers.view(np.uint32), strict=True):
        code = SOURCE.replace(
            before, before.replace("value", f"place == 1 && k == 0 ? host_cuda::as_float({bits}u) : value")
        )
        found, expected, _ = products(precision, 64, 4, False, lambda _, code=code: code)
        others = [0, 2, 3]
        assert normalised_error(found[others], expected[others]) < 2e-6
        beyond = precision == "bf16" and number > 3e38  # its largest number is smaller
        assert np.isfinite(found[1]).all() == (np.isfinite(number) and not beyond), number


# what slipped: (pattern, replacement, the formats that have it)
SLIPS = {
    "rows of the weights": (r"half \* 8 \+ lane / 4;", "half * 8 + (lane / 4 ^ 1);", ROUND),
    "halves of a tile": (r"row = tile \* 16 \+ half", "row = tile * 16 + (1 - half)", ROUND),
    "columns of the weights": (r"lane % 4 \* 4 \+ k;", "lane % 4 * 4 + (k ^ 1);", ROUND),
    "columns of the vector": (r"chunk \* 16 \+ lane % 4 \* 4, row|chunk \* 16 \+ lane % 4 \* 4;",
                              "chunk * 16 + (lane % 4 ^ 1) * 4;", ROUND),
    "sequences of the vector": (r"8 \* n \+ lane / 4, chunk", "8 * n + (lane / 4 ^ 1), chunk", ROUND),
    "the two tiles of a chunk": (r"v\[2 \* step \+ pair\];", "v[2 * (1 - step) + pair];", ["tf32"]),
    "pairs of a fragment": (r"\[step\]\[pair \* T::HALVES \+ half\]", "[step][(1 - pair) * T::HALVES + half]",
                            ["tf32"]),
    "halves of a word": (r"word_t\(high\) << 16 \| low", "word_t(low) << 16 | high", ["bf16"]),
    "pairs of a bfloat16 fragment": (r"joined\(v\[2 \* pair\]", "joined(v[2 - 2 * pair]", ["bf16"]),
    "words of a piece": (r"v\.of\[0\]\.word\[2 \* step\], v\.of\[0\]\.word\[2 \* step \+ 1\]\);",
                         "v.of[0].word[2 * step + 1], v.of[0].word[2 * step]);", ROUND),
    "sequences of a fragment": (r"\{first, v\.of\[1\]\.word\[2 \* step\], second,",
                                "{v.of[1].word[2 * step], first, second,", ROUND),
    "words of a fragment of sequences": (
        r"word_t first = v(.*), second = v(.*);",
        "word_t second = v.of[0].word[2 * step], first = v.of[0].word[2 * step + 1];", ROUND),
    "sequences of the sums": (r"k / 2 \* 8 \+ lane / 4 : lane % 4 \* 2 \+ k % 2",
                              "(1 - k / 2) * 8 + lane / 4 : lane % 4 * 2 + (1 - k % 2)", ROUND),
    "rows of the sums": (r"lane % 4 \* 2 \+ k % 2 : k / 2 \* 8 \+ lane / 4",
                         "lane % 4 * 2 + (1 - k % 2) : (1 - k / 2) * 8 + lane / 4", ROUND),
    "the next tile fetched too early": (r"next < T::CHUNKS \? place : place \+ T::SPAN", "place + T::SPAN", ROUND),
    "the next tile never fetched": (r"next < T::CHUNKS \? place : place \+ T::SPAN", "place", ROUND),
    "fetched over what is still needed": (r"first \+ T::AT_ONCE == T::COUNT\)", "first == 0)", ROUND),
    "a chunk too far ahead": (r"int next = chunk \+ T::AHEAD,", "int next = chunk + T::AHEAD + 1,", ROUND),
    "weights of the first tiles": (r"w\.part\[first \+ n\]\[chunk\]", "w.part[n][chunk]", ROUND),
    "a chunk beyond its slice": (r"\|\| \(P::SLICE % 16 && column >= P::SLICE\)", "", ROUND),
}  # fmt: skip
# Several turns and a rest of a chunk; a whole tile of rows; sequences as tiles. Rows: several tiles of sequences.
PLACES = [(192, 12, False), (512, 20, True), (1024, 36, True)]


@functools.cache
def truth(precision, place):
    return products(precision, *place)[0]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_in_the_layout_is_noticed(slip):
    pattern, new, formats = SLIPS[slip]

    def change(code):
        changed, count = re.subn(pattern, lambda _: new, code)
        assert count
        return changed

    for precision in formats:
        found = (products(precision, *place, change)[0] for place in PLACES)
        assert any(not np.array_equal(one, truth(precision, place)) for one, place in zip(found, PLACES, strict=False))


@needs_nvrtc
@pytest.mark.parametrize("cluster", [False, True], ids=["flags", "cluster"])
def test_the_instructions_are_those_of_the_format(cluster):
    """A float32 kernel has no matrix instruction; the others have it, and no sum of products beside it."""
    found = {}
    for precision in ("float32", *ROUND):
        plan = plan_of(precision, 256, 16, cluster)
        options = (*loader.options(FLOAT, 1), *(f"-D{macro}" for macro in plan.macros), *nvrtc.OPTIONS_OF_CUPY)
        ptx = nvrtc.compile_source(loader.persistent_source(), (*options, "-arch=compute_90"), "PTX")[0]
        found[precision] = ptx.decode()
    names = {"tf32": "m16n8k8.row.col.f32.tf32.tf32.f32", "bf16": "m16n8k16.row.col.f32.bf16.bf16.f32"}
    roundings = {"tf32": "cvt.rna.tf32.f32", "bf16": "cvt.rn.bf16.f32"}
    assert not re.search(r"\bmma\.|cvt\.rna|\bbf16\b|tf32", found["float32"])
    assert found["float32"].count("fma.rn") > 500
    for precision, name in names.items():
        ptx = found[precision]
        assert ptx.count(f"mma.sync.aligned.{name}") >= 16 and roundings[precision] in ptx
        assert not any(other in ptx for of, other in names.items() if of != precision)
        assert ptx.count("fma.rn") < 200  # those of the activations
        assert ".nc." not in ptx and re.search(r"\b(atom|red)\.", ptx) is None and ".f64" not in ptx
        assert ("ld.relaxed.gpu.global" in ptx) is not cluster and ("st.shared::cluster" in ptx) is cluster
