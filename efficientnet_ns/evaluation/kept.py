"""Measurements that are made once: each is stored in a manifest and read from there afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from efficientnet_ns.files import manifests


def measured(stage: manifests.Stage, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The stored result of a stage; if there is none, `measure()`, which is then stored.

    Args:
      stage: a stage without outputs, whose configuration is everything that determines the result.
      measure: returns a JSON-able result.

    Raises:
      manifests.OutputConflict: the stored result has another configuration.
    """
    if not stage.done():
        result = measure()
        with stage.write() as (_, counts):
            counts.update(result)
    return stage.counts()
