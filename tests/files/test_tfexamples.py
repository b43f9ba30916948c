"""Record files at the level of bytes against `records`, which reads and writes them plainly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.files import tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError


def scanned(path: str) -> list[tfrecords.Record]:
    with tfrecords.Scanner(path) as scanner:
        return list(iter(scanner.take, None))


@pytest.fixture(params=[tfrecords._BLOCK, 50, 1])
def block(request, monkeypatch) -> int:
    """Blocks that hold everything, a few records, and less than a header."""
    monkeypatch.setattr(tfrecords, "_BLOCK", request.param)
    return request.param


@pytest.fixture
def file(tmp_path, rng) -> str:
    """Records of 0 to 60 bytes."""
    path = str(tmp_path / "records")
    tfrecords.write(path, [rng.bytes(size) for size in (0, 5, 60, 1, 30, 30, 0, 12)])
    return path


def test_takes_what_is_read(file, block):
    assert scanned(file) == list(tfrecords.read(file))


def test_skips_to_every_record(file, block):
    every = list(tfrecords.read(file))
    for first in range(len(every) + 3):
        with tfrecords.Scanner(file) as scanner:
            assert scanner.skip(first) == min(first, len(every))
            assert list(iter(scanner.take, None)) == every[first:]
            assert scanner.position == len(every)
            assert scanner.skip() == 0 and scanner.take() is None


def test_alternates(file, block):
    every = list(tfrecords.read(file))
    with tfrecords.Scanner(file) as scanner:
        taken = []
        while (record := scanner.take()) is not None:
            taken.append(record)
            scanner.skip(1)
    assert taken == every[::2]


def test_mutated_files_are_read_alike(file, block, tmp_path, rng):
    """Flipped bytes and cuts anywhere: the same records, problems and positions."""
    content = Path(file).read_bytes()
    path = str(tmp_path / "mutated")
    for number in range(300):
        mutated = bytearray(content)
        if number % 3:
            mutated[rng.integers(len(mutated))] ^= int(rng.integers(1, 256))
        if number % 2:
            del mutated[rng.integers(len(mutated)) :]
        Path(path).write_bytes(mutated)
        expected = list(tfrecords.read(path))
        assert scanned(path) == expected
        with tfrecords.Scanner(path) as scanner:
            assert scanner.skip() == scanner.position == len(expected)


def test_frames_are_what_tensorflow_writes(tmp_path, rng):
    payloads = [rng.bytes(size) for size in (0, 1, 100, 70000)]
    tfrecords.write(str(tmp_path / "a"), payloads)
    assert b"".join(map(tfrecords.frame, payloads)) == (tmp_path / "a").read_bytes()


def unpacked(probabilities: list[float]) -> bytes:
    """A prediction whose floats are written one by one, which the format allows."""
    values = b"".join(b"\x0d" + np.float32(p).tobytes() for p in probabilities)
    feature = b"\x12" + bytes([len(values)]) + values
    key = b"probabilities"
    entry = b"\n" + bytes([len(key)]) + key + b"\x12" + bytes([len(feature)]) + feature
    body = b"\n" + bytes([len(entry)]) + entry
    return b"\n" + bytes([len(body)]) + body


@pytest.mark.parametrize(("size", "classes"), [(0, 1), (3, 2), (127, 10), (128, 40), (70000, 1000)])
def test_pseudo_labeled_examples_are_the_same_bytes(size, classes, rng):
    image, probs = rng.bytes(size), rng.random(classes).astype(np.float32)
    feature = tfexamples.feature(tfexamples.unlabeled_example(image), tfexamples.IMAGE)
    floats = tfexamples.Floats(
        tfexamples.feature(tfexamples.prediction_example(probs), tfexamples.PROBABILITIES)
    )
    assert tfexamples.bytes_value(feature) == image
    assert [floats[i] for i in range(len(floats))] == probs.tolist()
    for label in {0, 1, 127, 128, 300, classes - 1} & set(range(classes)):
        made = tfexamples.pseudo_labeled_from_features(
            feature, floats.feature, label, floats[label]
        )
        plain = tfexamples.pseudo_labeled_example(image, probs, label)
        assert tf.train.Example.FromString(made) == tf.train.Example.FromString(plain)
        assert len(made) == len(plain)


def test_floats_that_were_written_one_by_one():
    prediction = unpacked([0.25, 0.75])
    assert tfexamples.probabilities(prediction).tolist() == [0.25, 0.75]
    floats = tfexamples.Floats(tfexamples.feature(prediction, tfexamples.PROBABILITIES))
    assert [floats[0], floats[1], len(floats)] == [0.25, 0.75, 2]


def test_absent_feature_and_no_example():
    assert tfexamples.feature(tfexamples.unlabeled_example(b"x"), tfexamples.PROBABILITIES) == b""
    assert len(tfexamples.Floats(b"")) == 0
    with pytest.raises(DataError, match=r"not a tf\.train\.Example"):
        tfexamples.feature(b"\xff\xff\xff", tfexamples.IMAGE)
