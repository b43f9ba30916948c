"""Writes `report.html` of a labeling run: what the teacher predicted and the selection kept.

Statistics cover every image, through SQL. Pictures are only from the first shards, because finding
an image requires reading its shard up to that image.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from efficientnet_ns import report
from efficientnet_ns.config import ConfigError, ReportConfig, SelectConfig, given
from efficientnet_ns.files import exclusions, manifests, name_lists, tfexamples
from efficientnet_ns.outcomes import label_next, outcome
from efficientnet_ns.outcomes.outcome import Outcome, Picture
from efficientnet_ns.pseudo_labels import index
from efficientnet_ns.pseudo_labels.selection import RULE_SETTINGS, class_names_of

_PICTURES = 36  # In a grid over all classes.
_PICTURES_PER_CLASS = 8
_PIXELS = 112  # Larger side, twice the displayed size for high-density screens.
_AGREEMENT_BINS = 20
_REVIEW_PIXELS = 320


_DEFAULTS = ReportConfig()


def write_report(config: SelectConfig, options: ReportConfig = _DEFAULTS) -> list[str]:
    """Writes the report of a finished selection and the other requested files.

    Args:
      config: settings of the selection.
      options: the path, and what to show in addition to the run.

    Returns:
      The paths of the report, the review sheet, and the list and sheet of images to label next.

    Raises:
      DataError: If predictions, selection or truth are missing or do not match.
      ConfigError: If the number of class names differs from the number of classes.
    """
    path = options.report_path or os.path.join(config.output_dir, "report.html")
    names = _names(config, options)
    report.write_page(
        path,
        title="Pseudo labels",
        intro=(
            f"Predictions in {config.prediction_dir} for the images in {config.unlabel_data_dir}, and the "
            f"selection from them in {config.output_dir}."
        ),
        sections=[
            report.Section(title[0].upper() + title[1:], body)
            for title, body in sections(config, options, class_names=names)
        ],
    )
    written, folder = [path], os.path.dirname(path)
    if options.review_images:
        written.append(os.path.join(folder, "review.html"))
        _write_review(config, options, written[-1], names)
    if options.label_next:
        written += label_next.write(config, options.label_next, folder, names)
    return written


def _write_review(
    config: SelectConfig, options: ReportConfig, path: str, names: Sequence[str]
) -> None:
    """Writes a sheet of the least confident kept images of each class, least confident first."""
    config = _as_selected(config)
    shards = min(options.report_shards, config.num_shards)
    limit, classes = options.review_images, list(range(config.num_label_classes))
    chosen = Outcome(config).pictures(
        kept=True, order="least", limit=limit, shards=shards, labels=classes
    )
    payloads = outcome.read_records(config, {(one.shard, one.record) for one in chosen})
    images = [
        report.ReviewImage(
            report.thumbnail(tfexamples.image_if_any(payload), _REVIEW_PIXELS),
            exclusions.place(index.input_path(config, one.shard)),
            one.record,
            one.label,
            one.prob,
            tfexamples.file_name(payload),
        )
        for one in chosen
        for payload in [payloads[one.shard, one.record]]
    ]
    report.write_review(path, images, names)


def _names(
    config: SelectConfig, options: ReportConfig, given: Sequence[str] | None = None
) -> list[str]:
    """Returns one name per class: `given`, those in the file in `options`, or the task's.

    Raises:
      ConfigError: If the number of names is not the number of classes.
    """
    if given is None and options.class_names:
        with tf.io.gfile.GFile(options.class_names) as f:
            given = f.read().splitlines()
    names = list(given or class_names_of(config))
    if len(names) != config.num_label_classes:
        raise ConfigError(f"{len(names)} class names for {config.num_label_classes} classes")
    return names


def sections(
    config: SelectConfig,
    options: ReportConfig = _DEFAULTS,
    *,
    truth: outcome.Truth | None = None,
    class_names: Sequence[str] | None = None,
) -> list[report.Section]:
    """Returns the sections of the report, with lowercase titles; see `write_report`.

    Args:
      truth: true labels by shard and record, instead of the file in `options`.
      class_names: one per class, instead of the file in `options`; by default the task's.
    """
    names, config = _names(config, options, class_names), _as_selected(config)
    truth = options.truth if truth is None else truth
    known = None if isinstance(truth, str) and not truth else outcome.read_truth(config, truth)
    previous = options.previous_prediction_dir
    result = Outcome(config, truth=known, previous_dir=previous)
    run = _Run(config, options, names, result, result.classes())
    parts = {
        "summary": _summary(run),
        "confidence of the pseudo labels": _confidence(run),
        "confidence by class": _confidence_by_class(run),
        "class balance before and after": _balance(run),
        "worst and best covered classes": _coverage(run),
        **({"pseudo labels against the hidden truth": _truth(run)} if known is not None else {}),
        **({"agreement with the round before": _agreement(run)} if previous else {}),
        **_pictures(run),
        "records in quarantine": _quarantine(run),
    }
    return [report.Section(title, body) for title, body in parts.items()]


def _as_selected(config: SelectConfig) -> SelectConfig:
    """Returns `config` with missing settings replaced by those of the selection.

    Raises:
      ConfigError: If a given setting, which the report would show, differs from the selection's.
    """
    made_with = outcome.made_with(config)
    if made_with is None:
        return config
    noted = {name: made_with[name] for name in RULE_SETTINGS if name in made_with}
    chosen = {name: value for name, value in given(config).items() if name in noted}
    difference = manifests.describe_difference({name: noted[name] for name in chosen}, chosen)
    if difference:
        raise ConfigError(
            f"the selection in {config.output_dir} was made with other settings ({difference}): "
            "remove them"
        )
    return dataclasses.replace(config, **noted)


class _Run(NamedTuple):
    config: SelectConfig
    options: ReportConfig
    names: list[str]
    outcome: Outcome
    classes: dict[str, np.ndarray]


def _summary(run: _Run) -> str:
    totals = run.outcome.totals()
    empty = [name for name, kept in zip(run.names, run.classes["kept"]) if not kept]
    rows = {
        "images with a prediction": "images",
        "unreadable, without a label": "unreadable",
        f"confidence at or above --min_threshold={run.config.min_threshold:g}": "confident",
        "kept": "kept",
        "records written for them, including copies": "records",
    }
    body = report.table([{"": what, "images": totals[k]} for what, k in rows.items()])
    if empty:
        shown = name_lists.shortened(empty, 20)
        text = f"{len(empty)} of {len(run.names)} classes have no image kept: {shown}"
        body += report.paragraph(text)
    return body


def _confidence(run: _Run) -> str:
    # Counted by SQL: each entry represents all images of a bin.
    counts = run.outcome.confidence(report.HISTOGRAM_BINS)
    return report.paragraph(
        "The teacher's confidence in its labels. Rejected images above the threshold belong to "
        "classes with enough images of higher confidence."
    ) + report.confidence_histogram(
        counts["prob"], counts["kept"], threshold=run.config.min_threshold, images=counts["images"]
    )


def _confidence_by_class(run: _Run) -> str:
    text = "Classes with low confidence lose most of their images to the threshold."
    plot = report.confidence_by_class(run.classes["quantiles"], run.names)
    return report.paragraph(text) + plot


def _balance(run: _Run) -> str:
    classes = run.classes
    return report.paragraph(
        f"Every class should have --num_image={run.config.num_image} records. Copies fill up classes "
        "with fewer images; many copies of few images are a warning sign."
    ) + report.class_balance(
        classes["predicted"], classes["kept"], classes["records"] - classes["kept"], run.names
    )


def _by_coverage(run: _Run) -> np.ndarray:
    """Returns the classes with predictions, int [P], fewest confident images first."""
    predicted = np.flatnonzero(run.classes["predicted"])
    keys = (predicted, run.classes["predicted"][predicted], run.classes["confident"][predicted])
    # The last key is the primary key: confident images, then all images, then the class index.
    return predicted[np.lexsort(keys)]


def _coverage(run: _Run) -> str:
    classes, order = run.classes, _by_coverage(run)
    rows = [
        {
            "class": run.names[i],
            "predicted": classes["predicted"][i],
            "at or above the threshold": classes["confident"][i],
            "kept": classes["kept"][i],
            "records": classes["records"][i],
            "records per image": _ratio(classes["records"][i], classes["kept"][i]),
            "lowest kept confidence": classes["lowest"][i] if classes["kept"][i] else None,
        }
        for i in order
    ]
    shown = max(run.options.report_classes, 1)
    text = report.paragraph(
        "Classes with predictions, ordered by the number of images at or above the threshold. In the "
        "best covered classes, the lowest kept confidence shows how selective the selection was."
    )
    return (
        f"{text}<h3>Worst covered</h3>\n{report.table(rows[:shown])}"
        f"<h3>Best covered</h3>\n{report.table(rows[::-1][:shown])}"
    )


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _truth(run: _Run) -> str:
    bins, pairs = run.outcome.accuracy(report.CALIBRATION_BINS), run.outcome.confusion()
    known, correct, images = bins["known"], bins["known"] & bins["correct"], bins["images"]
    rows = []
    groups = {"all": np.ones_like(known), "kept": bins["kept"], "rejected": ~bins["kept"]}
    for name, group in groups.items():
        inside, right = images[group & known].sum(), images[group & correct].sum()
        rows.append(
            {
                "pseudo labels": name,
                "images": images[group].sum(),
                "of known class": inside,
                "correct": right,
                "accuracy": _ratio(right, inside),
                "out of distribution": images[group & ~known].sum(),
            }
        )
    # Bins are (lower, upper], from 1.
    sums = (
        # `known` excludes images of no class, for which labels are neither right nor wrong.
        np.bincount(bins["bin"] - 1, known * images * values, report.CALIBRATION_BINS)
        for values in (1, bins["prob"], correct)
    )
    return (
        report.paragraph(
            "Accuracy of the labels and calibration of the confidence: on the dashed line, 70 % of "
            "the labels with 70 % confidence are correct."
        )
        + report.table(rows)
        + report.reliability(report.Calibration(*sums))
        + report.paragraph("Kept images by true class and pseudo label:")
        + report.confusion(pairs["truth"], pairs["label"], run.names, images=pairs["images"])
    )


def _agreement(run: _Run) -> str:
    bins = run.outcome.agreement(_AGREEMENT_BINS)
    same, images = (
        np.bincount(bins["bin"], bins[name], _AGREEMENT_BINS).astype(np.int64)
        for name in ("same", "images")
    )
    rows = []
    for name, group in (("kept", bins["kept"]), ("rejected", ~bins["kept"])):
        total, equal = bins["images"][group].sum(), bins["same"][group].sum()
        rows.append(
            {
                "images": name,
                "labeled in both rounds": total,
                "equal labels": equal,
                "agreement": _ratio(equal, total),
            }
        )
    changes = [
        {"before": run.names[before], "now": run.names[now], "images": count}
        for before, now, count in run.outcome.changes(10)
    ]
    return (
        report.paragraph(
            f"Labels of this round against those in {run.options.previous_prediction_dir}, by the confidence of "
            "this round. If the rounds agree almost everywhere, another round gains little."
        )
        + report.agreement_by_confidence(
            np.arange(1, _AGREEMENT_BINS + 1) / _AGREEMENT_BINS, same, images
        )
        + report.table(rows)
        + "<h3>Most frequent changes</h3>\n"
        + report.table(changes)
    )


def _quarantine(run: _Run) -> str:
    found = outcome.read_quarantine(run.config)
    total = sum(found.reasons.values())
    text = report.paragraph(
        f"{total} records could not be labeled, in {len(found.files)} of "
        f"{run.config.num_shards} files. They keep their places and are never selected."
    )
    if found.unknown:
        text += report.paragraph(
            f"{len(found.unknown)} prediction files have no manifest and thus no list of such records."
        )
    if not total:
        return text
    reasons = [{"reason": why, "records": n} for why, n in found.reasons.most_common(20)]
    files = [{"file": name, "records": n} for name, n in found.files.most_common(10)]
    examples = [{"file": name, "record": n, "reason": why} for name, n, why in found.examples]
    return (
        f"{text}{report.table(reasons)}<h3>Files with most of them</h3>\n{report.table(files)}"
        f"<h3>The first records</h3>\n{report.table(examples)}"
    )


# Title → (kept or rejected, order of confidence, text).
_GRIDS = {
    "most confident images kept": (
        True,
        "most",
        "The most confident predictions, with their labels.",
    ),
    "least confident images kept": (
        True,
        "least",
        "Near the threshold: look for wrong labels here.",
    ),
    "images rejected": (False, "most", "Most confident first: correct labels here are lost."),
}


def _pictures(run: _Run) -> dict[str, str]:
    """Maps titles to grids over all classes, and of some classes."""
    shards = min(run.options.report_shards, run.config.num_shards)
    chosen = _classes_to_show(run)
    overall, by_class = (
        {
            title: run.outcome.pictures(
                kept=kept, order=order, limit=limit, shards=shards, labels=labels
            )
            for title, (kept, order, _) in _GRIDS.items()
        }
        for limit, labels in ((_PICTURES, None), (_PICTURES_PER_CLASS, chosen))
    )
    shown = [picture for grid in (*overall.values(), *by_class.values()) for picture in grid]
    # Reads the images of all grids together, so that every shard is read only once.
    found = outcome.read_images(run.config, {(p.shard, p.record) for p in shown})
    data = {place: report.thumbnail(image, _PIXELS) for place, image in found.items()}
    note = f"Pictures are taken from {shards} of {run.config.num_shards} shards."
    source = report.paragraph(note) if shards < run.config.num_shards else ""

    def grid(pictures: Sequence[Picture], *, named: bool) -> str:
        captions = [(f"{run.names[p.label]} " if named else "") + f"{p.prob:.2f}" for p in pictures]
        images = [data[p.shard, p.record] for p in pictures]
        return report.image_grid(list(zip(images, captions)))

    parts = {
        title: report.paragraph(_GRIDS[title][2]) + source + grid(pictures, named=True)
        for title, pictures in overall.items()
    }
    classes = []
    for label in chosen:
        body = "".join(
            f"<h3>{title.capitalize()}</h3>\n"
            + grid([p for p in pictures if p.label == label], named=False)
            for title, pictures in by_class.items()
        )
        kept = run.classes["kept"][label]
        classes.append(report.details(f"{run.names[label]}: {kept} images kept", body))
    text = report.paragraph(
        "The least confident images kept show what the threshold admits; the most confident images "
        "rejected show what it costs."
        + (" The worst covered classes come first." if len(chosen) > 1 else "")
    )
    return {**parts, "pictures by class": source + text + "".join(classes)}


def _classes_to_show(run: _Run) -> list[int]:
    """Returns the worst and best covered classes and some in between, in order of coverage."""
    order, count = _by_coverage(run), run.options.report_classes
    if len(order) > 3 * count:
        between = np.linspace(count, len(order) - count - 1, count).astype(int)
        order = np.concatenate([order[:count], order[between], order[len(order) - count :]])
    return order.tolist()
