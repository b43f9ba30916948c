"""Which records of a folder are the unlabeled set: prefix and number of shards."""

from __future__ import annotations

import os

import tensorflow as tf

from efficientnet_ns.config import PredictConfig
from efficientnet_ns.files import object_stores, shard_names
from efficientnet_ns.files.errors import DataError

_SHOWN = 8  # Names in a message.


def find(folder: str, prefix: str, num_shards: int, part: str = "") -> tuple[str, int]:
    """(prefix, number of shards) of the set in a folder, as given if it is there.

    Else the folder's only set counts that has what is given, that is, differs from the defaults of
    `PredictConfig`. On an object store, of a set of a given number the first file is asked for first.

    Args:
      part: what follows the prefix in the names, e.g. `-0` for pseudo-labeled records of task 0.

    Raises:
      DataError: there is none, or several are possible; names the folder and what is there.
    """
    default = PredictConfig()
    # The default also finds extra-…, the name that make_records gives to unlabeled sets.
    prefixes = ("train", "extra") if prefix == default.file_prefix else (prefix,)
    # One question instead of a listing, of a request per thousand names.
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
            f"{folder} holds several sets, {listed}: choose one with --file_prefix and --num_shards"
        )
    expected = " or ".join(f"{group}-00000-of-…" for group in groups)
    asked = "" if num_shards == default.num_shards else f" of --num_shards={num_shards}"
    raise DataError(f"no records {expected}{asked} in {folder}; {described(folder)}")


def files(folder: str, prefix: str, num_shards: int) -> tuple[str, list[str]]:
    """(prefix, paths of all shards) of the set that `find` finds.

    Raises:
      DataError: see `find`; or a shard is missing.
    """
    prefix, num_shards = find(folder, prefix, num_shards)
    present = set(_names(folder))
    names = [shard_names.shard_name(prefix, shard, num_shards) for shard in range(num_shards)]
    if lost := [name for name in names if name not in present]:
        first = os.path.join(folder, lost[0])
        raise DataError(f"{len(lost)} of {num_shards} shards are missing, the first is {first}")
    return prefix, [os.path.join(folder, name) for name in names]


def described(folder: str) -> str:
    """What is in a folder, in words."""
    if not tf.io.gfile.isdir(folder):
        return "there is no such folder"
    names = _names(folder)
    if not names:
        return "it is empty"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"it holds {', '.join(names[:_SHOWN])}{more}"


def _names(folder: str) -> list[str]:
    """What is in a folder, sorted, without hidden files."""
    return [name for name in object_stores.names(folder) if not name.startswith(".")]
