"""Four logical CPU devices, fixed seeds, and the location of the original code's numbers."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import efficientnet_ns  # noqa: F401 - decides which Keras TensorFlow has

# isort: split
import fakes
import gcs
import numpy as np
import pytest
import tensorflow as tf
from absl import flags, logging

from efficientnet_ns import config
from efficientnet_ns.models import efficientnet

_buckets = itertools.count()
GOLDENS_VARIABLE = "EFFICIENTNET_NS_GOLDENS"

# Tests compile more than they run. XLA reads this when it is first used.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# Must precede TensorFlow's first use of devices; without a strategy, all runs on the first.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
)


def pytest_configure(config: pytest.Config) -> None:
    # Keras 2.15 itself causes this once a random seed is set.
    config.addinivalue_line(
        "filterwarnings", "ignore:non-integer arguments to randrange:DeprecationWarning"
    )


def pytest_collection_finish() -> None:
    gc.freeze()  # Collections need not scan what is already imported.


@pytest.fixture(scope="session", autouse=True)
def compiled_functions_stay() -> Iterator[None]:
    """Keeps Keras from setting TensorFlow's seed, which would discard every compiled function.

    The reset is for stateful random operations, which this package uses only in benchmarks.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf.compat.v2.random, "set_seed", lambda seed: None)
        yield


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Starts every test from the same seeds and restores Keras' global state."""
    tf.keras.utils.set_random_seed(0)
    logging.set_verbosity(logging.INFO)  # The TensorFlow Lite converter changes it.
    yield
    tf.keras.mixed_precision.set_global_policy("float32")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The small results of the original code, kept next to the tests."""
    return Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def large_goldens() -> Path:
    """The folder with checkpoints of the original code, which are too large to keep here."""
    folder = os.environ.get(GOLDENS_VARIABLE)
    if not folder:
        pytest.skip(f"{GOLDENS_VARIABLE} is not set: checkpoints made by the original code")
    return Path(folder)


@pytest.fixture
def small_lite(monkeypatch) -> str:
    """`efficientnet-lite0` with the blocks of efficientnet-test, for tests that need any Lite."""
    rows = efficientnet.VARIANTS
    small = rows["efficientnet-test"]
    row = dataclasses.replace(
        rows["efficientnet-lite0"], stages=small.stages, head_filters=small.head_filters
    )
    monkeypatch.setitem(rows, "efficientnet-lite0", row)
    return "efficientnet-lite0"


@pytest.fixture(scope="module")
def shared_students() -> Iterator[None]:
    """See `fakes.one_student_per_settings`."""
    with fakes.one_student_per_settings():
        yield


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Iterator[gcs.Store]:
    """An object store for `gs://`; see `gcs`."""
    with gcs.running(tmp_path_factory.mktemp("store")) as store:
        yield store


@pytest.fixture
def bucket(store, monkeypatch) -> Iterator[str]:
    """The name of an empty bucket, reachable as `gs://<name>`, in a store without faults."""
    for name, value in store.environment().items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{next(_buckets)}"
    store.create(name)
    yield name
    store.heal()


@pytest.fixture(scope="session")
def two_replicas() -> tf.distribute.MirroredStrategy:
    return tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


@pytest.fixture
def entry_flags(monkeypatch) -> Callable[[str, list[str]], flags.FlagValues]:
    """Parses a command line with the flags of a program.

    Paths of flag files are relative to the repository. Positional arguments are refused where the
    program refuses them.
    """
    monkeypatch.chdir(Path(__file__).parents[1])

    def parse(program: str, arguments: list[str]) -> flags.FlagValues:
        values = flags.FlagValues()

        def run(main: Callable, *settings: type, words: bool = False) -> None:
            for cls in settings:
                config.define_flags(cls, values)
            rest = values(["program", *arguments])
            assert words or rest == ["program"], rest

        with monkeypatch.context() as patch:
            patch.setattr(config, "run", run)
            runpy.run_module(f"efficientnet_ns.{program}", run_name="__main__")
        return values

    return parse
