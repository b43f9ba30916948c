"""Lists of records to leave out."""

from __future__ import annotations

import os

import numpy as np
import pytest

from efficientnet_ns.files import exclusions
from efficientnet_ns.files.errors import DataError


def test_a_list_that_was_written_is_read(tmp_path):
    path = str(tmp_path / "list.csv")
    rows = [("/b", 5, 'a "name", with commas'), ("/a", 3, ""), ("/b", 2, ""), ("/b", 5, "")]
    exclusions.write(path, ["name"], iter(rows))
    found = exclusions.of_files(path, ["/a", "/b", "/c"], "unlabeled")
    assert {file: list(records) for file, records in found.items()} == {1: [2, 5], 0: [3]}
    assert {records.dtype for records in found.values()} == {np.dtype(np.int64)}
    assert os.listdir(tmp_path) == ["list.csv"]


def test_an_empty_list_excludes_nothing(tmp_path):
    exclusions.write(str(tmp_path / "list.csv"), [], [])
    assert exclusions.of_files(str(tmp_path / "list.csv"), ["/a"], "labeled") == {}


def test_paths_of_one_file_are_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.csv").write_text(f"record,file\n4,shard\n1,{tmp_path}/shard\n2,./shard\n")
    (records,) = exclusions.of_files("list.csv", [str(tmp_path / "shard")], "labeled").values()
    assert list(records) == [1, 2, 4]


def test_values_that_mean_nothing(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("file,record\n/a,-1\n")
    with pytest.raises(DataError, match="has the record -1; records count from 0"):
        exclusions.of_files(str(path), ["/a"], "labeled")
    path.write_text('\ufeff"file","record","set"\n/a,1,train\n')
    with pytest.raises(DataError, match="has 'train' in the column 'set'; it must be one of eval"):
        exclusions.of_files(str(path), ["/a"], "labeled")


@pytest.mark.parametrize("row", ["/a,", "/a,x", "/a,1.5"])
def test_a_record_that_is_not_a_number(tmp_path, row):
    (tmp_path / "list.csv").write_text(f"file,record\n/a,1\n{row}\n")
    with pytest.raises(DataError, match="list.csv is not a list with the columns file and record"):
        exclusions.of_files(str(tmp_path / "list.csv"), ["/a"], "labeled")


def test_a_list_that_could_not_be_written_leaves_nothing(tmp_path):
    def rows():
        yield "/a", 1
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        exclusions.write(str(tmp_path / "list.csv"), [], rows())
    assert not os.listdir(tmp_path)


def test_rows_of_other_sets_do_not_count(tmp_path):
    path = str(tmp_path / "list.csv")
    exclusions.write(path, ["set"], [("/train", 1, "labeled"), ("/extra", 2, "unlabeled")])
    (records,) = exclusions.of_files(path, ["/train", "/extra"], "labeled").values()
    assert list(records) == [1]
    with pytest.raises(DataError, match="names records of /extra, but none of the set with /train"):
        exclusions.of_files(path, ["/train"], "unlabeled")
    exclusions.write(path, ["set"], [("/train", 1, "labeled")])
    assert exclusions.of_files(path, ["/extra"], "unlabeled") == {}


def test_a_list_without_sets_may_be_of_another(tmp_path):
    path = str(tmp_path / "list.csv")
    exclusions.write(path, [], [("/extra", 1)])
    assert exclusions.of_files(path, ["/train"], "labeled", required=False) == {}
    with pytest.raises(DataError, match="names records of /extra"):
        exclusions.of_files(path, ["/train"], "labeled")
