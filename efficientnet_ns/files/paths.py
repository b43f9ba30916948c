"""Literal paths: `[`, `]`, `*`, `?` and backslashes in a folder's name have no special meaning.

This package never expands patterns in a path given by the user: it lists folders and matches names.
If TensorFlow itself expands patterns, `local_files.without_wildcards` gives it another path to the
same files.
"""

from __future__ import annotations

import os
import re

from efficientnet_ns.files import object_stores

# Characters that make TensorFlow interpret a path as a pattern.
_WILDCARDS = re.compile(r"[*?\[\\]")


def is_pattern(path: str | os.PathLike) -> bool:
    """Checks whether TensorFlow interprets a path as a pattern when it reads variables."""
    return bool(_WILDCARDS.search(os.fspath(path)))


def listed(folder: str, pattern: str) -> list[str]:
    """Lists the sorted paths in `folder` whose complete names match the regular expression.

    Unlike a glob, it interprets the folder's name literally.

    Returns:
      The paths; empty if the folder does not exist.
    """
    found = object_stores.names(folder)
    return [os.path.join(folder, name) for name in found if re.fullmatch(pattern, name)]
