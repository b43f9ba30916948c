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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf
from absl import logging

from efficientnet_ns.files import atomic
from efficientnet_ns.files.json_files import BrokenFile, read_object, write_json


class OutputConflict(RuntimeError):
    """Existing files were not made by this stage with this configuration."""


def fingerprint(paths: Sequence[str]) -> str:
    """Short hash of the names and sizes of files, order included."""
    listing = [(os.path.basename(p), tf.io.gfile.stat(p).length) for p in paths]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]


def read_manifest(path: str, outputs: Sequence[str] = ()) -> dict:
    """The manifest at `path`; OutputConflict when it is empty, cut or no manifest."""
    try:
        manifest = read_object(path, "config", "sizes", "counts")
        if all(isinstance(value, dict) for value in manifest.values()):
            return manifest
    except BrokenFile as e:
        logging.info("%s", e)
    raise OutputConflict(
        f"{path} is damaged, perhaps cut off. Delete it and "
        f"{' and '.join(outputs) or 'the files it vouches for'}, and start the command that made them "
        "again."
    )


def content_hash(path: str) -> str:
    """Short hash of a file's bytes."""
    digest = hashlib.sha256()
    with tf.io.gfile.GFile(path, "rb") as f:
        while block := f.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()[:16]


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
                    "It is not overwritten: move it away, or choose another output folder."
                )
            return False
        made_with = self._manifest()["config"]
        if made_with != self.config:
            found = [p for p in self.outputs if tf.io.gfile.exists(p)]
            # A result that stands in the manifest itself is never made anew silently.
            if self.outputs and not found:
                return False
            raise OutputConflict(
                f"the outputs of {self.manifest} were made with other settings "
                f"({describe_difference(made_with, self.config)}). "
                f"Delete {' and '.join(found or [self.manifest])}, or choose another output folder."
            )
        sizes = self._manifest()["sizes"]
        for path in self.outputs:
            if not tf.io.gfile.exists(path):
                return False
            size = tf.io.gfile.stat(path).length
            expected = sizes.get(os.path.basename(path))
            if size != expected:
                raise OutputConflict(
                    f"{path} has {size} bytes, but {expected} in its manifest: "
                    "it was changed or truncated. Delete it to have it made again."
                )
        return True

    def counts(self) -> dict:
        """What the finished stage reported about itself."""
        return self._manifest()["counts"]

    def _manifest(self) -> dict:
        return read_manifest(self.manifest, self.outputs)

    def once(self, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """For a stage without outputs: what it stored, or `work()`, JSON-able, which it then stores.

        Raises:
          OutputConflict: the stored result has another configuration.
        """
        if not self.done():
            result = work()
            with self.write() as (_, counts):
                counts.update(result)
        return self.counts()

    @contextlib.contextmanager
    def write(self) -> Iterator[tuple[dict[str, str], dict]]:
        """Yields ({output: temporary name}, counts) to fill; then commits all together."""
        for path in [self.manifest, *self.outputs]:
            tf.io.gfile.makedirs(os.path.dirname(path) or ".")
        atomic.remove_abandoned([self.manifest, *self.outputs])
        temporary = {path: atomic.temporary_name(path) for path in self.outputs}
        counts: dict = {}
        try:
            yield temporary, counts
            sizes = {os.path.basename(p): tf.io.gfile.stat(t).length for p, t in temporary.items()}
            # First: outputs without a manifest are refused, while after a manifest without outputs
            # the work is merely done again.
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
