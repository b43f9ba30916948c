"""Writing balanced records at length: killed again and again, and ten times as much each time.

`pytest -m slow -s tests/test_write_scale.py` prints the tables.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.config import SelectConfig
from efficientnet_ns.data import records
from efficientnet_ns.labeling import index as index_lib
from efficientnet_ns.labeling import select, write

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

WRITE = """
import json, resource, sys, time
from efficientnet_ns.config import SelectConfig
from efficientnet_ns.labeling import write

if __name__ == "__main__":
    settings = SelectConfig(**json.loads(sys.argv[1]))
    started = time.monotonic()
    result = write.write(settings)
    result["seconds"] = time.monotonic() - started
    peak = max(resource.getrusage(who).ru_maxrss for who in (0, resource.RUSAGE_CHILDREN))
    print(json.dumps({**result, "mib": peak / 1024}))
"""


def child(settings: dict, processes: int) -> list[str]:
    return [sys.executable, "-c", WRITE, json.dumps({**settings, "num_workers": processes})]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}


def make(
    folder: Path, images: int, *, shards: int, classes: int, picture: list[bytes], **values
) -> dict:
    """An unlabeled set with predictions, selected; returns the settings."""
    settings = {
        "input_dir": str(folder),
        "prediction_dir": str(folder),
        "prelim_stats_dir": str(folder / "stats"),
        "output_dir": str(folder / "out"),
        "num_shards": shards,
        "num_label_classes": classes,
        **values,
    }
    config = SelectConfig(**settings)
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(classes, 0.1), 500).astype(np.float32)
    examples = [records.prediction_example(row) for row in probs]
    inputs = [records.unlabeled_example(data) for data in picture]
    for shard in range(shards):
        chosen = rng.integers(len(probs), size=images // shards)
        records.write(
            select.input_path(config, shard), (inputs[i % len(inputs)] for i in range(len(chosen)))
        )
        records.write(select.prediction_path(config, shard, 0), (examples[i] for i in chosen))
        labels = probs.argmax(1)[chosen].astype(np.int32)
        index = folder / records.index_name(shard, shards, 0)
        index_lib.write_index(str(index), shard, 0, labels, probs.max(1)[chosen])
    select.select(config)
    return settings


def jpeg(side: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    return tf.io.encode_jpeg(pixels, quality=90).numpy()


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


KILLS = 30


def test_killed_at_random_moments(tmp_path):
    """Every process of the run dies at once, or the parent alone; the files end up the same."""
    settings = make(
        tmp_path,
        60000,
        shards=6,
        classes=20,
        picture=[jpeg(8, seed) for seed in range(100)],
        num_image=4000,
    )
    write.write(SelectConfig(**settings))
    expected = contents(tmp_path / "out")
    for name in expected:
        if not name.startswith(("selection", "threshold", "num_image")):
            (tmp_path / "out" / name).unlink()
    moments = random.Random(0)
    kills, began = 0, 0.0
    while kills < KILLS:
        process = subprocess.Popen(child(settings, 2), env=ENVIRONMENT, start_new_session=True)
        # From the first second, when all is still being imported, to the end of the work.
        time.sleep(began + moments.random() * 14)
        if process.poll() is not None:
            assert process.returncode == 0
            began = 0.0
            for path in (tmp_path / "out").rglob("*"):
                if path.parent.name in ("data", "stats", "samples"):
                    if path.is_file():
                        path.unlink()
            continue
        if kills % 2:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
        kills += 1
    subprocess.run(child(settings, 2), env=ENVIRONMENT, check=True)
    assert contents(tmp_path / "out") == expected


def test_memory_is_flat_and_time_linear(tmp_path, capfd):
    """Tiny pictures, ten classes, most images several times."""
    rows = []
    for images in (10**4, 10**5, 10**6):
        folder = tmp_path / str(images)
        folder.mkdir()
        settings = make(
            folder,
            images,
            shards=1,
            classes=10,
            picture=[jpeg(8, seed) for seed in range(100)],
            num_image=images // 5,
        )
        done = subprocess.run(child(settings, 1), env=ENVIRONMENT, check=True, capture_output=True)
        rows.append({"images": images, **json.loads(done.stdout)})
    with capfd.disabled():
        print()
        for row in rows:
            rate = row["records"] / row["seconds"]
            print(
                f"{row['images']:>8} images, {row['records']:>8} records written: "
                f"{row['seconds']:6.2f} s, {rate:7.0f} records/s, peak {row['mib']:.0f} MiB"
            )
    assert rows[-1]["records"] == 2 * 10**6
    # A bucket and a run are what memory is for; ten times the records are not ten times that.
    assert rows[-1]["mib"] < rows[0]["mib"] + 600
