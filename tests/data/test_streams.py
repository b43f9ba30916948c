"""Streams: the same batches for any number of hosts, each of which reads only its part."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from fakes import mostly_slow

from efficientnet_ns.data import streams
from efficientnet_ns.data.streams import Plan, Share
from efficientnet_ns.files import shard_names, tfrecords
from efficientnet_ns.files.errors import DataError

SIZE = 400  # Bytes of a payload.
BATCH = 32
COUNT = 2048  # The payload of a record is its number, padded.
BUFFER = 256


def payload(number: int) -> bytes:
    return b"%d " % number + b"." * SIZE


def write_set(folder: Path, counts: list[int]) -> streams.Source:
    """Writes files with these numbers of records, numbered consecutively across files."""
    folder.mkdir(exist_ok=True)
    for shard, (count, end) in enumerate(zip(counts, np.cumsum(counts))):
        path = folder / shard_names.shard_name("train", shard, len(counts))
        tfrecords.write(str(path), [payload(i) for i in range(end - count, end)])
    tfrecords.note_counts([str(folder / path) for path in folder.iterdir()])
    return streams.Source.find(str(folder), "train")


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Callable[[int], streams.Source]:
    base = tmp_path_factory.mktemp("sets")

    @functools.cache
    def made(files: int) -> streams.Source:
        counts = [len(part) for part in np.array_split(np.arange(COUNT), files)]
        return write_set(base / f"{files}", counts)

    return made


def read(
    source: streams.Source,
    start_step: int,
    steps: int,
    share: Share = streams.WHOLE,
    *,
    batch: int = BATCH,
    buffer: int = BUFFER,
    seed: int = 3,
) -> np.ndarray:
    """Returns the index and record of a host's rows as int64 [steps, rows, 2]."""
    plan, start = Plan(source, batch, seed, buffer), start_step * batch
    low, high = share.rows(batch)

    def numbered(number, record):
        record = tf.strings.to_number(tf.strings.split(record, " ")[0], tf.int64)
        return tf.stack([plan.index(number, start, share), record])

    data = plan.read(start, share).map(numbered).batch(high - low).take(steps)
    return np.stack(list(data.as_numpy_iterator()))


def places(source: streams.Source, share: Share) -> Counter[tuple[int, int]]:
    """Returns (file, records read from it) of a host's first epoch, according to the plan."""
    plan, zero = Plan(source, BATCH, 3, BUFFER), tf.constant(0, tf.int64)
    found: Counter[tuple[int, int]] = Counter()
    for stream in range(*plan.streams(share)):
        run = plan.run(tf.constant(stream, tf.int64), zero)
        one = plan.layout.places(plan.order(zero), *run)
        found.update(zip(one.file.numpy().tolist(), (one.skip + one.take).numpy().tolist()))
    return found


@pytest.fixture
def opened(monkeypatch) -> Iterator[list[tuple[int, int]]]:
    """Records (file number, records read from it) each time a file is opened."""
    places: list[tuple[int, int]] = []
    read_place = streams.Layout._read_place

    def noted(self, place):
        def note(file, skip, take):
            places.append((int(file), int(skip + take)))
            return file

        file = tf.numpy_function(note, [place.file, place.skip, place.take], tf.int64)
        return read_place(self, place._replace(file=tf.ensure_shape(file, [])))

    monkeypatch.setattr(streams.Layout, "_read_place", noted)
    yield places


@pytest.mark.parametrize("files", mostly_slow([1, 7, 64], [7]))
def test_hosts_share_one_batch_and_one_reading(sets, files, opened):
    """Hosts get equal batches, each record once per epoch, and read 1/hosts of bytes and files."""
    source, steps = sets(files), COUNT // BATCH
    whole = read(source, 0, steps)
    np.testing.assert_array_equal(whole[..., 0].ravel(), np.arange(COUNT))
    assert sorted(whole[..., 1].ravel()) == list(range(COUNT))
    everyone = [(8, host) for host in range(8)] if files == 7 else [(8, 0), (8, 5)]
    for hosts, host in [(2, 1), (4, 2), *everyone]:
        opened.clear()
        share = Share(host, hosts, hosts)
        own = read(source, 0, steps, share)
        np.testing.assert_array_equal(own, whole[:, slice(*share.rows(BATCH))])
        planned = places(source, share)
        assert planned.total() > 0 and not planned - Counter(opened)
        # Each stream reads ahead at most two windows of 32 records of the next epoch, in pieces of
        # 29 or more.
        assert (Counter(opened) - planned).total() <= 6 * 8 // hosts
        assert sum(n * times for (_, n), times in planned.items()) <= 1.02 * COUNT / hosts
        if files == 64:
            assert len({file for file, _ in planned}) == 64 / hosts


@pytest.mark.parametrize(
    "counts, batch, hosts",
    [
        (
            [5, 0, 31, 1, 3, 60],
            12,
            6,
        ),  # Unequal files, one of them empty; the total is not a multiple of the batch size.
        ([7, 4], 16, 4),  # Fewer records than rows in a batch.
        ([40] * 9, 30, 15),  # More hosts than streams.
        ([40] * 9, 20, 4),  # Hosts whose rows are not a whole number of streams.
    ],
)
def test_every_epoch_has_every_record_once(tmp_path, counts, batch, hosts):
    source, epochs = write_set(tmp_path, counts), 3
    steps = -(-epochs * source.total // batch)
    whole = read(source, 0, steps, batch=batch, buffer=30)
    records = whole[..., 1].ravel()[: epochs * source.total].reshape(epochs, -1)
    for epoch in records:
        assert sorted(epoch) == list(range(source.total))
    assert len({tuple(epoch) for epoch in records}) == epochs
    share = Share(1, hosts, hosts)
    own = read(source, 0, steps, share, batch=batch, buffer=30)
    np.testing.assert_array_equal(own, whole[:, slice(*share.rows(batch))])


@pytest.mark.parametrize("files", [1, 7, 64])
def test_a_host_resumes_anywhere_by_a_window_and_a_file(sets, files, opened, rng):
    """It yields the same records and reads no more than the window and the file containing it."""
    source, share = sets(files), Share(1, 4, 4)
    plan = Plan(source, BATCH, 3, BUFFER)
    first, end = plan.streams(share)
    whole = read(source, 0, 2 * COUNT // BATCH, share)
    for step in rng.choice(len(whole) - 2, 2, replace=False):
        opened.clear()
        np.testing.assert_array_equal(read(source, step, 2, share), whole[step : step + 2])
        ahead = plan.window + 2 * plan.rows * 2  # The next window may have started.
        limit = (end - first) * (plan.window + ahead + max(source.counts))
        assert sum(count for _, count in opened) <= limit


@pytest.mark.parametrize(
    "step, since, expected", [(7, 0, 7), (30, 30, 32), (35, 30, 37), (32, 32, 32), (65, 33, 96)]
)
def test_steps_of_a_training_begun_in_another_order(sets, step, since, expected):
    """An epoch has 32 batches."""
    assert Plan(sets(7), 64, 0, 1).step(step, since) == expected


def test_a_file_with_fewer_records_than_counted_is_an_error(tmp_path):
    source = write_set(tmp_path, [8, 8])
    tfrecords.write(source.paths[1], [payload(i) for i in range(7)])
    with pytest.raises(tf.errors.OpError, match="elements"):
        read(streams.Source(source.paths, source.counts), 0, 4, batch=4)


def test_marks_save_reading_files_from_their_start(sets, opened):
    """Without marks, a run starting inside a file reads all before it; the result is the same."""
    source, share = sets(1), Share(1, 2, 2)
    expected = read(source, 5, 3, share)
    with_marks = sum(count for _, count in opened)
    bare = streams.Source(source.paths, source.counts)
    opened.clear()
    np.testing.assert_array_equal(read(bare, 5, 3, share), expected)
    assert sum(count for _, count in opened) > 5 * with_marks


def test_records_move_as_far_as_in_one_buffer(sets):
    """Neighbors in a file move a third of the windows apart, and the order of files changes."""
    source, steps = sets(64), COUNT // BATCH
    epochs = read(source, 0, 2 * steps)[..., 1].reshape(2, steps, BATCH)
    for buffer, windows in ((BUFFER, BUFFER / BATCH), (COUNT, steps)):
        when = np.empty(COUNT, int)
        batches = read(source, 0, steps, buffer=buffer)[..., 1]
        when[batches.ravel()] = np.repeat(np.arange(steps), BATCH)
        same_file = np.arange(COUNT - 1) % 32 != 31
        apart = np.abs(np.diff(when))[same_file]
        longest = min(windows, 32 / 4)  # A file stays within one stream's run and may end it.
        assert apart.mean() > longest / 5
    # Mean positions of each file's records in two consecutive epochs.
    middle = [
        [np.mean(np.nonzero(epoch // 32 == file)[0]) for file in range(64)] for epoch in epochs
    ]
    assert abs(np.corrcoef(middle[0], middle[1])[0, 1]) < 0.5
    assert abs(np.corrcoef(middle[0], np.arange(64))[0, 1]) < 0.5


def test_a_small_set_is_shuffled_whole(sets):
    """For one sorted file, the order of records is independent of their positions in the file."""
    when = np.argsort(read(sets(1), 0, COUNT // BATCH, buffer=COUNT)[..., 1].ravel())
    assert abs(np.corrcoef(when, np.arange(COUNT))[0, 1]) < 0.1
    batches = when.reshape(-1, BATCH) // BATCH  # The batches of each part of the file.
    assert all(len(set(part)) > BATCH / 2 for part in batches)


@pytest.mark.parametrize(
    "batch, total, expected",
    [(4096, 1 << 20, 256), (28672, 130_000_000, 256), (100, 1 << 20, 100), (514, 1 << 20, 2)]
    + [(64, 1437, 8), (20, 300, 5), (1, 300, 1)],
)
def test_number_of_streams(batch, total, expected):
    assert Plan(streams.Source(("a",), (total,)), batch, 0, 1).num_streams == expected


@pytest.mark.parametrize("begin, end", [(0, 23), (3, 4), (7, 22), (23, 23)])
def test_a_part_of_a_set_in_order(tmp_path, begin, end):
    source = write_set(tmp_path, [8, 0, 8, 7])
    found = list(streams.in_order(source, begin, end).as_numpy_iterator())
    assert found == [payload(i) for i in range(begin, end)]


# --- Excluded records -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def excluding(sets) -> tuple[streams.Source, set[int]]:
    """Returns a set of 7 files without some records, and the numbers of these."""
    source = sets(7)
    starts = np.cumsum([0, *source.counts])
    positions = {
        0: np.arange(source.counts[0]),  # A whole file.
        1: np.array([0, 1, 5, 6, source.counts[1] - 1, source.counts[1] + 3]),
        4: np.arange(0, source.counts[4], 3),
        6: np.array([100]),
    }
    numbers = {int(starts[f] + at) for f, some in positions.items() for at in some.tolist()}
    return source.without(positions), numbers - {int(starts[1] + source.counts[1] + 3)}


def test_excluded_records_are_not_read(excluding):
    source, excluded = excluding
    left = sorted(set(range(COUNT)) - excluded)
    assert source.total == len(left) < COUNT
    records = streams.in_order(source, 0, source.total).as_numpy_iterator()
    assert [int(record.split()[0]) for record in records] == left
    records = streams.in_order(source, 500, 700).as_numpy_iterator()
    assert [int(record.split()[0]) for record in records] == left[500:700]


def test_epochs_without_excluded_records(excluding):
    """Each used record comes once per epoch, for any number of hosts, and after a restart."""
    source, excluded = excluding
    steps = 2 * source.total // BATCH
    whole = read(source, 0, steps)
    for epoch in range(2):
        numbers = whole[..., 1].ravel()[epoch * source.total : (epoch + 1) * source.total]
        assert len(set(numbers)) == len(numbers) and not set(numbers) & excluded
    assert (
        set(numbers) <= set(whole[..., 1].ravel()[: source.total]) == set(range(COUNT)) - excluded
    )
    share = Share(1, 4, 4)
    own = read(source, 0, steps, share)
    np.testing.assert_array_equal(own, whole[:, slice(*share.rows(BATCH))])
    np.testing.assert_array_equal(read(source, 37, 20), whole[37:57])


def test_first_examples_without_excluded_records(excluding):
    source, excluded = excluding
    left = sorted(set(range(COUNT)) - excluded)
    for number in (1, 2, 300, source.total):
        some = source.examples(number)
        assert some.total == number
        records = streams.in_order(some, 0, number).as_numpy_iterator()
        assert [int(record.split()[0]) for record in records] == left[:number]


def test_first_shards_without_excluded_records(excluding):
    source, _ = excluding
    assert source.shards(2).total == sum(source.used[:2]) == source.counts[1] - 5


def test_nothing_is_left(sets):
    source = sets(7)
    everything = {file: np.arange(count) for file, count in enumerate(source.counts)}
    with pytest.raises(DataError, match=f"leaves none of the {COUNT} records"):
        source.without(everything)
    assert source.without({2: np.array([10**6])}) == source  # Beyond the end of the file.
