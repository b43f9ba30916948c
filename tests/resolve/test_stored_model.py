"""A trained model knows its settings: omitted settings are read from next to the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from efficientnet_ns.config import Config, ConfigError
from efficientnet_ns.data import tasks
from efficientnet_ns.models import weights
from efficientnet_ns.resolve import stored_model
from efficientnet_ns.resolve.resolved_config import ResolvedConfig
from efficientnet_ns.training import claim

NAMES = ("daisy", "rose", "tulip")
MEAN = (0.5, 0.25, 0.125)


def write_task(path: Path, **values) -> str:
    fields = {"num_classes": 3, "class_names": NAMES, "mean": MEAN, "eval_set": "dev"}
    tasks.write_task(path, **{**fields, "image_size": 24, "small_image": True, **values})
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a finished training run whose task file was deleted afterwards."""
    folder = tmp_path_factory.mktemp("training")
    task = write_task(folder / "their_task.json")
    config = Config().override(
        model_name="efficientnet-test",
        width_coefficient=0.5,
        dropout_rate=0.3,
        crop_fraction=0.875,
        task_name=task,
        label_data_dir="records",
        model_dir=str(folder / "run"),
    )
    claim.claim(ResolvedConfig.from_config(config).config, {})
    model = ResolvedConfig.from_config(config).build_model()
    weights.save_weights(model, folder / "run" / "model.ckpt-4")
    Path(task).unlink()
    return folder / "run"


def test_nothing_is_given(run):
    for path in (run, run / "model.ckpt-4", f"{run}/"):
        resolved = ResolvedConfig.from_config(Config(), path)
        model = resolved.config.model
        assert (model.model_name, model.width_coefficient) == ("efficientnet-test", 0.5)
        assert model.dropout_rate == 0.3
        assert resolved.config.data.crop_fraction == 0.875
        assert (resolved.image_size, resolved.small_image, resolved.num_classes) == (24, True, 3)
        assert resolved.task == tasks.Task(
            3,
            MEAN,
            (0.229, 0.224, 0.225),
            image_size=24,
            small_image=True,
            eval_set="dev",
            class_names=NAMES,
        )
        weights.load_weights(resolved.build_model(), path)
    assert stored_model.labeled_dir(run) == "records"


def test_flags_override(run, tmp_path):
    task = write_task(tmp_path / "t.json", mean=(0, 0, 0), small_image=False, eval_set="validation")
    given = Config().override(input_image_size=32, task_name=task, dropout_rate=0.1)
    resolved = ResolvedConfig.from_config(given, run)
    assert (resolved.image_size, resolved.config.model.dropout_rate) == (32, 0.1)
    # Pixels are normalized and cropped as the model requires, regardless of the data set.
    assert (resolved.task.eval_set, resolved.task.mean) == ("validation", MEAN)
    assert resolved.small_image


def test_conflicts(run, tmp_path):
    with pytest.raises(ConfigError, match="--model_name=efficientnet-b1, but .* efficientnet-test"):
        ResolvedConfig.from_config(Config().override(model_name="efficientnet-b1"), run)
    five = write_task(tmp_path / "five.json", num_classes=5, class_names=None)
    with pytest.raises(ConfigError, match="five.json has 5 classes, but the model in .* has 3"):
        ResolvedConfig.from_config(Config().override(task_name=five), run)
    with pytest.raises(ConfigError, match="--num_label_classes=7"):
        ResolvedConfig.from_config(Config().override(num_label_classes=7), run)
    with pytest.raises(ConfigError, match="unknown task 'gone.json'"):
        ResolvedConfig.from_config(Config().override(task_name="gone.json"), run)


def test_the_default_size_may_be_given(run):
    """`--model_name=efficientnet-b0` is not the same as omitting the flag."""
    with pytest.raises(ConfigError, match="--model_name=efficientnet-b0"):
        ResolvedConfig.from_config(Config().override(model_name="efficientnet-b0"), run)


def test_trainings_from_before_the_task_was_noted(run, tmp_path):
    for name in ("config.json", "model.json"):
        (tmp_path / name).write_text((run / name).read_text())
    stored = stored_model.read(tmp_path)
    assert stored.task.num_classes == 3 and stored.task.mean == MEAN
    assert ResolvedConfig.from_config(Config(), tmp_path).num_classes == 3


def test_a_file_of_weights(run, tmp_path):
    """Its metadata applies; a config.json next to it belongs to another program."""
    model = ResolvedConfig.from_config(Config(), run).build_model()
    weights.save_weights(model, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text("{}")
    stored = stored_model.read(tmp_path / "a.safetensors")
    assert (stored.variant, stored.settings, stored.task) == ("efficientnet-test", {}, None)
    assert stored.images["image_size"] == 24


def test_weights_without_description(tmp_path):
    (tmp_path / "config.json").write_text('{"model_name": "of another program"}')
    assert stored_model.read(tmp_path) == stored_model.StoredModel(str(tmp_path))
    assert stored_model.read(tmp_path / "none.h5").images == {}


def test_last_model_of_a_loop(tmp_path):
    def stages(*names: str) -> str:
        content = {"settings": {}, "stages": dict.fromkeys(names, {})}
        (tmp_path / "state.json").write_text(json.dumps(content))
        return stored_model.find(tmp_path)

    teacher = "round 0: teacher efficientnet-b0"
    student = "round 1: student efficientnet-b0"
    assert stages(teacher, f"{teacher}: measure", "round 1: predict") == f"{tmp_path}/round-0/model"
    assert stages(teacher, student) == f"{tmp_path}/round-1/model"
    tuned = "round 1: fine-tune efficientnet-b0 at 800"
    assert stages(teacher, student, tuned) == f"{tmp_path}/round-1/finetuned-800"
    with pytest.raises(ConfigError, match="no finished model yet"):
        stages()


def test_best_model_of_the_command_for_pictures(tmp_path):
    """Its rounds are in a work_dir nested in its own."""

    def write(folder: Path, **stages) -> str:
        folder.mkdir(exist_ok=True)
        (folder / "state.json").write_text(json.dumps({"settings": {}, "stages": stages}))
        return stored_model.find(tmp_path)

    with pytest.raises(ConfigError, match="no finished model yet"):
        write(tmp_path, probe={})
    rounds = tmp_path / "rounds"
    finished = {f"round {r}: student efficientnet-lite0": {} for r in (1, 2)}
    assert write(rounds, **finished) == f"{rounds}/round-2/model"
    assert write(tmp_path, **{stored_model.BEST: {"round": 1}}) == f"{rounds}/round-1/model"


def test_latest_version_of_an_export(tmp_path):
    for version in ("2", "10", "other"):
        (tmp_path / version / "assets").mkdir(parents=True)
        (tmp_path / version / "assets" / "labels.txt").touch()
        (tmp_path / version / "saved_model.pb").touch()
    (tmp_path / "11").mkdir()
    assert stored_model.find(tmp_path) == str(tmp_path / "10")
    assert stored_model.read(tmp_path).exported


def test_imagenet_keeps_its_class_names(tmp_path):
    task = tasks.get_task("imagenet")
    stored = stored_model.StoredModel(images={"mean": [0.5, 0.5, 0.5]})
    fitted = stored.fit(task, "imagenet")
    assert fitted.mean == (0.5, 0.5, 0.5) and fitted.class_names[0] == tasks.class_names(task)[0]


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"model_dir": "run"}, "run"),
        ({"init_model_path": "x.h5"}, "x.h5"),
        ({"init_model_path": "x.h5", "model_dir": "run"}, "x.h5"),
        ({"init_model_path": "x.h5", "model_dir": "run", "init_model": True}, "run"),
        ({"init_model_path": "x.h5", "init_model": True}, "x.h5"),
        ({}, ""),
    ],
)
def test_what_a_training_starts_from_is_not_its_model(values, expected):
    assert stored_model.weights_of(Config().override(**values).train) == expected
