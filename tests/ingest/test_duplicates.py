"""Unlabeled images that are also in the labeled set."""

from __future__ import annotations

import shutil
import zipfile

import tensorflow as tf
from fakes import class_folders, flat_folder

from efficientnet_ns.config.ingest import MakeConfig
from efficientnet_ns.files import tfexamples, tfrecords
from efficientnet_ns.ingest import data_source, duplicates


def test_equal_files_are_found_whatever_their_names(tmp_path):
    class_folders(tmp_path / "photos", {"a": 3, "b": 2})
    class_folders(tmp_path / "test", {"a": 1, "b": 1}, first=50)
    flat_folder(tmp_path / "more", 4)
    shutil.copy(tmp_path / "photos" / "a" / "a 1.png", tmp_path / "more" / "ü copy.png")
    shutil.copy(tmp_path / "test" / "b" / "b 0.png", tmp_path / "more" / "z.png")
    more, others = str(tmp_path / "more"), [str(tmp_path / "photos"), str(tmp_path / "test")]
    assert sorted(duplicates.among(more, others)) == ["z.png", "ü copy.png"]
    assert duplicates.among(more, others[:1]) == ["ü copy.png"]


def test_archives(tmp_path):
    class_folders(tmp_path / "photos", {"a": 2, "b": 1})
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.write(tmp_path / "photos" / "b" / "b 0.png", "x/y.png")
    found = duplicates.among(str(tmp_path / "more.zip"), [str(tmp_path / "photos")])
    assert found == ["x/y.png"]


def test_object_stores_which_tell_no_sizes(tmp_path):
    """Uses TensorFlow's in-memory file system in place of an object store."""
    class_folders(tmp_path / "photos", {"a": 2, "b": 1})
    flat_folder(tmp_path / "more", 2)
    shutil.copy(tmp_path / "photos" / "b" / "b 0.png", tmp_path / "more" / "copy.png")
    remote = {}
    for path in tmp_path.rglob("*.png"):
        place = path.relative_to(tmp_path)
        remote[place.parts[0]] = f"ram://duplicates/{place.parts[0]}"
        target = f"ram://duplicates/{place}"
        tf.io.gfile.makedirs(target.rpartition("/")[0])
        tf.io.gfile.copy(str(path), target)
    assert duplicates.among(str(tmp_path / "more"), [remote["photos"]]) == ["copy.png"]
    assert duplicates.among(remote["more"], [str(tmp_path / "photos")]) == ["copy.png"]


def test_they_are_left_out_of_the_records_and_names_are_kept(tmp_path):
    flat_folder(tmp_path / "more", 3)
    config = MakeConfig(
        source=str(tmp_path / "more"),
        output_dir=str(tmp_path / "records"),
        labeled=False,
        keep_names=True,
    )
    assert data_source.make_records(config, {"u1.png"}) == {"extra": 2}
    path = tmp_path / "records" / "extra-00000-of-00001"
    names = [tfexamples.file_name(record.payload) for record in tfrecords.read(str(path))]
    assert sorted(names) == ["u0.png", "u2.png"]
