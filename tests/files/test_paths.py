"""Paths with glob characters work everywhere and are taken literally."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.config import Config, ExportConfig, SelectConfig
from efficientnet_ns.config.ingest import MakeConfig
from efficientnet_ns.evaluation import evaluate
from efficientnet_ns.files import atomic, local_files, parquet_sql
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.paths import listed
from efficientnet_ns.inference import photo_files
from efficientnet_ns.ingest import data_source
from efficientnet_ns.models import weights
from efficientnet_ns.outcomes import labeling_report
from efficientnet_ns.pseudo_labels import predict, selection, write
from efficientnet_ns.serving import export, model_export
from efficientnet_ns.training import train

ODD = "a[b]?*c"
# A name that ODD matches as a pattern.
MATCHED = "ab-anything-c"
CLASSES, SIZE = 3, 16


def write_images(folder: Path, rng: np.random.Generator, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = rng.integers(0, 256, [SIZE, SIZE, 3], np.uint8)
        (folder / f"{number}.png").write_bytes(tf.io.encode_png(pixels).numpy())


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The odd folder with images, next to a folder that its name matches as a pattern."""
    home = tmp_path_factory.mktemp("paths") / ODD
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "sea"):
        write_images(home / "photos" / name, rng, 5)
    write_images(home / "unlabeled", rng, 8)
    (home.parent / MATCHED).mkdir()
    return home


@pytest.fixture(scope="module")
def settings(home) -> Config:
    """Settings of training on records that are created here."""
    photos, data = str(home / "photos"), str(home / "data")
    made = MakeConfig(source=photos, output_dir=data, validation_fraction=0.4, num_workers=1)
    data_source.make_records(made)
    task = json.loads((home / "data" / "task.json").read_text())
    task.update(image_size=SIZE, small_image=True)
    (home / "data" / "task.json").write_text(json.dumps(task))
    return Config().override(
        model_name="efficientnet-test",
        task_name=str(home / "data" / "task.json"),
        label_data_dir=data,
        model_dir=str(home / "model"),
        train_batch_size=4,
        eval_batch_size=4,
        train_steps=3,
        warmup_epochs=0.0,
        iterations_per_loop=1,
        save_checkpoints_steps=1,
        keep_checkpoint_max=2,
        preview_images=2,
        inference_engine="tf",
    )


@pytest.fixture(scope="module")
def trained(settings) -> dict[str, float]:
    """Metrics of the training run."""
    return train.train_and_evaluate(settings)


def checkpoints(config: Config) -> dict[str, bytes]:
    """Returns the content of the checkpoint files by name."""
    found = listed(config.train.model_dir, r"model\.ckpt-.*")
    return {Path(path).name: Path(path).read_bytes() for path in found}


def test_listed(tmp_path):
    folder = tmp_path / ODD
    assert listed(str(folder), ".*") == []
    (folder / "sub[1]").mkdir(parents=True)
    for name in ("b-1", "a-1", "a-10", ".a-1"):
        (folder / name).touch()
    assert listed(str(folder), r"a-\d+") == [f"{folder}/a-1", f"{folder}/a-10"]
    assert listed(str(folder), r"sub.*") == [f"{folder}/sub[1]"]


def test_temporary_files_of_killed_processes(tmp_path):
    folder, other = tmp_path / ODD, tmp_path / MATCHED
    for place in (folder, other):
        place.mkdir()
        # Process IDs never get this high.
        (place / f"{atomic._temporary_prefix()}99999999-name").touch()
    atomic.remove_abandoned([str(folder / "name")])
    assert not list(folder.iterdir())
    assert len(list(other.iterdir())) == 1


@pytest.mark.parametrize("name", [ODD, "back\\slash", "plain"])
def test_what_tensorflow_reads(tmp_path, monkeypatch, name):
    """Covers a checkpoint and a nested folder; nothing is left behind."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    folder = tmp_path / name
    (folder / "variables").mkdir(parents=True)
    prefix = str(folder / "model.ckpt-1")
    weights.write_checkpoint(prefix, {"x": tf.range(3)})
    (folder / "variables" / "data").write_text("inside")
    (folder / "model.ckpt-10.index").touch()
    with local_files.without_wildcards(prefix) as literal:
        assert tf.train.load_checkpoint(literal).get_tensor("x").tolist() == [0, 1, 2]
        assert (literal == prefix) == (name == "plain")
    with local_files.without_wildcards(str(folder)) as literal:
        assert Path(literal, "variables", "data").read_text() == "inside"
    assert not list(temporary.iterdir())
    # The targets of the links still exist.
    assert (folder / "variables" / "data").read_text() == "inside"
    assert tf.io.gfile.exists(prefix + ".index")


def test_links_of_a_killed_process_are_removed_alone(tmp_path, monkeypatch):
    """Removal does not follow the links."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    folder = tmp_path / ODD / "deep"
    folder.mkdir(parents=True)
    (folder / "file").write_text("kept")
    killed = local_files.without_wildcards(str(folder.parent))
    links = killed.__enter__()
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "is_running", lambda pid: False)
        atomic.remove_abandoned_folders(str(tmp_path / "temporary"))
    assert not Path(links).exists()
    assert (folder / "file").read_text() == "kept"
    Path(links).parent.mkdir()
    killed.__exit__(None, None, None)


def test_no_folder_for_the_links(tmp_path, monkeypatch):
    (tmp_path / "t[1]").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t[1]"))
    with pytest.raises(OSError, match="set TMPDIR"):
        with local_files.without_wildcards(str(tmp_path / ODD)):
            pass


def test_database_reads_the_file_that_is_named(tmp_path):
    """It does not read the file in a folder that the name matches as a pattern."""
    import pyarrow
    import pyarrow.parquet

    for name in (ODD, MATCHED):
        (tmp_path / name).mkdir()
        table = pyarrow.table({"of": [name]})
        pyarrow.parquet.write_table(table, tmp_path / name / "index.parquet")
    for name in (ODD, MATCHED):
        (tmp_path / MATCHED / "index.parquet").touch()
        database = parquet_sql.connect(1, rows=[str(tmp_path / name / "index.parquet")])
        assert database.execute("SELECT * FROM rows").fetchall() == [(name,)]
        path = f"{tmp_path}//{name}/index.parquet"
        database = parquet_sql.connect(1, numbered=["rows"], rows=[path])
        assert database.execute("SELECT * FROM rows").fetchall() == [(name, 0)]


# --- The whole pipeline in such a folder ----------------------------------------------------------


def test_another_number_of_shards_is_refused(home, settings):
    again = MakeConfig(
        source=str(home / "photos"), output_dir=settings.data.label_data_dir, num_shards=2
    )
    with pytest.raises(DataError, match="number of shards other than"):
        data_source.make_records(again)


@pytest.mark.slow
def test_old_checkpoints_go_and_no_part_is_left(settings, trained):
    assert trained["step"] == settings.train.train_steps
    names = set(checkpoints(settings))
    kinds = ("index", "data-00000-of-00001")
    assert names == {f"model.ckpt-{step}.{kind}" for step in (2, 3) for kind in kinds}


@pytest.mark.slow
def test_a_training_continues(settings, trained):
    expected = checkpoints(settings)
    for name in expected:
        if name.startswith("model.ckpt-3"):
            Path(settings.train.model_dir, name).unlink()
    assert train.train_and_evaluate(settings)["step"] == 3
    assert checkpoints(settings) == expected


def test_evaluation(settings, trained):
    found = evaluate.evaluate(settings)["validation"]
    assert found["loss"] == pytest.approx(trained["eval/loss"], rel=1e-4)


def test_continuous_evaluation_sees_the_last_checkpoint(settings, trained):
    found = evaluate.evaluate(settings.override(eval_continuously=True))["validation"]
    assert found["loss"] == pytest.approx(trained["eval/loss"], rel=1e-4)


@pytest.fixture(scope="module")
def predicted(home, settings, trained) -> Config:
    unlabeled = MakeConfig(
        source=str(home / "unlabeled"), output_dir=str(home / "records"), labeled=False
    )
    data_source.make_records(unlabeled)
    mine = settings.override(
        unlabel_data_dir=str(home / "records"),
        predict_ckpt_path=settings.train.model_dir,
        output_dir=str(home / "predictions"),
        info_dir=str(home / "info"),
        file_prefix="extra",
        num_shards=1,
    )
    assert predict.predict(mine)["records"] == 8
    return mine


def test_predictions_leave_no_parts(predicted):
    names = [Path(p).name for p in listed(predicted.predict.output_dir, ".*")]
    assert len(names) == 4 and not [name for name in names if name.startswith(".")]


def test_filter(home, predicted):
    chosen = SelectConfig(
        unlabel_data_dir=predicted.data.unlabel_data_dir,
        prediction_dir=predicted.predict.output_dir,
        prelim_stats_dir=str(home / "statistics"),
        output_dir=str(home / "selected"),
        file_prefix="extra",
        num_shards=1,
        num_image=4,
        num_label_classes=CLASSES,
    )
    assert selection.select(chosen)["available"] == 8
    assert write.write(chosen)["records"] > 0
    assert Path(labeling_report.write_report(chosen)[0]).stat().st_size


def test_exported_variables(tmp_path):
    """Loading the model reads them from files."""
    module = tf.Module()
    module.variable = tf.Variable([0.25, 0.75])
    strings = tf.TensorSpec([None], tf.string)

    @tf.function(input_signature=[strings])
    def serve(image_bytes):
        return {"probabilities": tf.repeat(module.variable[None], tf.size(image_bytes), axis=0)}

    tf.saved_model.save(module, str(tmp_path / ODD), signatures={"serving_default": serve})
    answer = export.saved_model_runner(str(tmp_path / ODD))
    assert answer([b""] * 2).tolist() == [[0.25, 0.75]] * 2


@pytest.mark.slow
def test_export(home, settings, trained, capsys, caplog):
    """The weights are in variables, which TensorFlow reads from files when it loads the model."""
    options = {"optimize_for": "none", "check_data": settings.data.label_data_dir}
    folder = model_export.export_model(
        settings, ExportConfig(export_dir=str(home / "export"), version=1, **options)
    )
    assert folder == str(home / "export" / "1")
    assert "against the float32 model" in capsys.readouterr().out
    assert "move the model before serving it" in caplog.text


def test_photos(home, settings, trained):
    photo = str(home / "photos" / "cat" / "0.png")
    (answer,) = photo_files.predict_images(settings, settings.train.model_dir, [photo])
    assert sum(p["probability"] for p in answer["predictions"]) == pytest.approx(1, abs=1e-4)
