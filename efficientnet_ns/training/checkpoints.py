"""Training checkpoints in the original's format: weights, averages, optimizer slots, step."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from absl import logging

from efficientnet_ns.files import atomic, object_stores
from efficientnet_ns.files.paths import listed
from efficientnet_ns.models import checkpoint_files
from efficientnet_ns.training.optimizers import Adam, RMSPropTF1
from efficientnet_ns.training.student import NoisyStudent

_PREFIX = "model.ckpt-"


class SaveFailed(RuntimeError):
    """A checkpoint could not be written: the disk is full, or the folder is gone or read-only."""


class NothingLoads(RuntimeError):
    """Checkpoints exist, but none can be read."""


def saved_steps(folder: str) -> list[int]:
    """Returns the steps of the checkpoints in a model_dir, newest first."""
    names = object_stores.names(folder)
    # By the `.index`, which is written last: an interrupted save has none.
    matches = [re.fullmatch(re.escape(_PREFIX) + r"(\d+)\.index", name) for name in names]
    return sorted((int(m[1]) for m in matches if m), reverse=True)


class Checkpoints:
    """Saves and restores a training run.

    Args:
      folder: model_dir.
      trainer: student, averages, and an optimizer built for the student's trainable variables. For
        frozen ones, which have no slots, initial slots are written, so that every checkpoint has
        the same names.
      keep: number of checkpoints to keep.
      writes: False on all workers but the chief. They read, and take part in gathering values that
        differ between replicas, but do not write to the folder.
      before_write: called before a checkpoint is written; raises if it must not be.
    """

    def __init__(
        self,
        folder: str,
        trainer: NoisyStudent,
        *,
        keep: int = 5,
        writes: bool = True,
        before_write: Callable[[], None] = lambda: None,
    ):
        self.folder, self.keep, self._writes = folder, keep, writes
        self._before_write = before_write
        student, ema_student = trainer.student, trainer.ema_student
        optimizer: RMSPropTF1 | Adam = trainer.optimizer
        self.optimizer, self._model = optimizer, ema_student
        names = checkpoint_files.variable_names(student)
        averages = checkpoint_files.variable_names(ema_student)
        self.variables = {**names, "global_step": optimizer.iterations}
        self._fresh_slots: dict[str, np.ndarray] = {}
        trainable = {id(v) for v in student.trainable_variables}
        for name, variable in names.items():
            self.variables[name + checkpoint_files.EMA_SUFFIX] = averages[name]
            if id(variable) in trainable:
                for slot, value in zip(optimizer.SLOTS, optimizer.slots(variable)):
                    self.variables[f"{name}/{slot}"] = value
            # Batch-norm statistics have no slots, frozen or not.
            elif not name.endswith(("/moving_mean", "/moving_variance")):
                for slot, initial in optimizer.SLOTS.items():
                    self._fresh_slots[f"{name}/{slot}"] = np.full(
                        variable.shape, initial, np.float32
                    )

    def steps(self, last: int | None = None) -> list[int]:
        """Returns the steps of the checkpoints in the folder, newest first.

        Args:
          last: excludes later ones, which did not load if training has only reached this step.
        """
        return [step for step in saved_steps(self.folder) if last is None or step <= last]

    def prefix(self, step: int) -> str:
        """Returns the path of the checkpoint of a step, without its suffixes."""
        return os.path.join(self.folder, f"{_PREFIX}{step}")

    def finite(self) -> bool:
        """Returns whether all values that `save` would write are finite."""
        return all(
            bool(tf.reduce_all(tf.math.is_finite(variable)))
            for variable in self.variables.values()
            if variable.dtype.is_floating
        )

    def save(self) -> str:
        """Writes a checkpoint of the current step, then removes the oldest beyond `keep`.

        Raises:
          SaveFailed: If it could not be written; earlier checkpoints are untouched.
        """
        step = int(tf.convert_to_tensor(self.optimizer.iterations))
        prefix = self.prefix(step)
        earlier = self.steps(step)
        # Reading batch-norm statistics averages them over replicas, by all workers together.
        values = {name: tf.convert_to_tensor(self.variables[name]) for name in self.variables}
        if not self._writes:
            return prefix
        # Another process may have taken over the folder while this one was suspended.
        self._before_write()
        try:
            # First, so that no checkpoint ever lacks its settings.
            checkpoint_files.write_settings(self.folder, self._model)
            checkpoint_files.write_checkpoint(prefix, {**values, **self._fresh_slots})
        except (tf.errors.OpError, OSError) as e:
            last = self.prefix(earlier[0]) if earlier else "none"
            reason = str(e).splitlines()[0]
            raise SaveFailed(
                f"could not write {prefix} ({reason}). Last good checkpoint: {last}. Free disk space or "
                "make the folder writable, then run the same command again."
            ) from e
        # Later ones did not load; they are ignored until training reaches those steps again.
        reached = self.steps(step)
        # Before files are removed, so that the `checkpoint` file never names a missing one.
        self._note(reached[: self.keep])
        for old in reached[self.keep :]:
            # With the dot, so that step 10 does not match step 100.
            own = re.escape(os.path.basename(self.prefix(old))) + r"\..*"
            for path in listed(self.folder, own):
                object_stores.remove(path)
        return prefix

    def remove_unfinished(self) -> None:
        """Removes the files that TensorFlow leaves if a process is killed while it saves."""
        unfinished = re.escape(_PREFIX) + r"\d+\..*tempstate\d+"
        object_stores.each(object_stores.remove, listed(self.folder, unfinished))

    def _note(self, steps: list[int]) -> None:
        """Writes the `checkpoint` file, by which TensorFlow finds the newest of `steps`."""
        if not self._writes:
            return
        names = [os.path.basename(self.prefix(step)) for step in steps]
        lines = [f'model_checkpoint_path: "{names[0]}"']
        # TensorFlow lists them from the oldest to the newest.
        lines += [f'all_model_checkpoint_paths: "{name}"' for name in reversed(names)]
        atomic.write(os.path.join(self.folder, "checkpoint"), "\n".join(lines) + "\n")

    def restore_latest(self) -> int:
        """Restores the newest checkpoint that loads completely; returns its step, or 0 if none.

        A preempted machine can leave a damaged checkpoint, which is skipped with a warning.

        Raises:
          stored_arrays.WeightsError: If a checkpoint is of another model.
          NothingLoads: If checkpoints exist, but none loads; starting over would overwrite them.
        """
        reasons = []
        for step in self.steps():
            try:
                checkpoint_files.read_checkpoint(self.prefix(step), self.variables)
            # Damage only: a WeightsError (another model) is a ValueError and ends the run.
            except (tf.errors.OpError, RuntimeError) as e:
                reasons.append(str(e).splitlines()[0])
                logging.warning("cannot load %s: %s", self.prefix(step), reasons[-1])
                continue
            # A kill may have come between a checkpoint and the file that names it the newest.
            self._note(self.steps(step)[: self.keep])
            return step
        if reasons:
            raise NothingLoads(
                f"none of the {len(reasons)} checkpoints in {self.folder} loads: {reasons[0]}. "
                "Repair the storage and run again, or move them away to start over."
            )
        return 0
