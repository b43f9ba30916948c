"""What happens between two host loops: stop on NaN, on request or early; log, save, evaluate."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable

import tensorflow as tf
from absl import logging

from efficientnet_ns.config.preemption import Preempted, StopRequest
from efficientnet_ns.config.sections import Config, TrainConfig
from efficientnet_ns.evaluation import accuracy
from efficientnet_ns.files.metrics_log import MetricsLog
from efficientnet_ns.files.progress import Progress
from efficientnet_ns.training.checkpoints import Checkpoints
from efficientnet_ns.training.input_wait import InputWait


class TrainingDiverged(RuntimeError):
    """The loss or a weight is no longer finite."""


def loop_steps(train: TrainConfig, total: int) -> int:
    """Returns the steps of one host loop; checkpoints and evaluations fall on its ends."""
    return min(train.iterations_per_loop, train.save_checkpoints_steps, train.steps_per_eval, total)


class Session(tf.keras.callbacks.Callback):
    """A run of training from step `start` on; one Keras epoch is one host loop.

    Args:
      saver, log: where checkpoints and metrics go.
      measure: evaluates the moving-average weights; None: there is no evaluation set.
      stop: checked between host loops, and obeyed immediately during evaluation.
      start, total: steps.
      steps_per_epoch: converts steps to passes over the labeled set, reported as `train/epoch`.
      images_per_step: images that the student processes per update, reported as a rate.
      wait: measures how long steps wait for input; None: not measured.
      agree: for several workers, which must stop at the same step to avoid a deadlock. Each calls it
        at the end of every host loop with its own request; all get the same decision. None: there is
        one worker.
    """

    def __init__(
        self,
        saver: Checkpoints,
        log: MetricsLog,
        measure: Callable[[], dict[str, float]] | None,
        stop: StopRequest,
        config: Config,
        *,
        start: int,
        total: int,
        steps_per_epoch: float,
        images_per_step: int,
        wait: InputWait | None = None,
        agree: Callable[[bool], bool] | None = None,
    ):
        super().__init__()
        train = config.train
        self.saver, self.log, self._measure = saver, log, measure
        self._stop, self._wait, self._agree = stop, wait, agree
        self.start, self.total, self._seen = start, total, start
        self._save_every, self._eval_every = train.save_checkpoints_steps, train.steps_per_eval
        self._patience = train.patience
        self.chunk = loop_steps(train, total)
        self._steps_per_epoch = steps_per_epoch
        self._images_per_step = images_per_step
        self._progress = Progress(
            total,
            f"training {train.model_dir}",
            "steps",
            done=start,
            line_every=train.log_step_count_steps,
        )
        self._mark = time.monotonic()

    def catch_up(self) -> None:
        """Evaluates the checkpoint of `start` if the run that saved it ended before doing so."""
        evaluated = self.log.last("eval/").get("step") == self.start
        if 0 < self.start < self.total and self._evaluation_due(self.start) and not evaluated:
            self._evaluate(self.start)
        # The time of the first host loop excludes building the model and this evaluation.
        self._mark = time.monotonic()

    def _evaluation_due(self, step: int) -> bool:
        """Returns whether a multiple of steps_per_eval is in the host loop that ends at `step`."""
        return step // self._eval_every > (step - self.chunk) // self._eval_every

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        step, previous = int(tf.convert_to_tensor(self.saver.optimizer.iterations)), self._seen
        values = {name: float(value) for name, value in (logs or {}).items()}
        # Before anything that may raise on only one worker, because the others would wait for it.
        stopping = self._agree(self._stop.requested) if self._agree else self._stop.requested
        save = step // self._save_every > previous // self._save_every
        save = save or stopping or step == self.total
        if not math.isfinite(values["train/loss"]):
            raise self._diverged(f"the loss became {values['train/loss']}", step)
        # A step's loss precedes its update, so the last update may have gone wrong unnoticed.
        if save and not self.saver.finite():
            raise self._diverged("a weight became NaN or infinite", step)
        self.log.add(step, {**values, **self._pace(step)})
        self._seen = step
        if save:
            self._save()
        if stopping:
            raise Preempted(f"stopped at step {step}; the checkpoint is saved")
        # After saving, because an evaluation may be interrupted. `finish` runs the last one.
        if step < self.total and step // self._eval_every > previous // self._eval_every:
            self._evaluate(step, saved=save)
            if self.ended:
                if not save:
                    self._save()
                self.model.stop_training = True
                logging.info(
                    "step %d: no improvement in %d evaluations (--patience): stopping",
                    *(step, self._patience),
                )
        self._progress.update(step - previous, f"loss {values['train/loss']:.3f}")
        # The first host loop includes the compilation.
        if previous == self.start:
            self._progress.restart_rate()
        self._mark = time.monotonic()

    @property
    def ended(self) -> bool:
        """Whether the last `patience` evaluations were no better than the best one before them.

        Read from the log, so that a restarted run makes the same decision.
        """
        top1 = [row["eval/top1"] for row in self.log.rows if "eval/top1" in row]
        before, last = top1[: -self._patience], top1[-self._patience :]
        return bool(self._patience and before) and max(last) <= max(before)

    def _pace(self, step: int) -> dict[str, float]:
        """Returns the passes over the labeled set, and the speed of the last host loop."""
        elapsed = max(time.monotonic() - self._mark, 1e-9)
        values = {"train/epoch": step / self._steps_per_epoch}
        values["images_per_second"] = (step - self._seen) * self._images_per_step / elapsed
        if self._wait is not None:
            # With several replicas, a buffer may have waited longer than the steps did.
            values["input_wait"] = min(self._wait.take() / elapsed, 1.0)
        return values

    def _save(self) -> None:
        # Before the checkpoint, so that a run that continues from it finds every earlier row.
        self.log.flush()
        self.saver.save()

    def _diverged(self, what: str, step: int) -> TrainingDiverged:
        kept = self.saver.steps(step)
        last = self.saver.prefix(kept[0]) if kept else "none was saved yet"
        return TrainingDiverged(
            f"{what} between steps {self._seen} and {step}. Last good checkpoint: {last}. "
            "Lower --base_learning_rate, or check the data."
        )

    def _evaluate(self, step: int, saved: bool = True) -> None:
        """Measures the moving-average weights, if there is an evaluation set."""
        if self._measure is None:
            return
        # One of several workers must not leave the others waiting in the middle of a sum.
        cut = self._stop.immediate() if self._agree is None else contextlib.nullcontext()
        try:
            with cut:
                measured = self._measure()
        except Preempted:
            if not saved:
                self._save()
            raise
        self.log.add(step, {f"eval/{k}": v for k, v in measured.items()})
        logging.info("step %d: %s", step, accuracy.describe(measured))

    def finish(self) -> dict[str, float]:
        """Evaluates once at the end, unless an earlier run did, and returns the newest metrics."""
        self._progress.close()
        if self.log.last("eval/").get("step") != self._seen:
            self._evaluate(self._seen)
        self.log.close()
        return {**self.log.last("train/"), **self.log.last("eval/"), "step": self._seen}
