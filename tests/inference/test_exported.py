"""A training run and its export, used by passing only their folder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.config import Config, ConfigError, ExportConfig
from efficientnet_ns.data import tasks
from efficientnet_ns.evaluation import evaluate
from efficientnet_ns.files import json_files, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.inference import exported, photo_files
from efficientnet_ns.models import weights
from efficientnet_ns.pseudo_labels import predict
from efficientnet_ns.resolve import stored_model
from efficientnet_ns.resolve.resolved_config import ResolvedConfig
from efficientnet_ns.serving import model_export
from efficientnet_ns.training import claim

NAMES = ("daisy", "rose", "tulip")
SIZE = 32


def pictures() -> list[bytes]:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, [40, 30 + i, 3], np.uint8) for i in range(11)]
    return [tf.io.encode_png(one).numpy() for one in pixels]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Creates `run` (a training run), `export` (its export) and `records`, some unlabeled."""
    folder = tmp_path_factory.mktemp("models")
    task = str(folder / "task.json")
    tasks.write_task(task, num_classes=3, class_names=NAMES, image_size=SIZE)
    config = Config().override(
        model_name="efficientnet-test",
        task_name=task,
        label_data_dir=str(folder / "records"),
        model_dir=str(folder / "run"),
    )
    claim.claim(config, {})
    tf.keras.utils.set_random_seed(1)
    model = ResolvedConfig.from_config(config).build_model()
    for variable in model.weights:
        variable.assign_add(tf.random.uniform(variable.shape, 0, 0.05))
    weights.save_weights(model, folder / "run" / "model.ckpt-4")
    Path(task).unlink()
    (folder / "records").mkdir()
    labeled = [tfexamples.labeled_example(image, i % 3) for i, image in enumerate(pictures())]
    tfrecords.write(str(folder / "records" / "validation-00000-of-00001"), labeled)
    tfrecords.write(str(folder / "records" / "extra-00000-of-00001"), labeled)
    for number, image in enumerate(pictures()):
        (folder / f"{number}.png").write_bytes(image)
    options = ExportConfig(export_dir=str(folder / "export"))
    run = Config().override(model_dir=str(folder / "run"))
    model_export.export_model(run, options)
    lite = ExportConfig(export_dir=str(folder / "lite"), format="tflite")
    os.rename(model_export.export_model(run, lite), folder / "model")  # Recognized by its content.
    return folder


# A folder of versions and a TensorFlow Lite file.
EXPORTS = ("export", "model")


def of(folder: Path, which: str, **values) -> Config:
    given = "init_model_path" if which == "model" else "model_dir"
    return Config().override(**{given: str(folder / which)}, **values)


@pytest.mark.slow
@pytest.mark.parametrize("export", EXPORTS)
def test_photos(folder, export):
    photos = [folder / f"{number}.png" for number in range(3)]
    first, second = (
        list(photo_files.predict_images(Config(), folder / which, photos, top=3))
        for which in ("run", export)
    )
    for one, other in zip(first, second):
        assert {guess["name"] for guess in one["predictions"]} == set(NAMES)
        for guess, same in zip(one["predictions"], other["predictions"]):
            assert guess["name"] == same["name"]
            assert guess["probability"] == pytest.approx(same["probability"], abs=1e-4)


@pytest.mark.parametrize("export", EXPORTS)
def test_photo_that_cannot_be_read(folder, tmp_path, export):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (answer,) = photo_files.predict_images(Config(), folder / export, [tmp_path / "bad.png"])
    assert answer["error"]


@pytest.mark.parametrize("export", EXPORTS)
def test_evaluation(folder, tmp_path, export):
    """The training run knows its records; the export does not."""
    found = evaluate.evaluate(of(folder, "run", inference_engine="tf"))
    assert (folder / "run" / "eval" / "eval.json").exists()
    records = str(folder / "records")
    same = evaluate.evaluate(
        of(folder, export, label_data_dir=records, eval_dir=str(tmp_path), eval_batch_size=4)
    )
    assert found["validation"]["examples"] == same["validation"]["examples"] == 11
    assert found["validation"]["loss"] == pytest.approx(same["validation"]["loss"], abs=1e-3)
    assert "daisy" in (tmp_path / "eval_report.html").read_text()


def test_evaluation_names_a_record_that_cannot_be_decoded(folder, tmp_path):
    records = [tfexamples.labeled_example(b"no picture", 1)]
    tfrecords.write(str(tmp_path / "validation-00000-of-00001"), records)
    with pytest.raises(DataError, match="validation-00000-of-00001"):
        evaluate.evaluate(of(folder, "export", label_data_dir=str(tmp_path)))


def test_pseudo_labels(folder, tmp_path):
    probabilities = []
    for which in ("run", *EXPORTS):
        output = tmp_path / which
        config = Config().override(
            predict_ckpt_path=str(folder / which),
            unlabel_data_dir=str(folder / "records"),
            output_dir=str(output),
            info_dir=str(output),
            inference_engine="tf",
        )
        assert predict.predict(config)["records"] == 11
        assert predict.predict(config)["skipped_shards"] == 1
        file = str(output / "train-info-00000-of-00001-00000")
        rows = [tfexamples.probabilities(record.payload) for record in tfrecords.read(file)]
        probabilities.append(np.array(rows))
        assert tasks.class_names(output / "task.json") == NAMES
    for others in probabilities[1:]:
        np.testing.assert_allclose(others, probabilities[0], atol=1e-4)


@pytest.mark.parametrize("export", ("export/1", "model"))
def test_unreadable_images_keep_their_place(folder, export):
    model = exported.ExportedModel(folder / export)
    images = [pictures()[0], None, b"no picture", pictures()[1]]
    probabilities, problems = model.label(images)
    assert problems == {2: "the image cannot be decoded"}
    assert probabilities.sum(1) == pytest.approx([1, 0, 0, 1], abs=1e-5)
    assert model.label([])[0].shape == (0, 3)


@pytest.mark.parametrize(
    "name, value",
    [("input_image_size", 64), ("eval_views", 2), ("inference_engine", "xnnpack")],
)
def test_settings_that_a_graph_cannot_follow(folder, name, value):
    config = of(folder, "export", label_data_dir="x", **{name: value})
    with pytest.raises(ConfigError, match=f"--{name}={value}"):
        evaluate.evaluate(config)


def test_another_lite_file(folder, tmp_path):
    """A file without the metadata that `export_model` attaches."""
    content = (folder / "model").read_bytes()
    (tmp_path / "bare.tflite").write_bytes(content[: content.index(b"PK\x03\x04")])
    with pytest.raises(json_files.BrokenFile, match="bare.tflite.*export_model"):
        list(photo_files.predict_images(Config(), tmp_path / "bare.tflite", [folder / "0.png"]))


def test_lite_file_of_a_model_of_whole_images(tmp_path):
    """The file keeps the image settings and the evaluation set of the task."""
    task = str(tmp_path / "task.json")
    tasks.write_task(task, num_classes=3, image_size=SIZE, small_image=True, eval_set="dev")
    config = Config().override(model_name="efficientnet-test", task_name=task)
    weights.save_weights(
        ResolvedConfig.from_config(config).build_model(), tmp_path / "a.safetensors"
    )
    config = config.override(init_model_path=str(tmp_path / "a.safetensors"))
    options = ExportConfig(export_dir=str(tmp_path), format="tflite")
    stored = stored_model.read(model_export.export_model(config, options))
    assert stored.exported and stored.variant == "efficientnet-test"
    assert stored.images["small_image"] and stored.images["image_size"] == SIZE
    assert stored.task == tasks.Task(3, class_names=("0", "1", "2"), eval_set="dev")
