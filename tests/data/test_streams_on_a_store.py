"""Object-store requests of a training host: at the start, in steps, and when it resumes.

The store counts requests and bytes, which must agree with `benchmark --what=scale`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gcs
import numpy as np
import pytest
from fakes import mostly_slow

from efficientnet_ns.benchmarks import scale
from efficientnet_ns.config import BenchmarkConfig
from efficientnet_ns.data.streams import Plan, Share, Source
from efficientnet_ns.files import tfrecords

WINDOW = 32
SMALL = BenchmarkConfig(what="scale", batch_size=32, files=64, records=2068, record_bytes=1000)
# Files of several blocks, which TensorFlow reads 1 MB at a time.
LARGE = dataclasses.replace(SMALL, records=1556, record_bytes=100_000)
FOLDERS = [str(Path(__file__).parent), str(Path(gcs.__file__).parent)]


class Written:
    """A set in the store, and its expected requests and bytes."""

    def __init__(self, store: gcs.Store, bucket: str, config: BenchmarkConfig):
        self.config, self.folder = config, f"gs://{bucket}/set"
        expected = self.expected(1)
        self.source, self.bytes = expected.source, expected.bytes
        self.file = max(file.size for file in self.source.files)
        numbers = iter(range(config.records))
        for path, count in zip(self.source.paths, self.source.counts):
            payloads = [str(next(numbers)).encode() for _ in range(count)]
            length = config.record_bytes - tfrecords.OVERHEAD
            content = b"".join(tfrecords.frame(p.ljust(length)) for p in payloads)
            store.put(bucket, f"set/{os.path.basename(path)}", content)

    def expected(self, hosts: int) -> scale._Described:
        described = scale._Described(dataclasses.replace(self.config, hosts=hosts))
        described._plan = planned(described.source, self.config)
        return described


def planned(source: Source, config: BenchmarkConfig) -> Plan:
    """Returns a plan whose 8 streams have windows of `WINDOW` records."""
    return Plan(source, config.batch_size, 0, 8 * WINDOW)


def batches(plan: Plan, hosts: int, host: int, step: int, steps: int) -> Iterator[list[int]]:
    """Yields the record numbers of `steps` batches that a host reads, starting at a step."""
    share = Share(host, hosts, hosts)
    low, high = share.rows(plan.batch_size)
    # Without `take`, tf.data would read ahead.
    data = plan.read(step * plan.batch_size, share).take(steps * (high - low))
    records = (int(record) for _, record in data.as_numpy_iterator())
    for _ in range(steps):
        yield list(itertools.islice(records, high - low))


def serve() -> None:
    """Prints the batches requested by each input line, in a process with its own environment."""
    config = BenchmarkConfig(**json.loads(sys.argv[-1]))
    plan = planned(Source.find(sys.argv[-2], "train"), config)
    print("ready", flush=True)
    for line in sys.stdin:
        for batch in batches(plan, *json.loads(line)):
            print(json.dumps(batch), flush=True)


@contextlib.contextmanager
def serving(store: gcs.Store, written: Written, client: str) -> Iterator[subprocess.Popen[str]]:
    """Yields a process that runs `serve` as a client of the store."""
    code = f"import sys; sys.path[:0] = {FOLDERS}; import test_streams_on_a_store as t; t.serve()"
    arguments = [written.folder, json.dumps(dataclasses.asdict(written.config))]
    command = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, **store.environment(client)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as child:
        assert child.stdin and child.stdout and child.stdout.readline() == "ready\n"
        yield child
        child.stdin.close()


def ask(child: subprocess.Popen[str], *arguments: int) -> Iterator[list[int]]:
    """Yields batches of a `serving` process for (hosts, host, step, steps) until it is killed."""
    assert child.stdin and child.stdout
    child.stdin.write(json.dumps(arguments) + "\n")
    child.stdin.flush()
    for _ in range(arguments[-1]):
        line = child.stdout.readline()
        if not line.endswith("\n"):
            return
        yield json.loads(line)


def test_counts_are_taken_once(store, bucket):
    """The first host counts. Later starts take two listings, one of them of a single name."""
    written = Written(store, bucket, SMALL)
    with gcs.counted(store) as first:
        counted = Source.find(written.folder, "train")
    size = written.bytes
    assert size <= first["down"] <= size + 100 and first["upload"] == 1
    assert first["get"] <= SMALL.files + 2 and first["list"] + first["probe"] <= 2
    with gcs.counted(store) as other:
        assert Source.find(written.folder, "train") == counted
    counts = len(store.content(bucket, "set/counts.json"))
    assert other == {"probe": 1, "list": 1, "get": 1, "up": 0, "down": counts}
    assert counted.counts == written.source.counts
    assert counted.files == written.source.files


def check(store: gcs.Store, written: Written, read, shares, client: str = "") -> list[tuple]:
    """Reads an epoch and resumes on each host; `read` takes the arguments of `ask`.

    Returns:
      (hosts, host, requests of the epoch, requests of the resumed step) for each host.
    """
    steps, rng = written.config.records // SMALL.batch_size, np.random.default_rng(0)
    whole = list(read(1, 0, 0, steps))
    records = np.concatenate(whole)
    # Every record once, except those of the last, incomplete batch.
    assert len(set(records)) == len(records) == steps * SMALL.batch_size
    assert set(records) <= set(range(written.config.records))
    window, found = WINDOW * written.config.record_bytes, []
    for hosts, host in shares:
        expected, streams = written.expected(hosts), 8 // hosts
        rows = slice(*Share(host, hosts, hosts).rows(SMALL.batch_size))
        own = [batch[rows] for batch in whole]
        with gcs.counted(store, client) as epoch:
            assert list(read(hosts, host, 0, steps)) == own
        # A window lies in up to three pieces, which are read in blocks. At the end of the epoch,
        # each stream has already started the next epoch.
        most, requests = expected.epoch()
        a_window = streams * (window + 3 * min(written.file, scale._block()))
        assert epoch["down"] <= most + a_window, (hosts, host, epoch)
        assert epoch["get"] <= requests + streams * (3 + window // scale._block())
        assert epoch["get"] == epoch.requests
        for step in (int(rng.integers(1, steps)), steps - 1):
            with gcs.counted(store, client) as resumed:
                assert list(read(hosts, host, step, 1)) == [own[step]]
            needed, requests = expected.resume(step)
            # Nothing is read ahead. TensorFlow starts one byte before a place, and if a place ends
            # at a block boundary, it may request the next block.
            more = streams if written.file > scale._block() else 0
            assert resumed.requests == resumed["get"] <= requests + more
            most = needed + requests + more * scale._block()
            assert resumed["down"] <= most, (hosts, host, step, resumed)
            assert needed <= a_window
        found.append((hosts, host, epoch, resumed))
    return found


@pytest.mark.parametrize("files", mostly_slow([1, 7, 64], [7]))
def test_a_host_reads_its_part_of_an_epoch_and_a_window_to_resume(store, bucket, files):
    """For any number of hosts: equal batches, reads as planned, and no read-ahead to resume."""
    written = Written(store, bucket, dataclasses.replace(SMALL, files=files))
    plan = planned(Source.find(written.folder, "train"), written.config)
    assert plan.num_streams == 8
    check(store, written, functools.partial(batches, plan), [(1, 0), (2, 1), (4, 2), (8, 5)])


@pytest.mark.slow
@pytest.mark.parametrize("files", [1, 7, 64])
def test_files_of_several_blocks(store, bucket, monkeypatch, files):
    written = Written(store, bucket, dataclasses.replace(LARGE, files=files))
    monkeypatch.setenv("GCS_READ_CACHE_BLOCK_SIZE_MB", "1")
    Source.find(written.folder, "train")
    shares = [(hosts, host) for hosts in (1, 2, 4, 8) for host in range(hosts)]
    with serving(store, written, "host") as child:
        found = check(store, written, functools.partial(ask, child), shares, "host")
    for hosts in (1, 2, 4, 8):
        # At the start of each run or piece of a file (64 to 70 pieces), part of a block is wasted.
        most = (72 + 2 * 8) // hosts << 20
        assert written.expected(hosts).epoch()[0] <= written.bytes / hosts + most
        costs = [(epoch, resumed) for n, _, epoch, resumed in found if n == hosts]
        for what, counts in zip(("epoch", "resume"), zip(*costs)):
            size, requests = (max(c[key] for c in counts) for key in ("down", "get"))
            print(f"{files} files, {hosts} hosts, {what}: {size / 1e6:.1f} MB, {requests} requests")


@pytest.mark.slow
def test_a_host_is_killed_and_resumes(store, bucket, rng):
    """After a kill at any read request, another process continues with the next batches."""
    written = Written(store, bucket, dataclasses.replace(SMALL, files=7))
    plan = planned(Source.find(written.folder, "train"), written.config)
    steps, hosts, host = 2 * SMALL.records // SMALL.batch_size, 4, 1
    expected = list(batches(plan, hosts, host, 0, steps))
    seen: list[list[int]] = []
    for skip in [*rng.integers(2, 12, 3).tolist(), None]:
        with serving(store, written, "host") as child:
            if skip is not None:
                store.watch("host", child.pid)
                store.fail("get .*/train-", skip=skip, client="host")
            begun = len(seen)
            seen += ask(child, hosts, host, begun, steps - begun)
            assert (child.wait() == -signal.SIGKILL) if skip is not None else len(seen) == steps
    assert seen == expected
