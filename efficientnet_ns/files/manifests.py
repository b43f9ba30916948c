"""Finished work that is never lost and never done twice.

A stage writes its outputs under temporary names, then a manifest with their sizes and its
configuration, then renames the outputs. Started again, a stage whose outputs match its manifest is
skipped; one that was interrupted is done again; files that no manifest vouches for are never
overwritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence

import tensorflow as tf


class OutputConflict(RuntimeError):
    """Existing files were not made by this stage with this configuration."""


def listed(folder: str, pattern: str) -> list[str]:
    """Sorted paths of what lies in `folder` under names that match the whole regular expression.

    Unlike a glob it takes the folder's name as it is, whatever characters are in it.

    Returns:
      Nothing when there is no such folder.
    """
    if not tf.io.gfile.isdir(folder):
        return []
    names = (name.rstrip("/") for name in tf.io.gfile.listdir(folder))
    return sorted(os.path.join(folder, name) for name in names if re.fullmatch(pattern, name))


def temporary_name(path: str) -> str:
    """A name in the same folder that no record pattern matches, private to this process."""
    folder, base = os.path.split(path)
    return os.path.join(folder, f"{_temporary_prefix()}{os.getpid()}-{base}")


def remove_abandoned(paths: Sequence[str]) -> None:
    """Removes temporary files for `paths` that killed processes of this machine left behind."""
    wanted: dict[str, set[str]] = {}
    for path in paths:
        folder, base = os.path.split(path)
        wanted.setdefault(folder, set()).add(base)
    for folder, bases in wanted.items():
        for found in listed(folder or ".", re.escape(_temporary_prefix()) + ".*"):
            if _abandoned(os.path.basename(found)) in bases:
                # Another process may remove it at the same time.
                with contextlib.suppress(tf.errors.NotFoundError):
                    tf.io.gfile.remove(found)


def remove_abandoned_folders(parent: str) -> None:
    """Removes temporary folders directly in `parent` of killed processes of this machine."""
    for name in (found.rstrip("/") for found in tf.io.gfile.listdir(parent)):
        path = os.path.join(parent, name)
        if _abandoned(name) is not None and tf.io.gfile.isdir(path):
            # Another process may remove it at the same time, and in a TMPDIR that users share it may
            # be another one's.
            gone_or_foreign = (tf.errors.NotFoundError, tf.errors.PermissionDeniedError)
            with contextlib.suppress(*gone_or_foreign):
                tf.io.gfile.rmtree(path)


def _temporary_prefix() -> str:
    return f".tmp-{socket.gethostname()}-"


def _abandoned(name: str) -> str | None:
    """What the temporary `name` of a dead process of this machine was for; None for other names."""
    if not name.startswith(_temporary_prefix()):
        return None
    # Without a number there it is not one of ours.
    pid, _, base = name[len(_temporary_prefix()) :].partition("-")
    return base if pid.isdigit() and not is_running(int(pid)) else None


def scratch_name(purpose: str) -> str:
    """A new name below TMPDIR for files needed while this process runs, with those of killed
    processes removed.
    """
    parent = tempfile.gettempdir()
    remove_abandoned_folders(parent)
    name = f"efficientnet_ns-{purpose}-{secrets.token_hex(4)}"
    return temporary_name(os.path.join(parent, name))


@contextlib.contextmanager
def scratch_folder(purpose: str) -> Iterator[str]:
    """Yields a folder of that kind, which is removed when the block ends."""
    folder = scratch_name(purpose)
    tf.io.gfile.makedirs(folder)
    try:
        yield folder
    finally:
        tf.io.gfile.rmtree(folder)


def is_running(pid: int) -> bool:
    """Whether this machine has a process of that number."""
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
    finally:
        if tf.io.gfile.exists(temporary):
            tf.io.gfile.remove(temporary)


def write_json(path: str, value: object, *, indent: int | None = None) -> None:
    """Writes JSON that is either whole or absent."""
    with atomic_path(path) as temporary, tf.io.gfile.GFile(temporary, "w") as f:
        f.write(json.dumps(value, indent=indent))


def read_json(path: str):
    """The parsed file, with or without a byte order mark; BrokenFile naming it when it is not JSON."""
    with tf.io.gfile.GFile(path, "rb") as f:
        text = f.read()
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:  # Of bytes that are no text, too.
        raise BrokenFile(f"{path} is not valid JSON: {e}") from e


def read_json_lines(path: str) -> list[dict]:
    """Objects of a file with one JSON object per line; none when it does not exist.

    A last line that is not whole, which a killed writer leaves behind, is left out.

    Raises:
      BrokenFile: another line is not JSON.
    """
    if not tf.io.gfile.exists(path):
        return []
    with tf.io.gfile.GFile(path, "rb") as f:
        lines = f.read().split(b"\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            if number == len(lines):
                break
            raise BrokenFile(f"{path}, line {number} is not valid JSON: {e}") from e
    return rows


def fingerprint(paths: Sequence[str]) -> str:
    """Short hash of the names and sizes of files, order included."""
    listing = [(os.path.basename(p), tf.io.gfile.stat(p).length) for p in paths]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]


def content_hash(path: str) -> str:
    """Short hash of a file's bytes."""
    digest = hashlib.sha256()
    with tf.io.gfile.GFile(path, "rb") as f:
        while block := f.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()[:16]


class BrokenFile(ValueError):
    """A JSON file that cannot be parsed."""


class Stage:
    """One unit of work with its outputs and manifest.

    Args:
      manifest: path of the JSON manifest.
      outputs: paths the work produces; created together.
      config: everything that determines the outputs' content, JSON-able.
    """

    def __init__(self, manifest: str, outputs: Sequence[str], config: Mapping[str, object]):
        self.manifest, self.outputs = manifest, list(outputs)
        self.config = json.loads(json.dumps(config))

    def done(self) -> bool:
        """Whether the outputs are there and whole.

        Raises:
          OutputConflict: files are in the way that this stage did not make with this configuration.
        """
        if not tf.io.gfile.exists(self.manifest):
            found = [p for p in self.outputs if tf.io.gfile.exists(p)]
            if found:
                raise OutputConflict(
                    f"{found[0]} exists but {self.manifest} does not: how was it made? "
                    "It is left alone: move it away, or choose another output folder."
                )
            return False
        made_with = self._manifest()["config"]
        if made_with != self.config:
            found = [p for p in self.outputs if tf.io.gfile.exists(p)]
            if not found:
                return False
            raise OutputConflict(
                f"the outputs of {self.manifest} were made with other settings "
                f"({describe_difference(made_with, self.config)}). "
                f"Delete {' and '.join(found)}, or choose another output folder."
            )
        sizes = self._manifest()["sizes"]
        for path in self.outputs:
            if not tf.io.gfile.exists(path):
                return False
            size = tf.io.gfile.stat(path).length
            expected = sizes[os.path.basename(path)]
            if size != expected:
                raise OutputConflict(
                    f"{path} has {size} bytes, its manifest says {expected}: "
                    "it was changed or truncated. Delete it to have it made again."
                )
        return True

    def counts(self) -> dict:
        """What the finished stage reported about itself."""
        return self._manifest()["counts"]

    def _manifest(self) -> dict:
        """The manifest; OutputConflict when it is empty, cut or no manifest."""
        try:
            content = read_json(self.manifest)
        except BrokenFile:
            content = None
        if not isinstance(content, dict) or not {"config", "sizes", "counts"} <= set(content):
            raise OutputConflict(
                f"{self.manifest} is damaged, perhaps cut off. Delete it and "
                f"{' and '.join(self.outputs)}, and start the same command again."
            )
        return content

    @contextlib.contextmanager
    def write(self) -> Iterator[tuple[dict[str, str], dict]]:
        """Yields ({output: temporary name}, counts) to fill; then commits all together."""
        for path in [self.manifest, *self.outputs]:
            tf.io.gfile.makedirs(os.path.dirname(path) or ".")
        remove_abandoned([self.manifest, *self.outputs])
        temporary = {path: temporary_name(path) for path in self.outputs}
        counts: dict = {}
        try:
            yield temporary, counts
            sizes = {os.path.basename(p): tf.io.gfile.stat(t).length for p, t in temporary.items()}
            write_json(
                self.manifest,
                {"config": self.config, "counts": counts, "sizes": sizes},
                indent=1,
            )
            for path, name in temporary.items():
                tf.io.gfile.rename(name, path, overwrite=True)
        finally:
            for name in temporary.values():
                if tf.io.gfile.exists(name):
                    tf.io.gfile.remove(name)


def describe_difference(old: Mapping[str, object], new: Mapping[str, object]) -> str:
    """`field: old → new` for every field that differs."""
    keys = sorted(set(old) | set(new))
    return ", ".join(
        f"{k}: {old.get(k)!r} → {new.get(k)!r}" for k in keys if old.get(k) != new.get(k)
    )
