"""Text files that an export writes, filled in from the template files in this folder."""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path

_ROOT = Path(__file__).parent


class _Template(string.Template):
    # Not `$`, so that the template of a shell script is itself a valid script.
    delimiter = "%"


def names(folder: str) -> list[str]:
    """Returns the sorted names of the template files in a subfolder of this folder."""
    return sorted(path.name for path in (_ROOT / folder).iterdir() if path.is_file())


def fill(name: str, values: Mapping[str, object]) -> str:
    """Returns the text of a template with every `%{key}` replaced by `values[key]`.

    Args:
      name: path of the template, relative to this folder.
      values: key → value; must contain every key that the template uses.

    Raises:
      KeyError: If a key of the template is missing.
    """
    return _Template((_ROOT / name).read_text(encoding="utf-8")).substitute(values)
