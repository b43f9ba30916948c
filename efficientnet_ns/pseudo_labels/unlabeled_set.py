"""Finds the unlabeled set in a folder: its prefix and number of shards."""

from __future__ import annotations

import os

import tensorflow as tf

from efficientnet_ns.config import PredictConfig
from efficientnet_ns.files import object_stores, shard_names
from efficientnet_ns.files.errors import DataError

_SHOWN = 8  # Maximum number of names in a message.


def find(
    folder: str, prefix: str, num_shards: int, part: str = "", *, exact: bool = False
) -> tuple[str, int]:
    """Returns (prefix, number of shards) of the set in a folder, as given if that set exists.

    Otherwise, returns the only set in the folder that matches each argument that differs from the
    default of `PredictConfig`. On an object store, if the number is given, this requests the first
    file of the set before it lists the folder.

    Args:
      part: text after the prefix in the names, e.g. `-0` for pseudo-labeled records of task 0.
      exact: whether the default prefix finds only sets of this name, as for labeled sets.

    Raises:
      DataError: If there are none or several such sets; names the folder and its contents.
    """
    default = PredictConfig()
    # The default also finds extra-…, the prefix that make_records uses for unlabeled sets.
    detected = prefix == default.file_prefix and not exact
    prefixes = ("train", "extra") if detected else (prefix,)
    # One request instead of a listing, which takes a request per thousand names.
    if num_shards != default.num_shards and object_stores.is_object_store(folder):
        for name in prefixes:
            first = shard_names.shard_name(f"{name}{part}", 0, num_shards)
            if object_stores.size(os.path.join(folder, first)) is not None:
                return name, num_shards
    sets = {(one[0], one[2]) for name in _names(folder) if (one := shard_names.parse(name))}
    if (f"{prefix}{part}", num_shards) in sets:
        return prefix, num_shards
    groups = {f"{name}{part}": name for name in prefixes}
    found = sorted(one for one in sets if one[0] in groups)
    fitting = [one for one in found if num_shards in (default.num_shards, one[1])]
    if len(fitting) == 1:
        group, total = fitting[0]
        return groups[group], total
    if fitting:
        listed = ", ".join(f"{group} ({total} shards)" for group, total in fitting)
        raise DataError(
            f"{folder} has several sets, {listed}: choose one with --file_prefix and --num_shards"
        )
    expected = " or ".join(f"{group}-00000-of-…" for group in groups)
    asked = "" if num_shards == default.num_shards else f" of --num_shards={num_shards}"
    raise DataError(f"no records {expected}{asked} in {folder}; {described(folder)}")


def files(folder: str, prefix: str, num_shards: int) -> tuple[str, list[str]]:
    """Returns (prefix, paths of all shards) of the set that `find` returns.

    Raises:
      DataError: If a shard is missing; see also `find`.
    """
    prefix, num_shards = find(folder, prefix, num_shards)
    present = set(_names(folder))
    names = [shard_names.shard_name(prefix, shard, num_shards) for shard in range(num_shards)]
    if lost := [name for name in names if name not in present]:
        first = os.path.join(folder, lost[0])
        raise DataError(f"{len(lost)} of {num_shards} shards are missing; the first is {first}")
    return prefix, [os.path.join(folder, name) for name in names]


def described(folder: str) -> str:
    """Describes the contents of a folder in words."""
    if not tf.io.gfile.isdir(folder):
        return "there is no such folder"
    names = _names(folder)
    if not names:
        return "it is empty"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"it contains {', '.join(names[:_SHOWN])}{more}"


def _names(folder: str) -> list[str]:
    """Returns the sorted names in a folder, without hidden files."""
    return [name for name in object_stores.names(folder) if not name.startswith(".")]
