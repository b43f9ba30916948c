"""Figures of a process, regardless of what started it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from efficientnet_ns.benchmarks import tables

ROOT = Path(__file__).parents[2]
PRINT_PEAK = "from efficientnet_ns.benchmarks import tables; print(tables.peak_memory())"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells it")
def test_peak_memory_is_without_that_of_the_process_before():
    own = np.ones(200 << 20, np.uint8)
    peak = tables.peak_memory()
    assert peak > own.nbytes / 1e6
    command = [sys.executable, "-c", PRINT_PEAK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) < peak / 2
