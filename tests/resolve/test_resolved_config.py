"""How task and variant together determine the models of a run."""

from __future__ import annotations

import json

import pytest
import tensorflow as tf

from efficientnet_ns.config import Config, ConfigError
from efficientnet_ns.files import tfexamples, tfrecords
from efficientnet_ns.models import complexity, heads
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

LITE = {"mean": [127 / 255] * 3, "std": [128 / 255] * 3}
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
OWN = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


pytestmark = pytest.mark.usefixtures("small_lite")


def normalizations(tmp_path, student: str, teacher: str, **task) -> list[dict]:
    """Returns `mean` and `std` of the student and of the on-the-fly teacher."""
    path = tmp_path / "task.json"
    path.write_text(json.dumps({"num_classes": 5, "image_size": 32, **task}))
    config = Config().override(
        task_name=str(path), model_name=student, teacher_model_name=teacher, teacher_image_size=32
    )
    resolved = ResolvedConfig.from_config(config)
    with tf.Graph().as_default():
        models = [resolved.build_model(), resolved.build_teacher()]
        found = [heads.settings(model) for model in models]
    for model in models:
        complexity.restore_classes(model)
    return [{name: one[name] for name in ("mean", "std")} for one in found]


@pytest.mark.parametrize(
    "student, teacher, expected",
    [
        ("efficientnet-lite0", "efficientnet-test", [LITE, IMAGENET]),
        ("efficientnet-test", "efficientnet-lite0", [IMAGENET, LITE]),
    ],
)
def test_each_model_keeps_its_own_normalization(tmp_path, student, teacher, expected):
    assert normalizations(tmp_path, student, teacher) == expected


def test_normalization_that_the_task_states_is_every_models(tmp_path):
    found = normalizations(tmp_path, "efficientnet-lite0", "efficientnet-test", **OWN)
    assert found == [OWN, OWN]
    mean = {"mean": OWN["mean"]}
    found = normalizations(tmp_path, "efficientnet-lite0", "efficientnet-test", **mean)
    assert found == [{**LITE, **mean}, {**IMAGENET, **mean}]


@pytest.mark.parametrize("name, size", [("efficientnet-lite1", 240), ("efficientnet-lite4", 300)])
def test_image_size_of_lite_is_its_resolution(name, size):
    assert ResolvedConfig.from_config(Config().override(model_name=name)).image_size == size


def test_evaluation_and_test_set_have_limits_of_their_own(tmp_path):
    task, examples = tmp_path / "task.json", [tfexamples.labeled_example(b"not decoded here", 0)]
    task.write_text(json.dumps({"num_classes": 5, "eval_set": "dev", "test_set": "test"}))
    for prefix in ("dev", "test"):
        tfrecords.write_sharded(str(tmp_path), prefix, examples * 6, 2)
    config = Config().override(task_name=str(task), label_data_dir=str(tmp_path))

    def totals(**limits) -> list[int]:
        resolved = ResolvedConfig.from_config(config.override(**limits))
        sets = (("dev", "num_eval_images"), ("test", "num_test_images"))
        return [resolved.evaluation_source(*one).total for one in sets]

    assert totals(num_test_images=4) == [6, 4]
    assert totals(num_eval_images=5) == [5, 6]
    with pytest.raises(ConfigError, match="--num_test_images=7: "):
        totals(num_test_images=7)


def test_task_next_to_the_records_is_not_overlooked(tmp_path):
    """Otherwise, the default task would assign ImageNet's classes to the records."""
    path = tmp_path / "task.json"
    path.write_text('{"num_classes": 3}')
    config = Config().override(label_data_dir=f"{tmp_path}/other;{tmp_path}")
    with pytest.raises(ConfigError, match=f"{path} describes 3 classes.*add --task_name={path}"):
        ResolvedConfig.from_config(config)
    assert ResolvedConfig.from_config(config.override(task_name=str(path))).num_classes == 3
    assert ResolvedConfig.from_config(config.override(task_name="imagenet")).num_classes == 1000
    path.write_text('{"num_classes": 1000}')
    assert ResolvedConfig.from_config(config).num_classes == 1000
