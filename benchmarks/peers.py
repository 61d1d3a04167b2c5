"""The LSTMs that fastlstm is measured against, with the same weights; what a missing one needs is said.

A peer turns a shape into a callable that does one inference, or one training pass (forward and every
gradient), on arrays that are made once. Its first results are compared with ours before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from fastlstm import LSTM

ONNX_GATES = (0, 3, 1, 2)  # ONNX orders the gates i, o, f, g


class Work(NamedTuple):
    """One thing to measure: T, B, I, H, the dtype, whether to train, and the lengths of a ragged batch."""

    steps: int
    batch: int
    inputs: int
    hidden: int
    dtype: str = "float32"
    train: bool = False
    lengths: Any = None

    @property
    def operations(self) -> int:
        """Multiplications and additions of the matrix products; training is the forward's three times."""
        rows = self.steps * self.batch if self.lengths is None else int(self.lengths.sum())
        return 8 * rows * self.hidden * (self.inputs + self.hidden) * (3 if self.train else 1)

    def model(self) -> LSTM:
        """The model, the same for all sides."""
        return LSTM(self.inputs, self.hidden, dtype=self.dtype, seed=0)

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """Input and output gradient, the same for all sides."""
        rng = np.random.default_rng(1)
        x = rng.normal(size=(self.steps, self.batch, self.inputs)).astype(self.dtype)
        return x, rng.normal(size=(self.steps, self.batch, self.hidden)).astype(self.dtype)


def ours(work: Work, threads: int) -> Callable[[], Any]:
    """Build our own side."""
    import fastlstm

    fastlstm.set_num_threads(threads)
    model, (x, dy) = work.model(), work.data()

    def train():
        y, _, tape = model.forward(x, lengths=work.lengths)
        grads = model.backward(tape, dy)
        return y, grads.x

    return train if work.train else lambda: (model(x, lengths=work.lengths)[0],)


def torch(work: Work, threads: int) -> Callable[[], Any]:
    """PyTorch's nn.LSTM; packed sequences for a ragged batch."""
    torch = import_module("torch")
    torch.set_num_threads(threads)
    module = torch.nn.LSTM(work.inputs, work.hidden, dtype=getattr(torch, work.dtype))
    state = work.model().to_torch_state_dict()
    module.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})
    x, dy = map(torch.from_numpy, work.data())
    lengths = None if work.lengths is None else torch.from_numpy(work.lengths)

    def forward(x):
        if lengths is None:
            return module(x)[0]
        pack, pad = torch.nn.utils.rnn.pack_padded_sequence, torch.nn.utils.rnn.pad_packed_sequence
        return pad(module(pack(x, lengths, enforce_sorted=False))[0], total_length=work.steps)[0]

    def infer():
        with torch.inference_mode():
            return (forward(x).numpy(),)

    def train():
        leaf = x.detach().requires_grad_()
        module.zero_grad()
        y = forward(leaf)
        y.backward(dy)
        return y.detach().numpy(), leaf.grad.numpy()

    return train if work.train else infer


def onnx_model(work: Work) -> bytes:
    """The model as an ONNX graph of one LSTM node."""
    onnx = import_module("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    params = work.model().params
    order = np.concatenate([np.arange(g * work.hidden, (g + 1) * work.hidden) for g in ONNX_GATES])
    weights = {
        "W": params["weight_ih_l0"][order][None],
        "R": params["weight_hh_l0"][order][None],
        "B": np.concatenate([params["bias_l0"][order], np.zeros_like(params["bias_l0"])])[None],
    }
    node = helper.make_node("LSTM", ["X", "W", "R", "B"], ["Y"], hidden_size=work.hidden)
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "lstm",
        [helper.make_tensor_value_info("X", kind, [work.steps, work.batch, work.inputs])],
        [helper.make_tensor_value_info("Y", kind, [work.steps, 1, work.batch, work.hidden])],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model.SerializeToString()


def onnxruntime(work: Work, threads: int) -> Callable[[], Any]:
    """ONNX Runtime's LSTM operator on the CPU."""
    ort = import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(onnx_model(work), options, providers=["CPUExecutionProvider"])
    x, _ = work.data()
    return lambda: (session.run(None, {"X": x})[0][:, 0],)


def openvino(work: Work, threads: int) -> Callable[[], Any]:
    """OpenVINO on the same ONNX graph, held to float32: left to itself it computes in bfloat16 where it can."""
    ov = import_module("openvino")
    core = ov.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(onnx_model(work)), "CPU", settings).create_infer_request()
    x, _ = work.data()
    tensor = ov.Tensor(x, shared_memory=True)

    def run():
        request.set_input_tensor(tensor)
        request.infer()
        return (request.get_output_tensor().data[:, 0],)

    return run


class Peer(NamedTuple):
    """A peer: how to build it, which packages it needs, and what it can do."""

    build: Callable[[Work, int], Callable[[], Any]]
    packages: tuple[str, ...]
    trains: bool
    dtypes: tuple[str, ...]


PEERS = {
    "torch": Peer(torch, ("torch",), True, ("float32", "float64")),
    "onnxruntime": Peer(onnxruntime, ("onnx", "onnxruntime"), False, ("float32",)),
    "openvino": Peer(openvino, ("onnx", "openvino"), False, ("float32",)),
}


def missing() -> dict[str, str]:
    """The peers that are not here, and what they need."""
    lacking = {name: [p for p in peer.packages if find_spec(p) is None] for name, peer in PEERS.items()}
    return {name: f"pip install {' '.join(packages)}" for name, packages in lacking.items() if packages}


def able(work: Work) -> list[str]:
    """The peers that are here and can do this work."""
    absent = missing()
    return [
        name
        for name, peer in PEERS.items()
        if name not in absent
        and work.dtype in peer.dtypes
        and (peer.trains or not work.train)
        and (work.lengths is None or name == "torch")
    ]
