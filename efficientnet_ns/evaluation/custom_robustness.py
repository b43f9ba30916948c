"""Robustness on a custom labeled set: attacks and corruptions, for one model or two to compare.

Every measurement (one model at one ε, or at one corruption and severity) is stored in a separate
file, named by a hash of everything that determines it. It is made once and reused by later runs.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from efficientnet_ns.config import Config, ConfigError, CustomRobustnessConfig, as_dict
from efficientnet_ns.data import image_conversion, pipeline
from efficientnet_ns.devices import distribution
from efficientnet_ns.evaluation import accuracy, adversarial, corruptions
from efficientnet_ns.evaluation import robustness_metrics as metrics
from efficientnet_ns.files import manifests
from efficientnet_ns.files.progress import Progress
from efficientnet_ns.inference import engines
from efficientnet_ns.models import weights
from efficientnet_ns.resolve import stored_model
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

MODEL, BASELINE = "model", "baseline"
CLEAN = 0  # Severity of the unchanged images.
_GROUP = 32  # Number of images that a process corrupts per task.

# (pixels uint8 [N, S, S, 3], corruption, severity, index of the first image in the set) → an object
# whose `result()` returns the corrupted pixels, uint8 [N, S, S, 3].
Submit = Callable[[np.ndarray, str, int, int], Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Validated settings of what to measure.

    Attributes:
      corruptions: names of the corruptions.
      severities: severities of each corruption, 1 to 5.
      epsilons: radii of the attacks, in pixel values.
      pgd: settings of PGD.
    """

    corruptions: tuple[str, ...]
    severities: tuple[int, ...]
    epsilons: tuple[float, ...]
    pgd: adversarial.Pgd

    @classmethod
    def from_config(cls, own: CustomRobustnessConfig, seed: int) -> Settings:
        """Parses the flags.

        Raises:
          ConfigError: If a corruption is unknown, or a severity or ε is out of range.
        """
        known = {**metrics.ALEXNET_ERROR, **metrics.ALEXNET_ERROR_EXTRA}
        names = list(metrics.ALEXNET_ERROR) if own.corrupt == "all" else _words(own.corrupt)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ConfigError(
                f"--corrupt: unknown {', '.join(unknown)}; known: all, {', '.join(known)}"
            )
        severities = _numbers("severities", own.severities, 1, 5)
        if not severities or any(s != int(s) for s in severities):
            raise ConfigError(f"--severities={own.severities}: use integers from 1 to 5")
        return cls(
            tuple(dict.fromkeys(names)),
            tuple(int(s) for s in severities),
            _numbers("epsilons", own.epsilons, 0, 255),
            adversarial.Pgd(own.pgd_steps, own.pgd_step_size, seed),
        )


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(flag: str, text: str, low: float, high: float) -> tuple[float, ...]:
    try:
        values = sorted({float(word) for word in _words(text)})
    except ValueError as e:
        raise ConfigError(f"--{flag}={text}: {e}") from e
    if any(not low <= value <= high for value in values):
        raise ConfigError(f"--{flag}={text}: each must be in {low}..{high}")
    return tuple(values)


class Subject(NamedTuple):
    """A model to measure.

    Attributes:
      name: `MODEL` or `BASELINE`.
      model: pixels → logits.
      classify: pixels float32 [N, S, S, 3] → probabilities; None if nothing is corrupted.
      identity: what determines the predictions, JSON-able.
    """

    name: str
    model: Any
    classify: Callable[[np.ndarray], np.ndarray] | None
    identity: dict[str, Any]


class Found(NamedTuple):
    """Measurements of all models.

    Attributes:
      results: `set`, `examples`, `image_size`, `models` (name → weights); for attacks, `attacks`:
        ε → model → top-1 `clean`, `fgsm`, `pgd`; for corruptions, `severities`, `clean`: model →
        error, and `corruptions`: corruption → model → error by severity. Fractions; JSON-able.
      pictures: (PNG, caption) of the set's first image: one row per corruption, one column per
        severity.
    """

    results: dict[str, Any]
    pictures: list[tuple[bytes, str]]


class LabeledSet(NamedTuple):
    """The images on which models are measured.

    Attributes:
      source: the records.
      batches: batches for the attacks; see `accuracy.Evaluator.measure`.
      groups: batches for the corruptions, on one host.
      identity: what determines the images, JSON-able.
    """

    source: pipeline.Source
    batches: accuracy.Batches
    groups: tf.data.Dataset
    identity: dict[str, Any]


def measure(config: Config, own: CustomRobustnessConfig, weights_path: str, folder: str) -> Found:
    """Measures what `own` requests on the devices of this machine.

    Args:
      config: the model and the labeled set.
      own: what to measure.
      weights_path: path of the model's weights, as for `weights.load_weights`.
      folder: folder of the results; its subfolder `own_set` stores completed parts.

    Raises:
      ConfigError, DataError: If settings or data are invalid; raised before any measurement.
    """
    # --- Settings and data, checked before a model is built
    if os.environ.get("TF_CONFIG"):
        raise ConfigError("--corrupt and --epsilons work on one machine: unset TF_CONFIG")
    if not config.data.label_data_dir:
        config = config.override(label_data_dir=stored_model.labeled_dir(weights_path))
    resolved = ResolvedConfig.from_config(config, weights_path)
    strategy = distribution.get_strategy(config.hardware)
    distribution.set_precision(config.hardware, strategy)
    settings = Settings.from_config(own, resolved.config.train.seed)
    kind = resolved.config.predict.inference_engine
    if kind in engines.CPU_ENGINES and not settings.corruptions:
        raise ConfigError(
            f"--epsilons: attacks need TensorFlow's gradients: remove --inference_engine={kind}"
        )
    library = corruptions.check_installed() if settings.corruptions else None
    labeled = _labeled_set(resolved, own.image_set)
    # --- Models
    chosen = _chosen_models(resolved, own, weights_path)
    subjects = [
        _subject(name, config, path, resolved.image_size, strategy, bool(settings.corruptions))
        for name, (config, path) in chosen.items()
    ]
    results: dict[str, Any] = {
        "set": labeled.identity["set"],
        "examples": labeled.source.total,
        "image_size": resolved.image_size,
        "models": {name: path for name, (_, path) in chosen.items()},
    }
    # --- Measurements
    parts, pictures = os.path.join(folder, "own_set"), []
    with resolved.naming_bad_records(labeled.source):
        if settings.epsilons:
            compiled = distribution.compiles(config.hardware, strategy)
            results["attacks"] = _attacks(parts, subjects, labeled, settings, strategy, compiled)
        if settings.corruptions:
            seed = resolved.config.train.seed
            # Another version of the library may corrupt images differently.
            details = {"library": library, "seed": seed}
            # Required even if every part is stored, because the pictures are not.
            with corruptions.Corruptor(seed) as corruptor:
                submit, ahead = corruptor.submit, 2 * corruptor.workers
                results |= corrupted(parts, subjects, labeled, settings, submit, details, ahead)
                pictures = draw(labeled, settings, submit)
    return Found(results, pictures)


def _labeled_set(resolved: ResolvedConfig, prefix: str) -> LabeledSet:
    prefix = prefix or resolved.task.eval_set
    source = resolved.evaluation_source(prefix)
    groups = pipeline.eval_batches(
        source, resolved.preprocessing(), num_classes=resolved.num_classes, batch_size=_GROUP
    )
    identity = {
        "set": f"{resolved.config.data.label_data_dir} {prefix}",
        "input": manifests.fingerprint(source.paths),
        "examples": source.total,
    }
    # Like `inference_dtype` below, only if not the default, so that earlier parts match.
    if resolved.config.data.crop_fraction is not None:
        identity["crop_fraction"] = resolved.config.data.crop_fraction
    batches = functools.partial(distribution.eval_share, resolved, source)
    return LabeledSet(source, batches, groups, identity)


def _chosen_models(
    resolved: ResolvedConfig, own: CustomRobustnessConfig, weights_path: str
) -> dict[str, tuple[Config, str]]:
    """Returns settings and weights of the model and, if there is one, of the baseline."""
    chosen = {MODEL: (resolved.config, weights_path)}
    if own.baseline:
        path = stored_model.find(own.baseline)
        chosen[BASELINE] = _baseline_config(resolved, own.baseline_model_name, path), path
    return chosen


def _baseline_config(resolved: ResolvedConfig, name: str, path: str) -> Config:
    config, stored = resolved.config, stored_model.read(path)
    name = name or stored.variant or ""
    # The coefficients of the flags also apply to weights of the same variant without stored
    # settings.
    if name in ("", config.model.model_name) and not stored.settings:
        return config
    # Coefficients set by flags belong to the other model.
    return config.override(model_name=name, width_coefficient=None, depth_coefficient=None)


def _subject(
    name: str, config: Config, path: str, image_size: int, strategy, classifies: bool
) -> Subject:
    # Both models see the same pixels regardless of the sizes at which they were trained.
    resolved = ResolvedConfig.from_config(config.override(input_image_size=image_size), path)
    with strategy.scope():
        model = resolved.build_model()
    weights.load_weights(model, path)
    classify = None
    if classifies:
        kind, batch = config.predict.inference_engine, config.evaluation.eval_batch_size
        engine = engines.make(kind, model, batch, strategy, dtype=config.predict.inference_dtype)
        classify = engines.on_all_workers(engine)
    identity = {
        # By content, because training may continue in the same folder.
        "weights": weights.fingerprint(path, resolved.model_name),
        **as_dict(resolved.config.model),
        "precision": tf.keras.mixed_precision.global_policy().name,
    }
    if config.predict.inference_dtype != "float32":
        identity["inference_dtype"] = config.predict.inference_dtype
    return Subject(name, model, classify, identity)


def _stage(folder: str, name: str, **identity: Any) -> manifests.Stage:
    # With this hash in the name, a part with other settings is another file, not a conflict.
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return manifests.Stage(os.path.join(folder, f"{name}-{digest}.json"), [], identity)


def _attacks(
    folder: str, subjects, labeled: LabeledSet, settings: Settings, strategy, jit_compile: bool
) -> dict[str, dict[str, dict[str, float]]]:
    results: dict[str, dict[str, dict[str, float]]] = {f"{e:g}": {} for e in settings.epsilons}
    for subject in subjects:
        attacker = adversarial.Attacker(subject.model, strategy, settings.pgd, jit_compile)
        for epsilon in settings.epsilons:
            identity = {**subject.identity, **labeled.identity}
            how = {"epsilon": epsilon, **dataclasses.asdict(settings.pgd)}
            stage = _stage(folder, f"attack-{epsilon:g}", **identity, **how)
            attack = functools.partial(attacker, labeled.batches, labeled.source.total, epsilon)
            results[f"{epsilon:g}"][subject.name] = stage.once(attack)
    return results


def corrupted(
    folder: str,
    subjects: Sequence[Subject],
    labeled: LabeledSet,
    settings: Settings,
    submit: Submit,
    details: Mapping[str, Any],
    ahead: int,
) -> dict[str, Any]:
    """Returns `severities`, `clean` and `corruptions` of `Found.results`.

    Corrupts each image once for all models without a stored result of the part.

    Args:
      folder: folder of the parts.
      subjects: the models.
      labeled: the images.
      settings: corruptions and severities.
      submit: corrupts a group of images, usually in another process.
      details: what determines the results in addition to the settings, JSON-able.
      ahead: number of groups that may wait for classification; bounds memory.
    """
    # Clean images depend neither on the library nor on the seed, so they get no `details`.
    todo = [("clean", CLEAN)] + [(n, s) for n in settings.corruptions for s in settings.severities]
    stages = {
        part: _stages(folder, subjects, labeled, part, details if part[1] else {}) for part in todo
    }
    lacking = {
        part: left
        for part, of_models in stages.items()
        if (left := [subject for subject in subjects if not of_models[subject.name].done()])
    }
    total = labeled.source.total
    done = (len(todo) - len(lacking)) * total
    with Progress(len(todo) * total, "corruptions", "images", done) as progress:
        for part, left in lacking.items():
            hits = _count_hits(left, labeled, submit, part, ahead, progress)
            for subject, number in zip(left, hits):
                # Stored part by part, so a killed run loses only the current part.
                with stages[part][subject.name].write() as (_, counts):
                    counts["error"] = 1 - int(number) / total
    errors: dict[str, dict[str, list[float]]] = {}
    for (name, _), of_models in stages.items():
        for model, stage in of_models.items():
            by_severity = errors.setdefault(name, {}).setdefault(model, [])
            by_severity.append(stage.counts()["error"])
    # Clean images were measured like a corruption of one severity.
    clean = {subject: values[0] for subject, values in errors.pop("clean").items()}
    return {"severities": list(settings.severities), "clean": clean, "corruptions": errors}


def _stages(
    folder: str,
    subjects: Sequence[Subject],
    labeled: LabeledSet,
    part: tuple[str, int],
    details: Mapping[str, Any],
) -> dict[str, manifests.Stage]:
    """Returns the stage of a corruption at a severity for each model."""
    name, severity = part
    how = {**labeled.identity, "corruption": name, "severity": severity, **details}
    return {s.name: _stage(folder, f"{name}-{severity}", **s.identity, **how) for s in subjects}


def _count_hits(
    subjects: Sequence[Subject],
    labeled: LabeledSet,
    submit: Submit,
    part: tuple[str, int],
    ahead: int,
    progress: Progress,
) -> np.ndarray:
    """Counts the correct predictions of each model, int [models]."""
    classifiers = [subject.classify for subject in subjects if subject.classify is not None]

    def hits(corrupting, labels: np.ndarray) -> np.ndarray:
        # Other processes corrupt the next groups in the meantime.
        pixels = corrupting.result().astype(np.float32)
        return np.array([_right(classify(pixels), labels) for classify in classifiers])

    total, seen = np.zeros(len(subjects), int), 0
    waiting: collections.deque = collections.deque()
    name, severity = part
    job = submit if severity else _unchanged
    for pixels, labels, first in _groups(labeled.groups):
        waiting.append((job(pixels, name, severity, first), labels))
        # Bounds the pixels in memory and raises the errors of processes.
        if len(waiting) > ahead:
            total += hits(*waiting.popleft())
        seen += len(labels)
        progress.update(len(labels), f"{name} {severity}" if severity else name)
    total += sum(hits(*group) for group in waiting)
    if seen != labeled.source.total:
        raise accuracy.IncompleteEvaluation(
            f"saw {seen} examples, but the set has {labeled.source.total}"
        )
    return total


def _right(probs: np.ndarray, labels: np.ndarray) -> int:
    """Counts correct predictions; ties go to the lower class, and a row with NaN is a miss."""
    return int(((probs.argmax(1) == labels) & np.isfinite(probs).all(1)).sum())


def _unchanged(pixels: np.ndarray, *unused) -> concurrent.futures.Future:
    done: concurrent.futures.Future = concurrent.futures.Future()
    done.set_result(pixels)
    return done


def _groups(batches: tf.data.Dataset) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yields (pixels uint8 [N, S, S, 3], labels [N], index of the first image in the set)."""
    for batch in batches.as_numpy_iterator():
        real = batch["mask"] > 0
        # Bicubic resizing can exceed 0..255, and astype would wrap around and truncate.
        pixels = np.rint(np.clip(batch["image"][real], 0, 255)).astype(np.uint8)
        # Padding is last, so the first row is always an image.
        yield pixels, batch["label"][real], int(batch["index"][0])


def draw(labeled: LabeledSet, settings: Settings, submit: Submit) -> list[tuple[bytes, str]]:
    """Returns `Found.pictures`: the first image with every corruption and severity."""
    image = next(_groups(labeled.groups))[0][:1]
    jobs = [
        (submit(image, name, severity, 0), f"{name} {severity}")
        for name in settings.corruptions
        for severity in settings.severities
    ]
    return [(image_conversion.png(job.result()[0]), caption) for job, caption in jobs]
