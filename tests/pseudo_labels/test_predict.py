"""Predictions of a teacher: format, order, resuming, and unreadable records."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import tensorflow as tf
import torture
from PIL import Image
from unlabeled_sets import CLASSES, SIZE, config, corrupt, png, save_teacher, write_shards

from efficientnet_ns.config import Config, ConfigError, SelectConfig
from efficientnet_ns.data import fingerprints, images
from efficientnet_ns.files import json_files, manifests, shard_names, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.hygiene import image_marks
from efficientnet_ns.inference import views
from efficientnet_ns.inference.teacher import TeacherPredictor
from efficientnet_ns.models import weights
from efficientnet_ns.pseudo_labels import index as index_lib
from efficientnet_ns.pseudo_labels import label_shard, parts, predict, write
from efficientnet_ns.pseudo_labels.selection import select
from efficientnet_ns.resolve.resolved_config import ResolvedConfig


def encoded(pixels: np.ndarray, mode: str, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes(mode, pixels.shape[1::-1], pixels.tobytes()).save(buffer, kind)
    return buffer.getvalue()


def odd_images(rng: np.random.Generator) -> dict[str, bytes]:
    """Returns kinds of images, besides RGB of the right size, that real collections contain."""
    gray, cmyk = (rng.integers(0, 256, [9, 11, n], np.uint8) for n in (1, 4))
    deep = rng.integers(0, 65536, [9, 11, 3], np.uint16)
    frames = [Image.fromarray(rng.integers(0, 256, [9, 11], np.uint8)) for _ in range(2)]
    animation = io.BytesIO()
    frames[0].save(animation, "GIF", save_all=True, append_images=frames[1:])
    return {
        "grayscale JPEG": encoded(gray[..., 0], "L", "JPEG"),
        "CMYK JPEG": encoded(cmyk, "CMYK", "JPEG"),
        "16-bit PNG": tf.io.encode_png(deep).numpy(),
        "animated GIF": animation.getvalue(),
        "one pixel": png(rng, 1, 1),
        "long": png(rng, 1, 300),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A task, a teacher and an unlabeled set: 10, 3 and a few odd images in three shards."""
    path = tmp_path_factory.mktemp("predict")
    rng = np.random.default_rng(0)
    save_teacher(path / "teacher", CLASSES, seed=1)
    shards = [[png(rng) for _ in range(n)] for n in (10, 3)] + [list(odd_images(rng).values())]
    write_shards(
        path / "unlabeled",
        [[tfexamples.unlabeled_example(i) for i in images] for images in shards],
    )
    return path


def settings(folder: Path, output: str | Path, **values) -> Config:
    """Returns settings that predict the set of `folder` into `folder / output`."""
    defaults = {
        "predict_ckpt_path": str(folder / "teacher"),
        "unlabel_data_dir": str(folder / "unlabeled"),
        "output_dir": str(folder / output / "predictions"),
        "info_dir": str(folder / output / "info"),
        "num_shards": 3,
        "shard_id": "0-2",
        "file_prefix": "extra",
    }
    return config(folder / f"task_{CLASSES}.json", **{**defaults, **values})


def predictions(path: str | Path) -> tuple[np.ndarray, list[int]]:
    """Returns (probabilities [N, C], classes) of a prediction file."""
    spec = {
        "probabilities": tf.io.FixedLenFeature([CLASSES], tf.float32),
        "classes": tf.io.FixedLenFeature([], tf.int64),
    }
    rows = [tf.io.parse_single_example(r, spec) for r in tf.data.TFRecordDataset(str(path))]
    probs = [row["probabilities"].numpy() for row in rows]
    return np.array(probs).reshape(-1, CLASSES), [int(row["classes"]) for row in rows]


@pytest.fixture(scope="module", autouse=True)
def one_predictor_per_teacher() -> Iterator[None]:
    """Reuses predictors, because building and tracing a model takes seconds."""
    original, made = predict.TeacherPredictor, {}

    def predictor(resolved: ResolvedConfig, checkpoint: str):
        if checkpoint not in made:
            made[checkpoint] = original(resolved, checkpoint)
        return made[checkpoint]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "TeacherPredictor", predictor)
        yield


@pytest.fixture(scope="module")
def finished(folder) -> Config:
    done = settings(folder, "one")
    assert predict.predict(done) == {"records": 19, "unreadable": 0, "skipped_shards": 0}
    return done


@pytest.fixture(scope="module")
def answer(folder) -> Callable[[bytes], np.ndarray]:
    """Returns a function that predicts one encoded image with the teacher's weights."""
    resolved = ResolvedConfig.from_config(config(folder / f"task_{CLASSES}.json"))
    model = resolved.build_model()
    weights.load_weights(model, str(folder / "teacher"))

    def ask(image: bytes) -> np.ndarray:
        pixels = resolved.preprocessing().evaluate(image)
        return tf.nn.softmax(model(pixels[None], training=False))[0].numpy()

    return ask


@pytest.fixture(scope="module")
def expected(folder, answer) -> list[np.ndarray]:
    """Probabilities by shard."""
    paths = [folder / "unlabeled" / shard_names.shard_name("extra", shard, 3) for shard in range(3)]
    return [
        np.array([answer(tfexamples.image_bytes(r.payload)) for r in tfrecords.read(str(path))])
        for path in paths
    ]


# --- Output ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", range(3))
def test_predictions_are_the_forward_pass(finished, expected, shard):
    probs, classes = predictions(
        f"{finished.predict.output_dir}/train-info-{shard:05d}-of-00003-00000"
    )
    np.testing.assert_allclose(probs, expected[shard], atol=1e-6)
    assert classes == expected[shard].argmax(1).tolist()
    assert expected[shard].std(0).max() > 1e-3  # The teacher tells the images apart.


def test_odd_images_are_all_read(finished):
    probs, _ = predictions(f"{finished.predict.output_dir}/train-info-00002-of-00003-00000")
    np.testing.assert_allclose(probs.sum(1), np.ones(len(probs)), atol=1e-5)


def test_info_files(finished):
    for shard, total in enumerate([10, 3, 6]):
        path = Path(finished.predict.info_dir) / f"info-{shard:05d}-of-00003-00000.txt"
        assert json.loads(path.read_text()) == {"image_num": total}


def test_index(finished):
    for shard in range(3):
        probs, classes = predictions(
            f"{finished.predict.output_dir}/train-info-{shard:05d}-of-00003-00000"
        )
        table = pyarrow.parquet.read_table(
            f"{finished.predict.output_dir}/index-{shard:05d}-of-00003-00000.parquet"
        )
        types = {field.name: str(field.type) for field in table.schema}
        assert types == {
            "shard": "int32",
            "worker": "int32",
            "position": "int64",
            "label": "int32",
            "prob": "float",
            **dict.fromkeys(fingerprints.COLUMNS, "uint64"),
        }
        columns = table.to_pydict()
        assert columns["shard"] == [shard] * len(classes)
        assert columns["worker"] == [0] * len(classes)
        assert columns["position"] == list(range(len(classes)))
        assert columns["label"] == classes
        np.testing.assert_array_equal(np.float32(columns["prob"]), probs.max(1))


def test_index_has_hashes_and_fingerprints(folder, finished):
    """They describe the whole images, regardless of the teacher's input size."""
    for shard in range(3):
        source = f"extra-{shard:05d}-of-00003"
        (path,) = image_marks.write_marks(
            [str(folder / "unlabeled" / source)], str(folder / "marks"), crops=False
        )
        index = f"{finished.predict.output_dir}/index-{shard:05d}-of-00003-00000.parquet"
        columns = list(fingerprints.COLUMNS)
        noted, alone = (pyarrow.parquet.read_table(p).select(columns) for p in (index, path))
        assert noted.equals(alone)
        record = next(tfrecords.read(str(folder / "unlabeled" / source)))
        digest = hashlib.sha256(tfexamples.image_bytes(record.payload)).hexdigest()
        assert f"{noted['hash'][0].as_py():016x}" == digest[:16]


def test_reduced_images_have_no_fingerprints(folder):
    """They would differ from those of the whole images, which check_data compares them with."""
    mine = settings(folder, "reduced", fast_decode=True, inference_engine="tf", shard_id="1")
    teacher = TeacherPredictor(predict.resolve(mine), mine.predict.predict_ckpt_path)
    predict.predict(mine, teacher)
    index = f"{mine.predict.output_dir}/index-00001-of-00003-00000.parquet"
    assert pyarrow.parquet.read_schema(index).names == list(index_lib.COLUMNS)


def test_index_can_be_built_from_the_predictions(finished, tmp_path):
    for shard in range(3):
        source = f"{finished.predict.output_dir}/train-info-{shard:05d}-of-00003-00000"
        index_lib.index_from_predictions(source, str(tmp_path / "index"), shard, 0)
        built = pyarrow.parquet.read_table(tmp_path / "index")
        original = f"{finished.predict.output_dir}/index-{shard:05d}-of-00003-00000.parquet"
        without_images = pyarrow.parquet.read_table(original).drop_columns(fingerprints.COLUMNS)
        assert built.equals(without_images)


def test_two_workers_share_each_shard(folder, expected):
    for worker in (0, 1):
        mine = settings(folder, "two", shard_id="0", total_replicas=2, worker_id=worker)
        assert predict.predict(mine)["records"] == 5
        name = f"train-info-00000-of-00003-{worker:05d}"
        probs, _ = predictions(f"{mine.predict.output_dir}/{name}")
        np.testing.assert_allclose(probs, expected[0][worker::2], atol=1e-6)
        index = pyarrow.parquet.read_table(
            f"{mine.predict.output_dir}/index-00000-of-00003-{worker:05d}.parquet"
        ).to_pydict()
        assert index["worker"] == [worker] * 5
        info = Path(mine.predict.info_dir) / f"info-00000-of-00003-{worker:05d}.txt"
        assert json.loads(info.read_text()) == {"image_num": 5}


# --- A noised teacher -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noisy_answers(folder) -> Callable[..., np.ndarray]:
    """Returns a function from settings to the probabilities of ten images by a noised teacher."""
    rng = np.random.default_rng(5)
    encoded_images = [png(rng) for _ in range(10)]

    def ask(**values) -> np.ndarray:
        noised = settings(folder, "noised", noised_teacher=True, **values)
        predictor = TeacherPredictor(
            ResolvedConfig.from_config(noised), noised.predict.predict_ckpt_path
        )
        probs, problems = predictor.label(encoded_images)
        assert not problems
        return probs

    ask.images = encoded_images
    return ask


def test_teacher_without_any_noise_keeps_its_batch_statistics(noisy_answers, answer):
    found = noisy_answers(dropout_rate=0.0, stochastic_depth_rate=0.0, unl_aug="clean")
    expected = [answer(image) for image in noisy_answers.images]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    "noise",
    [
        {"dropout_rate": 0.5, "unl_aug": "clean"},
        {"dropout_rate": 0.0, "stochastic_depth_rate": 0.0, "unl_aug": "randaugment"},
    ],
    ids=["model", "images"],
)
def test_noise_of_a_teacher_repeats(noisy_answers, answer, noise):
    found = noisy_answers(seed=1, **noise)
    np.testing.assert_allclose(found.sum(1), np.ones(10), atol=1e-5)
    clean = np.array([answer(image) for image in noisy_answers.images])
    assert np.abs(found - clean).max() > 1e-3
    np.testing.assert_array_equal(noisy_answers(seed=1, **noise), found)
    assert np.abs(noisy_answers(seed=2, **noise) - found).max() > 1e-3


@pytest.mark.parametrize(
    "flag",
    [
        {"test_time_views": 2},
        {"inference_engine": "xnnpack"},
        {"inference_dtype": "bfloat16"},
        {"fast_decode": True},
    ],
)
def test_noise_of_a_teacher_needs_tensorflow_and_one_view(folder, flag):
    with pytest.raises(ConfigError, match="--noised_teacher"):
        predict.predict(settings(folder, "refused", noised_teacher=True, **flag))


def test_the_measured_engine_is_kept_for_all_workers(folder, monkeypatch):
    """A second measurement might choose another engine, whose last bits differ."""
    asked = []

    def teacher(resolved: ResolvedConfig, checkpoint: str) -> SimpleNamespace:
        asked.append(resolved.config.predict.inference_engine)
        return SimpleNamespace(engine=SimpleNamespace(name="openvino"))

    monkeypatch.setattr(predict, "TeacherPredictor", teacher)
    resolved = predict.resolve(settings(folder, "kept_engine"))
    for _ in range(2):
        predict.load_teacher(resolved)
    assert asked == ["auto", "openvino"]
    predict.load_teacher(predict.resolve(settings(folder, "kept_engine", inference_engine="tf")))
    assert asked[-1] == "tf"


def test_of_two_measurements_at_the_same_time_the_first_counts(folder, monkeypatch):
    resolved = predict.resolve(settings(folder, "two_measurements"))
    asked = []

    def teacher(resolved: ResolvedConfig, checkpoint: str) -> SimpleNamespace:
        kind = resolved.config.predict.inference_engine
        if kind == "auto":  # Another process finishes its measurement in the meantime.
            note = Path(resolved.config.predict.output_dir, predict.ENGINE_FILE)
            note.parent.mkdir(parents=True)
            json_files.write_json(str(note), {"engine": "xnnpack"})
        asked.append(kind)
        return SimpleNamespace(engine=SimpleNamespace(name="openvino"))

    monkeypatch.setattr(predict, "TeacherPredictor", teacher)
    predict.load_teacher(resolved)
    assert asked == ["auto", "xnnpack"]


def test_processes_that_measure_at_the_same_time_agree(folder, monkeypatch):
    """Each finds no engine, measures, and gets another result."""
    resolved = predict.resolve(settings(folder, "agreement", lease_seconds=1.0))
    results, measured = iter(["xnnpack", "openvino", "tf"]), threading.Barrier(3, timeout=60)

    def teacher(resolved: ResolvedConfig, checkpoint: str) -> SimpleNamespace:
        kind = resolved.config.predict.inference_engine
        if kind == "auto":
            kind = next(results)
            measured.wait()
        return SimpleNamespace(engine=SimpleNamespace(name=kind))

    write = json_files.write_json

    def slow_write(*args) -> None:
        time.sleep(0.01)
        write(*args)

    monkeypatch.setattr(predict, "TeacherPredictor", teacher)
    monkeypatch.setattr(predict.json_files, "write_json", slow_write)
    with ThreadPoolExecutor(3) as pool:
        teachers = list(pool.map(predict.load_teacher, [resolved] * 3))
    assert len({teacher.engine.name for teacher in teachers}) == 1
    output = Path(resolved.config.predict.output_dir)
    assert [path.name for path in output.iterdir()] == [predict.ENGINE_FILE]


def test_a_machine_without_the_engine_of_the_folder_labels_nothing(folder, monkeypatch):
    resolved = predict.resolve(settings(folder, "other_engine"))
    note = Path(resolved.config.predict.output_dir, predict.ENGINE_FILE)
    note.parent.mkdir(parents=True)
    json_files.write_json(str(note), {"engine": "openvino"})
    # The fixture's predictor may have another engine.
    monkeypatch.setattr(predict, "TeacherPredictor", TeacherPredictor)
    monkeypatch.setitem(sys.modules, "openvino", None)  # Makes its import fail.
    message = (
        rf"pip install 'efficientnet-ns\[openvino\]'; {note} requires openvino for this folder"
    )
    with pytest.raises(ConfigError, match=message):
        predict.load_teacher(resolved)
    json_files.write_json(str(note), {"engine": "magic"})
    with pytest.raises(
        ConfigError, match=f"must be auto, tf, xnnpack, openvino.*{note} requires magic"
    ):
        predict.load_teacher(resolved)


def test_the_only_engine_is_kept_too(folder, monkeypatch):
    """Otherwise, a process with more engines would choose another one."""
    resolved = predict.resolve(settings(folder, "only_engine"))
    monkeypatch.setattr(predict.engines, "has_choice", lambda: False)
    monkeypatch.setattr(predict, "TeacherPredictor", TeacherPredictor)
    assert predict.load_teacher(resolved).engine.name == "xnnpack"
    note = Path(resolved.config.predict.output_dir, predict.ENGINE_FILE)
    assert json_files.read_json(str(note)) == {"engine": "xnnpack"}


def test_a_cpu_engine_on_a_machine_with_an_accelerator_is_mentioned(folder, monkeypatch, caplog):
    resolved = predict.resolve(settings(folder, "accelerator"))
    note = Path(resolved.config.predict.output_dir, predict.ENGINE_FILE)
    note.parent.mkdir(parents=True)
    json_files.write_json(str(note), {"engine": "xnnpack"})
    monkeypatch.setattr(predict, "TeacherPredictor", lambda *_: None)
    predict.load_teacher(resolved)
    assert "labeling on CPUs" not in caplog.text
    monkeypatch.setattr(predict.engines, "has_accelerator", lambda: True)
    predict.load_teacher(resolved)
    assert f"{note}: labeling on CPUs with xnnpack" in caplog.text


def test_a_manifest_names_the_engine(folder, caplog):
    """Manifests of earlier versions, which do not, stay valid."""
    mine = settings(folder, "named_engines")
    whole = {"records": 19, "unreadable": 0, "skipped_shards": 0}
    assert predict.predict(mine) == whole
    paths = sorted(Path(mine.predict.output_dir).glob("*.manifest.json"))
    manifests_made = [json_files.read_json(str(path)) for path in paths]
    assert len(paths) == 3 and all(m["counts"]["engine"] for m in manifests_made)
    assert not any("engine" in m["config"] for m in manifests_made)
    del manifests_made[0]["counts"]["engine"]
    json_files.write_json(str(paths[0]), manifests_made[0])
    assert predict.predict(mine) == {**whole, "skipped_shards": 3}
    assert "different engines" not in caplog.text
    manifests_made[0]["counts"]["engine"] = "abacus"
    json_files.write_json(str(paths[0]), manifests_made[0])
    assert predict.predict(mine) == {**whole, "skipped_shards": 3}
    assert f"{mine.predict.output_dir}: shards were labeled with different engines (abacus, " in (
        caplog.text
    )


def test_less_exact_predictions_are_others(folder):
    def identity(**values) -> dict:
        tasks = predict.Tasks(predict.resolve(settings(folder, "unused", **values)))
        return tasks[tasks.names[0]].stage.config

    for choice in ({"inference_dtype": "bfloat16"}, {"fast_decode": True}):
        assert not choice.keys() & identity().keys()  # As before these options existed.
        assert identity(**choice) == {**identity(), **choice}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 9},
        {"unl_aug": "clean"},
        {"dropout_rate": 0.6},
        {"stochastic_depth_rate": 0.6},
        {"eval_batch_size": 5},  # Noise is drawn per batch.
    ],
)
def test_another_noise_makes_other_labels(folder, change):
    """Labels of different noise are never mixed; without noise, these settings have no effect."""

    def identities(**values) -> list[dict]:
        resolved = ResolvedConfig.from_config(settings(folder, "unused", **values))
        tasks = predict.Tasks(resolved)
        return [tasks[name].stage.config for name in tasks.names]

    noised = identities(noised_teacher=True)
    assert noised == identities(noised_teacher=True) != identities(noised_teacher=True, **change)
    assert identities() == identities(**change)


# --- Resuming -------------------------------------------------------------------------------------


def times(done: Config) -> dict[str, int]:
    folders = [Path(done.predict.output_dir), Path(done.predict.info_dir)]
    paths = [path for folder in folders if folder.exists() for path in folder.iterdir()]
    return {str(path): path.stat().st_mtime_ns for path in paths}


def test_finished_shards_are_skipped(finished, monkeypatch):
    before = times(finished)
    monkeypatch.setattr(predict, "TeacherPredictor", lambda *_: pytest.fail("a model was built"))
    result = predict.predict(finished)
    assert result == {"records": 19, "unreadable": 0, "skipped_shards": 3}
    assert times(finished) == before


def test_another_teacher_is_refused(finished, folder):
    save_teacher(folder / "other", CLASSES, seed=2)
    before = times(finished)
    other = finished.override(predict_ckpt_path=str(folder / "other"))
    with pytest.raises(manifests.OutputConflict, match="checkpoint: '.*' → '.*'"):
        predict.predict(other)
    assert times(finished) == before


def test_files_of_unknown_origin_are_left_alone(folder):
    mine = settings(folder, "unknown", shard_id="1")
    path = Path(mine.predict.output_dir) / "train-info-00001-of-00003-00000"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"of somebody else")
    with pytest.raises(manifests.OutputConflict, match=str(path)):
        predict.predict(mine)
    assert path.read_bytes() == b"of somebody else"


# --- Bad input ------------------------------------------------------------------------------------


def flip_payload(path: Path, record: int) -> None:
    """Changes the last byte of a record's payload, which invalidates its checksum."""
    content = bytearray(path.read_bytes())
    end = 0
    for _ in range(record + 1):
        end += 16 + int.from_bytes(content[end : end + 8], "little")
    content[end - 5] ^= 0xFF
    path.write_bytes(content)


@pytest.fixture(scope="module")
def damaged(folder) -> Path:
    """Twelve records in one of two shards; 2, 4, 5, 7 and the truncated last one are bad."""
    rng = np.random.default_rng(3)
    images = [png(rng) for _ in range(12)]
    images[4] = images[4][:40]
    images[5] = b""
    payloads = [tfexamples.unlabeled_example(image) for image in images]
    payloads[7] = tfexamples.prediction_examples(np.array([[0.5, 0.5]], np.float32))[0]
    write_shards(folder / "damaged", [[tfexamples.unlabeled_example(png(rng))], payloads])
    path = folder / "damaged" / shard_names.shard_name("extra", 1, 2)
    flip_payload(path, 2)
    path.write_bytes(path.read_bytes()[:-9])
    return path


def test_bad_records_keep_their_place(folder, damaged, answer, caplog):
    mine = settings(
        folder,
        "tolerant",
        unlabel_data_dir=str(damaged.parent),
        num_shards=2,
        shard_id="1",
        max_bad_fraction=0.5,
    )
    assert predict.predict(mine) == {"records": 12, "unreadable": 5, "skipped_shards": 0}
    bad = [2, 4, 5, 7, 11]
    output = Path(mine.predict.output_dir)
    probs, _ = predictions(output / "train-info-00001-of-00002-00000")
    good = [i for i in range(12) if i not in bad]
    np.testing.assert_array_equal(probs[bad], np.zeros([5, CLASSES]))
    # All good images differ, so none can be confused with another.
    payloads = {r.position: r.payload for r in tfrecords.read(str(damaged))}
    own = [answer(tfexamples.image_bytes(payloads[i])) for i in good]
    np.testing.assert_allclose(probs[good], own, atol=1e-6)

    index = pyarrow.parquet.read_table(output / "index-00001-of-00002-00000.parquet").to_pydict()
    assert [i for i in range(12) if index["label"][i] == index_lib.UNREADABLE_LABEL] == bad
    assert [index["prob"][i] for i in bad] == [0.0] * 5
    manifest = json_files.read_json(str(output / "train-info-00001-of-00002-00000.manifest.json"))
    quarantine = manifest["counts"]["quarantine"]
    assert list(quarantine) == [str(i) for i in bad]
    assert quarantine["2"].startswith("damaged payload at byte")
    assert quarantine["4"] == quarantine["5"] == "the image cannot be decoded"
    assert quarantine["7"] == "the record has no 'image/encoded'"
    assert quarantine["11"].startswith("truncated at byte")
    assert str(damaged) in caplog.text
    lines = (output / "quarantine-00001-of-00002-00000.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert [entry["position"] for entry in listed] == bad
    assert {entry["file"] for entry in listed} == {str(damaged)}
    assert [entry["reason"] for entry in listed] == list(quarantine.values())


def test_too_many_bad_records(folder, damaged):
    """The previous shard is kept. The second worker's first bad record is the shard's record 5."""
    mine = settings(
        folder,
        "too_many",
        unlabel_data_dir=str(damaged.parent),
        num_shards=2,
        shard_id="0-1",
        total_replicas=2,
        worker_id=1,
    )
    message = f"{damaged}: 3 of 6 records .* record 5: the image cannot be decoded"
    with pytest.raises(label_shard.TooManyBadRecords, match=message):
        predict.predict(mine)
    left = [Path(path).name for path in times(mine)]
    assert left
    assert not [name for name in left if "00001-of-00002" in name or name.startswith(".tmp")]


def test_answers_that_are_no_numbers(folder):
    """Such a teacher must not label anything: NaN would be the highest confidence."""
    reader = tf.train.load_checkpoint(str(folder / "teacher"))
    values = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    bias = next(name for name in values if "dense/bias" in name)
    weights.write_checkpoint(str(folder / "broken"), {**values, bias: values[bias] * np.nan})
    mine = settings(folder, "nan", shard_id="1", predict_ckpt_path=str(folder / "broken"))
    with pytest.raises(label_shard.TooManyBadRecords, match="extra-00001-of-00003: 3 of 3 .* NaN"):
        predict.predict(mine)
    assert [Path(path).name for path in times(mine)] == [predict.ENGINE_FILE]


def test_missing_shard_is_named(folder, tmp_path):
    write_shards(tmp_path, [[], []])
    missing = tmp_path / shard_names.shard_name("extra", 1, 2)
    missing.unlink()
    mine = settings(folder, "missing", unlabel_data_dir=str(tmp_path), num_shards=2, shard_id="1")
    with pytest.raises(DataError, match=f"{missing} is missing"):
        predict.predict(mine)


def test_empty_shard_is_named(folder, tmp_path):
    write_shards(tmp_path, [[tfexamples.unlabeled_example(b"")], []])
    mine = settings(folder, "empty", unlabel_data_dir=str(tmp_path), num_shards=2, shard_id="0,1")
    empty = tmp_path / shard_names.shard_name("extra", 1, 2)
    with pytest.raises(DataError, match=f"{empty} is empty"):
        predict.predict(mine)
    assert not Path(mine.predict.output_dir).exists()


def test_empty_shards_that_were_written_so(folder, tmp_path):
    """Predictions of empty shards and records selected from few images can be labeled again."""
    rng = np.random.default_rng(5)
    images = [tfexamples.unlabeled_example(png(rng)) for _ in range(2)]
    tfrecords.write_sharded(str(tmp_path / "unlabeled"), "extra", images, 3)
    mine = settings(folder, tmp_path / "first", unlabel_data_dir=str(tmp_path / "unlabeled"))
    assert predict.predict(mine) == {"records": 2, "unreadable": 0, "skipped_shards": 0}
    chosen = SelectConfig(
        unlabel_data_dir=str(tmp_path / "unlabeled"),
        prediction_dir=mine.predict.output_dir,
        prelim_stats_dir=str(tmp_path / "statistics"),
        output_dir=str(tmp_path / "selected"),
        file_prefix="extra",
        num_shards=3,
        num_image=1,
        num_label_classes=CLASSES,
    )
    select(chosen)
    written = write.write(chosen)["records"]
    data = tmp_path / "selected" / "data"
    sizes = [(data / shard_names.pseudo_label_name(0, s, 3)).stat().st_size for s in range(3)]
    assert 0 in sizes and any(sizes)
    again = {"unlabel_data_dir": str(data), "num_shards": 3}
    for number, options in enumerate(
        [
            {"file_prefix": "train", "reassign_label": True, "info_dir": ""},
            {"file_prefix": "train-0", "info_dir": ""},
        ]
    ):
        mine = settings(folder, tmp_path / f"again-{number}", **again, **options)
        assert predict.predict(mine) == {"records": written, "unreadable": 0, "skipped_shards": 0}
        # Finished empty shards are recognized.
        assert predict.predict(mine)["skipped_shards"] == 3
    # By default, the counts are next to the predictions.
    assert list(Path(mine.predict.output_dir).glob("info-0000?-of-00003-00000.txt"))


def test_teacher_of_another_number_of_classes(folder):
    save_teacher(folder / "five", 5, seed=1)
    mine = settings(folder, "five_classes", predict_ckpt_path=str(folder / "five"))
    message = r"efficientnet-test/head/dense/bias/Exp\w+: file \[5\], model \[3\]"
    with pytest.raises(weights.WeightsError, match=message):
        predict.predict(mine)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"predict_ckpt_path": ""}, "--predict_ckpt_path"),
        ({"output_dir": ""}, "--output_dir"),
        ({"unlabel_data_dir": ""}, "--unlabel_data_dir"),
        ({"total_replicas": 2, "worker_id": 2}, "--worker_id=2 .*--total_replicas=2"),
        ({"shard_id": "0,3"}, "--shard_id=0,3: 3 .*--num_shards=3"),
    ],
)
def test_flags_that_do_not_fit(folder, values, message):
    with pytest.raises(ConfigError, match=message):
        predict.predict(settings(folder, "flags", **values))


def test_lost_tail_counts_as_much_as_it_is(folder, tmp_path):
    """A damaged length loses an unknown number of records."""
    rng = np.random.default_rng(5)
    payloads = [tfexamples.unlabeled_example(png(rng)) for _ in range(8)]
    write_shards(tmp_path / "unlabeled", [payloads])
    path = tmp_path / "unlabeled" / shard_names.shard_name("extra", 0, 1)
    content = bytearray(path.read_bytes())
    content[4 * (len(content) // 8) : 4 * (len(content) // 8) + 300] = bytes(300)
    path.write_bytes(content)
    values = {"unlabel_data_dir": str(path.parent), "num_shards": 1, "shard_id": "0"}
    with pytest.raises(label_shard.TooManyBadRecords, match="% of the file cannot be read"):
        predict.predict(settings(folder, tmp_path / "a", **values, max_bad_fraction=0.3))
    result = predict.predict(settings(folder, tmp_path / "b", **values, max_bad_fraction=0.7))
    assert result["unreadable"] >= 1


# --- Inside a shard -------------------------------------------------------------------------------


class Killed(BaseException):
    """Simulates a kill, which no error handler catches."""


@pytest.fixture(scope="module")
def long(folder) -> tuple[Path, dict]:
    """One shard of 700 records, some bad, and the files of an undisturbed run."""
    rng = np.random.default_rng(11)
    images = [png(rng) for _ in range(700)]
    for i in (0, 63, 64, 300, 699):
        images[i] = b"no image"
    write_shards(folder / "long", [[tfexamples.unlabeled_example(i) for i in images]])
    flip_payload(folder / "long" / shard_names.shard_name("extra", 0, 1), 128)
    done = long_settings(folder, "undisturbed")
    assert predict.predict(done) == {"records": 700, "unreadable": 6, "skipped_shards": 0}
    return folder, contents(done)


def long_settings(folder: Path, output: str | Path, **values) -> Config:
    defaults = {"num_shards": 1, "shard_id": "0", "part_seconds": 0.0}
    paths = {"unlabel_data_dir": str(folder / "long")}
    return settings(folder, output, **{**defaults, **paths, **values})


def contents(done: Config) -> dict[str, bytes]:
    """Returns all written files by name."""
    folders = [Path(done.predict.output_dir), Path(done.predict.info_dir)]
    return {path.name: path.read_bytes() for folder in folders for path in folder.iterdir()}


def kill_after(monkeypatch, writes: int) -> None:
    original, count = parts.Parts.write, []

    def write(self, part):
        if len(count) == writes:
            raise Killed
        count.append(part)
        original(self, part)

    monkeypatch.setattr(parts.Parts, "write", write)


def count_labeled(monkeypatch) -> list[int]:
    """Records the sizes of the groups labeled from now on."""
    sizes, original = [], TeacherPredictor.marked
    monkeypatch.setattr(
        TeacherPredictor,
        "marked",
        lambda self, images: sizes.append(len(images)) or original(self, images),
    )
    return sizes


@pytest.mark.parametrize("writes", [0, 1, 4])
def test_killed_inside_a_shard(long, tmp_path, monkeypatch, writes):
    folder, expected = long
    mine = long_settings(folder, tmp_path)
    with monkeypatch.context() as patch:
        kill_after(patch, writes)
        with pytest.raises(Killed):
            predict.predict(mine)
    assert not (tmp_path / "predictions" / "train-info-00000-of-00001-00000").exists()
    sizes = count_labeled(monkeypatch)
    assert predict.predict(mine)["records"] == 700
    assert sum(sizes) == 700 - 64 * writes
    assert contents(mine) == expected


@pytest.mark.slow
def test_parts_of_other_settings_are_not_used(long, tmp_path, monkeypatch):
    folder, expected = long
    save_teacher(folder / "third", CLASSES, seed=3)
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            predict.predict(
                long_settings(folder, tmp_path, predict_ckpt_path=str(folder / "third"))
            )
    sizes = count_labeled(monkeypatch)
    mine = long_settings(folder, tmp_path)
    predict.predict(mine)
    assert sum(sizes) == 700
    assert contents(mine) == expected


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-1], lambda c: c[:-9] + b"?" + c[-8:], lambda c: b""]
)
def test_damaged_part_is_made_again(long, tmp_path, monkeypatch, damage):
    folder, expected = long
    mine = long_settings(folder, tmp_path)
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            predict.predict(mine)
    made = sorted((tmp_path / "predictions").glob(".part-*"))
    assert len(made) == 3
    made[1].write_bytes(damage(made[1].read_bytes()))
    sizes = count_labeled(monkeypatch)
    predict.predict(mine)
    assert sum(sizes) == 700 - 64
    assert contents(mine) == expected


def test_killed_while_putting_the_parts_together(long, tmp_path, monkeypatch):
    folder, expected = long
    mine = long_settings(folder, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(label_shard, "_write_quarantine", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            predict.predict(mine)
    sizes = count_labeled(monkeypatch)
    predict.predict(mine)
    assert sizes == []
    assert contents(mine) == expected


def test_two_processes_on_one_shard(long, tmp_path):
    """Uses threads in place of processes; each has its own leases, teacher and parts."""
    folder, expected = long
    mine = long_settings(folder, tmp_path)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: predict.predict(mine), range(2)))
    assert sorted(r["skipped_shards"] for r in results) == [0, 1]
    assert contents(mine) == expected


def test_auto_takes_all_shards(folder, finished):
    mine = settings(folder, "auto", shard_id="auto")
    assert predict.predict(mine) == {"records": 19, "unreadable": 0, "skipped_shards": 0}
    assert contents(mine) == contents(finished)


def test_store_without_folders_and_renames(folder, finished):
    place = f"ram://{folder}/out"
    mine = settings(folder, "unused", output_dir=place, info_dir=f"{place}/info")
    assert predict.predict(mine)["records"] == 19
    names = [n for n in tf.io.gfile.listdir(place) if n.startswith("train-info")]
    assert len(names) == 6
    for name in names:
        with tf.io.gfile.GFile(f"{place}/{name}", "rb") as f:
            assert f.read() == Path(finished.predict.output_dir, name).read_bytes()


# --- Other inputs, weights and outputs ------------------------------------------------------------


@pytest.fixture(scope="module")
def device_teacher(folder) -> TeacherPredictor:
    """A teacher with TensorFlow's engine, built by one of two workers that do not synchronize."""
    workers = {
        "cluster": {"worker": ["absent:1", "absent:2"]},
        "task": {"type": "worker", "index": 1},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TF_CONFIG", json.dumps(workers))
        resolved = predict.resolve(settings(folder, "tf", inference_engine="tf"))
        return TeacherPredictor(resolved, str(folder / "teacher"))


def test_engines_agree(folder, finished, device_teacher):
    mine = settings(folder, "tf", shard_id="0", inference_engine="tf")
    predict.predict(mine, device_teacher)
    name = "train-info-00000-of-00003-00000"
    probs, classes = predictions(Path(mine.predict.output_dir) / name)
    other, other_classes = predictions(Path(finished.predict.output_dir) / name)
    np.testing.assert_allclose(probs, other, atol=1e-5)
    assert classes == other_classes


def test_all_cores_decode_a_group(device_teacher, rng, monkeypatch):
    images = [png(rng) for _ in range(40)]
    images[3], images[20], images[37] = None, b"no image", b""
    decode, sizes = device_teacher._piece, []
    monkeypatch.setattr(device_teacher, "_piece", lambda p: sizes.append(len(p)) or decode(p))
    probs, problems, marks = device_teacher.marked(images)
    assert sorted(sizes) == [8, 16, 16] and sorted(problems) == [20, 37]
    monkeypatch.setattr(device_teacher, "_cores", None)
    alone = device_teacher.marked(images)
    np.testing.assert_array_equal(probs, alone[0])
    np.testing.assert_array_equal(marks, alone[2])
    assert problems == alone[1] and marks.shape == (40, 5)


@pytest.mark.slow
def test_file_of_weights(folder, finished, monkeypatch):
    """The same teacher from a .safetensors file, whose content hash is the fingerprint."""
    monkeypatch.setattr(predict, "TeacherPredictor", TeacherPredictor)
    model = ResolvedConfig.from_config(config(folder / f"task_{CLASSES}.json")).build_model()
    weights.load_weights(model, str(folder / "teacher"))
    path = str(folder / "teacher.safetensors")
    weights.save_weights(model, path)
    mine = settings(folder, "file", shard_id="1", predict_ckpt_path=path)
    predict.predict(mine)
    name = "train-info-00001-of-00003-00000"
    made, other = (predictions(Path(c.predict.output_dir) / name) for c in (mine, finished))
    np.testing.assert_allclose(made[0], other[0], atol=1e-6)
    manifest = json_files.read_json(f"{mine.predict.output_dir}/{name}.manifest.json")
    assert manifest["config"]["checkpoint"] == manifests.content_hash(path)


def test_two_views(folder, answer, monkeypatch):
    monkeypatch.setattr(predict, "TeacherPredictor", TeacherPredictor)
    mine = settings(folder, "views", shard_id="1", test_time_views=2)
    predict.predict(mine)
    probs, _ = predictions(Path(mine.predict.output_dir) / "train-info-00001-of-00003-00000")
    images = [
        tfexamples.image_bytes(r.payload)
        for r in tfrecords.read(str(folder / "unlabeled" / shard_names.shard_name("extra", 1, 3)))
    ]
    mirrored = [tf.io.encode_png(tf.io.decode_png(image)[:, ::-1]).numpy() for image in images]
    own = [(answer(a) + answer(b)) / 2 for a, b in zip(images, mirrored)]
    np.testing.assert_allclose(probs, own, atol=1e-6)


@pytest.mark.parametrize("number", [3, 10])
def test_number_of_views_that_there_is_not(folder, number):
    """Ten views require a crop, which small images do not have."""
    with pytest.raises(ConfigError, match=f"--test_time_views={number}"):
        predict.predict(settings(folder, "flags", test_time_views=number))


@pytest.mark.parametrize("fraction", [None, 0.875])
def test_ten_views_are_corners_and_center(fraction):
    rng = np.random.default_rng(0)
    image = tf.constant(png(rng, 20, 30))
    size = 16
    decode = views.decoder(
        lambda i: images.eval_image(i, size, fraction), size, 10, crop_fraction=fraction
    )
    found = decode(image[None])[0].numpy()
    pixels = tf.io.decode_png(image)
    side = int(images.center_crop_box(20, 30, size, fraction)[2])
    places = [(0, 0), (0, 30 - side), (20 - side, 0), (20 - side, 30 - side)]
    crops = [images.crop_and_resize(pixels, [y, x, side, side], size) for y, x in places]
    expected = np.stack([images.eval_image(image, size, fraction), *crops])
    np.testing.assert_array_equal(found[:5], expected)
    np.testing.assert_array_equal(found[5:], expected[:, :, ::-1])


def test_reassigned_labels(folder, tmp_path, answer):
    """Relabels pseudo-labeled records and leaves out unreadable ones."""
    rng = np.random.default_rng(7)
    pictures = [png(rng) for _ in range(5)]
    pictures[3] = b"no image"
    old = np.array([0.2, 0.3, 0.5], np.float32)
    source = tmp_path / "data" / "train-2-00001-of-00004"
    source.parent.mkdir()
    examples = [tfexamples.pseudo_labeled_example(picture, old, 2) for picture in pictures]
    tfrecords.write(str(source), examples)
    mine = settings(
        folder,
        tmp_path / "new",
        unlabel_data_dir=str(source.parent),
        reassign_label=True,
        file_prefix="train",
        worker_id=2,
        shard_id="1",
        num_shards=4,
        info_dir="",
        max_bad_fraction=0.3,
    )
    assert predict.predict(mine) == {"records": 5, "unreadable": 1, "skipped_shards": 0}
    output = Path(mine.predict.output_dir)
    names = {path.name for path in output.iterdir()}
    of_source = {source.name, f"{source.name}.manifest.json", f"quarantine-{source.name}.jsonl"}
    assert names == {*of_source, predict.ENGINE_FILE}
    read = [r.payload for r in tfrecords.read(str(output / source.name))]
    good = [0, 1, 2, 4]
    assert [tfexamples.image_bytes(payload) for payload in read] == [pictures[i] for i in good]
    probs = np.array([tfexamples.probabilities(payload) for payload in read])
    np.testing.assert_allclose(probs, [answer(pictures[i]) for i in good], atol=1e-6)
    for payload, row in zip(read, probs):
        features = tf.train.Example.FromString(payload).features.feature
        assert set(features) == {"image/encoded", "probabilities", "label", "prob"}
        assert features["label"].int64_list.value[0] == row.argmax()
        assert features["prob"].float_list.value[0] == row.max()


def test_relabeled_records_are_not_written_over_the_old(folder):
    mine = settings(folder, "same", reassign_label=True, unlabel_data_dir=str(folder / "same"))
    with pytest.raises(ConfigError, match="--output_dir is the folder of the records"):
        predict.predict(mine.override(output_dir=str(folder / "same")))


# --- Mutations ------------------------------------------------------------------------------------


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Returns `content` with bytes changed, removed, repeated or truncated."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        a, b = sorted(rng.integers(0, len(content) + 1, 2))
        kind = rng.integers(4)
        if kind == 0 and content:
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        elif kind == 1:
            del content[a : min(b, a + 40)]
        elif kind == 2:
            content[a:a] = content[a : min(b, a + 40)]
        elif len(content) > 4:
            del content[b:]
    return bytes(content)


def seeds_of_images(rng: np.random.Generator) -> list[bytes]:
    pixels = rng.integers(0, 256, [SIZE, SIZE, 3], np.uint8)
    pictures = [Image.fromarray(pixels), Image.fromarray(pixels).convert("P")]
    kinds = [("JPEG", 0), ("PNG", 0), ("PNG", 1), ("GIF", 1), ("BMP", 0)]
    result = []
    for kind, number in kinds:
        buffer = io.BytesIO()
        pictures[number].save(buffer, kind)
        result.append(buffer.getvalue())
    return [*result, *odd_images(rng).values()]


def fuzz(folder: Path, tmp_path: Path, number: int) -> None:
    """Mutates images, Examples and record bytes, and accounts for every record to the end.

    Every record is in the quarantine or, as often as selected, in the balanced set.
    """
    rng = np.random.default_rng(number)
    seeds = seeds_of_images(rng)
    payloads = []
    for i in range(number):
        image = seeds[i % len(seeds)]
        if i % 3:
            payloads.append(tfexamples.unlabeled_example(mutated(image, rng)))
        else:
            payloads.append(mutated(tfexamples.unlabeled_example(image), rng))
    write_shards(tmp_path / "unlabeled", [payloads])
    path = tmp_path / "unlabeled" / shard_names.shard_name("extra", 0, 1)
    for record in rng.choice(number, number // 50, replace=False):
        flip_payload(path, record)
    mine = settings(
        folder,
        tmp_path / "out",
        unlabel_data_dir=str(path.parent),
        num_shards=1,
        shard_id="0",
        max_bad_fraction=1.0,
    )
    result = predict.predict(mine)
    assert result["records"] == number
    name = "train-info-00000-of-00001-00000"
    probs, _ = predictions(f"{mine.predict.output_dir}/{name}")
    assert len(probs) == number
    manifest = json_files.read_json(f"{mine.predict.output_dir}/{name}.manifest.json")
    bad = [int(i) for i in manifest["counts"]["quarantine"]]
    assert bad == sorted(set(bad)) and len(bad) == result["unreadable"]
    assert np.flatnonzero(probs.sum(1) == 0).tolist() == bad
    rest = np.delete(probs, bad, 0)
    np.testing.assert_allclose(rest.sum(1), 1, atol=1e-4)
    # Both kinds occur, so the check covers both.
    assert number // 10 < len(bad) < number * 9 // 10
    images = [
        tfexamples.image_bytes(r.payload)
        for r in tfrecords.read(str(path))
        if r.position not in bad
    ]
    check_written(mine, Counter(zip(images, rest.argmax(1).tolist())))


def check_written(config: Config, readable: Counter) -> None:
    """Selects and writes; compares with the readable (image, label), which may repeat."""
    options = config.predict
    unlabeled = config.data.unlabel_data_dir
    classes = Counter()
    for (_, label), times in readable.items():
        classes[label] += times
    per_class = 2 * max(classes.values()) - 1  # Copies must be unequal, at least 1.
    for name, chosen in {"all": {"use_all": True}, "filled": {"num_image": per_class}}.items():
        folder = Path(options.output_dir).parent / name
        selection = SelectConfig(
            unlabel_data_dir=unlabeled,
            prediction_dir=options.output_dir,
            prelim_stats_dir=str(folder / "statistics"),
            output_dir=str(folder / "selected"),
            file_prefix=options.file_prefix,
            num_shards=1,
            num_label_classes=CLASSES,
            **chosen,
        )
        select(selection)
        write.write(selection)
        found = Counter()
        output = folder / "selected" / "data" / shard_names.pseudo_label_name(0, 0, 1)
        for payload in tf.data.TFRecordDataset(str(output)).as_numpy_iterator():
            feature = tf.train.Example.FromString(payload).features.feature
            (image,), (label,) = (
                feature["image/encoded"].bytes_list.value,
                feature["label"].int64_list.value,
            )
            found[image, label] += 1
        if name == "all":
            assert found == readable
            continue
        assert set(found) == set(readable)
        for (image, label), times in found.items():
            copies = per_class // classes[label]
            occurs = readable[image, label]
            assert occurs * copies <= times <= occurs * (copies + 1)
        for label in classes:
            assert sum(n for (_, other), n in found.items() if other == label) == per_class


def test_mutated_records_and_images(folder, tmp_path):
    fuzz(folder, tmp_path, 2000)


@pytest.mark.slow
def test_many_mutated_records_and_images(folder, tmp_path):
    fuzz(folder, tmp_path, 10_000)


# --- Kills ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_workers_killed_again_and_again(folder, tmp_path):
    """SIGKILLs at random moments leave the files of an undisturbed run, byte for byte."""
    rng = np.random.default_rng(21)
    pictures = [png(rng) for _ in range(500)]
    payloads = [tfexamples.unlabeled_example(picture) for picture in pictures]
    number, num_shards = 20_000, 4
    places = rng.integers(0, 500, [num_shards, number])
    write_shards(tmp_path / "unlabeled", [[payloads[i] for i in row] for row in places])
    for shard in range(num_shards):
        path = tmp_path / "unlabeled" / shard_names.shard_name("extra", shard, num_shards)
        corrupt(path, rng.choice(number, number // 200, replace=False))
    values = {
        "unlabel_data_dir": str(tmp_path / "unlabeled"),
        "num_shards": num_shards,
        "max_bad_fraction": 0.02,
        "shard_id": "auto",
    }
    quiet, rough = (settings(folder, tmp_path / name, **values) for name in ("quiet", "rough"))
    result = predict.predict(quiet)
    assert result["records"] == num_shards * number and result["unreadable"] > 100
    command = [sys.executable, "-m", "efficientnet_ns.main", "--mode=predict"]
    command += ["--model_name=efficientnet-test", f"--task_name={folder}/task_{CLASSES}.json"]
    command += [f"--{key}={value}" for key, value in dataclasses.asdict(rough.predict).items()]
    command += [f"--unlabel_data_dir={tmp_path}/unlabeled", "--eval_batch_size=4"]
    command += ["--part_seconds=0.5"]
    hits = torture.run_with_kills([command] * 2, 12, 5, (2.0, 6.0), tmp_path)
    assert hits >= 3
    assert contents(rough) == contents(quiet)
