"""Files of torch.save and safetensors: read without PyTorch, and never run, trusted or read beyond their end."""

from __future__ import annotations

import collections
import functools
import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from own_process import run_script
from tolerances import assert_identical
from torch_files import Call, Global, archive, old_file, plain_file, tensor, weights

from fastlstm import LSTM, ArgumentError, DTypeError, FastLSTMError, ModelFileError
from fastlstm.interchange.torch_file import load_state_dict


@functools.cache
def import_torch():
    return pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")


def test_made_files_are_those_that_torch_reads():
    """The files made here are what PyTorch itself takes for a state dict."""
    torch = import_torch()
    read = torch.load(io.BytesIO(plain_file()), weights_only=True)
    assert_identical({name: value.numpy() for name, value in read.items()}, weights())


@pytest.mark.parametrize("given", ["path", "file object"])
def test_weights_of_a_file_are_read_to_the_bit(tmp_path, dtype, given):
    expected = weights(dtype)
    data = plain_file(expected, "lstm.")
    path = io.BytesIO(data)
    if given == "path":
        path = tmp_path / "weights.pt"
        path.write_bytes(data)
    lstm = LSTM.load_torch(path, prefix="lstm.")
    assert_identical(lstm.params, LSTM.from_torch_state_dict(expected).params)
    assert all(value.flags.writeable and value.flags.c_contiguous for value in lstm.params.values())


def test_views_of_one_storage_are_read_by_their_offsets_and_strides():
    expected = weights()
    storage = np.concatenate(
        [np.full(5, np.nan, np.float32), expected["weight_ih_l0"].T.ravel(), expected["weight_hh_l0"].ravel(),
         np.repeat(expected["bias_ih_l0"], 3), expected["bias_hh_l0"]]
    )  # fmt: skip
    described = {
        "weight_ih_l0": tensor("0", storage, 5, (8, 3), (1, 8)),  # transposed
        "weight_hh_l0": tensor("0", storage, 29, (8, 2), (2, 1)),
        "bias_ih_l0": tensor("0", storage, 45, (8,), (3,)),
        "bias_hh_l0": tensor("0", storage, 69, (8,), (1,)),
    }
    assert_identical(load_state_dict(io.BytesIO(archive(described, {"0": storage}))), expected)


def test_dictionaries_inside_each_other_are_named_by_dots_and_tensors_of_others_are_not_read():
    given = weights()
    inner = {f"rnn.{name}": tensor(name, array) for name, array in given.items()}
    # This storage is not in the file at all, and NumPy has no bfloat16.
    inner["head.weight"] = tensor("lost", np.zeros(4, np.float32), kind="BFloat16Storage")
    checkpoint = {"epoch": 3, "loss": 0.5, "state_dict": inner, "optimizer": {"state": {0: {"step": 1}}, "groups": [1]}}
    data = archive(checkpoint, given)
    assert_identical(
        {name.removeprefix("state_dict.rnn."): value
         for name, value in load_state_dict(io.BytesIO(data), "state_dict.rnn.").items()}, given
    )  # fmt: skip
    with pytest.raises(ArgumentError, match=r"prefix='state_dict\.rnn\.'"):
        LSTM.load_torch(io.BytesIO(data))


def test_old_files_may_have_tensors_elsewhere_than_in_dictionaries():
    """As the states of an optimiser, in a list: their storages are between those of the weights."""
    given = weights()
    storages = {"a": np.ones(3, np.float64)} | given
    described = {"states": [tensor("a", storages["a"])]} | {name: tensor(name, array) for name, array in given.items()}
    for call in (described["states"][0], *(described[name] for name in given)):
        call.arguments[0].identity += (None,)
    assert_identical(load_state_dict(io.BytesIO(old_file(storages, described))), given)


def test_a_file_without_an_lstm_lists_its_names():
    given = {"head.weight": np.zeros((2, 2), np.float32)}
    for data in (archive({n: tensor(n, a) for n, a in given.items()}, given), safetensors.numpy.save(given)):
        with pytest.raises(ArgumentError, match=r"has no LSTM.*head\.weight"):
            LSTM.load_torch(io.BytesIO(data))


@pytest.mark.parametrize("prefix", [None, 3, b"lstm."])
def test_a_prefix_that_is_no_string_is_refused(prefix):
    with pytest.raises(ArgumentError, match="prefix must be a string"):
        LSTM.load_torch(io.BytesIO(plain_file()), prefix)


# --- What is refused, by name -----------------------------------------------------------------------------------------


def beside(value):
    """Put something foreign beside the weights of an LSTM."""
    given = weights()
    return archive({name: tensor(name, array) for name, array in given.items()} | {"other": value}, given)


def tar_file():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as entries:
        entries.addfile(tarfile.TarInfo("storages"))
    return file.getvalue()


def zip_of(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as entries:
        for name in names:
            entries.writestr(name, "")
    return file.getvalue()


class Deleted(dict):
    pass


REFUSED = {
    "a call of os.system": (lambda: beside(Call(Global("os", "system"), "true")), "refers to os.system"),
    "a call of eval": (lambda: beside(Call(Global("builtins", "eval"), "1")), "refers to builtins.eval"),
    "a name without a call": (lambda: beside(Global("posix", "abort")), "posix.abort"),
    "a whole module": (lambda: beside(Global("torch.nn.modules.rnn", "LSTM")), r"LSTM.*state_dict\(\)"),
    "an allowed name of another module": (lambda: beside(Global("os", "OrderedDict")), "os.OrderedDict"),
    "a dotted name": (lambda: beside(Global("collections", "OrderedDict.fromkeys")), "fromkeys"),
    "an instance": (lambda: archive(pickle.dumps(Deleted(), 2), {}), "Deleted"),
    "an extension": (lambda: archive(b"\x80\x02\x82\x01.", {}), "opcode"),
    "a quantised tensor": (lambda: beside(Call(Global("torch._utils", "_rebuild_qtensor"), 1)), "quantised"),
    "a quantised storage": (lambda: beside(Global("torch", "QInt8Storage")), "quantised"),
    "a quantised module": (lambda: beside(Global("torch.ao.nn.quantized.dynamic", "LSTM")), "quantised"),
    "a sparse tensor": (lambda: beside(Call(Global("torch._utils", "_rebuild_sparse_tensor"), 1)), "sparse"),
    "TorchScript": (lambda: archive({}, {}, ["constants.pkl", "code/__torch__.py"]), "TorchScript"),
    "torch.export": (lambda: zip_of("model/archive_format", "model/models/model.json"), "torch.export"),
    "tar": (tar_file, "tar archive"),
    "another zip": (lambda: zip_of("a.txt"), "none of torch.save"),
    "numpy.savez": (lambda: zip_of("a.npy"), "numpy.savez"),
    "Keras": (lambda: zip_of("config.json", "model.weights.h5"), "from_keras"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
    "another pickle": (lambda: pickle.dumps({"a": 1}), "none of torch.save"),
    "a compressed archive": (
        lambda: archive({}, {"a": np.zeros(999)}, compression=zipfile.ZIP_DEFLATED), "compressed"
    ),
    "nothing": (lambda: b"", "neither"),
    "text": (lambda: b"hello, world", "neither"),
    "one tensor": (lambda: archive(tensor("a", np.zeros(2, np.float32)), {"a": np.zeros(2, np.float32)}), "one tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_state_dict_is_refused_by_name(case):
    make, message = REFUSED[case]
    with pytest.raises(ModelFileError, match=message):
        LSTM.load_torch(io.BytesIO(make()))


def test_nothing_in_a_file_is_ever_run(tmp_path):
    """A call of os.mkdir, in a file that has the weights too."""
    folder = tmp_path / "made"
    for function in ("mkdir", "system"):
        data = beside(Call(Global("os", function), str(folder)))
        with pytest.raises(ModelFileError, match=function):
            LSTM.load_torch(io.BytesIO(data))
    data = archive(b"\x80\x02" + f"cos\nmkdir\n(V{folder}\ntR.".encode(), {})
    with pytest.raises(ModelFileError, match="mkdir"):
        LSTM.load_torch(io.BytesIO(data))
    assert not folder.exists()


BAD_TENSORS = {
    "beyond the storage": ({"shape": (8, 4), "strides": (4, 1)}, "beyond"),
    "an offset beyond": ({"offset": 1}, "beyond"),
    "a negative offset": ({"offset": -1}, "impossible"),
    "a negative stride": ({"strides": (-3, 1)}, "impossible"),
    "a missing stride": ({"strides": (3,)}, "impossible"),
    "a storage that is shorter than it says": ({"count": 999}, "cut off"),
    "the same numbers again and again": ({"shape": (2**40, 3), "strides": (0, 1)}, "larger than the file"),
    "no integers": ({"shape": ("8", 3)}, "damaged"),
    "another key": ({}, "missing"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_tensor_that_does_not_lie_in_its_storage_is_refused(case):
    given = weights()
    change, message = BAD_TENSORS[case]
    described = {name: tensor(name, array) for name, array in given.items()}
    key = "nowhere" if case == "another key" else "weight_ih_l0"
    described["weight_ih_l0"] = tensor(key, given["weight_ih_l0"], **change)
    with pytest.raises(ModelFileError, match=message):
        LSTM.load_torch(io.BytesIO(archive(described, given)))


def test_dtypes_that_numpy_lacks_are_refused_by_name():
    given = weights()
    described = {name: tensor(name, array, kind="BFloat16Storage") for name, array in given.items()}
    with pytest.raises(DTypeError, match="bfloat16"):
        LSTM.load_torch(io.BytesIO(archive(described, given)))
    with pytest.raises(DTypeError, match="float16"):
        LSTM.load_torch(io.BytesIO(plain_file(weights(np.float16))))


def shared_dictionaries():
    inner = {"a": 1}
    for _ in range(40):
        inner = {"left": inner, "right": inner}
    return archive(inner, {})


BOMBS = {
    "a dictionary in itself": (lambda: archive(b"\x80\x02}q\x00U\x01ah\x00s.", {}), "too many names"),
    "dictionaries that share dictionaries": (shared_dictionaries, "too many names"),
    "a deep tuple as a key": (lambda: archive(b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.", {}), "key of type"),
    "many marks": (lambda: archive(b"\x80\x02" + b"(" * 300_000 + b".", {}), "no LSTM"),
    "a memo beyond the memory": (lambda: archive(b"\x80\x02}r\xff\xff\xff\xff.", {}), "no LSTM"),
    "a string beyond the memory": (lambda: archive(b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b"abc.", {}), "damaged"),
    "a string beyond the memory, in a file": (lambda: b"\x80\x04\x8e" + b"\xff" * 5 + b"\0\0\0" + b"abc.", "damaged"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_small_files_cannot_take_much_memory_or_time(kind, tmp_path):
    make, message = BOMBS[kind]
    path = tmp_path / "weights.pt"
    path.write_bytes(make())
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
from fastlstm import LSTM, FastLSTMError
try:
    LSTM.load_torch({str(path)!r})
except FastLSTMError as error:
    print(error)
"""
    assert message in run_script(code, prelude="", timeout=60)


# --- Mutations --------------------------------------------------------------------------------------------------------


def mutated(data, rng):
    """Change, insert, delete, repeat or cut some bytes."""
    found = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        if not found:
            break
        at, count = int(rng.integers(len(found))), int(rng.integers(1, 9))
        kind = rng.integers(5)
        if kind == 0:
            found[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            found[at : at + count] = rng.bytes(count)
        elif kind == 2:
            del found[at : at + count]
        elif kind == 3:
            found[at:at] = found[at : at + 8 * count]
        elif len(found) > 8:
            del found[at + 1 :]
    return bytes(found)


def repacked(data, rng):
    """Mutate the pickle of an archive and pack it again, so that no checksum tells."""
    with zipfile.ZipFile(io.BytesIO(data)) as entries:
        contents = {name: entries.read(name) for name in entries.namelist()}
    contents["weights/data.pkl"] = mutated(contents["weights/data.pkl"], rng)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as entries:
        for name, value in contents.items():
            entries.writestr(name, value)
    return file.getvalue()


MUTATIONS = {
    "the bytes of an archive": (plain_file, mutated, 2500),
    "the pickle of an archive": (plain_file, repacked, 3500),
    "an old file": (lambda: old_file(weights()), mutated, 2500),
    "a safetensors file": (lambda: safetensors.numpy.save(weights()), mutated, 2000),
}


@pytest.mark.parametrize("kind", MUTATIONS)
def test_damaged_files_raise_typed_errors_only(kind):
    """10,500 files in all; one that is read nonetheless gives arrays of an LSTM."""
    make, change, count = MUTATIONS[kind]
    rng, data = np.random.default_rng(31), make()
    outcomes = collections.Counter()
    for _ in range(count):
        try:
            lstm = LSTM.load_torch(io.BytesIO(change(data, rng)))
        except FastLSTMError as error:
            outcomes[type(error).__name__] += 1
        else:
            outcomes["read"] += 1
            assert all(np.asarray(value).dtype.kind == "f" for value in lstm.params.values())
    assert outcomes["ModelFileError"] > count // 4, outcomes


# --- Live: files of PyTorch -------------------------------------------------------------------------------------------


def to_numpy(module):
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def saved(module, **options):
    file = io.BytesIO()
    import_torch().save(module.state_dict(), file, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}], ids=str)
@pytest.mark.parametrize("kind", ["stacked", "cell", "inside", "one storage", "parameters"])
def test_files_of_torch_save_give_what_from_torch_state_dict_gives(kind, options, dtype):
    torch = import_torch()
    real = getattr(torch, np.dtype(dtype).name)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        module = torch.nn.LSTM(3, 5, 2, bidirectional=True, dtype=real)
        if kind == "cell":
            module = torch.nn.LSTMCell(3, 5, dtype=real)
        elif kind == "inside":
            module = torch.nn.ModuleDict({"rnn": module, "norm": torch.nn.BatchNorm1d(3), "out": torch.nn.Linear(5, 1)})
    prefix = "rnn." if kind == "inside" else ""
    expected = LSTM.from_torch_state_dict(
        {n: v for n, v in to_numpy(module).items() if n.startswith(prefix)}, prefix=prefix
    )
    if kind == "one storage":  # as cuDNN lays them out
        flat = torch.cat([value.detach().reshape(-1) for value in module.parameters()])
        start = 0
        for value in module.parameters():
            value.data = flat[start : start + value.numel()].view(value.shape)
            start += value.numel()
    file = saved(module, **options)
    if kind == "parameters":
        file = io.BytesIO()
        torch.save(dict(module.named_parameters()), file, **options)
        file.seek(0)
    lstm = LSTM.load_torch(file, prefix)
    assert lstm.cell == expected.cell
    assert_identical(lstm.params, expected.params)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_what_torch_saves_of_other_kinds_is_refused_by_name():
    torch = import_torch()
    module = torch.nn.LSTM(3, 5)
    whole, script, quantised = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(module, whole)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    quantised_weights = torch.quantize_per_tensor(torch.zeros(20, 3), 0.1, 0, torch.qint8)
    torch.save(module.state_dict() | {"weight_ih_l0": quantised_weights}, quantised)
    for file, message in ((whole, "torch.nn.modules.rnn.LSTM"), (script, "TorchScript"), (quantised, "quantised")):
        file.seek(0)
        with pytest.raises(ModelFileError, match=message):
            LSTM.load_torch(file)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_safetensors_of_other_producers_are_read(dtype, tmp_path):
    given = weights(dtype)
    others = {"head.weight": np.zeros((2, 2), np.float16), "count": np.zeros((), np.int64)}
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({f"a.b.{n}": v for n, v in given.items()} | others, path, {"producer": "someone"})
    lstm = LSTM.load_torch(path, "a.b.")
    assert_identical(lstm.params, LSTM.from_torch_state_dict(given).params)
    with pytest.raises(ArgumentError, match=r"prefix='a\.b\.'"):
        LSTM.load_torch(path)


def test_a_file_is_read_without_torch(tmp_path):
    """In a process where torch cannot be imported, and from a checkpoint as training programs write it."""
    path = tmp_path / "weights.pt"
    path.write_bytes(plain_file(prefix="lstm."))
    code = f"""
import sys
sys.modules["torch"] = None
from fastlstm import LSTM
print(LSTM.load_torch({str(path)!r}, "lstm."))
"""
    assert run_script(code, prelude="").strip() == "LSTM(3, 2, dtype=float32)  # 48 parameters"


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        LSTM.load_torch(tmp_path / "none.pt")
    with pytest.raises(ModelFileError, match="regular file"):
        LSTM.load_torch(tmp_path)
