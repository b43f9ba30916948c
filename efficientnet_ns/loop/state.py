"""Finished stages of a work_dir, and the settings they were made with."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from absl import logging

from efficientnet_ns.config import ConfigError, comparable
from efficientnet_ns.files import json_files, manifests, object_stores, progress

# Settings that may change until the first selection is made.
_UNTIL_SELECTED = ("num_image", "min_threshold", "reviewed")


class State:
    """Results of finished stages, in `<folder>/state.json`.

    Args:
      folder: work_dir.
      settings: JSON-serializable configuration of the run; a folder with another one is rejected.
      defaults: defaults of the settings, for a folder older than these settings.

    Raises:
      ConfigError: If the folder was started with other settings.
    """

    def __init__(
        self, folder: str, settings: dict[str, Any], defaults: dict[str, Any] | None = None
    ):
        self._path = os.path.join(folder, "state.json")
        # As they will be read back: tuples become lists.
        settings = json.loads(json.dumps(settings))
        if not tf.io.gfile.exists(self._path):
            object_stores.make_folder(folder)
            self._state = {"settings": settings, "stages": {}}
            return
        self._state = json_files.read_object(self._path, "settings", "stages")
        known = {name: value for name, value in (defaults or {}).items() if name in settings}
        stored = {**known, **self._state["settings"]}
        stages = self._state["stages"]
        if not any(stage.endswith(": select") for stage in stages):
            # Trainings apply the list of excluded records, too.
            free = _UNTIL_SELECTED if stages else (*_UNTIL_SELECTED, "exclude")
            stored.update({name: settings[name] for name in free if name in settings})
        difference = manifests.describe_difference(comparable(stored), comparable(settings))
        if difference:
            raise ConfigError(
                f"{folder} was started with other settings ({difference}). "
                "Choose another folder, or use the settings it was started with."
            )
        self._state["settings"] = stored

    @staticmethod
    def recorded(folder: str) -> list[str]:
        """Names of the stages recorded in a folder, in order; empty if it has no state yet."""
        found = json_files.read_object_if_any(os.path.join(folder, "state.json"), "stages")
        return list(found["stages"]) if found else []

    @property
    def finished(self) -> list[str]:
        """Names of the recorded stages, in order."""
        return list(self._state["stages"])

    def once(self, name: str, work: Callable[[], dict]) -> dict:
        """Returns the recorded result of stage `name`; does the work first if there is none."""
        stages = self._state["stages"]
        if name not in stages:
            logging.info("--- %s", name)
            with progress.stage(name):
                stages[name] = work()
            # Only now: a killed stage starts again, and its work continues from its own files.
            json_files.write_json(self._path, self._state, indent=1)
        elif progress.Whole.current is not None:
            progress.Whole.current.skip(name)
        return stages[name]
