"""CPU cores that the process may use, not those of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from efficientnet_ns.config.cpus import available_cpus


@pytest.fixture(autouse=True)
def large_machine(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


def available(tmp_path: Path, groups: str, files: dict[str, str]) -> int:
    (tmp_path / "cgroup").write_text(groups)
    for name, content in files.items():
        (tmp_path / "mounted" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mounted" / name).write_text(content)
    return available_cpus(str(tmp_path / "cgroup"), str(tmp_path / "mounted"))


V1 = "12:pids:/box\n4:cpu,cpuacct:/box\n1:name=systemd:/box\n"


@pytest.mark.parametrize(
    "groups, files, expected",
    [
        pytest.param("0::/\n", {"cpu.max": "max 100000\n"}, 16, id="no limit"),
        pytest.param("0::/\n", {"cpu.max": "200000 100000\n"}, 2, id="container"),
        pytest.param("0::/\n", {"cpu.max": "150000 100000\n"}, 2, id="part of a core"),
        pytest.param("0::/\n", {"cpu.max": "1000 100000\n"}, 1, id="less than one"),
        pytest.param("0::/\n", {"cpu.max": "9900000 100000\n"}, 16, id="more than affinity"),
        pytest.param(
            "0::/a/b\n",
            {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"},
            3,
            id="limit above",
        ),
        pytest.param("0::/of/the/host\n", {"cpu.max": "400000 100000"}, 4, id="path of the host"),
        pytest.param(
            V1,
            {"cpu/box/cpu.cfs_quota_us": "500000", "cpu/box/cpu.cfs_period_us": "100000"},
            5,
            id="version 1",
        ),
        pytest.param(
            V1,
            {"cpu,cpuacct/cpu.cfs_quota_us": "50000", "cpu,cpuacct/cpu.cfs_period_us": "10000"},
            5,
            id="version 1 in a container",
        ),
        pytest.param(
            V1,
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            16,
            id="version 1 without a limit",
        ),
        pytest.param("0::/\n", {"cpu.max": "nonsense"}, 16, id="unknown format"),
    ],
)
def test_quota(tmp_path, groups, files, expected):
    assert available(tmp_path, groups, files) == expected


def test_elsewhere_than_on_linux(tmp_path, monkeypatch):
    nowhere = str(tmp_path / "nowhere")
    assert available_cpus(nowhere, nowhere) == 16
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cpus(nowhere, nowhere) == 64
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cpus(nowhere, nowhere) == 1
