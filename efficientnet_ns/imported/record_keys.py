"""Keys by which other programs identify the images of a set of records: file name or content hash.

One Parquet file per shard, `keys-00003-of-00128.parquet`, with one row per record: `shard` int32,
`position` int64, `name` (its `image/filename`) and `hash` (SHA-256 of the encoded image, in
hexadecimal digits, as `sha256sum` prints it); null if a record has none.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Sequence

from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.config.processes import run_each
from efficientnet_ns.files import (
    local_files,
    manifests,
    object_stores,
    shard_names,
    tfexamples,
    tfrecords,
)
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.progress import Progress

# A process takes seconds to start, which pays off only with this much to read.
_BYTES_PER_PROCESS = 256 << 20


def write_keys(sources: Sequence[str], folder: str) -> list[str]:
    """Writes the keys of each shard of a set to `folder`; verifies and skips finished shards.

    Returns:
      The paths of the Parquet files.
    """
    stages = []
    for shard, source in enumerate(sources):
        name = f"{shard_names.shard_name('keys', shard, len(sources))}.parquet"
        path = os.path.join(folder, name)
        settings = {"input": manifests.fingerprint([source])}
        stages.append(manifests.Stage(f"{path}.manifest.json", [path], settings))
    todo = [
        (source, shard, stage)
        for shard, (source, stage) in enumerate(zip(sources, stages))
        if not stage.done()
    ]
    size = sum(filter(None, object_stores.sizes([source for source, *_ in todo])))
    processes = min(len(todo), available_cpus(), size // _BYTES_PER_PROCESS)
    with Progress(len(todo), "reading names and hashes", "shards") as progress:
        for _ in run_each(_write, todo, processes):
            progress.update(1)
    return [stage.outputs[0] for stage in stages]


def first_name(sources: Sequence[str], counts: Sequence[int]) -> str:
    """Returns the file name in the first record of a set; "" if it is unreadable or has none."""
    for source in itertools.compress(sources, counts):
        with contextlib.suppress(DataError):
            return tfexamples.file_name(tfrecords.payloads_of(source, [0])[0])
    return ""


def _write(source: str, shard: int, stage: manifests.Stage) -> None:
    import pyarrow
    import pyarrow.parquet

    names, hashes = [], []
    for record in tfrecords.read(source):
        name = content = None
        try:
            if record.payload is not None:
                content = hashlib.sha256(tfexamples.image_bytes(record.payload)).hexdigest()
                # "" would be a key shared by all records without a name; null is no key.
                name = tfexamples.file_name(record.payload) or None
        except DataError:
            pass  # Labeling reports the reason; here, the record has no keys.
        names.append(name)
        hashes.append(content)
    columns = {
        "shard": pyarrow.array([shard] * len(names), pyarrow.int32()),
        "position": pyarrow.array(range(len(names)), pyarrow.int64()),
        "name": pyarrow.array(names, pyarrow.string()),
        "hash": pyarrow.array(hashes, pyarrow.string()),
    }
    with stage.write() as (temporary, counts):
        with local_files.FileSink(temporary[stage.outputs[0]]) as sink:
            pyarrow.parquet.write_table(pyarrow.table(columns), sink)
        counts.update(records=len(names))
