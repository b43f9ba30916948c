"""Names record files and the files that belong to them, and finds all shards of a set.

The names are those of the original code, so both programs can use each other's data.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from efficientnet_ns.files import object_stores
from efficientnet_ns.files.errors import DataError


def shard_name(prefix: str, shard: int, num_shards: int) -> str:
    """Returns e.g. `train-00003-of-00128`."""
    return f"{prefix}-{shard:05d}-of-{num_shards:05d}"


def prediction_name(shard: int, num_shards: int, worker: int) -> str:
    """Returns e.g. `train-info-00003-of-00128-00000`, regardless of the input's prefix."""
    return f"{shard_name('train-info', shard, num_shards)}-{worker:05d}"


def info_name(shard: int, num_shards: int, worker: int) -> str:
    """Returns e.g. `info-00003-of-00128-00000.txt`."""
    return f"{shard_name('info', shard, num_shards)}-{worker:05d}.txt"


def index_name(shard: int, num_shards: int, worker: int) -> str:
    """Returns e.g. `index-00003-of-00128-00000.parquet`, for the index of a prediction file."""
    return f"{shard_name('index', shard, num_shards)}-{worker:05d}.parquet"


def prediction_paths(
    shard: int, num_shards: int, worker: int, *, output_dir: str, info_dir: str
) -> list[str]:
    """Returns the paths of a shard's predictions, index and info file; `info_dir` may be ""."""
    key = (shard, num_shards, worker)
    return [
        os.path.join(output_dir, prediction_name(*key)),
        os.path.join(output_dir, index_name(*key)),
        os.path.join(info_dir or output_dir, info_name(*key)),
    ]


def pseudo_label_name(task: int, shard: int, num_shards: int) -> str:
    """Returns e.g. `train-0-00003-of-00128`."""
    return shard_name(f"train-{task}", shard, num_shards)


_SHARD = re.compile(r"(?P<group>[^.].*)-(?P<shard>\d+)-of-(?P<total>\d+)")


def parse(name: str) -> tuple[str, int, int] | None:
    """Parses `train-00003-of-00128` to ("train", 3, 128); None for other and hidden files."""
    match = _SHARD.fullmatch(name.rstrip("/"))
    return (match["group"], int(match["shard"]), int(match["total"])) if match else None


def list_shards(folders: str, prefixes: str | Sequence[str]) -> list[str]:
    """Lists all shards with one of the prefixes in one or several folders.

    Args:
      folders: paths joined with `;`.
      prefixes: e.g. `train` or `("train", "extra")`; `train` also finds `train-0-00000-of-00004`.

    Returns:
      Sorted paths.

    Raises:
      DataError: If nothing matches, a folder is given twice, or a shard of a set is missing.
    """
    prefixes = (prefixes,) if isinstance(prefixes, str) else tuple(prefixes)
    paths: list[str] = []
    places: set[str] = set()
    for folder in filter(None, folders.split(";")):
        place = folder.rstrip("/") if "://" in folder else os.path.realpath(folder)
        if place in places:
            raise DataError(
                f"{folder!r} is given twice in {folders!r}: its images would count twice"
            )
        places.add(place)
        found = _shards_in(folder, prefixes)
        if not found:
            names = " or ".join(f"{p}-00000-of-…" for p in prefixes)
            raise DataError(f"no record files in {folder!r}: expected names such as {names}")
        paths += found
    if not paths:
        raise DataError("no data folder given; expected one path or several joined with ';'")
    return paths


def _shards_in(folder: str, prefixes: tuple[str, ...]) -> list[str]:
    groups: dict[tuple[str, int], dict[int, str]] = {}
    for name in object_stores.names(folder):
        group, shard, total = parse(name) or ("", 0, 0)
        if any(re.fullmatch(rf"{re.escape(p)}(-\d+)?", group) for p in prefixes):
            groups.setdefault((group, total), {})[shard] = os.path.join(folder, name)
    for (group, total), shards in groups.items():
        totals = sorted(t for g, t in groups if g == group)
        if len(totals) > 1:
            raise DataError(
                f"{folder} contains two sets of {group!r}, of {totals[0]} and {totals[1]} shards: "
                "the same images would count twice. Move one away."
            )
        missing = [i for i in range(total) if i not in shards]
        if missing:
            first = os.path.join(folder, shard_name(group, missing[0], total))
            raise DataError(f"{len(missing)} of {total} shards are missing, the first is {first}")
    return sorted(path for shards in groups.values() for path in shards.values())
