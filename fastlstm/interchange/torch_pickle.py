"""The pickles inside PyTorch's files, read without executing code.

``pickle.Unpickler`` calls the functions that a file names. Here a stack machine interprets the opcodes one by one: the
names that tensors need (:data:`ALLOWED`) become tokens, every other name is refused, and a call of a token
makes a :class:`Stored`, a dictionary or a tuple. Nothing is imported, called or set by name.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

from fastlstm.errors import ModelFileError
from fastlstm.interchange.source import broken_if

__all__ = ["DTYPES", "Storage", "Stored", "unpickle"]

DTYPES = {  # PyTorch's dtypes, and the classes of storages that older versions name in place of them
    "float32": "FloatStorage", "float64": "DoubleStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage",
    "int64": "LongStorage", "int32": "IntStorage", "int16": "ShortStorage", "int8": "CharStorage",
    "uint8": "ByteStorage", "bool": "BoolStorage", "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}  # fmt: skip
NEWER_DTYPES = ("uint16", "uint32", "uint64")  # these have no class of storages
_OF_STORAGE = {storage: dtype for dtype, storage in DTYPES.items()}


class Token(NamedTuple):
    """A name that the file refers to, `module` and `name`."""

    module: str
    name: str


class Storage(NamedTuple):
    """A storage that the pickle refers to: its key, its dtype or None for plain bytes, and its length in numbers."""

    key: str
    dtype: str | None
    length: int


class Stored(NamedTuple):
    """A tensor, as the pickle describes it; offset and strides count numbers."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark:
    """Where a list of arguments begins on the stack."""


_MARK = _Mark()
ALLOWED = {
    Token("collections", "OrderedDict"),
    Token("torch._utils", "_rebuild_tensor"),
    Token("torch._utils", "_rebuild_tensor_v2"),
    Token("torch._utils", "_rebuild_tensor_v3"),
    Token("torch._utils", "_rebuild_parameter"),
    Token("torch", "Size"),
    Token("torch", "device"),
    Token("torch.storage", "UntypedStorage"),
    *(Token("torch", name) for pair in DTYPES.items() for name in pair),
    *(Token("torch", name) for name in NEWER_DTYPES),
}
_QUANTISED = ("_rebuild_qtensor", "QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage",
              "QUInt2x4Storage", "qint8", "quint8", "qint32", "quint4x2", "quint2x4")  # fmt: skip


def unpickle(file: Any, storages: dict[str, Storage] | None = None) -> Any:
    """Read one pickle from a file, and leave the file behind its end.

    Parameters
    ----------
    file : binary file object
        With ``read``, ``readline`` and ``tell``.
    storages : dict, optional
        Takes every storage that the pickle refers to, by its key.

    Returns
    -------
    object
        Plain Python values, dictionaries, lists, tuples, :class:`Stored` and tokens.

    Raises
    ------
    ModelFileError
        If the pickle is damaged, or refers to anything that tensors do not need; the message names it.
    """
    machine = _Machine({} if storages is None else storages)
    with broken_if("its pickle"):
        while True:
            code = file.read(1)
            if code == b".":
                return machine.stack.pop()
            if code not in _CODES:  # refused before its argument is read
                raise ModelFileError(f"its pickle has an opcode that tensors do not need, {code!r}, or no end")
            name, read = _CODES[code]
            machine.run(name, read(file))


class _Machine:
    """A stack machine: one method for each opcode."""

    def __init__(self, storages: dict[str, Storage]) -> None:
        self.storages = storages
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        if name in _PUSHES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _OPCODES:
            _OPCODES[name](self, argument)

    def marked(self) -> list[Any]:
        """Pop all items above the last mark, and the mark."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                found = self.stack[place + 1 :]
                del self.stack[place:]
                return found
        raise ModelFileError("its pickle is damaged: a mark is missing")

    def mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def put(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, place: int) -> None:
        self.stack.append(self.memo[place])

    def pop(self, _: Any) -> None:
        self.stack.pop()

    def marked_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.marked()))

    def short_tuple(self, count: int) -> None:
        if count > len(self.stack):
            raise ModelFileError("its pickle is damaged: a tuple lacks items")
        found = tuple(self.stack[-count:])
        self.stack[-count:] = [found]

    def append(self, _: Any) -> None:
        item = self.stack.pop()
        _expect(self.stack[-1], list).append(item)

    def appends(self, _: Any) -> None:
        items = self.marked()
        _expect(self.stack[-1], list).extend(items)

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _store(self.stack[-1], key, value)

    def set_items(self, _: Any) -> None:
        items = self.marked()
        for key, value in zip(items[::2], items[1::2], strict=True):
            _store(self.stack[-1], key, value)

    def global_name(self, module_and_name: tuple[str, str]) -> None:
        self.stack.append(_allowed(*module_and_name))

    def stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_allowed(_expect(module, str), _expect(name, str)))

    def reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(_call(_expect(function, Token), _expect(arguments, tuple)))

    def build(self, _: Any) -> None:
        # Sets attributes, such as the _metadata of a state dict: no tensor needs them.
        self.stack.pop()
        _expect(self.stack[-1], dict)

    def persistent_id(self, _: Any) -> None:
        storage = _storage(_expect(self.stack.pop(), tuple))
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ModelFileError("two of its storages have one key")
        self.stack.append(storage)


_PUSHES = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple, "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}  # fmt: skip
_OPCODES: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark, "BINPUT": _Machine.put, "LONG_BINPUT": _Machine.put, "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.get, "LONG_BINGET": _Machine.get, "POP": _Machine.pop, "TUPLE": _Machine.marked_tuple,
    "TUPLE1": lambda machine, _: machine.short_tuple(1), "TUPLE2": lambda machine, _: machine.short_tuple(2),
    "TUPLE3": lambda machine, _: machine.short_tuple(3), "APPEND": _Machine.append, "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item, "SETITEMS": _Machine.set_items, "GLOBAL": _Machine.global_name,
    "STACK_GLOBAL": _Machine.stack_global, "REDUCE": _Machine.reduce, "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent_id,
}  # fmt: skip


def _readers() -> dict[bytes, tuple[str, Callable[[Any], Any]]]:
    """Return the name of each opcode that is read, and the reader of its argument, by its code."""
    found: dict[bytes, tuple[str, Callable[[Any], Any]]] = {}
    known = {"PROTO", "FRAME", *_PUSHES, *_CONSTANTS, *_OPCODES}
    for opcode in pickletools.opcodes:
        if opcode.name in known:
            reader = opcode.arg.reader if opcode.arg is not None else lambda file: None
            found[opcode.code.encode("latin-1")] = (opcode.name, reader)
    found[b"c"] = ("GLOBAL", lambda file: (_line(file), _line(file)))  # pickletools would undo escapes
    return found


def _line(file: Any) -> str:
    text: str = file.readline().decode("utf-8")
    return text.removesuffix("\n")


_CODES = _readers()


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ModelFileError(f"its pickle is damaged: {kind.__name__} expected, {type(value).__name__} found")
    return value


def _store(target: Any, key: Any, value: Any) -> None:
    # No tuples: the hash of a deeply nested one overflows the C stack.
    if key is not None and type(key) not in (str, int, float, bool, bytes):
        raise ModelFileError(f"its pickle has a key of type {type(key).__name__}")
    _expect(target, dict)[key] = value


def _allowed(module: str, name: str) -> Token:
    token = Token(module, name)
    if token in ALLOWED:
        return token
    where = f"{module}.{name}"[:200]
    if "quantized" in where.lower() or name in _QUANTISED:
        raise ModelFileError(f"it holds quantised tensors ({where}), which are not supported")
    if where == "torch.ScriptObject":  # what torch.ao.quantization.quantize_dynamic makes of the weights of an LSTM
        raise ModelFileError(
            f"it holds packed, most likely quantised, weights ({where}), which are not supported; save the state dict"
            " of the model before quantisation"
        )
    if name in ("_rebuild_sparse_tensor", "_rebuild_sparse_csr_tensor"):
        raise ModelFileError(f"it holds sparse tensors ({where}), which are not supported")
    raise ModelFileError(
        f"it refers to {where}, which tensors do not need, and files are read without executing code; save the"
        " weights alone, with torch.save(model.state_dict(), path)"
    )


def _storage(identity: tuple[Any, ...]) -> Storage:
    if len(identity) not in (5, 6) or identity[0] != "storage":
        raise ModelFileError("its pickle refers to something that is no storage")
    _, kind, key, _, length, *view = identity
    if view not in ([], [None]):
        raise ModelFileError("its storages are views of each other, which is not supported")
    name = _expect(kind, Token).name
    if name not in _OF_STORAGE and name != "UntypedStorage":
        raise ModelFileError(f"its pickle takes {name} for a storage")
    return Storage(_expect(key, str), _OF_STORAGE.get(name), _expect(length, int))


def _call(function: Token, arguments: tuple[Any, ...]) -> Any:
    """Return the value of a call of an allowed name."""
    name = function.name
    if name == "OrderedDict":
        found: dict[Any, Any] = {}
        for pair in _expect(arguments[0], list) if arguments else ():
            key, value = pair
            _store(found, key, value)
        return found
    if name == "_rebuild_parameter":
        return _expect(arguments[0], Stored)
    if name in ("Size", "device"):
        return arguments
    if name == "_rebuild_tensor_v3":
        dtype = _expect(arguments[6], Token).name
    elif name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
        dtype = _expect(arguments[0], Storage).dtype
    else:
        raise ModelFileError(f"its pickle calls {function.module}.{name}")
    storage, offset, shape, strides = arguments[:4]
    for numbers in (shape, strides):
        for number in _expect(numbers, tuple):
            _expect(number, int)
    return Stored(_expect(storage, Storage), _expect(dtype, str), _expect(offset, int), shape, strides)
