"""The libraries that can compute a :class:`~fastlstm.bench.work.Work`, fastlstm first, with the same weights.

:data:`CONTENDERS` is the table. Each entry says how a side is built, which packages that needs, and what the side can
compute. All compute in the dtype of the work: OpenVINO is held to float32, where it would take bfloat16, and TF32 is
off unless a name says otherwise. A new peer is :class:`~fastlstm.bench.sides.Calls` and an entry.
"""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from fastlstm import dispatch
from fastlstm.bench import sides
from fastlstm.bench.sides import Calls, Side, held, side_of
from fastlstm.bench.work import Array, Problem, Work
from fastlstm.cell import Cell
from fastlstm.errors import ArgumentError, BackendError

__all__ = ["BY_STEPS", "CONTENDERS", "OURS", "Contender", "chosen", "missing"]

TORCH_GPU = "cuda"


def torch_module(torch: Any, problem: Problem, device: str = "cpu") -> Any:
    """Return torch.nn.LSTM with the problem's weights."""
    work = problem.work
    module = torch.nn.LSTM(work.inputs, work.hidden, work.layers, bidirectional=work.bidirectional)
    state = problem.model.to_torch_state_dict()
    module = module.to(getattr(torch, work.dtype))
    module.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})
    module = module.to(device)
    return module if work.kind == "train" else module.eval()  # cuDNN does less then


def torch_lstm(problem: Problem, threads: int, *, on_gpu: bool = False, tf32: bool = False) -> Side:
    """PyTorch's nn.LSTM, which is cuDNN's on a GPU, with TF32 if asked; packed sequences for a ragged batch."""
    torch, device = import_module("torch"), TORCH_GPU if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.empty_cache()
    work, module = problem.work, torch_module(torch, problem, device)
    lengths = None if work.lengths is None else torch.from_numpy(problem.lengths)
    weights = [getattr(module, name.replace("bias_l", "bias_ih_l")) for name in problem.model.params]

    def forward(x: Any) -> Any:
        if lengths is None:
            return module(x)[0]
        pack, pad = torch.nn.utils.rnn.pack_padded_sequence, torch.nn.utils.rnn.pad_packed_sequence
        return pad(module(pack(x, lengths, enforce_sorted=False))[0], total_length=work.steps)[0]

    def train(x: Any, dy: Any) -> tuple[Any, ...]:
        leaf = x.detach().requires_grad_()
        module.zero_grad()
        y = forward(leaf)
        y.backward(dy)
        return y.detach(), leaf.grad, *(value.grad for value in weights)

    without_gradients = torch.inference_mode()
    calls = Calls(
        without_gradients(forward),
        train,
        without_gradients(module.__call__),
        load=lambda host: torch.from_numpy(host).to(device),
        fetch=lambda tensor: tensor.to("cpu").numpy(),
    )
    events = None if device == "cpu" else SimpleNamespace(  # under CuPy's names
        Event=lambda: torch.cuda.Event(enable_timing=True),
        get_current_stream=torch.cuda.current_stream,
        get_elapsed_time=lambda start, end: start.elapsed_time(end),
    )  # fmt: skip
    flags = [torch.backends.cudnn, torch.backends.cuda.matmul] if on_gpu else []
    return side_of(problem, calls, events, lambda: held("allow_tf32", tf32, *flags))


def onnx_model(problem: Problem) -> bytes:
    """Return the LSTM nodes of our ONNX export, of fixed sizes; the states are inputs and outputs when streaming."""
    work, onnx, file = problem.work, import_module("onnx"), io.BytesIO()
    problem.model.to_onnx(file, state=work.kind == "stream", lengths=work.lengths is not None)
    inputs = ["x", *["lengths"] * (work.lengths is not None)]
    outputs = [f"Y{work.layers - 1}"]  # before it is transposed
    if work.kind == "stream":  # the states of each layer, before they are joined
        inputs += [f"{name}0_{layer}" for layer in range(work.layers) for name in "hc"]
        outputs += [f"{name}_n_{layer}" for layer in range(work.layers) for name in "hc"]
    whole, sizes = onnx.load_model_from_string(file.getvalue()), {"T": work.steps, "B": work.batch}
    for value in (*whole.graph.input, *whole.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in sizes:
                dimension.dim_value = sizes[dimension.dim_param]
    parts = import_module("onnx.utils").Extractor(onnx.shape_inference.infer_shapes(whole))
    model = parts.extract_model(inputs, outputs)
    for node in model.graph.node:
        if node.op_type == "LSTM" and work.kind != "stream":
            del node.output[1:]  # final states, which would be computed for nothing
    return bytes(model.SerializeToString())


def _graph_calls(problem: Problem, run: Callable[[dict[str, Any]], list[Array]], load: Callable[[Array], Any]) -> Calls:
    """Make calls of a function from the inputs of :func:`onnx_model` to its outputs."""
    work, feed = problem.work, dict[str, Any]()
    if work.lengths is not None:
        feed["lengths"] = load(np.array(work.lengths, np.int32))
    zero = np.zeros((1, work.batch, work.hidden), np.float32)
    names = [f"{name}0_{layer}" for layer in range(work.layers) for name in "hc"]

    def step(x: Any, state: Any) -> tuple[Array, Any]:
        _, *state = run({"x": x, **dict(zip(names, state or [zero] * len(names), strict=True))})
        return state[-2], state

    def fetch(found: Array) -> Array:  # Y is (T, D, B, H); OpenVINO's next call overwrites it
        merged = work.steps, work.batch, -1
        return found.copy() if work.kind == "stream" else found.transpose(0, 2, 1, 3).reshape(merged)

    # The graph takes a batch of one, where other libraries take an unbatched call.
    return Calls(lambda x: run({"x": x, **feed})[0], lambda x, dy: None, step, lambda _: load(problem.x), fetch)


def onnx_calls(problem: Problem, threads: int) -> Calls:
    """ONNX Runtime's LSTM operator on the CPU."""
    ort = import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(onnx_model(problem), options, providers=["CPUExecutionProvider"])
    return _graph_calls(problem, lambda feed: session.run(None, feed), lambda host: host)


def onnxruntime(problem: Problem, threads: int) -> Side:
    """ONNX Runtime's LSTM operator on the CPU."""
    return side_of(problem, onnx_calls(problem, threads))


def openvino(problem: Problem, threads: int) -> Side:
    """OpenVINO on the same ONNX graph, held to float32."""
    hidden = {"openvino", "openvino_telemetry"}.isdisjoint(sys.modules)
    if hidden:  # without its telemetry, whose processes would run beside the next side's samples
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # its import fails, as OpenVINO allows
    ov = import_module("openvino")
    if hidden:
        del sys.modules["openvino_telemetry"]
    core = ov.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(onnx_model(problem)), "CPU", settings)
    request, count = compiled.create_infer_request(), len(compiled.outputs)

    def run(feed: dict[str, Any]) -> list[Array]:
        for name, value in feed.items():  # a state is copied: the next call overwrites the request's own output
            request.set_tensor(name, value if isinstance(value, ov.Tensor) else ov.Tensor(value))
        request.infer()
        return [request.get_output_tensor(number).data for number in range(count)]

    return side_of(problem, _graph_calls(problem, run, lambda host: ov.Tensor(host, shared_memory=host is problem.x)))


def _obstacle(backend: str) -> str | None:
    """Say why arrays do not run on the compiled kernels of a backend, if they do not."""
    try:
        found = dispatch.backend_named(backend)
        if backend == "cpu" and dispatch.backend_for(np.empty(0)) is not found:
            return "another backend is forced, or NUMBA_DISABLE_JIT is set"
    except (BackendError, ImportError) as error:
        return str(error)
    return None


def _no_gpu_for_torch() -> str | None:
    return None if TORCH_GPU == "cpu" or import_module("torch").cuda.is_available() else "PyTorch finds no GPU"


def _graph_is_able(work: Work) -> bool:
    """Whether the graph of :func:`onnx_model` can do this work."""
    return work.kind != "train" and work.dtype == "float32"


def _is_persistent(work: Work) -> bool:
    """Whether our CUDA backend plans a persistent kernel for some layer: else it goes by steps anyway."""
    sizes, dtype = (work.inputs, work.hidden, work.layers), np.dtype(work.dtype)
    cell = Cell(*sizes, bidirectional=work.bidirectional, dtype=dtype)
    plan = dispatch.backend_named("cuda").plan(cell, work.steps, work.rows, work.batch, False)
    return work.kind != "stream" and any("one launch a sequence" in words for words in plan)


class Contender(NamedTuple):
    """A library that computes works."""

    build: Callable[[Problem, int], Side]  # given a number of threads, to which those of torch and ours are set already
    packages: tuple[str, ...] = ()  # that it needs, by the names that pip and import know
    able: Callable[[Work], bool] = lambda work: True  # whether it can do this work
    obstacle: Callable[[], str | None] = lambda: None  # returns why it cannot run here though it is installed
    tolerance: float | None = None  # instead of that of the dtype


CPU, CUDA, COPIES, BY_STEPS = "fastlstm", "fastlstm cuda", "fastlstm cuda with copies", "fastlstm cuda by steps"
OURS = (CPU, CUDA, COPIES)
# Sums of 131,072 products in another order explain an error of 5e-4; TF32 is a narrower format.
_ON_GPU = Contender(sides.cuda, obstacle=lambda: _obstacle("cuda"))
_cudnn_lstm = functools.partial(torch_lstm, on_gpu=True)
_ROUNDED = _ON_GPU._replace(able=lambda work: work.kind != "stream")  # steps are computed in float32
_TORCH_ON_GPU = Contender(_cudnn_lstm, ("torch",), obstacle=_no_gpu_for_torch, tolerance=5e-4)
CONTENDERS = {
    CPU: Contender(sides.cpu, obstacle=lambda: _obstacle("cpu")),
    CUDA: _ON_GPU,
    COPIES: _ON_GPU._replace(build=functools.partial(sides.cuda, copies=True)),
    "torch": Contender(torch_lstm, packages=("torch",)),
    "onnxruntime": Contender(onnxruntime, packages=("onnx", "onnxruntime"), able=_graph_is_able),
    "openvino": Contender(openvino, packages=("onnx", "openvino"), able=_graph_is_able),
    "torch cuda": _TORCH_ON_GPU,
    # For benchmarks/gpu.py alone: a product and a kernel each step, and products of rounded factors.
    BY_STEPS: _ON_GPU._replace(build=functools.partial(sides.cuda, by_steps=True), able=_is_persistent, tolerance=5e-4),
    "torch cuda TF32": _TORCH_ON_GPU._replace(build=functools.partial(_cudnn_lstm, tf32=True), tolerance=2e-2),
    f"{CUDA} TF32": _ROUNDED._replace(build=functools.partial(sides.cuda, precision="tf32"), tolerance=2e-2),
    f"{CUDA} bfloat16": _ROUNDED._replace(build=functools.partial(sides.cuda, precision="bf16"), tolerance=2e-1),
}
BY_DEFAULT = (*OURS, "torch", "onnxruntime", "openvino", "torch cuda")  # measured by ``fastlstm bench``


def missing(name: str) -> str | None:
    """Say why a contender cannot run here, with the command that installs it; None if it can."""
    lacking = [package for package in CONTENDERS[name].packages if find_spec(package) is None]
    return f"pip install {' '.join(lacking)}" if lacking else CONTENDERS[name].obstacle()


def chosen(names: str | None) -> list[str]:
    """Read ``--peers``: names with commas between them, 'none', or None for all; our own sides are always there."""
    wanted = set(BY_DEFAULT) if names is None else {name.strip() for name in names.split(",")} - {"none", ""}
    if unknown := wanted - set(BY_DEFAULT):
        known = ", ".join(name for name in BY_DEFAULT if name not in OURS)
        raise ArgumentError(f"there is no peer {', '.join(sorted(unknown))!r}; choose of {known}, or none")
    return [name for name in BY_DEFAULT if name in wanted or name in OURS]
