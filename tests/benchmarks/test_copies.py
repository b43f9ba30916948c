"""The generated index has copies, and the search finds all of them and nothing else."""

from __future__ import annotations

import pytest

from efficientnet_ns.benchmarks import copies
from efficientnet_ns.config import BenchmarkConfig, ConfigError


def test_planted_copies_are_found(tmp_path):
    sets, planted = copies.make_sets(str(tmp_path), 25_600)
    # One percent of each of 128 shards of 200 images, for each kind of copy.
    assert planted == 2 * 128 * 2
    assert copies.find(sets) == (planted, 0)


def test_a_disk_that_is_too_small(tmp_path):
    config = BenchmarkConfig(what="copies", data=str(tmp_path), rows=10**12)
    with pytest.raises(ConfigError, match="--rows=1000000000000 need .* MB free: pass another"):
        copies.run(config)
    assert not list(tmp_path.iterdir())
