"""Ensures that finished work is never lost and never done twice.

A stage writes its outputs under temporary names, then a manifest with their sizes and its
configuration, then renames the outputs. After a restart, a stage whose outputs match its manifest is
skipped, and an interrupted stage is done again. Files without a manifest are never overwritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf
from absl import logging

from efficientnet_ns.files import atomic, object_stores
from efficientnet_ns.files.json_files import BrokenFile, read_object_if_any, write_json


class OutputConflict(RuntimeError):
    """Existing files were not made by this stage with this configuration."""


def fingerprint(paths: Sequence[str], sizes: Sequence[int] | None = None) -> str:
    """Hashes the names, sizes and order of files; `sizes` None requests the sizes."""
    if sizes is None:
        sizes = [tf.io.gfile.stat(path).length for path in paths]
    listing = [(os.path.basename(path), size) for path, size in zip(paths, sizes)]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]


def read_manifest(path: str, outputs: Sequence[str] = ()) -> dict:
    """Reads a manifest; OutputConflict if it is absent, empty, truncated or not a manifest."""
    manifest = manifest_if_any(path, outputs)
    if manifest is None:
        raise OutputConflict(f"{path} does not exist")
    return manifest


def manifest_if_any(path: str, outputs: Sequence[str] = ()) -> dict | None:
    """Like `read_manifest`, but returns None if the file does not exist."""
    try:
        manifest = read_object_if_any(path, "config", "sizes", "counts")
        if manifest is None or all(isinstance(value, dict) for value in manifest.values()):
            return manifest
    except BrokenFile as e:
        logging.info("%s", e)
    raise OutputConflict(
        f"{path} is damaged, perhaps truncated. Delete it and "
        f"{' and '.join(outputs) or 'the files it describes'}, and run the command that made them "
        "again."
    )


def content_hash(path: str) -> str:
    """Returns a short hash of a file's bytes."""
    digest = hashlib.sha256()
    with tf.io.gfile.GFile(path, "rb") as f:
        while block := f.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()[:16]


class Stage:
    """One unit of work with its outputs and manifest.

    Args:
      manifest: path of the JSON manifest.
      outputs: paths that the work produces; created together.
      config: everything that determines the outputs' content, JSON-serializable.
    """

    def __init__(self, manifest: str, outputs: Sequence[str], config: Mapping[str, object]):
        self.manifest, self.outputs = manifest, list(outputs)
        self.config = json.loads(json.dumps(config))
        self._manifest: dict | None = None  # As last read or written.

    def done(self) -> bool:
        """Checks whether the outputs exist and are complete.

        Raises:
          OutputConflict: If this stage did not make the existing files with this configuration.
        """
        self._manifest = manifest_if_any(self.manifest, self.outputs)
        sizes = object_stores.sizes(self.outputs)
        found = [path for path, size in zip(self.outputs, sizes) if size is not None]
        if self._manifest is None:
            if found:
                raise OutputConflict(
                    f"{found[0]} exists but {self.manifest} does not, so its origin is unknown. "
                    "Move it away or choose another output folder."
                )
            return False
        made_with = self._manifest["config"]
        if made_with != self.config:
            # A result that is stored in the manifest itself is never replaced silently.
            if self.outputs and not found:
                return False
            raise OutputConflict(
                f"the outputs of {self.manifest} were made with other settings "
                f"({describe_difference(made_with, self.config)}). "
                f"Choose another output folder or delete {' and '.join(found or [self.manifest])}."
            )
        for path, size in zip(self.outputs, sizes):
            if size is None:
                return False
            expected = self._manifest["sizes"].get(os.path.basename(path))
            if size != expected:
                raise OutputConflict(
                    f"{path} has {size} bytes, but {expected} in its manifest: "
                    "it was changed or truncated. Delete it to regenerate it."
                )
        return True

    def counts(self) -> dict:
        """Returns what the finished stage reported about itself."""
        self._manifest = self._manifest or read_manifest(self.manifest, self.outputs)
        return self._manifest["counts"]

    def once(self, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """For a stage without outputs, returns the stored result or stores that of `work()`.

        Raises:
          OutputConflict: If the stored result has another configuration.
        """
        if not self.done():
            result = work()
            with self.write() as (_, counts):
                counts.update(result)
        return self.counts()

    @contextlib.contextmanager
    def write(self, *, clean: bool = True) -> Iterator[tuple[dict[str, str], dict]]:
        """Yields ({output: temporary name}, counts) to fill, then commits them together.

        Args:
          clean: whether to first remove temporary files of killed processes, which lists the
            folders; if False, the caller does this once for all of its stages.
        """
        for path in [self.manifest, *self.outputs]:
            object_stores.make_folder(os.path.dirname(path))
        if clean:
            atomic.remove_abandoned([self.manifest, *self.outputs])
        temporary = {path: atomic.temporary_name(path) for path in self.outputs}
        counts: dict = {}
        try:
            yield temporary, counts
            sizes = {os.path.basename(p): tf.io.gfile.stat(t).length for p, t in temporary.items()}
            # The manifest comes first: outputs without a manifest are rejected, while a manifest
            # without outputs only repeats the work.
            written = {"config": self.config, "counts": counts, "sizes": sizes}
            write_json(self.manifest, written, indent=1)
            for path, name in temporary.items():
                tf.io.gfile.rename(name, path, overwrite=True)
        except BaseException:
            for name in temporary.values():
                object_stores.remove(name)
            raise
        self._manifest = json.loads(json.dumps(written))


def describe_difference(old: Mapping[str, object], new: Mapping[str, object]) -> str:
    """Returns `field: old → new` for every field that differs."""
    keys = sorted(set(old) | set(new))
    return ", ".join(
        f"{k}: {old.get(k)!r} → {new.get(k)!r}" for k in keys if old.get(k) != new.get(k)
    )
