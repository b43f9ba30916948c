"""Identification of the unlabeled set among a folder's records."""

from __future__ import annotations

import pytest

from efficientnet_ns.files.errors import DataError
from efficientnet_ns.pseudo_labels import unlabeled_set


def touch(folder, *sets: tuple[str, int]) -> str:
    for prefix, total in sets:
        for shard in range(total):
            (folder / f"{prefix}-{shard:05d}-of-{total:05d}").touch()
    return str(folder)


def test_the_only_set(tmp_path):
    folder = touch(tmp_path, ("extra", 4), ("validation", 2))
    assert unlabeled_set.find(folder, "train", 128) == ("extra", 4)
    assert unlabeled_set.find(folder, "extra", 128) == ("extra", 4)
    assert unlabeled_set.find(folder, "train", 4) == ("extra", 4)
    assert unlabeled_set.find(folder, "validation", 128) == ("validation", 2)


def test_what_is_given_counts_if_it_is_there(tmp_path):
    folder = touch(tmp_path, ("extra", 4), ("train", 2))
    assert unlabeled_set.find(folder, "train", 2) == ("train", 2)
    assert unlabeled_set.find(folder, "extra", 128) == ("extra", 4)
    with pytest.raises(DataError, match=r"extra \(4 shards\), train \(2 shards\).*--file_prefix"):
        unlabeled_set.find(folder, "train", 128)


def test_pseudo_labeled_records_of_a_task(tmp_path):
    folder = touch(tmp_path, ("train-2", 3), ("train-1", 5))
    assert unlabeled_set.find(folder, "train", 128, "-2") == ("train", 3)


def test_messages_name_the_folder_and_what_is_there(tmp_path):
    with pytest.raises(DataError, match=f"in {tmp_path}; it is empty"):
        unlabeled_set.find(str(tmp_path), "train", 128)
    folder = touch(tmp_path, ("validation", 12))
    shown = r"train-00000-of-… or extra-.*it contains validation-00000-of-00012, .* and 4 more"
    with pytest.raises(DataError, match=shown):
        unlabeled_set.find(folder, "train", 128)
    with pytest.raises(DataError, match="validation-00000-of-… of --num_shards=3"):
        unlabeled_set.find(folder, "validation", 3)
    with pytest.raises(DataError, match="no such folder"):
        unlabeled_set.find(f"{folder}/none", "train", 128)


def test_all_files_of_a_set(tmp_path):
    folder = touch(tmp_path, ("extra", 3))
    names = [f"{folder}/extra-0000{shard}-of-00003" for shard in range(3)]
    assert unlabeled_set.files(folder, "train", 128) == ("extra", names)
    (tmp_path / "extra-00001-of-00003").unlink()
    with pytest.raises(DataError, match="1 of 3 shards are missing; .*/extra-00001-of-00003"):
        unlabeled_set.files(folder, "train", 128)
