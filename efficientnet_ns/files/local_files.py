"""Files of any file system for libraries that know only those of this machine."""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import os
from collections.abc import Iterator, Sequence

import tensorflow as tf

from efficientnet_ns.files import manifests


class FileSink(io.RawIOBase):
    """A file of any file system to write, with the interface of Python's files."""

    def __init__(self, path: str):
        super().__init__()
        self._file, self._size = tf.io.gfile.GFile(path, "wb"), 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, content) -> int:
        data = bytes(content)
        self._file.write(data)
        self._size += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@contextlib.contextmanager
def local_copies(paths: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yields path → path on this machine; files of other file systems are copied below TMPDIR."""
    with contextlib.ExitStack() as stack:
        local = {path: path for path in paths}
        remote = [path for path in paths if "://" in path]
        if remote:
            folder = stack.enter_context(manifests.scratch_folder("copies"))
            copied = {path: os.path.join(folder, os.path.basename(path)) for path in remote}
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                # Consumed, so that an error is raised.
                list(pool.map(tf.io.gfile.copy, copied.keys(), copied.values()))
            local.update(copied)
        yield local
