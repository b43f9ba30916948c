"""The loop on tiny data: layout, resuming after kills, and refused settings."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import forks
import numpy as np
import pytest
import tensorflow as tf
from fakes import loop_settings as settings
from fakes import write_loop_data as write_data

from efficientnet_ns.config import Config, ConfigError, LoopConfig
from efficientnet_ns.config.ingest import MakeConfig
from efficientnet_ns.evaluation import evaluate
from efficientnet_ns.files import json_files, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.ingest import data_source
from efficientnet_ns.loop import rounds
from efficientnet_ns.loop.state import State
from efficientnet_ns.pseudo_labels import predict
from efficientnet_ns.training import train

ROOT = Path(__file__).parents[2]
CLASSES, SIZE, NUM_IMAGE = 3, 8, 5

pytestmark = pytest.mark.usefixtures("shared_students")


def loop_in(folder: Path, work_dir: str, number: int = 2) -> LoopConfig:
    return LoopConfig(
        work_dir=str(folder / work_dir),
        models=", ".join(["efficientnet-test"] * (1 + number)),
        teacher_steps=3,
        num_image=NUM_IMAGE,
        min_threshold=0.2,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("loop")
    write_data(path)
    return path


@pytest.fixture(scope="module")
def config(folder) -> Config:
    return Config().override(**settings(folder))


@pytest.fixture(scope="module")
def undisturbed(folder, config) -> tuple[LoopConfig, list[dict]]:
    loop = loop_in(folder, "undisturbed")
    return loop, rounds.run_loop(config, loop)


def stages(loop: LoopConfig) -> dict[str, dict]:
    """Returns recorded results, except those that depend on speed or the number of starts."""
    recorded = json.loads((Path(loop.work_dir) / "state.json").read_text())["stages"]
    for result in recorded.values():
        for pace in ("images_per_second", "input_wait"):
            result.pop(pace, None)
        result.pop("skipped_shards", None)
    return recorded


def balanced(loop: LoopConfig, number: int) -> dict[str, bytes]:
    """Returns the balanced records of a round."""
    data = Path(loop.work_dir) / f"round-{number}" / "selected" / "data"
    return {path.name: path.read_bytes() for path in sorted(data.glob("train-0-*"))}


def predicted(loop: LoopConfig, number: int) -> dict[str, bytes]:
    """Returns the predictions of a round and their metadata."""
    folder = Path(loop.work_dir) / f"round-{number}" / "predictions"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[ti]*"))}


def test_rows(undisturbed):
    _, rows = undisturbed
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert [row["steps"] for row in rows] == [3, 2, 2]
    for row in rows:
        assert row["model"] == "efficientnet-test"
        sizes = {name: metrics["examples"] for name, metrics in row["measured"].items()}
        assert sizes == {"validation": 6, "test": 5}
    for row in rows[1:]:
        assert row["kept"]
        assert row["unique"] == sum(images for _, images in row["kept"].values())


def test_layout(undisturbed):
    loop, _ = undisturbed
    work = Path(loop.work_dir)
    assert sorted(path.name for path in work.iterdir()) == [
        "round-0",
        "round-1",
        "round-2",
        "state.json",
    ]
    assert [path.name for path in (work / "round-0").iterdir()] == ["model"]
    for number in (1, 2):
        assert sorted(path.name for path in (work / f"round-{number}").iterdir()) == [
            "info",
            "model",
            "predictions",
            "selected",
            "statistics",
        ]
    assert not list(work.rglob(".tmp-*"))


def test_state(undisturbed):
    loop, rows = undisturbed
    recorded = stages(loop)
    assert list(recorded) == [
        "round 0: teacher efficientnet-test",
        "round 0: teacher efficientnet-test: measure",
        "round 1: predict",
        "round 1: select",
        "round 1: write",
        "round 1: student efficientnet-test",
        "round 1: student efficientnet-test: measure",
        "round 2: predict",
        "round 2: select",
        "round 2: write",
        "round 2: student efficientnet-test",
        "round 2: student efficientnet-test: measure",
    ]
    assert recorded["round 2: student efficientnet-test: measure"] == rows[2]["measured"]
    assert recorded["round 1: predict"] == {"records": 24, "unreadable": 0}


def test_balanced_records(undisturbed):
    loop, rows = undisturbed
    for number in (1, 2):
        assert list(balanced(loop, number)) == ["train-0-00000-of-00002", "train-0-00001-of-00002"]
        data = Path(loop.work_dir) / f"round-{number}" / "selected" / "data"
        labels = [
            tfexamples.label(record.payload)
            for path in sorted(data.glob("train-0-*"))
            for record in tfrecords.read(str(path))
        ]
        counts = {str(label): labels.count(label) for label in set(labels)}
        assert counts == dict.fromkeys(rows[number]["kept"], NUM_IMAGE)


def test_each_student_is_taught_by_the_model_before(undisturbed, config):
    """Labels of a round come from the newest checkpoint of the previous round."""
    loop, _ = undisturbed
    for number in (1, 2):
        prediction, selection = rounds.stage_configs(config, loop, number)
        assert prediction.predict.predict_ckpt_path == rounds.model_dir(loop, number - 1)
        # Predictions with these settings exist already, so all shards are skipped.
        assert predict.predict(prediction)["skipped_shards"] == 2
        assert selection.unlabel_data_dir == config.data.unlabel_data_dir
        student = json.loads((Path(rounds.model_dir(loop, number)) / "config.json").read_text())
        assert student["unlabel_data_dir"] == os.path.join(selection.output_dir, "data")
    teacher = json.loads((Path(rounds.model_dir(loop, 0)) / "config.json").read_text())
    assert (teacher["unlabel_data_dir"], teacher["unlabel_ratio"]) == ("", 0.0)


# --- Killed and continued -------------------------------------------------------------------------

# TensorFlow is loaded once, and each run forks before using it. A moment is the end of a file name
# and a text in the file; the run is killed just before that file appears.
KILLED_AT = """
import json, os, signal, sys
import tensorflow as tf
from efficientnet_ns.loop import rounds
from efficientnet_ns.config import Config, LoopConfig
from efficientnet_ns.pseudo_labels import predict, selection, write
from efficientnet_ns.models import checkpoint_files
from efficientnet_ns.training import train

settings, loop, moments = map(json.loads, sys.argv[1:])
save, rename = checkpoint_files.write_checkpoint, tf.io.gfile.rename

def run(suffix, text):
    def saving(prefix, tensors):
        if prefix.endswith(suffix):
            os.kill(os.getpid(), signal.SIGKILL)
        save(prefix, tensors)

    def renaming(source, target, overwrite=False):
        if target.endswith(suffix) and text.encode() in open(source, "rb").read():
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target, overwrite)

    checkpoint_files.write_checkpoint, tf.io.gfile.rename = saving, renaming
    rounds.run_loop(Config().override(**settings), LoopConfig(**loop))

for moment in moments:
    child = os.fork()
    if not child:
        run(*moment)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else "not killed", flush=True)
"""

MOMENTS = [
    # Teacher: one step is saved, the next is done but not saved.
    ("round-0/model/model.ckpt-2", ""),
    # Predictions: the first shard is finished; the second has only its manifest.
    ("round-1/predictions/train-info-00001-of-00002-00000", ""),
    # Selection: finished but not recorded.
    ("state.json", "round 1: select"),
    # Balanced records: the first shard is finished; the second has only its manifest.
    ("round-1/selected/data/train-0-00001-of-00002", ""),
    # Student: trained, but its metrics are not recorded.
    ("state.json", "round 1: student efficientnet-test"),
]


@pytest.mark.slow
def test_killed_and_continued(folder, config, undisturbed):
    """Runs one round, whose results equal those of the first of two rounds."""
    loop = loop_in(folder, "killed", 1)
    arguments = [settings(folder), dataclasses.asdict(loop), MOMENTS]
    done = forks.python("-c", KILLED_AT, *map(json.dumps, arguments))
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * len(MOMENTS), done.stderr
    assert list(stages(loop))[-1] == "round 1: write"

    reference, expected = undisturbed
    assert rounds.run_loop(config, loop) == expected[:2]
    recorded = stages(reference)
    assert stages(loop) == {name: recorded[name] for name in recorded if "round 2" not in name}
    assert balanced(loop, 1) == balanced(reference, 1)
    assert predicted(loop, 1) == predicted(reference, 1)


def test_finished_loop_does_nothing(undisturbed, config, monkeypatch):
    loop, rows = undisturbed
    for module, name in ((train, "train_and_evaluate"), (evaluate, "evaluate")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("worked again"))
    monkeypatch.setattr(predict, "predict", lambda *_: pytest.fail("predicted again"))
    before = (Path(loop.work_dir) / "state.json").stat().st_mtime_ns
    assert rounds.run_loop(config, loop) == rows
    assert (Path(loop.work_dir) / "state.json").stat().st_mtime_ns == before


# --- A recipe for each model ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def varied(folder, config) -> tuple[LoopConfig, list[dict]]:
    """A student with larger images and another ratio, fine-tuned on still larger images."""
    loop = dataclasses.replace(
        loop_in(folder, "varied", 1),
        image_sizes="8,12",
        unlabel_ratios="0.5",
        finetune_resolution=16,
        finetune_epochs=1.4,
    )
    return loop, rounds.run_loop(config, loop)


def trained_with(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.slow
def test_each_model_has_its_image_size_and_ratio(varied):
    loop, rows = varied
    work = Path(loop.work_dir)
    teacher, student, tuned = (
        trained_with(work / name)
        for name in ("round-0/model", "round-1/model", "round-1/finetuned-16")
    )
    assert [c["input_image_size"] for c in (teacher, student, tuned)] == [8, 12, 16]
    assert [c["unlabel_ratio"] for c in (teacher, student, tuned)] == [0, 0.5, 0]
    manifests = list((work / "round-1/predictions").glob("*.manifest.json"))
    sizes = {json.loads(path.read_text())["config"]["image_size"] for path in manifests}
    assert len(manifests) == 2 and sizes == {8}
    assert [row.get("finetuned") for row in rows] == [None, None, 16]


@pytest.mark.slow
def test_warm_start(config):
    """Each student starts from its teacher's weights, which requires the same variant."""
    loop = LoopConfig(
        work_dir="w", models="efficientnet-b0," * 2 + "efficientnet-b0", warm_start=True
    )
    teacher, *students = rounds.model_configs(config, loop)
    assert not teacher.train.init_model
    assert [s.train.init_model_path for s in students] == [
        rounds.model_dir(loop, n) for n in (0, 1)
    ]
    assert all(student.train.init_model for student in students)
    other = dataclasses.replace(loop, models="efficientnet-b0,efficientnet-b1")
    with pytest.raises(
        ConfigError, match="--warm_start requires students of their teacher's variant"
    ):
        rounds.model_configs(config, other)


def test_warm_starts_and_fine_tuning_take_all_weights_of_one_model(config):
    """Even if the first training run starts from other weights or skips layers."""
    first = config.override(init_weights="published", init_skip="dense", model_dir="teacher")
    loop = dataclasses.replace(loop_in(Path("w"), "run", 1), finetune_resolution=16)
    warm, tuned = rounds.warm_started(first, first), rounds.finetune_config(first, loop, 1)
    for own, folder in ((warm, "teacher"), (tuned, rounds.model_dir(loop, 1))):
        assert own.train.init_model and own.train.init_model_path == folder
        assert (own.train.init_weights, own.train.init_skip) == (None, "")


@pytest.mark.slow
def test_fine_tuning_is_the_end_of_a_schedule_on_clean_labeled_images(varied):
    loop, rows = varied
    tuned = trained_with(Path(loop.work_dir) / "round-1/finetuned-16")
    assert (tuned["remove_aug"], tuned["unlabel_data_dir"]) == (True, "")
    assert tuned["init_model"] and tuned["init_model_path"] == rounds.model_dir(loop, 1)
    # 1.4 passes over 9 images in batches of 4.
    assert rows[2]["steps"] == tuned["train_last_step_num"] == 3
    # The tuned weights are measured, not the initial ones.
    log = (Path(loop.work_dir) / "round-1/finetuned-16/metrics.jsonl").read_text().splitlines()
    tuned_loss, student_loss = (row["measured"]["validation"]["loss"] for row in (rows[2], rows[1]))
    assert tuned_loss == pytest.approx(json.loads(log[-1])["eval/loss"], rel=1e-4)
    assert tuned_loss != pytest.approx(student_loss, rel=1e-4)


def test_fine_tuning_counts_the_shards_that_are_trained_on(tmp_path, config):
    example = tfexamples.labeled_example(b"not decoded here", 0)
    tfrecords.write_sharded(str(tmp_path), "train", [example] * 15, 2)
    few = config.override(label_data_dir=str(tmp_path), num_train_shards=1)
    loop = dataclasses.replace(
        loop_in(tmp_path, "w", 1),
        finetune_resolution=16,
        finetune_epochs=2.0,
        finetune_fix_layers=3,
    )
    tuned = rounds.finetune_config(few, loop, 1)
    assert tuned.train.fix_layer_num == 3
    assert tuned.train.train_last_step_num == 4  # 2 passes over 8 images in batches of 4.


def test_slash_at_the_end_of_a_path_is_no_other_setting(tmp_path):
    state = State(str(tmp_path), {"label_data_dir": "data/", "seed": 1})
    state.once("stage", dict)
    State(str(tmp_path), {"label_data_dir": "data", "seed": 1})
    with pytest.raises(ConfigError, match="seed: 1 → 2"):
        State(str(tmp_path), {"label_data_dir": "data", "seed": 2})


@pytest.mark.slow
def test_fine_tuned_loop_is_continued_and_can_grow(varied, config, monkeypatch):
    loop, rows = varied
    for module, name in ((train, "train_and_evaluate"), (evaluate, "evaluate")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("worked again"))
    assert rounds.run_loop(config, loop) == rows
    without = dataclasses.replace(loop, finetune_resolution=None)
    assert rounds.run_loop(config, without) == rows[:2]


def test_published_recipes(config):
    loop = LoopConfig(
        work_dir="w",
        models="efficientnet-b1,efficientnet-b4,efficientnet-l2",
        published_recipes=True,
        unlabel_ratios="2,28",
    )
    plain = config.override(task_name="imagenet", randaug_mag=9)
    settings = [
        (
            c.model.input_image_size,
            c.data.augment_name,
            c.data.randaug_mag,
            c.train.train_ratio,
            c.train.unlabel_ratio,
        )
        for c in rounds.model_configs(plain, loop)
    ]
    assert settings == [
        (240, None, 9, 2.0, 0.0),
        (380, "randaugment", 15, 2.0, 2.0),
        (475, "randaugment", 27, 1.0, 28.0),
    ]
    own = dataclasses.replace(loop, unlabel_ratios="", image_sizes="100,200,300")
    configs = rounds.model_configs(plain, own)
    assert [c.model.input_image_size for c in configs] == [100, 200, 300]
    assert [c.train.unlabel_ratio for c in configs] == [0, 3, 14]


def test_unlabeled_set_beside_the_labeled_ones(folder, tmp_path):
    """`make_records --nolabeled` can write into the folder of the labeled sets."""
    both = tmp_path / "both"
    shutil.copytree(folder / "labeled", both)
    source = tmp_path / "photos"
    source.mkdir()
    for number in range(3):
        pixels = np.full([SIZE, SIZE, 3], 70 * number, np.uint8)
        (source / f"{number}.png").write_bytes(tf.io.encode_png(pixels).numpy())
    made = MakeConfig(source=str(source), output_dir=str(both), labeled=False, num_shards=2)
    data_source.make_records(made)
    config = Config().override(**{**settings(folder), "unlabel_data_dir": str(both)})
    loop = loop_in(tmp_path, "work", 1)
    with pytest.raises(DataError, match=r"extra \(2 shards\), train .*--file_prefix"):
        rounds.check(config, loop)
    named = config.override(file_prefix="extra", label_data_dir=str(both))
    rounds.check(named, loop)
    prediction, selection = rounds.stage_configs(named, loop, 1)
    options = prediction.predict
    assert (options.file_prefix, options.num_shards, options.shard_id) == ("extra", 2, "0-1")
    assert (selection.file_prefix, selection.num_shards) == ("extra", 2)
    with pytest.raises(DataError, match="no records other-00000-of-…"):
        rounds.check(config.override(file_prefix="other"), loop)
    alone = config.override(unlabel_data_dir=str(folder / "unlabeled"))
    prediction, _ = rounds.stage_configs(alone, loop, 1)
    assert prediction.predict.file_prefix == "extra"


def test_decisions_are_those_of_every_selection(folder, config, tmp_path):
    """A list that is missing or names other records is refused before training the teacher."""
    loop = loop_in(tmp_path, "work")
    record = next((folder / "unlabeled").glob("extra-*"))
    (tmp_path / "list.csv").write_text(f"file,record\n{record},0\n")
    listed = config.override(exclude=str(tmp_path / "list.csv"))
    for training in rounds.check(listed, loop):
        assert training.data.exclude == listed.data.exclude
    for number in (1, 2):
        assert rounds.stage_configs(listed, loop, number)[1].exclude == listed.data.exclude
    # A list of labeled records only.
    (tmp_path / "list.csv").write_text(f"file,record,set\n{folder}/labeled/train,0,labeled\n")
    rounds.check(listed, loop)
    (tmp_path / "list.csv").write_text("file,record\n/elsewhere/extra-00000-of-00001,0\n")
    with pytest.raises(DataError, match="names records of .*, but none of the set"):
        rounds.check(listed, loop)
    with pytest.raises(DataError, match="--reviewed=x.json: the file does not exist"):
        rounds.check(config, dataclasses.replace(loop, reviewed="x.json"))


def test_folder_of_an_earlier_version_is_continued(tmp_path):
    State(str(tmp_path), {"seed": 1}).once("stage", dict)
    State(str(tmp_path), {"seed": 1, "new": 0}, {"new": 0, "other": 5})
    with pytest.raises(ConfigError, match="new: 0 → 1"):
        State(str(tmp_path), {"seed": 1, "new": 1}, {"new": 0})


def test_threshold_may_change_until_a_selection_is_made(tmp_path):
    folder = str(tmp_path)
    state = State(folder, {"min_threshold": 0.9, "seed": 1})
    state.once("round 1: predict", dict)
    state = State(folder, {"min_threshold": 0.3, "seed": 1})
    state.once("round 1: select", dict)
    State(folder, {"min_threshold": 0.3, "seed": 1})
    with pytest.raises(ConfigError, match="min_threshold: 0.3 → 0.5"):
        State(folder, {"min_threshold": 0.5, "seed": 1})


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "training, looping, difference",
    [
        ({"seed": 4}, {}, "seed: 3 → 4"),
        ({}, {"num_image": 6}, "num_image: 5 → 6"),
    ],
)
def test_other_settings_are_refused(undisturbed, config, training, looping, difference):
    loop, _ = undisturbed
    before = (Path(loop.work_dir) / "state.json").read_bytes()
    with pytest.raises(ConfigError, match=f"undisturbed was started with .*{difference}"):
        rounds.run_loop(config.override(**training), dataclasses.replace(loop, **looping))
    assert (Path(loop.work_dir) / "state.json").read_bytes() == before


def test_another_model_in_a_round_that_is_finished_is_refused(undisturbed, config):
    loop, _ = undisturbed
    other = dataclasses.replace(loop, models="efficientnet-test,efficientnet-b0")
    with pytest.raises(ConfigError, match="model_name: 'efficientnet-test' → 'efficientnet-b0'"):
        rounds.run_loop(config, other)


@pytest.mark.parametrize(
    "models, message",
    [
        ("efficientnet-test,efficientnet-b9", "^--models=.*: unknown model 'efficientnet-b9'"),
        ("efficientnet-test,", "unknown model ''"),
    ],
)
def test_unknown_models_are_refused_before_any_work(config, tmp_path, models, message):
    loop = LoopConfig(work_dir=str(tmp_path / "loop"), models=models)
    with pytest.raises(ConfigError, match=message):
        rounds.run_loop(config, loop)
    assert not (tmp_path / "loop").exists()


@pytest.mark.parametrize(
    "training, looping, message",
    [
        ({}, {"models": "efficientnet-test"}, "--models=efficientnet-test: "),
        ({}, {"work_dir": ""}, "--work_dir"),
        ({}, {"unlabel_ratios": "1"}, "--unlabel_ratios=1 must be 2 "),
        ({}, {"unlabel_ratios": "1,0"}, "--unlabel_ratios=1,0 must be 2 positive"),
        ({}, {"unlabel_ratios": "1,nan"}, "--unlabel_ratios=1,nan must be 2 positive"),
        ({}, {"image_sizes": "8,8,4"}, "--input_image_size=4 is too small"),
        ({}, {"min_threshold": 2.0}, "--min_threshold=2.0 is too large"),
        ({}, {"image_sizes": "8,8,large"}, "--image_sizes=8,8,large must be 3 "),
        ({}, {"published_recipes": True}, "none for 'efficientnet-test'"),
        ({"unlabel_data_dir": ""}, {}, "--unlabel_data_dir"),
        ({"unlabel_ratio": 0.0}, {}, "--unlabel_ratio"),
    ],
)
def test_settings_that_do_not_fit(folder, config, training, looping, message):
    loop = dataclasses.replace(loop_in(folder, "never"), **looping)
    with pytest.raises(ConfigError, match=message):
        rounds.run_loop(config.override(**training), loop)
    assert not (folder / "never").exists()


def test_state_records_a_result_once(tmp_path):
    calls = []

    def work() -> dict:
        calls.append(len(calls))
        return {"number": len(calls)}

    state = State(str(tmp_path), {"of": "this loop"})
    assert state.once("stage", work) == state.once("stage", work) == {"number": 1}
    again = State(str(tmp_path), {"of": "this loop"})
    assert again.once("stage", work) == {"number": 1}
    assert calls == [0]


@pytest.mark.parametrize("text", ["{}", "[]"])
def test_state_of_another_kind_is_named(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(json_files.BrokenFile, match="state.json (should contain|lacks settings)"):
        State(str(tmp_path), {})


def test_failed_stage_is_not_recorded(tmp_path):
    state = State(str(tmp_path), {})
    with pytest.raises(ZeroDivisionError):
        state.once("stage", lambda: {"number": 1 // 0})
    assert State(str(tmp_path), {}).once("stage", lambda: {"number": 2}) == {"number": 2}


@pytest.mark.parametrize(
    "top1, best",
    [
        ((0.8, 0.9, 0.95), 2),
        ((0.8, 0.77), 1),  # Not significantly worse on 100 images: the standard error is 0.04.
        ((0.8, 0.75), 0),
        ((0.8, 0.7, 0.85), 2),
        ((1.0, 0.99), 0),
    ],
)
def test_best_model(top1, best):
    rows = [{"measured": {"validation": {"top1": one, "examples": 100}}} for one in top1]
    assert rounds.best_model(Config(), rows) == best
