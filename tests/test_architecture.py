"""The architecture of the package: imports, where flags are read, forbidden content and names."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "efficientnet_ns"
SOURCES = {
    ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts): path.read_text()
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}

ENTRIES = {
    "main",
    "filter_unlabel",
    "import_predictions",
    "check_data",
    "check_labels",
    "labeling_report",
    "label_beam",
    "label_ray",
    "noisy_student",
    "export_model",
    "convert_checkpoint",
    "list_models",
    "predict_image",
    "demo",
    "benchmark",
    "serving.client",
    "make_records",
    "proc_svhn",
    "evaluate_robustness",
    "study",
}
# From the top floor down: a room imports only itself and rooms below it. The programs at the
# package's root are above all rooms and import no other program.
FLOORS = (
    "loop",
    "benchmarks",
    "outcomes",
    "pipelines",
    "hygiene",
    "imported",
    "pseudo_labels",
    "training",
    "evaluation",
    "serving",
    "report",
    "inference",
    "devices",
    "resolve",
    "ingest",
    "data",
    "models",
    "config",
    "files",
)
PROGRAMS = ENTRIES - {"serving.client"}
# Modules that take plain arguments, so that they can be tested without a configuration.
WITHOUT_CONFIG = [
    "models.",
    "data.augment",
    "data.levels",
    "data.randaugment",
    "data.autoaugment",
    "data.images",
    "training.losses",
    "training.schedules",
    "training.optimizers",
    "training.ema",
]


def imports(source: str, module: str = "", *, top_level: bool = False) -> Iterator[str]:
    """Yields the dotted names that a module imports, with relative names resolved.

    Args:
      module: its name inside the package.
      top_level: leave out imports inside functions and those only for type checkers.
    """
    for node in _statements(ast.parse(source), top_level):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = [PACKAGE, *module.split(".")][: -node.level]
                base = ".".join([*parents, *filter(None, [base])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _statements(node: ast.AST, top_level: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        if top_level:
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
        yield from _statements(child, top_level)


def own_imports(source: str, module: str = "", **kwargs) -> set[str]:
    """Returns package modules that a module imports, e.g. `data.records`; `` is the package."""
    found = set()
    for name in imports(source, module, **kwargs):
        if name == PACKAGE or name.startswith(f"{PACKAGE}."):
            parts = name.split(".")[1:]
            # The last part may be a name inside a module.
            while parts and ".".join(parts) not in SOURCES and not _is_package(parts):
                parts.pop()
            found.add(".".join(parts))
    return found


def _is_package(parts: list[str]) -> bool:
    return ".".join([*parts, "__init__"]) in SOURCES


def reads_flags(source: str) -> bool:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr == "FLAGS":
            return True
        if isinstance(node, ast.ImportFrom) and any(a.name == "FLAGS" for a in node.names):
            return True
    return False


def test_the_helpers_see_what_they_should():
    source = """
import tensorflow as tf, efficientnet_ns.files.progress
from typing import TYPE_CHECKING
from efficientnet_ns import config as c
from efficientnet_ns.files.tfrecords import DataError
from . import layers
from ..training import train
if TYPE_CHECKING:
    import typed
try:
    import tried
except ImportError:
    pass
def f():
    from efficientnet_ns.pseudo_labels import write
    import lazy
class C:
    import in_class
"""
    assert own_imports(source, "models.weights") == {
        "files.progress",
        "config",
        "files.tfrecords",
        "models.layers",
        "training.train",
        "pseudo_labels.write",
    }
    assert "pseudo_labels.write" not in own_imports(source, "models.weights", top_level=True)
    assert {"tensorflow", "typed", "tried", "lazy", "in_class"} <= set(imports(source))
    top = set(imports(source, top_level=True))
    assert {"tensorflow", "tried", "in_class"} <= top and not {"typed", "lazy"} & top
    assert own_imports("from efficientnet_ns import build_model\nimport efficientnet_ns") == {""}
    assert reads_flags("from absl import flags\nx = flags.FLAGS.seed")
    assert reads_flags("from absl.flags import FLAGS as f")
    assert not reads_flags("from absl import flags\nflags.DEFINE_string('FLAGS', '', '')")


def test_there_is_something_to_check():
    assert {"__init__", "main", "files.tfrecords", "models.efficientnet", "training.train"} <= set(
        SOURCES
    )


# Imports.


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_downward(module):
    if module in ("__init__", "__main__"):
        return
    for target in own_imports(SOURCES[module], module) - {""}:
        room, target_room = module.split(".")[0], target.split(".")[0]
        assert target_room in FLOORS, f"{module} imports {target}, which is a program"
        if module not in PROGRAMS:
            downward = FLOORS.index(room) <= FLOORS.index(target_room)
            assert downward, f"{module} imports {target}, which is above it"


def test_the_root_has_programs_only():
    assert {module for module in SOURCES if "." not in module} == PROGRAMS | {
        "__init__",
        "__main__",
    }
    assert {module.split(".")[0] for module in SOURCES if "." in module} == set(FLOORS)


def test_nothing_imports_in_circles():
    graph = {module: own_imports(source, module) for module, source in SOURCES.items()}
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join([*path, module])
        if module not in finished:
            for target in graph.get(module, ()):
                visit(target, (*path, module))
            finished.add(module)

    for module in graph:
        visit(module, ())
    assert finished >= set(graph)


def test_numbers_know_no_settings():
    for module, source in SOURCES.items():
        targets = own_imports(source, module)
        if module.startswith(tuple(WITHOUT_CONFIG)):
            assert not targets & {"config", "config.sections", "resolve.resolved_config"}, module
    for name in WITHOUT_CONFIG:
        assert any(module.startswith(name) for module in SOURCES), f"{name} is gone"


def test_entries_are_the_programs():
    programs = {m for m, source in SOURCES.items() if '__name__ == "__main__"' in source}
    assert programs == ENTRIES | {"__main__"}  # It lists the programs.


def test_flags_are_read_in_one_place():
    readers = {module for module, source in SOURCES.items() if reads_flags(source)}
    assert readers == {"config.command_line"}
    defined = re.compile(r"DEFINE_\w+")
    assert {m for m, source in SOURCES.items() if defined.search(source)} == {"config.fields"}


@pytest.mark.parametrize("module", sorted(PROGRAMS))
def test_programs_are_doors(module):
    """They have a docstring, imports, a `main` of one statement after imports, and `config.run`."""
    assert len(SOURCES[module].splitlines()) <= 30
    docstring, *statements = ast.parse(SOURCES[module]).body
    imported = [s for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]
    main, guard = [s for s in statements if s not in imported]
    assert isinstance(docstring, ast.Expr) and isinstance(guard, ast.If)
    assert isinstance(main, ast.FunctionDef) and main.name == "main"
    (_,) = [s for s in main.body if not isinstance(s, ast.ImportFrom)]
    assert ast.unparse(guard.body[0]).startswith("config.run(main, ") and len(guard.body) == 1


def test_settings_are_resolved_without_a_command_line(monkeypatch):
    from absl import flags

    from efficientnet_ns import config
    from efficientnet_ns.resolve.resolved_config import ResolvedConfig

    monkeypatch.setattr(flags, "FLAGS", None)
    chosen = config.Config().override(task_name="digits", model_name="efficientnet-test")
    config.check(chosen)
    assert ResolvedConfig.from_config(chosen).num_classes == 10


def test_tensorflow_addons_stays_in_one_module():
    users = {
        module
        for module, source in SOURCES.items()
        if any(name.split(".")[0] == "tensorflow_addons" for name in imports(source, module))
    }
    assert users == {"data.augment"}


@pytest.mark.parametrize(
    "module", sorted(ENTRIES | {m for m in SOURCES if m.startswith("config.")} | {"__init__"})
)
def test_tensorflow_is_not_loaded_by_the_command_line(module):
    """Checks the module and, recursively, its top-level imports."""
    waiting, seen = [module], set()
    while waiting:
        current = waiting.pop()
        seen.add(current)
        top = {n.split(".")[0] for n in imports(SOURCES[current], current, top_level=True)}
        assert not top & {"tensorflow", "tensorflow_addons", "keras"}, current
        below = own_imports(SOURCES[current], current, top_level=True) - seen
        # Loading a module also loads its package's __init__.
        below |= {f"{t.split('.')[0]}.__init__" for t in below if "." in t} & set(SOURCES)
        waiting += [target for target in below - seen if target in SOURCES]


# Maps names that expand patterns, or treat a path as one, to the modules that may use them: on
# paths that are not the user's, or after `local_files.without_wildcards`.
EXPANDS: dict[str, set[str]] = {
    **dict.fromkeys(["glob", "iglob", "rglob", "glob1", "match_filenames_once"], set()),
    **dict.fromkeys(["matching_files", "MatchingFiles", "get_matching_files"], set()),
    **dict.fromkeys(["list_files", "latest_checkpoint", "checkpoints_iterator"], set()),
    **dict.fromkeys(["checkpoint_exists", "CheckpointManager", "NewCheckpointReader"], set()),
    **dict.fromkeys(["list_variables", "load_variable", "RestoreV2", "Restore", "restore"], set()),
    **dict.fromkeys(["MatchFiles", "ReadFromTFRecord", "ReadFromParquet", "ReadFromText"], set()),
    "load_checkpoint": {"models.checkpoint_files"},
    "read_parquet": {"files.parquet_sql"},
    # The benchmark loads what it saved below TMPDIR; the demo shows the call to the reader.
    "saved_model.load": {"inference.exported", "loop.demo"},
    "saved_model.loader": {"benchmarks.serving"},
}


def expansions(source: str) -> set[str]:
    """Returns names in `EXPANDS` that a source uses: attributes, names, imports, code strings."""
    words = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            words |= {node.attr, ".".join(ast.unparse(node).split(".")[-2:])}
        elif isinstance(node, ast.Name):
            words.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            words |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words |= set(re.findall(r"(?<!\w)(?:saved_model\.)?\w+(?=\()", node.value))
    return words & set(EXPANDS)


def test_expansions_are_seen():
    assert expansions("import glob") == expansions("from glob import glob") == {"glob"}
    assert expansions("tf.io.gfile.glob(x)") == {"glob"}
    assert expansions("Path(x).rglob('*')") == {"rglob"}
    assert expansions("f = tf.train.latest_checkpoint") == {"latest_checkpoint"}
    assert expansions("f'SELECT * FROM read_parquet([{x}])'") == {"read_parquet"}
    assert expansions("tf.saved_model.load(x)") == {"saved_model.load"}
    assert not expansions("globals(); load(x); 'glob'; model.load")


def test_no_path_is_taken_for_a_pattern():
    """A user's folder may be called `run[1]`: list it with `paths.listed`."""
    found = {(module, word) for module in SOURCES for word in expansions(SOURCES[module])}
    allowed = {(module, word) for word, modules in EXPANDS.items() for module in modules}
    assert found == allowed


def test_cores_are_counted_in_one_place():
    """The process may be limited to fewer cores than the machine has."""
    counted = re.compile(r"cpu_count|sched_getaffinity")
    assert {module for module, source in SOURCES.items() if counted.search(source)} == {
        "config.cpus"
    }


def test_tests_import_no_other_tests():
    """Helpers for several test files are in fakes.py and related modules."""
    for path in (ROOT / "tests").rglob("*.py"):
        named = {name.split(".")[0] for name in imports(path.read_text())}
        assert not {name for name in named if name.startswith("test_")}, path


# The public API.


def test_public_names_are_found():
    package = importlib.import_module(PACKAGE)
    assert {"Config", "build_model", "load_weights", "train_and_evaluate"} <= set(package.__all__)
    for name in package.__all__:
        value = getattr(package, name)
        assert value is getattr(importlib.import_module(f"{PACKAGE}.{package._HOME[name]}"), name)
        assert name in dir(package)
    with pytest.raises(AttributeError, match="build_modell"):
        _ = package.build_modell


def test_import_of_the_package_loads_no_tensorflow():
    code = f"import sys, {PACKAGE} as ns; ns.Config; print(ns.__version__, 'tensorflow' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"[\d.]+ False", done.stdout.strip())


# Forbidden content and names.


def project_files() -> list[Path]:
    """Returns the files under version control and those that may be added."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git repository")
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


# Absolute paths: not below another folder or a variable, and not in a URL.
MACHINE_PATH = re.compile(rb"(?<![\w.$}\])~-])/(?:work|home|root|Users)/\w")


def test_machine_path_pattern():
    for root in ("work", "home", "root", "Users"):
        for text in ('"{}/x"', "cd {}/me", "={}/x", " {}/me"):
            assert MACHINE_PATH.search(text.format(f"/{root}").encode()), text
        for text in ("runs{}/x", "$HOME{}/x", "https://a.b{}/x", "{{tmp}}{}/x"):
            assert not MACHINE_PATH.search(text.format(f"/{root}").encode()), text


def test_no_path_of_one_machine():
    files = project_files()
    assert ROOT / "pyproject.toml" in files
    found = {
        str(path.relative_to(ROOT)): match[0]
        for path in files
        if path != Path(__file__) and (match := MACHINE_PATH.search(path.read_bytes()))
    }
    assert not found


def test_no_drawer_for_odds_and_ends():
    named = [m for m in SOURCES if re.search(r"util|helper|misc|common", m, re.IGNORECASE)]
    assert not named
