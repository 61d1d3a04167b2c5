"""ONNX files: damaged ones, external data, PyTorch's exports, and a test that notices exchanged gates."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from harness import REFERENCE
from onnx_models import B, H, I, T, joined, node_model, onnx, ours, run
from tolerances import assert_identical, normalised_error

from fastlstm import LSTM, FastLSTMError, ModelFileError

from_array = onnx.numpy_helper.from_array


def test_damaged_files_raise_typed_errors_only():
    file, outcomes = io.BytesIO(), {"read": 0, "refused": 0}
    LSTM(2, 2, 2, peephole=True, seed=0).to_onnx(file, state=True)
    data, rng = file.getvalue(), np.random.default_rng(9)
    for _ in range(1500):
        found = bytearray(data)
        for _ in range(rng.integers(1, 5)):
            at = int(rng.integers(len(found)))
            found[at : at + int(rng.integers(0, 5))] = rng.bytes(int(rng.integers(0, 5)))
        try:
            LSTM.from_onnx(io.BytesIO(found))
        except FastLSTMError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
    assert outcomes["refused"] > 500, outcomes


def test_names_that_are_no_text_raise_typed_errors_only():
    """Protobuf gives them as bytes."""
    model, _ = node_model()
    for name in (b"the_lstm", b"W", b"x", b"Y"):
        data = model.SerializeToString().replace(name, b"\xff" * len(name))
        for node in (None, "the_lstm"):
            try:
                LSTM.from_onnx(io.BytesIO(data), node=node)
            except FastLSTMError as error:
                assert str(error)


@pytest.mark.parametrize("data", [b"", b"hello, world", b"\x08"], ids=str)
def test_other_files_are_refused(data):
    with pytest.raises(ModelFileError, match=r"damaged|empty"):
        LSTM.from_onnx(io.BytesIO(data))


def test_external_data_are_read_from_the_folder_and_not_from_elsewhere(tmp_path):
    model, _ = node_model()
    expected = LSTM.from_onnx(model)
    path = tmp_path / "a" / "model.onnx"
    path.parent.mkdir()
    onnx.save(model, path, save_as_external_data=True, location="data.bin", size_threshold=0)
    assert_identical(LSTM.from_onnx(path).params, expected.params)
    with pytest.raises(ModelFileError, match="another file"):
        LSTM.from_onnx(io.BytesIO(path.read_bytes()))
    (path.parent / "data.bin").rename(tmp_path / "data.bin")
    with pytest.raises(ModelFileError, match="another file"):
        LSTM.from_onnx(path)
    path.write_bytes(path.read_bytes().replace(b"data.bin", b"../d.bin"))
    (tmp_path / "data.bin").rename(tmp_path / "d.bin")
    with pytest.raises(ModelFileError, match="another file"):
        LSTM.from_onnx(path)


@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_what_torch_exports_is_read_as_one_model(tmp_path, bidirectional, batch_first):
    torch = pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = torch.nn.LSTM(I, H, 2, bidirectional=bidirectional, batch_first=batch_first).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(module, (torch.zeros(T, B, I),), path, dynamo=False)
    lstm = LSTM.from_onnx(path)
    expected = LSTM.from_torch_state_dict({name: value.numpy() for name, value in module.state_dict().items()})
    assert_identical(lstm.params, expected.params)


@pytest.mark.parametrize("pair", list(itertools.combinations(range(4), 2)), ids=str)
def test_swapping_any_two_gates_would_be_seen(pair):
    model, given = node_model(peephole=True)
    expected = joined(run(model, given)["Y"])
    order = np.arange(4)
    order[list(pair)] = order[list(pair[::-1])]
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        blocks = array.reshape(-1, 4, H, *array.shape[2:]) if tensor.name != "P" else array.reshape(1, 3, H)
        if tensor.name == "P" and max(pair) == 3:
            continue
        swapped = onnx.ModelProto()
        swapped.CopyFrom(model)
        (target,) = (t for t in swapped.graph.initializer if t.name == tensor.name)
        mixed = blocks[:, order[: blocks.shape[1]]].reshape(array.shape)
        target.CopyFrom(from_array(np.ascontiguousarray(mixed), tensor.name))
        with REFERENCE.active():
            assert normalised_error(ours(LSTM.from_onnx(swapped), given)["y"], expected) > 1e-3, tensor.name
