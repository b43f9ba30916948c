"""Atomic writes, and temporary files that do not outlive their process.

A temporary name contains the machine and the process, so that the next process on a machine can
recognize and remove what a killed one left behind.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import tempfile
import time
from collections.abc import Container, Iterator, Sequence

import tensorflow as tf

from efficientnet_ns.files import object_stores
from efficientnet_ns.files.paths import listed

_PREFIX = ".tmp-"
_OLD_SECONDS = 24 * 3600


def temporary_name(path: str) -> str:
    """Returns a name in the same folder that no record pattern matches, private to this process."""
    folder, base = os.path.split(path)
    return os.path.join(folder, f"{_temporary_prefix()}{os.getpid()}-{base}")


def remove_abandoned(paths: Sequence[str]) -> None:
    """Removes temporary files for `paths` that killed processes left behind.

    Processes of other machines cannot be checked; their files are removed when they are a day old.
    """
    wanted: dict[str, set[str]] = {}
    for path in paths:
        folder, base = os.path.split(path)
        wanted.setdefault(folder, set()).add(base)
    for folder, bases in wanted.items():
        for found in listed(folder or ".", re.escape(_PREFIX) + ".*"):
            name = os.path.basename(found)
            if _abandoned(name) in bases or (is_temporary(name, bases) and _is_old(found)):
                object_stores.remove(found)


def _is_old(path: str) -> bool:
    try:
        return tf.io.gfile.stat(path).mtime_nsec < (time.time() - _OLD_SECONDS) * 1e9
    except tf.errors.NotFoundError:
        return False


def remove_abandoned_folders(parent: str) -> None:
    """Removes temporary folders of this machine's killed processes directly in `parent`."""
    for name in object_stores.names(parent):
        path = os.path.join(parent, name)
        if _abandoned(name) is not None and tf.io.gfile.isdir(path):
            # Another process may remove it at the same time, and in a TMPDIR that users share, it
            # may belong to another user.
            gone_or_foreign = (tf.errors.NotFoundError, tf.errors.PermissionDeniedError)
            with contextlib.suppress(*gone_or_foreign):
                tf.io.gfile.rmtree(path)


def _temporary_prefix() -> str:
    return f"{_PREFIX}{socket.gethostname()}-"


def is_temporary(name: str, of: Container[str]) -> bool:
    """Checks whether `name` is any process's temporary name for a file name in `of`."""
    # Machine names may also contain numbers.
    places = (match.end() for match in re.finditer(r"-\d+(?=-)", name))
    return name.startswith(_PREFIX) and any(name[place + 1 :] in of for place in places)


def _abandoned(name: str) -> str | None:
    """Returns the file name that a dead process's temporary `name` was for; None for other names."""
    if not name.startswith(_temporary_prefix()):
        return None
    # If there is no number, the name is not one of ours.
    pid, _, base = name[len(_temporary_prefix()) :].partition("-")
    return base if pid.isdigit() and not is_running(int(pid)) else None


def scratch_name(purpose: str) -> str:
    """Returns a new name in TMPDIR for files that are needed while this process runs.

    Removes files that killed processes left there.
    """
    parent = tempfile.gettempdir()
    remove_abandoned_folders(parent)
    name = f"efficientnet_ns-{purpose}-{secrets.token_hex(4)}"
    return temporary_name(os.path.join(parent, name))


@contextlib.contextmanager
def scratch_folder(purpose: str) -> Iterator[str]:
    """Yields a folder with a `scratch_name` and removes it when the block ends."""
    folder = scratch_name(purpose)
    tf.io.gfile.makedirs(folder)
    try:
        yield folder
    finally:
        tf.io.gfile.rmtree(folder)


def is_running(pid: int) -> bool:
    """Checks whether this machine has a process with this ID."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def atomic_path(path: str) -> Iterator[str]:
    """Yields a temporary name; renames it to `path` when the block ends without an exception."""
    temporary = temporary_name(path)
    try:
        yield temporary
        tf.io.gfile.rename(temporary, path, overwrite=True)
    except BaseException:
        object_stores.remove(temporary)
        raise


def write(path: str, content: str | bytes, *, clean: bool = False) -> None:
    """Writes a file atomically.

    Args:
      clean: whether to first remove its temporary files of killed processes; lists the folder.
    """
    if clean:
        remove_abandoned([path])
    mode = "w" if isinstance(content, str) else "wb"
    name = (
        contextlib.nullcontext(path) if object_stores.is_object_store(path) else atomic_path(path)
    )
    with name as temporary, tf.io.gfile.GFile(temporary, mode) as f:
        f.write(content)
