"""Atomically writes SavedModel versions for TensorFlow Serving, TFLite files and ONNX files."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import tensorflow as tf
from absl import logging
from tensorflow.core.protobuf import saved_model_pb2

from efficientnet_ns.data import tasks
from efficientnet_ns.data.pipeline import Preprocessing
from efficientnet_ns.files import atomic, manifests, object_stores, paths
from efficientnet_ns.inference import exported, folding
from efficientnet_ns.models import checkpoint_files, heads
from efficientnet_ns.serving import (
    deployment,
    onnx_files,
    templates,
    tflite,
    tflite_metadata,
    warmup,
)
from efficientnet_ns.serving.signatures import Classifier, OutputSpec

# A graph with its constants is one protocol buffer, which is limited to 2 GB; these take 1.8 GB. Only
# the variant L2 (480 million) has more.
_MAX_FROZEN_PARAMETERS = 450_000_000


@dataclasses.dataclass(frozen=True)
class Options:
    """How a model is exported.

    Attributes:
      outputs: class names and length of the top list.
      optimize_for: `cpu` folds batch norm into the convolutions, computes 1 x 1 convolutions of small
        maps as matrix products and freezes the weights; `accelerator` folds and keeps variables;
        `none` leaves the graph as it was trained.
      facts: lines of the model card, name → value.
      task: the task the model was trained for, written next to the graph; None if unknown.
    """

    outputs: OutputSpec
    optimize_for: str = "cpu"
    facts: Mapping[str, object] = dataclasses.field(default_factory=dict)
    task: tasks.Task | None = None


def next_version(base: str, pattern: str = r"(\d+)") -> int:
    """Returns one above the highest complete version in `base`, or 1 if there is none.

    Args:
      pattern: regular expression of version names, with the number as its group.
    """
    names = object_stores.names(base)
    if object_stores.is_object_store(base):
        # The number of a killed export is reused: `_version` removes its files.
        names = sorted(set(names) - set(_incomplete(base, names)))
    found = [re.fullmatch(pattern, name) for name in names]
    return max([int(match[1]) for match in found if match], default=0) + 1


@contextmanager
def _version(base: str, version: int) -> Iterator[str]:
    """Yields a temporary folder that becomes `<base>/<version>` when the block succeeds.

    On object stores, where a folder cannot be renamed atomically, its files are uploaded with the graph
    last. Without the graph, servers ignore the version, and the next export removes it.
    """
    folder = os.path.join(base, str(version))
    remote = object_stores.is_object_store(base)
    if remote:
        for killed in _incomplete(base, object_stores.names(base)):
            logging.warning("removing %s/%s: its export was killed", base, killed)
            tf.io.gfile.rmtree(os.path.join(base, killed))
    if tf.io.gfile.exists(folder):
        raise manifests.OutputConflict(
            f"{folder} already exists: choose another --version, or delete it"
        )
    if remote:
        temporary = atomic.scratch_name("export")
    else:
        object_stores.make_folder(base)
        # Next to the versions, because a rename works only within one file system. Servers ignore the
        # folder, because its name is not a number.
        atomic.remove_abandoned_folders(base)
        temporary = atomic.temporary_name(folder)
    verbosity = logging.get_verbosity()
    # TensorFlow warns about functions that only Keras needs, and logs the temporary folder's name.
    logging.set_verbosity(logging.ERROR)
    try:
        yield temporary
        if remote:
            _upload(temporary, folder)
        else:
            tf.io.gfile.rename(temporary, folder)
    finally:
        logging.set_verbosity(verbosity)
        # It still exists if the export failed or the folder was uploaded rather than renamed.
        if tf.io.gfile.exists(temporary):
            tf.io.gfile.rmtree(temporary)


_GRAPH = "saved_model.pb"


def _incomplete(base: str, names: Sequence[str]) -> list[str]:
    """Returns the versions in `names` without a graph, whose export was killed."""
    versions = filter(str.isdigit, names)
    return [v for v in versions if object_stores.size(os.path.join(base, v, _GRAPH)) is None]


def _upload(source: str, folder: str) -> None:
    """Copies the files of a version, the graph last."""
    inside = [os.path.join(at, n) for at, _, names in os.walk(source) for n in names]
    files = {path: folder + path[len(source) :] for path in inside}
    graph = files.pop(os.path.join(source, _GRAPH))
    object_stores.each(lambda pair: tf.io.gfile.copy(*pair, overwrite=True), list(files.items()))
    tf.io.gfile.copy(os.path.join(source, _GRAPH), graph)


def optimized(model: tf.keras.Model, optimize_for: str) -> tuple[tf.keras.Model, bool]:
    """Returns the model to serve, and whether to freeze its weights."""
    if optimize_for == "none":
        return model, False
    for_cpu = optimize_for == "cpu"
    freeze = for_cpu and model.count_params() <= _MAX_FROZEN_PARAMETERS
    if for_cpu and not freeze:
        logging.warning(
            "%s has %d parameters, too many for the constants of a graph (2 GB): keeping them as variables",
            model.name,
            model.count_params(),
        )
    return folding.fold_batch_norm(model, for_cpu=for_cpu), freeze


def export(
    model: tf.keras.Model,
    preprocessing: Preprocessing,
    base: str | os.PathLike,
    version: int,
    options: Options | None = None,
) -> str:
    """Writes `<base>/<version>/` atomically, so that servers never load a part of it.

    The folder is renamed when complete; on object stores, the graph `saved_model.pb` is uploaded last.

    The version contains the SavedModel, labels, warm-up requests and a model card; `<base>/deploy/`
    contains the files that start a server.

    Args:
      model: pixels → logits, with the weights to serve.
      preprocessing: the evaluation preprocessing of that model.
      version: number of the version.
      options: see `Options`; if None, classes are named by their index.

    Returns:
      The folder.

    Raises:
      manifests.OutputConflict: If that version exists.
    """
    # A custom Dense layer becomes the layer `logits` that `signatures` looks for.
    base, model = os.fspath(base), heads.standard(model)
    if options is None:
        names = tuple(str(index) for index in range(model.output_shape[-1]))
        options = Options(OutputSpec(names))
    with _version(base, version) as folder:
        served, freeze = optimized(model, options.optimize_for)
        classifier = Classifier(served, preprocessing, options.outputs, freeze=freeze)
        tf.saved_model.save(
            classifier,
            folder,
            signatures=classifier.signatures(),
            # Gradients of swish cannot be saved from a frozen graph, which is never trained.
            options=tf.saved_model.SaveOptions(experimental_custom_gradients=False),
        )
        _set_classify_method(folder)
        _write(
            os.path.join(folder, "assets", "labels.txt"),
            tasks.label_lines(options.outputs.class_names),
        )
        _note_settings(os.path.join(folder, "assets"), model, options.task)
        warmup.write(folder, model.name, preprocessing.image_size)
        _write(os.path.join(folder, "README.md"), _card(model, preprocessing, version, options))
        # Before the version becomes visible, so that a killed export is repeated completely.
        deployment.write(base, model.name)
    # Frozen weights are in the graph, which is opened by name.
    if paths.is_pattern(base) and not freeze:
        logging.warning(
            "%s: TensorFlow and its server treat a path with * ? [ or \\ as a pattern and cannot find the "
            "variables there: move the model before serving it",
            base,
        )
    return os.path.join(base, str(version))


def export_tflite(
    model: tf.keras.Model,
    preprocessing: Preprocessing,
    path: str,
    kind: str,
    options: Options,
    representative: Sequence[np.ndarray] = (),
) -> bytes:
    """Writes a TFLite file; see `tflite.convert` and `tflite.with_metadata`.

    Returns:
      The content of the file.

    Raises:
      manifests.OutputConflict: If the file exists.
    """
    model = heads.standard(model)
    _check_new(path)
    content = tflite.convert(model, kind, representative)
    facts = _facts(model, preprocessing, kind, options)
    described = tflite_metadata.Description(
        model.name, kind, preprocessing.image_size, str(facts["input"]), "labels.txt"
    )
    content = tflite.with_metadata(content, options.outputs.class_names, facts, described)
    atomic.write(path, content)
    return content


def export_onnx(
    model: tf.keras.Model, preprocessing: Preprocessing, path: str, options: Options
) -> bytes:
    """Writes an ONNX file, with batch norm folded unless `optimize_for` is `none`; see `onnx_files`.

    Returns:
      The content of the file.

    Raises:
      manifests.OutputConflict: If the file exists.
    """
    model = heads.standard(model)
    _check_new(path)
    facts = _facts(model, preprocessing, "float32", options)
    if options.optimize_for != "none":
        model = folding.fold_batch_norm(model, for_cpu=False)
    content = onnx_files.convert(model, facts, options.outputs.class_names)
    atomic.write(path, content)
    return content


def _check_new(path: str) -> None:
    if tf.io.gfile.exists(path):
        raise manifests.OutputConflict(
            f"{path} already exists: choose another --version, or delete it"
        )
    object_stores.make_folder(os.path.dirname(path))


def _facts(
    model: tf.keras.Model, preprocessing: Preprocessing, kind: str, options: Options
) -> dict[str, object]:
    """Returns what an application must know about a model file, JSON-serializable."""
    crop = "without crop," if preprocessing.small_image else "evaluation crop and"
    task = options.task
    return {
        "model": model.name,
        "type": kind,
        "input": f"pixels 0..255 RGB, {crop} bicubic resize of TensorFlow 1",
        "image_size": preprocessing.image_size,
        "small_image": preprocessing.small_image,
        "crop_fraction": preprocessing.crop_fraction,
        **_normalization(model),
        "normalization": "inside the graph",
        **({"eval_set": task.eval_set, "test_set": task.test_set} if task else {}),
        **{str(name): value for name, value in options.facts.items()},
    }


def saved_model_runner(folder: str) -> Callable[[Sequence[bytes]], np.ndarray]:
    """Loads an exported version as a function: N encoded images → probabilities float32 [N, C]."""
    run = exported.runner(folder)
    return lambda encoded: run(encoded)["probabilities"]


def _set_classify_method(folder: str) -> None:
    """Sets the method name of `classify`: `tf.saved_model.save` always writes Predict.

    TensorFlow Serving rejects Classify requests to signatures of another method.
    """
    path = os.path.join(folder, "saved_model.pb")
    with tf.io.gfile.GFile(path, "rb") as f:
        saved = saved_model_pb2.SavedModel.FromString(f.read())
    signature = saved.meta_graphs[0].signature_def["classify"]
    signature.method_name = tf.compat.v1.saved_model.signature_constants.CLASSIFY_METHOD_NAME
    with tf.io.gfile.GFile(path, "wb") as f:
        # Maps of protocol buffers are otherwise unordered; equal models must give equal graphs.
        f.write(saved.SerializeToString(deterministic=True))


def _note_settings(folder: str, model: tf.keras.Model, task: tasks.Task | None) -> None:
    """Writes the files that `stored_model` reads."""
    checkpoint_files.write_settings(folder, model)
    if task is not None:
        tasks.write_task(os.path.join(folder, tasks.TASK_FILE), **dataclasses.asdict(task))


def _write(path: str, text: str) -> None:
    object_stores.make_folder(os.path.dirname(path))
    with tf.io.gfile.GFile(path, "w") as f:
        f.write(text)


def _normalization(model: tf.keras.Model) -> dict[str, list[float]]:
    layer = model.get_layer("normalization")
    return {"mean": list(layer.mean), "std": list(layer.std)}


def _card(
    model: tf.keras.Model, preprocessing: Preprocessing, version: int, options: Options
) -> str:
    targets = {
        "cpu": "CPUs (batch norm folded, weights frozen)",
        "accelerator": "accelerators (batch norm folded, weights in variables)",
        "none": "any device (graph as trained)",
    }
    part = preprocessing.crop_fraction or "size / (size + 32)"
    crop = (
        "Resized to the model's size without cropping (small images remain unchanged)."
        if preprocessing.small_image
        else f"Center crop of {part} of the shorter side, then bicubic resize: the same "
        "function as in evaluation."
    )
    names = options.outputs.class_names
    facts = {"Parameters": f"{model.count_params():,}", **options.facts}
    values = {
        "model": model.name,
        "version": version,
        "num_classes": len(names),
        "size": preprocessing.image_size,
        "target": targets[options.optimize_for],
        "preprocessing": crop,
        "max_pixels": f"{options.outputs.max_pixels:,}",
        "top_k": min(options.outputs.top_k, len(names)),
        "facts": "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        **{
            name: ", ".join(f"{value:.4g}" for value in values)
            for name, values in _normalization(model).items()
        },
    }
    return templates.fill("model_card.md", values)
