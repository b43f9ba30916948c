"""Signs that a run cannot work, reported as soon as they appear."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from efficientnet_ns.config import Config, LoopConfig
from efficientnet_ns.files import json_files, name_lists
from efficientnet_ns.files.paths import listed
from efficientnet_ns.loop import rounds
from efficientnet_ns.outcomes.outcome import Outcome
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

# Below this share of confident pictures, most show none of the classes.
_CONFIDENT_PART = 0.2
# With fewer held-out pictures, learning cannot be distinguished from chance.
_TELLING = 20


class CannotWork(RuntimeError):
    """The teacher has learned nothing: its labels would be noise."""


class Watch:
    """Checks each model and each selection of `rounds.run_loop`.

    Args:
      config, loop: settings of the rounds.
      class_names: class names of the task.
      warn: called with each warning.
    """

    def __init__(
        self,
        config: Config,
        loop: LoopConfig,
        class_names: Sequence[str],
        warn: Callable[[str], None],
    ):
        self._config, self._loop, self._names, self._warn = config, loop, class_names, warn
        resolved = ResolvedConfig.from_config(config)
        self._set, self._classes = resolved.task.eval_set, resolved.num_classes

    def __call__(self, kind: str, result: dict[str, Any]) -> None:
        {"model": self._model, "selection": self._selection}[kind](result)

    def _model(self, row: dict[str, Any]) -> None:
        metrics = row["measured"][self._set]
        # Students are not checked here, because a bad one does not become the best model.
        if row["round"] == 0 and is_chance(metrics["top1"], metrics["examples"], self._classes):
            text = (
                f"the teacher is right on {metrics['top1']:.1%} of {metrics['examples']} held-out "
                f"pictures, no better than guessing among {self._classes} classes: its labels would be "
                "noise. Use more labeled pictures, more --teacher_steps or published weights, and check "
                f"that the pictures are in the folders of their classes. Loss {metrics['loss']:.3g}"
            )
            if metrics["examples"] >= _TELLING:
                raise CannotWork(text)
            self._warn(text)

    def _selection(self, chosen: dict[str, Any]) -> None:
        _, selection = rounds.stage_configs(self._config, self._loop, chosen["round"])
        outcome = Outcome(selection)
        totals, kept = outcome.totals(), outcome.classes()["kept"]
        part = totals["confident"] / max(totals["images"], 1)
        if part < _CONFIDENT_PART:
            self._warn(
                f"round {chosen['round']}: only {part:.0%} of the unlabeled pictures have a label with "
                f"confidence {selection.min_threshold:g} or more: most show none of the classes, or the "
                "teacher has learned too little"
            )
        empty = [str(self._name(i)) for i, number in enumerate(kept) if not number]
        if empty:
            shown = name_lists.shortened(empty)
            self._warn(
                f"round {chosen['round']}: no unlabeled picture was kept for {len(empty)} of "
                f"{len(kept)} classes ({shown}): students see only their labeled pictures, if any"
            )

    def _name(self, number: int) -> str | int:
        return self._names[number] if self._names else number


def is_chance(top1: float, examples: int, classes: int) -> bool:
    """Returns whether an accuracy is at most one standard deviation above guessing."""
    chance = 1 / classes
    return top1 <= chance + math.sqrt(chance * (1 - chance) / max(examples, 1))


def quarantined(folder: str) -> list[str]:
    """Returns a line for each list of pictures that were excluded from the records in a folder."""
    lines = []
    paths = listed(folder, r".*-quarantine\.json") if tf.io.gfile.isdir(folder) else []
    for path in paths:
        bad = json_files.read_json(path)
        first = bad[0]
        lines.append(
            f"pictures that could not be used: {len(bad)}, such as {first['path']} ({first['reason']}); "
            f"{path} lists them"
        )
    return lines
