"""What hosts read at scale, computed by the planning code of training."""

from __future__ import annotations

import pytest

from efficientnet_ns.benchmarks import scale
from efficientnet_ns.config import BenchmarkConfig, ConfigError

MB = 1e6


def test_a_host_reads_its_part(monkeypatch):
    monkeypatch.setenv("GCS_READ_CACHE_BLOCK_SIZE_MB", "1")
    options = BenchmarkConfig(
        what="scale",
        model_name="efficientnet-test",
        hosts=8,
        files=512,
        records=400_000,
        record_bytes=100_000,
        batch_size=64,
    )
    rows = {row.name: row for row in scale.run(options)}
    epoch = rows["epoch, bytes"]
    assert epoch.value == pytest.approx(400_000 * 0.1 / 8, rel=0.02)
    assert 1 <= epoch.ratio <= 1.02
    steps = 400_000 // 64
    assert rows["step, bytes"].value == pytest.approx(epoch.value / steps)
    # Each of 8 streams reads at most a window and the part of its file before the window.
    assert rows["resume, most, bytes"].value <= 8 * (157 * 0.1 + 400_000 / 512 * 0.1)
    # The sidecar and a one-page listing.
    assert rows["start, counts known, requests"].value == 3
    listed = rows["start, nothing known (first worker, once), bytes"].value - 40_000
    assert listed == pytest.approx(512 * 100 / MB)
    assert rows["predict, start, requests"].value == 6


def test_a_set_of_a_single_batch(monkeypatch):
    monkeypatch.setattr(scale, "_RESUMES", 1)
    monkeypatch.setattr(scale, "_checkpoint_bytes", lambda model_name: 1)
    options = BenchmarkConfig(
        what="scale",
        model_name="efficientnet-test",
        hosts=1,
        files=4,
        records=64,
        record_bytes=1000,
        batch_size=64,
    )
    rows = {row.name: row.value for row in scale.run(options)}
    assert 0 < rows["resume, most, bytes"] <= rows["epoch, bytes"]


def test_hosts_that_do_not_divide_the_batch():
    with pytest.raises(ConfigError, match="--batch_size=1024 is not divisible by --hosts=3"):
        scale.run(BenchmarkConfig(what="scale", hosts=3, batch_size=1024))
