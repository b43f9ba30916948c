"""Accuracy and stability on the robustness sets, one resumable part after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from efficientnet_ns.data import manifests, records
from efficientnet_ns.evaluation import robustness_metrics as metrics
from efficientnet_ns.evaluation import robustness_sets as sets
from efficientnet_ns.progress import Progress

# Encoded images → (probabilities [N, C], {place: problem}).
Classify = Callable[[Sequence[bytes]], tuple[np.ndarray, dict[int, str]]]


class Evaluation:
    """Measures sets with one model.

    Args:
      classify: the model.
      group: images per call.
      folder: results of finished parts; a part that is there is not measured again.
      identity: what determines the answers (weights, size, …), JSON-able.
    """

    def __init__(self, classify: Classify, group: int, folder: str, identity: dict[str, Any]):
        self._classify, self._group = classify, group
        self._folder, self._identity = folder, identity

    def part(self, name: str, path: str, measure: Callable[[], dict]) -> dict:
        """The stored result of `name`, or that of `measure`, which is then stored.

        Raises:
          manifests.OutputConflict: the stored one is of another model or set.
        """
        identity = {**self._identity, "set": path}
        stored = os.path.join(self._folder, name.replace("/", "-") + ".json")
        stage = manifests.Stage(stored, [], identity)
        if not stage.done():
            result = measure()
            with stage.write() as (_, counts):
                counts.update(result)
        return stage.counts()

    def answers(self, paths: Sequence[str], what: str, reduce=np.asarray) -> np.ndarray:
        """`reduce(probabilities [n, C])` of image files, joined; DataError names a file of no use."""
        answers = []
        with Progress(len(paths), what, "images") as progress:
            for start in range(0, len(paths), self._group):
                group = paths[start : start + self._group]
                probs, problems = self._classify([_read(path) for path in group])
                for place, problem in problems.items():
                    raise records.DataError(f"{group[place]}: {problem}")
                answers.append(reduce(probs))
                progress.update(len(group))
        return np.concatenate(answers)

    def accuracy(self, name: str, path: str, images: sets.Images, subset: bool) -> dict:
        """Top-1 and top-5 of all images; with `subset`, among the classes that have folders."""

        def measure() -> dict:
            probs = self.answers(images.paths, name)
            classes = images.classes if subset else None
            found = {f"top{k}": metrics.hits(probs, images.labels, k, classes) for k in (1, 5)}
            return {
                **{key: float(np.mean(value)) for key, value in found.items()},
                "examples": len(images.paths),
            }

        return self.part(name, path, measure)

    def real(self, path: str, images: Sequence[str], right: Sequence[Sequence[int]]) -> dict:
        """Accuracy by ReaL labels.

        Args:
          path: of the labels.
          images: the validation images, in the order of their names, ILSVRC2012_val_00000001 first.
          right: the right classes of each; see `robustness_sets.real_labels`.
        """

        def measure() -> dict:
            answers = self.answers(images, "imagenet-real", lambda probs: probs.argmax(1))
            top1, examples = metrics.real_accuracy(answers, right)
            return {"top1": top1, "examples": examples}

        return self.part("imagenet-real", path, measure)

    def corruptions(self, path: str, allow_missing: bool = False) -> dict:
        """ImageNet-C, `path/<corruption>/<severity>/<wnid>/*`.

        Returns:
          `errors` and `ce` by corruption, `top1`, and `mce` (fractions) unless one of the 15 is
          missing. The four extra corruptions are in `errors` and `ce` alone.
        """
        listed = {}
        extra = tuple(metrics.ALEXNET_ERROR_EXTRA)
        for name in sets.parts(path, tuple(metrics.ALEXNET_ERROR), extra, allow_missing):
            inside = os.path.join(path, name)
            # A corruption's error is a mean over all severities: none may be missing.
            for severity in sets.parts(inside, metrics.SEVERITIES, (), allow_missing=False):
                folder = os.path.join(inside, severity)
                listed[name, severity] = folder, sets.class_folders(folder, sets.by_wnid())
        sets.check_equal_classes(dict(listed.values()))
        errors: dict[str, list[float]] = {}
        for (name, severity), (folder, images) in listed.items():
            part = self.accuracy(f"imagenet-c/{name}/{severity}", folder, images, subset=False)
            errors.setdefault(name, []).append(1 - part["top1"])
        means = {name: float(np.mean(values)) for name, values in errors.items()}
        result = {"errors": means, "ce": metrics.corruption_errors(means)}
        if all(name in means for name in metrics.ALEXNET_ERROR):
            result["top1"] = 1 - float(np.mean([means[n] for n in metrics.ALEXNET_ERROR]))
            result["mce"] = metrics.mean_corruption_error(means)
        return result

    def perturbations(self, path: str, allow_missing: bool = False) -> dict:
        """ImageNet-P, `path/<perturbation>/<wnid>/<clip>/*`: `flips`, and `mfr` when all are there."""
        extra = tuple(metrics.ALEXNET_FLIPS_EXTRA)
        names = sets.parts(path, tuple(metrics.ALEXNET_FLIPS), extra, allow_missing)
        clips = {name: sets.sequences(os.path.join(path, name)) for name in names}
        flips = {}
        for name, frames in clips.items():

            def measure(name=name, frames=frames) -> dict:
                flat = [file for clip in frames for file in clip]
                answers = self.answers(flat, f"imagenet-p/{name}", lambda probs: probs.argmax(1))
                return {"fp": metrics.flips(answers.reshape(len(frames), -1), name)}

            part = self.part(f"imagenet-p/{name}", os.path.join(path, name), measure)
            flips[name] = part["fp"]
        result: dict[str, Any] = {"flips": flips}
        if all(name in flips for name in metrics.ALEXNET_FLIPS):
            result["mfr"] = metrics.mean_flip_rate(flips)
        return result


def _read(path: str) -> bytes:
    with tf.io.gfile.GFile(path, "rb") as f:
        return f.read()


_KEYS = {"imagenet-c": ("mce", "mCE"), "imagenet-p": ("mfr", "mFR")}


def rows(results: dict[str, dict], image_size: int) -> list[dict[str, Any]]:
    """A row per set, measured beside published, in percent; None where a mean cannot be formed."""
    table = []
    for name, result in results.items():
        key, label = _KEYS.get(name, ("top1", "top-1"))
        published = metrics.PUBLISHED.get(name) or metrics.PUBLISHED.get(f"{name} {image_size}", {})
        measured = round(100 * result[key], 1) if key in result else None
        row = {"set": name, "measure": label, "measured": measured}
        table.append({**row, **{m: published.get(m) for m in metrics.PUBLISHED_MODELS}})
    return table


def markdown(table: Sequence[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    columns = list(table[0])
    lines = [columns, ["---"] * len(columns)]
    lines += [["–" if row[c] is None else str(row[c]) for c in columns] for row in table]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
