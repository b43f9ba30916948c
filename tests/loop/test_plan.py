"""Plans: their description, refused settings, and reuse of an earlier plan."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from fakes import class_folders, flat_folder

from efficientnet_ns.config import Config, ConfigError, LoopConfig, PicturesConfig, mark_given
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.loop import one_command, plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures")
    class_folders(path / "photos", {"Über rot": 8, "blue": 6})
    flat_folder(path / "more", 12)
    (path / "photos" / "blue" / "broken.jpg").write_bytes(b"no picture")
    (path / "photos" / ".DS_Store").write_bytes(b"x")
    return path


def pictures(folder: Path, **values) -> PicturesConfig:
    places = {"labeled": str(folder / "photos"), "unlabeled": str(folder / "more")}
    return PicturesConfig(**{**places, **values})


def test_description(folder, monkeypatch):
    monkeypatch.setattr(plan, "published_models", lambda: ())
    asked = pictures(folder)
    made = plan.make(asked, {"train_steps": 77}, "")
    assert (made.facts.labeled, made.facts.classes, made.facts.unlabeled) == (15, 2, 12)
    assert made.facts.median_side == 24
    text = plan.describe(made, asked)
    assert "blue 7, Über rot 8" in text
    assert "refused: blue/broken.jpg" in text
    assert "1 hidden" in text
    assert "13 pictures for training, 2 held out" in text
    assert "77     given" in " ".join(text.split("  ")) or " 77 " in text
    assert "efficientnet-ns[weights]" in text and "time: about" in text
    assert "WARNING: 12 unlabeled pictures for 15" in text


def test_a_time_limit_that_is_too_short_names_one_that_is_enough(folder, monkeypatch):
    monkeypatch.setattr(plan, "published_models", lambda: ())
    monkeypatch.setattr(plan.pace, "images_per_second", lambda config: 12.5)

    def line(limit):
        asked = pictures(folder, time_limit=limit)
        return plan.time_line(plan.make(asked, {}, ""), asked)

    found = re.search(r"--time_limit=1m is too short; set (\d+m)$", line("1m"))
    assert found and "too short" not in line(found[1])


def test_dry_run_writes_nothing(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan.pace, "images_per_second", lambda config: 12.5)
    loop = LoopConfig(work_dir=str(tmp_path / "run"))
    one_command.run(pictures(folder, dry_run=True), Config(), loop)
    assert "12.5 pictures/s (measured)" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("weights, small", [("", True), ("published", False)])
def test_pace_is_that_of_the_model_to_train(folder, monkeypatch, weights, small):
    measured = []
    monkeypatch.setattr(
        plan.pace, "images_per_second", lambda config: measured.append(config) or 12.5
    )
    values = {"init_weights": weights, "width_coefficient": 0.5}
    plan.make(pictures(folder, dry_run=True), values, "")
    [config] = measured
    assert config.model.small_image_model == small
    assert config.model.width_coefficient == 0.5


def test_guessed_pace_depends_on_the_model(folder):
    def guessed(**values) -> float:
        return plan.make(pictures(folder), {"init_weights": "", **values}, "").pace

    assert guessed(width_coefficient=0.5, depth_coefficient=0.25) == pytest.approx(4 * guessed())
    assert guessed(input_image_size=48) == pytest.approx(guessed() / 4)
    assert guessed(small_image_model=False) == pytest.approx(16 * guessed())


def test_a_teacher_without_a_student_is_refused_before_anything_is_done(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(plan.pace, "images_per_second", lambda config: 12.5)
    loop = LoopConfig(work_dir=str(tmp_path / "run"), models="efficientnet-b0")
    mark_given(loop, ["models"])
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match="name a teacher and at least one student"):
            one_command.run(pictures(folder, dry_run=dry_run), Config(), loop)
    assert not list(tmp_path.iterdir())


def test_plan_is_kept_and_other_settings_are_refused(folder, tmp_path):
    work, asked = str(tmp_path / "run"), pictures(folder)
    made = plan.make(asked, {"seed": 3}, work)
    plan.write(made, asked, {"seed": 3}, work)
    again = plan.make(asked, {"seed": 3}, work)
    assert again.settings == made.settings and again.facts == made.facts
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["begun_with"]["seed"] == 3
    with pytest.raises(ConfigError, match="started with other settings.*seed"):
        plan.make(asked, {"seed": 4}, work)


def test_what_the_user_chose():
    loop = LoopConfig(work_dir="run", teacher_steps=5)
    settings = Config().override(optimizer="rmsprop", train_steps=9)
    mark_given(settings, ["optimizer", "train_steps"])
    frame = PicturesConfig(labeled="a", unlabeled="b", control=True, held_out=0.5)
    assert plan.chosen_by_user(frame, settings, loop) == {
        "held_out": 0.5,
        "optimizer": "rmsprop",
        "train_steps": 9,
        "teacher_steps": 5,
    }
    with pytest.raises(ConfigError, match="--task_name=digits cannot be combined with --labeled"):
        plan.chosen_by_user(frame, Config().override(task_name="digits"), LoopConfig())


@pytest.mark.parametrize(
    "training, looping, message",
    [
        ({"init_model": True}, {}, "--init_model cannot .* name the weights with --init_weights"),
        ({"init_model_path": "runs/a"}, {}, "--init_model_path cannot be combined with --labeled"),
        ({}, {"finetune_resolution": 300}, "--finetune_resolution cannot be .* with main.py"),
    ],
)
def test_other_starts_and_fine_tuning_are_refused(training, looping, message):
    frame = PicturesConfig(labeled="a", unlabeled="b")
    with pytest.raises(ConfigError, match=message):
        plan.chosen_by_user(frame, Config().override(**training), LoopConfig(**looping))


@pytest.mark.parametrize("name, value", [("dry_run", True), ("test", "t"), ("time_limit", "1h")])
def test_flags_of_pictures_need_pictures(name, value, monkeypatch):
    monkeypatch.setattr(one_command.rounds, "run_loop", lambda *_: pytest.fail("trained"))
    with pytest.raises(ConfigError, match=f"--{name} requires --labeled and --unlabeled"):
        one_command.run(PicturesConfig(**{name: value}), Config(), LoopConfig(work_dir="run"))


@pytest.mark.parametrize(
    "text, seconds", [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("1h30m", 5400)]
)
def test_times(text, seconds):
    assert plan.seconds_of(text) == seconds


def test_a_time_of_another_form():
    with pytest.raises(ConfigError, match="--time_limit=30: expected a time such as 30m"):
        plan.seconds_of("30")


def test_one_class_and_sets_for_classes(tmp_path):
    class_folders(tmp_path / "one", {"cats": 3, "empty": 0})
    class_folders(tmp_path / "sets" / "train", {"a": 2, "b": 2})
    class_folders(tmp_path / "sets" / "test", {"a": 1, "b": 1})
    with pytest.raises((ConfigError, DataError), match="only one class"):
        plan.make(pictures(tmp_path, labeled=str(tmp_path / "one")), {}, "")
    with pytest.raises(DataError) as refused:
        plan.make(pictures(tmp_path, labeled=str(tmp_path / "sets")), {}, "")
    assert f"--labeled={tmp_path}/sets/train" in str(refused.value)
    assert "accept_classes" not in str(refused.value)


def test_folders_without_classes(tmp_path):
    class_folders(tmp_path / "apple" / "deep" / "64", {"": 3})
    class_folders(tmp_path / "photos", {"": 3})
    with pytest.raises(DataError, match="folders below it; expected a folder per class$"):
        plan.make(pictures(tmp_path, labeled=str(tmp_path)), {}, "")
    for flag in ("labeled", "test"):
        with pytest.raises(DataError, match="could be classes: expected a folder per class$"):
            plan.make(pictures(tmp_path, **{flag: str(tmp_path / "photos")}), {}, "")


def test_sets_in_an_archive(tmp_path):
    for name in ("train", "val"):
        class_folders(tmp_path / "photos" / "my set" / name, {"a": 2, "b": 2})
    archive = shutil.make_archive(str(tmp_path / "photos"), "zip", tmp_path / "photos")
    unpacked = "--labeled='<folder where the archive is unpacked>/my set/train'"
    with pytest.raises(DataError, match=f"sets, not classes.*Pass one of them: {unpacked}"):
        plan.make(pictures(tmp_path, labeled=archive), {}, "")


def test_sets_without_classes(tmp_path):
    place = tmp_path / r"back\d"
    class_folders(place / "train", {"": 3})
    class_folders(place / "test", {"": 3})
    with pytest.raises(DataError, match="are sets, not classes: test, train; expected a folder"):
        plan.make(pictures(tmp_path, labeled=str(place)), {}, "")
    class_folders(place / "val", {"a": 2, "b": 2})
    with pytest.raises(DataError, match=r"Pass one of them: --labeled='.*/back\\d/val'$"):
        plan.make(pictures(tmp_path, labeled=str(place)), {}, "")


def test_a_test_picture_of_another_class(folder, tmp_path):
    class_folders(tmp_path / "other", {"blue": 2, "zebra": 2})
    with pytest.raises(DataError, match="class 'zebra' in .* is not one of the 2 known classes: "):
        plan.make(pictures(folder, test=str(tmp_path / "other")), {}, "")


def test_unknown_models_of_pictures(tmp_path):
    frame = pictures(tmp_path, dry_run=True)
    loop = LoopConfig(models="efficientnet-b9,efficientnet-b0")
    with pytest.raises(ConfigError, match="^--models=.*: unknown model 'efficientnet-b9'"):
        one_command.run(frame, Config(), loop)


def test_pictures_or_records_are_needed():
    with pytest.raises(ConfigError, match="--labeled and --unlabeled .pictures. and --work_dir"):
        one_command.run(PicturesConfig(), Config(), LoopConfig())


def test_places_are_needed():
    with pytest.raises(ConfigError, match="--unlabeled is required"):
        one_command.run(PicturesConfig(labeled="x"), Config(), LoopConfig(work_dir="run"))
    with pytest.raises(ConfigError, match="--work_dir is required"):
        frame = PicturesConfig(labeled="x", unlabeled="y")
        one_command.run(frame, Config(), LoopConfig())
    with pytest.raises(DataError, match="nowhere does not exist"):
        plan.make(PicturesConfig(labeled="nowhere", unlabeled="y"), {}, "")
