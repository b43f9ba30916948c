"""What the benchmark of exported models measures, and that it restores the environment."""

from __future__ import annotations

import os

import numpy as np
import pytest

from efficientnet_ns.benchmarks import serving, tables
from efficientnet_ns.config import BenchmarkConfig
from efficientnet_ns.inference import folding
from efficientnet_ns.models import efficientnet


def test_every_situation_is_measured(monkeypatch):
    monkeypatch.setattr(serving, "available_cpus", lambda: 4)
    named = [str(s) for s in serving._situations(BenchmarkConfig())]
    assert named == ["4 threads, oneDNN on", "1 thread, oneDNN on", "4 threads, oneDNN off"]
    named = [str(s) for s in serving._situations(BenchmarkConfig(threads=1))]
    assert named == ["1 thread, oneDNN on", "1 thread, oneDNN off"]


def test_environment_is_put_back(monkeypatch):
    monkeypatch.setenv("ONE", "before")
    monkeypatch.delenv("TWO", raising=False)
    with tables.environment(ONE="1", TWO="2"):
        assert (os.environ["ONE"], os.environ["TWO"]) == ("1", "2")
    assert os.environ["ONE"] == "before" and "TWO" not in os.environ


def test_ratios_are_against_the_peer_of_the_same_turns():
    def images(number):
        return lambda: number

    work = {serving._NONE: images(1), serving._CPU: images(1000), serving._KERAS: images(1)}
    rows = serving._throughput(work, ", batch 1", 0.05)
    ratios = {row.name: (row.ratio, row.peer) for row in rows}
    assert ratios[f"{serving._NONE}, batch 1"] == (None, "")
    ratio, peer = ratios[f"{serving._CPU}, batch 1"]
    assert peer == serving._NONE and ratio > 100
    assert all(row.spread >= 0 for row in rows)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_a_batch_is_divided_among_interpreters(monkeypatch, batch):
    """Each image is computed once, whatever the number of interpreters."""
    computed = []

    def runner(content, threads):
        return lambda pixels: computed.append(pixels) or pixels

    monkeypatch.setattr(serving.lite_files, "runner", runner)
    pixels = np.arange(batch)[:, None]
    assert serving._lite(b"", 3)(pixels) == batch
    assert len(computed) == min(batch, 3) and max(map(len, computed)) == -(-batch // 3)
    np.testing.assert_array_equal(sorted(np.concatenate(computed)), pixels)


def test_the_measured_model_has_no_bias_that_could_be_left_out():
    model = efficientnet.build_model("efficientnet-test", 3, 32)
    serving._shift(model)
    folded = folding.fold_batch_norm(model)
    biases = [v.numpy() for v in folded.variables if v.name.endswith("/bias:0")]
    assert len(biases) > 10 and all((bias != 0).all() for bias in biases)
