"""Trains a model on two sets of pictures: records, probe, rounds, control, labels, export, report.

Layout of `work_dir`:

settings.json              every setting with its reason, and the facts behind them
data/{labeled,unlabeled}   records, and data/task.json
probe                      a linear probe on the published weights, from which all training starts
rounds                     teacher and students; see `rounds`
control/model              with --control
labels, labels.csv         the best model's label of every unlabeled picture
export                     SavedModel and TensorFlow Lite file of the best model
report.html                results, curves, predictions and settings
state.json                 which of these are finished
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
from absl import logging

from efficientnet_ns.config import (
    Config,
    ConfigError,
    ExportConfig,
    LoopConfig,
    MakeConfig,
    PicturesConfig,
    check,
    given,
    mark_given,
    require,
)
from efficientnet_ns.data import tasks
from efficientnet_ns.evaluation import evaluate
from efficientnet_ns.files import object_stores, progress, text_table
from efficientnet_ns.ingest import data_source, duplicates, survey
from efficientnet_ns.loop import labels_csv, mistakes, plan, rounds, rules, run_checks, run_report
from efficientnet_ns.loop.plan import Plan
from efficientnet_ns.loop.state import State
from efficientnet_ns.models import published
from efficientnet_ns.pseudo_labels import predict
from efficientnet_ns.resolve import stored_model
from efficientnet_ns.serving.model_export import export_model
from efficientnet_ns.training import probe

# A few broken files in a folder of pictures do not stop the run; they are listed.
_MAX_BAD_FRACTION = 0.5
_ROUNDS = "rounds"  # Folder of the teacher and the students in the work_dir.
# Fields of a task that trained weights determine.
_OF_THE_MODEL = ("mean", "std", "small_image", "image_size")


@dataclasses.dataclass(frozen=True)
class Result:
    """Results of a run.

    Attributes:
      rows: a row per model, as in the printed table.
      best: folder of the best model's checkpoint.
      accuracy: of the best model, 0..1, by set: `held-out`, and `test` if there is one.
      warnings: problems to review.
      labels, report, saved_model, tflite: paths.
      settings: every setting.
    """

    rows: list[dict[str, str]]
    best: str
    accuracy: dict[str, float]
    warnings: list[str]
    labels: str
    report: str
    saved_model: str
    tflite: str
    settings: dict[str, Any]

    def __str__(self) -> str:
        table = text_table.text_table(
            list(self.rows[0]), [list(row.values()) for row in self.rows], rule=True
        )
        module = "python -m efficientnet_ns"
        work_dir = os.path.dirname(self.report)  # Every program finds the best model by it.
        deploy = os.path.join(os.path.dirname(self.saved_model), "deploy", "start.sh")
        lines = [
            table,
            *(f"WARNING: {text}" for text in self.warnings),
            f"labels:   {self.labels}",
            f"report:   {self.report}",
            f"exported: {self.saved_model} and {self.tflite}",
            f"predict:  {module}.predict_image --model_dir={shlex.quote(work_dir)} photo.jpg",
            f"serve:    {shlex.quote(deploy)}",
        ]
        return "\n".join(lines)


def run(pictures: PicturesConfig, settings: Config, loop: LoopConfig) -> None:
    """Runs the program on pictures if given, else `rounds.run_loop` on records; prints results."""
    if not (pictures.labeled or pictures.unlabeled):
        if unused := sorted(given(pictures)):
            raise ConfigError(f"--{unused[0]} requires --labeled and --unlabeled")
        data = settings.data
        if not (data.label_data_dir or data.data_source or data.unlabel_data_dir):
            raise ConfigError(
                "--labeled and --unlabeled (pictures) and --work_dir are required; or, for records, "
                "--label_data_dir, --task_name, --unlabel_data_dir and --work_dir"
            )
        rows = rounds.run_loop(settings, loop)
        print("\n".join(map(json.dumps, rows)))
        return
    if pictures.dry_run:
        _, made = _planned(pictures, settings, loop)
        print(plan.describe(made, pictures))
        return
    print(from_pictures(pictures, settings, loop))


def noisy_student(
    labeled: str | os.PathLike,
    unlabeled: str | os.PathLike,
    work_dir: str | os.PathLike,
    **values: Any,
) -> Result:
    """Trains a classifier on two sets of pictures; after a kill, the same call continues.

    Args:
      labeled: folder or archive with a folder per class, `tfds:<name>`, or a folder of records.
      unlabeled: pictures without labels, in the same forms.
      work_dir: folder of all outputs.
      values: `test`, `control`, `time_limit`, and any other flag of `noisy_student.py`, each of
        which overrides its rule.

    Raises:
      ConfigError, DataError: If settings or pictures cannot work.
    """
    frame: dict[str, Any] = {"labeled": os.fspath(labeled), "unlabeled": os.fspath(unlabeled)}
    frame |= {k: v for k, v in values.items() if k in PicturesConfig.__dataclass_fields__}
    of_loop = {k: v for k, v in values.items() if k in LoopConfig.__dataclass_fields__}
    rest = {k: v for k, v in values.items() if k not in {**frame, **of_loop}}
    loop = LoopConfig(work_dir=os.fspath(work_dir), **of_loop)
    settings = Config().override(**rest)
    # Even a value that equals the default counts as given and overrides its rule.
    mark_given(settings, rest)
    mark_given(loop, of_loop)
    return from_pictures(PicturesConfig(**frame), settings, loop)


def from_pictures(pictures: PicturesConfig, settings: Config, loop: LoopConfig) -> Result:
    """Runs everything, continuing where an earlier run stopped.

    Raises:
      ConfigError, DataError: If settings or pictures cannot work.
      run_checks.CannotWork: If the teacher has learned nothing.
    """
    values, made = _planned(pictures, settings, loop)
    work = loop.work_dir
    print(plan.describe(made, pictures), file=sys.stderr)
    # Before any work: after a kill, the plan is read, even if the machine would suggest another.
    plan.write(made, pictures, values, work)
    run = _Run(pictures, made, work)
    # The rounds keep a state of their own.
    if done := [*run.state.finished, *State.recorded(os.path.join(work, _ROUNDS))]:
        print(f"continuing {work}: finished are {', '.join(done)}", file=sys.stderr)
    verbosity = logging.get_verbosity()
    try:
        # The progress line shows the essentials of each stage's log.
        logging.set_verbosity(logging.WARNING)
        with progress.Whole(_stages(made, pictures)):
            return run.result()
    finally:
        logging.set_verbosity(verbosity)


def _planned(
    pictures: PicturesConfig, settings: Config, loop: LoopConfig
) -> tuple[dict[str, Any], Plan]:
    """Returns (settings that override their rules, plan); raises ConfigError if it cannot work."""
    values = _checked(pictures, settings, loop)
    made = plan.make(pictures, values, loop.work_dir)
    # Called only for its errors, before records are made.
    rounds.model_configs(*plan.configs(made.chosen))
    return values, made


def _checked(pictures: PicturesConfig, settings: Config, loop: LoopConfig) -> dict[str, Any]:
    """Checks settings; returns those that override their rules."""
    for one in (pictures, settings, loop):
        check(one)
    require(pictures, "labeled", "unlabeled")
    rounds.variants(loop.models)  # Called only for its errors, before the pictures are read.
    if not pictures.dry_run:
        require(loop, "work_dir")
    return plan.chosen_by_user(pictures, settings, loop)


def _stages(made: Plan, pictures: PicturesConfig) -> dict[str, float]:
    """Returns {stage: estimated seconds}."""
    chosen, facts = made.chosen, made.facts
    # The names are those that `State.once` is called with, here and in `rounds`.
    parts = rules.seconds(facts, chosen, made.pace, control=pictures.control)
    models = rounds.variants(chosen["models"])
    students = len(models) - 1
    labeling = parts["labeling"] / len(models)
    stages = {
        "records": 5 + (facts.labeled + facts.unlabeled) * 0.005 / facts.cores,
        "probe": 20 if chosen["init_weights"] else 0,
        f"round 0: teacher {models[0]}": parts["teacher"] + rules.STARTUP_SECONDS,
        "labels": labeling,
        "export": 30,
        "report": 10,
    }
    for number in range(1, len(models)):
        stages[f"round {number}: predict"] = labeling
        name = f"round {number}: student {models[number]}"
        stages[name] = parts["students"] / students + rules.STARTUP_SECONDS
    if pictures.control:
        stages["control: labeled pictures only, as many updates"] = (
            parts["control"] + rules.STARTUP_SECONDS
        )
    return stages


class _Run:
    """One run: its folders, and its stages in order."""

    def __init__(self, pictures: PicturesConfig, made: Plan, work_dir: str):
        self.pictures, self.plan, self.work = pictures, made, work_dir
        chosen = made.chosen
        frame = {k: getattr(pictures, k).rstrip("/") for k in ("labeled", "unlabeled", "test")}
        # Without reasons, whose wording another version may change.
        self.state = State(work_dir, {**frame, **chosen})
        self.warnings: list[str] = rules.warnings(made.facts, chosen)

    def _in_work(self, *names: str) -> str:
        return os.path.join(self.work, *names)

    def result(self) -> Result:
        """Runs all unfinished stages."""
        chosen = self.plan.chosen
        # --- Records
        data = self.state.once("records", self._make_records)
        self._tell_of_records(data)
        base, loop = plan.configs(chosen)
        base = base.override(**data["places"])
        loop = dataclasses.replace(loop, work_dir=self._in_work(_ROUNDS))
        # --- Probe, rounds, control
        rows = []
        if chosen["init_weights"]:
            rows.append(self._probe(base, loop))
            base = rounds.started_from(base, self._in_work("probe"))
        names = tasks.class_names(tasks.get_task(base.data.task_name or "")) or ()
        watch = run_checks.Watch(base, loop, names, self._warn)
        trained = rounds.run_loop(base, loop, watch)
        rows += trained
        if self.pictures.control:
            rows.append(self._control(base, loop, trained))
        # --- Best model: labels and export
        sets = tasks.get_task(base.data.task_name or "")
        tops = [row["measured"][sets.eval_set]["top1"] for row in trained]
        best = rounds.best_model(base, trained)
        self._tell_of_worse_student(tops, best)
        model = rounds.model_configs(base, loop)[best]
        # With this entry, `stored_model.find` resolves `work_dir` to the best model.
        self.state.once(stored_model.BEST, lambda: {"round": best})
        self.state.once("labels", lambda: self._label(base, loop, model, best, len(trained)))
        exported = self.state.once("export", lambda: self._export(model))
        # --- Report
        table = run_report.table(rows, sets, base, best)
        judged = self._judged(model)
        with progress.stage("report"):
            path = run_report.write(
                self._in_work("report.html"),
                plan=self.plan,
                config=base,
                loop=loop,
                rows=rows,
                table=table,
                warnings=self.warnings,
                judged=judged,
                best=best,
                control=self._in_work("control", "model"),
            )
        return Result(
            rows=table,
            best=model.train.model_dir or "",
            accuracy={name: one.accuracy for name, one in judged.items()},
            warnings=self.warnings,
            labels=self._in_work("labels.csv"),
            report=path,
            saved_model=exported["saved_model"],
            tflite=exported["tflite"],
            settings=chosen,
        )

    def _probe(self, base: Config, loop: LoopConfig) -> dict[str, Any]:
        """Fits and measures the linear probe from which all training starts; returns its row."""
        folder, weights = self._in_work("probe"), self.plan.chosen["init_weights"]
        first = rounds.model_configs(base, loop)[0]
        self.state.once("probe", lambda: probe.fit(first, weights, folder))
        measure = first.override(init_model_path=folder, model_dir=None, eval_dir=folder)
        measured = self.state.once("probe: measure", lambda: evaluate.evaluate(measure))
        return {
            "round": "probe",
            "model": first.model.model_name,
            "steps": 0,
            "measured": measured,
        }

    def _warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            logging.warning("%s", text)

    # --- Records

    def _make_records(self) -> dict[str, Any]:
        labeled, counts = self._labeled_records()
        unlabeled = self.pictures.unlabeled
        if not survey.is_records(unlabeled):
            folder = self._in_work("data", "unlabeled")
            config = self._make_config(unlabeled, folder, labeled=False)
            twice = set(self._duplicates())
            counts |= data_source.make_records(config, twice)
            counts["duplicates"] = len(twice)
            unlabeled = folder
        task = self._in_work("data", tasks.TASK_FILE)
        object_stores.make_folder(os.path.dirname(task))
        # A new file, so that given records and their task stay unchanged.
        known = tasks.get_task(os.path.join(labeled, tasks.TASK_FILE))
        fields = dataclasses.asdict(known)
        if self.plan.chosen["init_weights"]:
            # Published weights have their own normalization, and strides for large images.
            fields = {k: v for k, v in fields.items() if k not in _OF_THE_MODEL}
        tasks.write_task(task, **fields)
        places = {
            "label_data_dir": labeled,
            "unlabel_data_dir": unlabeled,
            "task_name": task,
        }
        return {"places": places, "counts": counts}

    def _duplicates(self) -> list[str]:
        """Returns unlabeled copies of labeled or test pictures, which students must not see."""
        places = [self.pictures.unlabeled, self.pictures.labeled, self.pictures.test]
        plain = [place for place in places if place and plan.is_pictures(place)]
        # Only pictures in files can be compared; records and TFDS sets are not read for this.
        if plain[:1] != places[:1]:
            return []
        return duplicates.among(plain[0], plain[1:])

    def _labeled_records(self) -> tuple[str, dict[str, int]]:
        place = self.pictures.labeled
        if survey.is_records(place):
            if self.pictures.test:
                raise ConfigError(
                    "--test: a folder of records (--labeled) contains its own test set"
                )
            return place, {}
        folder = self._in_work("data", "labeled")
        config = self._make_config(place, folder, labeled=True)
        counts = data_source.make_records(config)
        if self.pictures.test:
            test = dataclasses.replace(
                config, source=self.pictures.test, image_set="test", validation_fraction=0.0
            )
            counts |= data_source.make_records(test)
        return folder, counts

    def _make_config(self, source: str, folder: str, *, labeled: bool) -> MakeConfig:
        chosen = self.plan.chosen
        return MakeConfig(
            source=source,
            output_dir=folder,
            labeled=labeled,
            validation_fraction=chosen["held_out"] if labeled else 0.0,
            max_side=chosen["max_side"],
            max_bad_fraction=_MAX_BAD_FRACTION,
            seed=chosen.get("seed", 0),
        )

    def _tell_of_records(self, data: Mapping[str, Any]) -> None:
        for name in ("labeled", "unlabeled"):
            self.warnings += run_checks.quarantined(self._in_work("data", name))
        if number := data["counts"].get("duplicates"):
            self.warnings.append(
                "unlabeled pictures that were excluded as exact copies of labeled or test pictures: "
                f"{number}"
            )

    # --- After the rounds

    def _tell_of_worse_student(self, tops: list[float], best: int) -> None:
        """Warns if the last student is not the best model; `tops` holds each model's top-1."""
        if best < len(tops) - 1:
            self._warn(
                f"student {len(tops) - 1} ({tops[-1]:.1%} held out) is worse than "
                f"{run_report.name_of(best)} ({tops[best]:.1%}), which is kept as the best model"
            )

    def _control(
        self, base: Config, loop: LoopConfig, trained: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Trains on labeled pictures only, with all the updates and the teacher's settings."""
        config = rounds.model_configs(base, loop)[0].override(
            model_dir=self._in_work("control", "model"),
            train_steps=sum(row["steps"] for row in trained),
            # `steps` are actual updates, which --train_ratio has already stretched.
            train_ratio=1.0,
            train_last_step_num=-1,
        )
        name = "control: labeled pictures only, as many updates"
        return {"round": "control", **rounds.train_and_measure(self.state, name, config)}

    def _label(
        self, base: Config, loop: LoopConfig, model: Config, best: int, models: int
    ) -> dict[str, Any]:
        """Writes `labels.csv`: the best model's prediction for every unlabeled picture."""
        folder = self._in_work("labels")
        if best + 1 < models:  # It has already labeled them as a teacher.
            folder = os.path.join(loop.work_dir, f"round-{best + 1}")
        prediction = rounds.prediction_config(model, base.data.unlabel_data_dir, folder)
        predict.predict(prediction)
        # `kept` refers to the last selection, regardless of which model is the best.
        _, selection = rounds.stage_configs(base, loop, models - 1)
        return labels_csv.write(
            self._in_work("labels.csv"),
            dataclasses.replace(selection, prediction_dir=prediction.predict.output_dir),
            tasks.class_names(tasks.get_task(base.data.task_name or "")),
        )

    def _export(self, model: Config) -> dict[str, str]:
        folder = self._in_work("export")
        paths = {"saved_model": os.path.join(folder, "1")}
        options = ExportConfig(export_dir=folder, version=1)
        facts = self._facts(model)
        # A killed export does not count as one, because its graph is written last.
        if not stored_model.is_export(paths["saved_model"]):
            export_model(model, options, facts)
        lite = dataclasses.replace(options, format="tflite")
        # The name that `export_model` gives the file of version 1.
        file = os.path.join(folder, f"{model.model.model_name}-1-float32.tflite")
        if not tf.io.gfile.exists(file):
            export_model(model, lite, facts)
        return {**paths, "tflite": file}

    def _facts(self, model: Config) -> dict[str, str]:
        """Returns facts for the model card, where names of folders in `work_dir` mean nothing."""
        start = self.plan.chosen["init_weights"]
        if start == published.OWN_VARIANT:
            start = f"published weights of {model.model.model_name}"
        facts = {"Labeled data": self.pictures.labeled, "Started from": start}
        if model.train.unlabel_ratio:
            facts["Pseudo-labeled data"] = self.pictures.unlabeled
        return {k: os.path.basename(place.rstrip("/")) for k, place in facts.items() if place}

    def _judged(self, model: Config) -> dict[str, mistakes.Judged]:
        task = tasks.get_task(model.data.task_name or "")
        sets = {"held-out": task.eval_set, "test": task.test_set}
        judge = mistakes.Judge(model)
        return {name: judge(prefix) for name, prefix in sets.items() if prefix}
