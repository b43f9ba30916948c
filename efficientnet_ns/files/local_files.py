"""Files of any file system and name for libraries that support only some of them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence

import tensorflow as tf

from efficientnet_ns.files import atomic, object_stores
from efficientnet_ns.files.paths import is_pattern, listed


class FileSink(io.RawIOBase):
    """A writable file of any file system with the interface of Python's files."""

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
    """Yields path → path on this machine; copies files of other file systems to TMPDIR."""
    with contextlib.ExitStack() as stack:
        local = {path: path for path in paths}
        remote = [path for path in paths if "://" in path]
        if remote:
            folder = stack.enter_context(atomic.scratch_folder("copies"))
            copied = {path: os.path.join(folder, os.path.basename(path)) for path in remote}
            require_space(remote)
            object_stores.each(lambda pair: tf.io.gfile.copy(*pair), list(copied.items()))
            local.update(copied)
        yield local


def require_space(paths: Sequence[str]) -> None:
    """Raises OSError if TMPDIR has too little space for copies of files."""
    require_bytes(sum(filter(None, object_stores.sizes(paths))), f"copies of {paths[0]} …")


def require_bytes(needed: float, what: str) -> None:
    """Raises OSError if TMPDIR has less space, before hours of work end with a full disk."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{what}: {needed / 1e9:.1f} GB are required in {folder}, where {free / 1e9:.1f} GB are free. "
            "Set TMPDIR to a folder on a larger disk."
        )


@contextlib.contextmanager
def without_wildcards(path: str) -> Iterator[str]:
    """Yields a path to the same files for TensorFlow readers that interpret paths as patterns.

    This is `path` itself unless it has wildcards or is on an object store. Otherwise, TMPDIR has links
    or, for a store, copies while the block runs: TensorFlow reads with random access, and a store
    would send most of the data several times.

    Args:
      path: a folder or the prefix of a checkpoint.

    Raises:
      OSError: If TMPDIR also has wildcards.
    """
    remote = object_stores.is_object_store(path)
    if not (is_pattern(path) or remote):
        yield path
        return
    with atomic.scratch_folder("paths") as scratch:
        if is_pattern(scratch):
            raise OSError(
                f"TensorFlow interprets {path} as a pattern, and also the folder for temporary files, "
                f"{os.path.dirname(scratch)}: set TMPDIR to a folder without * ? [ and \\"
            )
        targets = {file: os.path.join(scratch, "at" + file[len(path) :]) for file in _files(path)}
        if remote:
            require_space([*targets])
        for target in targets.values():
            os.makedirs(os.path.dirname(target), exist_ok=True)
        object_stores.each(lambda pair: _link(*pair), list(targets.items()))
        yield os.path.join(scratch, "at")


def _files(path: str) -> list[str]:
    if not tf.io.gfile.isdir(path):
        folder, base = os.path.split(path)
        return listed(folder or ".", re.escape(base) + r"\..*")
    return [os.path.join(at, name) for at, _, names in tf.io.gfile.walk(path) for name in names]


def _link(source: str, target: str) -> None:
    # Never links a folder, because the removal of abandoned folders would follow the link.
    if "://" in source:
        tf.io.gfile.copy(source, target)
    else:
        os.symlink(os.path.abspath(source), target)
