"""Hides the differences between object stores, `gs://`, and disks from other modules.

* A file is created or replaced atomically when it is closed: content that is in memory needs no
  temporary name. A rename is a copy and a delete; renaming a folder moves one file after the other.
* There are no folders, only names with slashes. TensorFlow creates empty objects to represent
  folders, and retries forever if the bucket does not exist.
* Every query takes a request of tens of milliseconds: whether a file exists, its size, a page of 1000
  names. An absent file takes two.
* TensorFlow reads ahead and caches lengths, so a file that another machine has rewritten is read with
  its old length, or not at all. `devices.stack` sets both before TensorFlow is imported.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import tensorflow as tf

Item = TypeVar("Item")
Result = TypeVar("Result")
_BLOCK = 1 << 20
_REQUESTS_AT_ONCE = 32
# How long TensorFlow may cache the length of a file if it was imported before this package.
_REMEMBERED_SECONDS = 5


class NoBucket(Exception):
    """The bucket of a path does not exist."""


class NotAllowed(Exception):
    """The account lacks a permission; the message is `read` or `write`."""


def probe(path: str, *, write: bool) -> None:
    """Looks up a path and, if `write`, writes and removes a file there.

    Raises:
      NoBucket, NotAllowed: If access is impossible. The path itself need not exist.
    """
    bucket, _, name = path.removeprefix("gs://").partition("/")
    folder = f"gs://{bucket}/{name.rstrip('/') or '.'}"
    try:
        tf.io.gfile.stat(f"{folder}/")
    except tf.errors.NotFoundError as e:
        # The error for an absent object differs.
        if "HTTP response code 404" in str(e):
            raise NoBucket from e
    except tf.errors.PermissionDeniedError as e:
        raise NotAllowed("read") from e
    if not write:
        return
    file = f"{folder}/.tmp-probe-{secrets.token_hex(8)}"
    try:
        with tf.io.gfile.GFile(file, "w") as f:
            f.write("")
        tf.io.gfile.remove(file)
    except tf.errors.PermissionDeniedError as e:
        raise NotAllowed("write") from e


def is_object_store(path: str | os.PathLike) -> bool:
    """Checks whether a path is on an object store."""
    return os.fspath(path).startswith("gs://")


def make_folder(path: str) -> None:
    """Makes a folder and its parents if the file system has folders."""
    if not is_object_store(path):
        tf.io.gfile.makedirs(path or ".")


def names(folder: str) -> list[str]:
    """Lists the sorted names directly in a folder, without slashes; empty if it does not exist."""
    return sorted(filter(None, (name.rstrip("/") for name in _listed(folder))))


def walk(top: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yields (folder, folders in it, files in it) from the top down, like `tf.io.gfile.walk`.

    Only for object stores, whose listings distinguish folders from files. Lists each level at once.
    """
    found: dict[str, tuple[list[str], list[str]]] = {}
    level = [top.rstrip("/")]
    while level:
        for folder, listed in zip(level, each(_listed, level)):
            below = sorted(name.rstrip("/") for name in listed if name.endswith("/"))
            found[folder] = below, sorted(n for n in listed if n and not n.endswith("/"))
        level = [f"{folder}/{name}" for folder in level for name in found[folder][0]]
    # The caller may remove folders from a list to skip their content.
    waiting = [top.rstrip("/")]
    while waiting:
        folder = waiting.pop()
        yield folder, *found[folder]
        waiting += [f"{folder}/{name}" for name in reversed(found[folder][0])]


def _listed(folder: str) -> list[str]:
    if not is_object_store(folder) and not tf.io.gfile.isdir(folder):
        return []
    try:
        return tf.io.gfile.listdir(folder)
    except tf.errors.NotFoundError:
        return []


def read(path: str) -> bytes | None:
    """Reads a file's current content, even if another machine rewrites it; None if it does not exist.

    On object stores, this takes a single request up to the size of the read-ahead.
    """
    last = _REMEMBERED_SECONDS + 2  # TensorFlow counts whole seconds and includes both ends.
    for attempt in range(last + 1):
        try:
            # Without a size, TensorFlow would request the length first, which may then change.
            parts: list[bytes] = []
            with tf.io.gfile.GFile(path, "rb") as f:
                while part := f.read(_BLOCK):
                    parts.append(part)
            return b"".join(parts)
        except tf.errors.NotFoundError:
            return None
        except tf.errors.InternalError:
            if attempt == last or not is_object_store(path):
                raise
            time.sleep(1)  # The file is shorter than its cached length.
    raise AssertionError("unreachable")


def size(path: str) -> int | None:
    """Returns the size of a file in bytes, or None if it does not exist."""
    try:
        return tf.io.gfile.stat(path).length
    except tf.errors.NotFoundError:
        return None


def each(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Maps a function that waits for requests over items, many at once.

    Raises the first error when all calls have ended.
    """
    if len(items) < 2:
        return list(map(function, items))
    with concurrent.futures.ThreadPoolExecutor(min(_REQUESTS_AT_ONCE, len(items))) as pool:
        return list(pool.map(function, items))


def sizes(paths: Sequence[str]) -> list[int | None]:
    """Returns the `size` of each file, with many requests at once."""
    return each(size, paths) if any(map(is_object_store, paths)) else list(map(size, paths))


def remove(path: str) -> None:
    """Removes a file if it exists; another process may do so at the same time."""
    with contextlib.suppress(tf.errors.NotFoundError):
        tf.io.gfile.remove(path)
