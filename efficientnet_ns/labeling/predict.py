"""A teacher's predictions for shards of unlabeled records (arXiv 1911.04252, algorithm 1, step 2).

Each (shard, worker) gives one prediction file in the original's format, a Parquet index of it
without the probabilities, an info file with its count, and a manifest. Records that cannot be
read, and images that cannot be decoded, keep their place: all-zero probabilities, label -1 in the
index, and an entry with the reason in the quarantine list of the manifest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.config import Config, ConfigError, shard_list
from efficientnet_ns.data import manifests, pipeline, records
from efficientnet_ns.experiment import Experiment
from efficientnet_ns.models import weights
from efficientnet_ns.progress import Progress
from efficientnet_ns.training import distribution

UNREADABLE_LABEL = -1


class TooManyBadRecords(records.DataError):
    """More of a shard is unreadable than max_bad_fraction allows."""


def predict(config: Config) -> dict[str, int]:
    """Labels the configured shards; finished ones are verified and skipped.

    Returns:
      `records`, `unreadable` and `skipped_shards`, summed over the shards.

    Raises:
      ConfigError: a flag is missing or does not fit.
      TooManyBadRecords, manifests.OutputConflict: see there; shards finished before are kept.
    """
    experiment = Experiment.from_config(config)
    options = config.predict
    _check(config)
    shards = shard_list(options.shard_id, options.num_shards)
    inputs = {shard: _input_path(config, shard) for shard in shards}
    checkpoint = weights.checkpoint_prefix(options.predict_ckpt_path)
    stages = {shard: _stage(experiment, checkpoint, inputs[shard], shard) for shard in shards}
    todo = [shard for shard in shards if not stages[shard].done()]
    if todo:
        labeler = _Labeler(experiment, checkpoint)
        for shard in todo:
            # Another process may have finished it meanwhile.
            if stages[shard].done():
                continue
            _label_shard(labeler, stages[shard], inputs[shard], shard, options)
    counts = [stages[shard].counts() for shard in shards]
    return {
        "records": sum(c["records"] for c in counts),
        "unreadable": sum(len(c["quarantine"]) for c in counts),
        "skipped_shards": len(shards) - len(todo),
    }


def _check(config: Config) -> None:
    options = config.predict
    for name in ("predict_ckpt_path", "output_dir", "info_dir"):
        if not getattr(options, name):
            raise ConfigError(f"--{name} is needed for --mode=predict")
    if not config.data.unlabel_data_dir:
        raise ConfigError("--unlabel_data_dir is needed: the folder with the records to label")
    if options.worker_id >= options.total_replicas:
        raise ConfigError(
            f"--worker_id={options.worker_id} is not below "
            f"--total_replicas={options.total_replicas}"
        )


def _input_path(config: Config, shard: int) -> str:
    options = config.predict
    name = records.shard_name(options.file_prefix, shard, options.num_shards)
    path = os.path.join(config.data.unlabel_data_dir, name)
    if not tf.io.gfile.exists(path):
        raise records.DataError(f"shard {path} is missing (check --file_prefix and --num_shards)")
    if tf.io.gfile.stat(path).length == 0:
        raise records.DataError(f"shard {path} is empty (0 bytes): write it again")
    return path


def _stage(experiment: Experiment, checkpoint: str, path: str, shard: int) -> manifests.Stage:
    options = experiment.config.predict
    key = (shard, options.num_shards, options.worker_id)
    outputs = [
        os.path.join(options.output_dir, records.prediction_name(*key)),
        os.path.join(options.output_dir, records.index_name(*key)),
        os.path.join(options.info_dir, records.info_name(*key)),
    ]
    settings = {
        "checkpoint": manifests.content_hash(checkpoint + ".index"),
        "input": manifests.fingerprint([path]),
        "model": experiment.config.model.model_name,
        "image_size": experiment.image_size,
        "num_classes": experiment.num_classes,
        "small_image": experiment.small_image,
        "mean": experiment.task.mean,
        "std": experiment.task.std,
        "total_replicas": options.total_replicas,
    }
    return manifests.Stage(f"{outputs[0]}.manifest.json", outputs, settings)


class _Labeler:
    """A model that turns image bytes into probabilities."""

    def __init__(self, experiment: Experiment, checkpoint: str):
        config = experiment.config
        self.batch_size, self.num_classes = config.train.eval_batch_size, experiment.num_classes
        self._preprocessing = experiment.preprocessing()
        self._strategy = distribution.get_strategy(config.hardware)
        distribution.set_precision(config.hardware, self._strategy)
        with self._strategy.scope():
            self._model = experiment.build_model()
        weights.load_weights(self._model, checkpoint)

        @tf.function
        def step(images):
            return tf.nn.softmax(self._model(images, training=False))

        self._step = step

    def label(self, source: tf.data.Dataset, tolerant: bool) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (position, probabilities float32 [C]) for each decodable element of `source`.

        Args:
          source: of (position int64, encoded image scalar string).
          tolerant: leave out undecodable images instead of failing.
        """

        def prepare(position, image):
            return {"position": position, "image": self._preprocessing.evaluate(image)}

        data = source.map(prepare, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        if tolerant:
            data = data.ignore_errors()
        data = data.batch(self.batch_size).map(
            lambda b: {**pipeline.pad_batch(b, self.batch_size), "count": tf.size(b["position"])}
        )
        for batch in data.prefetch(tf.data.AUTOTUNE):
            probs = self._step(batch["image"]).numpy()
            for i in range(int(batch["count"])):
                yield int(batch["position"][i]), probs[i]


def _image_source(path: str, options, tolerant: bool, problems: dict[int, str]) -> tf.data.Dataset:
    """(position among this worker's records, encoded image); `problems` collects the left out."""
    replicas, worker = options.total_replicas, options.worker_id
    if not tolerant:
        data = tf.data.TFRecordDataset(path).shard(replicas, worker)
        return data.map(records.parse_unlabeled).enumerate()

    def read():
        for record in records.read(path):
            if record.position % replicas != worker:
                continue
            position = record.position // replicas
            try:
                if record.payload is None:
                    raise records.DataError(record.problem)
                yield position, records.image_bytes(record.payload)
            except records.DataError as e:
                problems[position] = str(e)

    signature = (tf.TensorSpec([], tf.int64), tf.TensorSpec([], tf.string))
    return tf.data.Dataset.from_generator(read, output_signature=signature)


def _label_shard(labeler: _Labeler, stage: manifests.Stage, path: str, shard: int, options) -> None:
    """Labels one shard; one with bad records is started again in the slower tolerant way."""
    try:
        _write_shard(labeler, stage, path, shard, options, tolerant=False)
    except (tf.errors.InvalidArgumentError, tf.errors.DataLossError) as e:
        reason = str(e).splitlines()[0][:200]
        logging.warning("%s has unreadable records (%s): reading past them", path, reason)
        _write_shard(labeler, stage, path, shard, options, tolerant=True)


def _write_shard(labeler, stage, path: str, shard: int, options, *, tolerant: bool) -> None:
    total, lost = _survey(path, options, tolerant)
    problems: dict[int, str] = {}
    labels = np.full(total, UNREADABLE_LABEL, np.int32)
    top_probs = np.zeros(total, np.float32)
    # Differs (9): an unreadable record keeps its place with probabilities of zero.
    empty = records.prediction_example(np.zeros(labeler.num_classes, np.float32))
    prediction_path, index_path, info_path = stage.outputs
    with stage.write() as (temporary, counts):
        source = _image_source(path, options, tolerant, problems)
        with (
            tf.io.TFRecordWriter(temporary[prediction_path]) as writer,
            Progress(total, os.path.basename(path), "images") as progress,
        ):
            written = 0
            for position, probs in labeler.label(source, tolerant):
                if np.isnan(probs).any():
                    problems[position] = "the model answers NaN"
                    continue
                for _ in range(position - written):
                    writer.write(empty)
                writer.write(records.prediction_example(probs))
                labels[position], top_probs[position] = np.argmax(probs), np.max(probs)
                progress.update(position + 1 - written)
                written = position + 1
            for _ in range(total - written):
                writer.write(empty)
        quarantine = {
            int(p): problems.get(int(p), "the image cannot be decoded")
            for p in np.flatnonzero(labels == UNREADABLE_LABEL)
        }
        _check_bad_fraction(path, options, total, lost, quarantine)
        write_index(temporary[index_path], shard, options.worker_id, labels, top_probs)
        with tf.io.gfile.GFile(temporary[info_path], "w") as f:
            f.write(json.dumps({"image_num": total}))
        counts.update(records=total, quarantine=quarantine)


def _survey(path: str, options, tolerant: bool) -> tuple[int, float]:
    """(records of this worker, fraction of the file's bytes in which no record can be told)."""
    lost = 0
    if tolerant:
        in_shard = 0
        for record in records.read(path):
            in_shard, lost = in_shard + 1, record.lost
    else:
        in_shard = records.count(path)
    mine = len(range(options.worker_id, in_shard, options.total_replicas))
    return mine, lost / tf.io.gfile.stat(path).length


def _check_bad_fraction(path: str, options, total: int, lost: float, quarantine: dict) -> None:
    limit = options.max_bad_fraction
    if len(quarantine) <= limit * total and lost <= limit:
        return
    tail = f" and {lost:.1%} of the file cannot be read" if lost else ""
    first = min(quarantine, default=total)
    raise TooManyBadRecords(
        f"{path}: {len(quarantine)} of {total} records are unreadable{tail}, more than "
        f"--max_bad_fraction={limit}; the first is record "
        f"{first * options.total_replicas + options.worker_id}: {quarantine.get(first, 'the tail')}"
    )


def write_index(
    path: str, shard: int, worker: int, labels: np.ndarray, top_probs: np.ndarray
) -> None:
    """Writes the columnar index of one prediction file.

    Columns: `shard` int32, `worker` int32, `position` int64 (in the prediction file), `label`
    int32 (-1: unreadable), `prob` float32 (top-1 probability).
    """
    import pyarrow
    import pyarrow.parquet

    n = len(labels)
    columns = {
        "shard": np.full(n, shard, np.int32),
        "worker": np.full(n, worker, np.int32),
        "position": np.arange(n, dtype=np.int64),
        "label": labels,
        "prob": top_probs,
    }
    buffer = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    with tf.io.gfile.GFile(path, "wb") as f:
        f.write(buffer.getvalue().to_pybytes())


def index_from_predictions(prediction_path: str, index_path: str, shard: int, worker: int) -> None:
    """Builds the index of a prediction file without one, such as the original code's."""
    labels, top_probs = [], []
    for record in records.read(prediction_path):
        if record.payload is None:
            raise records.DataError(
                f"{prediction_path}, record {record.position}: {record.problem}; predict it again"
            )
        probs = records.probabilities(record.payload)
        top = float(probs.max(initial=0.0))
        labels.append(int(probs.argmax()) if top > 0 else UNREADABLE_LABEL)
        top_probs.append(top)
    with manifests.atomic_path(index_path) as temporary:
        write_index(
            temporary,
            shard,
            worker,
            np.asarray(labels, np.int32),
            np.asarray(top_probs, np.float32),
        )
