"""Predicting, selecting and writing pseudo-labels under repeated kills."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torture
from unlabeled_sets import CLASSES, corrupt, png, save_teacher, write_shards

from efficientnet_ns.files import shard_names, tfexamples, tfrecords

SHARDS, RECORDS, PICTURES, PER_CLASS = 6, 24_000, 500, 150_000
KILLS = {"predict": 60, "select": 40}  # The second command selects and writes.


@pytest.fixture(scope="module")
def unlabeled(tmp_path_factory) -> Path:
    """A teacher, and shards with one corrupted record in a hundred."""
    folder = tmp_path_factory.mktemp("factory")
    save_teacher(folder / "teacher", CLASSES, seed=2)
    rng = np.random.default_rng(4)
    payloads = [tfexamples.unlabeled_example(png(rng)) for _ in range(PICTURES)]
    places = rng.integers(0, PICTURES, [SHARDS, RECORDS])
    write_shards(folder / "unlabeled", [[payloads[i] for i in row] for row in places])
    for shard in range(SHARDS):
        path = folder / "unlabeled" / shard_names.shard_name("extra", shard, SHARDS)
        corrupt(path, rng.choice(RECORDS, RECORDS // 100, replace=False))
    return folder


def commands(folder: Path, out: Path) -> dict[str, list[str]]:
    shared = [f"--num_shards={SHARDS}", "--file_prefix=extra"]
    predict = ["efficientnet_ns.main", "--mode=predict", "--model_name=efficientnet-test"]
    predict += [f"--task_name={folder}/task_{CLASSES}.json", "--shard_id=auto", *shared]
    predict += [f"--predict_ckpt_path={folder}/teacher", f"--unlabel_data_dir={folder}/unlabeled"]
    predict += [f"--output_dir={out}/predictions", f"--info_dir={out}/info"]
    predict += ["--max_bad_fraction=0.02", "--eval_batch_size=4", "--part_seconds=0.5"]
    select = ["efficientnet_ns.filter_unlabel", f"--unlabel_data_dir={folder}/unlabeled", *shared]
    select += [f"--prediction_dir={out}/predictions", f"--prelim_stats_dir={out}/statistics"]
    select += [f"--output_dir={out}/selected", f"--num_label_classes={CLASSES}"]
    select += [f"--num_image={PER_CLASS}", "--min_threshold=0.34", "--num_workers=2"]
    start = [sys.executable, "-m"]
    return {"predict": start + predict, "select": start + select}


def files(out: Path) -> dict[str, bytes]:
    """Returns all files, except those that depend on times and processes."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and "manifest" not in path.name and path.suffix != ".log"
    }


@pytest.mark.slow
def test_hundred_kills_change_nothing(unlabeled, tmp_path):
    """Two workers per stage; no final record is lost, changed or duplicated."""
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    for command in commands(unlabeled, quiet).values():
        torture.run_with_kills([command], 0, 0, (1.0, 2.0), quiet)
    expected, left, runs = files(quiet), dict(KILLS), 0
    # A fast machine may finish before all kills; the remaining kills go to another run.
    while any(left.values()):
        rough = tmp_path / f"rough-{runs}"
        rough.mkdir()
        for stage, command in commands(unlabeled, rough).items():
            hits = torture.run_with_kills([command] * 2, left[stage], 7 + runs, (1.5, 8.0), rough)
            print(f"run {runs}: {hits} kills hit a running {stage}", flush=True)
            left[stage] -= hits
        found = files(rough)
        assert set(found) == set(expected)
        assert all(found[name] == expected[name] for name in expected)
        runs += 1
        assert runs < 20, f"stages end before they can be killed: {left}"
    data = (quiet / "selected" / "data").glob("train-*")
    written = sum(tfrecords.count(str(path)) for path in data)
    kept = json.loads((quiet / "selected" / "threshold.json").read_text())
    assert written == len(kept) * PER_CLASS > 0
