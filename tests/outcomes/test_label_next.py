"""The list of images to label next: small margins, every class, no near copies, no decided images."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from unlabeled_sets import png, selection_in, write_shards

from efficientnet_ns.config import FilterConfig, ReportConfig, SelectConfig
from efficientnet_ns.data import fingerprints
from efficientnet_ns.files import tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.loop import labeling
from efficientnet_ns.outcomes import label_next
from efficientnet_ns.pseudo_labels import index

SHARDS, WORKERS, IMAGES, CLASSES = 3, 2, 40, 4


def predictions(rng: np.random.Generator) -> np.ndarray:
    """Returns float32 [S, N, C]; class 3 has a single image, and one image is unreadable."""
    probs = rng.dirichlet(np.ones(CLASSES - 1), [SHARDS, IMAGES]).astype(np.float32)
    probs = np.concatenate([probs, np.zeros([SHARDS, IMAGES, 1], np.float32)], 2)
    probs[1, 7], probs[2, 5] = [0, 0, 0.1, 0.9], 0
    return probs


@pytest.fixture
def probs(rng) -> np.ndarray:
    return predictions(rng)


@pytest.fixture
def marks(rng) -> np.ndarray:
    """Marks of distinct images, uint64 [S, N, 5]."""
    return rng.integers(1, 2**63, [SHARDS, IMAGES, len(fingerprints.COLUMNS)], np.uint64)


@pytest.fixture
def folder(tmp_path, rng) -> Path:
    write_shards(
        tmp_path / "records",
        [
            [tfexamples.unlabeled_example(png(rng), f"{s}/{i}.png") for i in range(IMAGES)]
            for s in range(SHARDS)
        ],
    )
    return tmp_path


def selecting(folder: Path, **values) -> SelectConfig:
    return selection_in(
        folder,
        num_shards=SHARDS,
        num_label_classes=CLASSES,
        file_prefix="extra",
        num_image=5,
        **values,
    )


def write_predictions(folder: Path, probs: np.ndarray, marks: np.ndarray | None = None) -> None:
    (folder / "predictions").mkdir()
    for shard in range(SHARDS):
        for worker in range(WORKERS):
            name = f"{folder}/predictions/%s-{shard:05d}-of-{SHARDS:05d}-{worker:05d}%s"
            own = probs[shard, worker::WORKERS]
            tfrecords.write(name % ("train-info", ""), tfexamples.prediction_examples(own))
            if marks is not None:
                path = name % ("index", ".parquet")
                with index.IndexWriter(path, shard, worker, marked=True) as writer:
                    writer.add(*index.top_one(own), marks[shard, worker::WORKERS])


def expected(probs: np.ndarray, limit: int, left_out: set[tuple[int, int]]) -> list:
    """Returns (shard, record) by sorting everything."""
    found = []
    for (shard, record), row in ((at, probs[at]) for at in np.ndindex(SHARDS, IMAGES)):
        if row.max() > 0 and (shard, record) not in left_out:
            low, high = np.sort(row)[-2:]
            found.append((int(row.argmax()), float(high - low), shard, record))
    ranked = []
    for label in range(CLASSES):
        own = sorted(one for one in found if one[0] == label)
        ranked += [(rank, margin, s, r) for rank, (_, margin, s, r) in enumerate(own)]
    return [(s, r) for _, _, s, r in sorted(ranked)[:limit]]


def places(config: SelectConfig, limit: int) -> list[tuple[int, int]]:
    return [(one.shard, one.record) for one in label_next.choose(config, limit)]


@pytest.mark.parametrize("limit", [3, 10, 1000])
def test_smallest_margins_of_all_classes_in_turn(folder, probs, limit):
    write_predictions(folder, probs)
    found = label_next.choose(selecting(folder), limit)
    assert [(one.shard, one.record) for one in found] == expected(probs, limit, set())
    assert {one.label for one in found[:CLASSES]} == set(range(min(limit, CLASSES)))
    for one in found:
        row = probs[one.shard, one.record]
        assert (row[one.label], row[one.second]) == tuple(np.sort(row)[:-3:-1])


def test_candidates_are_reduced_as_shards_arrive(folder, probs, monkeypatch):
    monkeypatch.setattr(label_next, "_ROWS", 1)
    held, add = [], label_next._Best.add

    def watched(best: label_next._Best, new: label_next.Candidate) -> None:
        add(best, new)
        held.append(sum(len(some.label) for some in best._found))

    monkeypatch.setattr(label_next._Best, "add", watched)
    write_predictions(folder, probs)
    assert places(selecting(folder), 3) == expected(probs, 3, set())
    kept = label_next._SPARE * 3 * CLASSES
    assert len(held) == SHARDS * (WORKERS + 1) and max(held) <= 2 * kept


def test_near_copies_come_once(folder, probs, marks):
    first, second, third, *_ = expected(probs, 3, set())
    marks[second] = marks[first]
    marks[second][0] ^= np.uint64(1)  # Different content
    marks[second][1] ^= np.uint64(2**31 - 1)  # and 31 different fingerprint bits.
    marks[third][0] = marks[first][0]
    write_predictions(folder, probs, marks)
    wanted = expected(probs, 12, {second, third})
    assert places(selecting(folder), 12) == wanted


def test_one_bit_further_is_no_copy(folder, probs, marks):
    first, second, *_ = expected(probs, 2, set())
    marks[second] = marks[first]
    marks[second][0] ^= np.uint64(1)
    marks[second][1] ^= np.uint64(2**32 - 1)
    write_predictions(folder, probs, marks)
    assert places(selecting(folder), 12) == expected(probs, 12, set())


def test_images_without_structure_are_no_copies_of_each_other(folder, probs, marks):
    marks[..., 1:] = 0
    write_predictions(folder, probs, marks)
    assert places(selecting(folder), 12) == expected(probs, 12, set())


def test_the_list_and_the_sheet_of_a_run(folder, probs):
    """Decided and excluded images are left out, and `--reviewed` accepts the sheet."""
    write_predictions(folder, probs)
    first, second, *_ = expected(probs, 2, set())
    files = {s: str(folder / "records" / f"extra-{s:05d}-of-{SHARDS:05d}") for s in range(SHARDS)}
    (folder / "exclude.csv").write_text(f"file,record\n{files[first[0]]},{first[1]}\n")
    decided = {"file": files[second[0]], "record": second[1], "label": 0}
    (folder / "review.json").write_text(json.dumps({"decisions": [decided]}))
    given = {"exclude": str(folder / "exclude.csv"), "reviewed": str(folder / "review.json")}
    labeling.select_and_write(selecting(folder, **given), FilterConfig())
    written = labeling.report(selecting(folder, **given), ReportConfig(label_next=9))
    path, listed, sheet = map(Path, written)
    assert "<h1>Label these next</h1>" in sheet.read_text() and listed.name == "label_next.csv"
    with open(path.parent / "label_next.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    wanted = expected(probs, 9, {first, second})
    assert [(row["file"], int(row["record"])) for row in rows] == [(files[s], r) for s, r in wanted]
    assert [row["name"] for row in rows] == [f"{s}/{r}.png" for s, r in wanted]
    assert all(f'"name": "{s}/{r}.png"' in sheet.read_text() for s, r in wanted)
    one = probs[wanted[0]]
    assert int(rows[0]["label"]) == one.argmax()
    assert float(rows[0]["margin"]) == pytest.approx(np.diff(np.sort(one))[-1], abs=1e-4)
    assert (path.parent / "label_next.html").read_text().count("data:image/") == 9


def test_debugging_one_shard_of_two_workers(folder, probs, marks):
    """It reads only the first worker's index but the predictions of both."""
    others = {(s, r) for s in (0, 2) for r in range(IMAGES)}
    ranked = expected(probs, IMAGES, others)
    first, second, *_ = [place for place in ranked if place[1] % WORKERS == 0]
    marks[second] = marks[first]
    write_predictions(folder, probs, marks)
    wanted = expected(probs, IMAGES, {*others, second})
    assert places(selecting(folder, debug=1, shard_id=1), IMAGES) == wanted


def test_a_shard_without_images(folder, probs):
    write_predictions(folder, probs)
    tfrecords.write(str(folder / "predictions" / "train-info-00001-of-00003-00001"), [])
    left_out = {(1, record) for record in range(1, IMAGES, 2)}
    assert places(selecting(folder), 12) == expected(probs, 12, left_out)


def test_predictions_of_another_task_are_refused(folder, probs):
    write_predictions(folder, probs)
    config = selecting(folder)
    object.__setattr__(config, "num_label_classes", 7)
    with pytest.raises(DataError, match="it has 4 probabilities, not 7"):
        label_next.choose(config, 3)
