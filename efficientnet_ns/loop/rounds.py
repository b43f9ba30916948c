"""Teacher, then rounds of label → select → write → student.

Layout of `work_dir`:

round-0/model                       the first teacher
round-<r>/{predictions,info}        labels given by the model of round r-1
round-<r>/{statistics,selected}     the selection from them, and the balanced records
round-<r>/model                     the student, teacher of round r+1
round-<last>/finetuned-<size>       the fine-tuned last student, with --finetune_resolution
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from efficientnet_ns.config import Config, ConfigError, LoopConfig, SelectConfig
from efficientnet_ns.config import check as check_values
from efficientnet_ns.evaluation import evaluate
from efficientnet_ns.files import shard_names
from efficientnet_ns.ingest import data_source
from efficientnet_ns.loop.state import State
from efficientnet_ns.models import efficientnet
from efficientnet_ns.models.recipes import EPOCHS_OF_TRAIN_STEPS, RECIPES
from efficientnet_ns.pseudo_labels import index, predict, unlabeled_set, write
from efficientnet_ns.pseudo_labels.selection import select
from efficientnet_ns.resolve.resolved_config import ResolvedConfig
from efficientnet_ns.training import train

# Settings of the loop that may change between two runs.
_MAY_GROW = (
    "work_dir",
    "models",
    "image_sizes",
    "unlabel_ratios",
    "finetune_resolution",
    "finetune_epochs",
    "finetune_fix_layers",
)


def _nothing(*_: Any) -> None:
    pass


def run_loop(
    config: Config, loop: LoopConfig, watch: Callable[[str, dict[str, Any]], None] = _nothing
) -> list[dict[str, Any]]:
    """Runs all rounds.

    Args:
      config: settings of all training runs; `unlabel_data_dir` holds the unlabeled records.
      loop: the rounds.
      watch: called with `model` and its row, and with `selection` and the result of `select`, as soon
        as each is available; may raise to end the loop.

    Returns:
      One row per model: `round`, `model`, `steps`, `measured` (metrics per set) and, for
      students, `unique` (pseudo-labeled images) and `kept` ({class: [lowest kept confidence,
      images]}). The fine-tuned last student is one more row, with `finetuned` (its image size).

    Raises:
      ConfigError, DataError: If settings or data cannot work, before anything is done.
    """
    config = data_source.with_records(config)
    trainings = check(config, loop)
    # Models may be added later; each training run protects its own folder.
    settings = {**config.identity(), **dataclasses.asdict(loop)}
    defaults = {**Config().identity(), **dataclasses.asdict(LoopConfig())}
    fixed = {k: v for k, v in settings.items() if k not in _MAY_GROW}
    state = State(loop.work_dir, fixed, defaults)
    name = f"round 0: teacher {trainings[0].model.model_name}"
    rows = [{"round": 0, **train_and_measure(state, name, trainings[0])}]
    watch("model", rows[0])
    for number in range(1, len(trainings)):
        rows.append(_round(state, config, loop, number, watch))
        watch("model", rows[-1])
        if loop.stop_when_worse and best_model(config, rows) < number:
            logging.warning(
                "student %d is worse than its teacher: stopping the rounds here", number
            )
            break
    if loop.finetune_resolution:
        # `number` is that of the last student, even after an early stop.
        rows.append(_finetune(state, config, loop, number))
    return rows


def best_model(config: Config, rows: Sequence[Mapping[str, Any]]) -> int:
    """Returns the round of the best model: the last not clearly worse on the evaluation set.

    "Clearly" means by more than the standard error of an accuracy on that many images. A few held-out
    images cannot separate closer models, and a student has usually seen more.
    """
    name, best = ResolvedConfig.from_config(config).task.eval_set, 0
    found = [row["measured"][name] for row in rows]
    for number, one in enumerate(found):
        top1 = found[best]["top1"]
        # Of equal models, the later one.
        if one["top1"] >= top1 - math.sqrt(top1 * (1 - top1) / one["examples"]):
            best = number
    return best


def check(config: Config, loop: LoopConfig) -> list[Config]:
    """Returns `model_configs`, after checks that would otherwise fail after the teacher's training.

    Raises:
      ConfigError: If settings cannot work.
      DataError: If there are no unlabeled records, or lists name other records.
    """
    trainings = model_configs(config, loop)
    if not (loop.work_dir and config.data.unlabel_data_dir):
        raise ConfigError("--work_dir and --unlabel_data_dir are required")
    check_values(loop)
    for training in trainings:
        ResolvedConfig.from_config(training)
    if any(training.train.unlabel_ratio <= 0 for training in trainings[1:]):
        raise ConfigError("a positive --unlabel_ratio is required for every student")
    # Called only for their errors: missing shards, and lists that name other records or classes.
    _unlabeled_set(config.data.unlabel_data_dir, config)
    index.decisions(stage_configs(config, loop, 1)[1])
    return trainings


def variants(models: str) -> list[str]:
    """Returns the variants that `--models` names: the teacher's, then the students'.

    Raises:
      ConfigError: If there are fewer than two, or one is unknown.
    """
    names = [name.strip() for name in models.split(",")]
    if len(names) < 2:
        raise ConfigError(f"--models={models}: name a teacher and at least one student")
    for name in names:
        if name not in efficientnet.VARIANTS:
            known = ", ".join(efficientnet.VARIANTS)
            raise ConfigError(f"--models={models}: unknown model {name!r}; known: {known}")
    return names


def model_configs(config: Config, loop: LoopConfig) -> list[Config]:
    """Returns the training settings of each model: the first teacher, then the students.

    Raises:
      ConfigError: If the loop's lists have different lengths, or name an unknown model.
    """
    models = variants(loop.models)
    sizes = _per_model("image_sizes", loop.image_sizes, int, len(models))
    ratios = _per_model("unlabel_ratios", loop.unlabel_ratios, float, len(models) - 1)
    trainings = []
    for number, name in enumerate(models):
        training = config.override(model_name=name, model_dir=model_dir(loop, number))
        # First, because the lists of the loop take precedence.
        if loop.published_recipes:
            training = _as_published(training)
        if sizes:
            training = training.override(input_image_size=sizes[number])
        if ratios and number:
            training = training.override(unlabel_ratio=ratios[number - 1])
        trainings.append(training.override(unlabel_data_dir=_pseudo_labeled_dir(loop, number)))
    share = loop.teacher_initial_share
    trainings[0] = trainings[0].override(
        unlabel_data_dir="",
        ema_initial_share=config.train.ema_initial_share if share is None else share,
        unlabel_ratio=0.0,
        train_steps=loop.teacher_steps or config.train.train_steps,
        train_batch_size=loop.teacher_batch_size or config.train.train_batch_size,
    )
    if not loop.warm_start:
        return trainings
    if len(set(models)) > 1:
        raise ConfigError(
            f"--warm_start requires students of their teacher's variant, not {loop.models}"
        )
    return trainings[:1] + [
        warm_started(student, teacher) for teacher, student in zip(trainings, trainings[1:])
    ]


def warm_started(student: Config, teacher: Config) -> Config:
    """Returns the settings of a student that starts from its teacher's weights."""
    return started_from(student, teacher.train.model_dir)


def started_from(config: Config, folder: str | None) -> Config:
    """Returns training settings that start from all weights in `folder`, and from no others."""
    return config.override(init_model=True, init_model_path=folder, init_weights=None, init_skip="")


def _per_model(flag: str, text: str, kind: type, count: int) -> list[Any]:
    """Returns the values of a list flag; [] if it is empty."""
    if not text:
        return []
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    # `float` also accepts nan and inf.
    if len(values) != count or not all(0 < value < float("inf") for value in values):
        raise ConfigError(f"--{flag}={text} must be {count} positive numbers separated by ','")
    return values


def _as_published(config: Config) -> Config:
    """Applies the settings of the published model of this size; keeps a given image size."""
    recipe = RECIPES.get(config.model.model_name or "")
    if recipe is None:
        raise ConfigError(
            f"--published_recipes: none for {config.model.model_name!r}; known: {', '.join(RECIPES)}"
        )
    magnitude = recipe.randaugment_magnitude
    return config.override(
        input_image_size=config.model.input_image_size or recipe.train_resolution,
        # B0 and B1 are published without RandAugment.
        augment_name="randaugment" if magnitude else None,
        randaug_mag=magnitude or config.data.randaug_mag,
        train_ratio=recipe.epochs / EPOCHS_OF_TRAIN_STEPS,
        unlabel_ratio=float(recipe.unlabel_ratio),
    )


def _unlabeled_set(folder: str, config: Config) -> tuple[str, int]:
    """Returns (prefix, number of shards) of the complete unlabeled set in a folder."""
    if ";" in folder:
        raise ConfigError(f"--unlabel_data_dir={folder}: the loop labels one folder")
    options = config.predict
    found = unlabeled_set.find(folder, options.file_prefix, options.num_shards)
    # Raises DataError if a shard is missing.
    shard_names.list_shards(folder, found[0])
    return found


def model_dir(loop: LoopConfig, number: int) -> str:
    """Folder of the model of a round."""
    return os.path.join(loop.work_dir, f"round-{number}", "model")


def _pseudo_labeled_dir(loop: LoopConfig, number: int) -> str:
    """Folder of the balanced records of a round."""
    return os.path.join(loop.work_dir, f"round-{number}", "selected", "data")


def _round(
    state: State, config: Config, loop: LoopConfig, number: int, watch: Callable
) -> dict[str, Any]:
    prediction, selection = stage_configs(config, loop, number)
    state.once(f"round {number}: predict", lambda: predict.predict(prediction))
    chosen = state.once(f"round {number}: select", lambda: select(selection))
    # Before the records are written and used, because it may end the loop.
    watch("selection", {"round": number, **chosen})
    state.once(f"round {number}: write", lambda: write.write(selection))
    student = model_configs(config, loop)[number]
    name = f"round {number}: student {student.model.model_name}"
    row = train_and_measure(state, name, student)
    return {"round": number, **row, "unique": chosen["unique"], "kept": chosen["classes"]}


def stage_configs(config: Config, loop: LoopConfig, number: int) -> tuple[Config, SelectConfig]:
    """Returns the settings of prediction and selection in round `number`.

    The teacher labels at the resolution at which it was trained.
    """
    folder = os.path.join(loop.work_dir, f"round-{number}")
    teacher = model_configs(config, loop)[number - 1]
    prediction = prediction_config(teacher, config.data.unlabel_data_dir, folder)
    return prediction, selection_config(prediction, loop, folder)


def prediction_config(teacher: Config, unlabeled: str, folder: str) -> Config:
    """Returns the settings for labeling the whole folder `unlabeled` with `teacher`'s model."""
    prefix, num_shards = _unlabeled_set(unlabeled, teacher)
    return teacher.override(
        unlabel_data_dir=unlabeled,
        predict_ckpt_path=teacher.train.model_dir,
        output_dir=os.path.join(folder, "predictions"),
        info_dir=os.path.join(folder, "info"),
        num_shards=num_shards,
        shard_id=f"0-{num_shards - 1}",
        file_prefix=prefix,
    )


def selection_config(prediction: Config, loop: LoopConfig, folder: str) -> SelectConfig:
    """Returns the settings of selection; records are written to `folder/selected/data`."""
    options = prediction.predict
    return SelectConfig(
        unlabel_data_dir=prediction.data.unlabel_data_dir,
        prediction_dir=options.output_dir,
        prelim_stats_dir=os.path.join(folder, "statistics"),
        output_dir=os.path.join(folder, "selected"),
        num_shards=options.num_shards,
        num_image=loop.num_image,
        min_threshold=loop.min_threshold,
        exclude=prediction.data.exclude,
        reviewed=loop.reviewed,
        num_label_classes=ResolvedConfig.from_config(prediction).num_classes,
        file_prefix=options.file_prefix,
        seed=prediction.train.seed,
    )


def _finetune(state: State, config: Config, loop: LoopConfig, number: int) -> dict[str, Any]:
    """Fine-tunes the student of round `number` at the higher resolution and measures it there."""
    tuning = finetune_config(config, loop, number)
    size = loop.finetune_resolution
    name = f"round {number}: fine-tune {tuning.model.model_name} at {size}"
    return {"round": number, **train_and_measure(state, name, tuning), "finetuned": size}


def finetune_config(config: Config, loop: LoopConfig, number: int) -> Config:
    """Returns the settings for fine-tuning the student of round `number`.

    The train-test resolution fix of arXiv 1911.04252 §3.1: `finetune_epochs` more epochs at a
    higher resolution, on labeled images without augmentation, at the end of the learning rate
    schedule.
    """
    student = model_configs(config, loop)[number]
    folder = os.path.join(loop.work_dir, f"round-{number}", f"finetuned-{loop.finetune_resolution}")
    images = ResolvedConfig.from_config(config).epoch_images()
    steps = max(1, round(loop.finetune_epochs * images / config.train.train_batch_size))
    return started_from(student, student.train.model_dir).override(
        model_dir=folder,
        input_image_size=loop.finetune_resolution,
        fix_layer_num=loop.finetune_fix_layers,
        remove_aug=True,
        unlabel_ratio=0.0,
        unlabel_data_dir="",
        # These steps are the last of the schedule, which must have at least as many.
        train_steps=max(steps, config.train.train_steps),
        # `steps` are actual updates, not to be stretched.
        train_ratio=1.0,
        train_last_step_num=steps,
    )


def train_and_measure(state: State, name: str, config: Config) -> dict[str, Any]:
    """Trains one model and measures it on the task's evaluation and test sets."""
    metrics = state.once(name, lambda: train.train_and_evaluate(config))
    # A separate stage, because training evaluates only on the evaluation set.
    measured = state.once(f"{name}: measure", lambda: evaluate.evaluate(config))
    return {"model": config.model.model_name, "steps": metrics["step"], "measured": measured}
