"""SVHN's .mat files: the sets, order, names and keys of the 2019 program."""

from __future__ import annotations

import functools
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import tensorflow as tf
from absl import flags

from efficientnet_ns import config as config_lib
from efficientnet_ns.config import Config, ConfigError
from efficientnet_ns.config.ingest import SvhnConfig
from efficientnet_ns.data import pipeline, tasks
from efficientnet_ns.files import shard_names, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.ingest import svhn
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

SIZES = {"train": 23, "test": 9, "extra": 14}


@functools.cache
def digits(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (uint8 [N, 32, 32, 3], labels as in the files, 1..10)."""
    rng = np.random.default_rng(sorted(SIZES).index(name))
    images = rng.integers(0, 256, [SIZES[name], 32, 32, 3], np.uint8)
    return images, rng.permutation(np.arange(SIZES[name]) % 10 + 1)


def write_raw(folder: Path, **changed) -> Path:
    folder.mkdir(exist_ok=True)
    for name in SIZES:
        images, labels = digits(name)
        content = {"X": images.transpose(1, 2, 3, 0), "y": labels[:, None], **changed}
        scipy.io.savemat(folder / f"{name}_32x32.mat", content, do_compression=True)
    return folder


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    return write_raw(tmp_path_factory.mktemp("svhn") / "raw")


def run(raw: Path, output: Path, **values) -> dict[str, int]:
    settings = {"dev_size": 5, "num_shards": 3, "num_workers": 1, "image_format": "png", **values}
    return svhn.make_records(SvhnConfig(raw_data_dir=str(raw), output_dir=str(output), **settings))


def contents(folder: Path, prefix: str) -> tuple[np.ndarray, list[int], list[set[str]]]:
    """Returns (pixels, labels as stored, keys) of all records in order, read with TensorFlow."""
    pixels, labels, keys = [], [], []
    for path in shard_names.list_shards(str(folder), prefix):
        for item in tf.data.TFRecordDataset(path):
            feature = tf.train.Example.FromString(item.numpy()).features.feature
            pixels.append(tf.io.decode_image(feature["image/encoded"].bytes_list.value[0]).numpy())
            labels += feature["image/class/label"].int64_list.value
            keys.append(set(feature.keys()))
    return np.stack(pixels), labels, keys


def original_order() -> dict[str, np.ndarray]:
    """Returns the positions in the files, as drawn by NumPy's global generator with seed 0."""
    np.random.seed(0)
    train, extra = np.arange(SIZES["train"]), np.arange(SIZES["extra"])
    np.random.shuffle(train)
    np.random.shuffle(extra)
    return {"train": train[5:], "dev": train[:5], "test": np.arange(SIZES["test"]), "extra": extra}


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sets_are_those_of_the_original(tmp_path, raw, num_workers):
    made = run(raw, tmp_path, num_workers=num_workers)
    assert made == {"train": 18, "dev": 5, "test": 9, "extra": 14}
    for prefix, order in original_order().items():
        folder = tmp_path / "unlabeled" if prefix == "extra" else tmp_path
        pixels, labels, keys = contents(folder, prefix)
        images, truth = digits("train" if prefix == "dev" else prefix)
        np.testing.assert_array_equal(pixels, images[order])
        # Label 10 is the digit 0; labels of records start at 1.
        assert labels == [int(label) % 10 + 1 for label in truth[order]]
        expected = {"image/encoded", "image/class/label"}
        if prefix == "extra":
            expected |= {"probabilities", "label", "prob"}
        assert all(key == expected for key in keys)


def test_placeholders_of_unlabeled_records(tmp_path, raw):
    run(raw, tmp_path)
    path = shard_names.list_shards(str(tmp_path / "unlabeled"), "extra")[0]
    payload = next(tfrecords.read(path)).payload
    feature = tf.train.Example.FromString(payload).features.feature
    assert list(feature["probabilities"].float_list.value) == [0.0] * 10
    assert list(feature["label"].int64_list.value) == [0]
    assert list(feature["prob"].float_list.value) == [0.0]


def test_shards_and_jpeg_of_the_original(tmp_path, raw):
    run(raw, tmp_path, num_shards=None, image_format="jpeg")
    for folder, prefix, shards in (
        (tmp_path, "train", 128),
        (tmp_path, "dev", 64),
        (tmp_path, "test", 64),
        (tmp_path / "unlabeled", "extra", 128),
    ):
        paths = shard_names.list_shards(str(folder), prefix)
        assert len(paths) == shards and paths[-1].endswith(f"{shards - 1:05d}-of-{shards:05d}")
        total = sum(tfrecords.count(path) for path in paths)
        bounds = np.linspace(0, total, shards + 1).astype(int)
        assert [tfrecords.count(path) for path in paths] == np.diff(bounds).tolist()
    images = [
        tfexamples.image_bytes(record.payload)
        for path in shard_names.list_shards(str(tmp_path), "test")
        for record in tfrecords.read(path)
    ]
    encode = functools.partial(tf.io.encode_jpeg, format="rgb", quality=100)
    assert images == [encode(pixels).numpy() for pixels in digits("test")[0]]


def test_full_training_data(tmp_path, raw):
    made = run(raw, tmp_path, full_train_data=True)
    assert made == {"train_full": 23, "dev_full": 9, "test_full": 9, "extra_full": 14}
    task = tasks.get_task(str(tmp_path / "task.json"))
    assert (task.train_set, task.eval_set, task.test_set) == ("train_full", "dev_full", "test_full")
    assert contents(tmp_path, "dev_full")[1] == contents(tmp_path, "test_full")[1]


def test_records_are_those_the_task_trains_on(tmp_path, raw):
    run(raw, tmp_path)
    task = tasks.get_task(str(tmp_path / "task.json"))
    assert task.num_train_images == 18 and task.mean == tasks.TASKS["svhn"].mean
    resolved = ResolvedConfig.from_config(Config().override(task_name=str(tmp_path / "task.json")))
    assert resolved.small_image and resolved.image_size == 32
    source = pipeline.Source.find(str(tmp_path), task.eval_set)
    batch = next(iter(resolved.eval_batches(source)))
    np.testing.assert_array_equal(batch["image"][:5], digits("train")[0][original_order()["dev"]])


def test_started_again_nothing_is_loaded_or_written(tmp_path, raw, monkeypatch):
    run(raw, tmp_path)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("train-*")}
    monkeypatch.setattr(svhn.MatFile, "attach", lambda *_: pytest.fail("pixels were loaded"))
    run(raw, tmp_path)
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.rglob("train-*")}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"y": np.full([9, 1], 11)}, "label 0 of `y` is 11; expected 1..10"),
        ({"y": np.zeros([9, 1])}, "label 0 of `y` is 0.0"),
        ({"X": np.zeros([32, 32, 3, 9], np.float32)}, "`X` is float32"),
        ({"X": np.zeros([32, 32, 3, 8], np.uint8)}, r"not uint8 \(32, 32, 3, "),
    ],
)
def test_files_that_are_not_svhns(tmp_path, changed, message):
    with pytest.raises(DataError, match=message) as e:
        run(write_raw(tmp_path / "raw", **changed), tmp_path / "out")
    assert "_32x32.mat" in str(e.value)


def test_a_broken_file_is_named(tmp_path):
    write_raw(tmp_path / "raw")
    path = tmp_path / "raw" / "extra_32x32.mat"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=f"{path}: cannot read"):
        run(tmp_path / "raw", tmp_path / "out")


def test_a_missing_file_is_downloaded(tmp_path, raw, monkeypatch):
    """Stores the file where the original code does."""
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return open(raw / url.rpartition("/")[2], "rb")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    new = tmp_path / "new"
    run(new, tmp_path / "out")
    assert asked == [f"http://ufldl.stanford.edu/housenumbers/{n}_32x32.mat" for n in SIZES]
    for path in raw.iterdir():
        assert (new / "downloaded_data" / path.name).read_bytes() == path.read_bytes()
    run(new, tmp_path / "out")
    assert len(asked) == 3


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    def urlopen(url, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(DataError) as e:
        run(tmp_path / "new", tmp_path / "out")
    for part in (
        "no route to host",
        "http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
        str(tmp_path / "new" / "train_32x32.mat"),
    ):
        assert part in str(e.value)
    assert not list((tmp_path / "new").rglob("*.mat"))


def test_dev_set_larger_than_the_data(tmp_path, raw):
    with pytest.raises(ConfigError, match="--dev_size=4000 leaves none of 23"):
        run(raw, tmp_path, dev_size=4000)


def test_another_task(tmp_path, raw):
    with pytest.raises(ConfigError, match="--task_name=cifar10"):
        run(raw, tmp_path, task_name="cifar10")


def test_flags_of_the_original():
    values = flags.FlagValues()
    config_lib.define_flags(SvhnConfig, flag_values=values)
    expected = {
        "task_name": ("string", "svhn"),
        "raw_data_dir": ("string", None),
        "output_dir": ("string", ""),
        "full_train_data": ("bool", False),
    }
    assert {n: (values[n].flag_type(), values[n].default) for n in expected} == expected


def test_labels_that_are_no_numbers_are_refused(tmp_path):
    raw = write_raw(tmp_path / "raw", y=np.array([["one"], ["two"]]))
    with pytest.raises(DataError, match="train_32x32.mat: `y` is of type <U3"):
        run(raw, tmp_path / "out")


def test_a_file_where_the_raw_data_folder_should_be(tmp_path):
    raw = tmp_path / "train_32x32.mat"
    raw.write_bytes(b"")
    with pytest.raises(
        ConfigError, match=f"--raw_data_dir={raw} is a file: expected the folder of"
    ):
        run(raw, tmp_path / "out")
