"""Fakes and setups shared by several test files; contains no tests.

Related modules: gcs.py (an object store), image_files.py (image files of every kind), torture.py
(repeatedly killed processes), unlabeled_sets.py (unlabeled records and a teacher for them).
"""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import shlex
import socket
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import efficientnet_ns  # noqa: F401 - decides which Keras TensorFlow has

# isort: split
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from efficientnet_ns.config import Config, SelectConfig, TrainConfig
from efficientnet_ns.config.ingest import MakeConfig
from efficientnet_ns.files import metrics_log, parquet_sql, shard_names, tfexamples, tfrecords
from efficientnet_ns.ingest import data_source
from efficientnet_ns.models import efficientnet, weights
from efficientnet_ns.pseudo_labels import index, selection
from efficientnet_ns.resolve.resolved_config import ResolvedConfig
from efficientnet_ns.training import optimizers, session, student, train

ROOT = Path(__file__).parents[1]


def mostly_slow(values: Iterable, quick: Iterable) -> list:
    """Marks parameters of a test as slow, except those in `quick`."""
    chosen = set(quick)
    return [v if v in chosen else pytest.param(v, marks=pytest.mark.slow) for v in values]


# --- Training on tiny records ----------------------------------------------------------------------

CLASSES, SIZE = 3, 8
LABELED, UNLABELED, VALIDATION = 13, 11, 7
PACE = ("images_per_second", "input_wait")
# Settings that do not change what is compiled, except for the length of a host loop.
PACE_SETTINGS = ("iterations_per_loop", "save_checkpoints_steps", "steps_per_eval")


def pictures(count: int, seed: int) -> list[bytes]:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, [count, SIZE, SIZE, 3], np.uint8)
    return [tf.io.encode_png(image).numpy() for image in pixels]


def pseudo_labels(count: int) -> np.ndarray:
    return np.random.default_rng(9).dirichlet(np.ones(CLASSES), count).astype(np.float32)


def write_task(path: Path, num_classes: int = CLASSES) -> str:
    task = {"num_classes": num_classes, "image_size": SIZE, "small_image": True}
    path.write_text(json.dumps(task))
    return str(path)


def write_data(folder: Path) -> None:
    """Writes a task, two labeled sets, and unlabeled records with and without pseudo labels."""
    write_task(folder / "task.json")
    for prefix, count, seed in (("train", LABELED, 1), ("validation", VALIDATION, 2)):
        examples = [
            tfexamples.labeled_example(image, i % CLASSES)
            for i, image in enumerate(pictures(count, seed))
        ]
        tfrecords.write_sharded(str(folder / "labeled"), prefix, examples, 2)
    images, probs = pictures(UNLABELED, 3), pseudo_labels(UNLABELED)
    pseudo = [
        tfexamples.pseudo_labeled_example(image, row, int(row.argmax()))
        for image, row in zip(images, probs)
    ]
    tfrecords.write_sharded(str(folder / "pseudo"), "train-0", pseudo, 2)
    plain = [tfexamples.unlabeled_example(image) for image in images]
    tfrecords.write_sharded(str(folder / "unlabeled"), "extra", plain, 1)


def settings(folder: Path, model_dir: str | Path, **values) -> Config:
    """Returns settings for supervised training of the smallest model on the data of `folder`."""
    defaults = {
        "model_name": "efficientnet-test",
        "task_name": str(folder / "task.json"),
        "label_data_dir": str(folder / "labeled"),
        "model_dir": str(folder / model_dir),
        "train_batch_size": 4,
        "train_steps": 2,
        "base_learning_rate": 0.5,
        "warmup_epochs": 0.0,
        "eval_batch_size": 4,
        "iterations_per_loop": 1,
        "save_checkpoints_steps": 1,
        "preview_images": 0,
        "inference_engine": "tf",  # Starts faster than XNNPACK.
    }
    return Config().override(**{**defaults, **values})


def noised(folder: Path, model_dir: str | Path, **values) -> Config:
    """Returns settings of a student with stored soft labels and all noise: 7 steps, loops of 2."""
    noise = {
        "unlabel_data_dir": str(folder / "pseudo"),
        "unlabel_ratio": 1.5,
        "teacher_softmax_temp": 1.0,
        "augment_name": "randaugment",
        "randaug_mag": 9,
        "randaug_layer": 1,
        "unl_aug": "none",
        "dropout_rate": 0.3,
        "stochastic_depth_rate": 0.5,
        "train_steps": 7,
        "iterations_per_loop": 2,
        "save_checkpoints_steps": 2,
        "steps_per_eval": 4,
        "seed": 5,
    }
    return settings(folder, model_dir, **{**noise, **values})


def tensors(model_dir: str, step: int) -> dict[str, np.ndarray]:
    reader = tf.train.load_checkpoint(f"{model_dir}/model.ckpt-{step}")
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def assert_same_training(one: str, other: str, step: int) -> None:
    """Asserts that checkpoints are bit-identical and metrics equal, except for the speed."""
    ours, theirs = tensors(one, step), tensors(other, step)
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    rows = [metrics_log.read_metrics(folder) for folder in (one, other)]
    for row in rows[0] + rows[1]:
        for name in PACE:
            row.pop(name, None)
    different = [
        (ours["step"], name, ours.get(name), theirs.get(name))
        for ours, theirs in zip(*rows)
        for name in {**ours, **theirs}
        if ours.get(name) != theirs.get(name)
    ]
    assert not different and len(rows[0]) == len(rows[1]), different


def saved_steps(model_dir: str) -> list[int]:
    return sorted(int(path.stem.split("-")[1]) for path in Path(model_dir).glob("*.index"))


@contextlib.contextmanager
def one_student_per_settings() -> Iterator[None]:
    """Reuses one compiled student, reset to its initial values, for runs with the same settings.

    Building and tracing a student takes most of the time of a short training run.
    """
    original, made = train._build, {}

    def build(resolved: ResolvedConfig, num_images: int, strategy=None) -> student.NoisyStudent:
        settings, pace = resolved.config.train, dict.fromkeys(PACE_SETTINGS, 1)
        key = (
            resolved.task,
            resolved.config.model,
            dataclasses.replace(settings, model_dir="", **pace),
            session.loop_steps(settings, resolved.steps_to_run),
            num_images,
            strategy.num_replicas_in_sync if strategy else 1,
        )
        if key not in made:
            model = original(resolved, num_images, strategy)
            variables = [*model.variables, *model.optimizer.variables]
            made[key] = model, [(v, v.numpy()) for v in variables]
        model, first = made[key]
        for variable, value in first:
            variable.assign(value)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_build", build)
        yield


KILLED_BEFORE_STEP_6_IS_SAVED = """
import json, os, signal, sys
from efficientnet_ns.config import Config
from efficientnet_ns.models import checkpoint_files
from efficientnet_ns.training import train

write = checkpoint_files.write_checkpoint

def killing(prefix, tensors):
    if prefix.endswith("-6"):
        os.kill(os.getpid(), signal.SIGKILL)
    write(prefix, tensors)

checkpoint_files.write_checkpoint = killing
train.train_and_evaluate(Config().override(**json.loads(sys.argv[1])))
"""


def changed_settings(config: Config) -> str:
    """Returns the settings that differ from their defaults as JSON."""
    defaults = Config().values()
    return json.dumps({n: v for n, v in config.values().items() if v != defaults[n]})


# --- One step of a student -------------------------------------------------------------------------

NUM_CLASSES = 10


# Building a model takes longer than a step, so tests reuse models with new weights.
_free: dict[tuple, list[tf.keras.Model]] = collections.defaultdict(list)
_lent: list[tuple[tuple, tf.keras.Model]] = []


def build_test_model(**kwargs) -> tf.keras.Model:
    return efficientnet.build_model("efficientnet-test", NUM_CLASSES, 16, **kwargs)


@functools.cache
def initial_weights(seed: int) -> list[np.ndarray]:
    tf.keras.utils.set_random_seed(seed)
    return build_test_model().get_weights()


def tiny(seed: int, **kwargs) -> tf.keras.Model:
    """Lends a model not used elsewhere in this test, with the initial weights of `seed`."""
    if tf.distribute.has_strategy():
        model = build_test_model(**kwargs)
    else:
        kind = tuple(sorted(kwargs.items()))
        model = _free[kind].pop() if _free[kind] else build_test_model(**kwargs)
        _lent.append((kind, model))
    model.trainable = True
    model.set_weights(initial_weights(seed))
    return model


def return_models() -> None:
    """Lets the next test use the models that `tiny` lent to this one."""
    for kind, model in _lent:
        _free[kind].append(model)
    _lent.clear()


def make_trainer(
    *,
    temperature: float = -1.0,
    unlabel_ratio: float = 0.0,
    teacher: tf.keras.Model | None = None,
    seed: int = 0,
    learning_rate=0.05,
    weight_decay: float = 1e-2,
    label_data_sample_prob: float = 1.0,
    label_weight: float = 1.0,
    unl_model_noise: bool = True,
    consistency_threshold: float = 0.0,
    jit_compile: bool = False,
    **model_kwargs,
) -> student.NoisyStudent:
    """Returns a student with seed 1 whose averages start from other weights, those of seed 2."""
    trainer = student.NoisyStudent(
        tiny(1, **model_kwargs),
        tiny(2, **model_kwargs),
        TrainConfig(
            seed=seed,
            weight_decay=weight_decay,
            unlabel_ratio=unlabel_ratio,
            teacher_softmax_temp=temperature,
            label_data_sample_prob=label_data_sample_prob,
            label_weight=label_weight,
            unl_model_noise=unl_model_noise,
            consistency_threshold=consistency_threshold,
        ),
        teacher=teacher,
    )
    trainer.compile(optimizers.RMSPropTF1(learning_rate), jit_compile=jit_compile)
    return trainer


def make_batch(num_labeled: int = 4, num_unlabeled: int = 0, seed: int = 0) -> dict[str, tf.Tensor]:
    """Returns a batch with the inputs of every kind of training; each array is drawn separately."""
    rng = np.random.default_rng(seed)

    def images(count):
        return tf.constant(rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8))

    batch = {
        "image": images(num_labeled),
        "label": tf.constant(rng.integers(0, NUM_CLASSES, num_labeled).astype(np.int32)),
    }
    if num_unlabeled:
        probs = rng.dirichlet(np.full(NUM_CLASSES, 0.5), num_unlabeled).astype(np.float32)
        batch |= {
            "unl_image": images(num_unlabeled),
            "unl_label": tf.constant(rng.integers(0, NUM_CLASSES, num_unlabeled).astype(np.int32)),
            "unl_probs": tf.constant(probs),
            "teacher_image": images(num_unlabeled),
            "weak_image": images(num_unlabeled),
        }
    return batch


def variable_values(model: tf.keras.Model) -> dict[str, np.ndarray]:
    return {name: v.numpy() for name, v in weights.variable_names(model).items()}


# --- Several processes -----------------------------------------------------------------------------


def worker_environment(addresses: list[str], index: int) -> dict[str, str]:
    """Returns the environment of one of several worker processes, or of a single process."""
    environment = {key: v for key, v in os.environ.items() if key != "TF_CONFIG"}
    if len(addresses) > 1:
        task = {"type": "worker", "index": index}
        environment["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
    return environment


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


# --- The loop --------------------------------------------------------------------------------------


def write_loop_data(folder: Path) -> None:
    rng = np.random.default_rng(0)

    def pictures(count: int) -> list[bytes]:
        pixels = rng.integers(0, 256, [count, SIZE, SIZE, 3], np.uint8)
        return [tf.io.encode_png(image).numpy() for image in pixels]

    task = {"num_classes": CLASSES, "image_size": SIZE, "small_image": True, "test_set": "test"}
    (folder / "task.json").write_text(json.dumps(task))
    for prefix, count in (("train", 9), ("validation", 6), ("test", 5)):
        examples = [
            tfexamples.labeled_example(image, i % CLASSES)
            for i, image in enumerate(pictures(count))
        ]
        tfrecords.write_sharded(str(folder / "labeled"), prefix, examples, 1)
    unlabeled = [tfexamples.unlabeled_example(image) for image in pictures(24)]
    tfrecords.write_sharded(str(folder / "unlabeled"), "extra", unlabeled, 2)


def loop_settings(folder: Path) -> dict:
    return {
        "task_name": str(folder / "task.json"),
        "label_data_dir": str(folder / "labeled"),
        "unlabel_data_dir": str(folder / "unlabeled"),
        "unlabel_ratio": 1.0,
        "train_batch_size": 4,
        "train_steps": 2,
        "base_learning_rate": 0.5,
        "warmup_epochs": 0.0,
        "eval_batch_size": 8,
        "iterations_per_loop": 1,
        "save_checkpoints_steps": 1,
        "preview_images": 0,
        "inference_engine": "tf",
        "seed": 3,
    }


# --- Selection -------------------------------------------------------------------------------------


def load_outcome(config: SelectConfig) -> dict[str, np.ndarray]:
    """Returns every prediction and its outcome in the selection, for sets that fit in memory.

    Returns:
      Columns `shard`, `record` (position in the shard), `label`, `prob`, `copies` (0: rejected),
      each [N], ordered by shard and record.
    """
    workers = index.count_workers(config)
    chosen = os.path.join(config.output_dir, selection.SELECTION)
    indexes = [path for paths in index.index_files(config).values() for path in paths]
    db = parquet_sql.connect(2, predictions=indexes, selection=[chosen])
    return db.execute(
        f"""
        SELECT shard, position * {workers} + worker AS record, label, prob,
               coalesce(copies, 0) AS copies
        FROM predictions LEFT JOIN (SELECT shard, worker, position, copies FROM selection)
             USING (shard, worker, position)
        ORDER BY shard, record
        """
    ).fetchnumpy()


# --- Reports ---------------------------------------------------------------------------------------

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Document(HTMLParser):
    """Parses HTML strictly: elements must be closed in order, and attributes must not repeat."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"repeated attribute in {attrs}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"unexpected </{tag}>"

    def handle_data(self, data):
        if not self.open:
            assert not data.strip(), f"text outside of any element: {data!r}"
            return
        self.texts.append((self.open[-1], data))
        if self.open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str) -> str:
        return " ".join(data for name, data in self.texts if name == tag)

    def rows(self, index: int = 0) -> list[dict[str, str]]:
        head, *body = self.tables[index]
        return [dict(zip(head, row)) for row in body]

    def images(self) -> list[tuple[str, bytes]]:
        found = []
        for attributes in self.attributes("img"):
            head, payload = attributes["src"].split(",", 1)
            found.append((head, base64.b64decode(payload, validate=True)))
        return found


def plain_calibration_error(correct, probs, bins):
    """Computes equation 3 of Guo et al. (2017), one bin and one image at a time."""
    total = 0.0
    for m in range(1, bins + 1):
        low, high = (m - 1) / bins, m / bins
        members = [(c, p) for c, p in zip(correct, probs) if low < p <= high or (m == 1 and p == 0)]
        if members:
            accuracy = sum(c for c, _ in members) / len(members)
            confidence = sum(p for _, p in members) / len(members)
            total += len(members) / len(probs) * abs(accuracy - confidence)
    return total


# --- Folders and archives of images ----------------------------------------------------------------


def picture(seed: int, side: int = 12, image_format: str = "PNG", mode: str = "RGB", **kwargs):
    pixels = np.random.default_rng(seed).integers(0, 256, [side, side + 2, 3], np.uint8)
    target = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(target, image_format, **kwargs)
    return target.getvalue()


def picture_files(
    per_class: int = 5, classes: tuple[str, ...] = ("ant", "bee", "cat")
) -> dict[str, bytes]:
    return {
        f"{name}/{i:02d}.png": picture(100 * c + i)
        for c, name in enumerate(classes)
        for i in range(per_class)
    }


def write_folder(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(path: Path, contents: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def write_tar(path: Path, contents: dict[str, bytes]) -> Path:
    compression = {".gz": "gz", ".tgz": "gz", ".xz": "xz"}.get(path.suffix, "")
    with tarfile.open(path, f"w:{compression}") as archive:
        for name, content in contents.items():
            add_member(archive, name, content)
    return path


def make_records(source: Path, output: Path, **values) -> dict[str, int]:
    settings = {"num_shards": 2, "num_workers": 1, **values}
    return data_source.make_records(
        MakeConfig(source=str(source), output_dir=str(output), **settings)
    )


def labeled_contents(folder: Path, prefix: str = "train") -> list[tuple[int, bytes]]:
    """Returns (label, image) of all records in order, as read by TensorFlow."""
    found = []
    for path in shard_names.list_shards(str(folder), prefix):
        for item in tf.data.TFRecordDataset(path):
            example = tf.train.Example.FromString(item.numpy()).features.feature
            label = example["image/class/label"].int64_list.value
            found.append((label[0] if label else 0, example["image/encoded"].bytes_list.value[0]))
    return found


# --- Clips -----------------------------------------------------------------------------------------


def flat_frames(colors, size=(48, 64)) -> list[np.ndarray]:
    return [np.broadcast_to(np.uint8(color), [*size, 3]).copy() for color in colors]


def write_mp4(path, frames) -> None:
    """Writes H.264, like the clips of ImageNet-P."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=1)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def write_gif(path, frames) -> None:
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(path, save_all=True, append_images=rest, duration=100, disposal=1)


# --- The scripts of tpu_scripts --------------------------------------------------------------------

SCRIPT_FOLDER = ROOT / "tpu_scripts"
# The user's environment variables would change what the scripts print.
SCRIPT_SETTINGS = re.compile(
    r"^PYTHON$|MODEL|TEACHER|DATA|DIR|CKPT|SHARD|HARDWARE|TPU|ZONE|SPOT|PROJECT|FLAGS$"
)


def script_environment(**variables: object) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not SCRIPT_SETTINGS.search(k)}
    return {**clean, **{k: str(v) for k, v in variables.items()}}


def run_script(script: Path | str, *words: str, check: bool = True, **variables: object):
    done = subprocess.run(
        [SCRIPT_FOLDER / script, *words],
        env=script_environment(**variables),
        text=True,
        capture_output=True,
        cwd="/",
        timeout=300,  # A script that waits for a machine never ends by itself.
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def script_commands(script: str, *words: str, **variables: object) -> list[tuple[str, list[str]]]:
    """Returns (module, arguments) of each program printed by a dry run."""
    printed = run_script(script, "--dry_run", *words, PYTHON="python", **variables).stdout
    found = []
    for line in printed.splitlines():
        parts = shlex.split(line)
        assert parts[:2] == ["python", "-m"] or parts[0] in ("mkdir", "curl", "tar"), line
        if parts[0] == "python":
            found.append((parts[2].split(".")[1], parts[3:]))
    return found


def write_mat(folder: Path) -> None:
    """Writes files like SVHN's: X uint8 [32, 32, 3, images], y [images, 1] with 10 for digit 0."""
    import scipy.io
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder.mkdir(parents=True)
    start = 0
    for name, count in (("train", 240), ("test", 60), ("extra", 200)):
        chosen = slice(start, start + count)
        pixels = np.kron(digits.images[chosen], np.ones([4, 4])) * (255 / 16)
        pixels = np.repeat(pixels[..., None], 3, axis=-1).astype(np.uint8)
        labels = np.where(digits.target[chosen] == 0, 10, digits.target[chosen])
        scipy.io.savemat(
            folder / f"{name}_32x32.mat",
            {"X": pixels.transpose(1, 2, 3, 0), "y": labels[:, None].astype(np.uint8)},
        )
        start += count


# --- Folders of pictures ---------------------------------------------------------------------------

COLORS = ((210, 40, 50), (50, 190, 70), (60, 70, 220))


def photo(number: int, color: tuple[int, int, int]) -> Image.Image:
    """Returns 24 × 30 pixels of roughly one color, a different picture for each number."""
    rng = np.random.default_rng(number)
    pixels = np.array(color) + rng.normal(0, 20, [24, 30, 3]) + rng.normal(0, 15, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def class_folders(folder: Path, classes: dict[str, int], first: int = 0) -> None:
    """Writes PNG files to a folder per class, each class in one color."""
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture = photo(1000 * number + first + i, COLORS[number % len(COLORS)])
            picture.save(folder / name / f"{name} {i}.png")


def flat_folder(folder: Path, count: int, classes: int = 2, first: int = 500) -> None:
    """Writes PNG files of several colors to one folder."""
    folder.mkdir(parents=True)
    for i in range(count):
        number = i % classes
        photo(1000 * number + first + i, COLORS[number]).save(folder / f"u{i}.png")
