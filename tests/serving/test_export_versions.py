"""Versions of an export: targets, files, numbers, and killed exports."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tensorflow as tf
from served_models import (
    NAMES,
    OPTIONS,
    PREPROCESSING,
    Session,
    elsewhere,
    expected,
    jpeg,
    noise,
)

from efficientnet_ns.serving import deployment, export, warmup
from efficientnet_ns.serving.signatures import OutputSpec


@pytest.mark.slow
@pytest.mark.parametrize("target", ["accelerator", "none"])
def test_other_targets_answer_the_same(model, target, tmp_path):
    options = export.Options(OutputSpec(NAMES), target)
    export.export(model, PREPROCESSING, str(tmp_path), 4, options)
    answer = Session(str(tmp_path / "4"))("serving_default", image_bytes=[jpeg()])
    np.testing.assert_allclose(answer["probabilities"], expected(model, [jpeg()]), atol=1e-5)


@pytest.mark.slow
def test_saved_model_cli(base, tmp_path):
    cli = [str(Path(sys.executable).with_name("saved_model_cli"))]
    shown = elsewhere([*cli, "show", "--dir", str(base / "1"), "--all"], tmp_path).stdout
    for name in ("serving_default", "predict_images", "features", "classify"):
        assert f"signature_def['{name}']" in shown
    np.save(tmp_path / "images.npy", noise()[None])
    call = ["run", "--dir", str(base / "1"), "--tag_set", "serve"]
    call += ["--signature_def", "predict_images_uint8", "--inputs", "images=images.npy"]
    assert "Result for output key probabilities" in elsewhere([*cli, *call], tmp_path).stdout


def test_files_of_a_version(base):
    assert (base / "1" / "assets" / "labels.txt").read_text().split() == list(NAMES)
    card = (base / "1" / "README.md").read_text()
    assert "efficientnet-test, version 1" in card and "| `classify` |" in card
    assert {path.name for path in (base / "deploy").iterdir()} == set(deployment.texts("m"))


def test_next_version(base, tmp_path):
    assert export.next_version(str(base)) == 2
    assert export.next_version(str(tmp_path / "none")) == 1


def test_version_appears_after_its_deployment_files(model, tmp_path, monkeypatch):
    """An export that is killed before writing them is repeated completely."""

    def killed(*unused):
        raise KeyboardInterrupt

    # The saved content does not matter here.
    monkeypatch.setattr(export, "Classifier", Mock())
    monkeypatch.setattr(tf.saved_model, "save", lambda *unused, **options: None)
    monkeypatch.setattr(export, "_set_classify_method", lambda folder: None)
    monkeypatch.setattr(warmup, "write", lambda *unused: None)
    monkeypatch.setattr(deployment, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        export.export(model, PREPROCESSING, str(tmp_path), 1, OPTIONS)
    assert export.next_version(str(tmp_path)) == 1


SLOW_EXPORT = """
import sys
from efficientnet_ns.data.pipeline import Preprocessing
from efficientnet_ns.models import efficientnet
from efficientnet_ns.serving import export
model = efficientnet.build_model("efficientnet-test", 5, 32)
print("go", flush=True)
while True:
    version = export.next_version(sys.argv[1])
    export.export(model, Preprocessing(32), sys.argv[1], version)
    print(version, flush=True)
"""


@pytest.mark.slow
def test_killed_exports_leave_complete_versions_only(tmp_path, rng, model):
    for _ in range(4):
        worker = subprocess.Popen(
            [sys.executable, "-c", SLOW_EXPORT, str(tmp_path)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
        )
        assert worker.stdout.readline() == b"go\n"
        time.sleep(rng.uniform(0.5, 8))  # At a random moment of an export.
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        for version in (path for path in tmp_path.iterdir() if path.name.isdigit()):
            assert Session(str(version))("serving_default", image_bytes=[jpeg()])["valid"][0]
            assert (version / warmup.FILE).exists() and (version / "README.md").exists()
    number = export.next_version(str(tmp_path))
    export.export(model, PREPROCESSING, str(tmp_path), number, OPTIONS)
    assert number > 1 and not list(tmp_path.glob(".tmp-*"))
