"""Training of one model: `train_and_evaluate(config) -> metrics`.

Resuming, in this order:
  1. model_dir contains checkpoints of this run: continue from the newest that loads completely.
  2. It contains checkpoints of another configuration, or of records that have been replaced since:
     raise an error that names the difference. A folder without a checkpoint is taken over. Also
     raise an error while another process trains there.
  3. --init_weights, or --init_model: weights from there or from --init_model_path, a new optimizer,
     step 0.
  4. Random weights from --seed.
"""

from __future__ import annotations

import dataclasses
import functools
import os

import tensorflow as tf
from absl import logging

from efficientnet_ns.config import preemption
from efficientnet_ns.config.fields import ConfigError, needed
from efficientnet_ns.config.sections import Config, TrainConfig
from efficientnet_ns.data import pipeline
from efficientnet_ns.devices import distribution
from efficientnet_ns.evaluation import accuracy
from efficientnet_ns.files.metrics_log import MetricsLog
from efficientnet_ns.models import efficientnet, weights
from efficientnet_ns.resolve.resolved_config import ResolvedConfig
from efficientnet_ns.training import preview, schedules, settings_check
from efficientnet_ns.training.checkpoints import Checkpoints, saved_steps
from efficientnet_ns.training.claim import claim, expecting_other_records, note_start
from efficientnet_ns.training.inputs import Inputs
from efficientnet_ns.training.model_dir_lock import ModelDirLock
from efficientnet_ns.training.optimizers import OPTIMIZERS
from efficientnet_ns.training.session import Session, loop_steps
from efficientnet_ns.training.settings_warnings import settings_warnings
from efficientnet_ns.training.student import NoisyStudent


def train_and_evaluate(config: Config, *, evaluate: bool = True) -> dict[str, float]:
    """Trains the student that `config` describes, continuing where an earlier run stopped.

    Args:
      evaluate: also measure the moving-average weights on the evaluation set, every steps_per_eval
        steps and at the end.

    Returns:
      `step`, the last training metrics and, with `evaluate`, `eval/top1`, `eval/top5`, `eval/loss`.

    Raises:
      ConfigError, DataError: If settings or data cannot work, before training starts.
      session.TrainingDiverged: If the loss is NaN or infinite; the last good checkpoint is kept.
      checkpoints.SaveFailed, checkpoints.NothingLoads: If the storage of model_dir fails.
      leases.LeaseLost: If another process trains in model_dir since this one was suspended.
      distribution.WorkerLost: If another worker of the cluster stopped.
      preemption.Preempted: On a request to stop; the state of the running host loop is saved.
    """
    resolved = ResolvedConfig.from_config(config)
    config = resolved.config
    model_dir = settings_check.check(config)
    with preemption.StopRequest() as stop, ModelDirLock(model_dir) as lock:
        with stop.immediate():
            strategy = _join_devices(resolved, stop)
            writes = distribution.is_chief(strategy)
            # The chief counts the records, and the other workers read its counts.
            inputs = distribution.chief_first(
                strategy, functools.partial(Inputs.find, resolved, evaluate=evaluate)
            )
            since = _claim_model_dir(inputs, lock, model_dir, writes=writes)
            inputs = dataclasses.replace(inputs, order_since=since)

        with (
            # From the inside out: TensorFlow's input error becomes a DataError that names the
            # record, and a DataError deletes the folder's list of records.
            expecting_other_records(model_dir),
            distribution.noticing_lost_workers(strategy),
            inputs.naming_bad_records(),
        ):
            with stop.immediate():
                # --- Model: restored, or initialized.
                # Keras draws initial weights from the global generator, layer by layer.
                tf.keras.utils.set_random_seed(config.train.seed)
                with strategy.scope():
                    model = _build(resolved, resolved.epoch_images(inputs.labeled), strategy)
                keep = config.train.keep_checkpoint_max
                saver = Checkpoints(
                    model_dir, model, keep=keep, writes=writes, before_write=lock.check
                )
                start = saver.restore_latest()
                distribution.check_agreement(strategy, start)
                if start == 0:
                    _initialize(model, config)

                if writes:
                    # A lost machine's lease could expire while the model was built.
                    lock.acquire()
                    # Only now, because another process might have been saving until here.
                    saver.remove_unfinished()

                # --- Logs; the session logs, saves and evaluates between host loops.
                log = MetricsLog(model_dir, start, writes)
                session = _session(inputs, model, saver, log, stop=stop, start=start)
                _log_start(inputs, model, log, model_dir, start, writes=writes)

            # --- Host loops.
            session.catch_up()
            _fit(model, strategy, inputs, session)
            return session.finish()


def _join_devices(resolved: ResolvedConfig, stop: preemption.StopRequest) -> tf.distribute.Strategy:
    """Returns the strategy of all devices and sets their precision.

    This comes first: after TensorFlow's first computation, CPUs can no longer be divided into
    replicas, and other workers can no longer be joined.
    """
    hardware = resolved.config.hardware
    strategy = distribution.get_strategy(hardware)
    stop.take_signals()  # TensorFlow takes over SIGTERM when it joins other workers.
    distribution.check(resolved, strategy)
    distribution.set_precision(hardware, strategy)
    distribution.start_xla()
    return strategy


def _claim_model_dir(inputs: Inputs, lock: ModelDirLock, model_dir: str, *, writes: bool) -> int:
    """Locks `model_dir` and claims it for a run on these records; returns `claim`'s step."""
    if writes:
        lock.acquire_if_free()
        if not saved_steps(model_dir):  # Files of a run that never began are replaced.
            lock.acquire()
    sources = {"labeled": inputs.labeled, "unlabeled": inputs.unlabeled}
    return claim(inputs.resolved.config, sources, writes=writes)


def _build(
    resolved: ResolvedConfig, num_train_images: int, strategy: tf.distribute.Strategy | None = None
) -> NoisyStudent:
    """Builds student, averages and teacher, compiled with the optimizer and its schedule."""
    train = resolved.config.train
    student, ema_student = build_student(resolved), resolved.build_model()
    initial = None
    if train.ema_initial_share:
        initial = resolved.build_model()
        # Variables that `init_skip` excludes start from the student's values, set by the seed.
        _assign(initial, student)
        _load_initial(initial, train)
    teacher = None
    if train.teacher_model_name and train.unlabel_ratio:
        teacher = resolved.build_teacher()
        path = needed(train.teacher_model_path, "teacher_model_path")
        weights.load_weights(teacher, path)
    schedule = _schedule(resolved, num_train_images)
    model = NoisyStudent(student, ema_student, train, teacher, initial)
    model.compile(
        OPTIMIZERS[train.optimizer](schedule),
        # All steps of a host loop are one call of the compiled function.
        steps_per_execution=loop_steps(train, resolved.steps_to_run),
        jit_compile=distribution.compiles(resolved.config.hardware, strategy),
    )
    # Slots must exist before a checkpoint is restored into them.
    model.optimizer.build(student.trainable_variables)
    return model


def _schedule(
    resolved: ResolvedConfig, num_train_images: int
) -> tf.keras.optimizers.schedules.LearningRateSchedule:
    """Returns the learning-rate schedule; ConfigError if the settings allow none."""
    train = resolved.config.train
    try:
        return schedules.learning_rate(
            base_learning_rate=train.base_learning_rate,
            labeled_batch_size=train.train_batch_size,
            label_data_sample_prob=train.label_data_sample_prob,
            num_train_images=num_train_images,
            train_steps=resolved.train_steps,
            train_ratio=train.train_ratio,
            final_base_lr=train.final_base_lr,
            last_steps=resolved.steps_to_run,
            warmup_epochs=train.warmup_epochs,
            kind=train.lr_schedule,
            scaled=train.optimizer != "adam",
        )
    except ValueError as e:
        raise ConfigError(str(e)) from e


def build_student(resolved: ResolvedConfig) -> tf.keras.Model:
    """Builds a new network and freezes the layers and statistics that the settings name.

    Raises:
      ConfigError: If the network has fewer blocks than `fix_layer_num`.
    """
    student, train = resolved.build_model(), resolved.config.train
    if train.fix_layer_num >= 0:
        try:
            efficientnet.freeze(student, train.fix_layer_num)
        except ValueError as e:
            raise ConfigError(f"--fix_layer_num: {e}") from e
    if train.keep_bn_statistics:
        efficientnet.keep_statistics(student)
    return student


def _initialize(model: NoisyStudent, config: Config) -> None:
    """Loads the initial weights, if any, and starts the averages at the student's weights."""
    if model.initial is None:
        _load_initial(model.student, config.train)
    else:  # `initial` has already loaded them.
        _assign(model.student, model.initial)
    _assign(model.ema_student, model.student)


def _load_initial(network: tf.keras.Model, train: TrainConfig) -> None:
    path = train.init_weights or (train.init_model_path if train.init_model else None)
    if path:
        skip = [pattern for pattern in train.init_skip.split(",") if pattern]
        weights.load_weights(network, path, skip=skip)
    elif train.init_model_path:
        logging.warning(
            "--init_model_path=%s is ignored without --init_model: training starts from new weights",
            train.init_model_path,
        )


def _assign(target: tf.keras.Model, source: tf.keras.Model) -> None:
    for variable, value in zip(target.weights, source.weights):
        variable.assign(value)


def _session(
    inputs: Inputs,
    model: NoisyStudent,
    saver: Checkpoints,
    log: MetricsLog,
    *,
    stop: preemption.StopRequest,
    start: int,
) -> Session:
    """Creates the session, which evaluates the averages if there is an evaluation set."""
    resolved, strategy, measure = inputs.resolved, model.distribute_strategy, None
    if inputs.evaluation is not None:
        evaluator = accuracy.Evaluator(model.ema_student, strategy)
        batches = functools.partial(distribution.eval_share, resolved, inputs.evaluation)
        measure = functools.partial(evaluator, batches, inputs.evaluation.total)
    return Session(
        saver,
        log,
        measure,
        stop,
        resolved.config,
        start=start,
        total=resolved.steps_to_run,
        steps_per_epoch=inputs.steps_per_epoch,
        images_per_step=resolved.images_per_step,
        wait=inputs.wait,
        agree=distribution.agreement(strategy),
    )


def _log_start(
    inputs: Inputs,
    model: NoisyStudent,
    log: MetricsLog,
    folder: str,
    start: int,
    *,
    writes: bool,
) -> None:
    """Logs the model, its data and its preprocessing; draws augmented images; more with --debug."""
    resolved, config = inputs.resolved, inputs.resolved.config
    total = resolved.steps_to_run
    logging.info("%s: steps %d to %d in %s", config.model.model_name, start, total, folder)
    logging.info("labeled images: %s", resolved.labeled_preprocessing.describe())
    if inputs.unlabeled is not None:
        logging.info("unlabeled images: %s", resolved.unlabeled_preprocessing.describe())
    if start == 0:
        for text in settings_warnings(resolved, inputs.labeled.total):
            logging.warning("%s", text)
    if not writes:
        return
    note_start(folder, start, config.values())
    if start == total:
        return
    # A new run replaces the picture that an earlier one may have left.
    drawn = start and tf.io.gfile.exists(os.path.join(folder, preview.FILE))
    number = config.train.preview_images
    if number and not drawn:
        picture = preview.draw(resolved, inputs.labeled, inputs.unlabeled, number)
        with log.writer.as_default(start):
            tf.summary.image("augmented", picture[None])
    if config.train.debug:
        for name, value in config.values().items():
            logging.info("--%s=%s", name, value)
        model.student.summary(print_fn=logging.info)
        preview.log_batch(next(iter(inputs.training_batches(start, pipeline.WHOLE))))


def _fit(
    model: NoisyStudent, strategy: tf.distribute.Strategy, inputs: Inputs, session: Session
) -> None:
    """Runs Keras' `fit` with one host loop per epoch, so that resuming counts in steps.

    The last loop may be shorter; `fit` supports only one length, so that loop is a second call.
    """
    whole, rest = divmod(session.total - session.start, session.chunk)
    for first, epochs, steps in (
        (session.start, whole, session.chunk),
        (session.total - rest, 1 if rest else 0, rest),
    ):
        # `ended` is True from the beginning if --patience stopped an earlier run.
        if epochs and not session.ended:
            batches = functools.partial(inputs.training_batches, first)
            model.fit(
                distribution.distribute(strategy, batches),
                epochs=epochs,
                steps_per_epoch=steps,
                verbose=0,
                callbacks=[session],
            )
