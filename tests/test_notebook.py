"""The notebook: a clean file whose programs and flags exist; run as a whole on small .mat files."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter

import nbformat
import pytest
from fakes import ROOT, write_mat
from fakes import script_commands as commands

from efficientnet_ns import config
from efficientnet_ns.config import Config
from efficientnet_ns.files import shard_names, tfexamples, tfrecords
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

NOTEBOOK = ROOT / "tpu_scripts" / "noisy_student_svhn.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, nbformat.NO_CONVERT)


def code_cells(notebook: nbformat.NotebookNode) -> dict[str, nbformat.NotebookNode]:
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def programs(
    notebook: nbformat.NotebookNode, hardware: str = "cpu"
) -> tuple[dict[str, object], list[tuple[str, list[str]]]]:
    """Returns the notebook's constants, and (module, flags) of each program it starts, in order.

    Runs only the constants and the statements that start a program.
    """
    found: list[tuple[str, list[str]]] = []
    names: dict = {"entry": lambda module, *flags: found.append((module, [*flags]))}
    cells = code_cells(notebook)
    after = list(cells).index("entry") + 1
    sources = [cells["parameters"].source, f"HARDWARE = {hardware!r}"]
    sources += [cell.source for cell in list(cells.values())[after:]]
    for source in sources:
        if source.startswith("%%"):
            continue
        kept = [node for node in ast.parse(source).body if starts_program(node) or constant(node)]
        exec(compile(ast.Module(kept, []), str(NOTEBOOK), "exec"), names)
    return names, found


def starts_program(node: ast.stmt) -> bool:
    calls = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]
    return any(isinstance(f, ast.Name) and f.id == "entry" for f in calls)


def constant(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and node.targets[0].id.isupper()


# --- The file ---------------------------------------------------------------------------------------


def test_notebook_is_valid_and_has_no_outputs(notebook):
    nbformat.validate(notebook, relax_add_props=False)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    ids = Counter(cell.id for cell in notebook.cells)
    assert max(ids.values()) == 1
    for cell in code_cells(notebook).values():
        assert cell.outputs == [] and cell.execution_count is None, cell.id
    assert NOTEBOOK.stat().st_size < 30_000


def test_cells_are_short_and_every_part_is_explained(notebook):
    assert notebook.cells[0].source.startswith("# ")
    for cell in notebook.cells:
        assert len(cell.source.splitlines()) <= 25, cell.id
    assert code_cells(notebook)["parameters"].metadata.tags == ["parameters"]


def test_files_that_are_named_exist(notebook):
    text = "\n".join(cell.source for cell in notebook.cells)
    text = re.sub(r"\{\w+\}", "*", text)
    paths = set(re.findall(r"(?<![\w/])(?:flags|tpu_scripts)/[\w./*-]*\w", text))
    paths |= {f"tpu_scripts/svhn/{name}" for name in re.findall(r"(?<![\w/])\w+\.sh\b", text)}
    assert {"flags/run/svhn/student.flags", "tpu_scripts/svhn/eval.sh"} <= paths
    for path in paths | set(re.findall(r"\w+\.md\b", text)):
        assert list(ROOT.glob(path)), path
    for module in re.findall(r"efficientnet_ns\.([a-z_.]+\w)", text):
        path = ROOT / "efficientnet_ns" / module.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").exists(), module


def test_tensorflow_for_gpus_is_the_pinned_one(notebook):
    (asked,) = re.findall(r"tensorflow\[and-cuda\]==([\d.]+)", NOTEBOOK.read_text())
    (python,) = re.findall(r"uv python install 3\.(\d+)", NOTEBOOK.read_text())
    condition = "python_version " + ('>= "3.12"' if int(python) >= 12 else '< "3.12"')
    assert f"\ntensorflow=={asked}; {condition} " in (ROOT / "requirements.txt").read_text()


# --- The programs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("hardware", ["cpu", "gpu", "tpu"])
def test_flags_exist_and_fit(notebook, hardware, entry_flags):
    _, started = programs(notebook, hardware)
    assert Counter(module for module, _ in started) == {
        "proc_svhn": 1,
        "main": 5,
        "filter_unlabel": 1,
        "labeling_report": 1,
        "export_model": 1,
    }
    for module, flags in started:
        values = entry_flags(module, flags)
        if module in ("main", "export_model"):
            resolved = ResolvedConfig.from_config(config.from_flags(Config, values))
            assert resolved.config.data.task_name == "svhn" and resolved.image_size == 32
            assert resolved.config.hardware.use_tpu == (hardware == "tpu")


def test_programs_are_those_of_the_scripts(notebook):
    names, started = programs(notebook)
    settings = {
        "DATA_DIR": names["DATA_DIR"],
        "TEACHER_CKPT": names["TEACHER_DIR"],
        "MODEL_DIR": names["STUDENT_DIR"],
        "NUM_SHARDS": names["NUM_SHARDS"],
        "HARDWARE": names["HARDWARE"],
        "EXTRA_FLAGS": " ".join([*names["MODEL"], *names["EXTRA_FLAGS"]]),
    }

    def script(name: str, **flags: object) -> tuple[str, list[str]]:
        words = [f"--{key}={value}" for key, value in flags.items()]
        ((module, arguments),) = commands(f"svhn/{name}.sh", *words, **settings)
        # The notebook evaluates the student while it trains.
        return module, [a.replace("--mode=train_and_eval", "--mode=train") for a in arguments]

    selection = {"num_image": names["NUM_IMAGE"], "min_threshold": names["MIN_THRESHOLD"]}
    records_made = {"dev_size": names["DEV_SIZE"], "num_shards": names["NUM_SHARDS"]}
    expected = [
        script("prepro", **records_made),
        script("train_teacher", train_steps=names["TEACHER_STEPS"]),
        script("predict"),
        script("filter_unlabel", **selection),
        script("train_offline", train_steps=names["STUDENT_STEPS"]),
        script("eval"),
    ]
    teachers, students = [i for i, (_, flags) in enumerate(started) if "--mode=eval" in flags]
    assert started[teachers][1] == [
        flag.replace("student.flags", "teacher.flags").replace(
            names["STUDENT_DIR"], names["TEACHER_DIR"]
        )
        for flag in started[students][1]
    ]
    same = [
        (module, [flag.replace("--mode=train_and_eval", "--mode=train") for flag in flags])
        for i, (module, flags) in enumerate(started)
        if i != teachers and module not in ("labeling_report", "export_model")
    ]
    assert same == expected


# --- The whole --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_notebook_runs_on_small_data(tmp_path, notebook):
    from nbclient import NotebookClient

    write_mat(tmp_path / "data" / "raw")
    steps = {"TEACHER_STEPS": 6, "STUDENT_STEPS": 8}
    small = {
        "HARDWARE": "",
        "DATA_DIR": f"{tmp_path}/data",
        "TEACHER_DIR": f"{tmp_path}/teacher",
        "STUDENT_DIR": f"{tmp_path}/student",
        "EXPORT_DIR": f"{tmp_path}/export",
        "MODEL": ["--width_coefficient=0.25", "--depth_coefficient=0.25"],
        "EXTRA_FLAGS": ["--train_batch_size=16", "--num_train_images=200", "--shuffle_buffer=100"],
        "DEV_SIZE": 40,
        "NUM_SHARDS": 4,
        "NUM_IMAGE": 12,
        "MIN_THRESHOLD": 0.0,
        **steps,
    }
    at = [cell.id for cell in notebook.cells].index("parameters") + 1
    source = "\n".join(f"{name} = {value!r}" for name, value in small.items())
    notebook.cells.insert(at, nbformat.v4.new_code_cell(source))
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()

    cells = code_cells(notebook)
    assert text_of(cells["hardware"]).split()[-1] in ("cpu", "gpu")
    for name in ("teacher-images", "curves", "student-images", "picture"):
        kinds = {kind for output in cells[name].outputs for kind in output.get("data", {})}
        assert kinds & {"image/png", "image/jpeg"}, name
    assert "srcdoc=" in cells["report"].outputs[-1].data["text/html"]

    labels = [
        tfexamples.label(record.payload)
        for part in shard_names.list_shards(f"{tmp_path}/data/predict/filter_data/data", "train-0")
        for record in tfrecords.read(part)
    ]
    assert labels and set(Counter(labels).values()) == {12}

    table = cells["results"].outputs[-1].data["text/markdown"]
    for name, last_step in (("teacher", 6), ("student", 8)):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        last = [row for row in map(json.loads, lines) if "eval/top1" in row][-1]
        sets = json.loads((tmp_path / name / "eval" / "eval.json").read_text())["sets"]
        assert {key: sets[key]["examples"] for key in sets} == {"dev": 40, "test": 60}
        # Measured during training, and by another process from the checkpoint.
        assert last["step"] == last_step and last["eval/top1"] == sets["dev"]["top1"]
        assert f"| {name} | {sets['dev']['top1']:.2%} | {sets['test']['top1']:.2%} |" in table

    first = next(
        tfrecords.read(shard_names.list_shards(f"{tmp_path}/data/proc", "test")[0])
    ).payload
    said = re.search(
        r"predicts (\d) \(probability (0\.\d+)\); .* is (\d)", text_of(cells["predict-one"])
    )
    assert int(said[3]) == tfexamples.label(first) and 0.1 <= float(said[2]) <= 1
    assert (tmp_path / "data" / "digit.jpg").read_bytes() == tfexamples.image_bytes(first)
    assert (tmp_path / "export" / "1" / "saved_model.pb").exists()


def text_of(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)
