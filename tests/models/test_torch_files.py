"""`torch.save` files without PyTorch: values, refusals, and reports of damage."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pathlib
import pickle
import sys
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf
import torch_saver
from torch_saver import Called, Named, Storage, Tensor, new_file, old_file

from efficientnet_ns.models import torch_files

BOTH = pytest.mark.parametrize("write", [new_file, old_file])
BFLOAT16 = tf.bfloat16.as_numpy_dtype
VALUES = {
    "double": np.array([[0.1, -2.5], [np.inf, np.nan]]),
    "float": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "half": np.array([0.1, 65504, 6e-8], np.float16),
    "bfloat16": np.array([0.1, 3e38], BFLOAT16),
    "long": np.array(2**62, np.int64),
    "int": np.array([-(2**31)], np.int32),
    "short": np.array([-(2**15)], np.int16),
    "char": np.array([-128], np.int8),
    "byte": np.array([255], np.uint8),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
}


def arrays(content: bytes) -> dict[str, np.ndarray]:
    return {name: value.array() for name, value in torch_files.read(content).items()}


@BOTH
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_type(write, protocol):
    found = arrays(write(torch_saver.state_dict(VALUES), protocol))
    assert list(found) == list(VALUES)
    for name, value in VALUES.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@BOTH
def test_views(write):
    """Covers transposed, strided, repeated and shared views of one storage."""
    base = np.arange(24, dtype=np.float32)
    storage = Storage(base, "0")
    state = {
        "whole": Tensor(storage, 0, (24,), (1,)),
        "transposed": Tensor(storage, 0, (4, 6), (1, 4)),
        "nhwc": Tensor(storage, 0, (2, 3, 2, 2), (12, 1, 6, 3)),
        "every second": Tensor(storage, 1, (12,), (2,)),
        "repeated": Tensor(storage, 4, (3, 4), (0, 1)),
        "last": Tensor(storage, 23, (), ()),
        "none": Tensor(storage, 24, (0,), (1,)),
    }
    found = arrays(write(state))
    expected = {
        "whole": base,
        "transposed": base.reshape(6, 4).T,
        "nhwc": base.reshape(2, 2, 2, 3).transpose(0, 3, 1, 2),
        "every second": base[1::2],
        "repeated": np.stack([base[4:8]] * 3),
        "last": base[23],
        "none": base[:0],
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert np.shares_memory(found["whole"], found["transposed"])
    assert not found["whole"].flags.writeable


def test_storage_that_is_part_of_another():
    base = np.arange(10, dtype=np.float32)
    part = Storage(base, "0", part=("1", 4, 3))
    content = old_file({"a": Tensor(part, 1, (2,), (1,)), "b": Tensor(part, 1, (3,), (1,))})
    state = torch_files.read(content)
    np.testing.assert_array_equal(state["a"].array(), [5, 6])
    with pytest.raises(ValueError, match="exceeds its storage 0 of 3 elements"):
        state["b"].array()


@BOTH
def test_parameters_and_what_a_script_keeps(write):
    one = torch_saver.tensor(np.ones(2, np.float32), "0")
    kept = {
        "args": argparse.Namespace(
            lr=0.1, path=pathlib.PurePosixPath("a"), inner=argparse.Namespace()
        ),
        "metric": np.float64(0.5),
        "seen": {1, 2},
        "counts": collections.defaultdict(list, {"a": [1]}),
        "device": Called(Named("torch", "device"), "cuda", 0),
        "dtype": Named("torch", "float32"),
        "optimizer": {"state": {0: {"step": 3, "square": one}}, "groups": [{"betas": (0.9, 0.99)}]},
    }
    parameter = Called(Named("torch._utils", "_rebuild_parameter"), one, True, {})
    state = torch_files.read(write({**kept, "state_dict": {"weight": parameter, "same": one}}))
    np.testing.assert_array_equal(state["state_dict"]["weight"].array(), [1, 1])
    assert state["state_dict"]["same"] is state["optimizer"]["state"][0]["square"]
    assert state["optimizer"]["groups"] == [{"betas": (0.9, 0.99)}]
    for name in ("args", "metric", "seen", "counts", "device"):
        assert isinstance(state[name], torch_files.Opaque), name


# --------------------------------------------------------------------------------------------------
# Files that would run code

HARM = "mkdir {}"
# Maps malicious content to what the refusal names. If executed, each would create a folder.
MALICIOUS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "REDUCE": (lambda c: b"\x80\x02cos\nsystem\nX" + c + b"\x85R.", "os.system"),
    "posix": (lambda c: b"\x80\x02cposix\nsystem\nX" + c + b"\x85R.", "posix.system"),
    "eval": (lambda c: b"\x80\x02cbuiltins\neval\nX" + c + b"\x85R.", "builtins.eval"),
    "exec of Python 2": (lambda c: b"c__builtin__\nexec\nX" + c + b"\x85R.", "__builtin__.exec"),
    "getattr": (lambda c: b"cbuiltins\ngetattr\ncos\nX" + c + b"\x86R.", "builtins.getattr"),
    "STACK_GLOBAL": (
        lambda c: b"\x80\x04\x8c\x02os\x8c\x06system\x93X" + c + b"\x85R.",
        "os.system",
    ),
    "dotted": (
        lambda c: b"\x80\x04\x8c\x0bcollections\x8c\x0f_sys.modules.os\x93X" + c + b"\x85R.",
        "collections._sys.modules.os",
    ),
    "no text": (lambda c: b"\x80\x04K\x01\x8c\x06system\x93X" + c + b"\x85R.", "1.system"),
    "INST": (lambda c: b"(X" + c + b"ios\nsystem\n.", "INST for os.system"),
    "OBJ": (lambda c: b"(cos\nsystem\nX" + c + b"o.", "os.system"),
    "OBJ of a known name": (lambda c: b"(ctorch\nSize\nX" + c + b"o.", "OBJ"),
    "NEWOBJ": (lambda c: b"\x80\x02csubprocess\nPopen\nX" + c + b"\x85\x81.", "subprocess.Popen"),
    "NEWOBJ_EX": (lambda c: b"\x80\x04ctorch\nSize\nX" + c + b"\x85}\x92.", "NEWOBJ_EX"),
    "EXT1": (lambda c: b"\x80\x02\x82\x01X" + c + b"\x85R.", "EXT1"),
    "PERSID": (lambda c: b"Pos.system\n.", "PERSID"),
    "loads": (lambda c: b"\x80\x02c_pickle\nloads\nX" + c + b"\x85R.", "_pickle.loads"),
    "hub": (lambda c: b"\x80\x02ctorch.hub\nload\nX" + c + b"\x85R.", "torch.hub.load"),
    "other of torch._utils": (
        lambda c: b"\x80\x02ctorch._utils\n_import_dotted_name\nX" + c + b"\x85R.",
        "torch._utils._import_dotted_name",
    ),
    "BUILD with a setter": (
        lambda c: b"\x80\x02cargparse\nNamespace\n)\x81}X\x0c\0\0\0__setstate__cos\nsystem\nsb.",
        "os.system",
    ),
}


def binunicode(text: str) -> bytes:
    return len(text).to_bytes(4, "little") + text.encode()


@pytest.fixture
def harmless(tmp_path):
    """Fails if the folder exists afterwards."""
    folder = tmp_path / "harm"
    yield HARM.format(folder)
    assert not folder.exists()


@BOTH
@pytest.mark.parametrize("case", MALICIOUS)
def test_what_would_run_code(write, case, harmless):
    make, named = MALICIOUS[case]
    modules = set(sys.modules)
    with pytest.raises(torch_files.Refused) as error:
        torch_files.read(write({}, content=make(binunicode(harmless))))
    assert named in str(error.value) and "torch.save(model.state_dict(), path)" in str(error.value)
    assert set(sys.modules) == modules


class Malicious:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def _metadata(state: dict, harm: Malicious) -> dict:
    state = collections.OrderedDict(state)
    state._metadata = {"": harm}  # type: ignore[attr-defined]
    return state


NESTED: dict[str, Callable[[Malicious], object]] = {
    "beside the weights": lambda harm: {"state_dict": {}, "optimizer": [{"a": (1, [harm])}]},
    "in the arguments": lambda harm: {"args": argparse.Namespace(lr=harm)},
    "in the metadata": lambda harm: _metadata({}, harm),
    "as a value": lambda harm: {"_conv_stem.weight": harm},
    "as a shape": lambda harm: {"a": Tensor(Storage(np.ones(1), "0"), 0, harm, (1,))},
    "as a storage": lambda harm: {"a": Tensor(harm, 0, (1,), (1,))},
    "as the size of a storage": lambda harm: {
        "a": Tensor(Storage(np.ones(1), "0", size=harm), 0, (1,), (1,))
    },
    "in a set": lambda harm: {"a": Called(Named("builtins", "set"), [harm])},
    "dropped": lambda harm: [harm, {}],
}


@BOTH
@pytest.mark.parametrize("case", NESTED)
def test_what_would_run_code_deep_inside(write, case, harmless):
    content = write(NESTED[case](Malicious(harmless)))
    with pytest.raises(torch_files.Refused, match=r"it names (posix|nt)\.system"):
        torch_files.read(content)


@pytest.mark.parametrize("place", ["version", "little_endian", "keys"])
def test_what_would_run_code_outside_the_state(place, harmless):
    content = old_file({}, **{place: [Malicious(harmless)]})
    with pytest.raises(torch_files.Refused, match=r"it names (posix|nt)\.system"):
        torch_files.read(content)


@BOTH
@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\0\0\0aK\x01sb.",  # attributes of a function
        b"\x80\x02X\x01\0\0\0a)R.",  # calls a string
        b"\x80\x02ctorch\nSize\nK\x01R.",  # arguments that are not a tuple
        b"\x80\x02)K\x01a.",  # appends to a tuple
        b"\x80\x02K\x01K\x02K\x03s.",  # sets items of a number
        b"\x80\x02R.",
        b"\x80\x020.",
        b"\x80\x02t.",
        b"\x80\x02h\x05.",
        b"\x80\x02(X\x07\0\0\0storageK\x01tQ.",
        b"\x80\x02ctorch\nSize\n(K\x01K\x02tR.",  # too many arguments
        b"\x80\x02}X\xff\xff\xff\xffa",  # a string of 4 GB
        b"\x80\x02\x8b\xff\xff\xff\x7f.",  # a number of 2 GB
        b"\x80\x02}]K\x01s.",  # a list as a key
        b"\x80\x02}" + b")" + b"2\x86" * 200 + b"K\x01s.",  # a key with 2^200 leaves
        b"\xff",
        b"",
    ],
)
def test_damaged_pickles(write, content):
    with pytest.raises(ValueError):
        torch_files.read(write({}, content=content))


# --------------------------------------------------------------------------------------------------
# Damaged files

ONES = np.ones(4, np.float32)


def one(*arguments, **described) -> dict[str, Tensor]:
    return {"a": Tensor(Storage(ONES, "0", **described), *arguments)}


@BOTH
@pytest.mark.parametrize(
    "arguments, told",
    [
        ((1, (4,), (1,)), "exceeds its storage 0 of 4 elements"),
        ((0, (2, 3), (2, 1)), "exceeds its storage"),
        ((0, (2**40, 2**40), (2**40, 1)), "exceeds its storage"),
        ((2**80, (1,), (1,)), "exceeds its storage"),
        ((0, (2,), (-1,)), "the strides of a tensor does not consist of"),
        ((-1, (2,), (1,)), "the offset of a tensor"),
        ((0, (-1,), (1,)), "the shape of a tensor"),
        ((0, (2, 2), (1,)), "has strides"),
        ((0, [4], (1,)), "the shape of a tensor"),
        ((0.0, (4,), (1,)), "the offset of a tensor"),
        ((0, (True,), (1,)), "the shape of a tensor"),
    ],
)
def test_views_that_cannot_be(write, arguments, told):
    with pytest.raises(ValueError, match=told):
        arrays(write(one(*arguments)))


@BOTH
def test_huge_views_take_no_memory(write):
    assert arrays(write(one(0, (2**30, 2**20), (0, 0))))["a"].shape == (2**30, 2**20)
    with pytest.raises(ValueError):
        arrays(write(one(0, (2**62, 2**62), (0, 0))))
    with pytest.raises(ValueError):
        arrays(write(one(0, (1,) * 100, (0,) * 100)))


@BOTH
@pytest.mark.parametrize("size", [5, 3, 2**62, -1, "4", None])
def test_storages_of_another_size(write, size):
    with pytest.raises((ValueError, EOFError), match="storage 0"):
        arrays(write(one(0, (1,), (1,), size=size)))


@BOTH
def test_storage_in_two_ways(write):
    state = {**one(0, (1,), (1,)), "b": Tensor(Storage(ONES.astype(int), "0"), 0, (1,), (1,))}
    with pytest.raises(ValueError, match="describes storage 0 in two ways"):
        arrays(write(state))


@BOTH
def test_unknown_storage(write):
    state = one(0, (1,), (1,))
    state["a"].arguments[0].kind = Named("torch", "QInt8Storage")
    with pytest.raises(torch_files.Refused, match=r"torch\.QInt8Storage"):
        torch_files.read(write(state))


@pytest.mark.parametrize("part", [("1", 3, 2), ("1", -1, 2), ("1", 0, -1), ("1", 0, 2**70), (1, 2)])
def test_parts_that_cannot_be(part):
    with pytest.raises(ValueError):
        arrays(old_file(one(0, (1,), (1,), part=part)))


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"version": 1000}, "its format has version 1000, not 1001"),
        ({"little_endian": False}, "a big-endian machine"),
        ({"little_endian": 1}, "a big-endian machine"),
        ({"keys": []}, "list of storages"),
        ({"keys": ["0", "0"]}, "list of storages"),
        ({"keys": ["1"]}, "list of storages"),
        ({"keys": {"0": 1}}, "list of storages"),
        ({"keys": [0]}, "list of storages"),
    ],
)
def test_old_files_that_are_not_right(changed, told):
    with pytest.raises(ValueError, match=told):
        torch_files.read(old_file(one(0, (1,), (1,)), **changed))


def test_magic_number():
    assert not torch_files.is_old(old_file({}, magic=7))
    for protocol in (2, 3, 4, 5):
        assert torch_files.is_old(old_file({}, protocol))


def test_zip_of_another_kind():
    state = one(0, (1,), (1,))
    cases = {
        "big-endian": new_file(state, byteorder=b"big"),
        "a TorchScript program": new_file(state, **{"constants.pkl": b""}),
    }
    for told, content in cases.items():
        with pytest.raises(torch_files.Refused, match=told):
            torch_files.read(content)


def rezipped(content: bytes, keep: Callable[[str], bool], compression: int = 0) -> bytes:
    file = io.BytesIO()
    source = zipfile.ZipFile(io.BytesIO(content))
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name in filter(keep, source.namelist()):
            archive.writestr(name, source.read(name))
    return file.getvalue()


def test_zip_that_is_not_right():
    content = new_file(one(0, (4,), (1,)))
    with pytest.raises(torch_files.Refused, match="is compressed"):
        torch_files.read(rezipped(content, lambda name: True, zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="its entry archive/data/0 is missing"):
        arrays(rezipped(content, lambda name: "data/0" not in name))
    two = new_file({}, **{"../b/data.pkl": b"."}).replace(b"archive/../b", b"archive_dir2")
    with pytest.raises(ValueError, match="2 files data.pkl"):
        torch_files.read(two)
    with pytest.raises(zipfile.BadZipFile, match="CRC"):
        arrays(content.replace(ONES.tobytes(), b"\1" + ONES.tobytes()[1:]))


@BOTH
def test_cut_off_anywhere(write):
    content = write(torch_saver.state_dict({"a": ONES, "b": ONES}))
    for length in range(40, len(content)):
        with pytest.raises((ValueError, EOFError, zipfile.BadZipFile)):
            arrays(content[:length])


@BOTH
def test_changed_anywhere(write, rng):
    """Any changed byte yields values or a read error, without a hang or other harm."""
    content = write({"state_dict": torch_saver.state_dict({"a": ONES, "b": ONES}), "lr": 0.1})
    for position in rng.integers(0, len(content), 400):
        changed = bytearray(content)
        changed[position] ^= int(rng.integers(1, 256))
        try:
            state = torch_files.read(bytes(changed))["state_dict"]
            for value in state.values():
                np.array(value.array())
        except (ValueError, EOFError, LookupError, zipfile.BadZipFile):
            pass
        except (NotImplementedError, RuntimeError):
            pass  # raised by zipfile


def test_no_pickle_of_python_is_read():
    assert not torch_files.is_old(pickle.dumps({"a": 1}))
    assert not torch_files.is_new(["a.npy", "data.pkl", "a/b/data.pkl"])


# --------------------------------------------------------------------------------------------------
# PyTorch itself


@pytest.mark.parametrize("new", [True, False])
def test_same_as_pytorch(tmp_path, new):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32)
    state = {
        "views": base.reshape(2, 3, 4).permute(2, 0, 1),
        "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "part": base[5:9],
        "expanded": base[:1].expand(3, 4),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "empty": torch.zeros(0, 4),
        **{
            str(dtype): torch.ones(3).to(dtype)
            for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool)
        },
        **torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).state_dict(),
    }
    path = tmp_path / "a.pth"
    torch.save(state, path, _use_new_zipfile_serialization=new)
    expected = torch.load(path, weights_only=True)
    found = arrays(path.read_bytes())
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert str(value.dtype) == f"torch.{found[name].dtype.name}"
        assert tuple(found[name].shape) == tuple(value.shape)
        np.testing.assert_array_equal(
            found[name].astype(np.float64), value.detach().to(torch.float64).numpy()
        )
