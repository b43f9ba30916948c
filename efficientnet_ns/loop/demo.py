"""The method on handwritten digits: a teacher, two students, a control, and an exported model."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import tensorflow as tf
from absl import logging

from efficientnet_ns import report
from efficientnet_ns.config import Config, DemoConfig, ExportConfig, LoopConfig
from efficientnet_ns.data import tasks
from efficientnet_ns.files import metrics_log, shard_names, text_table, tfexamples, tfrecords
from efficientnet_ns.loop import digits, rounds, run_report, study_results
from efficientnet_ns.loop.state import State
from efficientnet_ns.loop.study import chosen_seeds
from efficientnet_ns.resolve import stored_model
from efficientnet_ns.serving.model_export import export_model


def settings(config: DemoConfig) -> tuple[Config, LoopConfig]:
    """Returns the configuration of the demo's loop."""
    data = os.path.join(config.output_dir, "data")
    base = Config().override(
        task_name="digits",
        label_data_dir=os.path.join(data, "labeled"),
        unlabel_data_dir=os.path.join(data, "unlabeled"),
        width_coefficient=0.35,
        depth_coefficient=0.25,
        train_steps=config.student_steps,
        train_batch_size=16,
        unlabel_ratio=4.0,
        teacher_softmax_temp=1.0,
        # Learning rate and RandAugment were chosen on dev, the batch to save time (docs/demo.md).
        optimizer="adam",
        lr_schedule="cosine",
        base_learning_rate=0.01,
        warmup_epochs=0.0,
        augment_name="randaugment",
        randaug_layer=1,
        randaug_mag=5,
        randaug_mode="clipped",
        randaug_reach="proportional",
        bn_momentum=0.97,
        moving_average_decay=0.99,
        weight_decay=1e-4,
        eval_batch_size=100,
        steps_per_eval=200,
        save_checkpoints_steps=100,
        iterations_per_loop=50,
        keep_checkpoint_max=2,
        preview_images=0,
        seed=config.seed,
    )
    loop = LoopConfig(
        work_dir=os.path.join(config.output_dir, "loop"),
        models="efficientnet-b0,efficientnet-b0,efficientnet-b0",
        teacher_steps=config.teacher_steps,
        num_image=300,
        min_threshold=0.5,
    )
    return base, loop


def run_demo(config: DemoConfig) -> None:
    """Runs the demo, continuing where an earlier run stopped.

    Each of several seeds has a separate folder, named after the seed.
    """
    if not config.seeds:
        run_seed(config)
        return
    results = {}
    for seed in chosen_seeds(config.seeds):
        folder = os.path.join(config.output_dir, str(seed))
        logging.info("=== seed %d, in %s", seed, folder)
        results[seed] = run_seed(
            dataclasses.replace(config, seeds="", seed=seed, output_dir=folder)
        )
    print(format_table(spread(list(results.values()))))


def run_seed(config: DemoConfig) -> list[dict[str, Any]]:
    """Runs the demo with one seed; returns the results of teacher, students and control."""
    base, loop = settings(config)
    # The state of folders older than --seeds lacks this setting.
    state = State(config.output_dir, dataclasses.asdict(config), {"seeds": ""})
    folder = os.path.join(config.output_dir, "data")
    chosen = {"seed": config.seed, "labels_per_class": config.labels_per_class}
    data = state.once("data", lambda: digits.make_records(folder, **chosen))
    trained = rounds.run_loop(base, loop)
    # --- Control: the same labels and recipe, without unlabeled pictures
    control = rounds.train_and_measure(
        state,
        "control: labels only, all the steps",
        base.override(
            model_name=loop.models.split(",")[-1],
            model_dir=os.path.join(config.output_dir, "control", "model"),
            unlabel_data_dir="",
            unlabel_ratio=0.0,
            train_steps=sum(row["steps"] for row in trained),
        ),
    )
    trained.append({"round": "control", **control})
    # --- Results
    rows = [table_row(row, data["train"], loop.num_image) for row in trained]
    finding = what_came_out(trained)
    report_path = os.path.join(config.output_dir, "report.html")
    write_report(report_path, base, loop, rows, finding=finding, truth=data["truth"])
    # The control is the last of `trained`, and the last student before it.
    final = base.override(model_dir=rounds.model_dir(loop, len(trained) - 2))
    export_dir = os.path.join(config.output_dir, "export")
    if not stored_model.is_export(os.path.join(export_dir, "1")):
        export_model(final, ExportConfig(export_dir=export_dir, version=1))
    print(format_table(rows), finding, sep="\n\n")
    classify_in_fresh_process(config.output_dir, os.path.join(export_dir, "1"))
    print(f"report: {report_path}")
    return trained


def table_row(result: dict[str, Any], labeled: int, num_image: int) -> dict[str, Any]:
    """Returns a row of the printed table."""
    kept = [images for _, images in result.get("kept", {}).values()]
    # Each class with images has `num_image` records, including copies.
    pseudo = f" + {num_image * len(kept)} pseudo" if kept else ""
    return {
        "round": run_report.name_of(result["round"]),
        "model": f"{result['model']} (narrow)",
        "steps": result["steps"],
        "labels used": f"{labeled}{pseudo}",
        "images kept per class": f"{min(kept)} to {max(kept)}" if kept else "-",
        "dev top-1": f"{result['measured']['dev']['top1']:.1%}",
        "test top-1": f"{result['measured']['test']['top1']:.1%}",
    }


def spread(results: list[list[dict[str, Any]]]) -> list[dict[str, str]]:
    """Returns mean and spread over seeds for each model and for the gain of the last student.

    Args:
      results: results of `run_seed`, by seed.
    """
    title = f"top-1, % (n={len(results)})"
    table = []
    for place, row in enumerate(results[0]):
        found = {part: _top1(results, part, place) for part in ("dev", "test")}
        cells = {
            part: study_results.with_spread(*study_results.mean_sd(values))
            for part, values in found.items()
        }
        table.append({title: run_report.name_of(row["round"]), **cells})
    for name, place in (("teacher", 0), ("control", -1)):
        cells = {}
        for part in ("dev", "test"):
            # Paired by seed: both models share its labels, so the effect of their draw cancels.
            pairs = zip(_top1(results, part, -2), _top1(results, part, place))
            cells[part] = _mean_and_interval([student - other for student, other in pairs])
        table.append({title: f"last student - {name}", **cells})
    return table


def _top1(results: list[list[dict[str, Any]]], part: str, place: int) -> list[float]:
    """Returns top-1 in percent, by seed."""
    return [100 * rows[place]["measured"][part]["top1"] for rows in results]


def _mean_and_interval(differences: list[float]) -> str:
    mean = sum(differences) / len(differences)
    half = study_results.noise(differences)
    if half is None:
        return f"{mean:+.1f}"
    return f"{mean:+.1f} (95 %: {mean - half:+.1f} to {mean + half:+.1f}; least {min(differences):+.1f})"


def what_came_out(results: list[dict[str, Any]]) -> str:
    """Describes the finding; `results` are those of the teacher, the students and the control."""
    teacher, *_, student, control = (100 * row["measured"]["test"]["top1"] for row in results)
    return (
        f"On the test pictures, the last student classifies {student:.1f} % correctly: "
        f"{_difference(student - teacher)} than its first teacher, and {_difference(student - control)} than the "
        "control, which had the same labels and as many updates as teacher and students together, but no "
        "unlabeled pictures."
    )


def _difference(points: float) -> str:
    return f"{abs(points):.1f} points {'more' if points >= 0 else 'fewer'}"


def format_table(rows: list[dict[str, Any]]) -> str:
    """Formats the rows of `table_row` as plain text."""
    cells = [list(map(str, row.values())) for row in rows]
    return text_table.text_table(list(rows[0]), cells, rule=True)


_WHAT_TO_LOOK_AT = (
    "Results: each student should be above the model that labeled its pictures, although these "
    "labels are its only additional information; and above the control, which shows what the true "
    "labels achieve without them. The demo's settings were chosen on dev; test had no part in any "
    "choice.",
    "Learning curves: eval/top1 is on dev. The control stops rising early, because it has learned "
    "all that its labels can show. ext/loss is the students' loss on pseudo-labeled pictures.",
    "Confidence of the pseudo labels, and pseudo labels against the hidden truth: confident labels "
    "are mostly correct, and the threshold excludes most of the wrong ones. The truth is used only "
    "in this report.",
    "Class balance: the teacher prefers some classes; each class is cut or filled with copies to the same number "
    "of pictures.",
    "Agreement with the round before: the labels that the first student changed, most of them for the better.",
    "Images kept and rejected: see which pictures the teacher was confident about, and which not.",
)


def write_report(
    path: str,
    config: Config,
    loop: LoopConfig,
    rows: list[dict[str, Any]],
    *,
    finding: str,
    truth: list[list[int]],
) -> None:
    """Writes the HTML report of all rounds; `truth` is what `digits.make_records` returned."""
    runs = {}
    folders = [rounds.model_dir(loop, i) for i in range(len(rows) - 1)]
    folders.append(os.path.join(os.path.dirname(path), "control", "model"))
    for row, folder in zip(rows, folders):
        runs[row["round"]] = metrics_log.read_metrics(folder)
    guide = "".join(map(report.paragraph, _WHAT_TO_LOOK_AT))
    sections = [
        report.Section("Results", report.table(rows) + report.paragraph(finding)),
        report.Section("What to look at", guide),
        report.Section(
            "Learning curves",
            report.learning_curves(runs, metrics=["eval/top1", "lab/loss", "ext/loss", "train/lr"]),
        ),
    ]
    names = tasks.get_task("digits").class_names or ()
    for number in range(1, len(rows) - 1):
        sections += run_report.round_sections(config, loop, number, names, truth)
    report.write_page(
        path,
        title="Noisy Student on handwritten digits",
        intro=(
            "A teacher learns from a few labeled pictures and labels thousands of others. A noised "
            "student learns from both and becomes the next teacher, and a second student learns "
            "from its labels."
        ),
        sections=sections,
    )


_FRESH_PROCESS = """
import sys
import tensorflow as tf

model = tf.saved_model.load(sys.argv[1])
predictions = model.signatures["serving_default"](tf.io.read_file(sys.argv[2])[None])
digit = int(predictions["classes"][0])
print(f"exported model: {digit} (probability {float(predictions['probabilities'][0, digit]):.3f})")
"""


def classify_in_fresh_process(folder: str, saved_model: str) -> None:
    """Classifies a test image with the SavedModel in a process that imports only TensorFlow."""
    test_set = shard_names.list_shards(os.path.join(folder, "data", "labeled"), "test")
    first = next(tfrecords.read(test_set[0])).payload or b""
    picture = os.path.join(folder, "test_image.png")
    with tf.io.gfile.GFile(picture, "wb") as f:
        f.write(tfexamples.image_bytes(first))
    # Flushed, because the other process completes this line on the same output.
    print(f"{picture} shows a {tfexamples.label(first)}; ", end="", flush=True)
    command = [sys.executable, "-c", _FRESH_PROCESS, saved_model, picture]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:  # Otherwise, it is only TensorFlow's log.
        sys.stderr.write(done.stderr)
        done.check_returncode()
