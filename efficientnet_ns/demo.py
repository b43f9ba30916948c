"""The method on real images in a few minutes: scikit-learn's scans of handwritten digits.

A teacher learns from few labels, labels the rest (and some pictures that are no digits), and two
noised students in turn learn from both. A control model gets the labels only, but all the update
steps.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import numpy as np
from absl import flags

from efficientnet_ns import config as config_lib
from efficientnet_ns import export_model, noisy_student
from efficientnet_ns.config import Config, LoopConfig, Settings, setting


@dataclasses.dataclass(frozen=True)
class DemoConfig(Settings):
    """Settings of the demo."""

    output_dir: str = setting("runs/demo", "Folder of everything the demo makes.")
    seed: int = setting(0, "Of the split, the initial weights and all noise.")
    labels_per_class: int = setting(10, "Labeled images per class.", low=1)
    teacher_steps: int = setting(400, "Update steps of the teacher.", low=1)
    student_steps: int = setting(700, "Update steps of each student.", low=1)


_SHARDS = 4
_UNLABELED_PREFIX = "extra"
_DEV, _TEST = 300, 500
_OUTLIERS = 200


def prepare_data(folder: str, config: DemoConfig) -> dict[str, Any]:
    """Writes the digits as labeled (`train`, `dev`, `test`) and unlabeled (`extra`) records.

    Returns:
      `truth`: true classes of the unlabeled images in record order per shard, -1 for outliers.
    """
    from sklearn.datasets import load_digits

    from efficientnet_ns.files import tfexamples, tfrecords

    digits = load_digits()
    pictures = [encode(image * (255 / 16)) for image in digits.images]
    labels = digits.target
    rng = np.random.default_rng(config.seed)
    train = labeled_indices(labels, config.labels_per_class, rng)
    rest = rng.permutation(np.setdiff1d(np.arange(len(labels)), train))
    test, dev, unlabeled = np.split(rest, [_TEST, _TEST + _DEV])
    for prefix, indices in (("train", rng.permutation(train)), ("dev", dev), ("test", test)):
        examples = [tfexamples.labeled_example(pictures[i], int(labels[i])) for i in indices]
        tfrecords.write_sharded(os.path.join(folder, "labeled"), prefix, examples, 2)

    mixed = [(pictures[i], int(labels[i])) for i in unlabeled]
    mixed += [(encode(patch), -1) for patch in outliers(_OUTLIERS, rng)]
    mixed = [mixed[i] for i in rng.permutation(len(mixed))]
    tfrecords.write_sharded(
        os.path.join(folder, "unlabeled"),
        _UNLABELED_PREFIX,
        [tfexamples.unlabeled_example(picture) for picture, _ in mixed],
        _SHARDS,
    )
    truth = [[label for _, label in mixed[shard::_SHARDS]] for shard in range(_SHARDS)]
    return {"truth": truth, "train": len(train), "unlabeled": len(mixed)}


def labeled_indices(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of `per_class` images of each class that stand close together in the scans.

    Neighbouring scans come from the same few hands, so the labels cover less than the unlabeled
    images do: the usual reason to want unlabeled ones.
    """
    from_here = np.roll(np.arange(len(labels)), -rng.integers(len(labels)))
    return np.concatenate([from_here[labels[from_here] == c][:per_class] for c in range(10)])


def encode(gray: np.ndarray) -> bytes:
    """PNG of an 8 × 8 scan (0..255), enlarged twice."""
    import tensorflow as tf

    enlarged = tf.image.resize(gray[..., None].astype(np.float32), [16, 16], "bicubic")
    return tf.io.encode_png(tf.cast(tf.clip_by_value(tf.round(enlarged), 0, 255), tf.uint8)).numpy()


def outliers(count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """8 × 8 gray patches of photographs: images of none of the classes."""
    from sklearn.datasets import load_sample_images

    photos = [photo.mean(axis=-1)[::8, ::8] for photo in load_sample_images().images]
    patches = []
    for _ in range(count):
        photo = photos[rng.integers(len(photos))]
        y, x = (rng.integers(side - 8) for side in photo.shape)
        patches.append(photo[y : y + 8, x : x + 8])
    return patches


def settings(config: DemoConfig) -> tuple[Config, LoopConfig]:
    """The configuration of the demo's loop."""
    data = os.path.join(config.output_dir, "data")
    base = Config().override(
        task_name="digits",
        label_data_dir=os.path.join(data, "labeled"),
        unlabel_data_dir=os.path.join(data, "unlabeled"),
        width_coefficient=0.35,
        depth_coefficient=0.25,
        train_steps=config.student_steps,
        train_batch_size=32,
        unlabel_ratio=3.0,
        teacher_softmax_temp=1.0,
        base_learning_rate=0.08,
        final_base_lr=0.008,
        augment_name="randaugment",
        randaug_mag=5,
        bn_momentum=0.97,
        moving_average_decay=0.99,
        weight_decay=1e-4,
        eval_batch_size=100,
        steps_per_eval=100,
        save_checkpoints_steps=100,
        iterations_per_loop=50,
        keep_checkpoint_max=2,
        seed=config.seed,
    )
    loop = LoopConfig(
        work_dir=os.path.join(config.output_dir, "loop"),
        models="efficientnet-b0,efficientnet-b0,efficientnet-b0",
        teacher_steps=config.teacher_steps,
        num_image=150,
        min_threshold=0.3,
    )
    return base, loop


def run_demo(config: DemoConfig) -> list[dict[str, Any]]:
    """Runs everything, continuing where an earlier run stopped; returns the rows of the table."""
    base, loop = settings(config)
    state = noisy_student.State(config.output_dir, dataclasses.asdict(config))
    data = state.once("data", lambda: prepare_data(os.path.join(config.output_dir, "data"), config))
    rounds = noisy_student.run_loop(base, loop)
    control = noisy_student.train_and_measure(
        state,
        "control: labels only, all the steps",
        base.override(
            model_dir=os.path.join(config.output_dir, "control", "model"),
            unlabel_data_dir="",
            unlabel_ratio=0.0,
            train_steps=sum(row["steps"] for row in rounds),
        ),
    )
    rows = [table_row(row, data["train"], loop.num_image) for row in rounds]
    rows.append(table_row({"round": "control", **control}, data["train"], loop.num_image))
    report_path = os.path.join(config.output_dir, "report.html")
    write_report(report_path, base, loop, rows, data["truth"])
    final = base.override(model_dir=noisy_student.model_dir(loop, len(rounds) - 1))
    export_dir = os.path.join(config.output_dir, "export")
    # A version appears whole or not at all, so one that is there is the one this run would make.
    if not os.path.exists(os.path.join(export_dir, "1")):
        export_model.export_model(final, export_dir, 1)
    print(format_table(rows))
    answer_in_fresh_process(config.output_dir, os.path.join(export_dir, "1"))
    print(f"report: {report_path}")
    return rows


def table_row(result: dict[str, Any], labeled: int, num_image: int) -> dict[str, Any]:
    """One row of the printed table."""
    name = {0: "teacher", "control": "control"}.get(result["round"], f"student {result['round']}")
    kept = [images for _, images in result.get("kept", {}).values()]
    pseudo = f" + {num_image * len(kept)} pseudo" if kept else ""
    return {
        "round": name,
        "model": f"{result['model']} (narrow)",
        "steps": result["steps"],
        "labels used": f"{labeled}{pseudo}",
        "images kept per class": f"{min(kept)} to {max(kept)}" if kept else "-",
        "dev top-1": f"{result['measured']['dev']['top1']:.1%}",
        "test top-1": f"{result['measured']['test']['top1']:.1%}",
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    """Plain text, columns aligned."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([text[0], "  ".join("-" * w for w in widths), *text[1:]])


def write_report(
    path: str,
    config: Config,
    loop: LoopConfig,
    rows: list[dict[str, Any]],
    truth: list[list[int]],
) -> None:
    """Writes the HTML report of all rounds; `truth` is what `prepare_data` returned."""
    from efficientnet_ns import report
    from efficientnet_ns.training import summaries

    runs = {}
    folders = [noisy_student.model_dir(loop, i) for i in range(len(rows) - 1)]
    folders.append(os.path.join(os.path.dirname(path), "control", "model"))
    for row, folder in zip(rows, folders):
        runs[row["round"]] = summaries.read_metrics(folder)
    sections = [
        report.Section("Results", report.table(rows)),
        report.Section(
            "Learning curves",
            report.learning_curves(runs, metrics=["eval/top1", "lab/loss", "ext/loss", "train/lr"]),
        ),
    ]
    for number in range(1, len(rows) - 1):
        sections += _round_sections(config, loop, number, truth)
    report.write_page(
        path,
        title="Noisy Student on handwritten digits",
        intro="A teacher that saw few labels, and two students that learnt from its guesses.",
        sections=sections,
    )


def _round_sections(config: Config, loop: LoopConfig, number: int, truth: list[list[int]]) -> list:
    from efficientnet_ns import report
    from efficientnet_ns.data import tasks
    from efficientnet_ns.pseudo_labels import run_report

    _, selection = noisy_student.stage_configs(config, loop, number)
    previous_dir = ""
    if number > 1:
        before, _ = noisy_student.stage_configs(config, loop, number - 1)
        previous_dir = before.predict.output_dir
    options = run_report.Options(
        truth=truth,
        previous_dir=previous_dir,
        class_names=tasks.get_task(config.data.task_name).class_names,
    )
    return [
        report.Section(f"Round {number}: {title}", body)
        for title, body in run_report.sections(selection, options)
    ]


_FRESH_PROCESS = """
import sys
import tensorflow as tf

model = tf.saved_model.load(sys.argv[1])
answer = model.signatures["serving_default"](tf.io.read_file(sys.argv[2])[None])
digit = int(answer["classes"][0])
print(f"exported model says {digit} (probability {float(answer['probabilities'][0, digit]):.3f})")
"""


def answer_in_fresh_process(folder: str, saved_model: str) -> None:
    """Classifies a test image with the SavedModel, by TensorFlow alone."""
    from efficientnet_ns.files import shard_names, tfexamples, tfrecords

    test_set = shard_names.list_shards(os.path.join(folder, "data", "labeled"), "test")
    first = next(tfrecords.read(test_set[0])).payload
    picture = os.path.join(folder, "test_image.png")
    with open(picture, "wb") as f:
        f.write(tfexamples.image_bytes(first))
    print(f"{picture} shows a {tfexamples.label(first)}; ", end="", flush=True)
    command = [sys.executable, "-c", _FRESH_PROCESS, saved_model, picture]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:  # Else it is TensorFlow's log.
        sys.stderr.write(done.stderr)
        done.check_returncode()


def main(argv: list[str]) -> None:
    config_lib.no_arguments(argv)
    run_demo(config_lib.from_flags(DemoConfig, flags.FLAGS))


def run() -> None:
    """The command line."""
    config_lib.define_flags(DemoConfig)
    config_lib.run(main)


if __name__ == "__main__":
    run()
