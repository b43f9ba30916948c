"""Surveys of images and records, which write nothing."""

from __future__ import annotations

import os

import pytest
from fakes import class_folders, flat_folder

from efficientnet_ns.config.ingest import MakeConfig
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.ingest import data_source
from efficientnet_ns.ingest.survey import is_records, survey


def test_folders_and_the_records_made_of_them_tell_the_same(tmp_path):
    class_folders(tmp_path / "photos", {"a": 3, "b": 2, "none": 0})
    found = survey(str(tmp_path / "photos"), labeled=True)
    assert found.classes == {"a": 3, "b": 2, "none": 0}
    assert (found.images, found.median_side, found.opened) == (5, 24, 5)
    folder = str(tmp_path / "records")
    data_source.make_records(MakeConfig(source=str(tmp_path / "photos"), output_dir=folder))
    assert is_records(folder) and not is_records(str(tmp_path / "photos"))
    records = survey(folder, labeled=True)
    assert (records.classes, records.images, records.median_side) == (found.classes, 5, 24)


def test_unusable_pictures_are_refused(tmp_path):
    flat_folder(tmp_path / "more", 2)
    (tmp_path / "more" / "empty.jpg").write_bytes(b"")
    (tmp_path / "more" / "notes.txt").write_text("x")
    found = survey(str(tmp_path / "more"), labeled=False)
    assert [name for name, _ in found.refused] == ["empty.jpg"]
    assert found.classes is None and found.ignored == {".txt": 1}


def test_names_that_are_not_utf_8_are_refused(tmp_path):
    flat_folder(tmp_path / "more", 2)
    (tmp_path / "more" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    found = survey(str(tmp_path / "more"), labeled=False)
    assert [name for name, _ in found.refused] == ["caf\\xe9.jpg"]


def test_records_without_a_task_have_no_classes(tmp_path):
    flat_folder(tmp_path / "more", 2)
    folder = str(tmp_path / "records")
    config = MakeConfig(source=str(tmp_path / "more"), output_dir=folder, labeled=False)
    data_source.make_records(config)
    assert survey(folder, labeled=False).images == 2
    with pytest.raises(DataError, match="records without task.json"):
        survey(folder, labeled=True)


def test_pictures_beside_empty_class_folders_are_refused(tmp_path):
    flat_folder(tmp_path / "photos", 2)
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir()
    with pytest.raises(DataError, match="none of the pictures in .*photos is in the folder of a"):
        survey(str(tmp_path / "photos"), labeled=True)
