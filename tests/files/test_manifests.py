"""Finished work is never lost and never done twice, whatever interrupts it.

Run as a program with a folder, it is killed at every point of `Stage.write`; see `test_killed`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import forks
import pytest
import tensorflow as tf

from efficientnet_ns.files import atomic, json_files, manifests

SETTINGS = {"seed": 3, "sizes": (1, 2), "model": "b0"}
CONTENT = {"data": "the records", "stats": "{}"}


def make_stage(folder: Path, **changes) -> manifests.Stage:
    outputs = [str(folder / "data" / "data"), str(folder / "stats" / "stats")]
    return manifests.Stage(str(folder / "manifest.json"), outputs, {**SETTINGS, **changes})


def fill(temporary: dict[str, str], only: tuple[str, ...] = tuple(CONTENT)) -> None:
    for path, name in temporary.items():
        if Path(path).name in only:
            Path(name).write_text(CONTENT[Path(path).name])


def finish(stage: manifests.Stage) -> None:
    with stage.write() as (temporary, counts):
        fill(temporary)
        counts.update(records=7)


def files(folder: Path) -> list[str]:
    """Returns all files below a folder, including temporary ones."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def assert_finished(stage: manifests.Stage, folder: Path) -> None:
    assert stage.done()
    assert stage.counts() == {"records": 7}
    for path in stage.outputs:
        assert Path(path).read_text() == CONTENT[Path(path).name]
    assert {"data/data", "stats/stats", "manifest.json"} <= set(files(folder))


# Stage.done.


def test_nothing_there(tmp_path):
    assert not make_stage(tmp_path).done()


def test_complete(tmp_path):
    finish(make_stage(tmp_path))
    assert_finished(make_stage(tmp_path), tmp_path)
    assert files(tmp_path) == ["data/data", "manifest.json", "stats/stats"]


def test_one_output_missing_is_to_be_done_again(tmp_path):
    for name in ("data/data", "stats/stats"):
        finish(make_stage(tmp_path))
        (tmp_path / name).unlink()
        assert not make_stage(tmp_path).done()
        finish(make_stage(tmp_path))
        assert_finished(make_stage(tmp_path), tmp_path)


@pytest.mark.parametrize("name", ["data", "stats"])
def test_file_that_no_manifest_vouches_for(tmp_path, name):
    (tmp_path / name).mkdir()
    foreign = tmp_path / name / name
    foreign.write_text("somebody's work")
    with pytest.raises(manifests.OutputConflict) as e:
        make_stage(tmp_path).done()
    assert str(foreign) in str(e.value)
    assert foreign.read_text() == "somebody's work"


def test_other_settings_are_named(tmp_path):
    finish(make_stage(tmp_path))
    with pytest.raises(manifests.OutputConflict) as e:
        make_stage(tmp_path, seed=4, extra=True).done()
    message = str(e.value)
    assert "seed: 3 → 4" in message and "extra: None → True" in message
    assert str(tmp_path / "manifest.json") in message
    assert "model" not in message and "sizes" not in message
    assert_finished(make_stage(tmp_path), tmp_path)


@pytest.mark.parametrize("name", ["data/data", "stats/stats"])
@pytest.mark.parametrize("change", [-1, 1])
def test_output_of_another_size_is_named(tmp_path, name, change):
    finish(make_stage(tmp_path))
    path = tmp_path / name
    text = path.read_text()
    path.write_text(text[:-1] if change < 0 else text + "x")
    with pytest.raises(manifests.OutputConflict) as e:
        make_stage(tmp_path).done()
    assert str(path) in str(e.value)
    numbers = re.findall(r"\b\d+\b", str(e.value).replace(str(path), ""))
    assert numbers == [str(len(text) + change), str(len(text))]


def test_broken_manifest_is_named(tmp_path):
    finish(make_stage(tmp_path))
    (tmp_path / "manifest.json").write_text('{"config": {')
    with pytest.raises(manifests.OutputConflict, match=str(tmp_path / "manifest.json")):
        make_stage(tmp_path).done()


# Stage.write.


class Interrupted(BaseException):
    """Like KeyboardInterrupt, not an Exception."""


@pytest.mark.parametrize("written", [(), ("data",), ("data", "stats")])
def test_nothing_is_committed_when_the_work_fails(tmp_path, written):
    with pytest.raises(Interrupted):
        with make_stage(tmp_path).write() as (temporary, _):
            fill(temporary, written)
            assert len(files(tmp_path)) == len(written)
            raise Interrupted
    assert files(tmp_path) == []
    assert not make_stage(tmp_path).done()


def test_an_output_that_was_not_written_is_an_error(tmp_path):
    with pytest.raises(Exception, match="stats"):
        with make_stage(tmp_path).write() as (temporary, _):
            fill(temporary, ("data",))
    assert files(tmp_path) == []


def test_a_failure_leaves_earlier_outputs_alone(tmp_path):
    finish(make_stage(tmp_path))
    with pytest.raises(Interrupted):
        with make_stage(tmp_path).write() as (temporary, _):
            Path(temporary[str(tmp_path / "data" / "data")]).write_text("half")
            raise Interrupted
    assert_finished(make_stage(tmp_path), tmp_path)
    assert len(files(tmp_path)) == 3


# Killed at calls made by `Stage.write`. A killed process cleans nothing up.

KILL_POINTS = ["half written", "written", "rename 0", "rename 1", "rename 2"]


def run_and_die(folder: Path, point: str) -> None:
    """Does the stage's work and kills this process at `point`."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    gfile, renames = manifests.tf.io.gfile, []

    class Gfile:
        def __getattr__(self, name):
            return getattr(gfile, name)

        def rename(self, *args, **kwargs):
            if point == f"rename {len(renames)}":
                die()
            renames.append(args)
            gfile.rename(*args, **kwargs)

    manifests.tf.io.gfile = Gfile()
    with make_stage(folder).write() as (temporary, counts):
        fill(temporary, ("data",))
        if point == "half written":
            die()
        fill(temporary)
        counts.update(records=7)
        if point == "written":
            die()


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A folder per kill point, as the killed process left it."""
    base = tmp_path_factory.mktemp("killed")
    child = forks.python(__file__, base)
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout) == dict.fromkeys(KILL_POINTS, -signal.SIGKILL)
    return base


@pytest.mark.parametrize("point", KILL_POINTS)
def test_killed(killed, point):
    folder = killed / point
    left = files(folder)
    hidden = [name for name in left if Path(name).name.startswith(".")]
    assert hidden, "the process was killed too late"
    visible = {
        "rename 1": ["manifest.json"],
        "rename 2": ["data/data", "manifest.json"],
    }
    assert [name for name in left if name not in hidden] == visible.get(point, [])
    stage = make_stage(folder)
    assert not stage.done()
    finish(stage)
    assert_finished(make_stage(folder), folder)


# Names and single files.


def test_temporary_names_are_hidden_and_private(tmp_path, monkeypatch):
    path = str(tmp_path / "train-00000-of-00001")
    name = atomic.temporary_name(path)
    assert os.path.dirname(name) == str(tmp_path)
    assert os.path.basename(name).startswith(".")
    assert atomic.temporary_name(path) == name
    monkeypatch.setattr(os, "getpid", lambda: -5)
    assert atomic.temporary_name(path) != name


def test_atomic_path(tmp_path):
    path = tmp_path / "file"
    with atomic.atomic_path(str(path)) as temporary:
        Path(temporary).write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    with pytest.raises(Interrupted), atomic.atomic_path(str(path)) as temporary:
        Path(temporary).write_text("ha")
        raise Interrupted
    assert path.read_text() == "whole"
    assert files(tmp_path) == ["file"]


def test_json_round_trip(tmp_path):
    path = str(tmp_path / "a.json")
    value = {"ä": [1, 2.5, None, True], "b": {"c": "→"}}
    for indent in (None, 1):
        json_files.write_json(path, value, indent=indent)
        assert json_files.read_json(path) == value
        assert Path(path).read_text() == json.dumps(value, indent=indent)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "should contain a JSON object, but contains a list"),
        ('{"a": 1}', "x.json lacks b, c:"),
    ],
)
def test_json_of_another_kind_is_named(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(json_files.BrokenFile, match=message):
        json_files.read_object(str(path), "b", "c")
    path.write_text('{"b": 1, "c": 2}')
    assert json_files.read_object(str(path), "b", "c") == {"b": 1, "c": 2}


def test_json_that_cannot_be_written_changes_nothing(tmp_path):
    path = tmp_path / "a.json"
    json_files.write_json(str(path), [1])
    with pytest.raises(TypeError):
        json_files.write_json(str(path), [object()])
    assert path.read_text() == "[1]"
    assert files(tmp_path) == ["a.json"]


@pytest.mark.parametrize("text", ["", "{", "[1, 2"])
def test_broken_json_is_named(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=str(path)):
        json_files.read_json(str(path))


def test_fingerprint(tmp_path):
    def listing(folder, **sizes):
        (tmp_path / folder).mkdir()
        for name, size in sizes.items():
            (tmp_path / folder / name).write_bytes(b"x" * size)
        return [str(tmp_path / folder / name) for name in sizes]

    base = manifests.fingerprint(listing("base", a=1, b=2))
    assert manifests.fingerprint(listing("moved", a=1, b=2)) == base
    others = [listing("size", a=1, b=3), listing("name", a=1, c=2), listing("order", b=2, a=1)]
    others.append(listing("fewer", a=1))
    assert len({base, *map(manifests.fingerprint, others)}) == 5


def test_content_hash(tmp_path):
    (tmp_path / "a").write_bytes(b"\x00\xff same")
    (tmp_path / "b").write_bytes(b"\x00\xff same")
    (tmp_path / "c").write_bytes(b"\x00\xfe same")
    a, b, c = (manifests.content_hash(str(tmp_path / name)) for name in "abc")
    assert a == b != c


if __name__ == "__main__":
    # Forks, so that TensorFlow is loaded once for all points.
    codes = {}
    for kill_point in KILL_POINTS:
        child_id = os.fork()
        if child_id == 0:
            run_and_die(Path(sys.argv[1]) / kill_point, kill_point)
            os._exit(0)
        codes[kill_point] = os.waitstatus_to_exitcode(os.waitpid(child_id, 0)[1])
    print(json.dumps(codes))


def test_temporary_files_of_killed_processes_are_removed(tmp_path):
    stage = make_stage(tmp_path)
    output = stage.outputs[0]
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ours = atomic.temporary_name(output)
    theirs = ours.replace(f"-{os.getpid()}-", f"-{dead.pid}-")
    alive = ours.replace(f"-{os.getpid()}-", f"-{os.getppid()}-")
    elsewhere = theirs.replace(".tmp-", ".tmp-other")
    for path in (theirs, alive, elsewhere):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(b"left behind")
    finish(stage)
    assert not Path(theirs).exists()
    assert Path(alive).exists() and Path(elsewhere).exists()


def test_temporary_files_of_other_machines_go_when_they_are_old(tmp_path):
    """Machine names may also contain numbers between dashes."""
    names = [f".tmp-vm-{n}-w-0-77-out" for n in range(2)]
    for name in (*names, ".tmp-vm-0-w-0-77-other"):
        (tmp_path / name).write_text("part")
    for name in (names[0], ".tmp-vm-0-w-0-77-other"):
        os.utime(tmp_path / name, (time.time() - 2 * 24 * 3600,) * 2)
    atomic.remove_abandoned([str(tmp_path / "out")])
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".tmp-vm-0-w-0-77-other", names[1]]


@pytest.mark.slow
def test_scratch_folders_of_killed_processes_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = (
        "import os, signal\n"
        "from efficientnet_ns.files import atomic\n"
        "with atomic.scratch_folder('index') as folder:\n"
        "    open(f'{folder}/copy', 'w').close()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert [path.name for path in left.iterdir()] == ["copy"]
    with atomic.scratch_folder("index") as first, atomic.scratch_folder("index") as second:
        assert not left.exists()
        assert {str(path) for path in tmp_path.iterdir()} == {first, second}
    assert not list(tmp_path.iterdir())


def test_scratch_folders_of_other_users_stay(tmp_path, monkeypatch):
    """In a shared TMPDIR, leftovers of another user's killed process are not ours to remove."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    name = Path(atomic.scratch_name("index"))
    left = name.with_name(name.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-"))
    left.mkdir()
    tried = []

    def refused(path: str) -> None:
        tried.append(path)
        raise tf.errors.PermissionDeniedError(None, None, "could not fully delete dir")

    monkeypatch.setattr(tf.io.gfile, "rmtree", refused)
    assert atomic.scratch_name("index") != str(left)
    assert tried == [str(left)]


def test_other_settings_name_the_files_to_delete_and_then_begin_anew(tmp_path):
    finish(make_stage(tmp_path))
    other = make_stage(tmp_path, seed=4)
    with pytest.raises(manifests.OutputConflict) as refused:
        other.done()
    assert all(path in str(refused.value) for path in other.outputs)
    for path in other.outputs:
        Path(path).unlink()
    assert not other.done()
    finish(other)
    assert_finished(other, tmp_path)


@pytest.mark.parametrize("content", ["", '{"config": {"se', "[]", "{}"])
def test_a_damaged_manifest_tells_what_to_do(content, tmp_path):
    stage = make_stage(tmp_path)
    finish(stage)
    Path(stage.manifest).write_text(content)
    with pytest.raises(manifests.OutputConflict, match="is damaged.*Delete it and ") as refused:
        stage.done()
    assert all(path in str(refused.value) for path in [stage.manifest, *stage.outputs])
