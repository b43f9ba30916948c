"""Photos on the command line are predicted as in evaluation; class names; one-liners."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import sys
from pathlib import Path

import forks
import image_files
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from efficientnet_ns import inference
from efficientnet_ns.config import Config, ConfigError
from efficientnet_ns.data import images, pipeline, tasks
from efficientnet_ns.files import standard_output, tfexamples, tfrecords
from efficientnet_ns.inference import photo_files
from efficientnet_ns.models import efficientnet, weights
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

ROOT = Path(__file__).parents[2]
NAMES = ("zero", "one", "two", "three", "four")


def noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.integers(0, 256, [height, width, 3], np.uint8)


def jpeg(pixels: np.ndarray) -> bytes:
    return tf.io.encode_jpeg(pixels).numpy()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[str]:
    """Photos of several sizes and formats."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("photos")
    contents = {
        "wide.jpg": jpeg(noise(rng, 40, 71)),
        "tall.png": tf.io.encode_png(noise(rng, 90, 33)).numpy(),
        "fitting.png": tf.io.encode_png(noise(rng, 16, 16)).numpy(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [str(folder / name) for name in contents]


@pytest.fixture(scope="module")
def bad_photos(tmp_path_factory) -> dict[str, str]:
    """Maps each path to a part of its error message."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "nothing").mkdir()
    (folder / "text.jpg").write_bytes(b"no picture")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "half.jpg").write_bytes(jpeg(noise(np.random.default_rng(0), 64, 64))[:800])
    return {
        str(folder / "text.jpg"): "not a format TensorFlow decodes; Pillow: cannot identify",
        str(folder / "empty.jpg"): "the file is empty",
        str(folder / "half.jpg"): "Invalid JPEG data",
        str(folder / "absent.jpg"): "No such file",
        str(folder / "nothing"): "a folder without images",
    }


def make_config(folder: Path, **fields) -> Config:
    """Creates a task file and a checkpoint whose moving averages differ from its raw weights."""
    task = folder / "task.json"
    task.write_text(json.dumps({"num_classes": len(NAMES), "image_size": 16, **fields}))
    config = Config().override(model_name="efficientnet-test", task_name=str(task))
    rng, tensors = np.random.default_rng(1), {}
    for name, variable in weights.variable_names(
        ResolvedConfig.from_config(config).build_model()
    ).items():
        for suffix in ("", weights.EMA_SUFFIX):
            tensors[name + suffix] = variable + rng.uniform(0, 0.05, variable.shape)
    weights.write_checkpoint(str(folder / "model.ckpt-7"), tensors)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def config(folder) -> Config:
    """Small, uncropped images, like digits."""
    return make_config(folder, small_image=True, flip=False, class_names=NAMES)


def by_eval_path(config: Config, weights_path: str, paths: list[str], tmp_path: Path) -> np.ndarray:
    """Predicts the photos as records of an evaluation set."""
    examples = [tfexamples.labeled_example(Path(path).read_bytes(), 0) for path in paths]
    tfrecords.write_sharded(str(tmp_path), "validation", examples, 1)
    resolved = ResolvedConfig.from_config(config)
    model = resolved.build_model()
    weights.load_weights(model, weights_path)
    source = pipeline.Source.find(str(tmp_path), "validation")
    (batch,) = list(resolved.eval_batches(source).take(1))
    probabilities = tf.nn.softmax(model(batch["image"], training=False)).numpy()
    return probabilities[: len(paths)]


def test_answers_are_those_of_the_evaluation(config, folder, photos, tmp_path):
    answers = list(photo_files.predict_images(config, str(folder), photos, top=5))
    expected = by_eval_path(config, str(folder), photos, tmp_path)
    assert expected.std(0).max() > 1e-3, "the photos must differ"
    assert [answer["photo"] for answer in answers] == photos
    for answer, row in zip(answers, expected):
        guesses = answer["predictions"]
        assert [g["index"] for g in guesses] == np.argsort(-row).tolist()
        assert [g["name"] for g in guesses] == [NAMES[i] for i in np.argsort(-row)]
        np.testing.assert_allclose([g["probability"] for g in guesses], -np.sort(-row), atol=1e-6)


def test_folders_of_photos(config, folder, photos, tmp_path):
    names = ["b.png", "a/c.png", "a/.hidden.png", "a/notes.txt"]
    for name in names:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos[0], path)
    (tmp_path / "empty").mkdir()
    given = [photos[0], tmp_path / "photos", tmp_path / "empty"]
    first, *rest, empty = photo_files.predict_images(config, str(folder), given)
    expected = [str(tmp_path / "photos" / name) for name in ("a/c.png", "b.png")]
    assert [one["photo"] for one in rest] == expected
    assert [one["predictions"] for one in rest] == [first["predictions"]] * 2
    assert empty == {"photo": str(tmp_path / "empty"), "error": "a folder without images"}


def test_tasks_like_imagenet_are_cropped(tmp_path, photos):
    config = make_config(tmp_path)
    (answer,) = photo_files.predict_images(config, str(tmp_path), photos[:1], top=1)
    (tmp_path / "records").mkdir()
    row = by_eval_path(config, str(tmp_path), photos[:1], tmp_path / "records")[0]
    (best,) = answer["predictions"]
    assert best["index"] == row.argmax() and best["name"] == str(row.argmax())
    assert best["probability"] == pytest.approx(row.max(), abs=1e-6)


def test_raw_weights(config, folder, photos):
    averaged, raw = (
        list(photo_files.predict_images(config, str(folder), photos[:1], ema=ema))
        for ema in (True, False)
    )
    assert averaged != raw


@pytest.mark.parametrize("repeats, calls", [(1, 3), (20, 1)])
def test_many_photos_trace_the_model_once(config, folder, photos, monkeypatch, repeats, calls):
    """A few photos are predicted without a graph, with the same results."""
    count = 0
    build_model = ResolvedConfig.build_model

    def counting(resolved):
        model = build_model(resolved)
        call = model.call

        def counted(*args, **kwargs):
            nonlocal count
            count += 1
            return call(*args, **kwargs)

        model.call = counted
        return model

    expected = [
        answer["predictions"] for answer in photo_files.predict_images(config, str(folder), photos)
    ]
    monkeypatch.setattr(ResolvedConfig, "build_model", counting)
    answers = list(photo_files.predict_images(config, str(folder), photos * repeats))
    assert count == calls
    for answer, guesses in zip(answers, expected * repeats):
        assert [g["index"] for g in answer["predictions"]] == [g["index"] for g in guesses]
        np.testing.assert_allclose(
            [g["probability"] for g in answer["predictions"]],
            [g["probability"] for g in guesses],
            atol=1e-6,
        )


def test_bad_photos_are_named_and_others_answered(config, folder, photos, bad_photos):
    paths = [*bad_photos, photos[0]]
    answers = {a["photo"]: a for a in photo_files.predict_images(config, str(folder), paths)}
    assert list(answers) == paths
    for path, part in bad_photos.items():
        error = answers[path]["error"]
        assert part in error and "predictions" not in answers[path]
        assert not any(noise in error for noise in ("{{", "[Op", "\n", "Graph execution"))
    assert "error" not in answers[photos[0]]


@pytest.mark.parametrize(
    "name", ["BMP palette 8 bit", "BMP RLE8", "GIF transparent", "TIFF LZW", "WebP lossless"]
)
def test_formats_tensorflow_cannot_decode(config, folder, tmp_path, name):
    content = image_files.FILES[name]()
    Image.open(io.BytesIO(content)).convert("RGB").save(tmp_path / "same.png")
    (tmp_path / "photo").write_bytes(content)
    paths = [str(tmp_path / "photo"), str(tmp_path / "same.png")]
    photo, same = photo_files.predict_images(config, str(folder), paths)
    assert photo["predictions"] == same["predictions"]


def test_pixels_without_a_known_range_are_named(config, folder, tmp_path):
    (tmp_path / "depth.tif").write_bytes(image_files.FILES["TIFF gray 32 bit"]())
    (answer,) = photo_files.predict_images(config, str(folder), [tmp_path / "depth.tif"])
    assert answer["photo"] == str(tmp_path / "depth.tif")
    assert answer["error"].startswith("32-bit integer pixels have no known range")


@pytest.mark.parametrize("show", [json.dumps, photo_files._text])
def test_names_that_are_not_utf8(config, folder, photos, tmp_path, show, monkeypatch):
    name = os.fsencode(tmp_path) + b"/caf\xe9 \xff.png"
    with open(name, "wb") as file:
        file.write(Path(photos[1]).read_bytes())
    paths = [os.fsdecode(name), os.fsdecode(name + b"absent"), photos[1]]
    answers = list(photo_files.predict_images(config, str(folder), paths))
    assert answers[0]["predictions"] == answers[2]["predictions"]
    assert "No such file" in answers[1]["error"]
    for coding in ("utf-8", "ascii"):
        target = io.TextIOWrapper(io.BytesIO(), encoding=coding)
        monkeypatch.setattr(sys, "stdout", target)
        for answer in answers:
            print(standard_output.printable(show(answer)))
        target.flush()
        text = target.buffer.getvalue().decode(coding)
        assert r"caf\udce9 \udcff.png" in text and str(photos[1]) in text


@pytest.mark.parametrize("weights_path, photos", [("", ["a.jpg"]), ("model", [])])
def test_what_is_needed(weights_path, photos):
    with pytest.raises(ConfigError, match="and at least one photo"):
        next(photo_files.predict_images(Config(), weights_path, photos))


def test_command_line(config, folder, photos, bad_photos):
    bad = next(iter(bad_photos))
    # Photos may appear anywhere between the flags.
    done = forks.python(
        *("-m", "efficientnet_ns.predict_image", photos[0]),
        *("--model_name=efficientnet-test", f"--task_name={config.data.task_name}"),
        *(bad, f"--weights={folder}", "--top=2", photos[1], "--json"),
    )
    assert done.returncode == 1, done.stderr
    expected = photo_files.predict_images(config, str(folder), [photos[0], bad, photos[1]], top=2)
    for line, answer in zip(done.stdout.splitlines(), expected):
        told = json.loads(line)
        assert told["photo"] == answer["photo"] and told.get("error") == answer.get("error")
        for guess, wanted in zip(told.get("predictions", []), answer.get("predictions", [])):
            assert guess == {**wanted, "probability": pytest.approx(wanted["probability"], 1e-4)}
    assert len(done.stdout.splitlines()) == 3


def test_nothing_to_do_is_said_at_once():
    done = forks.python("-m", "efficientnet_ns.predict_image", "--weights=model")
    assert done.returncode == 2 and done.stdout == ""
    assert "at least one photo" in done.stderr and "Traceback" not in done.stderr


def test_text():
    guesses = [
        {"index": 1, "name": "cat", "probability": 0.75},
        {"index": 0, "name": "dragonfly", "probability": 0.25},
    ]
    text = photo_files._text({"photo": "a.jpg", "predictions": guesses})
    assert text == "a.jpg\n  cat        0.7500\n  dragonfly  0.2500"
    text = photo_files._text({"photo": "b.jpg", "error": "Input is empty."})
    assert text == "b.jpg\n  cannot be read: Input is empty."


# Class names.


def test_imagenet_names():
    names = tasks.class_names("imagenet")
    assert len(names) == 1000
    assert len({name.lower() for name in names}) == 1000, "each can be told from the others"
    assert all(name.isascii() and name == name.strip() != "" for name in names)
    known = {
        0: "tench",
        1: "goldfish",
        134: "crane (bird)",
        207: "golden retriever",
        264: "Cardigan Welsh corgi",
        281: "tabby",
        388: "giant panda",
        474: "cardigan",
        517: "crane (machine)",
        817: "sports car",
        954: "banana",
        999: "toilet tissue",
    }
    assert {index: names[index] for index in known} == known


def test_class_names(tmp_path):
    assert tasks.class_names("svhn") == tuple("0123456789")
    assert tasks.class_names(tasks.get_task("imagenet")) == tasks.class_names("imagenet")
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"num_classes": 2, "class_names": ["a", "b"]}))
    assert tasks.class_names(str(path)) == ("a", "b")
    path.write_text(json.dumps({"num_classes": 1000}))
    assert tasks.class_names(str(path)) is None, "not every thousand classes are ImageNet's"
    renamed = dataclasses.replace(tasks.get_task("imagenet"), class_names=("x",) * 1000)
    assert tasks.class_names(renamed) == ("x",) * 1000
    with pytest.raises(ValueError, match="unknown task 'imagent'"):
        tasks.class_names("imagent")


# One-liners.


def test_preprocess(rng, photos):
    pixels = noise(rng, 50, 60)
    content = tf.io.encode_png(pixels).numpy()
    path = photos[0]
    batch = inference.preprocess([path, Path(path).read_bytes(), pixels, content])
    assert batch.shape == (4, 224, 224, 3) and batch.dtype == tf.float32
    np.testing.assert_array_equal(batch[0], images.eval_image(tf.io.read_file(path), 224))
    np.testing.assert_array_equal(batch[1], batch[0])
    np.testing.assert_array_equal(batch[2], images.eval_image(pixels, 224))
    np.testing.assert_array_equal(batch[3], batch[2])


@pytest.mark.parametrize("as_tensor", [False, True])
def test_preprocess_one_or_an_array(rng, photos, as_tensor):
    several = rng.integers(0, 256, [3, 40, 50, 3], np.uint8)
    several = tf.constant(several) if as_tensor else several
    assert inference.preprocess(several).shape == (3, 224, 224, 3)
    one = inference.preprocess(several[1])
    np.testing.assert_array_equal(one, inference.preprocess(several)[1:2])
    assert inference.preprocess(photos[0]).shape == (1, 224, 224, 3)
    assert inference.preprocess(Path(photos[0])).shape == (1, 224, 224, 3)
    assert inference.preprocess(Path(photos[0]).read_bytes()).shape == (1, 224, 224, 3)


def test_preprocess_at_the_models_size(photos):
    assert inference.preprocess(photos[0], "efficientnet-b3").shape == (1, 300, 300, 3)
    model = efficientnet.build_model("efficientnet-test", 5, 24)
    batch = inference.preprocess(photos, model)
    assert batch.shape == (3, 24, 24, 3) and model(batch).shape == (3, 5)


@pytest.mark.parametrize("small_image", [False, True])
def test_preprocess_is_what_the_models_task_evaluates_with(photos, small_image):
    model = efficientnet.build_model("efficientnet-test", 5, 24, small_image=small_image)
    features = efficientnet.endpoints(model)["pooled"]
    classifier = tf.keras.Model(model.input, tf.keras.layers.Dense(2)(features))
    prepare = pipeline.Preprocessing(24, small_image=small_image).evaluate
    expected = prepare(tf.io.read_file(photos[0]))
    for made in (model, classifier, tf.keras.models.clone_model(model)):
        np.testing.assert_array_equal(inference.preprocess(photos[0], made)[0], expected)


def test_preprocess_for_a_model_of_other_layers(photos):
    other = tf.keras.Sequential([tf.keras.layers.Flatten(input_shape=(24, 24, 3))])
    with pytest.raises(ValueError, match="not made of the layers of build_model"):
        inference.preprocess(photos, other)


@pytest.mark.parametrize(
    "wrong, part",
    [
        ([], "no images"),
        (np.zeros([8, 8, 3], np.float32), r"float32 \[8, 8, 3\]"),
        (np.zeros([8, 8, 4], np.uint8), r"uint8 \[8, 8, 4\]"),
        ([np.zeros([8, 8], np.uint8)], r"uint8 \[8, 8\]"),
    ],
)
def test_preprocess_refuses(wrong, part):
    with pytest.raises(ValueError, match=part):
        inference.preprocess(wrong)


def test_preprocess_unknown_model(photos):
    with pytest.raises(ValueError, match="unknown model 'b0'"):
        inference.preprocess(photos, "b0")


def test_top_k():
    row = np.array([0.1, 0.4, 0.1, 0.4], np.float32)
    best = inference.top_k(row, "abcd", 3)
    assert [guess[:2] for guess in best] == [(1, "b"), (3, "d"), (0, "a")]
    assert best[0].probability == pytest.approx(0.4)
    assert json.loads(json.dumps(best[0]._asdict()))["index"] == 1
    assert inference.top_k(tf.constant(row), "abcd", 3) == best
    assert inference.top_k(row[None], "abcd", 3) == [best]
    assert [guess.name for guess in inference.top_k(row)] == ["1", "3", "0", "2"]


@pytest.mark.parametrize("names, k, part", [("abc", 1, "3 names for 2"), ("ab", 0, "k is 0")])
def test_top_k_refuses(names, k, part):
    with pytest.raises(ValueError, match=part):
        inference.top_k(np.array([0.5, 0.5]), names, k)


def test_photos_come_from_standard_input_and_pipes_too(tmp_path, monkeypatch):
    (tmp_path / "photo").write_bytes(b"bytes of a photo")
    with open(tmp_path / "photo", encoding="latin-1") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert photo_files._content("-").numpy() == b"bytes of a photo"
    reader, writer = os.pipe()
    os.write(writer, b"piped")
    os.close(writer)
    assert photo_files._content(f"/dev/fd/{reader}").numpy() == b"piped"
    os.close(reader)
