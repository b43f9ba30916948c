"""TensorFlow Datasets, converted to records or read directly in training. Needs no network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from efficientnet_ns.config import Config, ConfigError
from efficientnet_ns.config.ingest import MakeConfig
from efficientnet_ns.data import image_conversion, tasks
from efficientnet_ns.files import shard_names, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.ingest import data_source, survey, tfds_source
from efficientnet_ns.loop import modes
from efficientnet_ns.resolve.resolved_config import ResolvedConfig
from efficientnet_ns.training import train

NAMES = ["left", "right", "up"]


def pixels(split: str, index: int) -> np.ndarray:
    rng = np.random.default_rng([len(split), index])
    return rng.integers(0, 256, [8, 8, 3], np.uint8)


class _Set(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.0")
    COUNTS = {"train": 12, "test": 5}
    IMAGE = tfds.features.Image(shape=(8, 8, 3), encoding_format="png")
    SUPERVISED = ("picture", "direction")

    def _info(self):
        features = {"picture": self.IMAGE, "direction": tfds.features.ClassLabel(names=NAMES)}
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict({**features, "id": tfds.features.Text()}),
            supervised_keys=self.SUPERVISED,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.COUNTS}

    def _generate_examples(self, split):
        for i in range(self.COUNTS[split]):
            yield i, {"picture": pixels(split, i), "direction": self.label(split, i), "id": str(i)}

    def label(self, split: str, index: int) -> int:
        return index % 3


class TinyArrows(_Set):
    """A training and a test set."""


class TinyTensors(_Set):
    """Raw pixels in three splits; the test split has no true labels."""

    COUNTS = {"train": 6, "validation": 3, "test": 4}
    IMAGE = tfds.features.Tensor(shape=(8, 8, 3), dtype=np.uint8)
    SUPERVISED = None

    def label(self, split: str, index: int) -> int:
        return -1 if split == "test" else index % 3


class TinyText(_Set):
    """Has no images."""

    IMAGE = tfds.features.Tensor(shape=(8, 8, 3), dtype=np.float32)
    SUPERVISED = None

    def _split_generators(self, dl_manager):
        return {
            "train": [(0, {"picture": np.zeros([8, 8, 3], np.float32), "direction": 0, "id": ""})]
        }


class TinyByHand(_Set):
    """Requires a manual download."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "Get arrows.zip from example.org."

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(dl_manager.manual_dir / "absent")}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("tfds"))
    for builder in (TinyArrows, TinyTensors, TinyText):
        builder(data_dir=folder).download_and_prepare()
    return folder


def run(source: str, output: Path, data_dir: str, **values) -> dict[str, int]:
    settings = {"tfds_data_dir": data_dir, "num_workers": 1, **values}
    return data_source.make_records(MakeConfig(source=source, output_dir=str(output), **settings))


def contents(folder: Path, prefix: str) -> set[tuple[int, bytes]]:
    return {
        (tfexamples.label(record.payload), tfexamples.image_bytes(record.payload))
        for path in shard_names.list_shards(str(folder), prefix)
        for record in tfrecords.read(path)
    }


def stored(data_dir: str, name: str, split: str) -> set[tuple[int, bytes]]:
    """Reads a split with TFDS itself, without decoding its images."""
    skip = {"picture": tfds.decode.SkipDecoding()}
    data = tfds.load(name, split=split, data_dir=data_dir, decoders=skip)
    return {(int(e["direction"]), e["picture"]) for e in tfds.as_numpy(data)}


def test_survey_of_a_set(data_dir, monkeypatch):
    load = tfds_source.load_builder
    monkeypatch.setattr(tfds_source, "load_builder", lambda name, _: load(name, data_dir))
    found = survey.survey("tfds:tiny_arrows:train[:9]", labeled=True)
    assert (found.images, found.opened, found.median_side) == (9, 9, 8)
    assert sum((found.classes or {}).values()) == 9
    assert survey.survey("tfds:tiny_arrows:test", labeled=False).classes is None


def test_a_whole_set(tmp_path, data_dir):
    assert run("tfds:tiny_arrows", tmp_path, data_dir, num_shards=2) == {"train": 12, "test": 5}
    for split in ("train", "test"):
        assert contents(tmp_path, split) == stored(data_dir, "tiny_arrows", split)
    task = tasks.get_task(str(tmp_path / "task.json"))
    expected = tasks.Task(
        num_classes=3,
        image_size=8,
        small_image=True,
        eval_set="test",
        num_train_images=12,
        class_names=tuple(NAMES),
    )
    assert task == expected


def test_pixels_that_are_not_encoded_become_png(tmp_path, data_dir):
    assert run("tfds:tiny_tensors", tmp_path, data_dir) == {"train": 6, "validation": 3}
    expected = {(i % 3, image_conversion.png(pixels("train", i))) for i in range(6)}
    assert contents(tmp_path, "train") == expected
    task = tasks.get_task(str(tmp_path / "task.json"))
    assert (task.eval_set, task.test_set) == ("validation", None)


def test_one_split_and_parts_of_it(tmp_path, data_dir):
    name = "tfds:tiny_arrows:1.2.0:train[50%:]"
    assert run(name, tmp_path / "a", data_dir, image_set="dev") == {"dev": 6}
    assert contents(tmp_path / "a", "dev") == stored(data_dir, "tiny_arrows", "train[50%:]")
    made = run("tfds:tiny_arrows:test", tmp_path / "b", data_dir, labeled=False)
    assert made == {"extra": 5}
    unlabeled = {(-1, image) for _, image in stored(data_dir, "tiny_arrows", "test")}
    assert contents(tmp_path / "b", "extra") == unlabeled


def test_a_stratified_part_for_validation(tmp_path, data_dir):
    made = run("tfds:tiny_arrows", tmp_path, data_dir, validation_fraction=0.25)
    assert made == {"train": 9, "validation": 3, "test": 5}
    assert sorted(label for label, _ in contents(tmp_path, "validation")) == [0, 1, 2]
    task = tasks.get_task(str(tmp_path / "task.json"))
    assert (task.eval_set, task.test_set) == ("validation", "test")


def test_what_a_set_is_known_for():
    builder = tfds.builder("svhn_cropped", data_dir="unused")
    fields = tfds_source.task_fields(builder)
    task, svhn = tasks.Task(num_classes=10, **fields), tasks.TASKS["svhn"]
    for name in ("mean", "std", "flip", "image_size", "small_image"):
        assert getattr(task, name) == getattr(svhn, name)
    assert tfds_source._keys(builder, "") == ("image", "label")
    imagenet = tfds.builder("imagenet2012", data_dir="unused")
    assert tfds_source.task_fields(imagenet)["image_size"] is None
    # Sorted WordNet IDs, like the labels of the ImageNet task.
    names = imagenet.info.features["label"].names
    assert len(names) == 1000 and names == sorted(names)


def settings(tmp_path: Path, data_dir: str, **values) -> Config:
    defaults = {
        "data_source": "tfds:tiny_arrows",
        "data_cache_dir": str(tmp_path / "cache"),
        "tfds_data_dir": data_dir,
        "model_name": "efficientnet-test",
        "model_dir": str(tmp_path / "model"),
        "train_batch_size": 4,
        "train_steps": 2,
        "iterations_per_loop": 1,
        "eval_batch_size": 4,
    }
    return Config().override(**{**defaults, **values})


@pytest.mark.slow
def test_training_straight_from_a_set(tmp_path, data_dir):
    config = settings(tmp_path, data_dir)
    metrics = modes.run("train_and_eval", config)
    assert metrics["step"] == 2 and metrics["eval/examples"] == 5
    folder = tmp_path / "cache/tiny_arrows/1.2.0"
    assert contents(folder, "train") == stored(data_dir, "tiny_arrows", "train")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert modes.run("eval", config)["test"]["top1"] == metrics["eval/top1"]
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    # Passing the folder of the records continues the same training.
    named = config.override(
        data_source="", label_data_dir=str(folder), task_name=str(folder / "task.json")
    )
    assert train.train_and_evaluate(named)["step"] == 2
    identity = json.loads((tmp_path / "model/config.json").read_text())
    assert identity["label_data_dir"] == str(folder)


def test_the_cache_is_in_the_tfds_folder_unless_told(tmp_path, data_dir):
    config = data_source.with_records(settings(tmp_path, data_dir, data_cache_dir=""))
    assert config.data.label_data_dir == f"{data_dir}/efficientnet_ns/tiny_arrows/1.2.0"
    assert config.data.data_source == ""
    assert data_source.with_records(config) is config
    resolved = ResolvedConfig.from_config(config)
    assert (resolved.num_classes, resolved.image_size, resolved.small_image) == (3, 8, True)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"label_data_dir": "somewhere"}, "remove --label_data_dir and --task_name"),
        ({"task_name": "svhn"}, "remove --label_data_dir and --task_name"),
        ({"data_source": "photos.zip"}, "must be tfds:<name>; .*make_records.py"),
        ({"data_source": "tfds:tiny_arrows:train"}, "remove the split"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, data_dir, values, message):
    with pytest.raises(ConfigError, match=message):
        data_source.with_records(settings(tmp_path, data_dir, **values))


@pytest.mark.parametrize(
    "source, message",
    [
        ("tfds:", "not of the form"),
        ("tfds:no_such_set_anywhere", "has no such set.*--tfds_data_dir"),
        ("tfds:tiny_arrows:valid", "no such split; it has test, train"),
        ("tfds:tiny_text", "not an image classification set: expected one uint8 image"),
    ],
)
def test_sets_that_cannot_be_used(tmp_path, data_dir, source, message):
    with pytest.raises(DataError, match=message):
        run(source, tmp_path, data_dir)


def test_a_set_that_must_be_fetched_by_hand(tmp_path):
    with pytest.raises(DataError) as e:
        run("tfds:tiny_by_hand", tmp_path / "out", str(tmp_path))
    for part in ("tiny_by_hand", f"{tmp_path}/downloads/manual", "arrows.zip from example.org"):
        assert part in str(e.value)
    assert not (tmp_path / "out").exists()


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    def fail(self, **unused):
        raise OSError("no route to host\nmore of it")

    monkeypatch.setattr(TinyArrows, "download_and_prepare", fail)
    with pytest.raises(DataError) as e:
        run("tfds:tiny_arrows", tmp_path / "out", str(tmp_path))
    for part in ("(no route to host)", "tfds build tiny_arrows", f"{tmp_path}/tiny_arrows "):
        assert part in str(e.value)


def test_a_label_out_of_range_is_named(tmp_path, data_dir):
    with pytest.raises(DataError, match=r"tiny_tensors-test.*#. has label -1"):
        run("tfds:tiny_tensors:test", tmp_path, data_dir)


def test_one_file_tells_whether_a_set_is_unlabeled(data_dir, monkeypatch):
    scanned, spans = [], tfrecords.spans
    monkeypatch.setattr(tfrecords, "spans", lambda path: (scanned.append(path), spans(path))[1])
    builder = tfds.builder("tiny_tensors", data_dir=data_dir)
    for split, unlabeled in (("test+train", True), ("train+test", False)):
        scanned.clear()
        assert tfds_source.Tfds(builder, split).is_unlabeled() == unlabeled
        assert len(scanned) == 1
    assert len(tfds_source.Tfds(builder, "train+test").entries()) == 10


def test_a_limit(tmp_path, data_dir):
    assert run("tfds:tiny_arrows:train", tmp_path, data_dir, limit=5) == {"train": 5}
    some = contents(tmp_path, "train")
    assert len(some) == 5 and some < stored(data_dir, "tiny_arrows", "train")


@pytest.mark.slow
def test_any_number_of_processes_writes_the_same_bytes(tmp_path, data_dir):
    """Worker processes find the set in its folder, without the class that built it."""
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        run("tfds:tiny_arrows", folder, data_dir, num_workers=workers, num_shards=3)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("t*")} for n in "12")
    assert one == two and "train-00002-of-00003" in one
