"""One update of a noised student: the method on one screen (arXiv 1911.04252, algorithm 1)."""

from __future__ import annotations

import contextlib

import tensorflow as tf

from efficientnet_ns.config.sections import TrainConfig
from efficientnet_ns.models import layers
from efficientnet_ns.training import ema, losses


class NoisyStudent(tf.keras.Model):
    """Trains `student` on labeled and pseudo-labeled images, and averages its weights.

    A batch is a dict: `image` [B, S, S, 3] and `label` int32 [B]; with unlabeled data also
    `unl_image` [U, S, S, 3], and either stored pseudo labels `unl_label` int32 [U] and `unl_probs`
    float32 [U, C], or `teacher_image` [U, T, T, 3] for a teacher that labels on the fly, or
    `weak_image` [U, S, S, 3] for the student's own labels (FixMatch, arXiv 2001.07685).

    Args:
      student: the model that learns; images in 0..255 → logits [N, C].
      ema_student: a model of the same architecture that holds the averages.
      settings: factors of the loss, decay of the average, and the seed, which together with the step
        number determines all noise.
      teacher: frozen model that labels `teacher_image`; None uses the stored labels.
      initial: model of the same architecture with the initial weights; required with
        `settings.ema_initial_share`.
    """

    def __init__(
        self,
        student: tf.keras.Model,
        ema_student: tf.keras.Model,
        settings: TrainConfig,
        teacher: tf.keras.Model | None = None,
        initial: tf.keras.Model | None = None,
    ):
        super().__init__(name="noisy_student")
        if settings.ema_initial_share and initial is None:
            raise ValueError("ema_initial_share requires the initial model")
        self.student, self.ema_student, self.teacher = student, ema_student, teacher
        self.initial = initial
        self.settings = settings
        self._means: dict[str, tf.keras.metrics.Mean] = {}
        ema_student.trainable = False
        for frozen in (teacher, initial):
            if frozen is not None:
                frozen.trainable = False

    def call(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Returns the student's logits; images [N, S, S, 3] → [N, C]."""
        return self.student(images, training=training)

    def train_step(self, batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Updates student and averages; returns the means of logged values since the last reset."""
        settings, labels = self.settings, batch["label"]
        parts = [batch["image"]]
        if settings.unlabel_ratio:
            parts.append(batch["unl_image"])
        unlabeled_weight = settings.unlabel_ratio
        if settings.consistency_threshold:
            parts.append(batch["weak_image"])
            unlabeled_weight = 1.0  # λ_u of arXiv 2001.07685, whatever the ratio.
        sizes = [part.shape[0] for part in parts]
        # One batch, so that all kinds of images share batch-norm statistics. In float, because
        # interpolated pixels may exceed 0..255 slightly.
        images = tf.concat([tf.cast(x, tf.float32) for x in parts], 0) if parts[1:] else parts[0]
        variables = self.student.trainable_variables
        with tf.GradientTape() as tape, self._noise(sizes):
            # --- Forward pass, with dropout and stochastic depth
            logits = self.student(images, training=True)
            labeled_logits, *unlabeled_logits = tf.split(logits, sizes)
            # --- L = label_weight · L_labeled + weight · L_unlabeled + weight_decay · Σ½‖v‖²
            smoothing, keep = settings.label_smoothing, settings.label_data_sample_prob
            labeled = losses.smoothed_cross_entropy(labeled_logits, labels, smoothing)
            if keep < 1:
                # The mean stays over all labeled images, so the loss shrinks, as in the original.
                labeled *= layers.bernoulli(labeled, keep, "labeled_sample")
            logs = {"lab/loss": tf.reduce_mean(labeled)}
            data_loss = logs["lab/loss"] * settings.label_weight
            if settings.unlabel_ratio:
                strong_logits, *weak_logits = unlabeled_logits
                pseudo_labels, pseudo_probs, weight = self._pseudo_labels(batch, *weak_logits)
                unlabeled = weight * losses.pseudo_label_loss(
                    strong_logits, pseudo_labels, pseudo_probs, smoothing=smoothing
                )
                logs["ext/loss"] = tf.reduce_mean(unlabeled)
                data_loss += unlabeled_weight * logs["ext/loss"]
            # Differs (3) in docs/differences.md: decays only the student's weights, not a teacher's.
            decay = losses.half_squared_norm(losses.decayed_variables(variables))
            loss = data_loss + settings.weight_decay * decay
            # Gradients are summed over replicas; each replica's loss is a mean over its own share.
            scaled_loss = loss / self.distribute_strategy.num_replicas_in_sync
        # --- Update of the student, then of the averages
        gradients = tape.gradient(scaled_loss, variables)
        self.optimizer.apply_gradients(zip(gradients, variables))
        self._update_averages()
        # --- Logs
        logs |= {"train/data_loss": data_loss, "train/loss": loss}
        logs |= _confidence(labeled_logits, labels, "lab", "lab/acc")
        if settings.unlabel_ratio:
            # The original compares with the stored label even if a teacher labels on the fly.
            reference = batch.get("unl_label", pseudo_labels)
            logs |= _confidence(strong_logits, reference, "unl", "unl/acc_to_dump")
            if weak_logits:
                logs["unl/used"] = tf.reduce_mean(weight)
            if pseudo_probs is not None:
                logs["unl/target_prob"] = tf.reduce_mean(tf.reduce_max(pseudo_probs, -1))
        # Keras evaluates the schedule in apply_gradients; before, this is the previous step's rate.
        logs["train/lr"] = tf.identity(self.optimizer.learning_rate)
        return self._averaged(logs)

    def _pseudo_labels(
        self, batch: dict[str, tf.Tensor], weak_logits: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor | None, tf.Tensor | float]:
        """Returns hard labels int32 [U]; at a positive temperature, soft ones [U, C]; weights.

        Args:
          weak_logits: the student's logits for `weak_image`, [U, C]; then, labels are only hard,
            with weight 0 if the confidence is below the threshold.
        """
        if weak_logits is not None:
            probs = tf.nn.softmax(tf.stop_gradient(weak_logits))
            sure = tf.reduce_max(probs, -1) >= self.settings.consistency_threshold
            return tf.argmax(probs, -1, output_type=tf.int32), None, tf.cast(sure, tf.float32)
        temperature = self.settings.teacher_softmax_temp
        if self.teacher is None:
            probs = batch["unl_probs"]
            soft = losses.sharpen(probs, temperature) if temperature > 0 else None
            return batch["unl_label"], soft, 1.0
        logits = tf.stop_gradient(self.teacher(batch["teacher_image"], training=False))
        soft = tf.nn.softmax(logits / temperature) if temperature > 0 else None
        return tf.argmax(logits, -1, output_type=tf.int32), soft, 1.0

    def _noise(self, sizes: list[int]) -> contextlib.AbstractContextManager[None]:
        """Returns noise determined by seed, step and row in the global batch, labeled rows first.

        The student's layers read it from the context, because Keras passes only `training` through
        a functional model.

        Args:
          sizes: rows of each part of a replica's batch.
        """
        context = tf.distribute.get_replica_context()
        replica, replicas = context.replica_id_in_sync_group, context.num_replicas_in_sync
        seed = tf.stack(
            [tf.cast(self.settings.seed, tf.int32), tf.cast(self.optimizer.iterations, tf.int32)]
        )
        seed = layers.fold_in(seed, 0)
        # Without noise: all unlabeled rows, or only the weak images, which come last.
        quiet_from = None if self.settings.unl_model_noise else sizes[0]
        if quiet_from is None and self.settings.consistency_threshold:
            quiet_from = sum(sizes[:-1])
        if replicas == 1:
            return layers.noise_seed(seed, quiet_from=quiet_from)
        starts = [replicas * sum(sizes[:part]) for part in range(len(sizes))]
        rows = [layers.Rows(start + replica * size, size) for start, size in zip(starts, sizes)]
        return layers.noise_seed(seed, rows, replicas * sum(sizes), quiet_from)

    def _update_averages(self) -> None:
        """Moves the averages toward the student's weights, or toward a mix of them and the initial ones."""
        decay = ema.ramped_decay(self.settings.moving_average_decay, self.optimizer.iterations)
        ema.update(
            self.ema_student.weights,
            self.student.weights,
            decay,
            anchors=self.initial.weights if self.initial else None,
            share=self.settings.ema_initial_share,
        )

    def _averaged(self, logs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        for name, value in logs.items():
            self._means[name].update_state(value)
        return {name: self._means[name].result() for name in logs}

    def compile(self, *args, **kwargs) -> None:
        """Keras' `compile`; creates the running means that a host loop reports."""
        super().compile(*args, **kwargs)
        names = ["lab/acc", "lab/pred_prob", "lab/loss"]
        if self.settings.unlabel_ratio:
            names += ["unl/acc_to_dump", "unl/pred_prob", "ext/loss"]
            if self.settings.consistency_threshold:
                names.append("unl/used")
            elif self.settings.teacher_softmax_temp > 0:
                names.append("unl/target_prob")
        names += ["train/data_loss", "train/loss", "train/lr"]
        self._means = {name: tf.keras.metrics.Mean(name) for name in names}

    @property
    def metrics(self) -> list[tf.keras.metrics.Metric]:
        """The running means, which Keras resets at the beginning of every host loop."""
        return list(self._means.values())


def _confidence(
    logits: tf.Tensor, labels: tf.Tensor, prefix: str, accuracy_name: str
) -> dict[str, tf.Tensor]:
    """Returns accuracy against `labels`, and the mean probability of the predicted class."""
    hits = tf.argmax(logits, -1, output_type=tf.int32) == tf.cast(labels, tf.int32)
    return {
        accuracy_name: tf.reduce_mean(tf.cast(hits, tf.float32)),
        f"{prefix}/pred_prob": tf.reduce_mean(tf.reduce_max(tf.nn.softmax(logits), -1)),
    }
