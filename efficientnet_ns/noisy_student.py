"""The whole loop from one command: teacher, then rounds of label → select → write → student.

Started again after a kill, it continues: finished stages are recorded in `state.json`, and the
stage that was interrupted resumes from its own checkpoints and manifests. Layout of `--work_dir`:

  round-0/model                       the first teacher
  round-<r>/{predictions,info}        labels given by the model of round r-1
  round-<r>/{statistics,selected}     what was chosen of them, and the balanced records
  round-<r>/model                     the student, teacher of round r+1
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

from absl import flags, logging

from efficientnet_ns import config as config_lib
from efficientnet_ns.config import Config, ConfigError, LoopConfig, SelectConfig


class State:
    """Results of finished stages, in `<folder>/state.json`.

    Args:
      folder: work_dir.
      settings: configuration of the whole; a folder made with another one is refused.
    """

    def __init__(self, folder: str, settings: dict[str, Any]):
        import tensorflow as tf

        from efficientnet_ns.data import manifests

        self._manifests = manifests
        self.path = os.path.join(folder, "state.json")
        settings = json.loads(json.dumps(settings))
        self._state = {"settings": settings, "stages": {}}
        if tf.io.gfile.exists(self.path):
            self._state = manifests.read_json(self.path)
            if self._state["settings"] != settings:
                difference = manifests.describe_difference(self._state["settings"], settings)
                raise ConfigError(
                    f"{folder} was begun with other settings ({difference}). "
                    "Choose another folder, or give the settings it was begun with."
                )
        else:
            tf.io.gfile.makedirs(folder)

    def once(self, name: str, work: Callable[[], dict]) -> dict:
        """The recorded result of stage `name`, or that of doing it now."""
        stages = self._state["stages"]
        if name not in stages:
            logging.info("--- %s", name)
            stages[name] = work()
            self._manifests.write_json(self.path, self._state, indent=1)
        return stages[name]


def run_loop(config: Config, loop: LoopConfig) -> list[dict[str, Any]]:
    """Runs all rounds.

    Args:
      config: settings of every training; `unlabel_data_dir` holds the unlabeled records.
      loop: the rounds.

    Returns:
      One row per model: `round`, `model`, `steps`, `measured` (metrics per set) and, for
      students, `unique` (pseudo-labeled images) and `kept` ({class: [lowest kept confidence,
      images]}).

    Raises:
      ConfigError, records.DataError: settings or data that cannot work, before anything is done.
    """
    models = _check(config, loop)
    # Models may be added later; every training guards its own folder.
    settings = {**config.identity(), **dataclasses.asdict(loop)}
    state = State(
        loop.work_dir, {k: v for k, v in settings.items() if k not in ("models", "work_dir")}
    )
    teacher = config.override(
        model_name=models[0],
        model_dir=model_dir(loop, 0),
        unlabel_data_dir="",
        unlabel_ratio=0.0,
        train_steps=loop.teacher_steps or config.train.train_steps,
    )
    name = f"round 0: teacher {models[0]}"
    rows = [{"round": 0, **train_and_measure(state, name, teacher)}]
    for number, name in enumerate(models[1:], start=1):
        rows.append(_round(state, config, loop, number, name, teacher_name=models[number - 1]))
    return rows


def _check(config: Config, loop: LoopConfig) -> list[str]:
    """The models of the loop; finds now what would otherwise fail after the teacher's training."""
    from efficientnet_ns.experiment import Experiment

    if not (loop.work_dir and config.data.unlabel_data_dir and config.train.unlabel_ratio > 0):
        raise ConfigError(
            "--work_dir, --unlabel_data_dir and a positive --unlabel_ratio are needed"
        )
    models = [name.strip() for name in loop.models.split(",")]
    if len(models) < 2:
        raise ConfigError(f"--models={loop.models}: name a teacher and at least one student")
    for name in models:
        Experiment.from_config(config.override(model_name=name))
    _unlabeled_shards(config)
    return models


def _unlabeled_shards(config: Config) -> tuple[str, int]:
    """(prefix, number of shards) of the unlabeled set."""
    from efficientnet_ns.data import records

    folder = config.data.unlabel_data_dir
    if ";" in folder:
        raise ConfigError(f"--unlabel_data_dir={folder}: the loop labels one folder")
    names = [os.path.basename(path) for path in records.list_shards(folder, ("train", "extra"))]
    prefixes = {name.split("-")[0] for name in names}
    if len(prefixes) > 1 or names[0].count("-") != 3:
        raise ConfigError(
            f"--unlabel_data_dir={folder} should hold one set, named train-00000-of-… or "
            f"extra-00000-of-…, but holds {names[0]} … {names[-1]}"
        )
    return prefixes.pop(), len(names)


def model_dir(loop: LoopConfig, number: int) -> str:
    """Where the model of a round lives."""
    return os.path.join(loop.work_dir, f"round-{number}", "model")


def _round(
    state: State, config: Config, loop: LoopConfig, number: int, name: str, teacher_name: str
) -> dict[str, Any]:
    from efficientnet_ns.labeling import predict, select, write

    prediction, selection = stage_configs(config, loop, number, teacher_name)
    state.once(f"round {number}: predict", lambda: predict.predict(prediction))
    chosen = state.once(f"round {number}: select", lambda: select.select(selection))
    state.once(f"round {number}: write", lambda: write.write(selection))
    student = config.override(
        model_name=name,
        model_dir=model_dir(loop, number),
        unlabel_data_dir=os.path.join(selection.output_dir, "data"),
    )
    row = train_and_measure(state, f"round {number}: student {name}", student)
    return {"round": number, **row, "unique": chosen["unique"], "kept": chosen["classes"]}


def stage_configs(
    config: Config, loop: LoopConfig, number: int, teacher_name: str
) -> tuple[Config, SelectConfig]:
    """Settings of the prediction and of the selection of round `number`."""
    from efficientnet_ns.experiment import Experiment

    folder = os.path.join(loop.work_dir, f"round-{number}")
    prefix, num_shards = _unlabeled_shards(config)
    prediction = config.override(
        model_name=teacher_name,
        predict_ckpt_path=model_dir(loop, number - 1),
        output_dir=os.path.join(folder, "predictions"),
        info_dir=os.path.join(folder, "info"),
        num_shards=num_shards,
        shard_id=f"0-{num_shards - 1}",
        file_prefix=prefix,
    )
    selection = SelectConfig(
        input_dir=config.data.unlabel_data_dir,
        prediction_dir=prediction.predict.output_dir,
        prelim_stats_dir=os.path.join(folder, "statistics"),
        output_dir=os.path.join(folder, "selected"),
        num_shards=num_shards,
        num_image=loop.num_image,
        min_threshold=loop.min_threshold,
        num_label_classes=Experiment.from_config(config).num_classes,
        file_prefix=prefix,
        seed=config.train.seed,
    )
    return prediction, selection


def train_and_measure(state: State, name: str, config: Config) -> dict[str, Any]:
    """Trains one model and measures it on the task's evaluation and test sets."""
    from efficientnet_ns.training import train

    metrics = state.once(name, lambda: train.train_and_evaluate(config))
    measured = state.once(f"{name}: measure", lambda: train.evaluate(config))
    return {"model": config.model.model_name, "steps": metrics["step"], "measured": measured}


def main(argv: list[str]) -> None:
    config_lib.no_arguments(argv)
    settings = config_lib.from_flags(Config, flags.FLAGS)
    loop = config_lib.from_flags(LoopConfig, flags.FLAGS)
    for row in run_loop(settings, loop):
        print(json.dumps(row))


def run() -> None:
    """The command line."""
    config_lib.define_flags(Config)
    config_lib.define_flags(LoopConfig)
    config_lib.run(main)


if __name__ == "__main__":
    run()
