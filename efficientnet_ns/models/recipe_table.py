"""The published models as a table or as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping

from efficientnet_ns.files.text_table import text_table
from efficientnet_ns.models.recipes import RECIPES, Recipe

# Title → content of each column; "-" if a model has no value.
_COLUMNS: dict[str, Callable[[Recipe], str]] = {
    "params": lambda r: f"{r.params / 1e6:.2f}M",
    "mult-adds": lambda r: f"{r.multiply_adds / 1e9:.3g}B",
    "train px": lambda r: str(r.train_resolution),
    "test px": lambda r: str(r.test_resolution),
    "crop": lambda r: f"{r.crop_fraction:.3f}",
    "dropout": lambda r: str(r.dropout_rate),
    "epochs": lambda r: str(r.epochs),
    "ratio": lambda r: str(r.unlabel_ratio),
    "magnitude": lambda r: str(r.randaugment_magnitude or "-"),
    "top-1": lambda r: str(r.top1 or "-"),
    "supervised": lambda r: str(r.top1_supervised),
    "TF1 checkpoint": lambda r: r.tf1_checkpoint,
    "timm": lambda r: r.timm_name,
    "Keras file": lambda r: r.keras_file or "-",
}
_LEFT_ALIGNED = {"TF1 checkpoint", "timm", "Keras file"}

_LEGEND = """
params: trainable; mult-adds: for one image at test px; crop: fraction of the shorter side; ratio:
unlabeled images per labeled one; magnitude: of RandAugment; top-1, supervised: ImageNet accuracy in
percent with Noisy Student and with only ImageNet's labels.
"""


def counted(recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """Returns the recipes with parameters and multiply-adds counted from the models' graphs."""
    from efficientnet_ns.models import (
        complexity,
    )  # Imports TensorFlow, which the table does not need.

    rows = {}
    for name, recipe in recipes.items():
        counts = complexity.count_variant(name)
        rows[name] = dataclasses.replace(
            recipe, params=counts.params, multiply_adds=counts.multiply_adds
        )
    return rows


def table(recipes: Mapping[str, Recipe]) -> str:
    """Formats one line per model below a line of titles, in aligned columns."""
    rows = [[name, *(show(row) for show in _COLUMNS.values())] for name, row in recipes.items()]
    return text_table(["model", *_COLUMNS], rows, right=set(_COLUMNS) - _LEFT_ALIGNED)


def listing(*, count: bool = False, as_json: bool = False) -> str:
    """Returns the published models as text.

    Args:
      count: whether to count parameters and multiply-adds from the graphs, not use published values.
      as_json: whether to return a JSON list of objects instead of the table.
    """
    recipes = counted(RECIPES) if count else RECIPES
    if as_json:
        rows = [{"model": name, **dataclasses.asdict(row)} for name, row in recipes.items()]
        return json.dumps(rows, indent=1)
    return table(recipes) + "\n" + _LEGEND.rstrip()
