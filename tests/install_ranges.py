"""Installs the package with pip at both ends of the ranges of pyproject.toml (`make test-install`).

For the highest and then the lowest versions, it creates a virtual environment and installs the
package and then each extra on top, each time running `pip check` and a program that needs what was
installed. Then it runs the tests of the modules that depend on the ranges most. Finally, it checks
without installing anything that pip finds the versions of all requirements files. It needs no package
but pip. `--only=highest`, `lowest` or `pinned` does one of these; `--no-tests` leaves out the tests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from pip._vendor import tomli
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
# Maps each extra to the program that must run once it is installed.
PROGRAMS = {
    "": """
from efficientnet_ns.pseudo_labels import selection, write_shard
from efficientnet_ns.inference import engines
from efficientnet_ns.models import efficientnet
from efficientnet_ns.ingest import tfds_source, videos
from efficientnet_ns.training import train
import numpy as np
import scipy.io, tensorboard.program, tensorflow_datasets, PIL.Image, matplotlib.pyplot
model = efficientnet.build_model("efficientnet-test", 3, 8)
assert engines.XnnpackEngine(model)(np.zeros([2, 8, 8, 3], np.float32)).shape == (2, 3)
""",
    "demo": "from efficientnet_ns.loop import digits; assert len(digits.load()[0]) == 5000",
    "serving": "from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc",
    "robustness": """
import av, numpy as np
from efficientnet_ns.evaluation import corruptions
from imagecorruptions import corrupt, get_corruption_names
image = np.full([64, 64, 3], 100, np.uint8)
for name in get_corruption_names("all"):
    assert corrupt(image, severity=2, corruption_name=name).shape == image.shape, name
""",
    "weights": """
from efficientnet_ns.models import published
for number in range(3):
    published.located(f"efficientnet-lite{number}")
""",
    "beam": "from efficientnet_ns.pipelines import beam",
    "ray": "from efficientnet_ns.pipelines import ray_cluster",
    "onnx": "import tf2onnx, onnxruntime",
    "openvino": """
import numpy as np
from efficientnet_ns.inference import engines
from efficientnet_ns.models import efficientnet
model = efficientnet.build_model("efficientnet-test", 3, 8)
assert engines.OpenVinoEngine(model)(np.zeros([2, 8, 8, 3], np.float32)).shape == (2, 3)
""",
    "heic": "import pillow_heif",
    "dev": "import pytest, hypothesis, nbclient",
}
TESTS = [
    "pseudo_labels/test_selection.py",
    "pseudo_labels/test_write.py",
    "data/test_augment.py",
    "ingest/test_svhn.py",
    "ingest/test_videos.py",
    "ingest/test_data_source.py",
    "files/test_tfrecords.py",
    "models/test_weights.py",
    "evaluation/test_corruptions.py",
]


def dependencies() -> dict[str, list[str]]:
    """Returns the requirements of each extra; the empty name stands for the package itself."""
    project = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"": project["dependencies"], **project["optional-dependencies"]}


def lowest(extras: list[str]) -> list[str]:
    """Returns `name==version` of the lowest versions that the package with some extras accepts."""
    pinned: dict[str, Version] = {}
    for requirement in map(Requirement, sum((dependencies()[extra] for extra in extras), [])):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        for bound in requirement.specifier:
            if bound.operator == ">=":
                # An extra may need a later version than the package itself.
                version = Version(bound.version)
                pinned[requirement.name] = max(version, pinned.get(requirement.name, version))
    return [f"{name}=={version}" for name, version in sorted(pinned.items())]


def step(what: str, command: list[str | Path], folder: Path) -> bool:
    """Runs a command in an empty folder; prints how long it took, or its output if it failed."""
    begun = time.monotonic()
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment.pop("PYTHONPATH", None)
    # Python imports from the current folder, so it must be empty.
    with tempfile.TemporaryDirectory(dir=folder) as empty:
        done = subprocess.run(command, cwd=empty, env=environment, text=True, capture_output=True)
    word = "passed" if done.returncode == 0 else "FAILED"
    print(f"  {what:<28} {word} {time.monotonic() - begun:6.0f} s", flush=True)
    if done.returncode:
        print(done.stdout[-4000:] + done.stderr[-4000:], flush=True)
    return done.returncode == 0


def check(end: str, folder: Path, tests: list[str]) -> list[bool]:
    """Runs every step at one end of the ranges; returns whether each one passed."""
    print(f"Python {sys.version.split()[0]}, {end} versions", flush=True)
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    constraints = folder / "constraints.txt"
    install = [python, "-m", "pip", "install", "--quiet", "--no-input", "--constraint", constraints]
    results = []
    for number, (extra, program) in enumerate(PROGRAMS.items(), 1):
        pins = lowest(list(PROGRAMS)[:number]) if end == "lowest" else []
        constraints.write_text("\n".join(pins) + "\n")
        name = f"{ROOT}[{extra}]" if extra else str(ROOT)
        results += [
            step(f"pip install {extra or 'the package'}", [*install, name], folder),
            step("  pip check", [python, "-m", "pip", "check"], folder),
            step("  runs", [python, "-c", program], folder),
        ]
    if tests:
        pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ROOT]
        results.append(step("tests", [*pytest, *(ROOT / "tests" / name for name in tests)], folder))
    return results


def check_pinned(folder: Path) -> list[bool]:
    """Resolves each requirements file; returns whether each one can be installed."""
    print(f"Python {sys.version.split()[0]}, pinned versions", flush=True)
    venv.create(folder / "venv", with_pip=True)
    resolve = [folder / "venv" / "bin" / "python", "-m", "pip", "install", "--dry-run", "--quiet"]
    return [
        step(path.name, [*resolve, "--no-input", "--requirement", path], folder)
        for path in sorted(ROOT.glob("requirements*.txt"))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["highest", "lowest", "pinned"])
    parser.add_argument("--no-tests", action="store_true")
    options = parser.parse_args()
    results = []
    for end in [options.only] if options.only else ["highest", "lowest", "pinned"]:
        with tempfile.TemporaryDirectory() as folder:
            if end == "pinned":
                results += check_pinned(Path(folder))
            else:
                results += check(end, Path(folder), [] if options.no_tests else TESTS)
    print(f"{results.count(True)} passed, {results.count(False)} failed")
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
