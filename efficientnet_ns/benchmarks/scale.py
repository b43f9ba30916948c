"""Calculates what each host reads in training, without making or reading any file.

--files, --records and --record_bytes describe the set. `data.streams`, which also plans the reads
in training, determines where a host reads. Files are on an object store, from which TensorFlow
reads GCS_READ_CACHE_BLOCK_SIZE_MB at a time, up to the end of the file. Listings have 1000 names
per page and begin with a request for one name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

import numpy as np
import tensorflow as tf

from efficientnet_ns.benchmarks.tables import Row
from efficientnet_ns.config import BenchmarkConfig, Config, ConfigError
from efficientnet_ns.data.streams import Plan, Share, Source
from efficientnet_ns.files import shard_names, tfrecords
from efficientnet_ns.models import efficientnet

_PAGE = 1000  # Names per request of a listing.
_NAME_BYTES = 100  # Bytes of a listing per name.
_RESUMES = 5  # Number of steps at which to resume.


def run(config: BenchmarkConfig) -> list[Row]:
    """Returns bytes and requests of the host that reads most, to start, step, resume and restore.

    Raises:
      ConfigError: If the batch size is not divisible by the number of hosts.
    """
    if config.batch_size % config.hosts:
        raise ConfigError(
            f"--batch_size={config.batch_size} is not divisible by --hosts={config.hosts}"
        )
    described = _Described(config)
    steps = max(1, config.records // config.batch_size)
    rng = np.random.default_rng(0)
    resumes = [described.resume(int(step)) for step in rng.integers(1, max(2, steps), _RESUMES)]
    epoch = described.epoch()
    even = described.bytes / config.hosts
    pages = -(-config.files // _PAGE)
    sidecar = len(json.dumps(tfrecords.entries(described.source.paths, described.source.files)))
    counting = sum(_requests(file.size) for file in described.source.files)
    checkpoint = _checkpoint_bytes(config.model_name)
    listing = np.array([config.files * _NAME_BYTES, 1 + pages])
    known = listing + (sidecar, _requests(sidecar))
    found: dict[str, Iterable[float]] = {
        "start, counts known": known,
        "start, nothing known (first worker, once)": listing + (described.bytes, counting),
        "first step": described.resume(0),
        "step": tuple(x / steps for x in epoch),
        "resume, mean": tuple(np.mean(resumes, axis=0)),
        "resume, most": tuple(np.max(resumes, axis=0)),
        f"restore of {config.model_name}": (checkpoint, _requests(checkpoint)),
        # The input for its name and for its shards, and the output for finished shards.
        "predict, start": 3 * listing,
    }
    rows = [Row("epoch, bytes", epoch[0] / 1e6, "MB", epoch[0] / even, "1/hosts of the set")]
    rows.append(Row("epoch, requests", epoch[1], "requests"))
    for name, (size, requests) in found.items():
        rows.append(Row(f"{name}, bytes", size / 1e6, "MB"))
        rows.append(Row(f"{name}, requests", float(requests), "requests"))
    return rows


def _block() -> int:
    # By default, TensorFlow reads 64 MB.
    return int(os.environ.get("GCS_READ_CACHE_BLOCK_SIZE_MB", "64")) << 20


def _requests(size: float) -> int:
    return -(-int(size) // _block())


class _Described:
    """A hypothetical set and what hosts read of it in training."""

    def __init__(self, config: BenchmarkConfig):
        counts = [len(part) for part in np.array_split(np.arange(config.records), config.files)]
        size, least = config.record_bytes, tfrecords.marks_per_file(config.files)
        names = (shard_names.shard_name("train", i, config.files) for i in range(config.files))
        files = []
        for count in counts:
            every = max(1, count // least)
            marks = tuple(range(0, count * size, every * size))
            files.append(tfrecords.Counted(count, count * size, every, marks))
        self.source = Source(tuple(f"gs://set/{n}" for n in names), tuple(counts), tuple(files))
        self.bytes = config.records * size
        self._record, self._sizes = size, np.array([file.size for file in files])
        self._plan = Plan(self.source, config.batch_size, 0, Config().data.shuffle_buffer)
        shares = [Share(h, config.hosts, config.hosts) for h in range(config.hosts)]
        self._hosts = [self._plan.streams(share) for share in shares]

    def epoch(self) -> tuple[float, float]:
        """Returns (bytes, requests) of an epoch."""
        return self._most(lambda stream: self._plan.run(stream, tf.constant(0, tf.int64)))

    def resume(self, step: int) -> tuple[float, float]:
        """Returns (bytes, requests) of the windows of the first batch if resumed at `step`."""
        start = step * self._plan.batch_size
        epoch = tf.constant(start // self.source.total, tf.int64)

        def part(stream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            begin, end = self._plan.run(stream, epoch)
            number, first, _ = self._plan.windows(stream, epoch, start)
            after = (number + 1) * self._plan.window - self._plan.missing(stream)
            return begin + first, tf.minimum(begin + after, end)

        return self._most(part)

    def _most(self, part) -> tuple[float, float]:
        """Returns (bytes, requests) of the host that reads most; `part` selects part of a run."""
        # The order of one epoch represents all epochs.
        order = self._plan.order(tf.constant(0, tf.int64))
        places = tf.function(lambda stream: self._plan.layout.places(order, *part(stream)))
        streams = tf.range(self._plan.num_streams, dtype=tf.int64)
        costs = np.array([self._cost(*places(stream)) for stream in streams])
        sums = [costs[first:end].sum(0) for first, end in self._hosts]
        size, requests = np.max(sums, axis=0)
        return float(size), float(requests)

    def _cost(self, file, offset, skip, take, *_) -> tuple[float, float]:
        """Returns (bytes, requests) of some places."""
        left = self._sizes[file.numpy()] - offset.numpy()
        requests = -(-(skip + take).numpy() * self._record // _block())
        return np.minimum(requests * _block(), left).sum(), requests.sum()


def _checkpoint_bytes(model_name: str) -> int:
    """Returns the bytes of a checkpoint: weights, averages, and two slots per trained weight."""
    model = efficientnet.build_model(model_name)
    weights, trained = (
        sum(int(np.prod(w.shape)) for w in some)
        for some in (model.weights, model.trainable_weights)
    )
    # float32, and everything twice: weights and averages; two slots.
    return 4 * 2 * (weights + trained)
