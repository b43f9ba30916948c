"""Studies: arms of training, labeling and selection runs, each done once in a hashed folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf
from absl import logging

from efficientnet_ns.config import (
    Config,
    ConfigError,
    DemoConfig,
    LoopConfig,
    SelectConfig,
    StudyConfig,
    as_dict,
    check,
    comparable,
)
from efficientnet_ns.config.loop import QUICK_STUDENT_STEPS, QUICK_TEACHER_STEPS
from efficientnet_ns.evaluation import evaluate
from efficientnet_ns.files import manifests
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.progress import Progress
from efficientnet_ns.ingest import data_source
from efficientnet_ns.loop import digits, rounds, study_results
from efficientnet_ns.loop.questions import STUDIES, Method, Study
from efficientnet_ns.loop.state import State
from efficientnet_ns.models import efficientnet
from efficientnet_ns.pseudo_labels import predict, write
from efficientnet_ns.pseudo_labels.selection import select
from efficientnet_ns.resolve.resolved_config import ResolvedConfig
from efficientnet_ns.training import train
from efficientnet_ns.training.session import TrainingDiverged


@dataclasses.dataclass(frozen=True)
class Work:
    """A piece of an arm: `kind` is a key of `_DO`, `config` its argument."""

    kind: str
    config: Any


# --- Arms and their pieces ------------------------------------------------------------------------


def chosen_studies(names: str, quick: bool) -> dict[str, Study]:
    """Returns the named studies, with the arms to run.

    Raises:
      ConfigError: If there is no study of a given name.
    """
    wanted = list(STUDIES) if names == "all" else [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in STUDIES]
    if unknown:
        raise ConfigError(
            f"--studies: there is no {unknown[0]!r}; known: all, {', '.join(STUDIES)}"
        )
    studies = {}
    for name in wanted:
        arms = {n: arm for n, arm in STUDIES[name].arms.items() if arm.quick or not quick}
        if len(arms) > 1 or not quick:
            studies[name] = dataclasses.replace(STUDIES[name], arms=arms)
        else:
            logging.info("--quick skips the study %s: its arms take too long", name)
    if not studies:
        raise ConfigError(f"--quick has no arms of --studies={names}")
    return studies


def chosen_seeds(text: str) -> list[int]:
    """Parses `"0,1,2"`; raises ConfigError unless it lists different non-negative integers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len({int(p) for p in parts}) < len(parts):
        raise ConfigError(f"--seeds={text} must be different whole numbers separated by ','")
    return [int(part) for part in parts]


def split_changes(changes: Mapping[str, Any]) -> tuple[Method, dict[str, Any], dict[str, Any]]:
    """Returns (method, changes of `Config`, of `SelectConfig`); ConfigError for other names."""
    method, settings, selecting = {}, {}, {}
    for name, value in changes.items():
        if name in Method.__dataclass_fields__:
            method[name] = value
        elif name in Config().values():
            settings[name] = value
        elif name in SelectConfig.__dataclass_fields__:
            selecting[name] = value
        else:
            raise ConfigError(f"no setting is called {name!r}")
    return Method(**method), settings, selecting


# Smoothed labels would keep the predictions of labeled images below the threshold.
_FIXMATCH = {"consistency_threshold": 0.95, "label_smoothing": 0.0}


def pieces(config: Config, loop: LoopConfig, changes: Mapping[str, Any]) -> list[Work]:
    """Returns the pieces of an arm, in order; the last one trains the resulting model.

    Arms share equal pieces: the name of a folder is a hash of everything that determines its content,
    including the names of the folders it is made from.

    Args:
      config: settings of all training runs, with the seed; see `rounds.run_loop`.
      loop: the teacher and the student, and the selection.
      changes: changes of the arm.
    """
    method, settings, selecting = split_changes(changes)
    teacher, student = rounds.model_configs(config, loop)
    student = student.override(**settings)
    steps = max(1, round(student.train.train_steps * method.steps))
    student = _widened(student, method.student_width).override(train_steps=steps)
    if method.labels_only or method.own_labels:
        changed = {"unlabel_ratio": 0.0, "unlabel_data_dir": ""}
        if method.own_labels:
            # The unlabeled records themselves, without a teacher's selection.
            changed = {**_FIXMATCH, "unlabel_data_dir": config.data.unlabel_data_dir}
        student = student.override(train_steps=teacher.train.train_steps + steps, **changed)
        return [Work("train", _placed(student, loop))]
    work = [Work("train", _placed(_widened(teacher, method.teacher_width), loop))]
    for _ in range(method.rounds):
        # The last piece so far trains the model that labels now.
        labeling = _labeling(work[-1].config, config, loop, settings)
        selection = _selection(labeling, loop, method, selecting)
        pseudo_labeled = student.override(
            unlabel_data_dir=os.path.join(selection.output_dir, "data")
        )
        trainings = _trainings(pseudo_labeled, work[-1].config, method, loop)
        work += [Work("label", labeling), Work("select", selection)]
        work += [Work("train", training) for training in trainings]
    return work


def _widened(config: Config, factor: float) -> Config:
    if factor == 1:
        return config
    width = config.model.width_coefficient
    width = width or efficientnet.get_variant(as_dict(config.model)["model_name"]).width
    return config.override(width_coefficient=width * factor)


def _placed(config: Config, loop: LoopConfig) -> Config:
    """Sets model_dir by a hash of the settings without defaults, so that new settings may come."""
    defaults = Config().identity()
    settings = {k: v for k, v in config.identity().items() if v != defaults[k]}
    return config.override(model_dir=_folder("train", settings, loop))


def _folder(kind: str, settings: Mapping[str, Any], loop: LoopConfig) -> str:
    # Relative to work_dir, so that it may be moved, or given with a trailing slash.
    plain = {k: _relative(v, loop.work_dir.rstrip("/")) for k, v in comparable(settings).items()}
    key = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
    return os.path.join(loop.work_dir, "cache", f"{kind}-{key}")


def _relative(value: Any, work_dir: str) -> Any:
    """Removes `work_dir` from the beginning of a setting's paths, which are joined with `;`."""
    if not isinstance(value, str):
        return value
    return ";".join(
        part.removeprefix(work_dir) if part.startswith(f"{work_dir}/") else part
        for part in value.split(";")
    )


_OF_LABELING = ("noised_teacher", "test_time_views")


def _labeling(teacher: Config, config: Config, loop: LoopConfig, settings: dict) -> Config:
    own = {name: value for name, value in settings.items() if name in _OF_LABELING}
    teacher = teacher.override(**own)
    # Only settings that change labels, so that arms that differ otherwise share them.
    decisive = {name: getattr(teacher.predict, name) for name in _OF_LABELING}
    unlabeled = config.data.unlabel_data_dir
    decisive.update(teacher=teacher.train.model_dir, unlabeled=unlabeled)
    return rounds.prediction_config(teacher, unlabeled, _folder("labels", decisive, loop)).override(
        **own
    )


def _selection(
    labeling: Config, loop: LoopConfig, method: Method, selecting: dict[str, Any]
) -> SelectConfig:
    images = max(1, round(loop.num_image * method.images))
    # Without folders at first, because their names are a hash of all other settings.
    plain = rounds.selection_config(labeling, dataclasses.replace(loop, num_image=images), "")
    chosen = dataclasses.replace(plain, **selecting)
    folder = _folder("selected", as_dict(chosen), loop)
    placed = rounds.selection_config(labeling, loop, folder)
    where = ("prelim_stats_dir", "output_dir")
    return dataclasses.replace(chosen, **{name: getattr(placed, name) for name in where})


def _trainings(student: Config, teacher: Config, method: Method, loop: LoopConfig) -> list[Config]:
    """Returns the training runs of one student, in order."""
    if method.warm_start:
        student = rounds.warm_started(student, teacher)
    if not method.pretrain:
        return [_placed(student, loop)]
    pretrained = _placed(student.override(label_weight=0.0), loop)
    tuned = rounds.started_from(student, pretrained.train.model_dir).override(
        unlabel_ratio=0.0,
        unlabel_data_dir="",
        train_last_step_num=max(1, student.train.train_steps // 4),
    )
    return [pretrained, _placed(tuned, loop)]


# --- Running pieces -------------------------------------------------------------------------------


def _training(config: Config) -> manifests.Stage:
    """Returns the stage of training and measurement, whose manifest stores the result.

    The name of the folder is a hash of the settings, so these need no comparison.
    """
    return manifests.Stage(os.path.join(config.train.model_dir or "", "measured.json"), [], {})


def _train(config: Config) -> dict[str, Any]:
    """Trains and measures a model, or returns the recorded result."""
    return _training(config).once(lambda: _trained(config))


def _trained(config: Config) -> dict[str, Any]:
    started = time.monotonic()
    metrics = train.train_and_evaluate(config, evaluate=False)
    trained = time.monotonic()
    result = {
        "measured": evaluate.evaluate(config),
        "steps": metrics["step"],
        "train_seconds": trained - started,
        "seconds": time.monotonic() - started,
    }
    # Keras' global state grows with every model.
    tf.keras.backend.clear_session()
    return result


def _label(config: Config) -> None:
    predict.predict(config)


def _select(config: SelectConfig) -> None:
    select(config)
    write.write(config)


_DO: dict[str, Callable[[Any], Any]] = {"train": _train, "label": _label, "select": _select}


def _images(config: Config) -> int:
    """Returns the images that training processes, from which its time is estimated."""
    resolved = ResolvedConfig.from_config(config)
    return resolved.steps_to_run * resolved.images_per_step


class Runner:
    """Runs the unfinished pieces of arms, and logs how long the rest will take.

    Args:
      arms: all arms to run, each a list of pieces.
    """

    def __init__(self, arms: list[list[Work]]):
        # By folder, because arms share training runs.
        trainings = {
            w.config.train.model_dir: w.config for a in arms for w in a if w.kind == "train"
        }
        done = {f for f, c in trainings.items() if _training(c).done()}
        self._left = {f: _images(c) for f, c in trainings.items() if f not in done}
        finished = sum(_images(c) for f, c in trainings.items() if f in done)
        total = finished + sum(self._left.values())
        logging.info("study: %d training runs, %d of them done", len(trainings), len(done))
        self._progress = Progress(total, "study", "images", done=finished, line_every=1)

    def result(self, name: str, arm: list[Work]) -> dict[str, Any] | None:
        """Returns the result of the arm's last model; None, logged, if it cannot be trained.

        A teacher that cannot be trained raises, because then no arm can be trained.
        """
        result = None
        if _training(arm[-1].config).done():
            # A recorded result does not need the pieces that it was made from.
            arm = arm[-1:]
        for work in arm:
            try:
                result = _DO[work.kind](work.config)
            except (DataError, TrainingDiverged) as e:
                if work is arm[0] and arm[1:]:
                    raise
                logging.error("%s has no result: %s", name, e)
                return None
            images = self._left.pop(work.config.train.model_dir, 0) if work.kind == "train" else 0
            if images:
                self._progress.update(images, f"after {name}")
        return result


# --- The program ----------------------------------------------------------------------------------


def run_study(config: Config, loop: LoopConfig, options: StudyConfig) -> dict[str, Any]:
    """Runs the chosen studies and writes their results to `loop.work_dir`.

    Args:
      config: settings of all training runs. For the task digits without a `label_data_dir`, the
        demo's data are made for each seed.
      loop: `models` names the teacher and the student.
      options: which questions and seeds.

    Returns:
      The contents of `study.json`; see `study_results.summary`.

    Raises:
      ConfigError, DataError: If settings or data cannot work, before anything is trained.
    """
    studies = chosen_studies(options.studies, options.quick)
    seeds = chosen_seeds(options.seeds)
    _check_loop(loop)
    if options.quick:
        config, loop = _shortened(config, loop)
    # --- All arms are laid out and checked before the first is trained
    arms: dict[tuple[int, str, str], list[Work]] = {}
    for seed in seeds:
        seeded = _with_data(config.override(seed=seed), loop)
        rounds.check(seeded, loop)
        for name, study in studies.items():
            for arm in study.arms:
                arms[seed, name, arm] = pieces(seeded, loop, study.arms[arm].changes)
    _check_trainings(arms)
    # --- Training, seed by seed
    runner, found = Runner(list(arms.values())), {}
    for (seed, name, arm), work in arms.items():
        found[seed, name, arm] = runner.result(f"{name}: {arm}, seed {seed}", work)
        # After the last arm of each seed, so that a killed study leaves results of complete seeds.
        if (seed, name, arm) == [key for key in arms if key[0] == seed][-1]:
            done = seeds[: seeds.index(seed) + 1]
            results = study_results.summary(studies, done, found)
            study_results.write(loop.work_dir, results)
    return results


def _check_loop(loop: LoopConfig) -> None:
    if not loop.work_dir:
        raise ConfigError("--work_dir is required: the folder for all runs and their results")
    if len(loop.models.split(",")) != 2:
        raise ConfigError(
            f"--models={loop.models}: expected two models, the teacher and the student"
        )
    if loop.finetune_resolution:
        raise ConfigError("--finetune_resolution does not apply: a study does not fine-tune")


def _shortened(config: Config, loop: LoopConfig) -> tuple[Config, LoopConfig]:
    steps = config.train.train_steps
    teacher_steps = min(loop.teacher_steps or steps, QUICK_TEACHER_STEPS)
    short = config.override(train_steps=min(steps, QUICK_STUDENT_STEPS))
    return short, dataclasses.replace(loop, teacher_steps=teacher_steps)


def _with_data(config: Config, loop: LoopConfig) -> Config:
    """Adds the demo's data for the seed if the task is digits and no data are given."""
    config = data_source.with_records(config)
    if config.data.task_name != "digits" or config.data.label_data_dir:
        return config
    seed = config.train.seed
    folder = os.path.join(loop.work_dir, "data", f"seed-{seed}")
    chosen = {"seed": seed, "labels_per_class": DemoConfig().labels_per_class}
    state = State(folder, chosen)
    state.once("data", lambda: digits.make_records(folder, **chosen))
    return config.override(
        label_data_dir=os.path.join(folder, "labeled"),
        unlabel_data_dir=os.path.join(folder, "unlabeled"),
    )


def _check_trainings(arms: Mapping[Any, list[Work]]) -> None:
    for work in arms.values():
        for piece in work:
            check(piece.config)
            if piece.kind != "select":
                ResolvedConfig.from_config(piece.config)
