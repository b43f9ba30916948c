"""Defines which records a host reads, and in which order, by streams that do not depend on hosts.

The rows of a batch of B belong to V streams: rows v·B/V … (v+1)·B/V - 1 of every batch are the next
records of stream v. V is the largest divisor of B up to 256, or up to max(8, N / 256) for small sets.
An epoch contains each of the N records once: it shuffles the files, concatenates them and cuts the
result into one run per stream, with as many records as the stream has rows in the epoch. Streams
therefore never have unequal shares. Run lengths differ by at most the rows of one batch; an epoch
ends after exactly N rows, in the middle of a batch if necessary, and the next one begins there. Sets
of fewer than 64 files are split into pieces of files, so that a run is not always the same part of
one file.

A run is read from beginning to end in windows of shuffle_buffer / V records, which are shuffled by
(seed, epoch, stream, window). The higher the number of a stream, the shorter its first window, so
that streams do not all fill a window at once. A record moves by up to shuffle_buffer / B steps, as in
a buffer of that many records.

Cost: a host reads the files of its runs. A run can begin at any record of a file. If `counts.json`
lists byte offsets at which records begin (marks), the file is read from the last mark before the run,
otherwise from its start. Only the bytes before the run are read unnecessarily: less than 1 % with
marks, half a file per run and epoch without them. If there are more hosts than streams, or a host's
rows are not a whole number of streams, it reads all of each stream that it has a row of. To resume, a
stream reads its file up to the window, and the window, or both windows if its rows of the batch are
in two. Nothing is read ahead before the first batch is complete; after that, two batches are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.files import object_stores, shard_names, tfrecords
from efficientnet_ns.files.errors import DataError

# A training run that began with another version of the order continues with the next epoch.
ORDER_VERSION = 2
_MOST_STREAMS = 256  # Streams of two sets stay below the usual limit of 1024 open files.
# Beginning a run takes about a millisecond, but many hosts should not read small sets twice.
_LEAST_RUN, _LEAST_STREAMS = 256, 8
_LEAST_PIECES = 64
_READERS = 16  # Maximum number of a host's streams that are read ahead at the same time.
# In batches; more than tf.data reads ahead of each stream, which is two batches and one record.
_PAUSE = 3
_PART = 256  # Maximum number of records that are removed together as part of the pause.
# Bytes per read of a local file: at most TensorFlow's default.
_BUFFER, _LEAST_BUFFER = 1 << 18, 1 << 10


@dataclasses.dataclass(frozen=True)
class Source:
    """Record files with their counts.

    Attributes:
      paths: TFRecord files.
      counts: number of records to use from the start of each file.
      files: facts about each whole file; empty if only `counts` are known.
      excluded: positions of records of each file that are not used, ascending; empty: all are used.
    """

    paths: tuple[str, ...]
    counts: tuple[int, ...]
    files: tuple[tfrecords.Counted, ...] = ()
    excluded: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def find(
        cls,
        folders: str,
        prefixes: str | Sequence[str],
        max_bad_fraction: float = 0.01,
        spare: str | None = None,
    ) -> Source:
        """Lists and counts shards; DataError if there are none, one is missing or all are empty.

        Args:
          max_bad_fraction: see `tfrecords.measure_all`; 0 for evaluation sets, which must be complete.
          spare: where to store new counts if they cannot be stored next to the files.
        """
        paths = shard_names.list_shards(folders, prefixes)
        files = tfrecords.measure_all(paths, max_bad_fraction, spare)
        source = cls(tuple(paths), tuple(file.records for file in files), tuple(files))
        if not source.total:
            raise DataError(f"the {len(paths)} shards in {folders!r} hold no records")
        return source

    @property
    def used(self) -> tuple[int, ...]:
        """Number of records to use of each file."""
        if not self.excluded:
            return self.counts
        return tuple(n - len(excluded) for n, excluded in zip(self.counts, self.excluded))

    @property
    def total(self) -> int:
        """Number of records."""
        return sum(self.used)

    def without(self, excluded: Mapping[int, np.ndarray]) -> Source:
        """Excludes records; DataError if none are left.

        Args:
          excluded: index of a file → positions of its records.
        """
        found = [excluded.get(i, np.zeros(0, np.int64)) for i in range(len(self.paths))]
        kept = [tuple(at[at < n].tolist()) for at, n in zip(found, self.counts)]
        source = dataclasses.replace(self, excluded=tuple(kept) if any(kept) else ())
        if not source.total:
            raise DataError(
                f"--exclude leaves none of the {self.total} records of the set with {self.paths[0]}"
            )
        return source

    def shards(self, number: int) -> Source:
        """Returns the first `number` files; DataError if there are fewer or they are empty."""
        if number > len(self.paths):
            raise DataError(f"{number} shards are requested, but there are {len(self.paths)}")
        first = Source(
            self.paths[:number],
            self.counts[:number],
            self.files[:number],
            self.excluded[:number],
        )
        if not first.total:
            raise DataError(f"the first {number} shards hold no records: {first.paths[0]}")
        return first

    def examples(self, number: int) -> Source:
        """Returns the first `number` records in file order; DataError if there are fewer."""
        if number > self.total:
            raise DataError(f"{number} records are requested, but there are {self.total}")
        ends = np.minimum(np.cumsum(self.used), number)
        counts = np.diff(ends, prepend=0).tolist()
        if not self.excluded:
            return dataclasses.replace(self, counts=tuple(counts))
        # The records up to the last one that is used.
        whole = [
            np.setdiff1d(np.arange(n), excluded)[:wanted].max(initial=-1) + 1
            for n, excluded, wanted in zip(self.counts, self.excluded, counts)
        ]
        every = {i: np.array(excluded, np.int64) for i, excluded in enumerate(self.excluded)}
        return dataclasses.replace(self, counts=tuple(map(int, whole))).without(every)


@dataclasses.dataclass(frozen=True)
class Share:
    """The rows of every batch that one host prepares, and in how many pieces.

    The batch is defined once for all hosts: host h of H prepares rows h·B/H … (h+1)·B/H - 1 and
    passes them in order to its replicas, in pieces of B/replicas rows. A batch therefore contains
    the same examples with the same augmentation on any number of hosts and replicas.

    Attributes:
      host, num_hosts: index of this host, and number of hosts.
      replicas: number of replicas of all hosts; a multiple of num_hosts that divides the batch.
    """

    host: int = 0
    num_hosts: int = 1
    replicas: int = 1

    def per_replica(self, batch_size: int) -> int:
        """Returns the rows of one replica; ValueError unless the replicas divide the batch."""
        if batch_size % self.replicas:
            raise ValueError(
                f"a batch of {batch_size} is not divisible by {self.replicas} replicas"
            )
        return batch_size // self.replicas

    def rows(self, batch_size: int) -> tuple[int, int]:
        """Returns (first, end) of this host's rows."""
        rows = self.per_replica(batch_size) * (self.replicas // self.num_hosts)
        return self.host * rows, (self.host + 1) * rows


WHOLE = Share()


class Places(NamedTuple):
    """Parts of files to read one after the other, int64 [n] each.

    Attributes:
      file: index of the file.
      offset: byte at which to start reading, where a record begins.
      skip, take: number of records to skip from there, then to take, including excluded ones.
      buffer: bytes per read.
      record: position in the file of the first record to take.
    """

    file: tf.Tensor
    offset: tf.Tensor
    skip: tf.Tensor
    take: tf.Tensor
    buffer: tf.Tensor
    record: tf.Tensor


class _Excluded:
    """The excluded records of all files, each as one number that orders files and positions.

    Args:
      excluded: positions of the excluded records of each file, ascending.
    """

    _FILE = 1 << 40  # More than a file has records.

    def __init__(self, excluded: Sequence[Sequence[int]]):
        files = np.repeat(np.arange(len(excluded)), list(map(len, excluded)))
        positions = np.concatenate([np.asarray(one, np.int64) for one in excluded])
        ranks = np.concatenate([np.arange(len(one)) for one in excluded])
        self._positions = tf.constant(files * self._FILE + positions)
        # Number of used records of the file before each excluded one.
        self._before = tf.constant(files * self._FILE + positions - ranks)
        self._start = tf.constant(np.cumsum([0, *map(len, excluded)])[:-1], tf.int64)

    def position(self, file: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
        """Returns the position in its file of each used record `number`; int64 [n] each."""
        key = file * self._FILE + number
        skipped = tf.searchsorted(self._before, key, "right", tf.int64)
        return number + skipped - tf.gather(self._start, file)

    def contains(self, file: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
        """Checks whether a record is excluded; int64 scalars."""
        key = (file * self._FILE + position)[None]
        ends = [tf.searchsorted(self._positions, key, side) for side in ("left", "right")]
        return (ends[0] < ends[1])[0]


class Layout:
    """A sequence of pieces of files, of which any range of records can be read.

    Args:
      source: the files.
      pieces: minimum number of pieces if there are enough records; files are cut into equal parts.
    """

    def __init__(self, source: Source, pieces: int = 1):
        counts = np.asarray(source.used, np.int64)
        parts = -(-pieces // len(counts))
        edges = counts[:, None] * np.arange(parts + 1) // parts
        sizes = np.diff(edges).ravel()
        used = sizes > 0
        self.total = int(sizes.sum())
        self._paths = tf.constant(source.paths)
        self._file = tf.constant(np.repeat(np.arange(len(counts)), parts)[used], tf.int64)
        self._first = tf.constant(edges[:, :-1].ravel()[used], tf.int64)
        self._count = tf.constant(sizes[used], tf.int64)
        files = source.files or [tfrecords.Counted(n, 0) for n in source.counts]
        marks = [file.marks or (0,) for file in files]
        self._marks = tf.constant(np.concatenate(marks), tf.int64)
        self._mark = tf.constant(np.cumsum([0, *map(len, marks)])[:-1], tf.int64)
        # Without marks, all records of a file are located from its start.
        every = [file.every or max(file.records, 1) for file in files]
        self._every = tf.constant(every, tf.int64)
        means = [file.size / max(file.records, 1) or _BUFFER for file in files]
        self._bytes = tf.constant(means, tf.float64)
        self._excluded = _Excluded(source.excluded) if source.excluded else None

    def shuffled(self, seed: tf.Tensor) -> tf.Tensor:
        """Returns the pieces in random order; `seed` is int [2]."""
        pieces = tf.range(self._count.shape[0], dtype=tf.int64)
        return tf.random.experimental.stateless_shuffle(pieces, seed)

    def places(self, order: tf.Tensor | None, begin: tf.Tensor, end: tf.Tensor) -> Places:
        """Locates the used records `begin` … `end` - 1.

        Args:
          order: order of the pieces; None is their order in the files.
        """
        count = self._count if order is None else tf.gather(self._count, order)
        ends = tf.cumsum(count)
        first = tf.searchsorted(ends, begin[None], "right")[0]
        last = tf.searchsorted(ends - count, end[None], "left")[0]
        ends, count = ends[first:last], count[first:last]
        piece = tf.range(first, last) if order is None else order[first:last]
        file, record = tf.gather(self._file, piece), tf.gather(self._first, piece)
        skip = tf.maximum(begin - ends + count, 0)
        take = tf.minimum(end - ends, 0) + count - skip
        record += skip
        if self._excluded is not None:
            after = self._excluded.position(file, record + take - 1) + 1
            record = self._excluded.position(file, record)
            take = tf.maximum(after - record, 0)
        every = tf.gather(self._every, file)
        mark, skipped = record // every, record % every
        offset = tf.gather(self._marks, tf.gather(self._mark, file) + mark)
        # Reads of equal length, none longer than the default, limit unnecessary reading.
        size = tf.cast(skipped + take, tf.float64) * tf.gather(self._bytes, file)
        buffer = tf.cast(size / tf.math.ceil(size / _BUFFER), tf.int64) + _LEAST_BUFFER
        return Places(file, offset, skipped, take, buffer, record)

    def read(self, order: tf.Tensor | None, begin: tf.Tensor, end: tf.Tensor) -> tf.data.Dataset:
        """Reads the records `begin` … `end` - 1, serialized."""
        places = self.places(order, begin, end)
        return tf.data.Dataset.from_tensor_slices(places).flat_map(self._read_place)

    def _read_place(self, place: Places) -> tf.data.Dataset:
        # `tf.data.TFRecordDataset` always begins at the start of a file.
        records = tf.raw_ops.TFRecordDatasetV2(
            filenames=tf.gather(self._paths, place.file)[None],
            compression_type="",
            buffer_size=place.buffer,
            byte_offsets=place.offset[None],
        )
        spec = tf.TensorSpec([], tf.string)
        found = tf.data.experimental.from_variant(records, spec).skip(place.skip).take(place.take)
        # A file with fewer records than were counted would shift all records that follow.
        found = found.apply(tf.data.experimental.assert_cardinality(place.take))
        excluded = self._excluded
        if excluded is None:
            return found
        numbered = found.enumerate(place.record)
        kept = numbered.filter(lambda record, _: ~excluded.contains(place.file, record))
        return kept.map(lambda _, content: content)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The order of the endless sequence of records that batches are cut from.

    Attributes:
      source: the files.
      batch_size: number of examples over all replicas.
      seed: seed of the order.
      shuffle_buffer: total number of records in the windows of all streams.
    """

    source: Source
    batch_size: int
    seed: int
    shuffle_buffer: int

    @functools.cached_property
    def layout(self) -> Layout:
        """The pieces that each epoch shuffles."""
        with tf.init_scope():  # Dataset functions share it.
            return Layout(self.source, _LEAST_PIECES)

    @functools.cached_property
    def num_streams(self) -> int:
        """Number of streams; like the number of hosts, it divides the batch size."""
        most = min(_MOST_STREAMS, max(_LEAST_STREAMS, self.source.total // _LEAST_RUN))
        return _divisor(self.batch_size, most)

    @property
    def rows(self) -> int:
        """Number of rows of a stream in each batch."""
        return self.batch_size // self.num_streams

    @property
    def window(self) -> int:
        """Number of records of a stream that are shuffled together; a whole run if all fit."""
        if self._holds_all:
            return self.source.total // self.num_streams + self.rows
        return -(-self.shuffle_buffer // self.num_streams)

    @property
    def _holds_all(self) -> bool:
        return self.shuffle_buffer >= self.source.total

    def step(self, step: int, since: int) -> int:
        """Returns the batch to read at a training step.

        Args:
          since: the step at which a training run that began with another order switched to this one.
            It continues with the first whole batch of the next epoch of this set. 0 if it began
            with this order.
        """
        if not since:
            return step
        epochs = -(-since * self.batch_size // self.source.total)
        return step - since - (-epochs * self.source.total // self.batch_size)

    def streams(self, share: Share) -> tuple[int, int]:
        """Returns (first, end) of the streams of which a host prepares rows."""
        first, end = share.rows(self.batch_size)
        return first // self.rows, -(-end // self.rows)

    def run(self, stream: tf.Tensor, epoch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns (begin, end) of a stream's run among the records of an epoch."""
        total = self.layout.total
        edges = self._before(stream, tf.stack([epoch * total, (epoch + 1) * total]))
        begin, end = tf.unstack(edges[:, 1] - edges[:, 0])
        return begin, end

    def _before(self, stream: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        """Counts the records before a stream's rows, and before their end, up to each index.

        Args:
          stream: int64 scalar.
          index: int64 [n], among the records of all epochs.

        Returns:
          int64 [2, n]: records of the streams before this one, and of these and this one.
        """
        rows = tf.stack([stream, stream + 1])[:, None] * self.rows
        whole, rest = index // self.batch_size, index % self.batch_size
        return whole * rows + tf.minimum(rest, rows)

    def windows(
        self, stream: tf.Tensor, epoch: tf.Tensor, start: int
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Finds where a stream continues in an epoch at record `start` of all epochs.

        Returns:
          (number of the window, its first record in the run, records to skip from there).
        """
        before = epoch * self.layout.total
        edges = self._before(stream, tf.stack([before, tf.maximum(before, start)]))
        done = edges[1, 1] - edges[0, 1] - edges[1, 0] + edges[0, 0]
        number = (done + self.missing(stream)) // self.window
        first = tf.maximum(number * self.window - self.missing(stream), 0)
        return number, first, done - first

    def missing(self, stream: tf.Tensor) -> tf.Tensor:
        """Returns by how many records a stream's first window is shorter than the others."""
        return stream * (0 if self._holds_all else self.window) // self.num_streams

    def order(self, epoch: tf.Tensor) -> tf.Tensor:
        """Returns the pieces of an epoch in order."""
        return self.layout.shuffled(tf.stack([tf.constant(self.seed, tf.int64), epoch]))

    def read(self, start: int, share: Share) -> tf.data.Dataset:
        """Reads (number, record) of the records of a host's streams, endlessly.

        Args:
          start: index of the first record of all hosts, at the beginning of a batch.
        """
        first, end = self.streams(share)
        data = tf.data.Dataset.range(first, end).interleave(
            functools.partial(self._with_pause, start=start),
            cycle_length=end - first,
            block_length=self.rows,
            num_parallel_calls=min(self._readers, end - first),
            deterministic=True,
        )
        data = _without_pause(data, (end - first) * self.rows).enumerate()
        low, high = share.rows(self.batch_size)
        if high - low == (end - first) * self.rows:
            return data
        # Some streams also have rows of other hosts.
        row = functools.partial(self.index, start=0, share=share)
        return data.filter(
            lambda number, _: (
                (row(number) % self.batch_size >= low) & (row(number) % self.batch_size < high)
            )
        )

    def index(self, number: tf.Tensor, start: int, share: Share) -> tf.Tensor:
        """Returns the index, among the records of all epochs, of a record numbered by `read`."""
        first, end = self.streams(share)
        width = (end - first) * self.rows
        if width == self.batch_size:
            return start + number  # Runs for each record, so each operation counts.
        return start + number // width * self.batch_size + first * self.rows + number % width

    @property
    def _readers(self) -> int:
        # Reads from a store mostly wait. On a disk, more threads than cores slow down reading.
        if object_stores.is_object_store(self.source.paths[0]):
            return _READERS
        return min(_READERS, max(2, available_cpus()))

    def _with_pause(self, stream: tf.Tensor, start: int) -> tf.data.Dataset:
        """Adds empty records for `_PAUSE` batches after a stream's rows of the first batch.

        Only these are read ahead of the first batch, so a training run that resumes does not wait
        for windows of later batches, and a caller that needs only one batch reads no more.
        """
        records, empty = (
            tf.data.Dataset.from_tensors(tf.constant(n, tf.int64)).repeat for n in (0, 1)
        )
        which = records(self.rows).concatenate(empty(_PAUSE * self.rows)).concatenate(records())
        pause = tf.data.Dataset.from_tensors("").repeat()
        return tf.data.Dataset.choose_from_datasets([self._stream(stream, start), pause], which)

    def _stream(self, stream: tf.Tensor, start: int) -> tf.data.Dataset:
        # The functions over epochs and windows are not nested: preparing a function that is created
        # again in every epoch takes longer than reading a hundred records.
        epochs = tf.data.Dataset.range(start // self.layout.total, tf.int64.max)
        windows = epochs.flat_map(lambda epoch: self._windows(stream, epoch, start))

        def shuffled(window: tf.data.Dataset, epoch: tf.Tensor, number: tf.Tensor):
            seed = tf.stack([tf.constant(self.seed, tf.int64), epoch])
            for value in (stream, number):
                seed = tf.random.experimental.stateless_fold_in(seed, value)
            kept = window.skip(tf.where(number == 0, self.missing(stream), 0))
            return _shuffle(kept, self.window, seed)

        first = tf.constant(start // self.layout.total, tf.int64)
        # Skipped records are read, but neither decoded nor augmented.
        return windows.flat_map(shuffled).skip(self.windows(stream, first, start)[2])

    def _windows(self, stream: tf.Tensor, epoch: tf.Tensor, start: int) -> tf.data.Dataset:
        """Returns (records, epoch, number) of a stream's remaining windows in an epoch."""
        begin, end = self.run(stream, epoch)
        number, first, _ = self.windows(stream, epoch, start)
        records = self.layout.read(self.order(epoch), begin + first, end)
        # The first window is filled with empty records, which are removed before it is shuffled.
        missing = tf.where(number == 0, self.missing(stream), 0)
        filled = tf.data.Dataset.from_tensors("").repeat(missing).concatenate(records)
        return tf.data.Dataset.zip(
            (
                filled.window(self.window),
                tf.data.Dataset.from_tensors(epoch).repeat(),
                tf.data.Dataset.range(number, tf.int64.max),
            )
        )


def _divisor(number: int, most: int) -> int:
    """Returns the largest divisor of `number` up to `most`."""
    return max(n for n in range(1, most + 1) if number % n == 0)


def _without_pause(data: tf.data.Dataset, width: int) -> tf.data.Dataset:
    """Removes what `Plan._with_pause` added to streams with `width` rows of each batch."""
    # In parts, because calling a function for each record takes longer than reading a small one.
    part = _divisor(width, _PART)
    begin, end = width // part, (1 + _PAUSE) * width // part

    def kept(records: tf.data.Dataset, number: tf.Tensor) -> tf.data.Dataset:
        paused = (number >= begin) & (number < end)
        return records.skip(tf.where(paused, tf.constant(part, tf.int64), 0))

    parts = tf.data.Dataset.zip((data.window(part), tf.data.Dataset.range(tf.int64.max)))
    return parts.flat_map(kept)


def _shuffle(data: tf.data.Dataset, buffer_size: int, seed: tf.Tensor) -> tf.data.Dataset:
    # `Dataset.shuffle` does not accept a tensor as seed, and this seed depends on the epoch.
    spec = data.element_spec
    shuffled = tf.raw_ops.ShuffleDataset(
        input_dataset=tf.data.experimental.to_variant(data),
        buffer_size=tf.constant(buffer_size, tf.int64),
        seed=seed[0],
        seed2=seed[1] | 1,  # Two zeros would mean a seed from the clock.
        output_types=[spec.dtype],
        output_shapes=[spec.shape],
        reshuffle_each_iteration=False,
    )
    return tf.data.experimental.from_variant(shuffled, spec)


def in_order(source: Source, begin: int, end: int) -> tf.data.Dataset:
    """Reads the records `begin` … `end` - 1 of a set, serialized, in file order."""
    return Layout(source).read(None, tf.constant(begin, tf.int64), tf.constant(end, tf.int64))
