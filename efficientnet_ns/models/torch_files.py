"""Reads tensors from `torch.save` files without PyTorch and without running any code they name.

A file contains pickles, whose opcodes name the functions that rebuild an object, and the *storages*
of its tensors: flat arrays, of which a tensor is a view with an offset, a shape and strides. Python's
own unpickler would import and call the functions that a file names. The one below supports only the
opcodes and names that tensors need, and rejects everything else.

There are two formats (`torch/serialization.py`). Since PyTorch 1.6, a file is a zip archive with the
pickle `<name>/data.pkl` and the bytes of each storage, `<name>/data/<key>`. Earlier files contain
pickles of a magic number, the format version, facts about the machine, the object and the keys of
the storages, followed by the storages in that order, each with its length.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import pickletools
import re
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import tensorflow as tf


class Refused(ValueError):
    """The file contains something other than tensors, but is not known to be damaged."""


_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_DATA_PKL = re.compile(r"([^/]+/)data\.pkl")
_SAVE_THE_STATE = "save the weights with torch.save(model.state_dict(), path)"


def is_old(content: bytes) -> bool:
    """Checks whether a file begins like those of PyTorch before 1.6."""
    return content[:1] == b"\x80" and _MAGIC.to_bytes(10, "little") in content[:32]


def is_new(names: list[str]) -> bool:
    """Checks whether a zip archive with these entries was written by PyTorch."""
    return any(map(_DATA_PKL.fullmatch, names))


def read(content: bytes) -> Any:
    """Reads the object in a file: `Tensor`s, numbers, strings, and lists, tuples and dicts of them.

    Other data that a training script stores with its weights, such as its arguments, is `Opaque`.

    Raises:
      Refused: If the file has other objects; the message names the first.
      Exception: If the file is damaged; its type varies.
    """
    return _read_old(content) if is_old(content) else _read_zip(content)


# --------------------------------------------------------------------------------------------------
# Contents of a pickle


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name in a module, which is not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Opaque:
    """A harmless object that is not part of the weights; its content is dropped."""


@dataclasses.dataclass(eq=False)
class _Storage:
    """A flat array in a file.

    Attributes:
      key: name of the storage in the file.
      dtype: dtype of its elements.
      size: number of elements.
      read: function that returns its bytes.
    """

    key: str
    dtype: np.dtype
    size: int
    read: Callable[[_Storage], bytes | memoryview]

    @property
    def num_bytes(self) -> int:
        return self.size * self.dtype.itemsize

    @functools.cached_property
    def content(self) -> bytes | memoryview:
        return self.read(self)


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """Elements `start` to `stop` of a storage; in old files, storages can be parts of others."""

    storage: _Storage
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a part of a storage; offset and strides count elements."""

    part: _Part
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        """Returns a read-only view, so that even a huge shape takes no memory.

        Raises:
          ValueError: If the tensor exceeds its storage.
        """
        storage, first = self.part.storage, self.part.start + self.offset
        if 0 in self.shape:
            return np.zeros(self.shape, storage.dtype)
        last = first + sum((n - 1) * step for n, step in zip(self.shape, self.strides))
        if last >= self.part.stop:
            raise ValueError(
                f"a tensor of shape {list(self.shape)}, strides {list(self.strides)} and offset "
                f"{self.offset} exceeds its storage {storage.key} of "
                f"{self.part.stop - self.part.start} elements"
            )
        size = storage.dtype.itemsize
        strides = [step * size for step in self.strides]
        # Unlike `as_strided`, this also checks the bounds.
        return np.ndarray(self.shape, storage.dtype, storage.content, first * size, strides)


# Storage class → dtype. NumPy has no bfloat16; TensorFlow provides it.
_STORAGES: dict[tuple[str, str], np.dtype] = {
    ("torch", f"{name}Storage"): np.dtype(dtype)
    for name, dtype in {
        "Double": "<f8",
        "Float": "<f4",
        "Half": "<f2",
        "BFloat16": tf.bfloat16.as_numpy_dtype,
        "Long": "<i8",
        "Int": "<i4",
        "Short": "<i2",
        "Char": "i1",
        "Byte": "u1",
        "Bool": "?",
    }.items()
}


def _counts(value: Any, what: str) -> tuple[int, ...]:
    """Checks that a value is a tuple of non-negative integers, such as a shape, and returns it."""
    if not isinstance(value, tuple) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError(f"{what} of a tensor does not consist of non-negative integers")
    return value


def _tensor(part: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    if not isinstance(part, _Part):
        raise ValueError("a tensor does not refer to a storage")
    shape, strides = _counts(shape, "the shape"), _counts(strides, "the strides")
    if len(shape) != len(strides):
        raise ValueError(f"a tensor of shape {list(shape)} has strides {list(strides)}")
    (offset,) = _counts((offset,), "the offset")
    return Tensor(part, offset, shape, strides)


def _dictionary(items: Any = ()) -> dict:
    return {_key(name): value for name, value in items}


def _key(key: Any) -> Any:
    # Other types may take forever to hash: a tuple of two tuples of two tuples …
    if not isinstance(key, (str, bytes, int, float, type(None))):
        raise ValueError(f"a dictionary has a {type(key).__name__} as a key")
    return key


# Function or class that a pickle may call → its replacement.
_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch", "Size"): lambda sizes=(): sizes,
    ("collections", "OrderedDict"): _dictionary,
}
# Other objects that training scripts store in their checkpoints.
_HARMLESS = {
    *(
        ("builtins", name)
        for name in ("set", "frozenset", "dict", "list", "int", "float", "complex")
    ),
    *(("__builtin__", name) for name in ("set", "frozenset", "dict", "list")),
    *(
        (module, f"{pure}{kind}Path")
        for module in ("pathlib", "pathlib._local")  # Python 3.13 writes the latter.
        for pure in ("", "Pure")
        for kind in ("Posix", "Windows")
    ),
    *(("numpy", name) for name in ("dtype", "ndarray")),
    *((f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("_codecs", "encode"),  # Bytes of such numbers.
    ("argparse", "Namespace"),
    ("collections", "defaultdict"),
    ("collections", "Counter"),
    ("torch", "device"),
    *(("torch", name) for name in ("float64", "float32", "float16", "bfloat16", "int64", "bool")),
}
_KNOWN = _CALLS.keys() | _STORAGES.keys() | _HARMLESS

_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": Opaque,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_SKIPPED = {"PROTO", "FRAME", "STOP"}


class _Pickle:
    """A machine for the opcodes of a pickle (`pickletools`), each a method or in a table above.

    Args:
      storages: collects the storages that the pickle declares.
    """

    def __init__(self, storages: _Storages | None = None):
        self._storages = storages
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # Stacks below the marks.
        self._memo: dict[int, Any] = {}

    def load(self, file: BinaryIO) -> Any:
        """Loads the pickle at the file's position and moves the position to its end."""
        for opcode, argument, _ in pickletools.genops(file):
            try:
                self._step(opcode.name, argument)
            except (IndexError, KeyError, TypeError) as error:
                raise ValueError(f"its pickle is damaged at {opcode.name}") from error
        return self._pop()[0]

    def _step(self, opcode: str, argument: Any) -> None:
        if opcode in _LITERALS:
            self._push(argument)
        elif opcode in _NEW:
            self._push(_NEW[opcode]())
        elif opcode in _TUPLES:
            self._push(tuple(self._pop(_TUPLES[opcode])))
        elif opcode in _OPCODES:
            _OPCODES[opcode](self, argument)
        elif opcode not in _SKIPPED:
            named = f" for {argument.replace(' ', '.')}" if opcode == "INST" else ""
            raise Refused(f"its pickle has the opcode {opcode}{named}: {_SAVE_THE_STATE}")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self, count: int = 1) -> list[Any]:
        if len(self._stack) < count:
            raise IndexError("the stack is empty")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _pop_mark(self, _: Any = None) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _global(self, named: str) -> None:
        self._push_global(*named.split(" ", 1))

    def _stack_global(self, _: Any) -> None:
        self._push_global(*self._pop(2))

    def _push_global(self, module: Any, name: Any) -> None:
        named = _Global(module, name)
        if (module, name) not in _KNOWN:
            raise Refused(f"it names {named}, which tensors do not require: {_SAVE_THE_STATE}")
        self._push(named)

    def _call(self, _: Any) -> None:
        called, arguments = self._pop(2)
        if not isinstance(called, _Global) or not isinstance(arguments, tuple):
            raise ValueError("its pickle calls something that is not a function")
        compute = _CALLS.get((called.module, called.name))
        self._push(Opaque() if compute is None else compute(*arguments))

    def _build(self, _: Any) -> None:
        # Attributes, such as the module versions of a state dict, are dropped.
        (built, _state) = self._pop(2)
        if not isinstance(built, (dict, Opaque, Tensor)):
            raise ValueError("its pickle sets attributes of an object without any")
        self._push(built)

    def _persistent(self, _: Any) -> None:
        if self._storages is None:
            raise ValueError("its pickle has a storage where none is allowed")
        self._push(self._storages.part(*self._pop()))

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            target.update(_pairs(items))
        elif not isinstance(target, Opaque):
            raise ValueError("its pickle sets items of an object without any")

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Opaque):
            raise ValueError("its pickle extends something that is not a list")

    def _put(self, number: int | None) -> None:
        self._memo[len(self._memo) if number is None else number] = self._stack[-1]


def _pairs(items: list[Any]) -> dict:
    return _dictionary(zip(items[::2], items[1::2], strict=True))


_OPCODES: dict[str, Callable[[_Pickle, Any], Any]] = {
    "MARK": _Pickle._mark,
    "POP": lambda pickle, _: pickle._pop(),
    "POP_MARK": _Pickle._pop_mark,
    "DUP": lambda pickle, _: pickle._push(pickle._stack[-1]),
    "GLOBAL": _Pickle._global,
    "STACK_GLOBAL": _Pickle._stack_global,
    "REDUCE": _Pickle._call,
    "NEWOBJ": _Pickle._call,
    "BUILD": _Pickle._build,
    "BINPERSID": _Pickle._persistent,
    "TUPLE": lambda pickle, _: pickle._push(tuple(pickle._pop_mark())),
    "LIST": lambda pickle, _: pickle._push(pickle._pop_mark()),
    "DICT": lambda pickle, _: pickle._push(_pairs(pickle._pop_mark())),
    "SETITEM": lambda pickle, _: pickle._set_items(pickle._pop(2)),
    "SETITEMS": lambda pickle, _: pickle._set_items(pickle._pop_mark()),
    "APPEND": lambda pickle, _: pickle._extend(pickle._pop()),
    "APPENDS": lambda pickle, _: pickle._extend(pickle._pop_mark()),
    "ADDITEMS": lambda pickle, _: pickle._extend(pickle._pop_mark()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Pickle._put),
    **dict.fromkeys(
        ("GET", "BINGET", "LONG_BINGET"),
        lambda pickle, number: pickle._push(pickle._memo[number]),
    ),
}


# --------------------------------------------------------------------------------------------------
# The two formats


class _Storages:
    """The storages that a pickle describes.

    Args:
      read: function that returns the bytes of a storage.

    Attributes:
      by_key: key → storage.
    """

    def __init__(self, read: Callable[[_Storage], bytes | memoryview]):
        self._read = read
        self.by_key: dict[str, _Storage] = {}

    def part(self, described: Any) -> _Part:
        """Returns the elements that a persistent ID refers to.

        Args:
          described: "storage", class, key, device, number of elements; in old files also None or the
            key, start and size of a part.
        """
        if not isinstance(described, tuple) or described[:1] != ("storage",):
            raise Refused(f"it contains a whole model, which is code: {_SAVE_THE_STATE}")
        if len(described) < 5:
            raise ValueError(f"its pickle describes a storage by {len(described)} values, not 5")
        _, kind, key, _, size, *parts = described
        dtype = _STORAGES.get((kind.module, kind.name)) if isinstance(kind, _Global) else None
        if dtype is None or not isinstance(key, str):
            raise ValueError(f"its pickle has a storage {key!r} of no known class")
        _counts((size,), f"storage {key}: the size")
        storage = self.by_key.setdefault(key, _Storage(key, dtype, size, self._read))
        if (storage.dtype, storage.size) != (dtype, size):
            raise ValueError(f"its pickle describes storage {key} in two ways")
        start = 0
        if parts and parts[0] is not None:
            _, start, size = parts[0]
        start, stop = _counts((start, start + size), f"storage {key}: the part")
        if not start <= stop <= storage.size:
            raise ValueError(f"a part of storage {key} exceeds its {storage.size} elements")
        return _Part(storage, start, stop)


def _check_byte_order(little_endian: bool) -> None:
    if not little_endian:
        raise Refused("it was saved on a big-endian machine: load it and save it on another")


def _read_zip(content: bytes) -> Any:
    archive = zipfile.ZipFile(io.BytesIO(content))
    tops = [found[1] for found in map(_DATA_PKL.fullmatch, archive.namelist()) if found]
    if len(tops) != 1:
        raise ValueError(f"it is a zip archive with {len(tops)} files data.pkl")
    names, top = set(archive.namelist()), tops[0]
    if f"{top}constants.pkl" in names:
        raise Refused(f"it is a TorchScript program: {_SAVE_THE_STATE}")
    _check_byte_order(
        f"{top}byteorder" not in names or _entry(archive, f"{top}byteorder") == b"little"
    )

    def read(storage: _Storage) -> bytes:
        found = _entry(archive, f"{top}data/{storage.key}")
        if len(found) != storage.num_bytes:
            raise ValueError(_other_size(storage, len(found)))
        return found

    return _Pickle(_Storages(read)).load(io.BytesIO(_entry(archive, f"{top}data.pkl")))


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        entry = archive.getinfo(name)
    except KeyError:
        raise ValueError(f"its entry {name} is missing") from None
    # PyTorch compresses nothing, so no entry is larger than the file.
    if entry.compress_type != zipfile.ZIP_STORED:
        raise Refused(f"its entry {name} is compressed: unpack it and zip it without compression")
    return archive.read(name)


def _other_size(storage: _Storage, found: int) -> str:
    return f"storage {storage.key} has {found} bytes, but should have {storage.num_bytes}"


def _read_old(content: bytes) -> Any:
    file, found = io.BytesIO(content), dict[str, memoryview]()
    storages = _Storages(lambda storage: found[storage.key])
    _Pickle().load(file)  # The magic number.
    version, machine = _Pickle().load(file), _Pickle().load(file)
    if version != _VERSION:
        raise Refused(f"its format has version {version!r}, not {_VERSION}: {_SAVE_THE_STATE}")
    if not isinstance(machine, dict):
        raise ValueError("it does not state the byte order of its numbers")
    _check_byte_order(machine.get("little_endian") is True)
    result, keys = _Pickle(storages).load(file), _Pickle().load(file)
    if not isinstance(keys, list) or sorted(keys) != sorted(storages.by_key):
        raise ValueError("its list of storages does not match its tensors")
    rest = memoryview(content)[file.tell() :]
    for storage in (storages.by_key[key] for key in keys):
        end = 8 + storage.num_bytes
        if len(rest) < end:
            raise EOFError(f"{_other_size(storage, max(len(rest) - 8, 0))}: copy it again")
        if (length := int.from_bytes(rest[:8], "little")) != storage.size:
            raise ValueError(_other_size(storage, length * storage.dtype.itemsize))
        found[storage.key], rest = rest[8:end], rest[end:]
    return result
