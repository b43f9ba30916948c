"""Labeling at scale: random kills, and memory and time over growing sets.

`pytest -m slow -s tests/pseudo_labels/test_large_sets.py` prints the tables.
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
from unlabeled_sets import save_teacher, write_index

from efficientnet_ns.config import SelectConfig
from efficientnet_ns.files import shard_names, tfexamples, tfrecords
from efficientnet_ns.pseudo_labels import index, write
from efficientnet_ns.pseudo_labels.selection import select

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys, time
from efficientnet_ns.config import Config, SelectConfig
from efficientnet_ns.pseudo_labels import predict, write
from efficientnet_ns.pseudo_labels.selection import select

STAGES = {
    "predict": lambda values: predict.predict(Config().override(**values)),
    "select": lambda values: select(SelectConfig(**values)),
    "write": lambda values: write.write(SelectConfig(**values)),
}

if __name__ == "__main__":
    started = time.monotonic()
    result = STAGES[sys.argv[1]](json.loads(sys.argv[2]))
    seconds = time.monotonic() - started
    with open("/proc/self/status") as f:
        # Not ru_maxrss, in which the process that started this one has a part.
        peak = next(int(line.split()[1]) for line in f if line.startswith("VmHWM"))
    print(json.dumps({"records": result["records"], "seconds": seconds, "mib": peak / 1024}))
"""


def child(settings: dict, processes: int) -> list[str]:
    return stage("write", {**settings, "num_workers": processes})


def stage(name: str, settings: dict) -> list[str]:
    return [sys.executable, "-c", PROGRAM, name, json.dumps(settings)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}


def make(
    folder: Path, images: int, *, shards: int, classes: int, picture: list[bytes], **values
) -> dict:
    """Creates an unlabeled set with predictions; returns the settings of its selection."""
    settings = {
        "unlabel_data_dir": str(folder),
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
    examples = tfexamples.prediction_examples(np.asarray(probs, np.float32))
    inputs = [tfexamples.unlabeled_example(data) for data in picture]
    for shard in range(shards):
        chosen = rng.integers(len(probs), size=images // shards)
        tfrecords.write(
            index.input_path(config, shard), (inputs[i % len(inputs)] for i in range(len(chosen)))
        )
        tfrecords.write(index.prediction_path(config, shard, 0), (examples[i] for i in chosen))
        labels = probs.argmax(1)[chosen].astype(np.int32)
        path = folder / shard_names.index_name(shard, shards, 0)
        write_index(str(path), shard, 0, labels, probs.max(1)[chosen])
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
    """Kills all processes of the run or only the parent; the final files are the same."""
    settings = make(
        tmp_path,
        60000,
        shards=6,
        classes=20,
        picture=[jpeg(8, seed) for seed in range(100)],
        num_image=4000,
    )
    select(SelectConfig(**settings))
    write.write(SelectConfig(**settings))
    expected = contents(tmp_path / "out")
    for name in expected:
        if not name.startswith(("selection", "threshold", "num_image")):
            (tmp_path / "out" / name).unlink()
    moments = random.Random(0)
    kills, began = 0, 0.0
    while kills < KILLS:
        process = subprocess.Popen(child(settings, 2), env=ENVIRONMENT, start_new_session=True)
        # From the first second, during the imports, to the end of the work.
        time.sleep(began + moments.random() * 14)
        if process.poll() is not None:
            assert process.returncode == 0
            began = 0.0
            for path in (tmp_path / "out").rglob("*"):
                if path.parent.name in ("data", "stats", "samples") and path.is_file():
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
    """Tiny images in one shard and ten classes; most images are written several times."""
    save_teacher(tmp_path / "teacher", 10, seed=1)
    peaks: dict[str, list[float]] = {}
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
            num_workers=1,
        )
        predict = {
            "model_name": "efficientnet-test",
            "task_name": str(tmp_path / "task_10.json"),
            "predict_ckpt_path": str(tmp_path / "teacher"),
            "unlabel_data_dir": str(folder),
            "output_dir": str(folder / "predicted"),
            "info_dir": str(folder / "predicted"),
            "num_shards": 1,
        }
        expected = {"predict": images, "select": 2 * images, "write": 2 * images}
        for name, count in expected.items():
            command = stage(name, predict if name == "predict" else settings)
            done = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
            row = json.loads(done.stdout.splitlines()[-1])
            assert row["records"] == count
            peaks.setdefault(name, []).append(row["mib"])
            with capfd.disabled():
                print(
                    f"{name:>8} {images:>8} images: {row['seconds']:6.1f} s, "
                    f"peak {row['mib']:.0f} MiB",
                    flush=True,
                )
    for name, (small, _, large) in peaks.items():
        # Beyond filled buffers, a hundred times as many records take no more memory.
        assert large < small + 250, name
