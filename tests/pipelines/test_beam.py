"""The Beam pipeline: the files of the ordinary commands, resuming, and worker errors."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet
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

from efficientnet_ns.config import Config, ConfigError, SelectConfig
from efficientnet_ns.files import manifests, shard_names, tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.inference.teacher import TeacherPredictor
from efficientnet_ns.pipelines import whole_set
from efficientnet_ns.pseudo_labels import label_shard, predict, write
from efficientnet_ns.pseudo_labels.selection import select

SHARDS = 3
DECISIONS = {"exclude": "list.csv", "reviewed": "review.json"}
# What DirectRunner falls back to offline; online, it fetches another runner.
RUNNER = "--runner=FnApiRunner"
_RESULT = "apache_beam.runners.portability.fn_api_runner.fn_runner.RunnerResult"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def beam():
    pytest.importorskip("apache_beam")
    from efficientnet_ns.pipelines import beam

    return beam


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A teacher, and three shards, one of which has a damaged record."""
    path = tmp_path_factory.mktemp("beam")
    rng = np.random.default_rng(0)
    save_teacher(path / "teacher", CLASSES, seed=1)
    sizes = (40, 25, 10)
    payloads = [[tfexamples.unlabeled_example(png(rng)) for _ in range(n)] for n in sizes]
    write_shards(path / "unlabeled", payloads)
    corrupt(path / "unlabeled" / shard_names.shard_name("extra", 1, SHARDS), np.array([4]))
    return path


@pytest.fixture(scope="module", autouse=True)
def one_predictor() -> Iterator[None]:
    """Shares one model: building and tracing takes seconds, and all runs use the same settings."""
    made = []

    def predictor(*arguments) -> TeacherPredictor:
        made[:] = made or [TeacherPredictor(*arguments)]
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict, "TeacherPredictor", predictor)
        yield


def stages(folder: Path, work: Path, **values) -> tuple[Config, SelectConfig]:
    return pipeline_stages(folder, work, SHARDS, **{"total_replicas": 2, **values})


@pytest.fixture(scope="module")
def ordinary(folder) -> Path:
    """The output of the ordinary functions."""
    work = folder / "ordinary"
    prediction, selection = stages(folder, work)
    for worker in range(2):
        predict.predict(prediction.override(shard_id="0-2", worker_id=worker))
    select(selection)
    assert write.write(selection)["records"] == CLASSES * 20
    return work


def test_files_are_those_of_the_ordinary_commands(beam, folder, ordinary, tmp_path):
    result = beam.label(*stages(folder, tmp_path), [RUNNER])
    assert contents(tmp_path) == contents(ordinary)
    assert (result["unreadable"], result["available"]) == (1, 75)
    assert result["records"] == CLASSES * 20
    # They include every output of every worker and shard.
    names = {Path(name).name for name in contents(tmp_path)}
    for shard in range(SHARDS):
        assert {f"train-info-{shard:05d}-of-00003-{w:05d}" for w in range(2)} <= names
        assert f"train-0-{shard:05d}-of-00003" in names
    assert {"final_stats.json", "selection.parquet", "total_counts.json"} <= names
    assert "quarantine-00001-of-00003-00000.jsonl" in names


def test_finished_shards_are_not_done_again(beam, folder, ordinary, tmp_path, monkeypatch):
    prediction, selection = stages(folder, tmp_path)
    predict.predict(prediction.override(shard_id="0,2", worker_id=1))
    done = []
    run = label_shard.ShardLabeling.run

    def recorded(job: label_shard.ShardLabeling) -> None:
        done.append(job._task.name)
        run(job)

    monkeypatch.setattr(label_shard.ShardLabeling, "run", recorded)
    beam.label(prediction, selection, [RUNNER])
    assert sorted(done) == [f"train-info-{s:05d}-of-00003-{w:05d}" for s, w in
                            [(0, 0), (1, 0), (1, 1), (2, 0)]]  # fmt: skip
    assert contents(tmp_path) == contents(ordinary)
    monkeypatch.setattr(predict, "TeacherPredictor", None)  # Without work, no model is loaded.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*0*-of-0*")}
    beam.label(prediction, selection, [RUNNER])
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) > 20


def test_what_a_person_and_a_list_decided_is_honored(beam, folder, tmp_path):
    """As in filter_unlabel; a missing list is refused before the pipeline starts."""
    file = folder / "unlabeled" / shard_names.shard_name("extra", 0, SHARDS)
    decided = [{"file": str(file), "record": 3, "label": 2}]
    (tmp_path / "review.json").write_text(json.dumps({"decisions": decided}))
    (tmp_path / "list.csv").write_text(f"file,record\n{file},5\n{file},8\n")
    given = {name: str(tmp_path / path) for name, path in DECISIONS.items()}
    works = [tmp_path / "beam", tmp_path / "ordinary"]
    beam.label(*stages(folder, works[0], **given), [RUNNER])
    prediction, selection = stages(folder, works[1], **given)
    for worker in range(2):
        predict.predict(prediction.override(shard_id="0-2", worker_id=worker))
    select(selection)
    write.write(selection)
    made, wanted = map(contents, works)
    assert made.keys() == wanted.keys()
    for name in made:
        # Manifests contain the folder names.
        assert made[name] == wanted[name] or name.endswith(".manifest.json"), name
    rows = pyarrow.parquet.read_table(works[0] / "selected" / "selection.parquet").to_pylist()
    kept = {r["position"] * 2 + r["worker"]: r for r in rows if r["shard"] == 0}
    assert (kept[3]["label"], kept[3]["prob"]) == (2, 1) and not {5, 8} & set(kept)
    given["exclude"] = "missing.csv"
    with pytest.raises(DataError, match="--exclude=missing.csv: the file does not exist"):
        beam.label(*stages(folder, tmp_path / "other", **given), [RUNNER])
    assert not (tmp_path / "other").exists()


def test_counters(beam, folder, tmp_path, monkeypatch):
    """A runner shows counts of images, bytes, unreadable records and time."""
    results = []
    finish = beam.apache_beam.Pipeline.__exit__

    def kept(pipeline, *error):
        finish(pipeline, *error)
        results.append(pipeline.result)

    monkeypatch.setattr(beam.apache_beam.Pipeline, "__exit__", kept)
    prediction, selection = stages(folder, tmp_path)
    beam.whole_set.load_teacher(prediction).meter.take()  # Resets the shared meter.
    beam.label(prediction, selection, [RUNNER])
    counted = {
        one.key.metric.name: one.committed
        for one in results[0].metrics().query()["counters"]
        if one.key.metric.namespace == "efficientnet_ns"
    }
    images = [
        tfexamples.image_bytes(record.payload)
        for path in sorted((folder / "unlabeled").glob("extra-*"))
        for record in tfrecords.read(str(path))
        if record.payload
    ]
    assert (counted["images"], counted["unreadable"]) == (len(images) + 1, 1)
    assert counted["bytes"] == sum(map(len, images))
    assert counted["decode_us"] > 0 and counted["inference_us"] > 0


def test_one_model_for_all_shards_of_a_process(beam, folder, tmp_path, monkeypatch):
    made = []
    labeler = predict.TeacherPredictor
    counted = lambda *args: made.append(args) or labeler(*args)  # noqa: E731
    monkeypatch.setattr(predict, "TeacherPredictor", counted)
    beam.label(*stages(folder, tmp_path, total_replicas=1), [RUNNER])
    assert len(made) == 1


def test_groups_of_shards_are_few_and_hold_each_once():
    assert whole_set.groups([]) == [] and whole_set.groups([4, 7]) == [[4], [7]]
    groups = whole_set.groups(range(16_384))
    assert len(groups) <= 1000 and sum(groups, []) == list(range(16_384))


def test_bundle_that_fails_is_started_again(beam, folder, ordinary, tmp_path, monkeypatch):
    """A worker that dies in the middle of a shard leaves nothing that would affect another."""
    prediction, selection = stages(folder, tmp_path, part_seconds=0.0)
    rename, failed = label_shard.ShardLabeling._assemble, []

    def failing(job: label_shard.ShardLabeling) -> None:
        if not failed:
            failed.append(job)
            raise OSError("the machine is gone")
        rename(job)

    monkeypatch.setattr(label_shard.ShardLabeling, "_assemble", failing)
    with pytest.raises(OSError, match="the machine is gone"):
        beam.label(prediction, selection, [RUNNER])
    assert list(tmp_path.rglob(".part-*"))
    beam.label(*stages(folder, tmp_path), [RUNNER])
    assert contents(tmp_path) == contents(ordinary)


def test_shard_with_too_many_bad_records_is_refused_after_the_others(beam, folder, tmp_path):
    prediction, selection = stages(folder, tmp_path, max_bad_fraction=0.01)
    with pytest.raises(label_shard.TooManyBadRecords, match=r"extra-00001-of-00003: 1 of"):
        beam.label(prediction, selection, [RUNNER])
    finished = {path.name for path in (tmp_path / "predictions").glob("*.manifest.json")}
    # Record 4 of shard 1 belongs to worker 0.
    assert len(finished) == 5 and "train-info-00001-of-00003-00000.manifest.json" not in finished
    assert not (tmp_path / "selected").exists()


def test_conflicts_are_found_before_the_pipeline_starts(beam, folder, tmp_path, monkeypatch):
    prediction, selection = stages(folder, tmp_path)
    path = tmp_path / "predictions" / "train-info-00001-of-00003-00001"
    path.parent.mkdir()
    path.write_bytes(b"somebody else's")
    monkeypatch.setattr(beam.apache_beam, "Pipeline", None)
    with pytest.raises(manifests.OutputConflict, match="train-info-00001-of-00003-00001 exists"):
        beam.label(prediction, selection, [RUNNER])
    with pytest.raises(ConfigError, match="--reassign_label"):
        beam.label(prediction.override(reassign_label=True), selection, [RUNNER])


def test_errors_of_other_processes_are_one_line(beam):
    text = (
        'Error in worker\n  File "x.py", line 3, in process\n    raise DataError(…)\n'
        "efficientnet_ns.files.errors.DataError: a/b: record 3\nis bad [while running 'write']\n"
    )
    with pytest.raises(beam.StepFailed, match=r"^a/b: record 3\nis bad$"):
        with beam._errors_of_workers():
            raise RuntimeError(text)
    for other in (RuntimeError("ValueError: x [while running 'write']"), DataError(text)):
        with pytest.raises(type(other)) as caught, beam._errors_of_workers():
            raise other
        assert caught.value is other


def test_cancelled_pipeline_is_not_taken_for_a_finished_one(beam, folder, tmp_path, monkeypatch):
    state = property(lambda result: "CANCELLED")
    monkeypatch.setattr(f"{_RESULT}.state", state)
    monkeypatch.setattr(beam, "_build", lambda pipeline, *unused: None)
    with pytest.raises(beam.StepFailed, match="ended as CANCELLED: start the same command again"):
        beam.label(*stages(folder, tmp_path), [RUNNER])


# --- The command ----------------------------------------------------------------------------------


def command(folder: Path, work: Path, *arguments: str) -> list[str]:
    prediction, selection = stages(folder, work)
    flags = ["--model_name=efficientnet-test", f"--task_name={folder}/task_{CLASSES}.json"]
    own = ("predict_ckpt_path", "num_shards", "file_prefix", "total_replicas", "max_bad_fraction")
    chosen = dataclasses.asdict(prediction.predict)
    flags += [f"--{name}={chosen[name]}" for name in own]
    flags += [f"--unlabel_data_dir={folder}/unlabeled", "--eval_batch_size=4"]
    flags += [f"--work_dir={work}", f"--num_image={selection.num_image}"]
    flags += [f"--min_threshold={selection.min_threshold}"]
    return [sys.executable, "-m", "efficientnet_ns.label_beam", *flags, *arguments]


@pytest.mark.slow
def test_command_with_several_processes(beam, folder, ordinary, tmp_path):
    several = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    answer = subprocess.run(
        command(folder, tmp_path, "--", RUNNER, *several), cwd=ROOT, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert json.loads(answer.stdout.splitlines()[-1])["records"] == CLASSES * 20
    assert contents(tmp_path) == contents(ordinary)
    # A worker error prints only its message and exits with the code of unusable data.
    damaged = tmp_path / "selected" / "selection.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    answer = subprocess.run(
        command(folder, tmp_path, "--", RUNNER, *several), cwd=ROOT, capture_output=True, text=True
    )
    assert answer.returncode == 2
    assert "it was changed or truncated" in answer.stderr.splitlines()[-1]


def test_without_beam_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "efficientnet_ns.pipelines.beam", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'efficientnet-ns\[beam\]'"):
        import efficientnet_ns.pipelines.beam  # noqa: F401
