"""The two stacks: what is decided before TensorFlow is imported, and equal numbers from both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fakes as set_ups
import numpy as np
import pytest
import stack_arrays
import tensorflow as tf

from efficientnet_ns.files import metrics_log

ROOT = Path(__file__).parents[2]
OTHER_VARIABLE = "EFFICIENTNET_NS_OTHER_PYTHON"
REFERENCE = ROOT / "tests" / "goldens" / "stacks" / "reference.npz"


def python(*arguments: object, interpreter: str = sys.executable, **more: str):
    """Runs Python with the package and the tests on its path."""
    path = os.pathsep.join(map(str, (more.pop("first", ""), ROOT, ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": path.strip(os.pathsep), **more}
    command = [interpreter, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


# --- Before TensorFlow is imported, with a package of that name that is quick to load ---------------

LOUD = """
import os, sys
print("ours", file=sys.stderr, flush=True)
os.write(2, b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\\n")
os.write(2, b"I0000 00:00:1795907911.112861 3911 cudart_stub.cc:31] Could not find cuda drivers\\n")
os.write(2, b"E0000 00:00:1795907911.112861 3911 cuda_dnn.cc:8310] Unable to register cuDNN\\n")
"""
KERAS_3 = """
import types
keras = types.ModuleType("keras")
keras.__version__ = "3.15.1"
keras._tfll_initialized = True
"""


@pytest.fixture
def fakes(tmp_path):
    """A folder of packages that shadow the installed ones, and a function that writes one."""

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)

    return tmp_path, write


@pytest.mark.parametrize("level, lines", [("3", 1), ("2", 4)])
def test_import_of_tensorflow_is_as_quiet_as_asked(fakes, level, lines):
    folder, write = fakes
    write("tensorflow", LOUD)
    code = "import efficientnet_ns, tensorflow, sys; print('after', file=sys.stderr)"
    done = python("-c", code, first=folder, TF_CPP_MIN_LOG_LEVEL=level)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "ours" and done.stderr.splitlines()[-1] == "after"
    assert len(done.stderr.splitlines()) == lines + 1


def test_failed_import_of_tensorflow_is_told(fakes):
    folder, write = fakes
    write("tensorflow", LOUD + "raise ImportError('libcuda is gone')")
    done = python(
        "-c", "import efficientnet_ns, tensorflow", first=folder, TF_CPP_MIN_LOG_LEVEL="3"
    )
    assert done.returncode == 1 and "ImportError: libcuda is gone" in done.stderr
    assert "cuDNN" not in done.stderr


@pytest.mark.parametrize("set_to", [None, "1", "0"])
def test_keras_2_is_asked_for(fakes, set_to):
    folder, write = fakes
    write("tf_keras", "")
    more = {} if set_to is None else {"TF_USE_LEGACY_KERAS": set_to}
    clear = "" if set_to else "import os; os.environ.pop('TF_USE_LEGACY_KERAS', None)\n"
    code = clear + "import efficientnet_ns, os; print(os.environ['TF_USE_LEGACY_KERAS'])"
    done = python("-c", code, first=folder, **more)
    if set_to == "0":
        assert (
            "ImportError: efficientnet_ns needs Keras 2, but TF_USE_LEGACY_KERAS=0" in done.stderr
        )
    else:
        assert done.stdout.strip() == "1"


def test_keras_of_tensorflow_is_loaded_without_tf_keras():
    """The variable may be set for other programs, or come from a process of the other stack."""
    code = (
        "import os, sys; sys.modules['tf_keras'] = None; import efficientnet_ns; "
        "print(os.environ.get('TF_USE_LEGACY_KERAS'))"
    )
    assert python("-c", code, TF_USE_LEGACY_KERAS="1").stdout.strip() == "None"


def test_keras_3_in_use_is_refused_in_one_line(fakes):
    folder, write = fakes
    write("tf_keras", "")
    write("tensorflow", KERAS_3)
    refused = python("-c", "import tensorflow, efficientnet_ns", first=folder)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("ImportError: efficientnet_ns needs Keras 2")
    assert "import efficientnet_ns first" in refused.stderr
    # TensorFlow is imported but not used yet, so the variable still takes effect.
    write("tensorflow", KERAS_3.replace("True", "False"))
    assert python("-c", "import tensorflow, efficientnet_ns", first=folder).returncode == 0


def test_this_stack_has_keras_2():
    assert not getattr(tf.keras, "__version__", "2").startswith("3")
    assert hasattr(tf.keras.optimizers, "legacy")


# --- The numbers ------------------------------------------------------------------------------------

# Allowed deviation of rounded values from the reference stack, whose CPU may also differ.
TOLERANCE = {"computed/": 1e-5, "trained/": 1e-4, "initial/": 1e-6, "pixels/": 0, "draws/": 0}


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Checks the tolerance of each group, and prints the deviation of each array."""
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
        far = np.max(np.abs(ours[name].astype(np.float64) - value))
        print(f"{name:<26} {'equal' if np.array_equal(ours[name], value) else f'{far:.1e}'}")
        tolerance = TOLERANCE[name.split("/")[0] + "/"]
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def ours() -> dict[str, np.ndarray]:
    return stack_arrays.compute()


def test_numbers_are_those_of_the_reference_stack(ours):
    with np.load(REFERENCE) as stored:
        compare(ours, dict(stored))


# --- The other stack, if this machine has it --------------------------------------------------------


@pytest.fixture(scope="module")
def other() -> str:
    """The interpreter of the other stack's environment."""
    reference = sys.version_info < (3, 12)
    named = os.environ.get(OTHER_VARIABLE)
    for candidate in [named] if named else (ROOT / ".venv", ROOT / ".venv-other"):
        path = Path(candidate) if named else candidate / "bin" / "python"
        code = "import sys, pytest, tensorflow; print(sys.version_info < (3, 12))"
        if (
            path.exists()
            and python("-c", code, interpreter=str(path)).stdout == f"{not reference}\n"
        ):
            return str(path)
    pytest.skip(f"needs an environment of the other stack: {OTHER_VARIABLE}, or .venv-other")


def test_both_stacks_agree_on_one_machine(ours, other, tmp_path):
    made = tmp_path / "other.npz"
    done = python(ROOT / "tests" / "stack_arrays.py", made, interpreter=other)
    assert done.returncode == 0, done.stderr
    with np.load(made) as theirs:
        compare(ours, dict(theirs))
        for name in theirs.files:
            if name.startswith(stack_arrays.EXACT):
                np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


CONTINUE = """
import json, sys
from efficientnet_ns.files import metrics_log
from efficientnet_ns.config import Config
from efficientnet_ns.training import train
train.train_and_evaluate(Config().override(**json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize("begins_here", [True, False])
def test_training_continues_on_the_other_stack(ours, other, tmp_path, begins_here):
    """Killed after step 6, training resumes from the checkpoint of step 4."""
    set_ups.write_data(tmp_path)
    config = set_ups.noised(tmp_path, "student")
    settings = set_ups.changed_settings(config)
    first, second = (sys.executable, other) if begins_here else (other, sys.executable)
    killed = python("-c", set_ups.KILLED_BEFORE_STEP_6_IS_SAVED, settings, interpreter=first)
    assert set_ups.saved_steps(config.train.model_dir) == [2, 4], killed.stderr
    continued = python("-c", CONTINUE, settings, interpreter=second)
    assert continued.returncode == 0, continued.stderr
    assert "InitializeLog" not in continued.stderr, "TensorFlow's own log"
    assert set_ups.saved_steps(config.train.model_dir) == [2, 4, 6, 7]
    rows = metrics_log.read_metrics(config.train.model_dir)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    np.testing.assert_allclose(losses, ours["trained/loss"], atol=TOLERANCE["trained/"])


EXPORT = """
import sys
import efficientnet_ns
import tensorflow as tf
from efficientnet_ns.data.pipeline import Preprocessing
from efficientnet_ns.models import efficientnet
from efficientnet_ns.serving import export
tf.keras.utils.set_random_seed(3)
model = efficientnet.build_model("efficientnet-test", 10, 32)
export.export(model, Preprocessing(32), sys.argv[1], 1)
"""
# Loads the model as a server does: with TensorFlow alone, by the session loader.
ANSWER = """
import sys, numpy as np, tensorflow as tf
with tf.compat.v1.Session(graph=tf.Graph()) as session:
    meta = tf.compat.v1.saved_model.loader.load(session, ["serve"], sys.argv[1] + "/1")
    signature = meta.signature_def["serving_default"]
    with open(sys.argv[2], "rb") as f:
        fed = {signature.inputs["image_bytes"].name: [f.read(), b"bad"]}
    names = [signature.outputs[name].name for name in ("valid", "probabilities")]
    valid, probabilities = session.run(names, fed)
assert not [name for name in sys.modules if name.startswith("efficientnet_ns")]
assert valid.tolist() == [True, False]
np.save(sys.argv[3], probabilities[0])
"""


@pytest.mark.parametrize("exported_here", [True, False])
def test_exported_model_is_served_by_the_other_stack(other, tmp_path, exported_here):
    picture = tmp_path / "picture.png"
    picture.write_bytes(tf.io.encode_png(stack_arrays.pictures()[0]).numpy())
    exporter = sys.executable if exported_here else other
    done = python("-c", EXPORT, tmp_path / "base", interpreter=exporter)
    assert done.returncode == 0, done.stderr
    answers = []
    for number, interpreter in enumerate((sys.executable, other)):
        made = tmp_path / f"{number}.npy"
        done = python("-c", ANSWER, tmp_path / "base", picture, made, interpreter=interpreter)
        assert done.returncode == 0, done.stderr
        answers.append(np.load(made))
    assert answers[0].shape == (10,) and np.ptp(answers[0]) > 1e-4
    np.testing.assert_allclose(*answers, atol=1e-6)
    version = tensorflow_version(exporter)
    for name in ("docker-compose.yml", "kubernetes.yaml", "start.sh"):
        text = (tmp_path / "base" / "deploy" / name).read_text()
        assert f"tensorflow/serving:{version}" in text, name


def tensorflow_version(interpreter: str) -> str:
    code = "from importlib import metadata; print(metadata.version('tensorflow'))"
    return python("-c", code, interpreter=interpreter).stdout.strip()
