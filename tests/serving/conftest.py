"""An exported model shared by all serving tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from served_models import (
    CLASSES,
    OPTIONS,
    PREPROCESSING,
    SIZE,
    Session,
)

from efficientnet_ns.models import efficientnet
from efficientnet_ns.serving import export


@pytest.fixture(scope="module", autouse=True)
def layers_for_eager_execution() -> None:
    """Other tests build models in graphs, which leaves Keras' layer classes in graph mode."""
    efficientnet.build_model("efficientnet-test", CLASSES, SIZE)


@pytest.fixture(scope="session")
def model() -> tf.keras.Model:
    made = efficientnet.build_model("efficientnet-test", CLASSES, SIZE)
    rng = np.random.default_rng(2)
    made.set_weights([w + rng.uniform(0, 0.1, w.shape) for w in made.get_weights()])
    return made


@pytest.fixture(scope="session")
def base(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    export.export(model, PREPROCESSING, str(folder), 1, OPTIONS)
    return folder


@pytest.fixture(scope="session")
def served(base) -> Session:
    return Session(str(base / "1"))
