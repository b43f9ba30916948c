"""Datasets: the content and order of batches, resuming, and records that are left out.

Run as a program with a folder of records, it prints digests of the first training batches.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.config import Config
from efficientnet_ns.data import augment, images, pipeline, randaugment
from efficientnet_ns.files import tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.models import complexity, efficientnet
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

ROOT = Path(__file__).parents[2]
COUNT, SHARDS = 23, 3  # The label of a record is its number, so that streams can be followed.
BATCH = 5
SIZE = 16
PLAIN = pipeline.Preprocessing(SIZE)
NOISED = pipeline.Preprocessing(SIZE, augmentation=pipeline.RandAugment(1, 9))
SMALL = pipeline.Preprocessing(SIZE, small_image=True, flip=False)
SMALL_NOISED = pipeline.Preprocessing(
    SIZE, small_image=True, flip=False, augmentation=pipeline.RandAugment(1, 9)
)
CLEAN = pipeline.Preprocessing(SIZE, augmentation=pipeline.RandAugment(2, 27), clean=True)


@functools.cache
def pictures() -> tuple[bytes, ...]:
    """Returns PNGs and JPEGs of several sizes; even-numbered ones are SIZE pixels wide and high."""
    rng = np.random.default_rng(5)
    encoded = []
    for i in range(COUNT):
        shape = (SIZE, SIZE) if i % 2 == 0 else (18 + i, 40 - i)
        pixels = rng.integers(0, 256, (*shape, 3), np.uint8)
        encode = tf.io.encode_png if i % 3 else tf.io.encode_jpeg
        encoded.append(encode(pixels).numpy())
    return tuple(encoded)


def pseudo_probs() -> np.ndarray:
    """Returns probabilities whose most probable classes are not the stored labels."""
    return np.random.default_rng(6).random((COUNT, COUNT), np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`labeled`: labeled records; `pseudo`: pseudo-labeled records of the same pictures."""
    base = tmp_path_factory.mktemp("records")
    labeled = [tfexamples.labeled_example(picture, i) for i, picture in enumerate(pictures())]
    pseudo = [
        tfexamples.pseudo_labeled_example(picture, probs, i)
        for i, (picture, probs) in enumerate(zip(pictures(), pseudo_probs()))
    ]
    tfrecords.write_sharded(str(base / "labeled"), "train", labeled, SHARDS)
    tfrecords.write_sharded(str(base / "pseudo"), "train-0", pseudo, SHARDS)
    return base


@pytest.fixture(scope="module")
def labeled(folder) -> pipeline.Source:
    return pipeline.Source.find(str(folder / "labeled"), "train")


@pytest.fixture(scope="module")
def pseudo(folder) -> pipeline.Source:
    return pipeline.Source.find(str(folder / "pseudo"), ("train", "extra"))


def labeled_batches(source, preprocessing=PLAIN, **changes) -> tf.data.Dataset:
    arguments = {"num_classes": COUNT, "batch_size": BATCH, "seed": 0, **changes}
    return pipeline.labeled_batches(source, preprocessing, **arguments)


def unlabeled_batches(source, preprocessing=PLAIN, **changes) -> tf.data.Dataset:
    arguments = {"num_classes": COUNT, "batch_size": BATCH, "seed": 0, **changes}
    return pipeline.unlabeled_batches(source, preprocessing, **arguments)


def noised_stream(source, **changes) -> tf.data.Dataset:
    return pipeline.join(labeled_batches(source, NOISED, shuffle_buffer=7, **changes))


@pytest.fixture(scope="module")
def noised(labeled) -> list[dict[str, np.ndarray]]:
    """The first training batches with RandAugment, shared because building the graph is slow."""
    return take(noised_stream(labeled), 8)


def take(data: tf.data.Dataset, count: int) -> list[dict[str, np.ndarray]]:
    return list(data.take(count).as_numpy_iterator())


def assert_same(one: list[dict], other: list[dict]) -> None:
    """Asserts that both are equal bit for bit."""
    assert len(one) == len(other) > 0
    for a, b in zip(one, other):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def order(source, count: int, **changes) -> list[int]:
    """Returns the numbers of the first records of a stream."""
    data = labeled_batches(source, CHEAP, batch_size=1, **changes)
    return [int(batch["label"][0]) for batch in take(data, count)]


# The cheapest preprocessing, for tests of the order.
CHEAP = pipeline.Preprocessing(8, small_image=True, clean=True)


def write_shard(folder: Path, payloads: list[bytes]) -> pipeline.Source:
    """Writes one shard, without counts.json."""
    folder.mkdir(exist_ok=True)
    tfrecords.write(str(folder / "train-00000-of-00001"), payloads)
    return pipeline.Source.find(str(folder), "train")


# What is in a batch.


@pytest.mark.parametrize(
    "preprocessing, dtype",
    [(PLAIN, tf.float32), (SMALL, tf.uint8), (CLEAN, tf.float32)],
    ids=["plain", "small", "clean"],
)
def test_labeled_batches(labeled, preprocessing, dtype):
    data = labeled_batches(labeled, preprocessing)
    assert data.element_spec == {
        "image": tf.TensorSpec([BATCH, SIZE, SIZE, 3], dtype),
        "label": tf.TensorSpec([BATCH], tf.int32),
    }
    (batch,) = take(data, 1)
    assert batch["image"].shape == (BATCH, SIZE, SIZE, 3)
    assert batch["image"].std() > 10, "pixels are on the 0..255 scale"
    assert len(set(batch["label"])) == BATCH


def test_noised_batches(noised):
    for batch in noised:
        assert batch["image"].shape == (BATCH, SIZE, SIZE, 3) and batch["image"].dtype == np.uint8
        assert batch["label"].shape == (BATCH,) and batch["label"].dtype == np.int32


def test_unlabeled_batches(pseudo):
    data = unlabeled_batches(pseudo, SMALL, batch_size=7)
    assert data.element_spec == {
        "unl_image": tf.TensorSpec([7, SIZE, SIZE, 3], tf.uint8),
        "unl_label": tf.TensorSpec([7], tf.int32),
        "unl_probs": tf.TensorSpec([7, COUNT], tf.float32),
    }


def test_stored_labels_and_probabilities_come_through_unchanged(pseudo):
    batches = take(unlabeled_batches(pseudo), 2 * COUNT // BATCH)
    labels = np.concatenate([batch["unl_label"] for batch in batches])
    probs = np.concatenate([batch["unl_probs"] for batch in batches])
    assert len(set(labels)) == COUNT
    np.testing.assert_array_equal(probs, pseudo_probs()[labels])


def test_images_belong_to_their_labels(labeled, pseudo):
    """Compares the evaluation crop, of which every record has only one."""
    expected = np.stack([PLAIN.evaluate(tf.constant(picture)) for picture in pictures()])
    (batch,) = take(labeled_batches(labeled, CLEAN, batch_size=COUNT), 1)
    np.testing.assert_array_equal(batch["image"], expected[batch["label"]])
    (batch,) = take(unlabeled_batches(pseudo, CLEAN, batch_size=COUNT), 1)
    np.testing.assert_array_equal(batch["unl_image"], expected[batch["unl_label"]])


def test_images_for_a_teacher_are_the_clean_crop(pseudo):
    teacher = pipeline.Preprocessing(24, augmentation=pipeline.RandAugment(2, 27))
    data = unlabeled_batches(pseudo, SMALL, teacher_preprocessing=teacher)
    assert data.element_spec == {
        "unl_image": tf.TensorSpec([BATCH, SIZE, SIZE, 3], tf.uint8),
        "teacher_image": tf.TensorSpec([BATCH, 24, 24, 3], tf.float32),
    }
    stored = take(unlabeled_batches(pseudo, SMALL), 2)
    for batch, same in zip(take(data, 2), stored):
        # The student sees the same images in both cases.
        np.testing.assert_array_equal(batch["unl_image"], same["unl_image"])
        for image, label in zip(batch["teacher_image"], same["unl_label"]):
            np.testing.assert_array_equal(image, images.eval_image(pictures()[label], 24))


def test_weak_images_are_drawn_apart_from_the_augmented_ones(pseudo):
    """Strong images are those of training with a teacher; weak images are cropped independently."""
    weak = dataclasses.replace(NOISED, augmentation=None)
    (batch,) = take(unlabeled_batches(pseudo, NOISED, weak_preprocessing=weak), 1)
    (strong,) = take(unlabeled_batches(pseudo, NOISED), 1)
    (unaugmented,) = take(unlabeled_batches(pseudo, weak), 1)
    assert set(batch) == {"unl_image", "weak_image"}
    np.testing.assert_array_equal(batch["unl_image"], strong["unl_image"])
    assert batch["weak_image"].shape == unaugmented["unl_image"].shape
    assert np.any(batch["weak_image"] != unaugmented["unl_image"])


def test_a_teacher_needs_no_stored_labels(tmp_path):
    source = write_shard(tmp_path, [tfexamples.unlabeled_example(p) for p in pictures()])
    (batch,) = take(unlabeled_batches(source, CLEAN, teacher_preprocessing=CLEAN), 1)
    np.testing.assert_array_equal(batch["unl_image"], batch["teacher_image"])
    with pytest.raises(tf.errors.InvalidArgumentError, match="label|probabilities"):
        take(unlabeled_batches(source), 1)


def resolved(folder: Path, **changes) -> ResolvedConfig:
    task = folder / "task.json"
    task.write_text(json.dumps({"num_classes": COUNT, "image_size": SIZE}))
    settings = {"task_name": str(task), "model_name": "efficientnet-test", **changes}
    return ResolvedConfig.from_config(Config().override(**settings))


@pytest.mark.parametrize("ratio, unlabeled_size", [(0.3, 2), (1.0, 4), (3.5, 14)])
def test_sizes_of_joint_batches(folder, labeled, pseudo, ratio, unlabeled_size):
    run = resolved(folder, train_batch_size=4, unlabel_ratio=ratio, remove_aug=True)
    data = run.training_batches(labeled, pseudo, 0)
    assert {k: spec.shape.as_list() for k, spec in data.element_spec.items()} == {
        "image": [4, SIZE, SIZE, 3],
        "label": [4],
        "unl_image": [unlabeled_size, SIZE, SIZE, 3],
        "unl_label": [unlabeled_size],
        "unl_probs": [unlabeled_size, COUNT],
    }


def test_joint_batches_are_the_two_streams_side_by_side(folder, labeled, pseudo):
    changes = {"small_image_model": True, "seed": 3, "shuffle_buffer": 9, "unl_aug": "clean"}
    run = resolved(folder, train_batch_size=4, unlabel_ratio=2.0, **changes)
    found = take(run.training_batches(labeled, pseudo, 2), 3)
    changes = {"seed": 3, "shuffle_buffer": 9, "start_step": 2}
    for stream, source, size, preprocessing in (
        (labeled_batches, labeled, 4, run.preprocessing()),
        (unlabeled_batches, pseudo, 8, run.preprocessing("clean")),
    ):
        alone = take(stream(source, batch_size=size, preprocessing=preprocessing, **changes), 3)
        assert_same([{k: batch[k] for k in alone[0]} for batch in found], alone)


def test_teacher_on_the_fly_sees_its_own_size(folder, labeled, pseudo):
    changes = {"teacher_model_name": "efficientnet-test", "unlabel_ratio": 1.0}
    resolution = efficientnet.get_variant("efficientnet-test").resolution
    for given, size in ((SIZE + 4, SIZE + 4), (None, resolution)):
        run = resolved(folder, train_batch_size=4, teacher_image_size=given, **changes)
        batches = run.training_batches(labeled, pseudo, 0).element_spec
        assert batches["teacher_image"].shape.as_list() == [4, size, size, 3]
        assert batches["unl_image"].shape.as_list() == [4, SIZE, SIZE, 3]
        with tf.Graph().as_default():
            teacher = run.build_teacher()
        complexity.restore_classes(teacher)
        assert teacher.input_shape == (None, size, size, 3)


def test_settings_of_both_streams(folder):
    """Checks the augmentation of each stream."""
    settings = {"randaug_mag": 5, "randaug_layer": 3, "randaug_mode": "clipped", "cutout_op": False}
    noise = pipeline.RandAugment(3, 5, "clipped", use_cutout=False)
    for augment_name, unl_aug, expected in (
        ("v1", "default", [noise, noise]),
        ("randaugment", "none", [noise, None]),
        (None, "randaugment", [None, noise]),
        (None, "default", [None, None]),
    ):
        run = resolved(folder, augment_name=augment_name, unl_aug=unl_aug, **settings)
        found = [run.labeled_preprocessing, run.unlabeled_preprocessing]
        assert found == [pipeline.Preprocessing(SIZE, augmentation=e) for e in expected]
    run = resolved(folder, augment_name="v1", unl_aug="clean", **settings)
    assert run.labeled_preprocessing == pipeline.Preprocessing(SIZE, augmentation=noise)
    assert run.unlabeled_preprocessing == pipeline.Preprocessing(SIZE, clean=True)
    run = resolved(folder, augment_name="v1", remove_aug=True, small_image_model=True)
    assert run.preprocessing().clean and run.preprocessing().small_image


def test_joint_batches_without_unlabeled_images(folder, labeled):
    data = resolved(folder, train_batch_size=4).training_batches(labeled, None, 0)
    assert set(data.element_spec) == {"image", "label"}


# Order.


@pytest.mark.parametrize("buffer", [1, 7, 10000])
def test_every_epoch_has_every_record_once(labeled, buffer):
    stream = order(labeled, 3 * COUNT, shuffle_buffer=buffer)
    epochs = [tuple(stream[i * COUNT : (i + 1) * COUNT]) for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(COUNT))
    if buffer > 1:
        assert len(set(epochs)) == 3


def test_order_depends_on_the_seed_alone(tmp_path, labeled):
    """The seed determines the order of records within a shard and the order of shards."""
    payloads = [tfexamples.labeled_example(pictures()[0], i) for i in range(COUNT)]
    for source, buffer in ((write_shard(tmp_path, payloads), COUNT), (labeled, 1)):
        orders = [order(source, COUNT, seed=seed, shuffle_buffer=buffer) for seed in (0, 1, 2, 0)]
        assert orders[0] == orders[3]
        assert len({tuple(o) for o in orders}) == 3


def test_labeled_and_unlabeled_streams_draw_independently(labeled, pseudo):
    (one,) = take(labeled_batches(labeled, CHEAP, batch_size=COUNT), 1)
    (other,) = take(unlabeled_batches(pseudo, CHEAP, batch_size=COUNT), 1)
    assert list(one["label"]) != list(other["unl_label"])


def test_a_picture_is_noised_differently_each_time_and_by_each_stream(tmp_path):
    probs = np.ones(COUNT, np.float32)
    picture = pictures()[1]
    one = write_shard(tmp_path / "labeled", [tfexamples.labeled_example(picture, 0)])
    other = write_shard(
        tmp_path / "pseudo", [tfexamples.pseudo_labeled_example(picture, probs, 0)] * 2
    )
    (batch,) = take(labeled_batches(one, batch_size=8), 1)
    (unlabeled,) = take(unlabeled_batches(other, batch_size=8), 1)
    (seeded,) = take(labeled_batches(one, batch_size=8, seed=1), 1)
    seen = [*batch["image"], *unlabeled["unl_image"], *seeded["image"]]
    assert len({image.tobytes() for image in seen}) == 24


# Continuing.


def test_a_noised_stream_started_later_is_the_tail_of_the_whole(labeled, noised):
    """Batch 4, records 20 to 24, spans the first and the second epoch."""
    tail = take(noised_stream(labeled, start_step=4), 4)
    assert_same(tail, noised[4:])
    labels = np.concatenate([batch["label"] for batch in noised])
    assert sorted(labels[:COUNT]) == list(range(COUNT))
    assert len(set(labels[COUNT:])) == len(noised) * BATCH - COUNT


@pytest.mark.parametrize("step", [3, 5])
def test_a_stream_started_later_is_the_tail_of_the_whole(labeled, step):
    whole = take(labeled_batches(labeled, SMALL, shuffle_buffer=7), 11)
    tail = labeled_batches(labeled, SMALL, shuffle_buffer=7, start_step=step)
    assert_same(take(tail, 11 - step), whole[step:])


def test_an_unlabeled_stream_started_later_is_the_tail_of_the_whole(pseudo):
    whole = take(unlabeled_batches(pseudo, SMALL, batch_size=9), 7)
    for step in (2, 5):
        tail = take(unlabeled_batches(pseudo, SMALL, batch_size=9, start_step=step), 7 - step)
        assert_same(tail, whole[step:])


# Preprocessing.


def test_small_images_are_shifted_by_reflection():
    picture = pictures()[2]
    pixels = images.decode(picture).numpy()
    reach = SIZE // 8
    padded = np.pad(pixels, [(reach, reach), (reach, reach), (0, 0)], mode="reflect")
    shifts = {
        padded[y : y + SIZE, x : x + SIZE].tobytes(): (y, x)
        for y in range(2 * reach + 1)
        for x in range(2 * reach + 1)
    }
    seen = {shifts[SMALL.train(picture, tf.constant([0, i])).numpy().tobytes()] for i in range(40)}
    assert len(seen) > 12
    flipping = pipeline.Preprocessing(SIZE, small_image=True, flip=True)
    outcomes = [flipping.train(picture, tf.constant([0, i])).numpy() for i in range(40)]
    mirrored = [image.tobytes() not in shifts for image in outcomes]
    assert 5 < sum(mirrored) < 35
    assert all(
        image[:, ::-1].tobytes() in shifts for image in itertools.compress(outcomes, mirrored)
    )


@pytest.mark.parametrize("small", [False, True])
def test_order_and_constants_of_the_noise(small):
    """They are the original's: 40 and 100 pixels at any size, and SVHN's own values at 32."""
    policy = pipeline.RandAugment(3, 11, "clipped", use_cutout=False)
    preprocessing = pipeline.Preprocessing(32, small, flip=False, augmentation=policy)
    settings = {"num_layers": 3, "magnitude": 11, "mode": "clipped", "use_cutout": False}
    picture = tf.constant(pictures()[0])
    for number in range(3):
        seed = tf.constant([number, 1])
        crop, _, noise, cutout = images.split_seed(seed, 4)
        if small:
            image = images.to_uint8(images.small_eval_image(picture, 32))
            settings |= {"cutout_const": 4, "translate_const": 4}
            image = randaugment.rand_augment(image, noise, **settings)
            image = augment.cutout(image, cutout, 8)
            expected = images.reflect_pad_crop(image, crop, pad=4)
        else:
            image = images.to_uint8(images.train_image(picture, 32, crop, flip=False))
            settings |= {"cutout_const": 40, "translate_const": 100}
            expected = randaugment.rand_augment(image, noise, **settings)
        np.testing.assert_array_equal(preprocessing.train(picture, seed), expected)


@pytest.mark.parametrize("small", [False, True])
def test_clean_training_sees_evaluation_crops(small):
    noise = pipeline.RandAugment(2, 27)
    clean = pipeline.Preprocessing(SIZE, small, augmentation=noise, clean=True)
    for picture in pictures()[:4]:
        expected = clean.evaluate(picture)
        for seed in range(3):
            np.testing.assert_array_equal(clean.train(picture, tf.constant([seed, 0])), expected)


def test_every_draw_follows_the_seed():
    picture = pictures()[3]
    for preprocessing in (PLAIN, SMALL_NOISED):
        train = tf.function(preprocessing.train)
        once, again, other = (
            train(tf.constant(picture), tf.constant(seed)).numpy()
            for seed in ([4, 5], [4, 5], [4, 6])
        )
        np.testing.assert_array_equal(once, again)
        assert not np.array_equal(once, other)


# Evaluation.


@pytest.mark.parametrize("size", [BATCH - 1, BATCH, BATCH + 1, 1, 2 * BATCH])
def test_evaluation_sees_every_record_once_in_order(tmp_path, size):
    payloads = [tfexamples.labeled_example(p, i) for i, p in enumerate(pictures()[:size])]
    paths = tfrecords.write_sharded(str(tmp_path), "dev", payloads, 2)
    source = pipeline.Source(tuple(paths), tuple(tfrecords.count_all(paths)))
    data = pipeline.eval_batches(source, PLAIN, num_classes=COUNT, batch_size=BATCH)
    assert data.element_spec == {
        "image": tf.TensorSpec([BATCH, SIZE, SIZE, 3], tf.float32),
        "label": tf.TensorSpec([BATCH], tf.int32),
        "index": tf.TensorSpec([BATCH], tf.int32),
        "mask": tf.TensorSpec([BATCH], tf.float32),
    }
    batches = list(data.as_numpy_iterator())
    assert len(batches) == -(-size // BATCH)
    joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    expected = [*range(0, size, 2), *range(1, size, 2)]
    padding = len(batches) * BATCH - size
    np.testing.assert_array_equal(joined["mask"], [1.0] * size + [0.0] * padding)
    np.testing.assert_array_equal(joined["label"], expected + [0] * padding)
    np.testing.assert_array_equal(joined["index"], [*range(size)] + [0] * padding)
    for image, number in zip(joined["image"], expected):
        np.testing.assert_array_equal(image, images.eval_image(pictures()[number], SIZE))
    assert not joined["image"][size:].any()


def test_small_images_are_evaluated_as_they_are(labeled):
    data = pipeline.eval_batches(labeled, SMALL, num_classes=COUNT, batch_size=COUNT)
    (batch,) = data.as_numpy_iterator()
    for image, label in zip(batch["image"], batch["label"]):
        pixels = images.decode(pictures()[label])
        if label % 2 == 0:
            np.testing.assert_array_equal(image, pixels)
        else:
            assert pixels.shape != image.shape and 0 <= image.min() < image.max() <= 255


# Sources.


def test_source(folder):
    source = pipeline.Source.find(f"{folder}/labeled;{folder}/pseudo", "train")
    assert source.total == 2 * COUNT
    assert source.counts == (8, 8, 7) * 2
    assert [Path(path).parent.name for path in source.paths] == ["labeled"] * 3 + ["pseudo"] * 3


def test_source_without_records(tmp_path):
    tfrecords.write_sharded(str(tmp_path), "train", [], 2)
    with pytest.raises(DataError, match="2 shards .* no records") as e:
        pipeline.Source.find(str(tmp_path), "train")
    assert str(tmp_path) in str(e.value)


def test_empty_shards_are_passed_over(tmp_path):
    tfrecords.write_sharded(
        str(tmp_path),
        "train",
        [tfexamples.labeled_example(p, i) for i, p in enumerate(pictures()[:2])],
        4,
    )
    source = pipeline.Source.find(str(tmp_path), "train")
    assert source.counts == (1, 1, 0, 0)
    stream = order(source, 6)
    assert all({*stream[i : i + 2]} == {0, 1} for i in (0, 2, 4))
    data = pipeline.eval_batches(source, CHEAP, num_classes=2, batch_size=4)
    assert [batch["mask"].sum() for batch in data.as_numpy_iterator()] == [2]


def test_the_tail_of_a_truncated_shard_is_left_out(tmp_path):
    payloads = [tfexamples.labeled_example(p, i) for i, p in enumerate(pictures())]
    write_shard(tmp_path, payloads)
    path = tmp_path / "train-00000-of-00001"
    path.write_bytes(path.read_bytes()[:-7])
    source = pipeline.Source.find(str(tmp_path), "train", max_bad_fraction=0.9)
    assert source.total == COUNT - 1
    for shuffle_buffer in (4, 100):
        stream = order(source, 2 * source.total, shuffle_buffer=shuffle_buffer)
        assert sorted(stream) == sorted([*range(COUNT - 1)] * 2)
    data = pipeline.eval_batches(source, CHEAP, num_classes=COUNT, batch_size=4)
    assert sum(batch["mask"].sum() for batch in data.as_numpy_iterator()) == COUNT - 1


# Records that cannot be used.


def spoiled(tmp_path: Path, payload: bytes) -> pipeline.Source:
    """Writes two shards of good records, except for the third record of the second shard."""
    good = [tfexamples.labeled_example(p, i) for i, p in enumerate(pictures()[:4])]
    tfrecords.write(str(tmp_path / "train-00000-of-00002"), good)
    tfrecords.write(str(tmp_path / "train-00001-of-00002"), [*good[:2], payload, *good[2:]])
    return pipeline.Source.find(str(tmp_path), "train")


@pytest.mark.parametrize("label", [COUNT, -1])
def test_label_out_of_range(tmp_path, label):
    source = spoiled(tmp_path, tfexamples.labeled_example(pictures()[0], label))
    evaluation = pipeline.eval_batches(source, CHEAP, num_classes=COUNT, batch_size=3)
    for data in (labeled_batches(source, CHEAP), evaluation):
        with pytest.raises(tf.errors.InvalidArgumentError) as e:
            take(data, 3)
        assert f"out of range 0..{COUNT - 1}" in str(e.value) and f"[{label}]" in str(e.value)
    place = pipeline.name_bad_record(source, lambda p: pipeline.check_trainable(p, COUNT))
    assert place.startswith(f"{tmp_path}/train-00001-of-00002, record 2: ")
    assert f"label {label} " in place and f"0..{COUNT - 1}" in place
    assert pipeline.name_bad_record(source, pipeline.check_image) is None


@pytest.mark.parametrize("label", [COUNT, -1])
def test_pseudo_label_out_of_range(tmp_path, label):
    probs = np.zeros(COUNT + 1, np.float32)
    example = tf.train.Example.FromString(
        tfexamples.pseudo_labeled_example(pictures()[0], probs[:COUNT], 0)
    )
    example.features.feature["label"].int64_list.value[0] = label
    source = write_shard(tmp_path, [example.SerializeToString()])
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"\[{label}\]"):
        take(unlabeled_batches(source, CHEAP, batch_size=1), 1)


@pytest.mark.parametrize(
    "payload",
    [
        tfexamples.labeled_example(b"not a picture", 0),
        tfexamples.labeled_example(b"", 0),
        tfexamples.labeled_example(b"\x89PNG\r\n\x1a\n" + bytes(20), 0),
        tfexamples.prediction_examples(np.array([[0.5, 0.5]], np.float32))[0],
        b"not an example",
    ],
    ids=["text", "nothing", "broken PNG", "no image", "no example"],
)
def test_unusable_image_is_named(tmp_path, payload):
    source = spoiled(tmp_path, payload)
    with pytest.raises(tf.errors.InvalidArgumentError):
        take(labeled_batches(source, CHEAP), 2)
    place = pipeline.name_bad_record(source, lambda p: pipeline.check_trainable(p, COUNT))
    assert place.startswith(f"{tmp_path}/train-00001-of-00002, record 2: ")
    assert len(place.splitlines()) == 1
    assert pipeline.name_bad_record(source, pipeline.check_image) == place


def test_damaged_record_is_named(tmp_path):
    source = spoiled(tmp_path, tfexamples.labeled_example(pictures()[0], 1))
    path = tmp_path / "train-00001-of-00002"
    clean = path.read_bytes()
    place = clean.rindex(pictures()[0]) + 30
    path.write_bytes(clean[:place] + bytes([clean[place] ^ 1]) + clean[place + 1 :])
    with pytest.raises(tf.errors.DataLossError):
        take(labeled_batches(source, CHEAP), 2)
    place = pipeline.name_bad_record(source, lambda p: pipeline.check_trainable(p, COUNT))
    assert place.startswith(f"{path}, record 2: damaged payload")


def test_a_truncated_tail_is_not_blamed(tmp_path):
    """A truncated tail is skipped, so the error is elsewhere."""
    spoiled(tmp_path, tfexamples.labeled_example(pictures()[0], 99))
    path = tmp_path / "train-00000-of-00002"
    path.write_bytes(path.read_bytes()[:-3])
    source = pipeline.Source.find(str(tmp_path), "train", max_bad_fraction=0.9)
    place = pipeline.name_bad_record(source, lambda p: pipeline.check_trainable(p, COUNT))
    assert place.startswith(f"{tmp_path}/train-00001-of-00002, record 2: label 99")


def test_good_records_are_not_named(labeled, pseudo):
    for source in (labeled, pseudo):
        check = pipeline.name_bad_record(source, lambda p: pipeline.check_trainable(p, COUNT))
        assert check is None


def test_first_shards_and_first_records(labeled):
    assert labeled.shards(2).counts == labeled.counts[:2]
    part = labeled.examples(labeled.counts[0] + 1)
    assert part.counts[:2] == (labeled.counts[0], 1) and not any(part.counts[2:])
    for ask in (lambda: labeled.shards(SHARDS + 1), lambda: labeled.examples(COUNT + 1)):
        with pytest.raises(DataError, match="are requested"):
            ask()
