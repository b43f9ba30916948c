"""Paths as they are: `[`, `]`, `*`, `?` and backslashes in a folder's name mean themselves.

Nothing in this package expands a pattern over a path that a user gave: folders are listed, and
names matched. Where TensorFlow does so itself, `local_files.without_wildcards` gives it another path
to the same files.
"""

from __future__ import annotations

import os
import re

from efficientnet_ns.files import object_stores

# What makes TensorFlow take a path for a pattern.
_WILDCARDS = re.compile(r"[*?\[\\]")


def is_pattern(path: str | os.PathLike) -> bool:
    """Whether TensorFlow takes a path for a pattern where it reads variables."""
    return bool(_WILDCARDS.search(os.fspath(path)))


def listed(folder: str, pattern: str) -> list[str]:
    """Sorted paths of what lies in `folder` under names that match the whole regular expression.

    Unlike a glob it takes the folder's name as it is, whatever characters are in it.

    Returns:
      Nothing when there is no such folder.
    """
    found = object_stores.names(folder)
    return [os.path.join(folder, name) for name in found if re.fullmatch(pattern, name)]
