"""A training and its export, as the programs that use a trained model take them: by its folder only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.config import Config, ConfigError, ExportConfig
from efficientnet_ns.data import tasks
from efficientnet_ns.evaluation import evaluate
from efficientnet_ns.files import tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.inference import exported, photo_files
from efficientnet_ns.models import weights
from efficientnet_ns.pseudo_labels import predict
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
    """`run`, a training; `export`, made of it; `records`, labeled and unlabeled ones."""
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
    model_export.export_model(Config().override(model_dir=str(folder / "run")), options)
    return folder


def of(folder: Path, which: str, **values) -> Config:
    return Config().override(model_dir=str(folder / which), **values)


@pytest.mark.slow
def test_photos(folder):
    photos = [folder / f"{number}.png" for number in range(3)]
    first, second = (
        list(photo_files.predict_images(Config(), folder / which, photos, top=3))
        for which in ("run", "export")
    )
    for one, other in zip(first, second):
        assert {guess["name"] for guess in one["predictions"]} == set(NAMES)
        for guess, same in zip(one["predictions"], other["predictions"]):
            assert guess["name"] == same["name"]
            assert guess["probability"] == pytest.approx(same["probability"], abs=1e-4)


def test_photo_that_cannot_be_read(folder, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (answer,) = photo_files.predict_images(Config(), folder / "export", [tmp_path / "bad.png"])
    assert answer["error"]


def test_evaluation(folder, tmp_path):
    """The records are those of the training; an export names them in no place."""
    found = evaluate.evaluate(of(folder, "run", inference_engine="tf"))
    assert (folder / "run" / "eval" / "eval.json").exists()
    records = str(folder / "records")
    same = evaluate.evaluate(
        of(folder, "export", label_data_dir=records, eval_dir=str(tmp_path), eval_batch_size=4)
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
    for which in ("run", "export"):
        output = tmp_path / which
        config = of(
            folder,
            which,
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
    np.testing.assert_allclose(*probabilities, atol=1e-4)


def test_unreadable_images_keep_their_place(folder):
    model = exported.ExportedModel(folder / "export" / "1")
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
