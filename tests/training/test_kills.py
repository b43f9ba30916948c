"""`python -m efficientnet_ns.main`, killed repeatedly, gives the bits of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes import ROOT, assert_same_training, noised, write_data

from efficientnet_ns.config import Config
from efficientnet_ns.files import json_files, metrics_log
from efficientnet_ns.training import claim

LOOP = 5  # Steps per host loop.


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("kills")
    write_data(path)
    return path


def student(folder: Path, name: str, steps: int, **values) -> Config:
    """All kinds of noise; saves every second host loop and evaluates every third."""
    return noised(
        folder,
        name,
        train_steps=steps,
        iterations_per_loop=LOOP,
        save_checkpoints_steps=2 * LOOP,
        steps_per_eval=3 * LOOP,
        base_learning_rate=0.05,
        keep_checkpoint_max=2,
        **values,
    )


def start(config: Config) -> subprocess.Popen:
    """Starts the program with the flags of `config`."""
    defaults = Config().values()
    flags = [f"--{k}={v}" for k, v in config.values().items() if v != defaults[k]]
    return subprocess.Popen(
        [sys.executable, "-m", "efficientnet_ns.main", *flags],
        cwd=ROOT,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def last_step(model_dir: str) -> int:
    rows = metrics_log.read_metrics(model_dir)
    return rows[-1]["step"] if rows else 0


def kill_somewhere(config: Config, rng: random.Random, number=signal.SIGKILL) -> int:
    """Starts the program, kills it at start-up or after a few rows, and returns its exit code."""
    before = last_step(config.train.model_dir)
    further = rng.randint(0, 3) * LOOP
    process = start(config)
    if further == 0:
        time.sleep(rng.uniform(0, 6))
    while further and process.poll() is None:
        if last_step(config.train.model_dir) >= before + further:
            break
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.1))
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (-number, 75), errors
    return process.returncode


@pytest.mark.slow
def test_thirty_kills(folder):
    rng, kills, steps = random.Random(0), 30, 1500
    config = student(folder, "often", steps)
    for number in range(kills):
        kill_somewhere(config, rng)
        reached = last_step(config.train.model_dir)
        print(f"kill {number + 1} of {kills}: step {reached} of {steps}")
        assert reached < steps
    process = start(config)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    whole = student(folder, "never", steps)
    process = start(whole)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert_same_training(config.train.model_dir, whole.train.model_dir, steps)
    assert len(json_files.read_json_lines(f"{config.train.model_dir}/{claim.RUNS}")) > kills // 2
