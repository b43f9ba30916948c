"""Pictures of the student's input: augmented images with their (pseudo) labels."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.config.fields import needed
from efficientnet_ns.data import pipeline, tasks
from efficientnet_ns.files import atomic
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

FILE = "augmented.png"
_COLUMNS = 8
_TITLE_WIDTH = 17
# Records to choose from: filling the training buffer would take long for large images.
_SHUFFLE_BUFFER = 256


def draw(
    resolved: ResolvedConfig,
    labeled: pipeline.Source,
    unlabeled: pipeline.Source | None,
    number: int,
) -> np.ndarray:
    """Draws labeled and, if there are any, unlabeled images; writes the picture to model_dir.

    The images come from a separate dataset, so the training dataset is not affected.

    Args:
      number: number of labeled images, and of unlabeled ones.

    Returns:
      uint8 [H, W, 3].
    """
    ratio = 1.0 if unlabeled is not None else 0.0
    small = resolved.config.override(
        train_batch_size=number,
        unlabel_ratio=ratio,
        label_data_sample_prob=1.0,
        shuffle_buffer=_SHUFFLE_BUFFER,
    )
    sample = ResolvedConfig.from_config(small).training_batches(labeled, unlabeled, 0)
    batch = next(iter(sample))
    names = tasks.class_names(resolved.task)
    titles = [_name(int(label), names) for label in batch["label"]]
    heading = f"Labeled images, {_augmentation(resolved.labeled_preprocessing)}"
    sections = [(heading, batch["image"].numpy(), titles)]
    if unlabeled is not None:
        images, titles = batch["unl_image"].numpy(), _pseudo_titles(batch, names)
        heading = f"Unlabeled images, {_augmentation(resolved.unlabeled_preprocessing)}; {_label_source(batch)}"
        sections.append((heading, images, titles))
    png = _png(sections)
    path = os.path.join(needed(resolved.config.train.model_dir, "model_dir"), FILE)
    atomic.write(path, png)
    return tf.io.decode_png(png, channels=3).numpy()


def _name(label: int, names: Sequence[str] | None) -> str:
    text = names[label] if names else f"class {label}"
    return text if len(text) <= _TITLE_WIDTH else text[: _TITLE_WIDTH - 1] + "…"


def _augmentation(preprocessing: pipeline.Preprocessing) -> str:
    if preprocessing.clean:
        return "evaluation crops"
    if preprocessing.augmentation is None:
        return "cropped and flipped only"
    return f"augmentation {preprocessing.augmentation}"


def _label_source(batch: dict[str, tf.Tensor]) -> str:
    if "unl_probs" in batch:
        return "pseudo labels with the teacher's confidence"
    if "weak_image" in batch:
        return "labeled by the student itself"
    return "labeled by the teacher on the fly"


def _pseudo_titles(batch: dict[str, tf.Tensor], names: Sequence[str] | None) -> list[str]:
    if "unl_probs" not in batch:
        return [""] * len(batch["unl_image"])
    confidence = tf.reduce_max(batch["unl_probs"], -1)
    return [
        f"{_name(int(label), names)}\n{float(prob):.0%}"
        for label, prob in zip(batch["unl_label"], confidence)
    ]


def _png(sections: Sequence[tuple[str, np.ndarray, Sequence[str]]]) -> bytes:
    """Renders sections (heading, images [N, S, S, 3] in 0..255, titles) as a PNG, top to bottom."""
    # Not pyplot, which looks for a display and keeps every figure in memory.
    from matplotlib.figure import Figure

    rows = [-(-len(images) // _COLUMNS) for _, images, _ in sections]
    # Inches: 1.85 for a row of images with their titles, 0.45 for a heading.
    figure = Figure(figsize=(1.5 * _COLUMNS, sum(1.85 * r + 0.45 for r in rows)), dpi=100)
    parts = figure.subfigures(len(sections), 1, squeeze=False, height_ratios=rows)[:, 0]
    for part, number, (heading, images, titles) in zip(parts, rows, sections):
        part.suptitle(heading, fontsize=10, x=0.02, ha="left", parse_math=False)
        axes = part.subplots(number, _COLUMNS, squeeze=False).ravel()
        part.subplots_adjust(
            left=0.02, right=0.98, bottom=0.02, top=1 - 0.75 / (1.85 * number + 0.45), hspace=0.42
        )
        # All axes, because the last row may not be full.
        for axis in axes:
            axis.set_axis_off()
        for axis, image, title in zip(axes, images, titles):
            # Bicubic interpolation exceeds 0..255 slightly.
            axis.imshow(np.clip(np.round(image), 0, 255).astype(np.uint8), interpolation="nearest")
            # Class names are arbitrary text: a dollar sign in one must not start a formula.
            axis.set_title(title, fontsize=9, pad=3, parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def log_batch(batch: dict[str, tf.Tensor]) -> None:
    """Logs dtype, shape, range and mean of every tensor of a batch, and the count of each class."""
    for name, value in sorted(batch.items()):
        numbers = value.numpy()
        logging.info(
            "first batch, %s: %s %s, %.4g … %.4g, mean %.4g",
            name,
            numbers.dtype,
            list(numbers.shape),
            numbers.min(),
            numbers.max(),
            numbers.mean(),
        )
        if name.endswith("label"):
            classes, counts = np.unique(numbers, return_counts=True)
            pairs = ", ".join(f"{c}: {n}" for c, n in zip(classes, counts))
            logging.info("first batch, %s per class: %s", name, pairs)
