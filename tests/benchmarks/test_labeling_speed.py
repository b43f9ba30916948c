"""The labeling benchmark: shards that last long enough, and Keras without oneDNN."""

from __future__ import annotations

import os

import pytest
import tensorflow as tf

from efficientnet_ns.benchmarks import labeling, tables
from efficientnet_ns.config import BenchmarkConfig, ConfigError, cpus
from efficientnet_ns.files import shard_names, tfrecords


def test_after_a_short_shard_comes_one_that_lasts(tmp_path, rng):
    images = [tf.io.encode_png(rng.integers(0, 256, (8, 8, 3), "uint8")).numpy() for _ in range(3)]
    config = BenchmarkConfig(model_name="efficientnet-test", image_size=8, seconds=1.0)
    work = labeling._Work(config, images, str(tmp_path), {"inference_engine": "xnnpack"})
    assert work.label_shard() == 64
    shard = str(tmp_path / "unlabeled" / shard_names.shard_name("train", 0, 1))
    expected = tfrecords.count(shard)
    assert expected >= 64
    assert work.label_shard() == work.label_shard() == expected
    assert work.bare_engine() == 8 * len(work._ready) * work.teacher.engine.concurrency


def test_everybody_works_in_each_turn():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) or 5 for name in "ab"}
    measured = tables.measure(contenders, seconds=0.0, turns=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"  # The first turn warms up.
    assert set(measured.turns) == {"a", "b"} and min(measured.rate("a"), measured.rate("b")) > 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux can limit the cores")
def test_threads_limit_all_contenders(monkeypatch):
    seen = []
    monkeypatch.setattr(labeling, "_run", lambda config: seen.append(cpus.available_cpus()))
    before = os.sched_getaffinity(0)
    labeling.run(BenchmarkConfig(threads=1))
    labeling.run(BenchmarkConfig())
    assert seen == [1, cpus.available_cpus()] and os.sched_getaffinity(0) == before
    with pytest.raises(ConfigError, match=f"--threads={len(before) + 1}: there are only"):
        labeling.run(BenchmarkConfig(threads=len(before) + 1))


def test_a_ratio_compares_within_the_turns():
    # The machine is twice as fast in the last turn, and another process disturbs the second.
    measured = tables.Measured({"a": [12.0, 3.0, 24.0], "b": [10.0, 10.0, 20.0]})
    assert measured.rate("a") == 12.0 and measured.rate("b") == 10.0
    assert measured.ratio("a", "b") == pytest.approx(1.2)


def test_the_spread_is_of_the_turns():
    assert tables.Measured({"a": [9.0, 10.0, 12.0]}).spread("a") == pytest.approx(0.3)


def test_engines_are_compared_with_their_limits_and_with_peers():
    turns = {"predict, xnnpack": [8.0], "bare xnnpack": [10.0], "Keras": [4.0]}
    rows = labeling._ratios(tables.Measured(turns), ["xnnpack"])
    assert {row.peer: row.ratio for row in rows} == {"bare xnnpack": 0.8, "Keras": 2.0}
    turns.update({"predict, openvino": [12.0], "bare openvino": [16.0]})
    rows = labeling._ratios(tables.Measured(turns), ["xnnpack", "openvino"])
    found = {(row.name[9:], row.peer): row.ratio for row in rows}
    assert found["openvino", "predict, xnnpack"] == 1.5
    assert found["openvino", "bare openvino"] == 0.75 and found["xnnpack", "bare openvino"] == 0.5


def test_the_machine_is_named():
    line = tables.machine()
    assert (
        line.startswith(f"{cpus.available_cpus()} cores, ")
        and f"tensorflow {tf.__version__}" in line
    )


@pytest.mark.slow
def test_a_process_without_onednn(monkeypatch):
    monkeypatch.setenv(tables.ONEDNN, "1")
    monkeypatch.setattr(labeling, "_peer_works", _onednn_setting)
    pixels = tf.zeros([1, 224, 224, 3]).numpy()
    with labeling._without_onednn("efficientnet-b0", pixels) as work:
        assert os.environ[tables.ONEDNN] == "1"
        assert work() == "0"


def _onednn_setting() -> str:
    return os.environ.get(tables.ONEDNN, "")
