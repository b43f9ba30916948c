"""Tasks: the constants of the original, and tasks described by a file."""

from __future__ import annotations

import dataclasses
import json

import pytest

from efficientnet_ns.data import tasks


def test_imagenet():
    task = tasks.get_task("imagenet")
    assert (task.num_classes, task.num_train_images) == (1000, 1281167)
    assert task.mean == (0.485, 0.456, 0.406)
    assert task.std == (0.229, 0.224, 0.225)
    assert (task.train_set, task.eval_set, task.test_set) == ("train", "validation", None)
    assert task.image_size is None and task.flip and not task.small_image


def test_svhn():
    task = tasks.get_task("svhn")
    assert (task.num_classes, task.num_train_images) == (10, 69257)
    assert task.mean == (0.4376821, 0.4437697, 0.47280442)
    assert task.std == (0.19803012, 0.20101562, 0.19703614)
    assert (task.train_set, task.eval_set, task.test_set) == ("train", "dev", "test")
    assert task.image_size == 32 and task.small_image
    assert not task.flip, "a mirrored 2 is not a 2"


def test_digits_have_the_statistics_of_their_images():
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    pixels = sklearn_datasets.load_digits().images / 16
    task = tasks.get_task("digits")
    assert task.mean == pytest.approx([pixels.mean()] * 3, abs=0.005)
    assert task.std == pytest.approx([pixels.std()] * 3, abs=0.03)
    assert task.num_classes == 10 and task.image_size == 16 and not task.flip


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_task_is_consistent(name):
    task = tasks.TASKS[name]
    assert task.class_names is None or len(task.class_names) == task.num_classes
    assert len(task.mean) == len(task.std) == 3
    assert all(0 < m < 1 for m in task.mean) and all(0 < s < 1 for s in task.std)
    assert len({task.train_set, task.eval_set, task.test_set}) == 3


def write(tmp_path, fields) -> str:
    path = tmp_path / "task.json"
    path.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return str(path)


def test_task_from_a_file(tmp_path):
    fields = {
        "num_classes": 3,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "image_size": 48,
        "flip": False,
        "eval_set": "val",
        "num_train_images": 12,
        "class_names": ["a", "b", "c"],
    }
    task = tasks.get_task(write(tmp_path, fields))
    assert isinstance(task, tasks.Task) and hash(task)
    expected = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    defaults = {"small_image": False, "train_set": "train", "test_set": None}
    assert dataclasses.asdict(task) == {**defaults, **expected}


def test_smallest_task_file_is_like_imagenet(tmp_path):
    task = tasks.get_task(write(tmp_path, {"num_classes": 5}))
    imagenet = tasks.get_task("imagenet")
    assert task == dataclasses.replace(imagenet, num_classes=5, num_train_images=None)


def test_unknown_task_lists_the_known(tmp_path):
    for name in ("imagent", "", str(tmp_path), str(tmp_path / "absent.json")):
        with pytest.raises(ValueError) as e:
            tasks.get_task(name)
        for part in (repr(name), *tasks.TASKS, ".json"):
            assert part in str(e.value)


def test_unknown_field_is_named(tmp_path):
    path = write(tmp_path, {"num_classes": 5, "meen": [0, 0, 0]})
    with pytest.raises(ValueError, match="meen") as e:
        tasks.get_task(path)
    assert path in str(e.value) and "'mean'" in str(e.value)


def test_number_of_classes_is_required(tmp_path):
    path = write(tmp_path, {"flip": False})
    with pytest.raises(ValueError, match="num_classes is required") as e:
        tasks.get_task(path)
    assert path in str(e.value)


def test_broken_file_is_named(tmp_path):
    path = write(tmp_path, '{"num_classes": 5')
    with pytest.raises(ValueError, match=path):
        tasks.get_task(path)


def test_path_of_a_task_file(tmp_path):
    tasks.write_task(tmp_path / "task.json", num_classes=2, class_names=("a", "b"))
    assert tasks.get_task(tmp_path / "task.json").num_classes == 2
    assert tasks.class_names(tmp_path / "task.json") == ("a", "b")
