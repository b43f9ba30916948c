"""Paths as they are: `[`, `]`, `*`, `?` and backslashes in a folder's name mean themselves.

Nothing in this package expands a pattern over a path that a user gave: folders are listed, and
names matched. Where TensorFlow does so itself, it is given another path to the same files.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import tensorflow as tf

from efficientnet_ns.files import manifests

# What makes TensorFlow take a path for a pattern.
_WILDCARDS = re.compile(r"[*?\[\\]")


def is_pattern(path: str | os.PathLike) -> bool:
    """Whether TensorFlow takes a path for a pattern where it reads variables."""
    return bool(_WILDCARDS.search(os.fspath(path)))


@contextlib.contextmanager
def without_wildcards(path: str) -> Iterator[str]:
    """Yields a path for readers of TensorFlow that take paths for patterns, to the same files.

    It is `path` itself unless that has wildcards. Else there are links below TMPDIR while the block
    runs, or copies of files that are not on this machine.

    Args:
      path: a folder, or the prefix of a checkpoint.

    Raises:
      OSError: TMPDIR has wildcards, too.
    """
    if not is_pattern(path):
        yield path
        return
    with manifests.scratch_folder("paths") as scratch:
        if is_pattern(scratch):
            raise OSError(
                f"TensorFlow takes {path} for a pattern, and the folder for temporary files, "
                f"{os.path.dirname(scratch)}, as well: set TMPDIR to one without * ? [ and \\"
            )
        for file in _files(path):
            target = os.path.join(scratch, "at" + file[len(path) :])
            tf.io.gfile.makedirs(os.path.dirname(target))
            _link(file, target)
        yield os.path.join(scratch, "at")


def _files(path: str) -> list[str]:
    if not tf.io.gfile.isdir(path):
        folder, base = os.path.split(path)
        return manifests.listed(folder or ".", re.escape(base) + r"\..*")
    return [os.path.join(at, name) for at, _, names in tf.io.gfile.walk(path) for name in names]


def _link(source: str, target: str) -> None:
    # Never a linked folder: what removes abandoned folders would follow it.
    if "://" in source:
        tf.io.gfile.copy(source, target)
    else:
        os.symlink(os.path.abspath(source), target)
