"""Runs commands and kills them at random moments until they are done."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_with_kills(
    commands: Sequence[Sequence[str]],
    kills: int,
    seed: int,
    between: tuple[float, float],
    log_dir: Path,
) -> int:
    """Runs all commands concurrently, SIGKILLs one at a time, and restarts each killed one.

    Args:
      commands: argument lists; each must exit with code 0 if it is not killed.
      kills: number of kills.
      between: shortest and longest time in seconds between two kills.
      log_dir: folder for the output of every command.

    Returns:
      Number of kills that hit a running process; the work may finish before all are used.
    """
    rng = random.Random(seed)
    logs = [log_dir / f"command-{i}.log" for i in range(len(commands))]
    running = [_start(command, log) for command, log in zip(commands, logs)]
    hits = 0
    try:
        while hits < kills:
            time.sleep(rng.uniform(*between))
            victim = rng.randrange(len(commands))
            if running[victim].poll() is None:
                running[victim].send_signal(signal.SIGKILL)
                running[victim].wait()
                hits += 1
                running[victim] = _start(commands[victim], logs[victim])
            elif all(process.poll() is not None for process in running):
                break
        for process, log in zip(running, logs):
            assert process.wait(timeout=600) == 0, log.read_text()[-3000:]
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
    return hits


def _start(command: Sequence[str], log: Path) -> subprocess.Popen:
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    with log.open("a") as output:
        return subprocess.Popen(
            list(command), cwd=ROOT, stdout=output, stderr=output, env=environment
        )
