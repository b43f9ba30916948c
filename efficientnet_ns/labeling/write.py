"""Balanced, pseudo-labeled records from a selection (arXiv 1911.04252, algorithm 1, step 3).

One output file per shard of the unlabeled set, in the original's format and with its side files:
statistics and sample pictures per class. Copies are physical copies, spread over their file. The
bytes depend on the selection, the images and the seed alone, not on how many processes write.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence

import tensorflow as tf

from efficientnet_ns.config import SelectConfig
from efficientnet_ns.cpus import available_cpus
from efficientnet_ns.data import manifests, records
from efficientnet_ns.labeling import scan, select
from efficientnet_ns.labeling.write_shard import Lost, stage, write_shard
from efficientnet_ns.progress import Progress

# A process needs seconds to start; with less than this to read, it is not worth it.
_BYTES_PER_PROCESS = 256 << 20
_SECONDS_BETWEEN_LOOKS = 0.5


class WriterDied(RuntimeError):
    """A process that wrote a shard was ended from outside."""


def write(config: SelectConfig, shards: Sequence[int] | None = None) -> dict[str, int]:
    """Writes the selected records of shards; finished shards are verified and skipped.

    The statistics of all and `counts.json` are written by the run that finds every shard finished.

    Args:
      shards: numbers of the shards to write, default all; other runs may write the rest.

    Returns:
      `records` written, over the shards asked for.

    Raises:
      records.DataError: a selected record cannot be read.
      Lost: counts of selected, written and read-back records differ.
      WriterDied: see there.
    """
    everything = select.shards(config)
    stages = _write_stages(config, everything if shards is None else shards)
    written = _records(stages)
    if not set(everything) <= set(stages):
        selection_hash = _selection_hash(config)
        stages = {shard: stage(config, selection_hash, shard) for shard in everything}
    if all(stages[shard].done() for shard in everything):
        _write_final_stats(config, [stages[shard] for shard in everything])
    return {"records": written}


def write_shards(config: SelectConfig, shards: Sequence[int]) -> int:
    """As `write`, but looks at no other shard, so that the statistics of all are left to `write`.

    Returns:
      Records written, over the shards asked for.
    """
    return _records(_write_stages(config, shards))


def _write_stages(config: SelectConfig, shards: Sequence[int]) -> dict[int, manifests.Stage]:
    """Writes what is not written; returns the shards asked for, each of them finished."""
    workers, selection_hash = select.count_workers(config), _selection_hash(config)
    stages = {shard: stage(config, selection_hash, shard) for shard in shards}
    todo = {shard: stages[shard] for shard in stages if not stages[shard].done()}
    path = _selection_path(config)
    with scan.local_copies([path]) as local:
        selection = local[path]
        _write_all(config, selection, todo, workers, _processes(config, list(todo)))
        _check_total(
            config, selection, {shard: _records({shard: stages[shard]}) for shard in stages}
        )
    # Of a shard that another process finished while a killed one had begun it.
    manifests.remove_abandoned([p for s in stages.values() for p in (s.manifest, *s.outputs)])
    return stages


def _records(stages: Mapping[int, manifests.Stage]) -> int:
    return sum(shard_stage.counts()["records"] for shard_stage in stages.values())


def _selection_path(config: SelectConfig) -> str:
    return os.path.join(config.output_dir, select.SELECTION)


def _selection_hash(config: SelectConfig) -> str:
    path = _selection_path(config)
    if not tf.io.gfile.exists(path):
        raise records.DataError(f"{path} is missing: run the selection first")
    return manifests.content_hash(path)


def _check_total(config: SelectConfig, selection: str, written: Mapping[int, int]) -> None:
    db = select.connect(selection=[selection])
    selected = dict(
        db.execute("SELECT shard, sum(copies)::BIGINT FROM selection GROUP BY shard").fetchall()
    )
    for shard, records_written in written.items():
        if selected.get(shard, 0) != records_written:
            raise Lost(
                f"{selected.get(shard, 0)} records of shard {shard} were selected, "
                f"but {records_written} written to {config.output_dir}"
            )


def _processes(config: SelectConfig, shards: Sequence[int]) -> int:
    wanted = config.num_workers
    if wanted < 1:
        size = sum(tf.io.gfile.stat(select.input_path(config, shard)).length for shard in shards)
        wanted = min(available_cpus(), 1 + size // _BYTES_PER_PROCESS)
    return max(1, min(wanted, len(shards)))


# --- Processes ------------------------------------------------------------------------------------


def _write_all(
    config: SelectConfig,
    selection: str,
    stages: Mapping[int, manifests.Stage],
    workers: int,
    processes: int,
) -> None:
    with Progress(
        _count_images(selection, stages), "writing balanced records", "images"
    ) as progress:
        if processes == 1:
            for shard, shard_stage in stages.items():
                write_shard(config, selection, shard_stage, shard, workers, progress.update)
            return
        # Spawned, since TensorFlow's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        counter = context.Value("q", 0)
        with concurrent.futures.ProcessPoolExecutor(
            processes, mp_context=context, initializer=_start, initargs=(counter,)
        ) as pool:
            waiting = {
                pool.submit(_write_one, config, selection, shard_stage, shard, workers)
                for shard, shard_stage in stages.items()
            }
            try:
                while waiting:
                    done, waiting = concurrent.futures.wait(waiting, _SECONDS_BETWEEN_LOOKS)
                    progress.update(counter.value - progress.count)
                    for future in done:
                        future.result()
            except concurrent.futures.process.BrokenProcessPool as e:
                raise WriterDied(
                    "a process that wrote a shard was ended from outside, perhaps for want of "
                    "memory: start again with fewer by --num_workers; finished shards are kept"
                ) from e
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _count_images(selection: str, shards: Mapping[int, object]) -> int:
    db = select.connect(selection=[selection])
    query = "SELECT count(*) FROM selection WHERE list_contains($1::INTEGER[], shard)"
    return db.execute(query, [list(shards)]).fetchone()[0]


_counter = None  # Of images read, shared by the processes of a pool.


def _start(counter) -> None:
    """Makes a process of the pool ready; it ends when its parent does, even by SIGKILL."""
    global _counter
    _counter = counter
    parent = multiprocessing.parent_process().sentinel

    def follow() -> None:
        multiprocessing.connection.wait([parent])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _write_one(
    config: SelectConfig, selection: str, stage: manifests.Stage, shard: int, workers: int
) -> None:
    def progress(images: int) -> None:
        with _counter.get_lock():
            _counter.value += images

    write_shard(config, selection, stage, shard, workers, progress)


# --- Statistics -----------------------------------------------------------------------------------


def _write_final_stats(config: SelectConfig, stages: Sequence[manifests.Stage]) -> None:
    total: Counter[str] = Counter()
    for shard_stage in stages:
        total.update(manifests.read_json(shard_stage.outputs[1]))
    pairs = sorted(total.items(), key=lambda pair: -pair[1])
    path = os.path.join(config.output_dir, "stats", "final_stats.json")
    counts_path = os.path.join(config.output_dir, "data", records.COUNTS)
    manifests.remove_abandoned([path, counts_path])
    manifests.write_json(
        path,
        {
            "cat_count": dict(total),
            "cat_sorted_pairs": [list(pair) for pair in pairs],
            "total_cnt": sum(total.values()),
        },
    )
    records.note_counts(
        [shard_stage.outputs[0] for shard_stage in stages],
        [shard_stage.counts()["records"] for shard_stage in stages],
    )
