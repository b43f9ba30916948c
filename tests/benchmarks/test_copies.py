"""The generated index has copies, and the search finds all of them and nothing else."""

from __future__ import annotations

import tempfile

import pytest

from efficientnet_ns.benchmarks import copies, selection
from efficientnet_ns.config import BenchmarkConfig, ConfigError


def test_planted_copies_are_found(tmp_path):
    sets, planted = copies.make_sets(str(tmp_path), 25_600)
    # One percent of each of 128 shards of 200 images, for each kind of copy.
    assert planted == 2 * 128 * 2
    assert copies.find(sets) == (planted, 0)


@pytest.mark.parametrize("what", [copies, selection])
def test_a_disk_that_is_too_small(what, tmp_path, monkeypatch):
    """Nothing is written to a folder of photos, which other measurements read."""
    photos, temporary = tmp_path / "photos", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    config = BenchmarkConfig(data=str(photos), rows=10**12)
    with pytest.raises(ConfigError, match=f"=1000000000000 need .* {temporary}.*: set TMPDIR"):
        what.run(config)
    assert not list(temporary.iterdir()) and not photos.exists()
