"""Training end to end on tiny records: output, bitwise resuming, and refused settings."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import forks
import numpy as np
import pytest
import tensorflow as tf
from fakes import (
    CLASSES,
    KILLED_BEFORE_STEP_6_IS_SAVED,
    LABELED,
    PACE,
    SIZE,
    VALIDATION,
    assert_same_training,
    changed_settings,
    noised,
    pictures,
    saved_steps,
    settings,
    tensors,
    write_data,
    write_task,
)

from efficientnet_ns.config import Config, ConfigError, check
from efficientnet_ns.config.preemption import StopRequest
from efficientnet_ns.data import pipeline
from efficientnet_ns.evaluation import accuracy, evaluate
from efficientnet_ns.files import json_files, metrics_log, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.leases import LeaseLost
from efficientnet_ns.models import checkpoint_files, efficientnet, weights
from efficientnet_ns.resolve.resolved_config import ResolvedConfig
from efficientnet_ns.training import checkpoints, claim, inputs, model_dir_lock, preview, train
from efficientnet_ns.training.input_wait import InputWait
from efficientnet_ns.training.model_dir_lock import ModelDirLock
from efficientnet_ns.training.session import Session, TrainingDiverged
from efficientnet_ns.training.student import NoisyStudent

pytestmark = pytest.mark.usefixtures("shared_students")

LABELED_METRICS = {"lab/acc", "lab/pred_prob", "lab/loss"}
TRAIN_METRICS = {"train/data_loss", "train/loss", "train/lr", "train/epoch", *PACE}
UNLABELED_METRICS = {"unl/acc_to_dump", "unl/pred_prob", "unl/target_prob", "ext/loss"}
EVAL_METRICS = {"eval/top1", "eval/top5", "eval/loss", "eval/examples"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("train")
    write_data(path)
    return path


@pytest.fixture(scope="module")
def straight(folder) -> tuple[Config, dict[str, float]]:
    """The noised student, trained without interruption."""
    config = noised(folder, "straight")
    return config, train.train_and_evaluate(config)


# --- Output of training ---------------------------------------------------------------------------


@pytest.mark.slow
def test_metrics_of_a_student(straight):
    _, metrics = straight
    assert set(metrics) == {"step"} | (
        LABELED_METRICS | UNLABELED_METRICS | TRAIN_METRICS | EVAL_METRICS
    )
    assert metrics["step"] == 7
    assert metrics["eval/examples"] == VALIDATION
    assert metrics["train/data_loss"] == pytest.approx(
        metrics["lab/loss"] + 1.5 * metrics["ext/loss"], rel=1e-5
    )
    assert metrics["train/loss"] > metrics["train/data_loss"]


def test_rows_of_metrics(straight):
    config, metrics = straight
    rows = metrics_log.read_metrics(config.train.model_dir)
    kinds = [(row["step"], "train/loss" in row, "eval/top1" in row) for row in rows]
    assert kinds == [
        (2, True, False),
        (4, True, False),
        (4, False, True),
        (6, True, False),
        (7, True, False),
        (7, False, True),
    ]
    assert {**rows[-2], **rows[-1]} == metrics


def test_tensorboard_events(straight):
    config, metrics = straight
    (path,) = Path(config.train.model_dir).glob("events.out.tfevents.*")
    seen = {}
    for event in tf.compat.v1.train.summary_iterator(str(path)):
        for value in event.summary.value:
            seen[event.step, value.tag] = float(tf.make_ndarray(value.tensor))
    assert {step for step, _ in seen} == {2, 4, 6, 7}
    last = {tag: value for (step, tag), value in seen.items() if step == 7}
    expected = {name: value for name, value in metrics.items() if name != "step"}
    assert last == pytest.approx(expected, rel=1e-6)


def test_checkpoint_has_the_names_of_the_original(straight):
    config, _ = straight
    assert tf.train.latest_checkpoint(config.train.model_dir).endswith("/model.ckpt-7")
    stored = tensors(config.train.model_dir, 7)
    model = ResolvedConfig.from_config(config).build_model()
    expected = {"global_step"}
    for name, variable in weights.variable_names(model).items():
        expected |= {name, f"{name}/ExponentialMovingAverage"}
        if variable.trainable:
            expected |= {f"{name}/RMSProp", f"{name}/RMSProp_1"}
    assert set(stored) == expected
    assert {
        "efficientnet-test/stem/conv2d/kernel/RMSProp",
        "efficientnet-test/blocks_1/tpu_batch_normalization_2/moving_mean/ExponentialMovingAverage",
        "efficientnet-test/head/dense/bias/RMSProp_1",
    } <= expected
    assert stored["global_step"] == 7 and stored["global_step"].dtype == np.int64
    kernel = "efficientnet-test/head/dense/kernel"
    for suffix in ("/ExponentialMovingAverage", "/RMSProp", "/RMSProp_1"):
        assert stored[kernel + suffix].shape == stored[kernel].shape
        assert np.abs(stored[kernel + suffix] - stored[kernel]).max() > 1e-4


def test_evaluation_alone_gives_the_last_evaluation(straight):
    config, metrics = straight
    expected = {key: metrics[f"eval/{key}"] for key in ("top1", "top5", "loss", "examples")}
    assert evaluate.evaluate(config) == {"validation": pytest.approx(expected, rel=1e-6)}


def test_finished_training_is_left_alone(straight):
    """Settings that do not affect what is learned may change."""
    config, metrics = straight
    model_dir = Path(config.train.model_dir)
    before = {path: path.stat().st_mtime_ns for path in model_dir.glob("model.ckpt-*")}
    rows = (model_dir / "metrics.jsonl").read_text()
    again = config.override(steps_per_eval=3, keep_checkpoint_max=1, iterations_per_loop=5)
    assert train.train_and_evaluate(again) == metrics
    assert {path: path.stat().st_mtime_ns for path in model_dir.glob("model.ckpt-*")} == before
    assert (model_dir / "metrics.jsonl").read_text() == rows


def test_supervised(folder):
    metrics = train.train_and_evaluate(settings(folder, "supervised"))
    assert set(metrics) == {"step"} | LABELED_METRICS | TRAIN_METRICS | EVAL_METRICS
    assert metrics["train/data_loss"] == metrics["lab/loss"]


@pytest.fixture(scope="module")
def on_the_fly(straight, folder) -> Config:
    """Combines a teacher on the fly, frozen layers and the end of a schedule."""
    config = noised(
        folder,
        "on_the_fly",
        unlabel_data_dir=str(folder / "unlabeled"),
        teacher_softmax_temp=0.5,
        teacher_model_name="efficientnet-test",
        teacher_model_path=f"{straight[0].train.model_dir}/model.ckpt-6",
        fix_layer_num=1,
        train_steps=20,
        train_last_step_num=7,
        iterations_per_loop=1,
        save_checkpoints_steps=4,
        steps_per_eval=5,
        keep_checkpoint_max=2,
    )
    train.train_and_evaluate(config)
    return config


def test_teacher_on_the_fly(straight, on_the_fly):
    *_, trained, measured = metrics_log.read_metrics(on_the_fly.train.model_dir)
    assert set(trained) == {"step"} | LABELED_METRICS | UNLABELED_METRICS | TRAIN_METRICS
    assert set(measured) == {"step"} | EVAL_METRICS
    # At temperature 0.5, the teacher is more confident than at 1, but less than a hard label.
    assert 1 / CLASSES < trained["unl/target_prob"] < 1
    assert saved_steps(on_the_fly.train.model_dir) == [4, 7]
    state = tf.train.get_checkpoint_state(on_the_fly.train.model_dir)
    assert [Path(p).name for p in state.all_model_checkpoint_paths] == [
        "model.ckpt-4",
        "model.ckpt-7",
    ]
    stored = set(tensors(on_the_fly.train.model_dir, 7))
    assert stored == set(tensors(straight[0].train.model_dir, 7)), "the teacher is not saved"


def test_frozen_layers_stay_as_they_began(on_the_fly):
    """Stem and block 0 keep their weights, averages and statistics; all other layers change."""
    fresh = train._build(ResolvedConfig.from_config(on_the_fly), LABELED)
    initial = {name: v.numpy() for name, v in weights.variable_names(fresh.student).items()}
    stored = tensors(on_the_fly.train.model_dir, 7)
    frozen = re.compile("efficientnet-test/(stem|blocks_0)/")
    assert any("moving_mean" in name for name in initial if frozen.match(name))
    for name, value in initial.items():
        same = np.array_equal(stored[name], value)
        assert same == bool(frozen.match(name)), name
        if frozen.match(name):
            np.testing.assert_array_equal(stored[name + weights.EMA_SUFFIX], value, err_msg=name)
        if "moving_" not in name:
            assert stored[name + "/RMSProp"].shape == value.shape


# --- Resuming -------------------------------------------------------------------------------------


def test_killed_training_ends_in_the_same_bits(straight, folder):
    """Steps 5 and 6 were done but not saved; another process repeats them."""
    config = noised(folder, "killed")
    done = forks.python("-c", KILLED_BEFORE_STEP_6_IS_SAVED, changed_settings(config))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert saved_steps(config.train.model_dir) == [2, 4]
    rows = metrics_log.read_metrics(config.train.model_dir)
    assert rows[-1]["step"] == 6
    train.train_and_evaluate(config)
    assert saved_steps(config.train.model_dir) == [2, 4, 6, 7]
    assert_same_training(config.train.model_dir, straight[0].train.model_dir, 7)


@pytest.mark.slow
def test_damaged_checkpoint_is_passed_over(straight, folder, caplog):
    config = noised(folder, "damaged")
    shutil.copytree(straight[0].train.model_dir, config.train.model_dir)
    newest = Path(config.train.model_dir) / "model.ckpt-7.data-00000-of-00001"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    with caplog.at_level("WARNING"):
        train.train_and_evaluate(config)
    assert f"cannot load {newest.with_suffix('')}: " in caplog.text
    assert_same_training(config.train.model_dir, straight[0].train.model_dir, 7)


@pytest.fixture(scope="module")
def model(folder) -> NoisyStudent:
    """The supervised student, built once for tests that do not train it."""
    return train._build(ResolvedConfig.from_config(settings(folder, "unused")), LABELED)


def test_saving_below_a_damaged_checkpoint(model, tmp_path):
    """A checkpoint that cannot be loaded does not displace one that can."""
    saver = checkpoints.Checkpoints(str(tmp_path), model, keep=1)
    for step in (8, 2, 4):
        model.optimizer.iterations.assign(step)
        saver.save()
        if step == 8:
            (tmp_path / "model.ckpt-8.data-00000-of-00001").write_bytes(b"cut")
            with pytest.raises(checkpoints.NothingLoads, match="none of the 1 checkpoints"):
                saver.restore_latest()
    assert saved_steps(str(tmp_path)) == [4, 8]
    assert tf.train.latest_checkpoint(str(tmp_path)).endswith("-4")
    assert saver.restore_latest() == 4
    model.optimizer.iterations.assign(0)


def test_failed_save_names_no_later_damaged_checkpoint(model, tmp_path, monkeypatch):
    saver = checkpoints.Checkpoints(str(tmp_path), model)
    save_below_damage(saver, model)

    def full(*unused):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint_files, "write_checkpoint", full)
    with pytest.raises(checkpoints.SaveFailed, match="Last good checkpoint: .*/model.ckpt-2. Free"):
        saver.save()
    model.optimizer.iterations.assign(0)


def save_below_damage(saver: checkpoints.Checkpoints, model: NoisyStudent) -> None:
    """Saves checkpoints of step 2 and, damaged, step 8; training is at step 4."""
    for step in (2, 8):
        model.optimizer.iterations.assign(step)
        damaged = saver.save()
    Path(f"{damaged}.data-00000-of-00001").write_bytes(b"cut")
    assert saver.restore_latest() == 2
    model.optimizer.iterations.assign(4)


def test_kill_between_a_checkpoint_and_its_mention(model, tmp_path):
    """TensorFlow's latest checkpoint must be the one that training continues from."""
    saver = checkpoints.Checkpoints(str(tmp_path), model, keep=3)
    for step in (2, 4):
        model.optimizer.iterations.assign(step)
        saver.save()
        if step == 2:
            mention = (tmp_path / "checkpoint").read_bytes()
    (tmp_path / "checkpoint").write_bytes(mention)
    assert tf.train.latest_checkpoint(str(tmp_path)).endswith("-2")
    assert saver.restore_latest() == 4
    assert tf.train.latest_checkpoint(str(tmp_path)).endswith("-4")
    model.optimizer.iterations.assign(0)


# --- Refusals -------------------------------------------------------------------------------------


def test_loss_that_explodes(folder):
    """The first update is enormous but finite; the loss of the second step is not."""
    config = settings(folder, "exploding", base_learning_rate=1e30, train_steps=4)
    with pytest.raises(TrainingDiverged) as error:
        train.train_and_evaluate(config, evaluate=False)
    last = f"{config.train.model_dir}/model.ckpt-1"
    assert re.match("the loss became (nan|inf) between steps 1 and 2", str(error.value))
    assert f"Last good checkpoint: {last}." in str(error.value)
    assert saved_steps(config.train.model_dir) == [1]
    assert all(np.isfinite(value).all() for value in tensors(config.train.model_dir, 1).values())


@pytest.mark.slow
def test_patience(folder, monkeypatch):
    """Training ends for good at the second consecutive evaluation without improvement."""
    accuracies = iter([0.5, 0.6, 0.6, 0.4, 0.9])
    others = {"top5": 1.0, "loss": 1.0, "examples": 1.0}
    monkeypatch.setattr(
        accuracy.Evaluator, "__call__", lambda *_: {"top1": next(accuracies), **others}
    )
    config = settings(folder, "patience", train_steps=9, iterations_per_loop=2).override(
        steps_per_eval=2, patience=2, save_checkpoints_steps=6
    )
    metrics = train.train_and_evaluate(config)
    assert (metrics["step"], metrics["eval/top1"]) == (8, 0.4)
    assert saved_steps(config.train.model_dir)[-1] == 8
    assert train.train_and_evaluate(config) == metrics
    assert next(accuracies) == 0.9
    # Without patience, training continues to its last step.
    assert train.train_and_evaluate(config.override(patience=0), evaluate=False)["step"] == 9


@pytest.fixture
def session(folder, model, tmp_path) -> Iterator[Session]:
    """A session of training in `tmp_path` that saves every step."""
    saver = checkpoints.Checkpoints(str(tmp_path), model, keep=5)
    yield Session(
        saver,
        metrics_log.MetricsLog(str(tmp_path), 0),
        None,
        StopRequest(),
        settings(folder, tmp_path),
        start=0,
        total=4,
        steps_per_epoch=1.0,
        images_per_step=4,
    )
    model.optimizer.iterations.assign(0)


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_loss_that_explodes_inside_the_first_host_loop(session, model, tmp_path, loss):
    model.optimizer.iterations.assign(4)
    with pytest.raises(TrainingDiverged, match="between steps 0 and 4.*none was saved yet"):
        session.on_epoch_end(0, {"train/loss": loss})
    assert not saved_steps(str(tmp_path))


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_weights_that_break_after_the_last_loss(session, model, tmp_path, broken):
    """The loss is finite, but the updated weights are not, so they are not saved."""
    model.optimizer.iterations.assign(1)
    session.on_epoch_end(0, {"train/loss": 1.0})
    model.optimizer.iterations.assign(2)
    bias = model.student.get_layer("head_dense").bias
    bias.assign(tf.fill(bias.shape, broken))
    with pytest.raises(TrainingDiverged, match="between steps 1 and 2.*model.ckpt-1"):
        session.on_epoch_end(1, {"train/loss": 1.0})
    assert saved_steps(str(tmp_path)) == [1]
    bias.assign(tf.zeros(bias.shape))


def test_last_good_checkpoint_is_no_later_damaged_one(session, model):
    save_below_damage(session.saver, model)
    with pytest.raises(TrainingDiverged, match="Last good checkpoint: .*/model.ckpt-2. Lower"):
        session.on_epoch_end(0, {"train/loss": np.nan})


def test_folder_of_another_training(straight):
    config, _ = straight
    other = config.override(seed=6, label_smoothing=0.2)
    with pytest.raises(claim.DirectoryConflict) as error:
        train.train_and_evaluate(other)
    assert "(label_smoothing: 0.1 → 0.2, seed: 5 → 6)" in str(error.value)
    assert str(config.train.model_dir) in str(error.value)


def claimed(config: Config, **options) -> int:
    """Claims model_dir for training with `config`."""
    labeled = ResolvedConfig.from_config(config).labeled_source()
    return claim.claim(config, {"labeled": labeled, "unlabeled": None}, **options)


def pretend_checkpoint(config: Config) -> None:
    (Path(config.train.model_dir) / "model.ckpt-1.index").touch()


def test_training_that_never_began_gives_way(folder, tmp_path, only_reads):
    """After a start with a wrong path failed, the corrected settings must not conflict."""
    typo = settings(folder, tmp_path, init_model=True, init_model_path=str(tmp_path / "typo"))
    with pytest.raises(FileNotFoundError, match="typo"):
        train.train_and_evaluate(typo, evaluate=False)
    mended = settings(folder, tmp_path)
    train.train_and_evaluate(mended, evaluate=False)
    noted = json.loads((tmp_path / claim.SETTINGS).read_text())
    assert noted == {**noted, **mended.identity()}


def test_training_that_runs_does_not_give_way(folder, tmp_path, monkeypatch):
    """Another process is training, whether or not it has saved a checkpoint."""
    monkeypatch.setattr(model_dir_lock, "LEASE_SECONDS", 2.0)
    config = settings(folder, tmp_path)
    claimed(config)
    noted = (tmp_path / claim.SETTINGS).read_text()
    with ModelDirLock(str(tmp_path)) as other:
        other.acquire_if_free()
        for seed in (0, 1):
            with pytest.raises(claim.DirectoryConflict, match=f"process {os.getpid()} on .* is"):
                train.train_and_evaluate(config.override(seed=seed), evaluate=False)
    assert (tmp_path / claim.SETTINGS).read_text() == noted


def test_process_that_was_followed_writes_no_checkpoint(model, tmp_path):
    def refuse() -> None:
        raise LeaseLost("somebody else")

    saver = checkpoints.Checkpoints(str(tmp_path), model, before_write=refuse)
    with pytest.raises(LeaseLost):
        saver.save()
    assert list(tmp_path.iterdir()) == []


def test_slash_at_the_end_of_a_path_makes_no_other_training(folder, tmp_path):
    config = settings(folder, tmp_path)
    claimed(config)
    pretend_checkpoint(config)
    claimed(config.override(label_data_dir=f"{folder}/labeled/"))
    with pytest.raises(claim.DirectoryConflict, match="label_data_dir"):
        claimed(config.override(label_data_dir=f"{folder}/./labeled"))


def test_normalization_is_noted_whether_the_task_or_the_variant_states_it(folder, tmp_path):
    """Training that began with one continues with the other if the numbers are equal."""
    task = Path(write_task(tmp_path / "task.json"))
    fields = json.loads(task.read_text())
    row = efficientnet.get_variant("efficientnet-test")
    stated = {"mean": row.mean, "std": row.std}
    task.write_text(json.dumps({k: v for k, v in fields.items() if k not in stated}))
    config = settings(folder, tmp_path, task_name=str(task))
    claimed(config)
    pretend_checkpoint(config)
    task.write_text(json.dumps({**fields, **stated}))
    claimed(config)


def test_task_file_that_was_edited(folder, tmp_path):
    task = Path(write_task(tmp_path / "task.json"))
    config = settings(folder, tmp_path, task_name=str(task))
    claimed(config)
    pretend_checkpoint(config)
    claimed(config)
    before = json.loads(task.read_text())
    task.write_text(json.dumps({**before, "mean": [0.1, 0.2, 0.3], "flip": False}))
    with pytest.raises(
        claim.DirectoryConflict, match=r"task.flip: True → False, task.mean: .* → \[0.1, 0.2, 0.3\]"
    ):
        claimed(config)
    task.write_text(json.dumps({**before, "class_names": ["a", "b", "c"]}))
    claimed(config)


def test_records_that_were_replaced(tmp_path):
    write_data(tmp_path)
    config = settings(tmp_path, "model")
    claimed(config)
    pretend_checkpoint(config)
    claimed(config)
    path = replace_record(
        tmp_path,
        "train-00001-of-00002",
        2,
        tfexamples.labeled_example(pictures(1, 8)[0] + b"more", 1),
    )
    with pytest.raises(claim.DirectoryConflict, match=f"{path}: 6 records in .* → 6 records in"):
        claimed(config)
    (tmp_path / "model" / claim.RECORDS).unlink()
    claimed(config)  # Like a training run that began before records were noted.
    claimed(config)
    for old in (tmp_path / "labeled").glob("train-*"):
        old.unlink()
    examples = [tfexamples.labeled_example(image, 0) for image in pictures(3, 1)]
    tfrecords.write_sharded(str(tmp_path / "labeled"), "train", examples, 1)
    with pytest.raises(claim.DirectoryConflict, match="no file → 3 records .* and 2 more files"):
        claimed(config)


def test_list_of_excluded_records_that_changed(folder, tmp_path):
    record, other = sorted((folder / "labeled").glob("train-*"))[:2]
    exclude = tmp_path / "exclude.csv"
    exclude.write_text(f"file,record\n{record},1\n")
    config = settings(folder, "model").override(
        model_dir=str(tmp_path / "model"), exclude=str(exclude)
    )
    claimed(config)
    pretend_checkpoint(config)
    claimed(config)
    exclude.write_text(f"file,record\n{record},2\n")
    with pytest.raises(
        claim.DirectoryConflict, match=f"{record}: .*, 1 excluded .CRC .* → .*, 1 excluded"
    ):
        claimed(config)
    exclude.write_text(f"file,record\n{other},1\n")
    with pytest.raises(
        claim.DirectoryConflict, match=f"{record}: .*, 1 excluded .* → [^,]* bytes,"
    ):
        claimed(config)
    with pytest.raises(claim.DirectoryConflict, match="exclude: .* → ''"):
        claimed(config.override(exclude=""))


def test_folder_of_a_version_without_lists_of_excluded_records(folder, tmp_path):
    """A list that names none of its records changes nothing."""
    config = settings(folder, "model").override(model_dir=str(tmp_path / "model"))
    claimed(config)
    pretend_checkpoint(config)
    noted = json.loads((tmp_path / "model" / claim.SETTINGS).read_text())
    assert noted.pop("exclude") == ""
    (tmp_path / "model" / claim.SETTINGS).write_text(json.dumps(noted))
    (tmp_path / "list.csv").write_text("file,record\n/elsewhere,1\n")
    claimed(config.override(exclude=str(tmp_path / "list.csv")))


def test_what_killed_trainings_left_is_removed(folder, tmp_path):
    killed = subprocess.Popen(["true"])
    killed.wait()
    leftover = tmp_path / f".tmp-{socket.gethostname()}-{killed.pid}-{metrics_log.METRICS}"
    leftover.write_text("")
    claimed(settings(folder, tmp_path))
    assert not leftover.exists()


def test_checkpoint_of_another_number_of_classes(straight, tmp_path):
    """The task file was edited in the meantime."""
    config, _ = straight
    shutil.copytree(config.train.model_dir, tmp_path / "model")
    other = config.override(
        model_dir=str(tmp_path / "model"), task_name=write_task(tmp_path / "task.json", CLASSES + 1)
    )
    (tmp_path / "model" / "config.json").write_text(json.dumps(other.identity()))
    with pytest.raises(weights.WeightsError) as error:
        train.train_and_evaluate(other)
    for name in ("kernel", "bias"):
        assert f"efficientnet-test/head/dense/{name}: file [" in str(error.value)
    assert "efficientnet-test/head/dense/bias: file [3], model [4]" in str(error.value)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"model_dir": None}, "--model_dir is required"),
        ({"label_data_dir": None}, "--label_data_dir is required"),
        ({"unlabel_ratio": 1.0}, "--unlabel_ratio=1.0 needs --unlabel_data_dir"),
        ({"unlabel_data_dir": "/u"}, "--unlabel_data_dir=/u has no effect without"),
        (
            {"teacher_model_name": "efficientnet-b0", "teacher_model_path": "m"},
            "--teacher_model_name=efficientnet-b0 has no effect",
        ),
        ({"init_skip": "stem,head/["}, r"--init_skip: 'head/\[' is not a regular expression"),
        ({"augment_name": "randaugmnet"}, "--augment_name='randaugmnet'"),
        ({"label_weight": 0.0}, "--label_weight=0 without --unlabel_ratio"),
        (
            {"consistency_threshold": 0.95},
            "--consistency_threshold=0.95 replaces a teacher",
        ),
        (
            {"consistency_threshold": 0.95, "unlabel_ratio": 1.0, "unlabel_data_dir": "/u"},
            "--consistency_threshold=0.95 cannot be reached with --label_smoothing=0.1",
        ),
        ({"teacher_model_name": "efficientnet-b0"}, "--teacher_model_path"),
        ({"teacher_model_path": "somewhere"}, "--teacher_model_name"),
        ({"init_model": True}, "--init_model needs --init_model_path"),
        ({"init_weights": "a", "init_model_path": "b"}, "--init_weights=a and --init_model_path=b"),
        ({"teacher_softmax_temp": 0.0}, "--teacher_softmax_temp=0.0"),
        ({"teacher_softmax_temp": -0.5}, "--teacher_softmax_temp=-0.5"),
        ({"model_name": "efficientnet-b9"}, "--model_name: unknown model 'efficientnet-b9'"),
        ({"task_name": "cifar"}, "--task_name: unknown task 'cifar'"),
        ({"num_label_classes": 10}, "--num_label_classes=10"),
    ],
)
def test_settings_that_do_not_fit(folder, values, message):
    config = settings(folder, "never").override(**values)
    with pytest.raises(ConfigError, match=message):
        train.train_and_evaluate(config)
    assert not (folder / "never").exists()


@pytest.mark.parametrize("missing", ["model_dir", "label_data_dir"])
def test_evaluation_names_what_is_missing(folder, missing):
    with pytest.raises(ConfigError, match=f"--{missing}"):
        evaluate.evaluate(settings(folder, "never").override(**{missing: None}))


def test_missing_sets(folder, tmp_path):
    shutil.copytree(folder / "labeled", tmp_path / "labeled")
    config = settings(tmp_path, "never", task_name=str(folder / "task.json"))
    (tmp_path / "labeled" / "validation-00001-of-00002").unlink()
    with pytest.raises(DataError, match="validation-00001-of-00002"):
        train.train_and_evaluate(config)
    with pytest.raises(DataError, match="no record files in .*pseudo"):
        train.train_and_evaluate(
            config.override(unlabel_ratio=1.0, unlabel_data_dir=str(tmp_path / "pseudo")),
            evaluate=False,
        )


# --- Unusable records -----------------------------------------------------------------------------


@pytest.fixture
def only_reads(model, monkeypatch) -> None:
    """Replaces training with reading its batches."""

    def draw(_, batches, *, epochs: int, steps_per_epoch: int, **unused) -> None:
        for _ in batches.take(epochs * steps_per_epoch):
            pass

    monkeypatch.setattr(train, "_build", lambda *_: model)
    monkeypatch.setattr(NoisyStudent, "fit", draw)


def replace_record(folder: Path, name: str, position: int, payload: bytes) -> Path:
    (path,) = folder.glob(f"*/{name}")
    payloads = [record.payload for record in tfrecords.read(str(path))]
    payloads[position] = payload
    tfrecords.write(str(path), payloads)
    (path.parent / tfrecords.COUNTS).unlink()
    return path


IMAGE = pictures(1, 8)[0]
BROKEN_RECORDS = {
    "label above the classes": (
        "train-00001-of-00002",
        tfexamples.labeled_example(IMAGE, CLASSES),
        r"label 3 \(0-based\) is outside 0..2",
    ),
    "label 0, which is none": (
        "train-00000-of-00002",
        tfexamples.labeled_example(IMAGE, -1),
        r"label -1 \(0-based\) is outside 0..2",
    ),
    "image cut off": (
        "train-00001-of-00002",
        tfexamples.labeled_example(IMAGE[:40], 1),
        "PNG",
    ),
    "no image": (
        "train-00000-of-00002",
        tfexamples.prediction_examples(np.array([[1.0]], np.float32))[0],
        "the record has no 'image/encoded'",
    ),
    "pseudo label above the classes": (
        "train-0-00001-of-00002",
        tfexamples.pseudo_labeled_example(IMAGE, [0.1, 0.2, 0.3, 0.4], 3),
        "probabilities",
    ),
    "too few probabilities": (
        "train-0-00000-of-00002",
        tfexamples.pseudo_labeled_example(IMAGE, [0.5, 0.5], 1),
        "probabilities",
    ),
    "unlabeled image cut off": (
        "train-0-00001-of-00002",
        tfexamples.pseudo_labeled_example(IMAGE[:40], [0.5, 0.5, 0.0], 1),
        "PNG",
    ),
    "evaluation label above the classes": (
        "validation-00000-of-00002",
        tfexamples.labeled_example(IMAGE, CLASSES),
        r"label 3 \(0-based\) is outside 0..2",
    ),
}


@pytest.mark.parametrize("case", BROKEN_RECORDS)
def test_bad_record_is_named(case, tmp_path, only_reads):
    name, payload, problem = BROKEN_RECORDS[case]
    write_data(tmp_path)
    path = replace_record(tmp_path, name, 2, payload)
    config = settings(
        tmp_path, "model", unlabel_data_dir=str(tmp_path / "pseudo"), unlabel_ratio=1.0
    ).override(train_steps=8)
    with pytest.raises(DataError, match=f"{path}, record 2: .*{problem}"):
        train.train_and_evaluate(config)


def test_excluded_records_are_not_used(tmp_path, only_reads):
    """Excludes a labeled record that would stop training, and unlabeled ones without labels."""
    write_data(tmp_path)
    name, payload, _ = BROKEN_RECORDS["label 0, which is none"]
    bad = replace_record(tmp_path, name, 2, payload)
    for path in (tmp_path / "pseudo").glob("train-0-*"):
        path.rename(path.with_name(path.name.replace("train-0-", "extra-")))
    (extra, *_) = sorted((tmp_path / "pseudo").glob("extra-*"))
    rows = [("labeled", bad, 2), ("unlabeled", extra, 0), ("unlabeled", extra, 1)]
    exclude = tmp_path / "exclude.csv"
    exclude.write_text("\n".join(["set,file,record", *(f"{s},{f},{r}" for s, f, r in rows)]))
    config = settings(
        tmp_path, "model", unlabel_data_dir=str(tmp_path / "pseudo"), unlabel_ratio=1.0
    ).override(exclude=str(exclude), train_batch_size=LABELED - 1)
    found = inputs.Inputs.find(ResolvedConfig.from_config(config), evaluate=False)
    whole = inputs.Inputs.find(
        ResolvedConfig.from_config(config.override(exclude="")), evaluate=False
    )
    assert found.labeled.total == whole.labeled.total - 1
    assert found.unlabeled.total == whole.unlabeled.total - 2
    teacher = config.override(unlabel_ratio=0.0, unlabel_data_dir="")
    train.train_and_evaluate(teacher, evaluate=False)


def test_pseudo_labeled_records_were_selected_before(tmp_path):
    """The list names the records that they were selected from."""
    write_data(tmp_path)
    (tmp_path / "exclude.csv").write_text(
        "set,file,record\nunlabeled,/data/extra-00000-of-00001,0\n"
    )
    config = settings(
        tmp_path, "model", unlabel_data_dir=str(tmp_path / "pseudo"), unlabel_ratio=1.0
    ).override(exclude=str(tmp_path / "exclude.csv"))
    found = inputs.Inputs.find(ResolvedConfig.from_config(config), evaluate=False)
    assert not found.labeled.excluded and not found.unlabeled.excluded


def flip_last_byte_of_payload(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])


@pytest.mark.parametrize("values", [{"preview_images": 4}, {"debug": 1}])
@pytest.mark.parametrize("damaged", [True, False])
def test_bad_record_is_named_before_the_first_step(values, damaged, tmp_path, only_reads):
    """The preview and --debug explain bad records like training does."""
    write_data(tmp_path)
    name, payload, problem = BROKEN_RECORDS["label 0, which is none"]
    path, position = tmp_path / "labeled" / name, 2
    if damaged:
        flip_last_byte_of_payload(path)
        position, problem = tfrecords.count(str(path)) - 1, "damaged payload"
    else:
        replace_record(tmp_path, name, position, payload)
    config = settings(tmp_path, "model", train_batch_size=LABELED, **values)
    expected = f"{path}, record {position}: {problem}.*start the same command again"
    with pytest.raises(DataError, match=expected):
        train.train_and_evaluate(config, evaluate=False)


def test_bad_record_stops_an_evaluation(straight, tmp_path):
    name, payload, problem = BROKEN_RECORDS["evaluation label above the classes"]
    write_data(tmp_path)
    path = replace_record(tmp_path, name, 2, payload)
    config = straight[0].override(label_data_dir=str(tmp_path / "labeled"))
    with pytest.raises(DataError, match=f"{path}, record 2: {problem}"):
        evaluate.evaluate(config)


@pytest.mark.slow
def test_bad_record_stops_a_training_that_continues_when_it_is_repaired(tmp_path):
    """Keras raises these errors inside the compiled loop."""
    write_data(tmp_path)
    good = tfexamples.labeled_example(IMAGE, 0)
    name, bad = "train-00001-of-00002", tfexamples.labeled_example(IMAGE, CLASSES)
    path = replace_record(tmp_path, name, 1, bad)
    config = settings(tmp_path, "model", train_steps=8)
    with pytest.raises(DataError, match=f"{path}, record 1: label 3"):
        train.train_and_evaluate(config, evaluate=False)
    tfrecords.write(str(path), [good])
    pretend_checkpoint(config)
    claimed(config)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"train_last_step_num": 3}, "--train_last_step_num=3"),
        ({"train_last_step_num": 0}, "--train_last_step_num=0"),
        ({"train_ratio": 0.1}, "--train_ratio=0.1"),
        ({"final_base_lr": 0.5}, "--final_base_lr=0.5"),
        ({"dropout_rate": 1.5}, "--dropout_rate=1.5"),
        ({"stochastic_depth_rate": 1.0}, "--stochastic_depth_rate=1.0"),
    ],
)
def test_numbers_out_of_range(folder, values, message):
    with pytest.raises(ConfigError, match=message):
        train.train_and_evaluate(settings(folder, "never", **values))
    assert not (folder / "never").exists()


def test_settings_that_came_later_had_their_defaults(straight, tmp_path):
    config, metrics = straight
    path = Path(config.train.model_dir) / "config.json"
    whole = path.read_text()
    older = json.loads(whole)
    del older["shuffle_buffer"]
    try:
        path.write_text(json.dumps(older))
        assert train.train_and_evaluate(config)["step"] == metrics["step"]
    finally:
        path.write_text(whole)


def test_training_begun_in_another_order_continues_with_the_next_epoch(folder, tmp_path, caplog):
    config = settings(folder, tmp_path / "model")
    path = tmp_path / "model" / claim.SETTINGS
    assert claimed(config) == 0
    pretend_checkpoint(config)
    assert claimed(config) == 0 and "order of records" not in caplog.text
    older = {k: v for k, v in json.loads(path.read_text()).items() if "input_order" not in k}
    path.write_text(json.dumps(older))
    assert claimed(config, writes=False) == claimed(config) == 1
    assert "at step 1, it continues with the next epoch" in caplog.text
    (tmp_path / "model" / "model.ckpt-2.index").touch()
    assert claimed(config) == claimed(config, writes=False) == 1


@pytest.mark.slow
def test_truncated_set_is_not_measured(straight, tmp_path):
    config, _ = straight
    write_data(tmp_path)
    folder = tmp_path / "labeled"
    (folder / tfrecords.COUNTS).unlink()
    shard = sorted(folder.glob("validation-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{shard} is damaged after record"):
        evaluate.evaluate(config.override(label_data_dir=str(folder)))


def test_new_head_on_old_weights(straight, tmp_path):
    """Weights with another number of classes are loaded except for the head."""
    start = {"init_model": True, "init_model_path": straight[0].train.model_dir}
    config = settings(
        tmp_path, "unused", task_name=write_task(tmp_path / "task.json", CLASSES + 2), **start
    )
    built = train._build(ResolvedConfig.from_config(config), LABELED)
    head = built.student.get_layer("head_dense").kernel.numpy()
    with pytest.raises(weights.WeightsError, match="head/dense/kernel"):
        train._initialize(built, config)
    train._initialize(built, config.override(init_skip="head/dense/"))
    old = tensors(straight[0].train.model_dir, 7)
    name = "efficientnet-test/stem/conv2d/kernel"
    average = old[name + weights.EMA_SUFFIX]
    assert np.any(average != old[name])
    for network in (built.student, built.ema_student):
        np.testing.assert_array_equal(weights.variable_names(network)[name], average)
        np.testing.assert_array_equal(network.get_layer("head_dense").kernel, head)


# --- Stop requests and other ways to continue -----------------------------------------------------

ASKED_TO_STOP = """
import json, os, signal, sys
from efficientnet_ns import config
from efficientnet_ns.config import Config
from efficientnet_ns.training import session, train

log = session.Session._pace

def asking(self, step):
    if step == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return log(self, step)

session.Session._pace = asking

def main(words):
    train.train_and_evaluate(Config().override(**json.loads(words[0])))

config.run(main, words=True)
"""


@pytest.mark.slow
def test_request_to_stop_saves_and_continues_in_the_same_bits(on_the_fly, folder):
    """The signal arrives while step 5 is logged; no interval would have saved that step."""
    config = on_the_fly.override(model_dir=str(folder / "stopped"), preview_images=3)
    done = forks.python("-c", ASKED_TO_STOP, changed_settings(config))
    assert done.returncode == 75, done.stderr
    rows = metrics_log.read_metrics(config.train.model_dir)
    assert rows[-1]["step"] in (5, 6)
    assert rows[-1]["step"] == saved_steps(config.train.model_dir)[-1]
    train.train_and_evaluate(config)
    assert_same_training(config.train.model_dir, on_the_fly.train.model_dir, 7)
    assert (Path(config.train.model_dir) / preview.FILE).exists()


@pytest.mark.parametrize("number", [-2, 4])
def test_blocks_that_cannot_be_frozen(folder, number):
    values = settings(folder, "never", fix_layer_num=number)
    with pytest.raises(ConfigError, match="fix_layer_num"):
        check(values)
        train._build(ResolvedConfig.from_config(values), LABELED)


def test_frozen_layers_drop_nothing_and_keep_their_statistics():
    model = efficientnet.build_model("efficientnet-test", 3, 8, small_image=True, survival_prob=0.1)
    efficientnet.freeze(model, efficientnet.num_blocks(model))
    inner = tf.keras.Model(model.input, efficientnet.endpoints(model)["reduction_1"])
    images = tf.random.uniform([4, 8, 8, 3], maxval=255.0)
    np.testing.assert_array_equal(inner(images, training=True), inner(images, training=False))
    assert {v.name.split("/")[0] for v in model.trainable_variables} == {
        "head_conv",
        "head_bn",
        "head_dense",
    }


@pytest.mark.slow
def test_evaluation_that_was_cut_off_is_made_up_for(straight, folder):
    """The checkpoint of step 4 was saved, but not evaluated."""
    config = noised(folder, "unevaluated")
    shutil.copytree(straight[0].train.model_dir, config.train.model_dir)
    model_dir = Path(config.train.model_dir)
    for path in [*model_dir.glob("model.ckpt-6.*"), *model_dir.glob("model.ckpt-7.*")]:
        path.unlink()
    log = model_dir / metrics_log.METRICS
    rows = log.read_text().splitlines(keepends=True)
    # A killed writer leaves a partial last line.
    log.write_text("".join(rows[:2]) + rows[2][:9])
    train.train_and_evaluate(config)
    assert_same_training(config.train.model_dir, straight[0].train.model_dir, 7)


# --- Parts of the sets ----------------------------------------------------------------------------


def test_images_and_steps_that_are_counted(folder):
    """Labeled images excluded from the loss are still computed."""
    values = {"train_batch_size": 8, "label_data_sample_prob": 0.5, "unlabel_ratio": 3.0}
    stretched = {"train_steps": 10, "train_ratio": 2.0, "train_last_step_num": 4}
    resolved = ResolvedConfig.from_config(settings(folder, "never", **values, **stretched))
    assert (resolved.train_steps, resolved.steps_to_run) == (20, 8)
    assert (resolved.unlabeled_batch_size, resolved.images_per_step) == (12, 20)
    assert resolved.epoch_images() == LABELED
    one_shard = resolved.config.override(num_train_shards=1)
    assert ResolvedConfig.from_config(one_shard).epoch_images() == 7
    assert ResolvedConfig.from_config(one_shard.override(num_train_images=5)).epoch_images() == 5


@pytest.mark.slow
def test_parts_of_the_sets(straight, folder):
    config, _ = straight
    measured = evaluate.evaluate(config.override(num_eval_images=5))["validation"]
    assert measured["examples"] == 5
    with pytest.raises(
        ConfigError, match="--num_eval_images=8: 8 records are requested, but there are 7"
    ):
        evaluate.evaluate(config.override(num_eval_images=8))
    resolved = ResolvedConfig.from_config(config.override(num_train_shards=1))
    found = inputs.Inputs.find(resolved, evaluate=True)
    labeled, unlabeled = found.labeled, found.unlabeled
    assert [Path(p).name for p in labeled.paths] == ["train-00000-of-00002"]
    assert len(unlabeled.paths) == 2
    with pytest.raises(
        ConfigError, match="--num_train_shards=3: 3 shards are requested, but there are 2"
    ):
        train.train_and_evaluate(config.override(num_train_shards=3, model_dir=str(folder / "no")))


@pytest.mark.slow
def test_continuous_evaluation_ends_with_the_last_step(straight, tmp_path):
    config, metrics = straight
    shutil.copytree(config.train.model_dir, tmp_path / "model")
    config = config.override(model_dir=str(tmp_path / "model"), eval_continuously=True)
    for _ in range(2):
        results = evaluate.evaluate(config)
        assert results["validation"]["loss"] == pytest.approx(metrics["eval/loss"], rel=1e-6)
        (row,) = metrics_log.read_metrics(str(tmp_path / "model" / "eval"))
        assert row["step"] == 7 and row["validation/loss"] == results["validation"]["loss"]


@pytest.mark.slow
def test_continuous_evaluation_of_another_length_is_refused(straight, tmp_path):
    """It would wait for a step that training never reaches."""
    config, _ = straight
    longer = config.override(train_steps=9, eval_continuously=True)
    with pytest.raises(ConfigError, match="another step .train_steps: 7 → 9"):
        evaluate.evaluate(longer)


def test_continuous_evaluation_of_a_checkpoint_without_a_step(folder, model, tmp_path):
    weights.save_weights(model.student, tmp_path / "test")
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "test"\n')
    config = settings(folder, tmp_path, eval_continuously=True)
    with pytest.raises(ConfigError, match=r"newest checkpoint is .*/test, .*model.ckpt-<step>"):
        evaluate.evaluate(config)


def test_waiting_for_the_first_checkpoint_is_logged(tmp_path, caplog):
    caplog.set_level("INFO")
    found = evaluate._each_new_checkpoint(str(tmp_path), seconds=0.01)

    def appear() -> None:
        (tmp_path / "model.ckpt-1.index").touch()
        (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-1"\n')

    thread = threading.Timer(0.05, appear)
    thread.start()
    assert next(found) == str(tmp_path / "model.ckpt-1")
    thread.join()
    assert f"waiting for the first checkpoint in {tmp_path}" in caplog.text


def test_unlabeled_images_without_a_part_in_an_earlier_training(folder, tmp_path):
    """Earlier versions accepted such images; training continues without them."""
    config = settings(folder, tmp_path, unlabel_data_dir="/no/such")
    claimed(config)
    pretend_checkpoint(config)
    claimed(config.override(unlabel_data_dir=""))
    with pytest.raises(claim.DirectoryConflict, match="unlabel_data_dir"):
        claimed(config.override(unlabel_data_dir="/no/such", unlabel_ratio=1.0))


def test_weights_that_are_not_read_are_named(folder, model, tmp_path, caplog):
    train._initialize(model, settings(folder, tmp_path, init_model_path="somewhere"))
    assert "--init_model_path=somewhere is ignored without --init_model" in caplog.text


@pytest.mark.parametrize(
    "values", [{"init_weights": "somewhere"}, {"init_model": True, "init_model_path": "somewhere"}]
)
def test_weights_to_start_from(folder, model, tmp_path, monkeypatch, values):
    given = []
    monkeypatch.setattr(
        weights, "load_weights", lambda *loaded, **kwargs: given.append((loaded, kwargs))
    )
    train._initialize(model, settings(folder, tmp_path, init_skip="head/dense/", **values))
    assert given == [((model.student, "somewhere"), {"skip": ["head/dense/"]})]


@pytest.mark.parametrize("name", [claim.SETTINGS, claim.RECORDS])
def test_notes_of_another_kind_are_named(folder, tmp_path, name):
    config = settings(folder, tmp_path)
    claimed(config)
    pretend_checkpoint(config)
    (tmp_path / name).write_text("[]")
    with pytest.raises(json_files.BrokenFile, match=f"{name} should contain a JSON object"):
        claimed(config)


# --- Logs and previews ----------------------------------------------------------------------------


def test_every_start_is_noted_with_all_flags(straight):
    config, _ = straight
    first, *_ = json_files.read_json_lines(f"{config.train.model_dir}/{claim.RUNS}")
    assert first["step"] == 0 and first["flags"]["iterations_per_loop"] == 2
    assert set(first["flags"]) == set(Config().values())


def test_metrics_in_a_store_without_appending(tmp_path, monkeypatch):
    """`flush` writes the rows to the file, and a resumed log drops later rows."""
    written = []
    write = json_files.write_json_lines
    monkeypatch.setattr(json_files, "write_json_lines", lambda *a: written.append(1) or write(*a))
    folder = "file://" + str(tmp_path)  # The scheme makes it a store, which TensorFlow can access.
    log = metrics_log.MetricsLog(folder, 0)
    for step in range(1, 6):
        log.add(step, {"train/loss": 1.0 / step})
        if step % 2 == 0:
            log.flush()
    assert len(written) == 3
    assert [row["step"] for row in metrics_log.read_metrics(folder)] == [1, 2, 3, 4]
    log.close()
    assert [r["step"] for r in metrics_log.MetricsLog(folder, 3).rows] == [1, 2, 3]


@pytest.mark.parametrize("torn", ["", "{", '{"step": 3, "eval/to', "\0\0\0"])
def test_row_that_was_cut_off_is_logged_again(tmp_path, caplog, torn):
    """Lost by a kill or a power failure; the resumed run writes the row once."""
    path = tmp_path / metrics_log.METRICS
    path.write_text('{"step": 1}\n{"step": 2}\n' + torn)
    assert [row["step"] for row in metrics_log.read_metrics(str(tmp_path))] == [1, 2]
    assert ("skipping the last line" in caplog.text) == bool(torn)
    log = metrics_log.MetricsLog(str(tmp_path), 2)
    log.add(3, {"eval/top1": 0.5})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "eval/top1": 0.5}\n'


def test_last_row_without_a_line_break_counts(tmp_path):
    (tmp_path / metrics_log.METRICS).write_text('{"step": 1}\n{"step": 2}')
    assert [row["step"] for row in metrics_log.read_metrics(str(tmp_path))] == [1, 2]


def test_damaged_metrics_are_named(tmp_path):
    for damaged in ("nonsense", "[2]", '{"loss": 1.0}', ""):
        (tmp_path / metrics_log.METRICS).write_text(f'{{"step": 1}}\n{damaged}\n{{"step": 3}}\n')
        with pytest.raises(json_files.BrokenFile, match="metrics.jsonl, line 2 .*Delete that line"):
            metrics_log.read_metrics(str(tmp_path))


def test_input_wait_is_the_time_the_batches_took():
    """Compares an input whose batches take 20 ms each with one that is ready."""
    wait = InputWait()
    slow = tf.data.Dataset.range(5).map(lambda i: tf.py_function(pause, [i], tf.int64))
    assert [int(i) for i in wait.measure(slow)] == [0, 1, 2, 3, 4]
    waited = wait.take()
    assert waited >= 0.1
    assert wait.take() == 0
    assert [int(i) for i in wait.measure(tf.data.Dataset.range(5))] == [0, 1, 2, 3, 4]
    assert 0 < wait.take() < waited


def pause(value):
    time.sleep(0.02)
    return value


def test_input_wait_under_replicas(two_replicas):
    wait = InputWait()
    data = wait.measure(tf.data.Dataset.range(8).batch(4, drop_remainder=True))
    seen = []
    for batch in two_replicas.experimental_distribute_dataset(data):
        seen += [int(v) for part in two_replicas.experimental_local_results(batch) for v in part]
    assert seen == list(range(8))
    assert wait.take() > 0


def test_preview_of_classes_that_look_like_formulas(folder, tmp_path):
    """Matplotlib parses text between two dollar signs as math."""
    task = {"num_classes": CLASSES, "image_size": SIZE, "small_image": True}
    names = ["$1 to $2", "$x_{$", "\\frac"]
    (tmp_path / "task.json").write_text(json.dumps({**task, "class_names": names}))
    config = settings(folder, tmp_path, task_name=str(tmp_path / "task.json"))
    source = pipeline.Source.find(config.data.label_data_dir, "train")
    picture = preview.draw(ResolvedConfig.from_config(config), source, None, 6)
    assert (picture.reshape(-1, 3).min(0) == 0).all()  # Letters are black.


def test_preview_shows_the_images_and_their_labels(tmp_path):
    """One plain, unaugmented color per class, each of which must appear in the preview."""
    colors = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
    images = [tf.io.encode_png(np.full([SIZE, SIZE, 3], c, np.uint8)).numpy() for c in colors]
    examples = [tfexamples.labeled_example(image, i) for i, image in enumerate(images)]
    tfrecords.write_sharded(str(tmp_path / "labeled"), "train", examples, 1)
    write_task(tmp_path / "task.json")
    (tmp_path / "model").mkdir()
    config = settings(tmp_path, "model", remove_aug=True)
    resolved = ResolvedConfig.from_config(config)
    source = pipeline.Source.find(config.data.label_data_dir, "train")
    picture = preview.draw(resolved, source, None, 3)
    stored = tf.io.decode_png((tmp_path / "model" / preview.FILE).read_bytes(), 3)
    np.testing.assert_array_equal(picture, stored)
    for color in colors:
        assert (picture == color).all(-1).sum() > 5000, color


def test_preview_shows_as_many_unlabeled_as_labeled_images(folder, tmp_path, monkeypatch):
    """Even if training drops half of the labeled images."""
    sections, picture = [], pictures(1, 0)[0]
    monkeypatch.setattr(preview, "_png", lambda parts: (sections.extend(parts), picture)[1])
    unlabeled = {"unlabel_data_dir": str(folder / "pseudo")}
    config = settings(folder, tmp_path, label_data_sample_prob=0.5, remove_aug=True, **unlabeled)
    resolved = ResolvedConfig.from_config(config)
    labeled = pipeline.Source.find(config.data.label_data_dir, "train")
    unlabeled = pipeline.Source.find(config.data.unlabel_data_dir, "train-0")
    preview.draw(resolved, labeled, unlabeled, 4)
    assert [len(images) for _, images, _ in sections] == [4, 4]
