"""Robustness sets from records, TensorFlow Datasets and videos."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from fakes import flat_frames as flat
from fakes import write_gif, write_mp4
from PIL import Image

from efficientnet_ns.data import tasks
from efficientnet_ns.evaluation import robustness, robustness_clips
from efficientnet_ns.evaluation import robustness_metrics as metrics
from efficientnet_ns.evaluation import robustness_sets as sets
from efficientnet_ns.evaluation import robustness_sources as sources
from efficientnet_ns.files import shard_names, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError

# Three classes of ImageNet-A, numbered differently than in ImageNet.
NAMES = ["n01531178", "n01498041", "n01534433"]
NUMBERS = [11, 6, 13]


def png(label: int, index: int) -> bytes:
    pixels = np.full([6, 6, 3], (20 * label, index, 7), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels(image: bytes) -> tuple[int, ...]:
    return tuple(int(v) for v in np.asarray(Image.open(io.BytesIO(image)))[0, 0])


class TinyNatural(tfds.core.GeneratorBasedBuilder):
    """One split whose classes are WordNet IDs."""

    VERSION = tfds.core.Version("1.0.0")
    SPLITS = ("test",)
    CLASSES = NAMES

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=self.CLASSES),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples() for split in self.SPLITS}

    def _generate_examples(self):
        for i in range(9):
            yield i, {"image": io.BytesIO(png(i % 3, i)), "label": i % 3}


class TinyTwoSplits(TinyNatural):
    """A set of two splits."""

    SPLITS = ("test", "other")


class TinyBirds(TinyNatural):
    """Classes that are not in ImageNet."""

    CLASSES = ["crow", "owl", "tit"]


class TinyMatched(TinyNatural):
    """A configuration name with a hyphen, like those of imagenet_v2."""

    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="matched-frequency")]


class TinyCorrupted(TinyNatural):
    """Configurations like those of imagenet2012_corrupted."""

    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=f"{name}_{severity}")
        for name in ("fog", "snow")
        for severity in range(1, 6)
    ]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("tfds"))
    for builder in (TinyNatural, TinyTwoSplits, TinyBirds, TinyMatched):
        builder(data_dir=folder).download_and_prepare()
    for config in TinyCorrupted.BUILDER_CONFIGS:
        TinyCorrupted(config=config, data_dir=folder).download_and_prepare()
    return folder


def seen(images: sets.Images) -> set[tuple[int, tuple[int, ...]]]:
    """Returns (class, color) of each image."""
    contents = (image for _, image in images.read("test"))
    return {(entry.label, pixels(image)) for entry, image in zip(images.entries, contents)}


EXPECTED = {(NUMBERS[i % 3], (20 * (i % 3), i, 7)) for i in range(9)}


def test_tfds_by_the_names_of_its_classes(data_dir):
    classes = sets.classes_of("imagenet-a")
    images = sources.open_images("tfds:tiny_natural", classes, data_dir, allow_missing=True)
    assert seen(images) == EXPECTED and images.classes == [6, 11, 13]
    matched = sources.open_images("tfds:tiny_matched/matched-frequency", classes, data_dir, True)
    assert seen(matched) == EXPECTED
    half = sources.open_images("tfds:tiny_natural:test[:4]", classes, data_dir, True)
    assert len(half.entries) == 4
    message = "tfds:tiny_natural: 197 of 200 classes are missing .*: n01558993, n01580077"
    with pytest.raises(DataError, match=message):
        sources.open_images("tfds:tiny_natural", classes, data_dir)
    others = {name: number for name, number in classes.items() if number != 11}
    with pytest.raises(DataError, match="1 classes that are not in this set: n01531178"):
        sources.open_images("tfds:tiny_natural", others, data_dir, True)


@pytest.mark.parametrize(
    "place, message",
    [
        ("tfds:tiny_two_splits", r"choose one of its splits, tfds:tiny_two_splits:<other\|test>"),
        ("tfds:tiny_birds", "class 'crow' is not the WordNet id"),
        ("tfds:tiny_natural:train", "no such split; it has test"),
    ],
)
def test_tfds_sets_that_do_not_fit(data_dir, place, message):
    with pytest.raises(DataError, match=message):
        sources.open_images(place, sets.classes_of(), data_dir, allow_missing=True)


def classify(images):
    """Predicts the class selected by the image's green value, with probability 0.9."""
    probs = np.full([len(images), 1000], 1e-4, np.float32)
    for row, image in zip(probs, images):
        row[NUMBERS[pixels(image)[1] % 4 % 3]] = 0.9
    return probs, {}


def test_corruptions_of_tfds(data_dir, tmp_path):
    evaluation = robustness.Evaluation(classify, 4, str(tmp_path), {})
    images = sources.open_corruptions("tfds:tiny_corrupted", data_dir, allow_missing=True)
    assert list(images) == [(name, s) for name in ("snow", "fog") for s in "12345"]
    result = evaluation.corruptions(images)
    wrong = [i % 4 % 3 != i % 3 for i in range(9)]
    assert result["errors"] == pytest.approx(dict.fromkeys(["snow", "fog"], sum(wrong) / 9))
    assert result["ce"]["fog"] == pytest.approx(sum(wrong) / 9 / 0.819324)
    with pytest.raises(DataError, match="tfds:tiny_corrupted: 13 missing parts"):
        sources.open_corruptions("tfds:tiny_corrupted", data_dir)


def test_one_corruption_of_tfds(data_dir):
    place = "tfds:tiny_corrupted/fog_3"
    assert sources.single_corruption(place) == "fog/3"
    assert sources.single_corruption("tfds:imagenet2012_corrupted/jpeg_compression_5:validation")
    for other in ("tfds:tiny_corrupted", "c/fog_3", ""):
        assert sources.single_corruption(other) is None
    images = sources.open_images(place, sets.classes_of(), data_dir, allow_missing=True)
    assert seen(images) == EXPECTED


def test_names_of_the_configurations_of_the_real_set():
    """imagenet2012_corrupted has exactly the corruptions and severities known here."""
    from tensorflow_datasets.image_classification import imagenet2012_corrupted

    configs = imagenet2012_corrupted.Imagenet2012Corrupted.BUILDER_CONFIGS
    places = [f"tfds:imagenet2012_corrupted/{config.name}" for config in configs]
    known = {
        f"{n}/{s}" for n in (*metrics.ALEXNET_ERROR, *metrics.ALEXNET_ERROR_EXTRA) for s in "12345"
    }
    assert {sources.single_corruption(place) for place in places} == known
    for name in ("imagenet_a", "imagenet_r", "imagenet_sketch", "imagenet_v2"):
        builder = tfds.builder(name, data_dir="unused")
        assert sets.numbered(builder.info.features["label"].names, name) == list(range(1000))


def write_records(folder, prefix: str, labels) -> None:
    folder.mkdir(exist_ok=True)
    payloads = [tfexamples.labeled_example(png(i % 3, i), labels[i % 3]) for i in range(9)]
    for shard in range(2):
        path = folder / shard_names.shard_name(prefix, shard, 2)
        tfrecords.write(str(path), payloads[shard::2])


def test_records_with_labels_of_imagenet(tmp_path):
    write_records(tmp_path / "v2", "validation", NUMBERS)
    write_records(tmp_path / "v2", "train", [0, 1, 2])
    classes = sets.classes_of("imagenet-v2")
    images = sources.open_images(str(tmp_path / "v2"), classes, allow_missing=True)
    assert seen(images) == EXPECTED
    with pytest.raises(DataError, match="997 of 1000 classes are missing .*: 0, 1, 2"):
        sources.open_images(str(tmp_path / "v2"), classes)


def test_records_of_class_folders(tmp_path):
    """The task file of the records names the classes in the order of the labels."""
    write_records(tmp_path / "a", "train", [0, 1, 2])
    tasks.write_task(str(tmp_path / "a" / "task.json"), num_classes=3, class_names=NAMES)
    images = sources.open_images(str(tmp_path / "a"), sets.classes_of("imagenet-a"), None, True)
    assert seen(images) == EXPECTED
    # The folders of -V2 are numbers, which are sorted as text.
    tasks.write_task(
        str(tmp_path / "a" / "task.json"), num_classes=3, class_names=["11", "6", "13"]
    )
    assert (
        seen(sources.open_images(str(tmp_path / "a"), sets.classes_of("imagenet-v2"), None, True))
        == EXPECTED
    )


def test_records_that_cannot_be_used(tmp_path):
    def opened():
        return sources.open_images(str(tmp_path / "v2"), sets.classes_of(), allow_missing=True)

    write_records(tmp_path / "v2", "validation", [3, 4, 1000])
    with pytest.raises(DataError, match=r"-00000-of-00002#1 has label 1000; expected 0 to 999"):
        opened()
    write_records(tmp_path / "v2", "validation", [3, 4, 5])
    path = tmp_path / "v2" / "validation-00001-of-00002"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"-00001-of-00002#3: truncated"):
        opened()
    path.unlink()
    with pytest.raises(DataError, match="1 of 2 shards are missing"):
        opened()


# ImageNet-P as videos.


def color(image: bytes) -> int:
    """A "model" that recognizes four shades of red."""
    return round(pixels(image)[0] / 60)


def classify_shade(images):
    probs = np.full([len(images), 1000], 1e-4, np.float32)
    for row, image in zip(probs, images):
        row[color(image)] = 0.5
        row[4:9] = np.linspace(0.1, 0.05, 5)
    return probs, {}


@pytest.fixture
def four_classes(monkeypatch):
    names = tasks.wnids()[:4]
    monkeypatch.setattr(tasks, "wnids", lambda name="imagenet": names)
    return names


SHADES = {
    "n01440764": [0, 0, 1, 1, 0],
    "n01443537": [1, 2, 1, 1, 1],
    "n01484850": [2, 2, 2, 2, 2],
    "n01491361": [0, 1, 2, 3, 3],
}


@pytest.mark.parametrize("kind", ["mp4", "gif", "folder"])
def test_flips_of_clips(tmp_path, four_classes, kind):
    if kind == "mp4":
        pytest.importorskip("av")
    for name in ("gaussian_noise", "tilt"):
        for wnid, shades in SHADES.items():
            folder = tmp_path / name / wnid
            folder.mkdir(parents=True)
            # Blue differs, because Pillow merges equal frames.
            frames = flat([(60 * shade, 30, 9 * t) for t, shade in enumerate(shades)])
            if kind == "folder":
                (folder / "clip").mkdir()
                # No leading zeros, like the files of the published set: img9, img10.
                for i, frame in enumerate(frames):
                    Image.fromarray(frame).save(folder / "clip" / f"img{i + 8}.png")
            else:
                write = write_mp4 if kind == "mp4" else write_gif
                write(folder / f"clip.{kind}", frames)
    clips = sources.open_perturbations(str(tmp_path), allow_missing=True)
    result = robustness.Evaluation(classify_shade, 3, str(tmp_path / "parts"), {}).perturbations(
        clips
    )
    for name, first in (("gaussian_noise", True), ("tilt", False)):
        changed = [
            row[t] != row[0 if first else t - 1] for row in SHADES.values() for t in range(1, 5)
        ]
        assert result["flips"][name] == pytest.approx(sum(changed) / 16)
        # The best class leaves the top five and all others keep their rank: a distance of five.
        assert result["distances"][name] == pytest.approx(5 * sum(changed) / 16)
    assert result["classes"] == 4 and "mfr" not in result


def test_clips_of_unequal_length_are_named(tmp_path, four_classes):
    for wnid, count in zip(four_classes, (3, 3, 2, 3)):
        (tmp_path / wnid).mkdir()
        write_gif(tmp_path / wnid / "a.gif", flat([(50 * i, 0, 0) for i in range(count)]))
    clips = robustness_clips.clips(str(tmp_path), sets.classes_of())
    with pytest.raises(DataError, match=f"{four_classes[2]}/a.gif has 2 frames, .* 3"):
        list(clips.frames("test"))


def test_videos_need_a_library(tmp_path, four_classes, monkeypatch):
    (tmp_path / four_classes[0]).mkdir()
    (tmp_path / four_classes[0] / "a.mp4").touch()
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"efficientnet-ns\[robustness\]"):
        robustness_clips.clips(str(tmp_path), sets.classes_of())
