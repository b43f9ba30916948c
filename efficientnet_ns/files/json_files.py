"""Atomic writing of JSON files, and reading with errors that name the file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf
from absl import logging

from efficientnet_ns.files import atomic, object_stores


class BrokenFile(ValueError):
    """The JSON file cannot be parsed or has unexpected content."""


def write_json(path: str, value: object, *, indent: int | None = None) -> None:
    """Writes a JSON file atomically."""
    atomic.write(path, json.dumps(value, indent=indent))


def write_json_lines(path: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line, atomically."""
    atomic.write(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_json(path: str):
    """Parses a file, with or without a byte order mark; BrokenFile names it if it is not JSON."""
    text = object_stores.read(path)
    if text is None:
        raise tf.errors.NotFoundError(None, None, f"{path} does not exist")
    return _parsed(path, text)


def _parsed(path: str, text: bytes):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:  # Also for bytes that are not text.
        raise BrokenFile(f"{path} is not valid JSON: {e}. Fix it or delete it.") from e


def read_object(path: str, *keys: str) -> dict:
    """Reads the object of a JSON file; BrokenFile if it is not an object or lacks a key."""
    return _object(path, read_json(path), keys)


def read_object_if_any(path: str, *keys: str) -> dict | None:
    """Like `read_object`, but None if the file does not exist; makes no additional request."""
    text = object_stores.read(path)
    return None if text is None else _object(path, _parsed(path, text), keys)


def _object(path: str, value: Any, keys: Sequence[str]) -> dict:
    if not isinstance(value, dict):
        raise BrokenFile(
            f"{path} should contain a JSON object, but contains a {type(value).__name__}. Fix it or "
            "delete it."
        )
    missing = [key for key in keys if key not in value]
    if missing:
        raise BrokenFile(
            f"{path} lacks {', '.join(missing)}: it was not written by this program. Delete it or "
            "move it away."
        )
    return value


def read_json_lines(path: str, *keys: str) -> list[dict]:
    """Reads the objects of a file with one JSON object per line; none if it does not exist.

    Skips an incomplete last line, which a killed writer leaves behind, and logs a warning.

    Raises:
      BrokenFile: If another line is not a JSON object or lacks one of the keys.
    """
    text = object_stores.read(path)
    if text is None:
        return []
    lines = text.removesuffix(b"\n").split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            good = isinstance(row, dict) and all(key in row for key in keys)
        except (ValueError, RecursionError):
            good = False
        if good:
            rows.append(row)
        elif number < len(lines):
            raise BrokenFile(
                f"{path}, line {number} is not a JSON object{_with(keys)}: {_start(line)}. Delete "
                "that line."
            )
        elif line:
            logging.warning(
                "%s: skipping the last line, which is truncated: %s", path, _start(line)
            )
    return rows


def _with(keys: Sequence[str]) -> str:
    return f" with {', '.join(keys)}" if keys else ""


def _start(line: bytes) -> str:
    return repr(line[:60].decode("utf-8", "backslashreplace"))
