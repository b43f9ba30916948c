"""`--mode=eval`: its results and files, compared with NumPy and direct model calls."""

from __future__ import annotations

import functools
import html
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import forks
import numpy as np
import pytest
import tensorflow as tf
from fakes import ROOT, free_ports, pictures, worker_environment, write_task

from efficientnet_ns import report as labeling_report
from efficientnet_ns.config import Config, ConfigError, ModeConfig
from efficientnet_ns.evaluation import accuracy, accuracy_report, evaluate
from efficientnet_ns.files import metrics_log, tfexamples, tfrecords
from efficientnet_ns.inference.engines import CpuEngine, EngineError
from efficientnet_ns.models import weights
from efficientnet_ns.models.recipes import RECIPES
from efficientnet_ns.models.stored_arrays import DamagedFile
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

CLASSES, COUNT = 3, 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """23 labeled images and a checkpoint whose moving averages differ from the raw weights."""
    path = tmp_path_factory.mktemp("evaluation")
    write_task(path / "task.json", CLASSES)
    examples = [
        # The last class is a minority.
        tfexamples.labeled_example(image, i % 7 % CLASSES)
        for i, image in enumerate(pictures(COUNT, 5))
    ]
    tfrecords.write_sharded(str(path / "labeled"), "validation", examples, 3)
    rng = np.random.default_rng(1)
    tensors = {}
    for name, variable in weights.variable_names(resolved(path).build_model()).items():
        for suffix in ("", weights.EMA_SUFFIX):
            value = variable + rng.uniform(-0.05, 0.05, variable.shape)
            # Makes the confidence vary between images.
            tensors[name + suffix] = value * 20 if name.endswith("dense/kernel") else value
    (path / "model").mkdir()
    weights.write_checkpoint(str(path / "model" / "model.ckpt-7"), tensors)
    return path


def settings(folder: Path, **values) -> Config:
    defaults = {
        "model_name": "efficientnet-test",
        "task_name": str(folder / "task.json"),
        "label_data_dir": str(folder / "labeled"),
        "model_dir": str(folder / "model"),
        "inference_engine": "tf",
        "eval_batch_size": 8,
    }
    return Config().override(**{**defaults, **values})


def resolved(folder: Path, **values) -> ResolvedConfig:
    return ResolvedConfig.from_config(settings(folder, **values))


@functools.cache
def answers(folder: Path, *, ema=True, size=None, mirrored=False) -> tuple[np.ndarray, np.ndarray]:
    """Returns (probabilities float64 [N, C], labels [N]) by calling the model without batches."""
    chosen = resolved(folder, input_image_size=size)
    model = chosen.build_model()
    weights.load_weights(model, str(folder / "model"), ema=ema)
    found = [
        raw
        for path in sorted((folder / "labeled").glob("validation-*"))
        for raw in tf.data.TFRecordDataset(str(path)).as_numpy_iterator()
    ]
    images = [tf.constant(tfexamples.image_bytes(raw)) for raw in found]
    pixels = tf.stack([chosen.preprocessing().evaluate(image) for image in images])
    views = [pixels, pixels[:, :, ::-1]] if mirrored else [pixels]
    probs = [softmax(model(view, training=False).numpy().astype(np.float64)) for view in views]
    return np.mean(probs, axis=0), np.array([tfexamples.label(raw) for raw in found])


def softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    return exponents / exponents.sum(1, keepdims=True)


def expected_metrics(probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    own = probs[np.arange(len(labels)), labels]
    return {
        "top1": np.mean(probs.argmax(1) == labels),
        "top5": 1.0,
        "loss": -np.mean(np.log(own)),
        "examples": len(labels),
    }


def calibration_error(probs: np.ndarray, labels: np.ndarray) -> float:
    """Guo et al. (2017), equation 3, with 15 bins."""
    inside: dict[int, list] = {}
    for row, label in zip(probs, labels):
        inside.setdefault(math.ceil(row.max() * 15), []).append((row.max(), row.argmax() == label))
    gaps = [
        len(v) * abs(np.mean([c for c, _ in v]) - np.mean([r for _, r in v]))
        for v in inside.values()
    ]
    return sum(gaps) / len(labels)


def approx(metrics: dict[str, float]):
    return pytest.approx(metrics, rel=1e-4)


@pytest.fixture(scope="module")
def evaluated(folder) -> Path:
    out = folder / "written"
    metrics = evaluate.evaluate(settings(folder, eval_dir=str(out)))["validation"]
    assert metrics == approx(expected_metrics(*answers(folder)))
    return out


def test_json(evaluated, folder):
    probs, labels = answers(folder)
    found = json.loads((evaluated / "eval.json").read_text())
    assert (found["weights"], found["ema"], found["views"]) == (str(folder / "model"), True, 1)
    assert list(found["sets"]) == ["validation"]
    result = found["sets"]["validation"]
    expected = {**expected_metrics(probs, labels), "ece": calibration_error(probs, labels)}
    assert {key: result[key] for key in expected} == approx(expected)
    guesses = probs.argmax(1)
    per_class = [np.mean(guesses[labels == c] == c) for c in range(CLASSES)]
    assert result["per_class"] == pytest.approx(per_class)
    pairs = {}
    for label, guess in zip(labels, guesses):
        if label != guess:
            pairs[str(label), str(guess)] = pairs.get((str(label), str(guess)), 0) + 1
    stated = [(p["truth"], p["predicted"], p["images"]) for p in result["confused"]]
    assert {(t, g): n for t, g, n in stated} == pairs and pairs
    assert [n for *_, n in stated] == sorted(pairs.values(), reverse=True)
    bins = result["calibration"]
    assert sum(bins["images"]) == COUNT and len(bins["images"]) == 15
    assert sum(bins["correct"]) == np.sum(guesses == labels)
    assert sum(bins["confidence"]) == pytest.approx(probs.max(1).sum(), rel=1e-4)


def test_page(evaluated, folder):
    probs, labels = answers(folder)
    page = (evaluated / "eval_report.html").read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    sections = ["accuracy", "calibration", "classes, worst first", "confusion"]
    assert titles == [f"validation: {name}" for name in sections]
    assert re.search(r'<img class="plot" src="data:image/png;base64,[^"]{1000,}" alt="Reliab', page)
    stated = re.search(r"Expected calibration error ([0-9.]+) \(15 bins, (\d+) images", page)
    assert float(stated[1]) == pytest.approx(calibration_error(probs, labels), rel=2e-3)
    assert int(stated[2]) == COUNT
    # The page lists classes with their image counts, worst first.
    text = html.unescape(re.sub(r"<[^>]+>", " ", page.split("worst first</h2>")[1]))
    rows = re.findall(r"(?m)^\s*(\d)\s+(\d+)\s+(\d\.?\d*)\s*$", text)[:CLASSES]
    right = probs.argmax(1) == labels
    expected = sorted((right[labels == c].mean(), c) for c in range(CLASSES))
    assert [int(row[0]) for row in rows] == [c for _, c in expected]
    for (_, images, share), (accuracy_of, c) in zip(rows, expected):
        assert int(images) == np.sum(labels == c)
        assert float(share) == pytest.approx(accuracy_of, rel=1e-3)


@pytest.mark.slow
def test_raw_weights(folder):
    raw = evaluate.evaluate(settings(folder, eval_ema=False))["validation"]
    assert raw == approx(expected_metrics(*answers(folder, ema=False)))
    assert raw["loss"] != pytest.approx(expected_metrics(*answers(folder))["loss"], rel=1e-3)


def test_another_resolution(folder):
    found = evaluate.evaluate(settings(folder, eval_image_size=16))["validation"]
    assert found == approx(expected_metrics(*answers(folder, size=16)))
    assert found["loss"] != pytest.approx(expected_metrics(*answers(folder))["loss"], rel=1e-3)


@pytest.mark.parametrize("engine", [pytest.param("tf", marks=pytest.mark.slow), "xnnpack"])
def test_mirrored_views_with_each_engine(folder, engine):
    config = settings(folder, eval_views=2, inference_engine=engine)
    found = evaluate.evaluate(config)["validation"]
    assert found == pytest.approx(expected_metrics(*answers(folder, mirrored=True)), rel=1e-3)


def test_number_of_views(folder):
    with pytest.raises(ConfigError, match="--eval_views=10 must be 1 or 2"):
        evaluate.evaluate(settings(folder, eval_views=10))


def test_an_engine_that_cannot_compute_is_refused(folder, monkeypatch):
    xnnpack = {"inference_engine": "xnnpack"}
    with pytest.raises(ConfigError, match="one device"):
        evaluate.evaluate(settings(folder, num_replicas=4, **xnnpack))
    with pytest.raises(ConfigError, match="--eval_continuously computes with TensorFlow"):
        evaluate.evaluate(settings(folder, eval_continuously=True, **xnnpack))
    monkeypatch.setattr("efficientnet_ns.inference.engines._MAX_PARAMETERS", 1)
    with pytest.raises(EngineError, match="does not fit into a flatbuffer"):
        evaluate.evaluate(settings(folder, **xnnpack))


def test_continuous_evaluation_on_several_machines_is_refused(folder, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {}}')
    monkeypatch.setattr(evaluate, "_evaluate_each", lambda *_: pytest.fail("evaluated"))
    with pytest.raises(ConfigError, match="works on one machine: unset TF_CONFIG"):
        evaluate.evaluate(settings(folder, eval_continuously=True))


class Training:
    """Imitates training in progress, whose checkpoints are names without weights."""

    def __init__(self, folder: Path, monkeypatch):
        self._folder = folder
        self.read: list[str] = []
        self.save(1)
        monkeypatch.setattr(weights, "load_weights", self.load)
        # Fails after one wait instead of waiting forever for a new checkpoint.
        waits = iter([None])
        monkeypatch.setattr(evaluate.time, "sleep", lambda _: next(waits))

    def save(self, step: int) -> None:
        for path in self._folder.glob("model.ckpt-*"):
            path.unlink()
        (self._folder / f"model.ckpt-{step}.index").touch()
        (self._folder / "checkpoint").write_text(f'model_checkpoint_path: "model.ckpt-{step}"\n')

    def load(self, model, path: str, *, ema: bool) -> None:
        self.read.append(Path(path).name)


def test_a_checkpoint_that_is_removed_while_it_is_read_is_skipped(folder, tmp_path, monkeypatch):
    training = Training(tmp_path, monkeypatch)

    def load(model, path: str, *, ema: bool) -> None:
        training.load(model, path, ema=ema)
        if path.endswith("-1"):
            training.save(2)
            raise DamagedFile(f"{path} cannot be read: no such file")

    monkeypatch.setattr(weights, "load_weights", load)
    monkeypatch.setattr(evaluate, "_measure_sets", lambda *_: measured(0.5, 4))
    chosen = resolved(folder, model_dir=str(tmp_path), train_steps=2)
    assert evaluate._evaluate_each(chosen, None, None)["validation"]["top1"] == 0.5
    assert training.read == ["model.ckpt-1", "model.ckpt-2"]
    assert [row["step"] for row in metrics_log.read_metrics(str(tmp_path / "eval"))] == [2]


def test_a_missing_record_file_ends_continuous_evaluation(folder, tmp_path, monkeypatch):
    training = Training(tmp_path, monkeypatch)

    def missing(*_):
        raise tf.errors.NotFoundError(None, None, "validation-00000-of-00003")

    monkeypatch.setattr(evaluate, "_measure_sets", missing)
    chosen = resolved(folder, model_dir=str(tmp_path), train_steps=2)
    with pytest.raises(tf.errors.NotFoundError, match="validation-00000"):
        evaluate._evaluate_each(chosen, None, None)
    assert training.read == ["model.ckpt-1"]


@pytest.mark.parametrize("kind", ["xnnpack", "auto"])
def test_the_engine_computes(folder, monkeypatch, kind):
    """The engine, rather than TensorFlow, computes every image, as in predictions."""
    seen, asked = [], []

    def make(kind, model, batch_size, strategy, *, dtype):
        def worker(pixels):
            seen.append(len(pixels))
            return np.full([len(pixels), CLASSES], [0.2, 0.5, 0.3], np.float32)

        asked.append(kind)
        return CpuEngine("fake", 8, [worker])

    monkeypatch.setattr("efficientnet_ns.inference.engines.make", make)
    found = evaluate.evaluate(settings(folder, inference_engine=kind))["validation"]
    labels = answers(folder)[1]
    assert (asked, seen) == ([kind], [8, 8, 8])
    assert found["top1"] == pytest.approx(np.mean(labels == 1))
    assert found["loss"] == pytest.approx(-np.mean(np.log([0.2, 0.5, 0.3])[labels]), rel=1e-5)


# --- Every example exactly once -------------------------------------------------------------------


_QUICK = [(1, 7), (4, 6)]
_MORE = [(1, 4), (1, 23), (1, 64), (4, 4), (4, 7), (4, 23), (4, 64)]


@pytest.mark.parametrize(
    "replicas, batch", [*_QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in _MORE)]
)
def test_count_is_exact(folder, replicas, batch, tmp_path):
    """Batch sizes that do not divide the set or split evenly over replicas, and a larger one.

    Runs in a separate process, because TensorFlow fixes the number of replicas per process.
    """
    config = {"model_dir": folder / "model", "label_data_dir": folder / "labeled"}
    config.update(task_name=folder / "task.json", model_name="efficientnet-test")
    config.update(eval_batch_size=batch, num_replicas=replicas, eval_dir=tmp_path)
    flags = [f"--{key}={value}" for key, value in config.items()]
    done = forks.python("-m", "efficientnet_ns.main", "--mode=eval", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)["validation"]
    assert found["examples"] == COUNT
    assert found == approx(expected_metrics(*answers(folder)))


@pytest.mark.slow
@pytest.mark.parametrize("images, batch", [(23, 8), (22, 5), (1, 4)])
def test_count_is_exact_with_two_processes(folder, tmp_path, images, batch):
    """Under MultiWorkerMirroredStrategy, each process prints the results of all processes."""
    config = {"model_dir": folder / "model", "label_data_dir": folder / "labeled"}
    config.update(task_name=folder / "task.json", model_name="efficientnet-test")
    config.update(num_eval_images=images, eval_batch_size=batch, eval_dir=tmp_path / "out")
    flags = [f"--{key}={value}" for key, value in config.items()]
    command = [sys.executable, "-m", "efficientnet_ns.main", "--mode=eval", *flags]
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=worker_environment(addresses, index),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    probs, labels = answers(folder)
    expected = expected_metrics(probs[:images], labels[:images])
    try:
        for process in processes:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err[-3000:]
            assert json.loads(out)["validation"] == approx(expected)
    finally:
        for process in processes:
            process.kill()
    written = json.loads((tmp_path / "out" / "eval.json").read_text())["sets"]["validation"]
    assert written["examples"] == images == sum(written["calibration"]["images"])
    right = np.argmax(probs, 1)[:images] == labels[:images]
    assert written["per_class"] == [
        pytest.approx(right[labels[:images] == c].mean()) if c in labels[:images] else None
        for c in range(CLASSES)
    ]


# --- Comparison with the published value ----------------------------------------------------------


def measured(top1: float, examples: int) -> dict[str, accuracy.Measured]:
    metrics = {"top1": top1, "examples": examples}
    nothing = labeling_report.Confusion.tally([], []), labeling_report.Calibration.tally([], [])
    return {"validation": accuracy.Measured(metrics, *nothing, 2)}


@pytest.mark.parametrize("name", ["efficientnet-b0", "efficientnet-l2"])
def test_published_value_of_a_known_model_and_set(name):
    config = Config().override(model_name=name)
    (line,) = accuracy_report.beside_published(config, measured(0.78123, 50_000))
    recipe = RECIPES[name]
    assert line.startswith(f"{name}, validation: top-1 78.12% measured; published: ")
    for value in (f"{recipe.top1:.1f}%", f"{recipe.timm_top1:.2f}%"):
        assert value in line


def test_published_value_of_a_model_without_pseudo_labels():
    config = Config().override(model_name="efficientnet-lite0")
    (line,) = accuracy_report.beside_published(config, measured(0.75, 50_000))
    assert line.endswith("top-1 75.00% measured; published: supervised 75.1%")


@pytest.mark.parametrize(
    "values, examples",
    [({"model_name": "efficientnet-test"}, 50_000), ({"task_name": "svhn"}, 50_000), ({}, 49_999)],
)
def test_nothing_is_published_of_other_models_and_sets(values, examples):
    config = Config().override(**values)
    assert accuracy_report.beside_published(config, measured(0.5, examples)) == []


def test_eval_prints_measured_beside_published(folder, tmp_path, monkeypatch, capsys, caplog):
    """`main --mode=eval` of a published model, on a set that passes for ImageNet by its size."""
    from efficientnet_ns import main
    from efficientnet_ns.data import tasks

    monkeypatch.setitem(tasks.TASKS, "imagenet", tasks.get_task(str(folder / "task.json")))
    monkeypatch.setitem(RECIPES, "efficientnet-test", RECIPES["efficientnet-b0"])
    monkeypatch.setattr(accuracy_report, "_IMAGENET_VALIDATION", COUNT)
    config = settings(folder, task_name="imagenet", eval_dir=str(tmp_path))
    with caplog.at_level("INFO", logger="absl"):
        main.main(ModeConfig("eval"), config)
    top1 = json.loads(capsys.readouterr().out)["validation"]["top1"]
    published = f"top-1 {top1:.2%} measured; published: Noisy Student 78.8%"
    assert published in caplog.text
    assert published in html.unescape((tmp_path / "eval_report.html").read_text())
