"""Writes what `torch.save` writes, in both of its formats, without PyTorch."""

from __future__ import annotations

import collections
import io
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
}


class Named:
    """A name in a module that need not exist here."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def __call__(self, *_: Any) -> None:
        raise AssertionError("only pickled")


class Called:
    """Pickled as the call `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Storage:
    """A flat array; `part` is (key, start, size) of the part that serves as a tensor's storage."""

    def __init__(self, array: np.ndarray, key: str, **described: Any):
        self.array, self.key = array, key
        self.kind = Named("torch", f"{KINDS[array.dtype.name]}Storage")
        self.described = {"size": array.size, "part": None, **described}


class Tensor:
    """A view of a storage, with offset and strides in elements."""

    def __init__(self, storage: Storage, offset: Any, shape: Any, strides: Any):
        self.arguments = storage, offset, shape, strides, False, collections.OrderedDict()

    def __reduce__(self):
        return Named("torch._utils", "_rebuild_tensor_v2"), self.arguments


def tensor(array: np.ndarray, key: str) -> Tensor:
    """Returns a contiguous tensor with its own storage."""
    strides = [step // array.itemsize for step in np.zeros(array.shape, array.dtype).strides]
    return Tensor(Storage(array.ravel(), key), 0, array.shape, tuple(strides))


def state_dict(arrays: dict[str, np.ndarray], prefix: str = "") -> dict[str, Tensor]:
    """Mimics `state_dict()` of a module, with the versions of its parts as an attribute."""
    state = collections.OrderedDict(
        (prefix + name, tensor(np.asarray(array), f"{prefix}{number}"))
        for number, (name, array) in enumerate(arrays.items())
    )
    state._metadata = collections.OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return state


class _Pickler(pickle._Pickler):  # type: ignore[name-defined]
    def __init__(self, file: io.BytesIO, protocol: int, old: bool):
        super().__init__(file, protocol)
        self.old, self.storages = old, dict[str, Storage]()

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Storage):
            return None
        self.storages.setdefault(obj.key, obj)
        described = ("storage", obj.kind, obj.key, "cpu", obj.described["size"])
        return (*described, obj.described["part"]) if self.old else described

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if not isinstance(obj, Named):
            super().save(obj, save_persistent_id)
        elif self.proto >= 4:
            self.save(obj.module)
            self.save(obj.name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())


def pickled(obj: Any, protocol: int = 2, old: bool = False) -> tuple[bytes, dict[str, Storage]]:
    """Returns the pickle of an object, and the storages of its tensors by key."""
    file = io.BytesIO()
    pickler = _Pickler(file, protocol, old)
    pickler.dump(obj)
    return file.getvalue(), pickler.storages


def new_file(
    obj: Any, protocol: int = 2, *, content: bytes | None = None, **entries: bytes
) -> bytes:
    """Returns a file in the format of PyTorch 1.6 and later.

    Args:
      content: a pickle to write in place of the object's.
      entries: further archive entries by name.
    """
    found, storages = pickled(obj, protocol)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", found if content is None else content)
        for name, value in {
            "byteorder": sys.byteorder.encode(),
            "version": b"3",
            **entries,
        }.items():
            archive.writestr(f"archive/{name}", value)
        for key, storage in storages.items():
            archive.writestr(f"archive/data/{key}", storage.array.tobytes())
    return file.getvalue()


def old_file(
    obj: Any,
    protocol: int = 2,
    *,
    content: bytes | None = None,
    magic: Any = 0x1950A86A20F9469CFC6C,
    version: Any = 1001,
    little_endian: Any = True,
    keys: Any = None,
) -> bytes:
    """Returns a file in the format before PyTorch 1.6; for the keywords, see `new_file`."""
    found, storages = pickled(obj, protocol, old=True)
    machine = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {"int": 4}}
    parts = [pickle.dumps(one, protocol) for one in (magic, version, machine)]
    parts += [
        found if content is None else content,
        pickled(sorted(storages) if keys is None else keys)[0],
    ]
    for key in sorted(storages):
        array = storages[key].array
        parts += [array.size.to_bytes(8, "little"), array.tobytes()]
    return b"".join(parts)


WRITERS = {"new": new_file, "old": old_file}


def save(path: Path, obj: Any, kind: str = "new", **kwargs: Any) -> Path:
    """Writes an object in one of the `WRITERS`' formats."""
    path.write_bytes(WRITERS[kind](obj, **kwargs))
    return path
