"""Record formats: names, examples against the original's, damage, counts, and writing."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from efficientnet_ns.files import atomic, shard_names, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError

GOLDENS = Path(__file__).parents[1] / "goldens" / "records"
PAYLOADS = [b"first", b"", bytes(range(256)) + b"third", b"the last record"]


def payloads(path) -> list[bytes]:
    """Reads payloads with TensorFlow."""
    return list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())


def golden(name: str) -> list[bytes]:
    found = payloads(GOLDENS / f"{name}.tfrecord")
    assert len(found) == 8
    return found


def content(payload: bytes) -> dict[str, tuple[str, list]]:
    """Maps the keys of an Example to (kind, values)."""
    features = tf.train.Example.FromString(payload).features.feature
    kinds = {key: feature.WhichOneof("kind") for key, feature in features.items()}
    return {key: (kind, list(getattr(features[key], kind).value)) for key, kind in kinds.items()}


def same_bytes(ours: bytes, theirs: bytes) -> bool:
    """Checks whether two Examples are equal up to the order of their keys, which has no meaning."""
    sort = tf.train.Example.FromString(theirs).SerializeToString(deterministic=True)
    return len(ours) == len(theirs) and ours == sort


def touch(folder: Path, *names: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return str(folder)


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# File names.


@pytest.mark.parametrize(
    "name, expected",
    [
        (shard_names.shard_name("train", 3, 128), "train-00003-of-00128"),
        (shard_names.shard_name("validation", 0, 1), "validation-00000-of-00001"),
        (shard_names.shard_name("extra", 123456, 234567), "extra-123456-of-234567"),
        (shard_names.prediction_name(3, 128, 7), "train-info-00003-of-00128-00007"),
        (shard_names.info_name(3, 128, 7), "info-00003-of-00128-00007.txt"),
        (shard_names.index_name(3, 128, 7), "index-00003-of-00128-00007.parquet"),
        (shard_names.pseudo_label_name(2, 3, 128), "train-2-00003-of-00128"),
    ],
)
def test_names(name, expected):
    assert name == expected


def test_list_shards_in_order(tmp_path):
    shards = [shard_names.shard_name("train", i, 11) for i in range(11)]
    folder = touch(tmp_path, *reversed(shards))
    assert shard_names.list_shards(folder, "train") == [f"{folder}/{name}" for name in shards]


def test_list_shards_of_several_folders_in_the_order_given(tmp_path):
    b = touch(tmp_path / "b", "train-00000-of-00002", "train-00001-of-00002")
    a = touch(tmp_path / "a", "train-00000-of-00001")
    expected = [f"{b}/train-00000-of-00002", f"{b}/train-00001-of-00002"]
    expected.append(f"{a}/train-00000-of-00001")
    assert shard_names.list_shards(f"{b};{a}", "train") == expected
    assert shard_names.list_shards(f"{b};;{a};", "train") == expected


def test_list_shards_finds_pseudo_labeled_records_and_nothing_else(tmp_path):
    wanted = ["train-0-00000-of-00002", "train-0-00001-of-00002", "train-12-00000-of-00001"]
    folder = touch(
        tmp_path,
        *wanted,
        "train-info-00000-of-00001",
        "train-info-00000-of-00001-00000",
        "train-info-00000-of-00001-00000.manifest.json",
        "info-00000-of-00001-00000.txt",
        "index-00000-of-00001-00000.parquet",
        "mytrain-00000-of-00001",
        "train-a-00000-of-00001",
        "train-0-00000-of-00002.bak",
        "validation-00000-of-00001",
        "counts.json",
        Path(atomic.temporary_name(str(tmp_path / "train-00000-of-00001"))).name,
    )
    found = shard_names.list_shards(folder, "train")
    assert found == [f"{folder}/{name}" for name in wanted]


@pytest.mark.parametrize("again", ["{}", "{}/", "{}/../{name}"])
def test_a_folder_counts_once(tmp_path, again):
    tfrecords.write_sharded(str(tmp_path / "a"), "train", [b"1"], 1)
    twice = f"{tmp_path}/a;{again.format(tmp_path / 'a', name='a')}"
    with pytest.raises(DataError, match="is given twice"):
        shard_names.list_shards(twice, "train")


def test_list_shards_of_several_prefixes(tmp_path):
    folder = touch(tmp_path, "train-00000-of-00001", "extra-00000-of-00001", "dev-00000-of-00001")
    found = shard_names.list_shards(folder, ("train", "extra"))
    assert found == [f"{folder}/extra-00000-of-00001", f"{folder}/train-00000-of-00001"]


def test_a_prefix_is_not_a_pattern(tmp_path):
    folder = touch(tmp_path, "trainX-00000-of-00001", "train.-00000-of-00001")
    assert shard_names.list_shards(folder, "train.") == [f"{folder}/train.-00000-of-00001"]


def test_missing_shard_is_named(tmp_path):
    folder = touch(tmp_path, "train-00000-of-00004", "train-00003-of-00004", "dev-00000-of-00001")
    with pytest.raises(DataError, match="2 of 4 shards are missing") as e:
        shard_names.list_shards(folder, "train")
    assert f"{folder}/train-00001-of-00004" in str(e.value)
    assert shard_names.list_shards(folder, "dev")


@pytest.mark.parametrize("kind", ["empty", "absent", "a file"])
def test_no_matching_file(tmp_path, kind):
    folder = tmp_path / "data"
    good = touch(tmp_path / "good", "train-00000-of-00001")
    if kind == "empty":
        touch(folder, "dev-00000-of-00001")
    elif kind == "a file":
        folder.touch()
    for folders in (str(folder), f"{good};{folder}"):
        with pytest.raises(DataError) as e:
            shard_names.list_shards(folders, ("train", "extra"))
        for part in (str(folder), "train-00000-of-", "extra-00000-of-"):
            assert part in str(e.value)


@pytest.mark.parametrize("folders", ["", ";"])
def test_no_folder(folders):
    with pytest.raises(DataError, match="no data folder"):
        shard_names.list_shards(folders, "train")


# Examples.


@pytest.mark.parametrize("label", [0, 9])
def test_labels_are_stored_from_one(label):
    payload = tfexamples.labeled_example(b"image", label)
    assert content(payload) == {
        "image/encoded": ("bytes_list", [b"image"]),
        "image/class/label": ("int64_list", [label + 1]),
    }
    parsed = tfexamples.parse_labeled(tf.constant(payload))
    assert parsed["image"].numpy() == b"image"
    assert parsed["label"].dtype == tf.int32 and parsed["label"].shape == []
    assert int(parsed["label"]) == label == tfexamples.label(payload)
    assert tfexamples.image_bytes(payload) == b"image"


def test_other_keys_of_imagenet_records_are_ignored():
    example = tf.train.Example.FromString(tfexamples.labeled_example(b"image", 4))
    example.features.feature["image/filename"].bytes_list.value.append(b"a.jpeg")
    example.features.feature["image/object/bbox/xmin"].float_list.value.extend([0.1, 0.2])
    payload = example.SerializeToString()
    assert (
        int(tfexamples.parse_labeled(tf.constant(payload))["label"])
        == tfexamples.label(payload)
        == 4
    )


def test_png_payload(rng):
    pixels = rng.integers(0, 256, (7, 5, 3), np.uint8)
    payload = tfexamples.labeled_example(tf.io.encode_png(pixels).numpy(), 0)
    encoded = tfexamples.parse_labeled(tf.constant(payload))["image"]
    np.testing.assert_array_equal(tf.io.decode_png(encoded), pixels)


def test_unlabeled_records_equal_the_originals():
    for theirs in golden("unlabeled"):
        image = tfexamples.image_bytes(theirs)
        assert tf.io.decode_jpeg(image).shape == (8, 8, 3)
        assert same_bytes(tfexamples.unlabeled_example(image), theirs)
        assert tfexamples.parse_unlabeled(tf.constant(theirs)).numpy() == image
        assert tfexamples.label(theirs) == -1


def test_placeholders_in_unlabeled_records_of_svhn_are_ignored():
    features = tf.train.Example.FromString(tfexamples.unlabeled_example(b"image"))
    features.features.feature["probabilities"].float_list.value.extend([0.0] * 10)
    features.features.feature["label"].int64_list.value.append(0)
    features.features.feature["prob"].float_list.value.append(0.0)
    payload = features.SerializeToString()
    assert tfexamples.parse_unlabeled(tf.constant(payload)).numpy() == b"image"
    assert tfexamples.image_bytes(payload) == b"image"


def test_predictions_equal_the_originals():
    labels = set()
    for theirs in golden("predictions"):
        stored = content(theirs)
        probs = tfexamples.probabilities(theirs)
        assert probs.dtype == np.float32 and probs.shape == (10,)
        np.testing.assert_allclose(probs.sum(), 1, rtol=1e-5)
        assert stored["probabilities"] == ("float_list", probs.tolist())
        assert stored["classes"] == ("int64_list", [int(probs.argmax())])
        assert tfexamples.label(theirs) == probs.argmax()
        assert same_bytes(tfexamples.prediction_examples(probs[None])[0], theirs)
        labels.add(tfexamples.label(theirs))
    assert len(labels) > 2


def test_prediction_of_an_unreadable_image():
    stored = content(tfexamples.prediction_examples(np.zeros([1, 3], np.float32))[0])
    assert stored == {
        "probabilities": ("float_list", [0.0, 0.0, 0.0]),
        "classes": ("int64_list", [0]),
    }


def test_pseudo_labeled_records_equal_the_originals():
    """From the same input and predictions, both produce equal records."""
    rows = zip(golden("unlabeled"), golden("predictions"), golden("filtered"))
    for unlabeled, prediction, theirs in rows:
        image, probs = (
            tfexamples.image_bytes(unlabeled),
            tfexamples.probabilities(prediction),
        )
        label = tfexamples.label(prediction)
        assert {k: kind for k, (kind, _) in content(theirs).items()} == {
            "image/encoded": "bytes_list",
            "probabilities": "float_list",
            "label": "int64_list",
            "prob": "float_list",
        }
        assert same_bytes(tfexamples.pseudo_labeled_example(image, probs, label), theirs)


def test_parser_reads_the_originals_pseudo_labeled_records():
    path = str(GOLDENS / "filtered.tfrecord")
    data = tf.data.TFRecordDataset(path).map(lambda x: tfexamples.parse_pseudo_labeled(x, 10))
    assert data.element_spec == {
        "image": tf.TensorSpec([], tf.string),
        "label": tf.TensorSpec([], tf.int32),
        "probs": tf.TensorSpec([10], tf.float32),
    }
    parsed, stored = list(data.as_numpy_iterator()), golden("filtered")
    assert len(parsed) == len(stored)
    for ours, theirs in zip(parsed, stored):
        values = {key: value for key, (_, value) in content(theirs).items()}
        assert [ours["image"]] == values["image/encoded"]
        assert [ours["label"]] == values["label"] == [tfexamples.label(theirs)]
        assert ours["probs"].tolist() == values["probabilities"]
        assert values["prob"] == [ours["probs"][ours["label"]]]


def test_wrong_number_of_classes():
    with pytest.raises(tf.errors.InvalidArgumentError, match="probabilities"):
        tfexamples.parse_pseudo_labeled(tf.constant(golden("filtered")[0]), 11)


def test_payload_that_is_no_example():
    with pytest.raises(DataError, match="not a tf.train.Example"):
        tfexamples.image_bytes(b"\xff\xff\xff")
    with pytest.raises(DataError, match="image/encoded"):
        tfexamples.image_bytes(
            tfexamples.prediction_examples(np.array([[0.5, 0.5]], np.float32))[0]
        )


# Reading past damage.


def spans(payloads_: list[bytes]) -> list[tuple[int, int]]:
    """Returns the start and end of each record in the file."""
    found, offset = [], 0
    for payload in payloads_:
        found.append((offset, offset + 16 + len(payload)))
        offset = found[-1][1]
    return found


@pytest.fixture
def path(tmp_path) -> Path:
    """A clean file of PAYLOADS."""
    tfrecords.write(str(tmp_path / "train-00000-of-00001"), iter(PAYLOADS))
    return tmp_path / "train-00000-of-00001"


def read(path: Path) -> list[tfrecords.Record]:
    return list(tfrecords.read(str(path)))


def flip(path: Path, clean: bytes, place: int) -> None:
    path.write_bytes(clean[:place] + bytes([clean[place] ^ 0x40]) + clean[place + 1 :])


def test_clean_file(path):
    assert path.stat().st_size == spans(PAYLOADS)[-1][1]
    assert read(path) == [tfrecords.Record(i, payload) for i, payload in enumerate(PAYLOADS)]
    assert payloads(path) == PAYLOADS
    assert tfrecords.count(str(path)) == len(PAYLOADS)


def test_the_originals_files():
    for name in ("unlabeled", "predictions", "filtered"):
        found = read(GOLDENS / f"{name}.tfrecord")
        assert [r.payload for r in found] == golden(name)
        assert tfrecords.count(str(GOLDENS / f"{name}.tfrecord")) == 8


def test_truncated_anywhere_in_the_last_record(path):
    clean = path.read_bytes()
    begin, end = spans(PAYLOADS)[-1]
    assert end == len(clean)
    for size in range(begin + 1, end):
        path.write_bytes(clean[:size])
        *whole, last = read(path)
        assert [r.payload for r in whole] == PAYLOADS[:-1], size
        assert last == tfrecords.Record(3, None, f"truncated at byte {begin}", size - begin), size
        assert tfrecords.count(str(path)) == 3, size


def test_cut_between_two_records_is_a_shorter_file(path):
    path.write_bytes(path.read_bytes()[: spans(PAYLOADS)[-1][0]])
    assert [(r.payload, r.problem) for r in read(path)] == [(p, "") for p in PAYLOADS[:-1]]
    assert tfrecords.count(str(path)) == 3


@pytest.mark.parametrize("bad", [0, 2, 3])
def test_damaged_payload_is_one_record(path, bad):
    clean = path.read_bytes()
    begin, end = spans(PAYLOADS)[bad]
    places = [begin + 12, (begin + 12 + end) // 2, end - 5, *range(end - 4, end)]
    for place in places:
        flip(path, clean, place)
        found = read(path)
        assert [r.position for r in found] == [0, 1, 2, 3]
        assert found[bad] == tfrecords.Record(bad, None, f"damaged payload at byte {begin}")
        good = [r for r in found if r.position != bad]
        assert all(r.payload == PAYLOADS[r.position] and not r.problem for r in good)
        assert tfrecords.count(str(path)) == 4


@pytest.mark.parametrize("bad", [0, 2, 3])
def test_after_a_damaged_length_the_rest_is_lost(path, bad):
    clean = path.read_bytes()
    begin, _ = spans(PAYLOADS)[bad]
    for place in range(begin, begin + 12):
        flip(path, clean, place)
        *whole, last = read(path)
        assert [r.payload for r in whole] == PAYLOADS[:bad]
        assert (last.position, last.payload) == (bad, None)
        assert f"damaged length at byte {begin}" in last.problem
        assert tfrecords.count(str(path)) == bad


def test_enormous_length_is_not_believed(path):
    """A length with a valid checksum that points beyond the file, as after a truncated download."""
    length = struct.pack("<Q", 2**60)
    header = length + struct.pack("<I", tfrecords.masked_crc(length))
    path.write_bytes(path.read_bytes() + header + b"x" * 100)
    *whole, last = read(path)
    assert [r.payload for r in whole] == PAYLOADS
    assert "truncated" in last.problem
    assert tfrecords.count(str(path)) == 4


def test_empty_file(path):
    path.write_bytes(b"")
    assert read(path) == []
    assert tfrecords.count(str(path)) == 0


@pytest.mark.parametrize(
    "text, problem", [(b"GIF", "truncated"), (b"not a TFRecord at all" * 9, "damaged length")]
)
def test_file_of_another_kind(path, text, problem):
    path.write_bytes(text)
    (only,) = read(path)
    assert (only.position, only.payload) == (0, None)
    assert problem in only.problem
    assert tfrecords.count(str(path)) == 0


# Counts.


def test_counts_are_trusted_while_the_size_fits(path):
    sidecar = path.parent / "counts.json"
    size = path.stat().st_size
    sidecar.write_text(json.dumps({path.name: {"records": 77, "bytes": size}}))
    assert tfrecords.count_all([str(path)]) == [77]
    sidecar.write_text(json.dumps({path.name: {"records": 77, "bytes": size + 1}}))
    with pytest.raises(DataError, match=rf"{path} has {size} bytes, but \d+ in counts.json"):
        tfrecords.count_all([str(path)])
    sidecar.write_text(json.dumps({"train-00001-of-00002": {"records": 77, "bytes": size}}))
    assert tfrecords.count_all([str(path)]) == [4]
    sidecar.unlink()
    assert tfrecords.count_all([str(path)]) == [4]


def test_what_is_counted_is_kept_until_the_file_changes(path, monkeypatch):
    assert tfrecords.count_all([str(path)]) == [4]
    measure, counted = tfrecords._measure, []
    monkeypatch.setattr(tfrecords, "_measure", lambda *a: counted.append(a[0]) or measure(*a))
    assert tfrecords.count_all([str(path)]) == [4] and not counted
    tfrecords.write(str(path), PAYLOADS[:1])
    assert [tfrecords.count_all([str(path)]) for _ in range(2)] == [[1], [1]]
    assert counted == [str(path)]


def test_damage_is_told_each_time(path):
    path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(DataError, match="damaged after record 3"):
            tfrecords.count_all([str(path)])


def test_counts_are_kept_elsewhere_where_the_folder_is_read_only(path, tmp_path, monkeypatch):
    write_json, spare = tfrecords.write_json, tmp_path / "model"

    def refused(file, *args, **kwargs):
        if Path(file).parent == path.parent:
            raise tf.errors.PermissionDeniedError(None, None, "read-only")
        write_json(file, *args, **kwargs)

    monkeypatch.setattr(tfrecords, "write_json", refused)
    first = tfrecords.measure_all([str(path)], spare=str(spare))
    assert not (path.parent / "counts.json").exists()
    monkeypatch.setattr(tfrecords, "_measure", None)
    assert tfrecords.measure_all([str(path)], spare=str(spare)) == first


def test_files_of_an_object_store_are_not_asked_for_one_by_one(path, monkeypatch):
    (known,) = tfrecords.measure_all([str(path)])
    noted = {"train-00000-of-00001": {"records": 4, "bytes": known.size}}
    monkeypatch.setattr(tfrecords, "_known_counts", lambda sidecar: noted)
    monkeypatch.setattr(tf.io.gfile, "stat", None)
    (found,) = tfrecords.measure_all(["gs://set/train-00000-of-00001"])
    assert (found.records, found.size) == (4, known.size)


@pytest.mark.parametrize("records, every", [(1, 1), (8, 1), (9, 2), (70, 16)])
def test_marks_are_where_records_begin(tmp_path, records, every):
    path, marks = str(tmp_path / "a"), tfrecords.Marks(least=4)
    tfrecords.write(path, [b"x" * i for i in range(records)], marks)
    measured, rest = tfrecords._measure(path, least=4)
    assert rest == 0 and marks.counted(measured.size) == measured
    assert measured.every == every and len(measured.marks) == -(-records // every)
    for number, offset in enumerate(measured.marks):
        record, _ = next(tfrecords.read_from(path, 0, offset))
        assert record.payload == b"x" * (number * every)
    tfrecords.note_counts([path], [marks.noted()])
    assert tfrecords.measure_all([path]) == [measured]


def test_counts_of_several_folders(tmp_path):
    one = tfrecords.write_sharded(str(tmp_path / "one"), "train", PAYLOADS, 2)
    two = tfrecords.write_sharded(str(tmp_path / "two"), "train", PAYLOADS[:3], 2)
    assert tfrecords.count_all([*two, *one]) == [2, 1, 2, 2]


def test_empty_file_nobody_accounts_for_is_an_error(path):
    path.write_bytes(b"")
    with pytest.raises(DataError, match=f"{path} is empty"):
        tfrecords.count_all([str(path)])
    # A file that was deliberately written empty is valid.
    tfrecords.note_counts([str(path)])
    assert tfrecords.count_all([str(path)]) == [0]


def test_count_all_leaves_out_a_truncated_tail(path):
    path.write_bytes(path.read_bytes()[:-1])
    assert tfrecords.count_all([str(path)], max_bad_fraction=0.9) == [3]


def test_broken_counts_are_named(path):
    (path.parent / "counts.json").write_text('{"train')
    with pytest.raises(ValueError, match="counts.json"):
        tfrecords.count_all([str(path)])


def test_note_counts_keeps_other_entries(path):
    sidecar = path.parent / "counts.json"
    tfrecords.note_counts([str(path)])
    other = path.parent / "dev-00000-of-00001"
    tfrecords.write(str(other), [b"x"])
    tfrecords.note_counts([str(other)])
    assert json.loads(sidecar.read_text()) == {
        path.name: {
            "records": 4,
            "bytes": path.stat().st_size,
            "every": 1,
            "marks": "0 21 37 314",
        },
        other.name: {"records": 1, "bytes": 17, "every": 1, "marks": "0"},
    }


# Writing.


def test_write_sharded(tmp_path):
    folder = tmp_path / "new" / "folder"
    items = [b"%d" % i for i in range(7)]
    paths = tfrecords.write_sharded(str(folder), "dev", items, 3)
    assert [Path(p).name for p in paths] == [shard_names.shard_name("dev", i, 3) for i in range(3)]
    assert [payloads(p) for p in paths] == [items[0::3], items[1::3], items[2::3]]
    assert shard_names.list_shards(str(folder), "dev") == paths
    sizes = json.loads((folder / "counts.json").read_text())
    assert [sizes[Path(p).name]["records"] for p in paths] == [3, 2, 2]
    assert names_in(folder) == sorted(["counts.json", *sizes])


def test_more_shards_than_records(tmp_path):
    paths = tfrecords.write_sharded(str(tmp_path), "train", [b"only"], 3)
    assert tfrecords.count_all(paths) == [1, 0, 0]


def test_writing_again_updates_the_counts(tmp_path):
    tfrecords.write_sharded(str(tmp_path), "train", PAYLOADS, 1)
    paths = tfrecords.write_sharded(str(tmp_path), "train", PAYLOADS[:2], 1)
    assert tfrecords.count_all(paths) == [2]
    assert payloads(paths[0]) == PAYLOADS[:2]


class Broken(Exception):
    pass


class Failing(list):
    """Payloads whose slice for one shard raises after its first item."""

    def __init__(self, items, shard):
        super().__init__(items)
        self.shard = shard

    def __getitem__(self, key):
        def items():
            yield from super(Failing, self).__getitem__(key)[:1]
            if key.start == self.shard:
                raise Broken

        return items()


@pytest.mark.parametrize("shard", [0, 1])
def test_a_shard_that_fails_leaves_nothing(tmp_path, shard):
    with pytest.raises(Broken):
        tfrecords.write_sharded(str(tmp_path), "train", Failing(PAYLOADS, shard), 2)
    finished = [shard_names.shard_name("train", i, 2) for i in range(shard)]
    assert names_in(tmp_path) == finished
    with pytest.raises(DataError):
        shard_names.list_shards(str(tmp_path), "train")
    paths = tfrecords.write_sharded(str(tmp_path), "train", PAYLOADS, 2)
    assert [payloads(p) for p in paths] == [PAYLOADS[0::2], PAYLOADS[1::2]]


def test_a_shard_that_fails_leaves_the_earlier_file(tmp_path):
    (path,) = tfrecords.write_sharded(str(tmp_path), "train", PAYLOADS, 1)
    before = Path(path).read_bytes()
    with pytest.raises(Broken):
        tfrecords.write_sharded(str(tmp_path), "train", Failing(PAYLOADS, 0), 1)
    assert Path(path).read_bytes() == before
    assert names_in(tmp_path) == ["counts.json", Path(path).name]


@settings(max_examples=20, deadline=None)
@given(items=st.lists(st.binary(max_size=600), max_size=12), shards=st.integers(1, 4))
def test_round_trip(tmp_path_factory, items, shards):
    folder = tmp_path_factory.mktemp("round-trip")
    paths = tfrecords.write_sharded(str(folder), "train", items, shards)
    for shard, path in enumerate(paths):
        expected = items[shard::shards]
        found = read(Path(path))
        assert [r.payload for r in found] == expected == payloads(path)
        assert [r.position for r in found] == list(range(len(expected)))
        assert tfrecords.count(path) == len(expected)
    assert tfrecords.count_all(paths) == [len(items[s::shards]) for s in range(shards)]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_damage_passes_unnoticed(tmp_path_factory, data):
    """After any one-byte change, every returned payload is one that was written."""
    items = data.draw(st.lists(st.binary(max_size=40), min_size=1, max_size=5))
    path = tmp_path_factory.mktemp("damage") / "file"
    tfrecords.write(str(path), items)
    clean = path.read_bytes()
    place = data.draw(st.integers(0, len(clean) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda v: v != clean[place]))
    path.write_bytes(clean[:place] + bytes([value]) + clean[place + 1 :])
    found = read(path)
    assert [r.position for r in found] == list(range(len(found)))
    assert sum(bool(r.problem) for r in found) == 1
    for record in found:
        assert record.problem or record.payload == items[record.position]


def test_two_sets_of_one_prefix_are_refused(tmp_path):
    folder = str(tmp_path)
    for shards in (2, 3):
        tfrecords.write_sharded(folder, "train", [tfexamples.unlabeled_example(b"x")] * 6, shards)
    with pytest.raises(DataError, match="two sets of 'train', of 2 and 3 shards"):
        shard_names.list_shards(folder, "train")


def test_file_of_another_size_than_its_count_says(tmp_path):
    paths = tfrecords.write_sharded(str(tmp_path), "train", [b"abc"] * 8, 2)
    whole = Path(paths[1]).read_bytes()
    Path(paths[1]).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"{paths[1]} has .* but \d+ in counts.json"):
        tfrecords.count_all(paths)


@pytest.mark.parametrize("limit, fine", [(0.5, True), (0.01, False), (0.0, False)])
def test_damage_is_bounded(tmp_path, limit, fine):
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    for path in paths:
        tfrecords.write(path, [b"x" * 10] * 4)
    whole = Path(paths[0]).read_bytes()
    Path(paths[0]).write_bytes(whole[:-3])
    if fine:
        assert tfrecords.count_all(paths, limit) == [3, 4]
    else:
        with pytest.raises(DataError, match=f"{paths[0]} is damaged after record 3"):
            tfrecords.count_all(paths, limit)


def test_lost_bytes_are_counted(tmp_path):
    path = tmp_path / "a"
    tfrecords.write(str(path), [b"x" * 10] * 4)
    content = bytearray(path.read_bytes())
    content[26] ^= 1  # In the length of the second record.
    path.write_bytes(content)
    assert [r.lost for r in tfrecords.read(str(path))] == [0, 3 * 26]


@pytest.mark.parametrize("classes", [1, 3, 127, 128, 300, 1000])
def test_many_predictions_at_once_are_the_same_bytes(classes):
    probs = np.random.default_rng(0).random([40, classes]).astype(np.float32)
    probs[0] = 0
    assert tfexamples.prediction_examples(probs) == [
        tfexamples.prediction_examples(np.asarray([p], np.float32))[0] for p in probs
    ]


def test_framed_record_is_that_of_the_writer(tmp_path):
    payloads = [b"", b"x", b"some bytes" * 1000]
    tfrecords.write(str(tmp_path / "file"), payloads)
    assert b"".join(map(tfrecords.frame, payloads)) == (tmp_path / "file").read_bytes()


def test_reading_from_the_middle(tmp_path):
    tfrecords.write(str(tmp_path / "file"), PAYLOADS)
    path = str(tmp_path / "file")
    whole = list(tfrecords.read_from(path))
    assert [record for record, _ in whole] == list(tfrecords.read(path))
    assert whole[-1][1] == (tmp_path / "file").stat().st_size
    for i, (record, end) in enumerate(whole):
        assert list(tfrecords.read_from(path, record.position + 1, end)) == whole[i + 1 :]


@pytest.mark.parametrize("size", [0, 1, 100, 127, 128, 16_300, 16_384])
@pytest.mark.parametrize("name", ["", "a folder/photo 1.jpg"])
def test_image_of_a_record_with_nothing_else_but_its_name(name, size, rng):
    """Reads bytes directly, but only where a protocol buffer parser finds the same."""
    image = rng.bytes(size)
    record = tfexamples.unlabeled_example(image, name)
    assert tfexamples._only_image(record) == tfexamples.image_bytes(record) == image
    for other in (
        tfexamples.labeled_example(image, 3),
        tfexamples.prediction_examples(np.array([[0.5, 0.5]], np.float32))[0],
    ):
        assert tfexamples._only_image(other) is None
    for _ in range(300):
        changed = bytearray(record)
        near = rng.integers(min(40, len(record)))
        changed[near if rng.integers(2) or not name else -1 - near] = rng.integers(256)
        changed = bytes(changed[: len(record) - rng.integers(2) * rng.integers(3)])
        found = tfexamples._only_image(changed)
        if found is not None:
            feature = tf.train.Example.FromString(changed).features.feature
            assert feature[tfexamples.IMAGE].bytes_list.value == [found]


# Blocks and skipping.


def plainly_read(content: bytes) -> list[tfrecords.Record]:
    """Reads the records of a file without blocks or skipping."""
    found, at = [], 0
    while at < len(content):
        header, lost = content[at : at + 12], len(content) - at
        problem = f"truncated at byte {at}"
        if len(header) == 12:
            length = int.from_bytes(header[:8], "little")
            if header[8:] != tfrecords.FOOTER.pack(tfrecords.masked_crc(header[:8])):
                problem = f"damaged length at byte {at}: the rest is lost"
            elif length + 16 <= lost:
                payload, end = tfrecords.payload_in(content, at)
                good = content[end - 4 : end] == tfrecords.FOOTER.pack(
                    tfrecords.masked_crc(payload)
                )
                damage = "" if good else f"damaged payload at byte {at}"
                found.append(tfrecords.Record(len(found), payload if good else None, damage))
                at = end
                continue
        return [*found, tfrecords.Record(len(found), None, problem, lost)]
    return found


def scanned(path: str) -> list[tfrecords.Record]:
    with tfrecords.Scanner(path) as scanner:
        return list(iter(scanner.take, None))


@pytest.fixture(params=[tfrecords._BLOCK, 50, 1])
def block(request, monkeypatch) -> int:
    """Block sizes that hold the whole file, a few records, or less than a header."""
    monkeypatch.setattr(tfrecords, "_BLOCK", request.param)
    return request.param


@pytest.fixture
def file(tmp_path, rng) -> str:
    """A file with records of 0 to 60 bytes."""
    path = str(tmp_path / "records")
    tfrecords.write(path, [rng.bytes(size) for size in (0, 5, 60, 1, 30, 30, 0, 12)])
    return path


def test_takes_what_is_read(file, block):
    assert scanned(file) == plainly_read(Path(file).read_bytes())


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
    """Files with flipped bytes or cuts give the same records, problems and positions."""
    content = Path(file).read_bytes()
    path = str(tmp_path / "mutated")
    for number in range(300):
        mutated = bytearray(content)
        if number % 3:
            mutated[rng.integers(len(mutated))] ^= int(rng.integers(1, 256))
        if number % 2:
            del mutated[rng.integers(len(mutated)) :]
        Path(path).write_bytes(mutated)
        expected = plainly_read(bytes(mutated))
        assert scanned(path) == list(tfrecords.read(path)) == expected
        with tfrecords.Scanner(path) as scanner:
            assert scanner.skip() == scanner.position == len(expected)


def test_frames_are_what_tensorflow_writes(tmp_path, rng):
    payloads = [rng.bytes(size) for size in (0, 1, 100, 70000)]
    tfrecords.write(str(tmp_path / "a"), payloads)
    assert b"".join(map(tfrecords.frame, payloads)) == (tmp_path / "a").read_bytes()


@pytest.mark.parametrize("content", ["", '{"train-00000', "[]"])
def test_damaged_counts_tell_what_to_do(content, tmp_path):
    path = str(tmp_path / "train-00000-of-00001")
    tfrecords.write(path, [b"one", b"two"])
    sidecar = tmp_path / tfrecords.COUNTS
    sidecar.write_text(content)
    with pytest.raises(DataError, match="counts.json is damaged.*Delete it"):
        tfrecords.note_counts([path])
    sidecar.unlink()
    tfrecords.note_counts([path])
    assert json.loads(sidecar.read_text())["train-00000-of-00001"]["records"] == 2
