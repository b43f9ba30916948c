"""Writes balanced, pseudo-labeled records from a selection (arXiv 1911.04252, algorithm 1, step 3).

There is one output file per shard of the unlabeled set, in the format of the original code, with
its side files: statistics and sample images per class. The bytes depend only on the selection, the
images and the seed, not on the number of processes.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence

import numpy as np

from efficientnet_ns.config import SelectConfig
from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.config.processes import run_each
from efficientnet_ns.files import (
    atomic,
    json_files,
    local_files,
    manifests,
    object_stores,
    tfrecords,
)
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.progress import Progress
from efficientnet_ns.pseudo_labels import index
from efficientnet_ns.pseudo_labels.selection import SELECTION
from efficientnet_ns.pseudo_labels.write_shard import stage, write_shard

# Starting a process takes seconds, which pays off only with this many bytes to read.
_BYTES_PER_PROCESS = 256 << 20


def write(config: SelectConfig, shards: Sequence[int] | None = None) -> dict[str, int]:
    """Writes the selected records of shards; verifies and skips finished shards.

    The call that finds all shards finished also writes their overall statistics and `counts.json`.

    Args:
      config: settings of the selection.
      shards: indices of the shards to write; other processes may write the others. None for all.

    Returns:
      `records`: number of records in the requested shards.

    Raises:
      DataError: If a selected record cannot be read.
      write_shard.Lost: If the records read back from a file are not the selected records.
      processes.ProcessDied: If one of --num_workers was killed.
    """
    everything = index.shards(config)
    selection_hash = _selection_hash(config)
    chosen = everything if shards is None else shards
    written = write_shards(config, chosen, selection_hash)
    # Stages of all shards: the process that finishes last writes the overall statistics.
    stages = object_stores.each(lambda shard: stage(config, selection_hash, shard), everything)
    if all(object_stores.each(manifests.Stage.done, stages)):
        _write_final_stats(config, stages)
    return {"records": written}


def write_shards(config: SelectConfig, shards: Sequence[int], selection_hash: str = "") -> int:
    """Like `write`, but without the overall statistics and `counts.json`.

    Args:
      selection_hash: hash of the selection file; computed if empty.

    Returns:
      Number of records in the requested shards.
    """
    selection_hash = selection_hash or _selection_hash(config)
    workers = index.count_workers(config)
    made = object_stores.each(lambda shard: stage(config, selection_hash, shard), shards)
    stages = dict(zip(shards, made))
    done = object_stores.each(manifests.Stage.done, made)
    todo = {shard: stages[shard] for shard, whole in zip(shards, done) if not whole}
    files = [p for s in stages.values() for p in (s.manifest, *s.outputs)]
    # Once for all shards, because each would list the folders; see `manifests.Stage.write`.
    atomic.remove_abandoned(files)
    path = os.path.join(config.output_dir, SELECTION)
    with local_files.local_copies([path]) as local:
        # Once for all shards, because reading decisions requires files and folder listings. Excluded
        # images, which may be many, are not in the selection.
        labeled = dataclasses.replace(config, exclude="")
        changes = index.changes(labeled) if todo else {}
        own: dict[int, dict] = {shard: {} for shard in todo}
        for (shard, worker), changed in changes.items():
            if shard in own:
                own[shard][shard, worker] = changed
        jobs = [(config, local[path], todo[shard], shard, workers, own[shard]) for shard in todo]
        processes = _processes(config, list(todo))
        if todo:
            needed = _scratch_bytes(config, local[path], list(todo), processes)
            local_files.require_bytes(needed, f"writing {processes} shards at once")
        with Progress(len(jobs), "writing balanced records", "shards") as progress:
            for _ in run_each(write_shard, jobs, processes):
                progress.update(1)
    # A killed process may have begun a shard that another process finished.
    if todo:
        atomic.remove_abandoned(files)
    return sum(shard_stage.counts()["records"] for shard_stage in stages.values())


def _selection_hash(config: SelectConfig) -> str:
    path = os.path.join(config.output_dir, SELECTION)
    if object_stores.size(path) is None:
        raise DataError(f"{path} is missing: run the selection first")
    return manifests.content_hash(path)


def _processes(config: SelectConfig, shards: Sequence[int]) -> int:
    wanted = config.num_workers
    if wanted < 1:
        paths = [index.input_path(config, shard) for shard in shards]
        size = sum(filter(None, object_stores.sizes(paths)))
        wanted = min(available_cpus(), 1 + size // _BYTES_PER_PROCESS)
    return max(1, min(wanted, len(shards)))


def _scratch_bytes(
    config: SelectConfig, selection: str, shards: Sequence[int], processes: int
) -> float:
    """Estimates the space required in TMPDIR, where `write_shard` stores each selected image once.

    TensorFlow also stores its uploads to an object store there, including all copies.
    """
    import pyarrow.parquet

    images, copies = np.zeros(config.num_shards), np.zeros(config.num_shards)
    with pyarrow.parquet.ParquetFile(selection) as file:
        for batch in file.iter_batches(columns=["shard", "copies"]):
            shard, number = (batch.column(k).to_numpy() for k in range(2))
            images += np.bincount(shard, minlength=config.num_shards)
            copies += np.bincount(shard, number, minlength=config.num_shards)
    if object_stores.is_object_store(config.output_dir):
        images += copies
    manifest = os.path.join(config.output_dir, f"{SELECTION}.manifest.json")
    counts = manifests.read_manifest(manifest)["counts"]
    sizes = object_stores.sizes([index.input_path(config, shard) for shard in shards])
    records = counts["available"] * len(shards) / len(index.shards(config))
    # Images of the largest shards written concurrently, times the mean bytes of a record.
    return sum(sorted(images[shards])[-processes:]) * sum(filter(None, sizes)) / max(records, 1)


def _write_final_stats(config: SelectConfig, stages: Sequence[manifests.Stage]) -> None:
    total: Counter[str] = Counter()
    for shard_stage in stages:
        total.update(json_files.read_object(shard_stage.outputs[1]))
    pairs = sorted(total.items(), key=lambda pair: -pair[1])
    path = os.path.join(config.output_dir, "stats", "final_stats.json")
    counts_path = os.path.join(config.output_dir, "data", tfrecords.COUNTS)
    # Several processes may get here; all write the same content.
    atomic.remove_abandoned([path, counts_path])
    json_files.write_json(
        path,
        {
            "cat_count": dict(total),
            "cat_sorted_pairs": [list(pair) for pair in pairs],
            "total_cnt": sum(total.values()),
        },
    )
    tfrecords.note_counts(
        [shard_stage.outputs[0] for shard_stage in stages],
        [shard_stage.counts() for shard_stage in stages],
    )
