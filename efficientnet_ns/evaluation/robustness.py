"""Measures accuracy and stability on the robustness sets in resumable parts."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from efficientnet_ns.evaluation import robustness_metrics as metrics
from efficientnet_ns.evaluation import robustness_published as published
from efficientnet_ns.evaluation import robustness_sets as sets
from efficientnet_ns.evaluation.robustness_clips import Clips
from efficientnet_ns.files import manifests
from efficientnet_ns.files.errors import DataError

# N encoded images → (probabilities float32 [N, C], {index: problem}).
Classify = Callable[[Sequence[bytes]], tuple[np.ndarray, dict[int, str]]]


class Evaluation:
    """Measures the sets with one model.

    Args:
      classify: the model.
      group: images per call of `classify`.
      folder: folder of completed parts, which are not measured again.
      identity: what determines the predictions (weights, size, …), JSON-able.
      classify_whole: the model for images that are already evaluation crops, as in ImageNet-C and
        -P; None uses `classify`.
    """

    def __init__(
        self,
        classify: Classify,
        group: int,
        folder: str,
        identity: dict[str, Any],
        classify_whole: Classify | None = None,
    ):
        self._classify, self._whole = classify, classify_whole or classify
        self._group, self._folder, self._identity = group, folder, identity

    def part(self, name: str, settings: dict[str, Any], measure: Callable[[], dict]) -> dict:
        """Returns the stored result of a part, or calls `measure` and stores its result.

        Args:
          name: name of the part.
          settings: what determines the result in addition to `identity`, JSON-able.
          measure: returns the result, JSON-able.

        Raises:
          manifests.OutputConflict: If the stored result belongs to another model or set.
        """
        stored = os.path.join(self._folder, name.replace("/", "-") + ".json")
        return manifests.Stage(stored, [], {**self._identity, **settings}).once(measure)

    def predictions(
        self,
        images: Iterable[tuple[str, bytes]],
        reduce: Callable[[np.ndarray], np.ndarray],
        cropped: bool = False,
    ) -> np.ndarray:
        """Returns `reduce(probabilities)` of each group of images, concatenated.

        Args:
          images: (name for messages, encoded image) pairs; read group by group.
          reduce: maps probabilities float32 [n, C] to an array of n rows.
          cropped: whether the images are already evaluation crops.

        Raises:
          DataError: If an image cannot be classified; names the first one.
        """
        classify = self._whole if cropped else self._classify
        images, reduced = iter(images), []
        while group := list(itertools.islice(images, self._group)):
            probs, problems = classify([image for _, image in group])
            for place, problem in problems.items():
                raise DataError(f"{group[place][0]}: {problem}")
            reduced.append(reduce(probs))
        return np.concatenate(reduced)

    def accuracy(
        self,
        name: str,
        images: sets.Images,
        among: Sequence[int] | None = None,
        cropped: bool = False,
    ) -> dict:
        """Returns `top1` and `top5` (fractions) of a set, and its `examples` and `classes`.

        Args:
          name: name of the set.
          images: the set.
          among: the classes that may be predicted; None for all.
          cropped: whether the images are already evaluation crops.
        """

        def measure() -> dict:
            best = functools.partial(metrics.best, classes=among)
            predicted = self.predictions(images.read(name), best, cropped)
            # [N, k]: whether each of the best classes is the true one.
            right = predicted == np.array([[entry.label] for entry in images.entries])
            return {
                "top1": float(np.mean(right[:, 0])),
                "top5": float(np.mean(right.any(1))),
                "examples": len(images.entries),
                "classes": len(images.classes),
            }

        settings = {"set": images.source.path, "images": len(images.entries), "cropped": cropped}
        return self.part(name, settings, measure)

    def real(self, path: str, images: sets.Images, right: Sequence[Sequence[int]]) -> dict:
        """Returns `top1` by ReaL labels and the number of `examples`.

        Args:
          path: path of the labels.
          images: the validation images in order of name, from ILSVRC2012_val_00000001.
          right: the correct classes of each image; see `robustness_sets.real_labels`.
        """

        def measure() -> dict:
            best = functools.partial(metrics.best, k=1)
            predicted = self.predictions(images.read("imagenet-real"), best)[:, 0]
            top1, examples = metrics.real_accuracy(predicted, right)
            return {"top1": top1, "examples": examples}

        return self.part("imagenet-real", {"set": path}, measure)

    def corruptions(self, images: Mapping[tuple[str, str], sets.Images]) -> dict:
        """Measures ImageNet-C.

        Args:
          images: by (corruption, severity); see `robustness_sources.open_corruptions`.

        Returns:
          `errors` and `ce` by corruption, and `classes`; `top1` and `mce` (fractions) unless one of
          the 15 corruptions is missing. The four extra ones appear only in `errors` and `ce`.
        """
        errors: dict[str, list[float]] = {}
        for (name, severity), found in images.items():
            part = self.accuracy(f"imagenet-c/{name}/{severity}", found, cropped=True)
            errors.setdefault(name, []).append(1 - part["top1"])
        means = {name: float(np.mean(values)) for name, values in errors.items()}
        result: dict[str, Any] = {"errors": means, "ce": metrics.corruption_errors(means)}
        # The same in all parts, as `check_equal_classes` ensures.
        result["classes"] = part["classes"]
        if all(name in means for name in metrics.ALEXNET_ERROR):
            result["top1"] = 1 - float(np.mean([means[n] for n in metrics.ALEXNET_ERROR]))
            result["mce"] = metrics.mean_corruption_error(means)
        return result

    def perturbations(self, clips: Mapping[str, Clips]) -> dict:
        """Measures ImageNet-P.

        Args:
          clips: by perturbation; see `robustness_sources.open_perturbations`.

        Returns:
          `flips` (FP) and `distances` (uT5D) by perturbation, and `classes`; `mfr` and the means of
          `top1` (over all frames) and `ut5d` unless one of the ten perturbations is missing.
        """
        parts = {}
        for name, found in clips.items():
            settings = {"set": found.path, "clips": len(found.names)}
            measure = functools.partial(self._stability, name, found)
            parts[name] = self.part(f"imagenet-p/{name}", settings, measure)
        result: dict[str, Any] = {
            "flips": {name: part["fp"] for name, part in parts.items()},
            "distances": {name: part["ut5d"] for name, part in parts.items()},
            # If classes may be missing, perturbations may have different classes.
            "classes": min(part["classes"] for part in parts.values()),
        }
        if all(name in parts for name in metrics.ALEXNET_FLIPS):
            result["mfr"] = metrics.mean_flip_rate(result["flips"])
            for key in ("top1", "ut5d"):
                result[key] = float(np.mean([parts[name][key] for name in metrics.ALEXNET_FLIPS]))
        return result

    def _stability(self, perturbation: str, clips: Clips) -> dict:
        frames = clips.frames(f"imagenet-p/{perturbation}")
        predicted = self.predictions(frames, metrics.best, cropped=True)
        # [clips, frames, 5]; `Clips.frames` raises an error unless all clips have the same length.
        predicted = predicted.reshape(len(clips.names), -1, predicted.shape[1])
        right = predicted[..., 0] == np.array(clips.labels)[:, np.newaxis]
        return {
            "fp": metrics.flips(predicted[..., 0], perturbation),
            "ut5d": metrics.top5_distance(predicted, perturbation),
            "top1": float(np.mean(right)),
            "clips": len(clips.names),
            "frames": predicted.shape[1],
            "classes": len(set(clips.labels)),
        }


_KEYS = {"imagenet-c": ("mce", "mCE"), "imagenet-p": ("mfr", "mFR")}


def rows(results: dict[str, dict], image_size: int, model: str = "") -> list[dict[str, Any]]:
    """Returns a row per set: measured and published percentages; None for an incomplete mean."""
    summary = []
    for name, result in results.items():
        key, label = _KEYS.get(name, ("top1", "top-1"))
        measured = round(100 * result[key], 1) if key in result else None
        row = {"set": _titled(name, result), "measure": label, "measured": measured}
        if known := published.timm(name, model, image_size).get(key):
            row["same size (timm)"] = round(known, 1)
        for method in (published.BASELINE, published.STUDENT):
            row[method] = published.paper(name, method, image_size).get(key)
        summary.append(row)
    # Every row gets every column, because timm's values are known only for some sets.
    columns = dict.fromkeys(column for row in summary for column in row)
    return [{column: row.get(column) for column in columns} for row in summary]


def tables(results: dict[str, dict], image_size: int, model: str) -> dict[str, list[dict]]:
    """Maps the title of each set to rows in the layout of the paper's table."""
    return {
        _titled(name, result): published.table(name, result, model, image_size)
        for name, result in results.items()
    }


def _titled(name: str, result: dict) -> str:
    whole = len(sets.classes_of(name))
    if result.get("classes", whole) == whole:
        return name
    return f"{name} ({result['classes']} of {whole} classes)"
