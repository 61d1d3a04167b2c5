"""The header that runs CUDA source on the CPU: barriers, shuffles, poison and errors, on small kernels of its own."""

from __future__ import annotations

import numpy as np
import pytest
from host_cuda import CompilationError, FakeCupy, HostModule, compiler
from host_cuda.build import MOST_SHARED, LaunchError

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")

SOURCE = r"""
typedef long long index_t;

extern "C" __global__ void where(int *out) {  // (grid, block) in three dimensions
    const index_t block = (index_t(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const index_t thread = (index_t(threadIdx.z) * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] += int(block * 1000 + thread);
}

extern "C" __global__ void reversed(float *values, index_t barrier) {
    __shared__ float row[128];
    row[threadIdx.x] = values[blockIdx.x * blockDim.x + threadIdx.x];
    if (barrier) __syncthreads();
    values[blockIdx.x * blockDim.x + threadIdx.x] = row[blockDim.x - 1 - threadIdx.x];
}

extern "C" __global__ void unwritten(float *values) {
    __shared__ float row[64];
    if (threadIdx.x % 2) row[threadIdx.x] = 1;
    __syncthreads();
    values[threadIdx.x] = row[threadIdx.x];
}

extern "C" __global__ void warp_sums(double *values, double *down, int *neighbour) {
    double sum = values[threadIdx.x];
    for (int flip = 16; flip; flip /= 2) sum += __shfl_xor_sync(~0u, sum, flip);
    double tail = values[threadIdx.x];
    for (int delta = 16; delta; delta /= 2) tail += __shfl_down_sync(~0u, tail, delta);
    neighbour[threadIdx.x] = __shfl_sync(~0u, int(threadIdx.x), (threadIdx.x + 1) % 32);
    __syncwarp();
    values[threadIdx.x] = sum;
    down[threadIdx.x] = tail;
}

extern "C" __global__ void half_warps(int *values) {  // two halves that meet at barriers of their own
    const unsigned mask = threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u;
    if (threadIdx.x < 16) __syncwarp(mask);
    values[threadIdx.x] = __shfl_xor_sync(mask, int(threadIdx.x), 1);
}

struct Record {
    index_t first;
    float factors[3];
};

extern "C" __global__ void by_value(index_t *out, const Record record, const float *null) {
    out[0] = record.first;
    for (int k = 0; k < 3; ++k) out[1 + k] = index_t(record.factors[k]);
    out[4] = null == nullptr;
}

extern "C" __global__ void divergent(float *values, index_t leave) {
    if (leave && threadIdx.x == 3) return;
    if (!leave && threadIdx.x < 4) { __syncwarp(); } else { __syncthreads(); }
    values[threadIdx.x] = 1;
}
"""

# Blocks that wait for each other, by what kernels/cuda/exchange.cuh has.
EXCHANGE = r"""
typedef unsigned int word_t;

extern "C" __global__ void meet(word_t *flags, float *values, word_t absent) {
    DYNAMIC_SHARED(shared);
    const int block = blockIdx.y, blocks = gridDim.y;
    shared[threadIdx.x] = float(block);
    __syncthreads();
    if (threadIdx.x == 0) {
        store_shared_by_blocks(values + block, shared[blockDim.x - 1] + 1);
        fence_acq_rel();
        store_relaxed(flags + block, 1);
    }
    const int other = (block + 1) % blocks;
    for (int tries = 0; load_acquire(flags + other) < 1 + absent; ++tries) SPIN(tries);
    __syncwarp();
    const float4 four = load_shared_by_blocks(values + other / 4 * 4);
    const float each[] = {four.x, four.y, four.z, four.w};
    if (threadIdx.x == 0) values[blocks + block] = each[other % 4];
}

extern "C" __global__ void outside(index_t at) {
    DYNAMIC_SHARED(shared);
    __syncthreads();
    if (threadIdx.x == 0) shared[at] = 1;
}

"""

IN_A_CLUSTER = r"""
extern "C" __global__ void CLUSTER_OF(BLOCKS) pass_on(float *values, index_t first, index_t last) {
    DYNAMIC_SHARED(shared);
    if (first) {
        cluster_arrive();
        cluster_wait();
    }
    store_to_block(shared + blockIdx.x % BLOCKS, (blockIdx.x + 1) % BLOCKS, float(blockIdx.x));
    cluster_arrive();
    if (last) cluster_wait();
    values[blockIdx.x] = shared[(blockIdx.x + BLOCKS - 1) % BLOCKS];
}
"""


@pytest.fixture
def xp():
    return FakeCupy(seed=1, multiprocessors=132)


def kernel(xp, name):
    return xp.RawModule(code=SOURCE, options=("--std=c++17",)).get_function(name)


@pytest.mark.parametrize("fibers", [False, True])
def test_every_thread_of_every_block_runs_once(fibers):
    xp = FakeCupy(fibers=fibers, seed=3)
    grid, block = (3, 4, 2), (5, 2, 3)
    out = xp.zeros(24 * 30, np.int32)
    kernel(xp, "where")(grid, block, (out,))
    np.testing.assert_array_equal(out.get(), np.add.outer(1000 * np.arange(24), np.arange(30)).ravel())


def test_a_barrier_lets_no_thread_through_before_all_are_there(xp):
    values = np.arange(3 * 128, dtype=np.float32)
    expected = values.reshape(3, 128)[:, ::-1].ravel()
    for _ in range(5):  # other schedules each time
        there = xp.array(values)
        kernel(xp, "reversed")((3,), (128,), (there, 1))
        np.testing.assert_array_equal(there.get(), expected)
    without = xp.array(values)
    kernel(xp, "reversed")((3,), (128,), (without, 0))
    assert np.isnan(without.get()).any()  # poison, read too early


def test_schedules_come_from_the_seed():
    found = []
    for seed in (1, 1, 2):
        xp = FakeCupy(seed=seed)
        values = xp.array(np.arange(128, dtype=np.float32))
        kernel(xp, "reversed")((1,), (128,), (values, 0))  # what is read too early depends on the schedule
        found.append(np.isnan(values.get()))
    assert (found[0] == found[1]).all() and (found[0] != found[2]).any()


def test_shared_memory_is_poisoned(xp):
    values = xp.zeros(64, np.float32)
    for _ in range(2):  # the second block finds no leftovers of the first
        kernel(xp, "unwritten")((1,), (64,), (values,))
        assert np.isnan(values.get()[::2]).all() and (values.get()[1::2] == 1).all()


def test_shuffles_move_values_between_the_lanes_of_a_warp(xp):
    given = np.random.default_rng(0).integers(0, 100, 64).astype(np.float64)  # sums of integers are exact
    values, down, neighbour = xp.array(given), xp.zeros(64), xp.zeros(64, np.int32)
    kernel(xp, "warp_sums")((1,), (64,), (values, down, neighbour))
    sums = given.reshape(2, 32).sum(axis=1)
    np.testing.assert_array_equal(values.get(), np.repeat(sums, 32))
    np.testing.assert_array_equal(down.get()[::32], sums)
    np.testing.assert_array_equal(neighbour.get() % 32, np.roll(np.arange(32), -1).tolist() * 2)


def test_parts_of_a_warp_meet_by_their_mask(xp):
    values = xp.zeros(32, np.int32)
    kernel(xp, "half_warps")((1,), (32,), (values,))
    np.testing.assert_array_equal(values.get(), np.arange(32) ^ 1)


@pytest.mark.parametrize("leave", [0, 1])
def test_a_barrier_that_some_thread_never_reaches_is_an_error(xp, leave):
    with pytest.raises(RuntimeError, match="divergent: a barrier was not reached by every thread"):
        kernel(xp, "divergent")((1,), (32,), (xp.zeros(32, np.float32), leave))


def test_what_a_gpu_would_refuse_is_refused(xp):
    where = kernel(xp, "where")
    out = xp.zeros(64, np.int32)
    for grid, block in [((0,), (1,)), ((1, 65536), (1,)), ((1,), (32, 33)), ((1,), (2000,))]:
        with pytest.raises(ValueError, match="no such grid"):
            where(grid, block, (out,))
    for arguments in [(), (out, 1)]:
        with pytest.raises(TypeError, match="takes 1 arguments"):
            where((1,), (1,), arguments)
    for argument in (1.5, np.float32(1), b"12345678"):
        with pytest.raises(TypeError, match="Unsupported type"):
            where((1,), (1,), (argument,))
    with pytest.raises(TypeError, match=r"numpy.ndarray of shape \(3,\)"):
        where((1,), (1,), (np.zeros(3),))
    with pytest.raises(TypeError, match="argument 0 of where has 8 bytes, got 4"):
        where((1,), (1,), (np.zeros(1, np.float32),))
    with pytest.raises(ValueError, match="no strides"):
        where((1,), (1,), (out[::2],))
    with xp.cuda.Device(1), pytest.raises(ValueError, match="an array of device 0 for a kernel on 1"):
        where((1,), (1,), (out,))


def test_a_record_arrives_by_value_and_none_as_a_null_pointer(xp):
    record = np.dtype([("first", np.int64), ("factors", np.float32, 3)], align=True)
    values = np.array([(2**40, (1, 2, 3))], record)
    out = xp.zeros(5, np.int64)
    for given in (values, values.view(f"V{record.itemsize}")):
        kernel(xp, "by_value")((1,), (1,), (out, given, None))
        assert out.get().tolist() == [2**40, 1, 2, 3, 1]
        out[...] = 0
    for wrong in (values.view(np.int64)[:1], 7, None):  # of another size: a GPU would read what lies behind it
        with pytest.raises(TypeError, match="argument 1 of by_value has 24 bytes, got 8"):
            kernel(xp, "by_value")((1,), (1,), (out, wrong, None))


def test_what_cupy_launches_itself_is_counted(xp):
    there, fresh = xp.zeros((2, 3)), xp.empty((2, 3))
    assert xp.pool.own == ["zeros"]
    fresh[...] = there
    fresh += there
    _ = fresh[1], fresh.reshape(-1), xp.ascontiguousarray(fresh), fresh.shape  # views: nothing runs
    assert xp.pool.own == ["zeros", "setitem", "iadd"]
    _ = fresh + there, fresh.copy(), xp.arange(3), xp.ascontiguousarray(fresh.T)
    assert xp.pool.own[3:] == ["add", "copy", "arange", "copy"]


def exchange(xp, name, *options, shared=128):
    code = "typedef long long index_t;" + (IN_A_CLUSTER if options else EXCHANGE)
    module = xp.RawModule(
        code=code, options=("--std=c++17", *options),
        enable_cooperative_groups=not options,
    )  # fmt: skip
    function = module.get_function(name)
    function.max_dynamic_shared_size_bytes = shared
    return function


def test_blocks_of_a_cooperative_launch_run_at_once_and_wait_for_each_other(xp):
    flags, values = xp.zeros(32, np.uint32), xp.zeros(64, np.float32)
    exchange(xp, "meet")((1, 32), (32,), (flags, values, np.zeros(1, np.uint32)), shared_mem=128)
    np.testing.assert_array_equal(values.get()[:32], np.arange(32) + 1)
    np.testing.assert_array_equal(values.get()[32:], np.roll(np.arange(32), -1) + 1)


def test_a_wait_for_what_never_comes_is_an_error(xp, monkeypatch):
    monkeypatch.setenv("FASTLSTM_TEST_SPIN_SECONDS", "0.2")
    flags, values = xp.zeros(4, np.uint32), xp.zeros(8, np.float32)
    own = exchange(xp, "meet")
    with pytest.raises(RuntimeError, match="meet: a block waited too long for another one"):
        own((1, 4), (32,), (flags, values, np.ones(1, np.uint32)), shared_mem=128)


def test_dynamic_shared_memory_is_refused_beyond_its_limit_and_guarded(xp):
    outside = exchange(xp, "outside", shared=50_000)
    outside((1, 2), (32,), (12_499,), shared_mem=50_000)
    for at in (-1, 12_500):
        with pytest.raises(RuntimeError, match="outside: a write outside the dynamic shared memory"):
            outside((1, 2), (32,), (at,), shared_mem=50_000)
    with pytest.raises(LaunchError, match="INVALID_VALUE"):
        outside((1, 2), (32,), (0,), shared_mem=50_001)
    outside.max_dynamic_shared_size_bytes = MOST_SHARED + 1
    with pytest.raises(LaunchError, match="INVALID_VALUE"):
        outside((1, 2), (32,), (0,), shared_mem=MOST_SHARED + 1)


def test_more_blocks_than_can_be_resident_are_refused():
    xp = FakeCupy(multiprocessors=3)
    meet = exchange(xp, "meet")
    arguments = xp.zeros(4, np.uint32), xp.zeros(8, np.float32), np.zeros(1, np.uint32)
    with pytest.raises(ValueError, match="more blocks than can be resident"):
        meet((1, 4), (32,), arguments, shared_mem=128)
    with pytest.raises(RuntimeError, match="CuPy would take fewer blocks"):
        meet((4,), (32,), arguments, shared_mem=128)


def test_the_blocks_of_a_cluster_write_to_each_others_memory(xp):
    values = xp.zeros(4, np.float32)
    pass_on = exchange(xp, "pass_on", "-DCLUSTER", "-DBLOCKS=4")
    pass_on((4,), (1,), (values, 1, 1), shared_mem=128)
    np.testing.assert_array_equal(values.get(), [3, 0, 1, 2])
    with pytest.raises(RuntimeError, match="pass_on: a write to a block that has not begun"):
        for _ in range(20):  # by the schedule, the neighbour may have begun
            pass_on((4,), (1,), (values, 0, 1), shared_mem=128)


def test_a_write_outside_an_array_is_found():
    xp = FakeCupy(seed=1)
    out = xp.zeros(10, np.int32)
    kernel(xp, "where")((1,), (11,), (out,))  # one thread too many
    del out
    assert xp.pool.overwritten == ["outside an array of 40 bytes"]


def test_fresh_memory_is_poison(xp):
    assert np.isnan(xp.empty((2, 3), np.float32).get()).all() and (xp.empty(3, np.int64).get() == -1).all()


def test_a_source_that_does_not_compile_is_an_error():
    with pytest.raises(CompilationError, match="error"):
        HostModule('extern "C" __global__ void broken() { no_such_thing(); }')
