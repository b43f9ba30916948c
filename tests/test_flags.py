"""Every preset under flags/ parses, describes a buildable model, and says what it is."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest
import tensorflow as tf
from absl import flags

from efficientnet_ns import config, demo
from efficientnet_ns.config import Config, LoopConfig
from efficientnet_ns.experiment import Experiment
from efficientnet_ns.models import efficientnet

ROOT = Path(__file__).parent.parent
PRESETS = sorted(ROOT.glob("flags/**/*.flags"), key=str)


def parse(preset: Path, monkeypatch) -> tuple[Config, LoopConfig]:
    monkeypatch.chdir(ROOT)  # Nested --flagfile paths are relative to the current folder.
    values = flags.FlagValues()
    for cls in (Config, LoopConfig):
        config.define_flags(cls, flag_values=values)
    rest = values(["program", f"--flagfile={preset.relative_to(ROOT)}"])
    assert rest == ["program"]
    return config.from_flags(Config, values), config.from_flags(LoopConfig, values)


def test_there_are_presets_for_every_published_model():
    names = {p.stem for p in PRESETS if p.parent.name == "model"}
    assert names == {name.split("-")[1] for name in efficientnet.VARIANTS} - {"test"}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: str(p.relative_to(ROOT / "flags")))
def test_preset(preset, monkeypatch):
    lines = preset.read_text().splitlines()
    assert lines[0].startswith("# ")
    for line in lines:
        # A comment after a value would silently become part of it, an indented one an argument.
        assert "#" not in line[1:] and line == line.strip()
    settings, _ = parse(preset, monkeypatch)
    experiment = Experiment.from_config(settings)
    if settings.model.model_name not in ("efficientnet-b7", "efficientnet-l2"):
        with tf.Graph().as_default():
            assert experiment.build_model().output_shape == (None, experiment.num_classes)


def test_digits_preset_is_the_loop_of_the_demo(monkeypatch):
    settings, loop = parse(ROOT / "flags/run/digits/noisy_student.flags", monkeypatch)
    expected, expected_loop = demo.settings(demo.DemoConfig())
    assert settings.identity() == expected.identity()
    assert settings.train.steps_per_eval == expected.train.steps_per_eval
    assert dataclasses.replace(loop, work_dir="") == dataclasses.replace(expected_loop, work_dir="")


@pytest.mark.parametrize("command", ["create", "setup", "train --mode=train", "logs", "delete"])
def test_tpu_script_prints_its_commands(command):
    script = ROOT / "tpu_scripts/tpu_vm.sh"
    environment = {**os.environ, "TPU_NAME": "my-tpu", "ZONE": "us-central2-b"}
    printed = subprocess.run(
        [script, "--dry_run", *command.split()], env=environment, text=True, capture_output=True
    )
    assert printed.returncode == 0, printed.stderr
    assert "my-tpu" in printed.stdout and "--zone=us-central2-b" in printed.stdout


def test_tpu_script_says_what_is_missing():
    script = ROOT / "tpu_scripts/tpu_vm.sh"
    environment = {k: v for k, v in os.environ.items() if k != "TPU_NAME"}
    failed = subprocess.run([script, "create"], env=environment, text=True, capture_output=True)
    assert failed.returncode != 0 and "TPU_NAME" in failed.stderr
