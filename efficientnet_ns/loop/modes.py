"""What `main.py` does in each `--mode`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from absl import logging

from efficientnet_ns.config import Config
from efficientnet_ns.evaluation import evaluate
from efficientnet_ns.ingest import data_source
from efficientnet_ns.pseudo_labels import predict
from efficientnet_ns.training import train

_MODES: dict[str, Callable[[Config], dict[str, Any]]] = {
    "train": lambda config: train.train_and_evaluate(config, evaluate=False),
    "eval": evaluate.evaluate,
    "train_and_eval": train.train_and_evaluate,
    "predict": predict.predict,
}


def run(mode: str, config: Config) -> dict[str, Any]:
    """Trains, evaluates or predicts; returns the JSON-serializable result of the mode's function.

    Raises:
      ConfigError, DataError: If settings or data cannot work, before work begins.
    """
    for argument in config.legacy.without_effect():
        logging.warning("%s has no effect; see its help", argument)
    return _MODES[mode](data_source.with_records(config))
