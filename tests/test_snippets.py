"""Runs the Python of README and docs unchanged, page by page, with the files that each expects."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from fakes import class_folders, flat_folder
from pages import PAGES

import efficientnet_ns as ns
from efficientnet_ns.config import Config, ExportConfig
from efficientnet_ns.models import weights
from efficientnet_ns.serving.model_export import export_model

SNIPPETS = {
    page: re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for page, text in PAGES.items()
}
Names = dict[str, Any]


def two_folders(monkeypatch: pytest.MonkeyPatch) -> Names:
    """Writes the page's two folders and shortens training."""
    class_folders(Path("photos"), {"red": 10, "blue": 10})
    flat_folder(Path("more_photos"), 12)
    quick = {
        "models": "efficientnet-test,efficientnet-test",
        "input_image_size": 16,
        "init_weights": "",
        "teacher_steps": 40,
        "train_steps": 20,
        "bn_momentum": 0.8,
        "moving_average_decay": 0.9,
        "min_threshold": 0.3,
        "augment_name": "none",
    }
    monkeypatch.setattr(ns, "noisy_student", functools.partial(ns.noisy_student, **quick))
    return {}


def photos_and_weights(_: pytest.MonkeyPatch) -> Names:
    """Writes photos and untrained weights."""
    flat_folder(Path("mine"), 5)
    paths = sorted(map(str, Path("mine").iterdir()))
    for name, path in (("photo.jpg", paths[0]), ("another.jpg", paths[1])):
        image = tf.io.decode_png(tf.io.read_file(path), channels=3)
        tf.io.write_file(name, tf.io.encode_jpeg(image))
    weights.save_weights(ns.build_model("efficientnet-b0"), "noisy_student_efficientnet-b0")
    return {"my_photos": paths, "my_labels": np.arange(5)}


def exported_digits(_: pytest.MonkeyPatch) -> Names:
    config = Config().override(
        model_name="efficientnet-test", task_name="digits", init_model_path="weights.safetensors"
    )
    model = ns.build_model("efficientnet-test", num_classes=10, image_size=20, small_image=True)
    ns.save_weights(model, "weights.safetensors")
    export_model(config, ExportConfig(export_dir="runs/export", version=1))
    tf.io.gfile.makedirs("runs/demo")
    pixels = tf.cast(tf.random.stateless_uniform([28, 28, 1], [1, 2]) * 255, tf.uint8)
    tf.io.write_file("runs/demo/test_image.png", tf.io.encode_png(pixels))
    return {}


PREPARED: dict[str, Callable[[pytest.MonkeyPatch], Names]] = {
    "docs/one_command.md": two_folders,
    "docs/published_models.md": photos_and_weights,
    "docs/serving.md": exported_digits,
}
PRINTED = {
    "docs/one_command.md": "student 1",
    "docs/published_models.md": " ",
    "docs/serving.md": "[",
}


# test_commands.py runs this page together with its commands.
ELSEWHERE = {"docs/any_teacher.md"}


def test_all_pages_with_python_are_here():
    pages = {page for page, found in SNIPPETS.items() if found}
    assert pages - ELSEWHERE == set(PREPARED) == set(PRINTED)


@pytest.mark.slow
@pytest.mark.parametrize("page", PREPARED)
def test_snippets(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = PREPARED[page](monkeypatch)
    for code in SNIPPETS[page]:
        exec(compile(code, page, "exec"), names)
    assert PRINTED[page] in capsys.readouterr().out
