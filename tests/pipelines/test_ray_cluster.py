"""Labeling on a Ray cluster: the files of the ordinary commands, even if nodes fail."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
from unlabeled_sets import (
    CLASSES,
    contents,
    corrupt,
    pipeline_stages,
    png,
    save_teacher,
    write_shards,
)

from efficientnet_ns.config import Config, ConfigError, RayConfig, SelectConfig
from efficientnet_ns.files import shard_names, tfexamples
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.files.leases import Leases
from efficientnet_ns.pseudo_labels import predict, write
from efficientnet_ns.pseudo_labels.selection import select

ROOT = Path(__file__).parents[2]
MODULE = "efficientnet_ns.pipelines.ray_cluster"
SHARDS = 64
NODE = {"num_cpus": 1, "resources": {"teacher": 1}, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def cluster() -> Iterator:
    """Three nodes, each with room for one actor."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # Ray gives workers the lowest priority, so on a busy machine they would wait for minutes.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112

    nodes = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        for _ in range(2):
            nodes.add_node(**NODE)
        yield nodes
    finally:
        nodes.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A teacher, and 64 shards, one of which has a damaged record."""
    path = tmp_path_factory.mktemp("ray")
    rng = np.random.default_rng(0)
    save_teacher(path / "teacher", CLASSES, seed=1)
    sizes = rng.integers(5, 60, SHARDS)
    payloads = [[tfexamples.unlabeled_example(png(rng)) for _ in range(n)] for n in sizes]
    write_shards(path / "unlabeled", payloads)
    corrupt(path / "unlabeled" / shard_names.shard_name("extra", 1, SHARDS), np.array([4]))
    return path


def stages(folder: Path, work: Path, **values) -> tuple[Config, SelectConfig]:
    return pipeline_stages(folder, work, SHARDS, **values)


def pool(cluster, **values) -> RayConfig:
    own = {"cpus_per_actor": 0.5, "resources_per_actor": "teacher=1", **values}
    return RayConfig(ray_address=cluster.address, **own)


@pytest.fixture(scope="module")
def ordinary(folder) -> Path:
    """The output of the ordinary functions."""
    work = folder / "ordinary"
    prediction, selection = stages(folder, work)
    predict.predict(prediction.override(shard_id="auto"))
    select(selection)
    write.write(selection)
    return work


def command(folder: Path, work: Path, cluster) -> list[str]:
    prediction, selection = stages(folder, work)
    own = ("predict_ckpt_path", "num_shards", "file_prefix", "max_bad_fraction")
    chosen = dataclasses.asdict(prediction.predict)
    flags = [f"--{name}={chosen[name]}" for name in own]
    flags += ["--model_name=efficientnet-test", f"--task_name={folder}/task_{CLASSES}.json"]
    flags += [f"--unlabel_data_dir={folder}/unlabeled", "--eval_batch_size=4", "--part_seconds=0"]
    flags += [f"--work_dir={work}", f"--num_image={selection.num_image}"]
    flags += [f"--min_threshold={selection.min_threshold}"]
    flags += [f"--{name}={value}" for name, value in dataclasses.asdict(pool(cluster)).items()]
    return [sys.executable, "-m", "efficientnet_ns.label_ray", *flags]


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def raylet_at_work(cluster, folder: Path) -> int | None:
    """Returns the process of a node other than the head whose actor is labeling a shard."""
    raylets = {node.all_processes["raylet"][0].process.pid for node in cluster.worker_nodes}
    for lease in folder.glob(".lease-*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            found = parent(json.loads(lease.read_text())["pid"])
            if found in raylets:
                return found
    return None


def kill_node(raylet: int) -> None:
    """Kills a node and its workers, as if the machine were lost."""
    family = [raylet]
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if parent(int(folder.name)) == raylet:
                family.append(int(folder.name))
    for process in family:
        os.kill(process, signal.SIGKILL)


@pytest.mark.slow
def test_a_node_is_killed_and_one_joins(cluster, folder, ordinary, tmp_path):
    """The files equal those of the ordinary commands, even if the run itself was stopped before."""
    line = command(folder, tmp_path, cluster)
    options = {"cwd": ROOT, "stdout": PIPE, "stderr": PIPE, "text": True}
    made = lambda: sorted(tmp_path.glob("predictions/*.manifest.json"))  # noqa: E731

    def started(finished: int) -> subprocess.Popen:
        job = subprocess.Popen(line, **options)
        while len(made()) < finished and job.poll() is None:
            time.sleep(0.02)
        return job

    job = started(3)
    job.terminate()
    assert (job.communicate()[0], job.returncode) == ("", 75)
    before = {path: path.stat().st_mtime_ns for path in made()}
    assert 3 <= len(before) < SHARDS
    # Two actors block on shards that are held here, so only a new one can do a lost one's work.
    names = [f"train-info-{shard:05d}-of-{SHARDS:05d}-00000" for shard in (SHARDS - 2, SHARDS - 1)]
    held = [Leases(str(tmp_path / "predictions"), 300).claim(name) for name in names]
    job = started(len(before) + 8)
    while (raylet := raylet_at_work(cluster, tmp_path / "predictions")) is None:
        assert len(made()) < SHARDS - 2 and job.poll() is None
    kill_node(raylet)
    cluster.add_node(**NODE)
    while len(made()) < SHARDS - 2 and job.poll() is None:
        time.sleep(0.1)
    assert job.poll() is None
    for lease in held:
        lease.release()
    out, err = job.communicate()
    assert job.returncode == 0, err
    assert contents(tmp_path) == contents(ordinary)
    result = json.loads(out)
    assert result["unreadable"] == 1 and result["records"] == CLASSES * 20
    assert "an actor was lost at shard" in err
    assert {path: path.stat().st_mtime_ns for path in before} == before


# --- Without a cluster ------------------------------------------------------------------------------


class FakeRay:
    """Runs actor calls when results are requested; `lost` maps units to calls that end actors.

    Attributes:
      places: CPUs in the cluster.
      most: largest number of actors at a time.
    """

    def __init__(self, places: int, lost: dict[object, int]):
        self.places, self.lost, self.living, self.most = places, dict(lost), [], 0
        self.done = []
        self.exceptions = types.SimpleNamespace(RayError=LostActor, RayTaskError=OurError)

    def remote(self, made):
        def create(*arguments):
            actor = FakeActor(made(*arguments), self)
            self.living.append(actor)
            self.most = max(self.most, len(self.living))
            return actor

        def options(*, num_cpus, **others):
            self.each = num_cpus
            return types.SimpleNamespace(remote=create)

        return types.SimpleNamespace(options=options)

    def cluster_resources(self):
        return {"CPU": self.places}

    def available_resources(self):
        return {"CPU": max(self.places - self.each * len(self.living), 0)}

    def wait(self, calls, timeout):
        placed = [c for c in calls if c.actor in self.living[: int(self.places / self.each)]]
        return placed[:1], [call for call in calls if call not in placed[:1]]

    def get(self, call):
        unit = call.arguments[0] if call.arguments else None
        if self.lost.get(unit, 0):
            self.lost[unit] -= 1
            raise LostActor(f"the node of {unit} is gone")
        self.done.append(unit)
        try:
            return call.function(*call.arguments)
        except DataError as e:
            raise OurError(e) from e

    def kill(self, actor):
        self.living.remove(actor)


class LostActor(Exception):
    pass


class OurError(LostActor):
    def __init__(self, cause):
        super().__init__("a long traceback")
        self.cause = cause


class FakeActor:
    def __init__(self, made, ray):
        self.made, self.ray = made, ray

    def __getattr__(self, name):
        function = getattr(self.made, name)
        return types.SimpleNamespace(remote=lambda *arguments: FakeCall(self, function, arguments))


@dataclasses.dataclass(eq=False)
class FakeCall:
    actor: FakeActor
    function: Callable
    arguments: tuple


@pytest.fixture
def run(monkeypatch):
    """Labels units (0, 0), (0, 1), … with a pool on a fake Ray; returns (messages, FakeRay)."""

    def run(number, places, lost=(), label=lambda unit: "", **options):
        fake = FakeRay(places, dict(lost))
        monkeypatch.setitem(sys.modules, "ray", fake)
        monkeypatch.setitem(sys.modules, "ray.exceptions", fake.exceptions)
        sys.modules.pop(MODULE, None)
        ray_cluster = importlib.import_module(MODULE)
        monkeypatch.setattr(ray_cluster, "limit_cpus", lambda cores: None)
        monkeypatch.setattr(ray_cluster.whole_set, "load_teacher", lambda prediction: None)
        monkeypatch.setattr(
            ray_cluster.whole_set, "label", lambda prediction, unit, teacher: label(unit)
        )
        units = [(0, shard) for shard in range(number)]
        pool = ray_cluster._Pool(Config(), RayConfig(**options), units)
        messages = pool.run()
        assert sorted(unit for unit in fake.done if unit) == units and not fake.living
        return messages, fake

    yield run
    sys.modules.pop(MODULE, None)


@pytest.mark.parametrize(
    "units, places, options, most",
    [
        (20, 5, {}, 5),  # As many as fit.
        (20, 5, {"max_actors": 3}, 3),
        (20, 2, {"min_actors": 4}, 4),  # More requested than there is room for,
        (3, 5, {"min_actors": 4}, 3),  # but none without work.
        (20, 5, {"cpus_per_actor": 2.0}, 2),
    ],
)
def test_as_many_actors_as_were_asked_for(run, units, places, options, most):
    assert run(units, places, **options)[1].most == most


def test_shards_of_lost_actors_are_done_by_others(run):
    _, fake = run(20, 3, {(0, 2): 1, (0, 7): 9, (0, 19): 2, None: 4})
    assert sum(fake.lost.values()) == 0


@pytest.mark.parametrize("lost, what", [((0, 2), "shard 2"), (None, "loading the teacher")])
def test_what_ends_every_actor_ends_the_run(run, lost, what):
    with pytest.raises(RuntimeError, match=f"{what} ended 10 actors .*: the node of"):
        run(20, 3, {lost: 99})


def test_refused_shards_are_told_after_the_others(run):
    messages, _ = run(9, 2, label=lambda unit: "too many" if unit == (0, 4) else "")
    assert sorted(messages) == [*[""] * 8, "too many"]


def test_errors_in_actors_are_those_of_our_code(run):
    def bad(unit):
        raise DataError("x/y is missing")

    with pytest.raises(DataError, match="^x/y is missing$"):
        run(9, 2, label=bad)


@pytest.mark.parametrize("text", ["TPU", "TPU=", "TPU=many", "TPU=-1", "GPU=1", "=2"])
def test_resources_that_are_none(run, text):
    with pytest.raises(ConfigError, match=f"--resources_per_actor={text}: .* is not name=amount"):
        run(1, 1, resources_per_actor=text)


def test_without_ray_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'efficientnet-ns\[ray\]'"):
        importlib.import_module(MODULE)
