"""Everybody who can compute a :class:`~fastlstm.bench.work.Work`: ourselves and the others, with the same weights.

:data:`CONTENDERS` is the table. Each entry says who builds a side, which packages that needs, what the side can do, and
which of our own sides it is compared with: the one on the same device. :func:`missing` says why one cannot run here,
and what to install. All compute in the dtype of the work and nothing narrower: OpenVINO is held to float32, where it
would take bfloat16; TF32 is off in PyTorch and JAX, and cuBLAS does not use it unless told to.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from fastlstm import dispatch
from fastlstm.bench import sides
from fastlstm.bench.sides import CHECKED_STEPS, Side
from fastlstm.bench.work import Array, Problem, Work
from fastlstm.environment import usable_cores
from fastlstm.errors import ArgumentError, BackendError

__all__ = ["CONTENDERS", "OURS", "Contender", "able", "chosen", "missing", "opponents"]

TORCH_GPU = "cuda"
ONNX_GATES = (0, 3, 1, 2)  # ONNX orders the gates i, o, f, g


@contextlib.contextmanager
def _torch_threads(torch: Any, threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _torch_calls(torch: Any, problem: Problem, device: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return the call to time, and one for the tensors to compare."""
    work = problem.work
    module = torch.nn.LSTM(work.inputs, work.hidden, dtype=getattr(torch, work.dtype))
    state_dict = problem.model.to_torch_state_dict()
    module.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state_dict.items()})
    module = module.to(device)
    x, dy = torch.from_numpy(problem.x).to(device), torch.from_numpy(problem.dy).to(device)
    lengths = None if work.lengths is None else torch.from_numpy(problem.lengths)

    def forward(x: Any) -> Any:
        if lengths is None:
            return module(x)[0]
        pack, pad = torch.nn.utils.rnn.pack_padded_sequence, torch.nn.utils.rnn.pad_packed_sequence
        return pad(module(pack(x, lengths, enforce_sorted=False))[0], total_length=work.steps)[0]

    def infer() -> tuple[Any, ...]:
        with torch.inference_mode():
            return (forward(x),)

    def train() -> tuple[Any, ...]:
        leaf = x.detach().requires_grad_()
        module.zero_grad()
        y = forward(leaf)
        y.backward(dy)
        return y.detach(), leaf.grad, module.weight_ih_l0.grad, module.weight_hh_l0.grad, module.bias_ih_l0.grad

    state: Any = None

    def step() -> Any:
        nonlocal state
        with torch.inference_mode():
            h, state = module(x, state)
            return h

    def first_steps() -> tuple[Any, ...]:
        nonlocal state
        state = None
        return (torch.cat([step() for _ in range(CHECKED_STEPS)]),)

    if work.kind == "stream":
        return step, first_steps
    return (train, train) if work.kind == "train" else (infer, infer)


@contextlib.contextmanager
def torch_cpu(problem: Problem, threads: int) -> Iterator[Side]:
    """PyTorch's nn.LSTM on the CPU; packed sequences for a ragged batch."""
    torch = import_module("torch")
    with _torch_threads(torch, threads):
        call, results = _torch_calls(torch, problem, "cpu")
        yield Side(call, lambda: tuple(value.numpy() for value in results()))


@contextlib.contextmanager
def torch_cuda(problem: Problem, threads: int) -> Iterator[Side]:
    """PyTorch's nn.LSTM on the GPU, which is cuDNN's, without TF32; timed by CUDA events."""
    torch = import_module("torch")
    torch.cuda.empty_cache()
    precise = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [part.allow_tf32 for part in precise]
    for part in precise:
        part.allow_tf32 = False

    def seconds(call: Callable[[], Any], count: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / count

    try:
        call, results = _torch_calls(torch, problem, TORCH_GPU)
        yield Side(call, lambda: tuple(value.cpu().numpy() for value in results()), seconds)
    finally:
        for part, value in zip(precise, before, strict=True):
            part.allow_tf32 = value


def onnx_model(problem: Problem) -> bytes:
    """Return the model as an ONNX graph of one LSTM node; its states are inputs and outputs when streaming."""
    onnx = import_module("onnx")
    helper, work = onnx.helper, problem.work
    stream, ragged = work.kind == "stream", work.lengths is not None
    params = problem.model.params
    order = np.concatenate([np.arange(g * work.hidden, (g + 1) * work.hidden) for g in ONNX_GATES])
    bias = params["bias_l0"][order]
    weights = {
        "W": params["weight_ih_l0"][order][None],
        "R": params["weight_hh_l0"][order][None],
        "B": np.concatenate([bias, np.zeros_like(bias)])[None],
    }
    real, whole = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
    state = [1, work.batch, work.hidden]
    inputs = [("X", real, list(problem.x.shape))]
    outputs = [("Y", real, [work.steps, 1, work.batch, work.hidden])]
    names = ["X", "W", "R", "B"]
    if ragged:
        inputs.append(("lengths", whole, [work.batch]))
        names.append("lengths")
    if stream:
        inputs += [("h", real, state), ("c", real, state)]
        outputs += [("h_n", real, state), ("c_n", real, state)]
        names += ["", "h", "c"]
    node = helper.make_node("LSTM", names, [name for name, _, _ in outputs], hidden_size=work.hidden)
    graph = helper.make_graph(
        [node],
        "lstm",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    found: bytes = model.SerializeToString()
    return found


def _fed(problem: Problem, run: Callable[[dict[str, Array]], list[Array]]) -> Side:
    """Make a side of a function from the inputs of :func:`onnx_model` to its outputs."""
    feed = {"X": problem.x}
    if problem.work.lengths is not None:
        feed["lengths"] = np.array(problem.work.lengths, np.int32)
    if problem.work.kind == "infer":
        return Side(lambda: run(feed), lambda: (run(feed)[0][:, 0].copy(),))

    state = np.zeros((1, problem.work.batch, problem.work.hidden), problem.x.dtype)
    feed |= {"h": state, "c": state}

    def step() -> Array:
        y, feed["h"], feed["c"] = run(feed)
        return y

    def first_steps() -> tuple[Array, ...]:
        feed.update(h=state, c=state)
        return (np.concatenate([step()[:, 0].copy() for _ in range(CHECKED_STEPS)]),)

    return Side(step, first_steps)


@contextlib.contextmanager
def onnxruntime(problem: Problem, threads: int) -> Iterator[Side]:
    """ONNX Runtime's LSTM operator on the CPU."""
    ort = import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(onnx_model(problem), options, providers=["CPUExecutionProvider"])
    yield _fed(problem, lambda feed: session.run(None, feed))


def _openvino() -> Any:
    """Import OpenVINO without its telemetry, whose processes and threads would run beside the next side's samples."""
    if "openvino" in sys.modules or "openvino_telemetry" in sys.modules:
        return import_module("openvino")
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # its import fails, which OpenVINO bears
    try:
        return import_module("openvino")
    finally:
        del sys.modules["openvino_telemetry"]


@contextlib.contextmanager
def openvino(problem: Problem, threads: int) -> Iterator[Side]:
    """OpenVINO on the same ONNX graph, held to float32: left to itself it computes in bfloat16 where it can."""
    ov = _openvino()
    core = ov.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(onnx_model(problem)), "CPU", settings)
    request = compiled.create_infer_request()
    count = len(compiled.outputs)
    x = ov.Tensor(problem.x, shared_memory=True)
    lengths = None if problem.work.lengths is None else ov.Tensor(np.array(problem.work.lengths, np.int32))

    def run(feed: dict[str, Array]) -> list[Array]:
        request.set_tensor("X", x)
        if lengths is not None:
            request.set_tensor("lengths", lengths)
        if count > 1:  # the states; the request's own output is overwritten by the next call, so it is copied
            request.set_tensor("h", ov.Tensor(feed["h"]))
            request.set_tensor("c", ov.Tensor(feed["c"]))
        request.infer()
        return [request.get_output_tensor(number).data for number in range(count)]

    yield _fed(problem, run)


JAX_THREADS = "PJRT_NPROC"  # the size of its CPU pool, read when that starts


def _start_jax(threads: int) -> str | None:
    """Start JAX with so many threads; it starts them once, so another number than the first cannot be had."""
    if "jax" not in sys.modules:
        os.environ.setdefault(JAX_THREADS, str(threads))
    import_module("jax").devices("cpu")
    has = os.environ.get(JAX_THREADS, str(usable_cores()))
    return None if has == str(threads) else f"JAX runs on {has} threads in this process, and cannot change to {threads}"


@contextlib.contextmanager
def _jax_on(problem: Problem, threads: int, platform: str) -> Iterator[Side]:
    if (reason := _start_jax(threads)) is not None:
        raise BackendError(reason)
    jax = import_module("jax")
    lax, jnp = jax.lax, jax.numpy
    work = problem.work

    def held(function: Callable[[], Any]) -> Any:
        """Call with the precision held, which is part of what is compiled."""
        with jax.enable_x64(work.dtype == "float64"), jax.default_matmul_precision("highest"):
            return function()

    device = jax.devices(platform)[0]
    zeros = np.zeros((work.batch, work.hidden), work.dtype)
    params, x, dy, zero = held(lambda: jax.device_put((problem.model.params, problem.x, problem.dy, zeros), device))

    def cell(params: Any, state: Any, inputs: Any) -> Any:
        """One step, from the input's products with W_ih."""
        h, c = state
        i, f, g, o = jnp.split(inputs + h @ params["weight_hh_l0"].T, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    def project(params: Any, x: Any) -> Any:
        return x @ params["weight_ih_l0"].T + params["bias_l0"]

    @jax.jit  # type: ignore[untyped-decorator, unused-ignore]
    def forward(params: Any, x: Any) -> Any:
        return lax.scan(lambda state, inputs: cell(params, state, inputs), (zero, zero), project(params, x))[1]

    @jax.jit  # type: ignore[untyped-decorator, unused-ignore]
    def both(params: Any, x: Any, dy: Any) -> Any:
        y, pull = jax.vjp(forward, params, x)
        grads, dx = pull(dy)
        return y, dx, *(grads[name] for name in sides.GRADIENTS)

    @jax.jit  # type: ignore[untyped-decorator, unused-ignore]
    def step(params: Any, x_t: Any, state: Any) -> Any:
        return cell(params, state, project(params, x_t))

    x_t, state = held(lambda: x[0]), (zero, zero)

    def call() -> Any:
        nonlocal state
        if work.kind == "infer":
            return jax.block_until_ready((forward(params, x),))
        if work.kind == "train":
            return jax.block_until_ready(both(params, x, dy))
        state, h = step(params, x_t, state)
        return h.block_until_ready()

    def outputs() -> tuple[Array, ...]:
        nonlocal state
        if work.kind == "stream":
            state = (zero, zero)
            return (np.stack([np.asarray(call()) for _ in range(CHECKED_STEPS)]),)
        return tuple(np.asarray(value) for value in call())

    def seconds(_: Callable[[], Any], count: int) -> float:
        return float(held(lambda: sides.host_seconds(call, count)))

    yield Side(lambda: held(call), lambda: held(outputs), seconds)


def jax_cpu(problem: Problem, threads: int) -> AbstractContextManager[Side]:
    """JAX on the CPU: one jitted lax.scan after one product of all inputs."""
    return _jax_on(problem, threads, "cpu")


def jax_cuda(problem: Problem, threads: int) -> AbstractContextManager[Side]:
    """JAX on the GPU, by the host's clock until the result is there."""
    return _jax_on(problem, threads, "gpu")


def _not_the_default(threads: int) -> str | None:
    """Say why NumPy arrays do not run on the compiled kernels, if they do not."""
    try:
        if dispatch.backend_for(np.empty(0)) is dispatch.backend_named("cpu"):
            return None
    except (BackendError, ImportError) as error:
        return str(error)
    return "another backend is forced, or NUMBA_DISABLE_JIT is set"


def _no_cuda(threads: int) -> str | None:
    try:
        dispatch.backend_named("cuda")
    except (BackendError, ImportError) as error:
        return str(error)
    return None


def _no_gpu_for_torch(threads: int) -> str | None:
    return None if import_module("torch").cuda.is_available() else "PyTorch finds no GPU"


def _no_gpu_for_jax(threads: int) -> str | None:
    if _no_cuda(threads) is not None:  # starting JAX takes its time, so it is not asked for nothing
        return "there is no fastlstm cuda to compare it with"
    if (reason := _start_jax(threads)) is not None:
        return reason
    try:
        import_module("jax").devices("gpu")
    except RuntimeError:
        return 'JAX finds no GPU: pip install "jax[cuda13]"'
    return None


class Contender(NamedTuple):
    """Who can compute, and what.

    Attributes
    ----------
    build : callable
        Given a problem and a number of threads, a context manager that gives a :class:`Side`.
    device : {"cpu", "cuda"}
        Where it computes.
    against : str or None
        The name of our own side that it is compared with.
    packages : tuple of str
        What it needs, by the names that pip and import know.
    kinds, dtypes : tuple of str
        What it can do.
    ragged : bool
        Whether it can do a ragged batch.
    obstacle : callable
        Given the number of threads, says why it cannot run here though its packages are there, or None.
    """

    build: Callable[[Problem, int], AbstractContextManager[Side]]
    device: str
    against: str | None
    packages: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("infer", "train", "stream")
    dtypes: tuple[str, ...] = ("float32", "float64")
    ragged: bool = True
    obstacle: Callable[[int], str | None] = lambda threads: None


CPU, CUDA, COPIES, REFERENCE = "fastlstm", "fastlstm cuda", "fastlstm cuda with copies", "fastlstm reference"
OURS = (CPU, CUDA, COPIES, REFERENCE)
_INFERENCE = ("infer", "stream")
CONTENDERS = {
    CPU: Contender(sides.cpu, "cpu", None, obstacle=_not_the_default),
    CUDA: Contender(sides.cuda, "cuda", None, obstacle=_no_cuda),
    COPIES: Contender(sides.cuda_with_copies, "cuda", None, obstacle=_no_cuda),
    "torch": Contender(torch_cpu, "cpu", CPU, ("torch",)),
    "onnxruntime": Contender(onnxruntime, "cpu", CPU, ("onnx", "onnxruntime"), _INFERENCE, ("float32",)),
    "openvino": Contender(openvino, "cpu", CPU, ("onnx", "openvino"), _INFERENCE, ("float32",)),
    "jax": Contender(jax_cpu, "cpu", CPU, ("jax",), ragged=False, obstacle=_start_jax),
    "torch cuda": Contender(torch_cuda, "cuda", CUDA, ("torch",), obstacle=_no_gpu_for_torch),
    "jax cuda": Contender(jax_cuda, "cuda", CUDA, ("jax",), ragged=False, obstacle=_no_gpu_for_jax),
    REFERENCE: Contender(sides.reference, "cpu", CPU, ("threadpoolctl",)),
}
"""Everybody, ourselves first. The reference is measured only where it is asked for: it is slow by design."""


def opponents(side: str, names: Iterable[str]) -> list[str]:
    """Return those of `names` that one of our own sides is compared with, in their order.

    That is who computes on the same device; and for a GPU also our own side on the CPU. A name that the table does not
    know, from another release's file, goes by its last word.
    """
    found = []
    for name in names:
        contender = CONTENDERS.get(name)
        against = contender.against if contender else CUDA if name.split()[-1] == "cuda" else CPU
        if against == side or (name == CPU and side in (CUDA, COPIES)):
            found.append(name)
    return found


def missing(name: str, threads: int) -> str | None:
    """Say why a contender cannot run here on so many threads, and what to install, or None if it can."""
    contender = CONTENDERS[name]
    lacking = [package for package in contender.packages if find_spec(package) is None]
    return f"pip install {' '.join(lacking)}" if lacking else contender.obstacle(threads)


def chosen(names: str | None) -> list[str]:
    """Read ``--peers``: names with commas between them, 'none', or None for everybody but the reference.

    Returns
    -------
    list of str
        Our own sides and those that were named, in the order of the table.

    Raises
    ------
    ArgumentError
        If there is no such contender.
    """
    if names is None:
        return [name for name in CONTENDERS if name != REFERENCE]
    wanted = {name.strip() for name in names.split(",")} - {"none", ""}
    wanted = {REFERENCE if name == "reference" else name for name in wanted}
    if unknown := wanted - set(CONTENDERS):
        known = ", ".join(name for name in CONTENDERS if name not in OURS)
        raise ArgumentError(f"there is no peer {', '.join(sorted(unknown))!r}; choose of {known}, reference, or none")
    return [name for name in CONTENDERS if name in wanted or (name in OURS and name != REFERENCE)]


def able(name: str, work: Work) -> bool:
    """Whether a contender, if it is here, can do this work."""
    contender = CONTENDERS[name]
    kind, dtype = work.kind in contender.kinds, work.dtype in contender.dtypes
    return kind and dtype and (contender.ragged or work.lengths is None)
