"""Training and evaluation of one model: `train_and_evaluate(config) -> metrics`.

Resuming, in this order:
  1. model_dir holds checkpoints of this configuration: continue from the newest that loads whole.
  2. model_dir holds another configuration: refuse, naming the settings that differ.
  3. --init_model: weights from --init_model_path, fresh optimizer, step 0.
  4. Fresh weights from --seed.
"""

from __future__ import annotations

import json
import math
import os
import time

import tensorflow as tf
from absl import logging

from efficientnet_ns.config import Config, ConfigError, TrainConfig
from efficientnet_ns.data import manifests, pipeline, records
from efficientnet_ns.evaluation import accuracy
from efficientnet_ns.experiment import Experiment
from efficientnet_ns.models import weights
from efficientnet_ns.progress import Progress
from efficientnet_ns.training import checkpoints, distribution, schedules
from efficientnet_ns.training.optimizers import RMSPropTF1
from efficientnet_ns.training.student import LossSettings, NoisyStudent


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number."""


class DirectoryConflict(ConfigError):
    """model_dir belongs to a training with other settings."""


def train_and_evaluate(config: Config, *, evaluate: bool = True) -> dict[str, float]:
    """Trains the student that `config` describes, continuing where an earlier run stopped.

    Args:
      evaluate: also measure the moving-average weights on the evaluation set, every steps_per_eval
        steps and at the end.

    Returns:
      `step`, the last training metrics, and with `evaluate` `eval/top1`, `eval/top5`, `eval/loss`.

    Raises:
      ConfigError, records.DataError: settings or data that cannot work, before training starts.
      TrainingDiverged: NaN or infinite loss; the last good checkpoint is kept.
    """
    experiment = Experiment.from_config(config)
    config = experiment.config
    _check(config)
    labeled, unlabeled, evaluation = _sources(experiment, evaluate)
    model_dir = config.train.model_dir
    _claim(model_dir, config)
    tf.keras.utils.set_random_seed(config.train.seed)
    strategy = distribution.get_strategy(config.hardware)
    distribution.set_precision(config.hardware, strategy)
    with strategy.scope():
        model = _build(experiment, labeled.total)
    saver = checkpoints.Checkpoints(
        model_dir,
        model.student,
        model.ema_student,
        model.optimizer,
        config.train.keep_checkpoint_max,
    )
    start = saver.restore_latest()
    total = _steps_to_run(experiment)
    if start == 0:
        _initialise(model, config)
    logging.info("%s: steps %d to %d in %s", config.model.model_name, start, total, model_dir)

    evaluator = accuracy.Evaluator(model.ema_student, strategy)

    def measure() -> dict[str, float]:
        return evaluator(experiment.eval_batches(evaluation), evaluation.total)

    session = _Session(
        saver,
        MetricsLog(model_dir, start),
        measure if evaluation is not None else None,
        start,
        total,
        config,
    )
    try:
        _fit(
            model,
            lambda step: experiment.training_batches(labeled, unlabeled, step),
            session,
            start,
            total,
        )
        return session.finish()
    except (tf.errors.InvalidArgumentError, tf.errors.DataLossError) as e:
        raise _explain(e, experiment, (labeled, evaluation), unlabeled) from e


def evaluate(config: Config) -> dict[str, dict[str, float]]:
    """Measures checkpoint weights (moving averages) on the task's evaluation and test sets.

    The weights are those at `init_model_path` when given, else the newest in `model_dir`.

    Returns:
      Set prefix → metrics; see `accuracy.Evaluator`.
    """
    experiment = Experiment.from_config(config)
    config = experiment.config
    if not config.data.label_data_dir:
        raise ConfigError("--label_data_dir is needed: the folder with the evaluation records")
    path = config.train.init_model_path or config.train.model_dir
    if not path:
        raise ConfigError(
            "--model_dir (or --init_model_path) is needed: the checkpoint to evaluate"
        )
    strategy = distribution.get_strategy(config.hardware)
    distribution.set_precision(config.hardware, strategy)
    with strategy.scope():
        model = experiment.build_model()
    weights.load_weights(model, path)
    evaluator, results = accuracy.Evaluator(model, strategy), {}
    for prefix in filter(None, (experiment.task.eval_set, experiment.task.test_set)):
        source = pipeline.Source.find(config.data.label_data_dir, prefix, max_bad_fraction=0)
        try:
            results[prefix] = evaluator(experiment.eval_batches(source), source.total)
        except (tf.errors.InvalidArgumentError, tf.errors.DataLossError) as e:
            raise _explain(e, experiment, (source,)) from e
        logging.info("%s, %s: %s", path, prefix, accuracy.describe(results[prefix]))
    return results


def _check(config: Config) -> None:
    train, data = config.train, config.data
    if not train.model_dir:
        raise ConfigError("--model_dir is needed: the folder for checkpoints and logs")
    if not data.label_data_dir:
        raise ConfigError("--label_data_dir is needed: the folder with the labeled records")
    if train.unlabel_ratio and not data.unlabel_data_dir:
        raise ConfigError(f"--unlabel_ratio={train.unlabel_ratio} needs --unlabel_data_dir")
    if bool(train.teacher_model_name) != bool(train.teacher_model_path):
        raise ConfigError("--teacher_model_name and --teacher_model_path go together")
    if train.init_model and not train.init_model_path:
        raise ConfigError("--init_model needs --init_model_path")
    steps = int(train.train_steps * train.train_ratio)
    last = int(train.train_last_step_num * train.train_ratio)
    if steps < 1 or last == 0 or last > steps:
        raise ConfigError(
            f"--train_steps={train.train_steps}, --train_ratio={train.train_ratio} and "
            f"--train_last_step_num={train.train_last_step_num} leave nothing to train: "
            "train_last_step_num must be -1 or in 1..train_steps"
        )
    if train.final_base_lr is not None and not 0 < train.final_base_lr < train.base_learning_rate:
        raise ConfigError(
            f"--final_base_lr={train.final_base_lr} must be above 0 and below "
            f"--base_learning_rate={train.base_learning_rate}"
        )
    if train.teacher_softmax_temp == 0 or -1 < train.teacher_softmax_temp < 0:
        raise ConfigError(
            f"--teacher_softmax_temp={train.teacher_softmax_temp}: "
            "give -1 for hard labels or a positive temperature"
        )


def _sources(experiment: Experiment, evaluate: bool):
    data, train, task = experiment.config.data, experiment.config.train, experiment.task
    labeled = pipeline.Source.find(data.label_data_dir, task.train_set)
    unlabeled = evaluation = None
    if train.unlabel_ratio:
        unlabeled = pipeline.Source.find(data.unlabel_data_dir, ("train", "extra"))
    if evaluate:
        evaluation = pipeline.Source.find(data.label_data_dir, task.eval_set, max_bad_fraction=0)
    return labeled, unlabeled, evaluation


def _claim(model_dir: str, config: Config) -> None:
    """Writes the configuration to model_dir, or checks that the one there is the same."""
    path = os.path.join(model_dir, "config.json")
    identity = json.loads(json.dumps(config.identity()))
    if tf.io.gfile.exists(path):
        # Settings that came later had their defaults.
        existing = {**json.loads(json.dumps(Config().identity())), **manifests.read_json(path)}
        if existing != identity:
            difference = manifests.describe_difference(existing, identity)
            raise DirectoryConflict(
                f"{model_dir} belongs to a training with other settings ({difference}). "
                "Choose another --model_dir, or give the settings it was started with."
            )
        return
    tf.io.gfile.makedirs(model_dir)
    manifests.write_json(path, identity, indent=1)


def _build(experiment: Experiment, labeled_count: int) -> NoisyStudent:
    train = experiment.config.train
    student, ema_student = experiment.build_model(), experiment.build_model()
    teacher = None
    if train.teacher_model_name and train.unlabel_ratio:
        teacher = experiment.build_teacher()
        weights.load_weights(teacher, train.teacher_model_path)
    settings = LossSettings(
        label_smoothing=train.label_smoothing,
        weight_decay=train.weight_decay,
        unlabel_ratio=train.unlabel_ratio,
        teacher_softmax_temp=train.teacher_softmax_temp,
        ema_decay=train.moving_average_decay,
    )
    schedule = schedules.learning_rate(
        base_learning_rate=train.base_learning_rate,
        labeled_batch_size=train.train_batch_size,
        num_train_images=(
            experiment.config.data.num_train_images
            or experiment.task.num_train_images
            or labeled_count
        ),
        train_steps=experiment.train_steps,
        train_ratio=train.train_ratio,
        final_base_lr=train.final_base_lr,
        last_steps=_steps_to_run(experiment),
        warmup_epochs=train.warmup_epochs,
    )
    model = NoisyStudent(student, ema_student, settings, train.seed, teacher)
    model.compile(
        RMSPropTF1(schedule), steps_per_execution=_chunk(train, _steps_to_run(experiment))
    )
    model.optimizer.build(student.trainable_variables)
    return model


def _steps_to_run(experiment: Experiment) -> int:
    last = experiment.config.train.train_last_step_num
    return experiment.train_steps if last < 0 else int(last * experiment.config.train.train_ratio)


def _chunk(train: TrainConfig, total: int) -> int:
    """Steps of one host loop: checkpoints and evaluations fall on its ends."""
    return min(train.iterations_per_loop, train.save_checkpoints_steps, train.steps_per_eval, total)


def _initialise(model: NoisyStudent, config: Config) -> None:
    if config.train.init_model:
        skip = [pattern for pattern in config.train.init_skip.split(",") if pattern]
        weights.load_weights(model.student, config.train.init_model_path, skip=skip)
    for average, variable in zip(model.ema_student.weights, model.student.weights):
        average.assign(variable)


def _fit(model: NoisyStudent, make_batches, session: _Session, start: int, total: int) -> None:
    """Keras `fit` in chunks: one Keras epoch is one host loop, so that resuming is by step."""
    whole, rest = divmod(total - start, session.chunk)
    for first, epochs, steps in (
        (start, whole, session.chunk),
        (total - rest, 1 if rest else 0, rest),
    ):
        if epochs:
            model.fit(
                make_batches(first),
                epochs=epochs,
                steps_per_epoch=steps,
                verbose=0,
                callbacks=[session],
            )


def _explain(error, experiment: Experiment, labeled, unlabeled=None) -> Exception:
    """Names the record behind an input error, since TensorFlow's message does not.

    Args:
      labeled: sources of labeled records, None among them.
      unlabeled: source of the unlabeled records, or None.
    """
    logging.error("%s\nLooking for the record behind this.", str(error).splitlines()[0])

    def check_labeled(payload: bytes) -> None:
        pipeline.check_trainable(payload, experiment.num_classes)

    def check_unlabeled(payload: bytes) -> None:
        pipeline.check_image(payload)
        if not experiment.config.train.teacher_model_name:
            records.parse_pseudo_labeled(tf.constant(payload), experiment.num_classes)
            check_labeled(payload)

    for source, check in [*((s, check_labeled) for s in labeled), (unlabeled, check_unlabeled)]:
        place = pipeline.name_bad_record(source, check) if source is not None else None
        if place is not None:
            return records.DataError(
                f"a record cannot be used: {place}. Repair or remove it and start the same command "
                "again; training continues from the last checkpoint."
            )
    return error


class MetricsLog:
    """`metrics.jsonl` (one JSON object per line) and TensorBoard scalars in model_dir.

    Args:
      folder: model_dir.
      start: step the run continues from; later rows of an interrupted run are dropped.
    """

    def __init__(self, folder: str, start: int):
        self.path = os.path.join(folder, "metrics.jsonl")
        self.rows = [row for row in read_metrics(self.path) if row["step"] <= start]
        self._write()
        self._writer = tf.summary.create_file_writer(folder)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Appends one row and the same scalars for TensorBoard."""
        self.rows.append({"step": step, **values})
        self._write()
        with self._writer.as_default(step):
            for name, value in values.items():
                tf.summary.scalar(name, value)
        self._writer.flush()

    def last(self, prefix: str) -> dict[str, float]:
        """The newest row with a metric that starts with `prefix`; empty when there is none."""
        for row in reversed(self.rows):
            if any(key.startswith(prefix) for key in row):
                return row
        return {}

    def _write(self) -> None:
        with manifests.atomic_path(self.path) as temporary, tf.io.gfile.GFile(temporary, "w") as f:
            f.write("".join(json.dumps(row) + "\n" for row in self.rows))


def read_metrics(path: str) -> list[dict[str, float]]:
    """Rows of a `metrics.jsonl`; none when it does not exist."""
    if not tf.io.gfile.exists(path):
        return []
    with tf.io.gfile.GFile(path) as f:
        return [json.loads(line) for line in f]


class _Session(tf.keras.callbacks.Callback):
    """What happens between two host loops: stop on NaN, log, save, evaluate."""

    def __init__(self, saver, log: MetricsLog, measure, start: int, total: int, config: Config):
        super().__init__()
        train = config.train
        self.saver, self.log, self._measure = saver, log, measure
        self.total, self._seen = total, start
        self._save_every, self._eval_every = train.save_checkpoints_steps, train.steps_per_eval
        self.chunk = _chunk(train, total)
        self._images_per_step = train.train_batch_size * (1 + train.unlabel_ratio)
        self._progress = Progress(total, f"training {train.model_dir}", "steps", done=start)
        self._mark = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        step, previous = int(self.saver.optimizer.iterations), self._seen
        values = {name: float(value) for name, value in (logs or {}).items()}
        save = step == self.total or step // self._save_every > previous // self._save_every
        if not math.isfinite(values["train/loss"]):
            raise self._diverged(f"the loss became {values['train/loss']}", step)
        # A step's loss is from before its update, and it can be the last update that went wrong.
        if save and not self.saver.finite():
            raise self._diverged("a weight became NaN or infinite", step)
        elapsed, self._mark = time.monotonic() - self._mark, time.monotonic()
        values["images_per_second"] = (step - previous) * self._images_per_step / elapsed
        self.log.add(step, values)
        self._seen = step
        if save:
            self.saver.save()
        if step < self.total and step // self._eval_every > previous // self._eval_every:
            self.evaluate(step)
        self._progress.update(step - previous, f"loss {values['train/loss']:.3f}")

    def _diverged(self, what: str, step: int) -> TrainingDiverged:
        kept = self.saver.steps()
        last = self.saver.prefix(kept[0]) if kept else "none was saved yet"
        return TrainingDiverged(
            f"{what} between steps {self._seen} and {step}. Last good checkpoint: {last}. "
            "Lower --base_learning_rate, or look at the data."
        )

    def evaluate(self, step: int) -> None:
        """Measures the moving-average weights, when there is a set to measure on."""
        if self._measure is not None:
            measured = self._measure()
            self.log.add(step, {f"eval/{k}": v for k, v in measured.items()})
            logging.info("step %d: %s", step, accuracy.describe(measured))

    def finish(self) -> dict[str, float]:
        """Evaluates once at the end, unless an earlier run did, and returns the newest metrics."""
        self._progress.close()
        if self.log.last("eval/").get("step") != self.total:
            self.evaluate(self.total)
        return {**self.log.last("train/"), **self.log.last("eval/"), "step": self.total}
