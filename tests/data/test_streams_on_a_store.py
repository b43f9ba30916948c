"""What a host of a training asks an object store for: at its start, in steps, and when it resumes.

The store counts requests and bytes; `benchmark --what=scale` is held to them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import gcs
import numpy as np
import pytest

from efficientnet_ns.benchmarks import scale
from efficientnet_ns.config import BenchmarkConfig
from efficientnet_ns.data.streams import Plan, Share, Source
from efficientnet_ns.files import tfrecords

HOSTS, WINDOW = 4, 32
SMALL = BenchmarkConfig(
    what="scale", hosts=HOSTS, batch_size=32, files=64, records=2068, record_bytes=1000
)
# Files of several blocks, of which TensorFlow then reads 1 MB at a time.
LARGE = dataclasses.replace(SMALL, records=1556, record_bytes=100_000)


class Written:
    """A set in the store, and what is expected of it."""

    def __init__(self, store: gcs.Store, bucket: str, config: BenchmarkConfig):
        self.config, self.folder = config, f"gs://{bucket}/set"
        self.expected = scale._Described(config)
        self.expected._plan = planned(self.expected.source, config)
        self.file = max(file.size for file in self.expected.source.files)
        numbers = iter(range(config.records))
        for path, count in zip(self.expected.source.paths, self.expected.source.counts):
            payloads = [str(next(numbers)).encode() for _ in range(count)]
            length = config.record_bytes - tfrecords.OVERHEAD
            content = b"".join(tfrecords.frame(p.ljust(length)) for p in payloads)
            store.put(bucket, f"set/{os.path.basename(path)}", content)

    def streams(self, host: int) -> int:
        first, end = self.expected._hosts[host]
        return end - first


def planned(source: Source, config: BenchmarkConfig) -> Plan:
    """A plan whose 8 streams have windows of `WINDOW` records."""
    return Plan(source, config.batch_size, 0, 8 * WINDOW)


def numbers(plan: Plan, host: int, step: int, steps: int) -> list[int]:
    """Of the records that a host reads in so many steps from one on."""
    share = Share(host, HOSTS, HOSTS)
    low, high = share.rows(plan.batch_size)
    data = plan.read(step * plan.batch_size, share).take(steps * (high - low))
    return [int(record) for _, record in data.as_numpy_iterator()]


def serve() -> None:
    """Replies to each line of arguments of `numbers`; a process with other variables does so."""
    config = BenchmarkConfig(**json.loads(sys.argv[-1]))
    plan = planned(Source.find(sys.argv[-2], "train"), config)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(numbers(plan, *json.loads(line))), flush=True)


def test_counts_are_taken_once(store, bucket):
    """By the first that starts; from then on a start is two listings, one of them of one name."""
    written = Written(store, bucket, SMALL)
    with gcs.counted(store) as first:
        counted = Source.find(written.folder, "train")
    size = written.expected.bytes
    assert size <= first["down"] <= size + 100 and first["upload"] == 1
    assert first["get"] <= SMALL.files + 2 and first["list"] + first["probe"] <= 2
    with gcs.counted(store) as other:
        assert Source.find(written.folder, "train") == counted
    counts = len(store.content(bucket, "set/counts.json"))
    assert other == {"probe": 1, "list": 1, "get": 1, "up": 0, "down": counts}
    assert counted.counts == written.expected.source.counts
    assert counted.files == written.expected.source.files


def check(store: gcs.Store, written: Written, read, client: str = "") -> None:
    """Reads an epoch on each host, then resumes; `read` has the arguments of `numbers`."""
    steps, rng = written.config.records // SMALL.batch_size, np.random.default_rng(0)
    most, all_read = written.expected.epoch()[0], []
    for host in range(HOSTS):
        # Each stream begins with the window that comes next.
        window = WINDOW * written.config.record_bytes + written.file
        ahead = written.streams(host) * window
        with gcs.counted(store, client) as epoch:
            whole = read(host, 0, steps)
        assert epoch["down"] <= most + ahead, (host, epoch)
        assert epoch["stat"] == epoch["list"] == 0
        all_read += whole
        rows = len(whole) // steps
        for step in (int(rng.integers(1, steps)), steps - 1):
            with gcs.counted(store, client) as resumed:
                assert read(host, step, 1) == whole[step * rows : (step + 1) * rows]
            needed = written.expected.resume(step)[0]
            assert needed <= written.streams(host) * window
            assert resumed["down"] <= needed + ahead, (host, step, resumed)
    # All but those of the last, incomplete batch, once.
    assert len(set(all_read)) == len(all_read) == steps * SMALL.batch_size
    assert set(all_read) <= set(range(written.config.records))


def test_a_host_reads_its_part_of_an_epoch_and_a_window_to_resume(store, bucket):
    written = Written(store, bucket, SMALL)
    plan = planned(Source.find(written.folder, "train"), SMALL)
    assert plan.num_streams == 8
    check(store, written, lambda *arguments: numbers(plan, *arguments))
    # Files are one request here; where runs meet, both streams read one.
    most = written.streams(0) * written.file
    assert written.expected.epoch()[0] <= written.expected.bytes / HOSTS + most


@pytest.mark.slow
def test_files_of_several_blocks(store, bucket, monkeypatch):
    written = Written(store, bucket, LARGE)
    monkeypatch.setenv("GCS_READ_CACHE_BLOCK_SIZE_MB", "1")
    Source.find(written.folder, "train")
    folders = [str(Path(__file__).parent), str(Path(gcs.__file__).parent)]
    code = f"import sys; sys.path[:0] = {folders}; import test_streams_on_a_store as t; t.serve()"
    arguments = [written.folder, json.dumps(dataclasses.asdict(LARGE))]
    environment = {**os.environ, **store.environment("host")}
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:

        def read(*arguments: int) -> list[int]:
            child.stdin.write(json.dumps(arguments) + "\n")
            child.stdin.flush()
            return json.loads(child.stdout.readline())

        assert child.stdout.readline() == "ready\n"
        check(store, written, read, "host")
        child.stdin.close()
    # Where a run begins or ends within a file, part of a block is read in vain.
    most = written.streams(0) * 2 << 20
    assert written.expected.epoch()[0] <= written.expected.bytes / HOSTS + most
