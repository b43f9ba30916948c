"""The progress line of a whole run."""

from __future__ import annotations

import pytest

from efficientnet_ns.files import progress
from efficientnet_ns.files.progress import Progress, Whole, duration


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_stage_percentage_and_time_left(clock, capsys):
    with Whole({"teacher": 300, "student": 100}) as whole:
        whole.skip("other")
        with progress.stage("teacher"), progress.stage("inside"):
            bar = Progress(10, "training x", "steps")
            clock[0] += 300
            bar.update(5, "loss 1.0")
        assert whole.percentage() == 75
        assert whole.time_left() == "2 min left"
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[  0 %] teacher; 7 min left"
    assert lines[1] == "[ 38 %] teacher: 5/10 steps, 0.0 steps/s, loss 1.0; 7 min left"
    assert Whole.current is None


def test_the_rate_can_leave_out_the_start(clock):
    bar = Progress(100, "training x", "steps")
    clock[0] += 60
    bar.update(10)
    bar.restart_rate()
    clock[0] += 5
    bar.update(10)
    assert bar.line() == "20/100 steps, 2.0 steps/s, ETA 40 s"


def test_finished_stages_count_at_once(capsys):
    with Whole({"teacher": 300, "student": 100}) as whole:
        whole.skip("teacher")
        assert whole.percentage() == 75


def test_without_a_whole_a_stage_is_nothing(capsys):
    with progress.stage("teacher"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("seconds, text", [(40, "40 s"), (720, "12 min"), (12600, "3.5 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text
