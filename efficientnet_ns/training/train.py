"""Training and evaluation of one model: `train_and_evaluate(config) -> metrics`.

Resuming, in this order:
  1. model_dir holds checkpoints of this training: continue from the newest that loads whole.
  2. It holds checkpoints of another configuration, or of records that were replaced since: refuse,
     naming what differs. Without a checkpoint the folder is taken over.
  3. --init_model: weights from --init_model_path, fresh optimizer, step 0.
  4. Fresh weights from --seed.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import tensorflow as tf
from absl import logging

from efficientnet_ns.config import Config, ConfigError, TrainConfig, preemption
from efficientnet_ns.data import pipeline, tasks
from efficientnet_ns.devices import distribution
from efficientnet_ns.evaluation import accuracy, accuracy_report
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.inference import engines
from efficientnet_ns.models import efficientnet, weights
from efficientnet_ns.resolve.resolved_config import ResolvedConfig, limited
from efficientnet_ns.training import checkpoints, preview, schedules, summaries
from efficientnet_ns.training.claim import claim, expect_other_records
from efficientnet_ns.training.input_wait import InputWait
from efficientnet_ns.training.optimizers import RMSPropTF1
from efficientnet_ns.training.session import Session, loop_steps
from efficientnet_ns.training.student import LossSettings, NoisyStudent


def train_and_evaluate(config: Config, *, evaluate: bool = True) -> dict[str, float]:
    """Trains the student that `config` describes, continuing where an earlier run stopped.

    Args:
      evaluate: also measure the moving-average weights on the evaluation set, every steps_per_eval
        steps and at the end.

    Returns:
      `step`, the last training metrics, and with `evaluate` `eval/top1`, `eval/top5`, `eval/loss`.

    Raises:
      ConfigError, DataError: settings or data that cannot work, before training starts.
      session.TrainingDiverged: NaN or infinite loss; the last good checkpoint is kept.
      preemption.Preempted: SIGTERM or SIGINT came; the state of the running host loop is saved.
    """
    resolved = ResolvedConfig.from_config(config)
    config = resolved.config
    _check(resolved)
    with preemption.StopRequest() as stop:
        with stop.immediate():
            # First of all: once TensorFlow has computed anything, its devices cannot be divided
            # any more, nor other workers be joined.
            strategy = distribution.get_strategy(config.hardware)
            stop.take_signals()  # TensorFlow takes SIGTERM when it joins other workers.
            distribution.check(resolved, strategy)
            distribution.set_precision(config.hardware, strategy)
            distribution.start_xla()
            labeled, unlabeled, evaluation = _sources(resolved, evaluate)
            sets = {"labeled": labeled, "unlabeled": unlabeled}
            claim(config, sets, writes=distribution.is_chief(strategy))
        try:
            with (
                distribution.noticing_lost_workers(strategy),
                resolved.naming_bad_records(labeled, evaluation, unlabeled=unlabeled),
            ):
                with stop.immediate():
                    run = _start(resolved, strategy, labeled, unlabeled, evaluation, stop)
                return run()
        except DataError:
            expect_other_records(config.train.model_dir)  # The bad one is to be repaired.
            raise


def _start(
    resolved: ResolvedConfig, strategy, labeled, unlabeled, evaluation, stop
) -> Callable[[], dict]:
    """Builds or restores everything; returns the function that trains to the end."""
    config, model_dir = resolved.config, resolved.config.train.model_dir
    writes = distribution.is_chief(strategy)
    tf.keras.utils.set_random_seed(config.train.seed)
    with strategy.scope():
        model = _build(resolved, resolved.epoch_images(labeled), strategy)
    saver = checkpoints.Checkpoints(
        model_dir,
        model.student,
        model.ema_student,
        model.optimizer,
        config.train.keep_checkpoint_max,
        writes=writes,
    )
    start, total = saver.restore_latest(), resolved.steps_to_run
    distribution.check_agreement(strategy, start)
    if start == 0:
        _initialise(model, config)
    logging.info("%s: steps %d to %d in %s", config.model.model_name, start, total, model_dir)
    _log_preprocessing(resolved, unlabeled is not None)
    log = summaries.MetricsLog(model_dir, start, writes)
    if writes:
        summaries.note_start(model_dir, start, config.values())
    evaluator = accuracy.Evaluator(model.ema_student, strategy)

    def measure() -> dict[str, float]:
        return evaluator(_eval_shares(resolved, evaluation), evaluation.total)

    def make_batches(step: int):
        return distribution.distribute(
            strategy,
            lambda share: session.watched(
                resolved.training_batches(labeled, unlabeled, step, share)
            ),
        )

    session = Session(
        saver,
        log,
        measure if evaluation is not None else None,
        stop,
        config,
        start=start,
        total=total,
        steps_per_epoch=resolved.epoch_images(labeled) / config.train.train_batch_size,
        images_per_step=resolved.images_per_step,
        wait=InputWait(),
        agree=distribution.agreement(strategy),
    )
    if start < total and writes:
        _show(resolved, model, log, labeled, unlabeled, start)

    def run() -> dict[str, float]:
        session.catch_up()
        _fit(model, make_batches, session)
        return session.finish()

    return run


def _log_preprocessing(resolved: ResolvedConfig, has_unlabeled: bool) -> None:
    logging.info("labeled images: %s", resolved.labeled_preprocessing.describe())
    if has_unlabeled:
        logging.info("unlabeled images: %s", resolved.unlabeled_preprocessing.describe())


def _show(resolved: ResolvedConfig, model, log, labeled, unlabeled, start: int) -> None:
    """Pictures of the augmented images and, with --debug, a log of everything that matters."""
    config = resolved.config
    drawn = start and tf.io.gfile.exists(os.path.join(config.train.model_dir, preview.FILE))
    if config.train.preview_images and not drawn:
        picture = preview.draw(resolved, labeled, unlabeled, config.train.preview_images)
        with log.writer.as_default(start):
            tf.summary.image("augmented", picture[None])
    if config.train.debug:
        for name, value in config.values().items():
            logging.info("--%s=%s", name, value)
        model.student.summary(print_fn=logging.info)
        preview.log_batch(next(iter(resolved.training_batches(labeled, unlabeled, start))))


def evaluate(config: Config) -> dict[str, dict[str, float]]:
    """Measures checkpoint weights (moving averages) on the task's evaluation and test sets.

    The weights are those at `init_model_path` when given, else the newest in `model_dir`; with
    `eval_continuously`, those of every new checkpoint there until the last step, also written to
    `model_dir/eval`.

    Returns:
      Set prefix → metrics, of the last weights measured; see `accuracy.Evaluator`.
    """
    if config.train.eval_image_size:
        config = config.override(input_image_size=config.train.eval_image_size)
    resolved = ResolvedConfig.from_config(config)
    config = resolved.config
    if not config.data.label_data_dir:
        raise ConfigError("--label_data_dir is needed: the folder with the evaluation records")
    if config.train.eval_views not in (1, 2):
        raise ConfigError(f"--eval_views={config.train.eval_views} must be 1 or 2 (mirrored)")
    continuously = config.train.eval_continuously
    if continuously and config.predict.inference_engine == "xnnpack":
        raise ConfigError(
            "--eval_continuously computes with TensorFlow: leave out --inference_engine=xnnpack"
        )
    path = config.train.model_dir if continuously else config.train.init_model_path
    path = path or config.train.model_dir
    if not path:
        raise ConfigError(
            "--model_dir (or --init_model_path) is needed: the checkpoint to evaluate"
        )
    strategy = distribution.get_strategy(config.hardware)
    distribution.set_precision(config.hardware, strategy)
    with strategy.scope():
        model = resolved.build_model()
    views = config.train.eval_views
    if continuously:
        evaluator = accuracy.Evaluator(model, strategy, views=views)
        return _evaluate_each(resolved, model, evaluator)
    weights.load_weights(model, path, ema=config.train.eval_ema)
    engine = _engine(config, model, strategy)
    evaluator = accuracy.Evaluator(model, strategy, views=views, engine=engine)
    results = _evaluate_one(resolved, evaluator, path)
    folder = config.train.eval_dir
    if not folder and config.train.model_dir:
        folder = os.path.join(config.train.model_dir, "eval")
    if folder and distribution.is_chief(strategy):
        accuracy_report.write(folder, config, path, results, tasks.class_names(resolved.task))
    for line in accuracy_report.beside_published(config, results):
        logging.info(line)
    return {name: measured.metrics for name, measured in results.items()}


def _engine(config: Config, model, strategy):
    """XNNPACK, which sums on one device; None: TensorFlow, under the strategy."""
    kind = config.predict.inference_engine
    if kind == "xnnpack" and strategy.num_replicas_in_sync > 1:
        raise ConfigError(
            "--inference_engine=xnnpack evaluates on one device: leave --num_replicas at 0"
        )
    engine = engines.make(kind, model, config.train.eval_batch_size, strategy)
    return None if isinstance(engine, engines.TensorFlowEngine) else engine


def _evaluate_one(resolved: ResolvedConfig, evaluator, path: str) -> dict[str, accuracy.Measured]:
    data, results = resolved.config.data, {}
    sets = {resolved.task.eval_set: {"num_eval_images": data.num_eval_images}}
    if resolved.task.test_set is not None:
        sets[resolved.task.test_set] = {"num_test_images": data.num_test_images}
    for prefix, limit in sets.items():
        source = pipeline.Source.find(data.label_data_dir, prefix, max_bad_fraction=0)
        source = limited(source, source.examples, **limit)
        with resolved.naming_bad_records(source):
            results[prefix] = evaluator.measure(_eval_shares(resolved, source), source.total)
        logging.info("%s, %s: %s", path, prefix, accuracy.describe(results[prefix].metrics))
    return results


def _evaluate_each(resolved: ResolvedConfig, model, evaluator) -> dict[str, dict]:
    """Waits for checkpoints and measures each, until that of the last step."""
    folder, total = resolved.config.train.model_dir, resolved.steps_to_run
    log = summaries.MetricsLog(os.path.join(folder, "eval"), start=total)
    measured = {row["step"] for row in log.rows}
    results: dict[str, dict] = {}
    for path in checkpoints.each_new(folder):
        step = int(path.rsplit("-", 1)[1])
        try:
            if step not in measured or step == total:
                weights.load_weights(model, path, ema=resolved.config.train.eval_ema)
                measured_now = _evaluate_one(resolved, evaluator, path)
                results = {k: m.metrics for k, m in measured_now.items()}
        except (FileNotFoundError, tf.errors.NotFoundError):
            logging.warning("%s was removed before it could be measured", path)
            continue
        if step not in measured:
            values = {f"{s}/{k}": v for s, of_set in results.items() for k, v in of_set.items()}
            log.add(step, values)
            log.flush()
        if step >= total:
            break
    log.close()
    return results


def _eval_shares(resolved: ResolvedConfig, source: pipeline.Source):
    return lambda context: resolved.eval_batches(source, distribution.share(context))


def _check(resolved: ResolvedConfig) -> None:
    train, data = resolved.config.train, resolved.config.data
    if not train.model_dir:
        raise ConfigError("--model_dir is needed: the folder for checkpoints and logs")
    if not data.label_data_dir:
        raise ConfigError("--label_data_dir is needed: the folder with the labeled records")
    if train.unlabel_ratio and not data.unlabel_data_dir:
        raise ConfigError(f"--unlabel_ratio={train.unlabel_ratio} needs --unlabel_data_dir")
    if not (train.unlabel_ratio or train.label_weight):
        raise ConfigError("--label_weight=0 without --unlabel_ratio leaves nothing to learn from")
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
    if not 0 < train.label_data_sample_prob <= 1:
        raise ConfigError(
            f"--label_data_sample_prob={train.label_data_sample_prob} must be above 0, and at most 1"
        )
    if train.teacher_softmax_temp == 0 or -1 < train.teacher_softmax_temp < 0:
        raise ConfigError(
            f"--teacher_softmax_temp={train.teacher_softmax_temp}: "
            "give -1 for hard labels or a positive temperature"
        )


def _sources(resolved: ResolvedConfig, evaluate: bool):
    data, train, task = resolved.config.data, resolved.config.train, resolved.task
    labeled, unlabeled, evaluation = resolved.labeled_source(), None, None
    if train.unlabel_ratio:
        # Taken whole, as the original does.
        unlabeled = pipeline.Source.find(data.unlabel_data_dir, ("train", "extra"))
    if evaluate:
        evaluation = pipeline.Source.find(data.label_data_dir, task.eval_set, max_bad_fraction=0)
        evaluation = limited(evaluation, evaluation.examples, num_eval_images=data.num_eval_images)
    return labeled, unlabeled, evaluation


def _build(resolved: ResolvedConfig, num_train_images: int, strategy=None) -> NoisyStudent:
    train = resolved.config.train
    student, ema_student = resolved.build_model(), resolved.build_model()
    _freeze(student, train)
    teacher = None
    if train.teacher_model_name and train.unlabel_ratio:
        teacher = resolved.build_teacher()
        weights.load_weights(teacher, train.teacher_model_path)
    settings = LossSettings(
        label_smoothing=train.label_smoothing,
        weight_decay=train.weight_decay,
        unlabel_ratio=train.unlabel_ratio,
        teacher_softmax_temp=train.teacher_softmax_temp,
        ema_decay=train.moving_average_decay,
        label_data_sample_prob=train.label_data_sample_prob,
        label_weight=train.label_weight,
        unl_model_noise=train.unl_model_noise,
    )
    schedule = schedules.learning_rate(
        base_learning_rate=train.base_learning_rate,
        labeled_batch_size=train.train_batch_size,
        label_data_sample_prob=train.label_data_sample_prob,
        num_train_images=num_train_images,
        train_steps=resolved.train_steps,
        train_ratio=train.train_ratio,
        final_base_lr=train.final_base_lr,
        last_steps=resolved.steps_to_run,
        warmup_epochs=train.warmup_epochs,
    )
    model = NoisyStudent(student, ema_student, settings, train.seed, teacher)
    model.compile(
        RMSPropTF1(schedule),
        steps_per_execution=loop_steps(train, resolved.steps_to_run),
        jit_compile=distribution.compiles(resolved.config.hardware, strategy),
    )
    model.optimizer.build(student.trainable_variables)
    return model


def _freeze(student: tf.keras.Model, train: TrainConfig) -> None:
    if train.fix_layer_num < 0:
        return
    try:
        efficientnet.freeze(student, train.fix_layer_num)
    except ValueError as e:
        raise ConfigError(f"--fix_layer_num: {e}") from e


def _initialise(model: NoisyStudent, config: Config) -> None:
    if config.train.init_model:
        skip = [pattern for pattern in config.train.init_skip.split(",") if pattern]
        weights.load_weights(model.student, config.train.init_model_path, skip=skip)
    for average, variable in zip(model.ema_student.weights, model.student.weights):
        average.assign(variable)


def _fit(model: NoisyStudent, make_batches, session: Session) -> None:
    """Keras `fit` in chunks: one Keras epoch is one host loop, so that resuming is by step."""
    start, total = session.start, session.total
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
