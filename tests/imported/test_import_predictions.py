"""Predictions of other models: every format and key, several teachers, and rejected input."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import types
from pathlib import Path

import fakes
import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from unlabeled_sets import png, write_shards

from efficientnet_ns.config import (
    Config,
    ConfigError,
    FilterConfig,
    ImportConfig,
    MakeConfig,
    SelectConfig,
)
from efficientnet_ns.files import manifests, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.imported import import_predictions as imported
from efficientnet_ns.imported import prediction_tables
from efficientnet_ns.ingest import data_source
from efficientnet_ns.loop import labeling
from efficientnet_ns.pseudo_labels import predict
from efficientnet_ns.training import train

CLASSES = ("hen", "owl", "7")
SIZES = (5, 0, 4)
TOTAL = sum(SIZES)
NAMES = [f"folder/{i}.png" for i in range(TOTAL)]


@pytest.fixture
def probs(rng) -> np.ndarray:
    return rng.dirichlet(np.ones(len(CLASSES)), TOTAL).astype(np.float32)


@pytest.fixture
def folder(tmp_path, rng) -> Path:
    """Unlabeled records with names in three shards, one of them empty, and their task."""
    images = [png(rng) for _ in range(TOTAL)]
    records = [tfexamples.unlabeled_example(*pair) for pair in zip(images, NAMES)]
    write_shards(tmp_path / "records", [records[:5], [], records[5:]])
    paths = sorted((tmp_path / "records").iterdir())
    tfrecords.note_counts(list(map(str, paths)), [{"records": size} for size in SIZES])
    task = {"num_classes": len(CLASSES), "class_names": CLASSES}
    (tmp_path / "records" / "task.json").write_text(json.dumps(task))
    hashes = [hashlib.sha256(image).hexdigest() for image in images]
    (tmp_path / "hashes").write_text("\n".join(hashes))
    return tmp_path


def run(folder: Path, source: str | Path, output: str = "out", **values) -> dict:
    paths = {"unlabel_data_dir": folder / "records", "output_dir": folder / output}
    sources = ";".join(str(folder / one) for one in str(source).split(";"))
    return imported.import_predictions(ImportConfig(source=sources, **{**paths, **values}))


def written(folder: Path, output: str = "out") -> np.ndarray:
    """Returns the probabilities in all prediction files, [N, C]."""
    rows = []
    for path in sorted((folder / output).glob("train-info-*-00000")):
        rows += [tfexamples.probabilities(r.payload) for r in tfrecords.read(str(path))]
    return np.array(rows)


def labels(folder: Path, output: str = "out") -> list[int]:
    files = sorted((folder / output).glob("index-*.parquet"))
    return [n for f in files for n in pyarrow.parquet.read_table(f)["label"].to_pylist()]


def save(path: Path, values: np.ndarray, keys=None, *, wide=None) -> str:
    """Writes a table in the format of the path's suffix; returns its name.

    Args:
      wide: column names, one per class; None: one column of lists.
    """
    columns = {} if keys is None else {"key": list(keys)}
    columns.update(
        {"p": list(values)} if wide is None else {n: values[:, i] for i, n in enumerate(wide)}
    )
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".npz":
        np.savez(path, p=values, **({} if keys is None else {"key": np.array(keys)}))
    elif path.suffix == ".jsonl":
        rows = pyarrow.table(columns).to_pylist()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(pyarrow.table(columns), path)
    else:
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path.name


# --- What is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npy", "npz", "parquet", "jsonl", "csv"])
def test_by_position(kind, folder, probs):
    wide = CLASSES if kind == "csv" else None
    result = run(folder, save(folder / f"p.{kind}", probs, wide=wide))
    assert result == {"records": TOTAL, "missing": 0, "outside": 0, "disagreeing": 0}
    np.testing.assert_array_equal(written(folder), probs)
    assert labels(folder) == probs.argmax(1).tolist()
    infos = [json.loads(p.read_text())["image_num"] for p in sorted((folder / "out").glob("info*"))]
    assert tuple(infos) == SIZES
    task = json.loads((folder / "out" / "task.json").read_text())
    assert task["class_names"] == list(CLASSES)


@pytest.mark.parametrize("key", ["name", "hash"])
@pytest.mark.parametrize("kind", ["npz", "parquet", "jsonl", "csv"])
def test_by_key_in_any_order(kind, key, folder, probs, rng, monkeypatch):
    monkeypatch.setattr(prediction_tables, "_ROWS", 4)
    keys = np.array(NAMES if key == "name" else (folder / "hashes").read_text().split())
    order = rng.permutation(TOTAL)
    wide = CLASSES if kind == "csv" else None
    name = save(folder / f"p.{kind}", probs[order], keys[order], wide=wide)
    run(folder, name, key=key)
    np.testing.assert_array_equal(written(folder), probs)


def test_a_folder_of_files_is_one_table(folder, probs):
    (folder / "parts").mkdir()
    save(folder / "parts" / "a.npy", probs[:7])
    save(folder / "parts" / "b.parquet", probs[7:])
    (folder / "parts" / "notes.txt").write_text("not a table")
    run(folder, "parts")
    np.testing.assert_array_equal(written(folder), probs)


def test_columns_called_as_the_classes_are_those(folder, probs):
    order = [2, 0, 1]
    run(folder, save(folder / "p.csv", probs[:, order], wide=[CLASSES[i] for i in order]))
    np.testing.assert_array_equal(written(folder), probs)


@pytest.mark.parametrize("names", [CLASSES, None], ids=["named", "numbered"])
@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_columns_called_by_numbers_are_those_classes(kind, names, folder, probs, caplog):
    task = {"num_classes": len(CLASSES), **({"class_names": names} if names else {})}
    (folder / "records" / "task.json").write_text(json.dumps(task))
    order = [2, 0, 1]
    run(folder, save(folder / f"p.{kind}", probs[:, order], wide=list(map(str, order))))
    np.testing.assert_array_equal(written(folder), probs)
    assert "the order of the task" not in caplog.text


def test_unknown_columns_are_in_the_order_of_the_task_with_a_warning(folder, probs, caplog):
    run(folder, save(folder / "p.csv", probs, wide="cab"))
    np.testing.assert_array_equal(written(folder), probs)
    assert "'c', 'a', 'b' are taken for the classes in the order of the task, 'hen'" in caplog.text


def test_columns_in_addition_to_the_classes(folder, rng, caplog):
    values = rng.dirichlet(np.ones(4), TOTAL)
    values[3] = [0.1, 0.7, 0.1, 0.1]
    wide = ["7", "emu", "hen", "owl"]
    assert run(folder, save(folder / "p.csv", values, wide=wide), min_mass=0.4)["outside"] >= 1
    (folder / "map").write_text("7\n-\nhen\nowl\n")
    run(folder, "p.csv", "mapped", min_mass=0.4, class_map=str(folder / "map"))
    np.testing.assert_array_equal(written(folder), written(folder, "mapped"))
    assert "'emu' are not classes of the task" in caplog.text


@pytest.mark.parametrize("kind, wide", [("npz", None), ("parquet", None), ("parquet", CLASSES)])
def test_wide_rows_are_read_in_small_blocks(kind, wide, folder, probs, monkeypatch):
    path = save(folder / f"p.{kind}", probs, NAMES, wide=wide)
    run(folder, path, "whole", key="name")
    run(folder, save(folder / "p.npy", probs), "in_order")
    assert prediction_tables.block_rows(21_841) == 384
    assert prediction_tables.block_rows(10) == prediction_tables._ROWS
    monkeypatch.setattr(prediction_tables, "_BLOCK_BYTES", 100)
    table = prediction_tables.Table(str(folder / path), "key")
    # In Parquet files, the key counts as one more number.
    sizes = [4, 4, 1] if kind == "npz" else [3, 3, 3]
    assert [len(b.values) for b in table.blocks()] == sizes
    run(folder, path, key="name")
    assert contents(folder / "out") == contents(folder / "whole")
    run(folder, "p.npy", "small")
    assert contents(folder / "small") == contents(folder / "in_order")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_positions_of_records_with_names_are_doubtful(folder, probs, rng, caplog):
    """make_records shuffles: rows in the order of a folder would get labels of other images."""
    path = save(folder / "p.npz", probs, NAMES)
    run(folder, path, "named", key="name")
    assert "Rows match records by position" not in caplog.text
    run(folder, save(folder / "p.npy", probs))
    assert "which make_records shuffles; the first is 'folder/0.png'" in caplog.text
    caplog.clear()
    write_shards(folder / "plain", [[], [tfexamples.unlabeled_example(png(rng))] * TOTAL])
    tfrecords.note_counts(
        [str(p) for p in sorted((folder / "plain").iterdir())], [{"records": 0}, {"records": TOTAL}]
    )
    task = str(folder / "records" / "task.json")
    run(folder, "p.npy", "other", unlabel_data_dir=folder / "plain", task_name=task)
    assert "Rows match records by position" not in caplog.text


def test_one_row_serves_all_records_with_its_hash(folder, probs, rng):
    image, other = png(rng), png(rng)
    records = [tfexamples.unlabeled_example(*pair) for pair in ((image, "a"), (other, "b"))]
    write_shards(folder / "copies", [records, [tfexamples.unlabeled_example(image, "c")]])
    keys = [hashlib.sha256(content).hexdigest() for content in (other, image)]
    path = save(folder / "p.npz", probs[:2], keys)
    task = str(folder / "records" / "task.json")
    result = run(folder, path, key="hash", unlabel_data_dir=folder / "copies", task_name=task)
    assert result == {"records": 3, "missing": 0, "outside": 0, "disagreeing": 0}
    np.testing.assert_array_equal(written(folder), probs[[1, 0, 1]])


@pytest.mark.parametrize("key", ["name", "hash"])
def test_unreadable_records_count_as_missing_rows(key, folder, probs):
    first = folder / "records" / "extra-00000-of-00003"
    content = bytearray(first.read_bytes())
    content[20] ^= 1  # In the payload of the first record.
    first.write_bytes(content)
    keys = NAMES if key == "name" else (folder / "hashes").read_text().split()
    path = save(folder / "p.npz", probs[1:], keys[1:])
    with pytest.raises(
        DataError, match="1 records of .* no row, for example 'unreadable record 0'"
    ):
        run(folder, path, key=key)
    assert run(folder, path, key=key, allow_missing=True)["missing"] == 1
    np.testing.assert_array_equal(written(folder)[1:], probs[1:])
    assert labels(folder)[0] == -1


def test_space_for_rows_with_keys_is_checked_first(folder, probs, monkeypatch):
    path = save(folder / "p.npz", probs, NAMES)
    needed = 2 * 4 * TOTAL * len(CLASSES)
    usage = types.SimpleNamespace(free=needed - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="p.npz in record order: .* Set TMPDIR"):
        run(folder, f"{path};{path}", key="name")
    assert not (folder / "out").exists()
    usage.free += 1
    run(folder, f"{path};{path}", key="name")


def test_logits_and_temperature(folder, probs):
    logits = np.log(probs.astype(np.float64)) + 3
    run(folder, save(folder / "l.npy", logits), values="logits", temperature=2.0)
    expected = np.sqrt(probs) / np.sqrt(probs).sum(1, keepdims=True)
    np.testing.assert_allclose(written(folder), expected, rtol=1e-6)
    run(folder, save(folder / "p.npy", probs), "other", temperature=2.0)
    np.testing.assert_allclose(written(folder, "other"), expected, rtol=1e-6)


def test_superset_of_the_classes(folder, rng):
    """Columns of one class are summed, others dropped, and images of no class get no label."""
    values = rng.dirichlet(np.ones(5) * 9, TOTAL)
    values[3] = [0.7, 0.05, 0.1, 0.1, 0.05]
    (folder / "map").write_text("-\nowl\nhen\n2\nhen\n")
    path = save(folder / "p.npy", values)
    result = run(folder, path, class_map=str(folder / "map"), min_mass=0.5)
    assert (result["outside"], labels(folder)[3]) == (1, -1)
    expected = np.stack([values[:, 2] + values[:, 4], values[:, 1], values[:, 3]], 1)
    expected /= expected.sum(1, keepdims=True)
    expected[3] = 0
    np.testing.assert_allclose(written(folder), expected, rtol=1e-5)


def test_two_teachers(folder, probs, rng):
    other = rng.dirichlet(np.ones(len(CLASSES)), TOTAL).astype(np.float32)
    both = f"{save(folder / 'a.npy', probs)};{save(folder / 'b.npy', other)}"
    run(folder, both)
    mean = (probs.astype(np.float64) + other) / 2
    np.testing.assert_allclose(written(folder), mean, rtol=1e-6)
    result = run(folder, both, "agreed", combine="agreement")
    agree = probs.argmax(1) == other.argmax(1)
    assert 0 < agree.sum() < TOTAL and result["disagreeing"] == (~agree).sum()
    expected = np.where(agree[:, None], mean, 0)
    np.testing.assert_allclose(written(folder, "agreed"), expected, rtol=1e-6)


def test_missing_and_unknown_on_request(folder, probs):
    keys = [*NAMES[:8], "elsewhere.png"]
    path = save(folder / "p.parquet", probs, keys)
    result = run(folder, path, key="name", allow_missing=True, allow_unknown=True)
    assert result["missing"] == 1 and labels(folder)[8] == -1
    expected = np.where(np.arange(TOTAL)[:, None] < 8, probs, 0)
    np.testing.assert_array_equal(written(folder), expected)


def test_continues_after_a_kill(folder, probs, monkeypatch):
    """Finished shards are kept, and the bytes are those of an uninterrupted run."""
    path = save(folder / "p.npy", probs)
    run(folder, path, "whole")
    original, calls = tfexamples.framed_predictions, []

    def killed(rows):
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(rows)

    monkeypatch.setattr(tfexamples, "framed_predictions", killed)
    with pytest.raises(KeyboardInterrupt):
        run(folder, path)
    run(folder, path)
    assert calls == [5, 4, 4]
    names = {p.name for p in (folder / "whole").iterdir()}
    assert {p.name for p in (folder / "out").iterdir()} == names
    for name in names:
        assert (folder / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


def test_other_rows_do_not_replace_finished_ones(folder, probs):
    run(folder, save(folder / "p.npy", probs))
    np.save(folder / "p.npy", probs[::-1])
    with pytest.raises(manifests.OutputConflict, match="imported"):
        run(folder, "p.npy")


def test_keys_of_another_column_do_not_replace_finished_rows(folder, probs):
    columns = {"first": NAMES, "second": NAMES[::-1], "p": list(probs)}
    path = _parquet(folder / "p.parquet", **columns)
    run(folder, path, key="name", key_column="first")
    with pytest.raises(manifests.OutputConflict, match="key_column"):
        run(folder, path, key="name", key_column="second")


def test_another_order_of_classes_does_not_replace_finished_labels(folder, probs):
    path = save(folder / "p.csv", probs, wide=CLASSES)
    run(folder, path)
    task = {"num_classes": len(CLASSES), "class_names": CLASSES[::-1]}
    (folder / "records" / "task.json").write_text(json.dumps(task))
    with pytest.raises(manifests.OutputConflict, match="class_names"):
        run(folder, path)


class Teacher:
    """Labels the images of `folder` with the rows of `probs`, in order."""

    group = 4
    engine = types.SimpleNamespace(name="fake", batch_size=4, concurrency=1)

    def __init__(self, probs: np.ndarray):
        self._rows = iter(probs)

    def label(self, images):
        return np.array([next(self._rows) for _ in images]).reshape(-1, len(CLASSES)), {}


def test_own_predictions_imported_are_the_same_files(folder, probs):
    """They are equal byte for byte, as are the records that a student reads."""
    (folder / "teacher.safetensors").write_bytes(b"weights")
    own = Config().override(
        model_name="efficientnet-test",
        task_name=str(folder / "records" / "task.json"),
        predict_ckpt_path=str(folder / "teacher.safetensors"),
        unlabel_data_dir=str(folder / "records"),
        output_dir=str(folder / "own"),
        shard_id="0-2",
    )
    predict.predict(own, Teacher(probs))
    run(folder, save(folder / "p.npy", written(folder, "own")))
    for name in ("own", "out"):
        selection = SelectConfig(
            unlabel_data_dir=str(folder / "records"),
            prediction_dir=str(folder / name),
            prelim_stats_dir=str(folder / name / "statistics"),
            output_dir=str(folder / name / "selected"),
            num_image=5,
        )
        labeling.select_and_write(selection, FilterConfig())
    files = [path.relative_to(folder / "out") for path in (folder / "out").rglob("*-0*")]
    compared = [name for name in files if "manifest" not in name.name and name.suffix != ".parquet"]
    assert len(compared) == 3 + 3 + 3
    for name in compared:
        assert (folder / "out" / name).read_bytes() == (folder / "own" / name).read_bytes(), name


@pytest.mark.slow
def test_the_example_of_the_docs(tmp_path, monkeypatch):
    """A scikit-learn teacher labels a folder, and our student learns from it."""
    fakes.class_folders(tmp_path / "photos", {"hen": 20, "owl": 20})
    fakes.flat_folder(tmp_path / "more_photos", 30)
    monkeypatch.chdir(tmp_path)
    page = (fakes.ROOT / "docs" / "any_teacher.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(compile(code, "teacher.py", "exec"), {})
    data = str(tmp_path / "data")
    made = MakeConfig(source="photos", output_dir=data, validation_fraction=0.2)
    data_source.make_records(made)
    data_source.make_records(MakeConfig(source="more_photos", output_dir=data, labeled=False))
    options = ImportConfig(
        source="teacher.npz", key="name", unlabel_data_dir=data, output_dir="labels/predictions"
    )
    options = dataclasses.replace(options, file_prefix="extra")
    assert imported.import_predictions(options)["records"] == 30
    selection = SelectConfig(
        unlabel_data_dir=data,
        prediction_dir="labels/predictions",
        prelim_stats_dir="labels/statistics",
        output_dir="labels/selected",
        file_prefix="extra",
        min_threshold=0.5,
        num_image=20,
    )
    assert labeling.select_and_write(selection, FilterConfig())["records"] == 40
    settings = Config().override(
        model_name="efficientnet-test",
        input_image_size=24,
        task_name=f"{data}/task.json",
        label_data_dir=data,
        unlabel_data_dir="labels/selected/data",
        model_dir="student",
        unlabel_ratio=3,
        train_batch_size=8,
        train_steps=60,
        eval_batch_size=8,
        optimizer="adam",
        base_learning_rate=0.1,
        bn_momentum=0.8,
        warmup_epochs=0.0,
        inference_engine="tf",
    )
    assert train.train_and_evaluate(settings)["eval/top1"] > 0.8


# --- What is refused ------------------------------------------------------------------------------


def changed(probs: np.ndarray, row: int, values) -> np.ndarray:
    copy = probs.copy()
    copy[row] = values
    return copy


# Maps a fault to (function from folder and probabilities to source and settings, message).
MALFORMED = {
    "no file": (lambda f, p: ("none.npy", {}), "no such file or folder"),
    "another kind": (lambda f, p: (_text(f / "p.txt", "0.5"), {}), "one of these types"),
    "empty folder": (lambda f, p: (_folder(f / "empty"), {}), r"contains no \.parquet, \.npy"),
    "damaged Parquet": (
        lambda f, p: (_cut(f, save(f / "p.parquet", p)), {}),
        "p.parquet cannot be read",
    ),
    "cut array": (lambda f, p: (_cut(f, save(f / "p.npy", p)), {}), "p.npy cannot be read"),
    "empty array": (lambda f, p: (_text(f / "p.npy", ""), {}), "p.npy cannot be read"),
    "cut archive of arrays": (
        lambda f, p: (_cut(f, save(f / "p.npz", p, NAMES)), {"key": "name"}),
        "p.npz cannot be read",
    ),
    "damaged second file of a folder": (
        lambda f, p: (_parts(f / "parts", p), {}),
        "parts/b.parquet cannot be read",
    ),
    "pickled array": (
        lambda f, p: (save(f / "p.npy", p.astype(object)), {}),
        "p.npy cannot be read: .*Python objects",
    ),
    "pickled keys": (
        lambda f, p: (save(f / "p.npz", p, np.array(NAMES, object)), {"key": "name"}),
        r"p.npz cannot be read: an array of Python objects; save keys with .astype\(str\)",
    ),
    "index of pandas": (
        lambda f, p: (
            _text(f / "p.csv", ",ant,bee,cat\n0,0.2,0.3,0.5\n1,0.2,0.3,0.5\n"),
            {},
        ),
        "a column has no name, like the index that pandas writes",
    ),
    "one dimension": (lambda f, p: (save(f / "p.npy", p[:, 0]), {}), r"\[images, classes\]"),
    "texts": (lambda f, p: (save(f / "p.npy", p.astype(str)), {}), "an array of numbers"),
    "wrong number of classes": (
        lambda f, p: (save(f / "p.npy", p[:, :2]), {}),
        "2 numbers per row, but the task has 3 classes",
    ),
    "NaN": (
        lambda f, p: (save(f / "p.npy", changed(p, 6, np.nan)), {}),
        r"row 6 has NaN, .* .such rows so far: 1",
    ),
    "no sum of one": (
        lambda f, p: (save(f / "p.npy", changed(p, 2, [0.5, 0.2, 0.2])), {}),
        r"row 2 has numbers that are not probabilities.*\[0.5, 0.2, 0.2\], sum 0.9",
    ),
    "logits": (lambda f, p: (save(f / "p.npy", 5 * p - 2), {}), "for logits, set --values=logits"),
    "too few rows": (lambda f, p: (save(f / "p.npy", p[:-1]), {}), "8 rows, .* 9 records"),
    "too many rows": (
        lambda f, p: (save(f / "p.csv", np.vstack([p, p]), wide=CLASSES), {}),
        "more than 9 rows",
    ),
    "too few rows of a stream": (
        lambda f, p: (save(f / "p.jsonl", p[:-1]), {}),
        "only 8 rows, but there are 9 records",
    ),
    "no keys": (
        lambda f, p: (save(f / "p.parquet", p), {"key": "name"}),
        "no column 'key' .--key_column.; it has 'p'",
    ),
    "an array without keys": (
        lambda f, p: (save(f / "p.npy", p), {"key": "hash"}),
        "no keys: save them with the array in a .npz file",
    ),
    "a key twice": (
        lambda f, p: (save(f / "p.npz", p, [*NAMES[:-1], NAMES[0]]), {"key": "name"}),
        "1 keys occur twice, for example 'folder/0.png'",
    ),
    "unknown keys": (
        lambda f, p: (save(f / "p.npz", p, [*NAMES[:-1], "x.png"]), {"key": "name"}),
        "1 keys match no record .* 'x.png', but the records have 'folder/0.png'",
    ),
    "missing rows": (
        lambda f, p: (save(f / "p.npz", p[1:], NAMES[1:]), {"key": "name"}),
        "1 records of .* have no row, for example 'folder/0.png'",
    ),
    "an empty key": (
        lambda f, p: (save(f / "p.parquet", p, [*NAMES[:-1], None]), {"key": "name"}),
        "p.parquet, row 8 has no key in 'key'",
    ),
    "a blank key": (
        lambda f, p: (
            save(f / "p.csv", p, [*NAMES[:5], " ", *NAMES[6:]], wide=CLASSES),
            {"key": "name", "allow_unknown": True, "allow_missing": True},
        ),
        "p.csv, row 5 has no key in 'key'",
    ),
    "one class written differently": (
        lambda f, p: (save(f / "p.csv", p, wide=["owl", "Hen", "7"]), {}),
        "some columns are named after classes, but none after 'hen'; no class is named 'Hen'",
    ),
    "a class without a column": (
        lambda f, p: (save(f / "p.csv", p[:, :2], wide=["owl", "hen"]), {}),
        "some columns are named after classes, but none after '7'. Rename",
    ),
    "numbers of other classes": (
        lambda f, p: (_text(f / "p.csv", "1,2,3\n" + "0.1,0.2,0.7\n" * 9), {}),
        "the first line must name the columns",
    ),
    "two numbers for a header": (
        lambda f, p: (_text(f / "p.csv", "0,1\n" + "0.1,0.9\n" * 9), {}),
        "the first line must name the columns",
    ),
    "CSV without header": (
        lambda f, p: (_text(f / "p.csv", "0.1,0.2,0.7\n" * 9), {}),
        "the first line must name the columns",
    ),
    "a column twice": (
        lambda f, p: (_text(f / "p.csv", "hen,hen,owl\n0.1,0.2,0.7\n"), {}),
        "two columns have the same name",
    ),
    "words among the numbers": (
        lambda f, p: (_text(f / "p.csv", "a,b,c\n" + "0.1,0.2,0.7\n" * 5 + "0.1,n/a?,0.7\n"), {}),
        "CSV conversion error to double: invalid value 'n/a.'",
    ),
    "an empty cell": (
        lambda f, p: (_text(f / "p.csv", "a,b,c\n" + "0.1,0.2,0.7\n" * 8 + "0.1,,0.7\n"), {}),
        "row 8 has NaN, infinite or empty numbers",
    ),
    "a short line": (
        lambda f, p: (_text(f / "p.csv", "a,b,c\n0.1,0.2,0.7\n0.1,0.9\n"), {}),
        "Expected 3 columns, got 2",
    ),
    "a column of words": (
        lambda f, p: (_parquet(f / "p.parquet", a=[0.5], b=[0.5], note=["x"]), {}),
        "'note' is neither",
    ),
    "broken JSON": (
        lambda f, p: (_text(f / "p.jsonl", '{"p": [0.1, 0.2, 0.7]}\n{"p": [0.1\n'), {}),
        "p.jsonl cannot be read",
    ),
    "lists of two lengths": (
        lambda f, p: (_text(f / "p.jsonl", '{"p": [0.1, 0.2, 0.7]}\n{"p": [0.1, 0.9]}\n'), {}),
        "lists of 3 and, in row 1, of 2 numbers",
    ),
    "a row without a list": (
        lambda f, p: (_parquet(f / "p.parquet", p=[None, *p[1:]]), {}),
        "p.parquet, row 0 has no list of numbers",
    ),
    "lists of words": (
        lambda f, p: (_parquet(f / "p.parquet", p=[["0.1", "0.2", "0.7"]]), {}),
        "'p' is neither",
    ),
    "lists of lists": (
        lambda f, p: (_parquet(f / "p.parquet", p=[[[0.1], [0.2], [0.7]]]), {}),
        "'p' is neither",
    ),
    "an empty file of lines": (lambda f, p: (_text(f / "p.jsonl", ""), {}), "first line is empty"),
    "an array, not objects": (lambda f, p: (_text(f / "p.jsonl", "[1]\n"), {}), "an object, not"),
    "a class map of no class": (
        lambda f, p: (save(f / "p.npy", p), {"class_map": _path(f / "map", "hen\nowls\n7\n")}),
        "1 lines name no class of the task; the first is line 2, 'owls'",
    ),
    "a class map without a class": (
        lambda f, p: (save(f / "p.npy", p), {"class_map": _path(f / "map", "hen\nhen\n7\n")}),
        "no line maps to class 1 .'owl'.",
    ),
    "a class map of other length": (
        lambda f, p: (save(f / "p.npy", p), {"class_map": _path(f / "map", "hen\n-\n7\nowl\n")}),
        "3 numbers per row, but there are 4 classes in the class map",
    ),
}


def _text(path: Path, text: str) -> str:
    path.write_text(text)
    return path.name


def _path(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def _folder(path: Path) -> str:
    path.mkdir()
    return path.name


def _cut(folder: Path, name: str) -> str:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-9])
    return name


def _parts(folder: Path, values: np.ndarray) -> str:
    folder.mkdir()
    save(folder / "a.npy", values[:7])
    _cut(folder, save(folder / "b.parquet", values[7:]))
    return folder.name


def _parquet(path: Path, **columns) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path.name


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case, folder, probs):
    make, message = MALFORMED[case]
    source, settings = make(folder, probs)
    with pytest.raises(DataError, match=message) as error:
        run(folder, source, **settings)
    assert str(folder) in str(error.value)
    late = "Shards written from earlier rows" in str(error.value)
    # No complete but wrong output remains, at most the shards before the end of a stream.
    finished = {p.name for p in (folder / "out").glob("train-info-*-00000")}
    assert "train-info-00002-of-00003-00000" not in finished
    assert late == bool(finished)


def test_records_without_names(folder, probs, rng):
    write_shards(folder / "plain", [[tfexamples.unlabeled_example(png(rng))] * 2])
    (folder / "plain" / "task.json").write_text('{"num_classes": 3}')
    path = save(folder / "p.npz", probs[:2], NAMES[:2])
    with pytest.raises(DataError, match="2 of 2 records have no 'image/filename'"):
        run(folder, path, key="name", unlabel_data_dir=folder / "plain")
    named = [tfexamples.unlabeled_example(png(rng), "a.png") for _ in range(2)]
    write_shards(folder / "twice", [named])
    (folder / "twice" / "task.json").write_text('{"num_classes": 3}')
    with pytest.raises(DataError, match="1 of 2 records have the name of an earlier .* 'a.png'"):
        run(folder, path, "other", key="name", unlabel_data_dir=folder / "twice")


def test_a_late_error_says_how_to_import_a_corrected_source(folder, probs, monkeypatch):
    monkeypatch.setattr(prediction_tables, "_ROWS", 4)
    save(folder / "p.npy", changed(probs, 8, np.nan))
    with pytest.raises(
        DataError, match="row 8 has NaN.* Shards written from earlier rows: 2. .* delete .*out"
    ):
        run(folder, "p.npy")
    np.save(folder / "p.npy", probs)
    with pytest.raises(manifests.OutputConflict, match="imported"):
        run(folder, "p.npy")
    shutil.rmtree(folder / "out")
    run(folder, "p.npy")
    np.testing.assert_array_equal(written(folder), probs)


def test_settings_that_do_not_fit(folder, probs):
    path = save(folder / "p.npy", probs)
    with pytest.raises(ConfigError, match="--combine=agreement requires several sources"):
        run(folder, path, combine="agreement")
    (folder / "records" / "task.json").unlink()
    with pytest.raises(ConfigError, match="--task_name is required"):
        run(folder, path)
