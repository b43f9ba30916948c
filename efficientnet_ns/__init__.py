"""Noisy Student Training with EfficientNet in TensorFlow 2 (arXiv 1911.04252).

Names are imported on first use, so that `--help` does not load TensorFlow.
Import this package before `tf.keras` is used; see `stack`.
"""

from __future__ import annotations

import importlib

from efficientnet_ns.devices import stack

stack.prepare()

__version__ = "1.0.0"

_HOME = {
    "Config": "config",
    "RECIPES": "models.recipes",
    "VARIANTS": "models.efficientnet",
    "build_model": "models.efficientnet",
    "endpoints": "models.efficientnet",
    "load_model": "models.efficientnet",
    "load_weights": "models.weights",
    "noisy_student": "loop.one_command",
    "save_weights": "models.weights",
    "Preprocessing": "data.pipeline",
    "class_names": "data.tasks",
    "preprocess": "inference",
    "top_k": "inference",
    "train_and_evaluate": "training.train",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*(name for name in globals() if name.startswith("__")), *__all__]
