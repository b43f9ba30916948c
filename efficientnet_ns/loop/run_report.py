"""`report.html` and the table of results of a run on two sets of pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from efficientnet_ns import report
from efficientnet_ns.config import Config, LoopConfig, ReportConfig
from efficientnet_ns.data import tasks
from efficientnet_ns.files import metrics_log
from efficientnet_ns.loop import rounds
from efficientnet_ns.loop.mistakes import Judged
from efficientnet_ns.loop.plan import Plan
from efficientnet_ns.outcomes import labeling_report, outcome
from efficientnet_ns.report.pictures import picture
from efficientnet_ns.resolve.resolved_config import ResolvedConfig
from efficientnet_ns.training import preview

_CURVES = ("eval/top1", "eval/loss", "lab/loss", "ext/loss", "train/lr")
_PIXELS = 128


def name_of(number: int | str) -> str:
    """Returns `teacher`, `student 1`, `linear probe`, … for the `round` of a row."""
    known = {0: "teacher", "probe": "linear probe", "control": "control"}
    return known.get(number, f"student {number}")


def table(
    rows: Sequence[Mapping[str, Any]],
    task: tasks.Task,
    config: Config,
    best: int,
) -> list[dict[str, str]]:
    """Returns a row per model, with its data and its accuracy.

    Args:
      rows: rows of `rounds.run_loop`, with those of probe and control.
      best: `round` of the best model.
    """
    labeled = ResolvedConfig.from_config(config).epoch_images()
    found = []
    for row in rows:
        kept = [images for _, images in row.get("kept", {}).values()]
        shown = {
            "model": name_of(row["round"]) + (" (best)" if row["round"] == best else ""),
            "network": row["model"],
            "updates": str(row["steps"]),
            "learned from": f"{labeled} labeled" + (f" + {sum(kept)} kept" if kept else ""),
            "kept per class": f"{min(kept)} to {max(kept)}" if kept else "-",
        }
        for title, prefix in (("held-out", task.eval_set), ("test", task.test_set)):
            if prefix:
                measured = row["measured"][prefix]
                shown[f"{title} top-1"] = f"{measured['top1']:.1%} of {measured['examples']}"
        found.append(shown)
    return found


def write(
    path: str,
    *,
    plan: Plan,
    config: Config,
    loop: LoopConfig,
    rows: Sequence[Mapping[str, Any]],
    table: Sequence[Mapping[str, str]],
    warnings: Sequence[str],
    judged: Mapping[str, Judged],
    best: int,
    control: str,
) -> str:
    """Writes the report; returns its path."""
    names = tasks.class_names(tasks.get_task(config.data.task_name or "")) or ()
    names = names or tuple(map(str, range(plan.facts.classes)))
    # The `round` of probe and control is a string, and round 0 is the teacher.
    students = [row["round"] for row in rows if isinstance(row["round"], int) and row["round"]]
    sections = [report.Section("Results", report.table(table))]
    if warnings:
        text = "".join(map(report.paragraph, warnings))
        sections.append(report.Section("What to look at", text))
    sections.append(report.Section("Learning curves", _curves(loop, rows, control)))
    for title, one in judged.items():
        sections += _predictions(f"{title}, {name_of(best)}", one, names)
    for number in students:
        sections += round_sections(config, loop, number, names)
    sections.append(report.Section("Augmented pictures", _augmented(loop, students)))
    settings = [
        {"setting": s.name, "value": str(s.value), "reason": s.reason, "source": s.source}
        for s in plan.settings
    ]
    sections.append(report.Section("Settings", report.table(settings)))
    report.write_page(
        path,
        title="Noisy Student on your pictures",
        intro=(
            f"{plan.facts.labeled} labeled pictures of {plan.facts.classes} classes, "
            f"{plan.facts.unlabeled} unlabeled ones. The best model, which is exported: {name_of(best)}. A student "
            "replaces its teacher unless it is clearly worse on the held-out pictures: by more than "
            "the standard error, since a smaller difference may be chance."
        ),
        sections=sections,
    )
    return path


def _curves(loop: LoopConfig, rows: Sequence[Mapping[str, Any]], control: str) -> str:
    folders = {
        name_of(row["round"]): rounds.model_dir(loop, row["round"])
        for row in rows
        # The probe has no learning curves.
        if isinstance(row["round"], int)
    }
    if any(row["round"] == "control" for row in rows):
        folders["control"] = control
    runs = {name: metrics_log.read_metrics(folder) for name, folder in folders.items()}
    return report.learning_curves(runs, metrics=_CURVES)


def _predictions(title: str, judged: Judged, names: Sequence[str]) -> list[report.Section]:
    """Reports accuracy by class, confusions, calibration and the worst mistakes on one set."""
    right = judged.truth == judged.predicted
    by_class: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        inside = judged.truth == i
        if inside.any():
            row = {"class": name, "pictures": int(inside.sum())}
            by_class.append({**row, "accuracy": float(right[inside].mean())})
    by_class.sort(key=lambda row: row["accuracy"])
    grid = [
        (
            report.thumbnail(m.image, _PIXELS),
            f"{names[m.truth]}, predicted {names[m.predicted]} {m.prob:.2f}: {m.name}",
        )
        for m in judged.mistakes
    ]
    calibration = report.Calibration.tally(judged.probs, right)
    return [
        report.Section(f"{title}: classes, worst first", report.table(by_class)),
        report.Section(
            f"{title}: confusions", report.confusion(judged.truth, judged.predicted, names)
        ),
        report.Section(f"{title}: calibration", report.reliability(calibration)),
        report.Section(
            f"{title}: mistakes, most confident first",
            report.image_grid(grid, columns=6, pixel_size=_PIXELS) if grid else report.NOTHING,
        ),
    ]


def round_sections(
    config: Config,
    loop: LoopConfig,
    number: int,
    names: Sequence[str],
    truth: outcome.Truth | None = None,
) -> list[report.Section]:
    """Returns the sections of the labeling report for one round.

    Args:
      names: class names.
      truth: true classes of the unlabeled pictures by shard and record, if known.
    """
    _, selection = rounds.stage_configs(config, loop, number)
    previous = ""
    if number > 1:
        before, _ = rounds.stage_configs(config, loop, number - 1)
        previous = before.predict.output_dir
    options = ReportConfig(previous_prediction_dir=previous)
    return [
        report.Section(f"Round {number}: {title}", body)
        for title, body in labeling_report.sections(
            selection, options, truth=truth, class_names=names
        )
    ]


def _augmented(loop: LoopConfig, students: Sequence[int]) -> str:
    path = os.path.join(rounds.model_dir(loop, max(students, default=0)), preview.FILE)
    # With --preview_images=0, there is none.
    if not tf.io.gfile.exists(path):
        return ""
    with tf.io.gfile.GFile(path, "rb") as f:
        return picture(f.read(), "labeled and pseudo-labeled pictures as the student saw them")
