"""One update of a noised student: the method on one screen (arXiv 1911.04252, algorithm 1)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import tensorflow as tf

from efficientnet_ns.models import layers
from efficientnet_ns.training import ema, losses


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """What the student is asked to minimise.

    Attributes:
      label_smoothing: of true labels and of hard pseudo labels.
      weight_decay: factor of Σ½‖v‖².
      unlabel_ratio: weight, and batch share, of unlabeled images.
      teacher_softmax_temp: negative for hard pseudo labels, else the temperature of soft ones.
      ema_decay: ceiling of the moving average's decay.
      label_data_sample_prob: probability that a labeled image enters the loss. The mean stays over
        all of them, so that the labeled loss shrinks by this factor, as in the original.
      label_weight: of the labeled loss.
      unl_model_noise: dropout and stochastic depth for the unlabeled images too.
    """

    label_smoothing: float = 0.1
    weight_decay: float = 1e-5
    unlabel_ratio: float = 0.0
    teacher_softmax_temp: float = -1.0
    ema_decay: float = 0.9999
    label_data_sample_prob: float = 1.0
    label_weight: float = 1.0
    unl_model_noise: bool = True


class _PseudoLabels(NamedTuple):
    """Hard labels int32 [U] and, at a positive temperature, soft ones float32 [U, C]."""

    labels: tf.Tensor
    probs: tf.Tensor | None


class NoisyStudent(tf.keras.Model):
    """Trains `student` on labeled and pseudo-labeled images, and averages it in `ema_student`.

    A batch is a dict: `image` [B, S, S, 3] and `label` int32 [B]; with unlabeled data also
    `unl_image` [U, S, S, 3], and either stored pseudo labels `unl_label` int32 [U], `unl_probs`
    float32 [U, C], or `teacher_image` [U, T, T, 3] for a teacher that answers on the fly.

    Args:
      student: the model that learns.
      ema_student: a model of the same architecture that holds the averages.
      settings: see `LossSettings`.
      seed: of all noise; together with the step number it fixes every draw.
      teacher: frozen model that labels `teacher_image`; None takes the stored labels.
    """

    def __init__(
        self,
        student: tf.keras.Model,
        ema_student: tf.keras.Model,
        settings: LossSettings,
        seed: int = 0,
        teacher: tf.keras.Model | None = None,
    ):
        super().__init__(name="noisy_student")
        self.student, self.ema_student, self.teacher = student, ema_student, teacher
        self.settings, self.seed = settings, seed
        self._means: dict[str, tf.keras.metrics.Mean] = {}
        ema_student.trainable = False
        if teacher is not None:
            teacher.trainable = False

    def call(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        return self.student(images, training=training)

    def train_step(self, batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        images, labels = batch["image"], batch["label"]
        pseudo = None
        if self.settings.unlabel_ratio:
            # One forward pass over both, so that they share batch-norm statistics. Augmented images
            # are uint8, others are not, and may lie outside of its range.
            both = [tf.cast(x, tf.float32) for x in (images, batch["unl_image"])]
            images = tf.concat(both, 0)
            pseudo = self._pseudo_labels(batch)
        variables = self.student.trainable_variables
        with tf.GradientTape() as tape, self._noise(labels.shape[0], images.shape[0]):
            logits = self.student(images, training=True)
            labeled_logits, unlabeled_logits = tf.split(logits, [labels.shape[0], -1])
            parts = self._loss_parts(labeled_logits, labels, unlabeled_logits, pseudo)
            # Gradients are summed over replicas; each replica's loss is a mean over its own share.
            scaled_loss = parts["train/loss"] / self.distribute_strategy.num_replicas_in_sync
        gradients = tape.gradient(scaled_loss, variables)
        self.optimizer.apply_gradients(zip(gradients, variables))
        ema.update(
            self.ema_student.weights,
            self.student.weights,
            ema.ramped_decay(self.settings.ema_decay, self.optimizer.iterations),
        )
        logs = _confidence(labeled_logits, labels, "lab", "lab/acc") | parts
        if pseudo is not None:
            # The original compares with the stored label even when a teacher answers on the fly.
            reference = batch.get("unl_label", pseudo.labels)
            logs |= _confidence(unlabeled_logits, reference, "unl", "unl/acc_to_dump")
            if pseudo.probs is not None:
                logs["unl/target_prob"] = tf.reduce_mean(tf.reduce_max(pseudo.probs, -1))
        # Keras computes a schedule's value while it applies it; before, the last step's is read.
        logs["train/lr"] = tf.identity(self.optimizer.learning_rate)
        return self._averaged(logs)

    def _loss_parts(self, labeled_logits, labels, unlabeled_logits, pseudo) -> dict[str, tf.Tensor]:
        """The named parts of the loss and their sum `train/loss`, float32 scalars."""
        settings, unlabeled_loss, parts = self.settings, None, {}
        labeled = losses.smoothed_cross_entropy(labeled_logits, labels, settings.label_smoothing)
        if settings.label_data_sample_prob < 1:
            labeled *= layers.bernoulli(labeled, settings.label_data_sample_prob, "labeled_sample")
        parts["lab/loss"] = tf.reduce_mean(labeled)
        if pseudo is not None:
            parts["ext/loss"] = unlabeled_loss = tf.reduce_mean(
                losses.pseudo_label_loss(
                    unlabeled_logits,
                    labels=pseudo.labels,
                    probs=pseudo.probs,
                    temperature=settings.teacher_softmax_temp,
                    smoothing=settings.label_smoothing,
                )
            )
        weighted = parts["lab/loss"] * settings.label_weight
        data_loss = losses.combine(weighted, unlabeled_loss, settings.unlabel_ratio)
        # Differs (3): the student's weights only, without a teacher's.
        decayed = losses.decayed_variables(self.student.trainable_variables)
        decay = settings.weight_decay * losses.half_squared_norm(decayed)
        return {**parts, "train/data_loss": data_loss, "train/loss": data_loss + decay}

    def _pseudo_labels(self, batch: dict[str, tf.Tensor]) -> _PseudoLabels:
        temperature = self.settings.teacher_softmax_temp
        if self.teacher is None:
            probs = batch["unl_probs"]
            soft = losses.sharpen(probs, temperature) if temperature > 0 else None
            return _PseudoLabels(batch["unl_label"], soft)
        logits = tf.stop_gradient(self.teacher(batch["teacher_image"], training=False))
        soft = tf.nn.softmax(logits / temperature) if temperature > 0 else None
        return _PseudoLabels(tf.argmax(logits, -1, output_type=tf.int32), soft)

    def _noise(self, num_labeled: int, num_images: int):
        """Noise by seed, step and row of the batch of all replicas: the labeled rows come first."""
        context = tf.distribute.get_replica_context()
        replica, replicas = context.replica_id_in_sync_group, context.num_replicas_in_sync
        seed = tf.stack(
            [tf.cast(self.seed, tf.int32), tf.cast(self.optimizer.iterations, tf.int32)]
        )
        seed = layers.fold_in(seed, 0)
        quiet_from = None if self.settings.unl_model_noise else num_labeled
        if replicas == 1:
            return layers.noise_seed(seed, quiet_from=quiet_from)
        num_unlabeled = num_images - num_labeled
        rows = [layers.Rows(replica * num_labeled, num_labeled)]
        if num_unlabeled:
            first = replicas * num_labeled + replica * num_unlabeled
            rows.append(layers.Rows(first, num_unlabeled))
        return layers.noise_seed(seed, rows, replicas * num_images, quiet_from)

    def _averaged(self, logs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        for name, value in logs.items():
            self._means[name].update_state(value)
        return {name: self._means[name].result() for name in logs}

    def compile(self, *args, **kwargs) -> None:
        """Keras' `compile`; creates the running means that one chunk of steps reports."""
        super().compile(*args, **kwargs)
        names = ["lab/acc", "lab/pred_prob", "lab/loss"]
        if self.settings.unlabel_ratio:
            names += ["unl/acc_to_dump", "unl/pred_prob", "ext/loss"]
            if self.settings.teacher_softmax_temp > 0:
                names.append("unl/target_prob")
        names += ["train/data_loss", "train/loss", "train/lr"]
        self._means = {name: tf.keras.metrics.Mean(name) for name in names}

    @property
    def metrics(self) -> list[tf.keras.metrics.Metric]:
        return list(self._means.values())


def _confidence(logits, labels, prefix: str, accuracy_name: str) -> dict[str, tf.Tensor]:
    hits = tf.argmax(logits, -1, output_type=tf.int32) == tf.cast(labels, tf.int32)
    return {
        accuracy_name: tf.reduce_mean(tf.cast(hits, tf.float32)),
        f"{prefix}/pred_prob": tf.reduce_mean(tf.reduce_max(tf.nn.softmax(logits), -1)),
    }
