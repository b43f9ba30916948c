"""Settings that the labeling programs refuse before they start."""

from __future__ import annotations

import pytest

from efficientnet_ns.config import (
    Config,
    ConfigError,
    FilterConfig,
    PipelineConfig,
    SelectConfig,
    from_flags,
    mark_given,
)
from efficientnet_ns.data import tasks
from efficientnet_ns.loop import labeling


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--work_dir and --unlabel_data_dir are required"),
        (["--output_dir=x"], "--output_dir does not apply to a pipeline"),
        (["--worker_id=1"], "--worker_id does not apply"),
        (["--shard_id=3"], "--shard_id=3: drop it; a pipeline labels all 128"),
    ],
)
def test_flags_that_would_change_nothing(entry_flags, arguments, message):
    needed = ["--work_dir=w", "--unlabel_data_dir=u"] if arguments else []
    values = entry_flags("label_beam", needed + arguments)
    settings = [from_flags(cls, values) for cls in (Config, PipelineConfig)]
    with pytest.raises(ConfigError, match=message):
        labeling.label_on_beam(*settings, [])


def test_a_report_without_a_selection():
    folders = dict.fromkeys(
        ("unlabel_data_dir", "prediction_dir", "prelim_stats_dir", "output_dir"), "x"
    )
    with pytest.raises(ConfigError, match="--report needs a selection"):
        labeling.select_and_write(
            SelectConfig(**folders, only_get_stats=1), FilterConfig(report=True)
        )
    with pytest.raises(ConfigError, match="--unlabel_data_dir is required"):
        labeling.select_and_write(SelectConfig(), FilterConfig())


@pytest.mark.parametrize(
    "task, expected",
    [
        ("imagenet", {"goldfish": 1, "crane (bird)": 3, "crane (machine)": 5}),
        (None, {"1": 1, "134": 3, "517": 5}),
    ],
)
def test_classes_by_name(monkeypatch, task, expected):
    """Classes are reported by name if the task has names."""
    found = {"1": 1, "134": 3, "517": 5}
    monkeypatch.setattr(labeling, "select", lambda selection: {"classes": found})
    places = ("unlabel_data_dir", "prediction_dir", "prelim_stats_dir", "output_dir")
    selection = SelectConfig(**dict.fromkeys(places, "x"), task_name=task, only_get_stats=1)
    assert labeling.select_and_write(selection, FilterConfig())["classes"] == expected


def test_the_number_of_classes_is_the_tasks(tmp_path):
    """Any other given number is refused, even the default."""
    path = str(tmp_path / "task.json")
    tasks.write_task(path, num_classes=7)
    selection = SelectConfig(task_name=path, only_get_stats=1)
    assert labeling.completed(selection).num_label_classes == 7
    mark_given(selection, ["task_name", "num_label_classes"])
    with pytest.raises(ConfigError, match="--num_label_classes=1000, but task .* has 7 classes"):
        labeling.completed(selection)
