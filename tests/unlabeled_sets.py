"""Unlabeled sets, predictions and teachers for tests of labeling."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import tensorflow as tf

from efficientnet_ns.config import Config, PipelineConfig, SelectConfig
from efficientnet_ns.files import shard_names, tfrecords
from efficientnet_ns.loop import labeling
from efficientnet_ns.models import weights
from efficientnet_ns.pseudo_labels.index import IndexWriter
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

CLASSES, SIZE = 3, 8


def png(rng: np.random.Generator, height: int = SIZE, width: int = SIZE) -> bytes:
    pixels = rng.integers(0, 256, [height, width, 3], np.uint8)
    return tf.io.encode_png(pixels).numpy()


def write_shards(folder: Path, shards: list[list[bytes]]) -> None:
    """Writes unlabeled records, one list of payloads per shard."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, payloads in enumerate(shards):
        name = shard_names.shard_name("extra", number, len(shards))
        tfrecords.write(str(folder / name), payloads)


def save_teacher(prefix: Path, num_classes: int, seed: int) -> None:
    """Saves averages of random weights, uncertain enough to reveal small errors."""
    tf.keras.utils.set_random_seed(seed)
    task = prefix.parent / f"task_{num_classes}.json"
    task.write_text(
        json.dumps({"num_classes": num_classes, "image_size": SIZE, "small_image": True})
    )
    model = ResolvedConfig.from_config(config(task)).build_model()
    rng = np.random.default_rng(seed)
    weights.write_checkpoint(
        str(prefix),
        {
            name + weights.EMA_SUFFIX: variable + rng.uniform(0, 0.05, variable.shape)
            for name, variable in weights.variable_names(model).items()
        },
    )


def config(task: Path, **values) -> Config:
    defaults = {"model_name": "efficientnet-test", "task_name": str(task), "eval_batch_size": 4}
    return Config().override(**{**defaults, **values})


def pipeline_stages(
    folder: Path, work: Path, num_shards: int, **values
) -> tuple[Config, SelectConfig]:
    """Configures labeling and selection of `folder/unlabeled` with `folder/teacher`, in `work`."""
    defaults = {
        "predict_ckpt_path": str(folder / "teacher"),
        "unlabel_data_dir": str(folder / "unlabeled"),
        "num_shards": num_shards,
        "file_prefix": "extra",
        "max_bad_fraction": 0.1,
    }
    job = {"num_image": 20, "min_threshold": 0.1}
    if "reviewed" in values:
        job["reviewed"] = values.pop("reviewed")
    settings = config(folder / f"task_{CLASSES}.json", **{**defaults, **values})
    return labeling.pipeline_stages(settings, PipelineConfig(work_dir=str(work), **job))


def selection_in(folder: Path, **values) -> SelectConfig:
    """Returns a selection whose records, predictions and outputs are all in `folder`."""
    return SelectConfig(
        unlabel_data_dir=str(folder / "records"),
        prediction_dir=str(folder / "predictions"),
        prelim_stats_dir=str(folder / "statistics"),
        output_dir=str(folder / "selected"),
        **values,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the content of every file by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def corrupt(path: Path, chosen: np.ndarray) -> None:
    """Changes the last byte of the payloads of the chosen records."""
    content, chosen, end = bytearray(path.read_bytes()), set(chosen.tolist()), 0
    for record in itertools.count():
        if end >= len(content):
            break
        end += 16 + int.from_bytes(content[end : end + 8], "little")
        if record in chosen:
            content[end - 5] ^= 0xFF
    path.write_bytes(content)


def write_index(path: str, shard: int, worker: int, labels, top_probs) -> None:
    """Writes the index of one prediction file."""
    with IndexWriter(path, shard, worker) as writer:
        writer.add(np.asarray(labels, np.int32), np.asarray(top_probs, np.float32))
