"""Measures accuracy under attacks that use the model and the true label.

Sources:
  Goodfellow et al. 2015 (arXiv 1412.6572): FGSM, one step along the sign of the gradient.
  Madry et al. 2018 (arXiv 1706.06083): PGD, several such steps from a random start, each projected
    back onto the ball.
  Xie et al. 2020 (arXiv 1911.04252), "Adversarial Robustness Results": both, at several ε.

ε is in pixel values: with ε = 16, every channel of every pixel may change by up to 16 of 255.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import tensorflow as tf

from efficientnet_ns.evaluation import accuracy

# (pixels [B, S, S, 3], labels [B]) → gradient of the loss with respect to the pixels.
Gradient = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]

_START = 3  # Salt of the random starts.


@dataclasses.dataclass(frozen=True)
class Pgd:
    """Settings of PGD.

    Attributes:
      steps: number of gradient steps.
      step_size: size of one step in pixel values; None for 2.5 ε / steps, which reaches the
        boundary of the ball from any start.
      seed: seed of the random starts.
    """

    steps: int = 10
    step_size: float | None = None
    seed: int = 0

    def size(self, epsilon: float) -> float:
        """Returns the size of one step at this ε, in pixel values."""
        return 2.5 * epsilon / self.steps if self.step_size is None else self.step_size


class Attacker:
    """Measures a model's top-1 accuracy on clean images and under FGSM and PGD.

    Args:
      model: pixels → logits.
      strategy: the strategy under which the model was built.
      pgd: settings of PGD.
      jit_compile: whether to compile the attack with XLA.
    """

    def __init__(
        self,
        model: Callable[..., tf.Tensor],
        strategy: tf.distribute.Strategy | None = None,
        pgd: Pgd = Pgd(),
        jit_compile: bool = False,
    ):
        self._strategy = strategy or tf.distribute.get_strategy()
        self._pgd = pgd

        def sums(batch, epsilon, step_size):
            return _batch_sums(model, batch, epsilon, step_size, pgd)

        if jit_compile:
            sums = tf.function(sums, jit_compile=True)
        self._step = accuracy.replicated(self._strategy, sums)

    def __call__(
        self, batches: accuracy.Batches, num_examples: int, epsilon: float
    ) -> dict[str, float]:
        """Measures one set at one ε.

        Args:
          batches: batches of `pipeline.eval_batches`, as for `accuracy.Evaluator`.
          num_examples: size of the set.
          epsilon: ε in pixel values.

        Returns:
          `clean`, `fgsm`, `pgd` (top-1, fractions), `examples`.

        Raises:
          accuracy.IncompleteEvaluation: If the batches contain more or fewer examples.
        """
        # Tensors, so that a new ε does not retrace the step.
        size = tf.constant(self._pgd.size(epsilon), tf.float32)
        radius = tf.constant(epsilon, tf.float32)
        sums = accuracy.add_up(
            self._strategy, lambda batch: self._step(batch, radius, size), batches
        )
        return accuracy.means(sums, num_examples)


def _batch_sums(model, batch, epsilon, step_size, pgd: Pgd) -> dict[str, tf.Tensor]:
    labels, mask, clean = batch["label"], batch["mask"], batch["image"]

    def gradient(pixels: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        return loss_gradient(model, pixels, labels)

    start = random_start(clean, batch["index"], epsilon, pgd.seed)
    attacked = {
        "clean": clean,
        "fgsm": fgsm(gradient, clean, labels, epsilon),
        "pgd": projected_descent(gradient, clean, labels, epsilon, step_size, pgd.steps, start),
    }

    def right(pixels: tf.Tensor) -> tf.Tensor:
        logits = model(pixels, training=False)
        # A NaN logit is a miss, as in `accuracy`.
        finite = tf.reduce_all(tf.math.is_finite(logits), -1)
        hit = (tf.argmax(logits, -1, tf.int32) == labels) & finite
        return tf.reduce_sum(mask * tf.cast(hit, tf.float32))

    return {
        **{name: right(pixels) for name, pixels in attacked.items()},
        "examples": tf.reduce_sum(mask),
    }


def loss_gradient(model: Callable[..., tf.Tensor], pixels: tf.Tensor, labels: tf.Tensor):
    """Returns a positive multiple of each image's cross-entropy gradient, float32 [B, S, S, 3].

    The attacks use only its sign. Cross-entropy is log(1 + exp(margin)), so its gradient is
    sigmoid(margin) times the gradient of the margin. This function omits that factor, which
    underflows to 0 in float32 if the model is very confident and would stop the attack.

    Args:
      model: pixels → logits.
      pixels: float32 [B, S, S, 3].
      labels: true classes, int32 [B].
    """
    # Only the gradient with respect to the pixels is required, not to the weights.
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(pixels)
        logits = tf.cast(model(pixels, training=False), tf.float32)
        own = tf.one_hot(labels, logits.shape[-1], on_value=True, off_value=False)
        # The lowest float32 excludes the true class: its exponential underflows to 0.
        others = tf.reduce_logsumexp(tf.where(own, logits.dtype.min, logits), -1)
        margin = others - tf.gather(logits, labels, axis=-1, batch_dims=1)
        # In inference mode, images are independent, so the sum's gradient is per image.
        loss = tf.reduce_sum(margin)
    return tape.gradient(loss, pixels)


def project(pixels: tf.Tensor, clean: tf.Tensor, epsilon: tf.Tensor | float) -> tf.Tensor:
    """Returns the nearest pixels within ε of the clean ones and within 0..255.

    Bicubic resizing can exceed 0..255. In that case, the clean value replaces the bound, so ε = 0
    returns the clean image.
    """
    lowest = tf.maximum(clean - epsilon, tf.minimum(clean, 0.0))
    highest = tf.minimum(clean + epsilon, tf.maximum(clean, 255.0))
    return tf.clip_by_value(pixels, lowest, highest)


def fgsm(
    gradient: Gradient, clean: tf.Tensor, labels: tf.Tensor, epsilon: tf.Tensor | float
) -> tf.Tensor:
    """Moves the clean pixels, float32 [B, S, S, 3], by ε along the sign of the gradient."""
    return project(clean + epsilon * tf.sign(gradient(clean, labels)), clean, epsilon)


def projected_descent(
    gradient: Gradient,
    clean: tf.Tensor,
    labels: tf.Tensor,
    epsilon: tf.Tensor | float,
    step_size: tf.Tensor | float,
    steps: int,
    start: tf.Tensor,
) -> tf.Tensor:
    """Returns PGD's last iterate.

    Args:
      gradient: gradient of the loss, which the attack maximizes.
      clean: pixels, float32 [B, S, S, 3].
      labels: true classes, int32 [B].
      epsilon: radius of the ball, in pixel values.
      step_size: size of a step, in pixel values.
      steps: number of steps.
      start: initial pixels, float32 [B, S, S, 3]; projected first.
    """

    def step(done, pixels):
        moved = pixels + step_size * tf.sign(gradient(pixels, labels))
        return done + 1, project(moved, clean, epsilon)

    first = (tf.constant(0), project(start, clean, epsilon))
    # A graph loop; a Python loop would be unrolled and grow with the number of steps.
    return tf.while_loop(lambda done, _: done < steps, step, first)[1]


def random_start(
    clean: tf.Tensor, index: tf.Tensor, epsilon: tf.Tensor | float, seed: int
) -> tf.Tensor:
    """Draws pixels uniformly from the ball around the clean ones, float32 [B, S, S, 3].

    Args:
      clean: pixels, float32 [B, S, S, 3].
      index: index of each image in the set, int32 [B]. The draw depends only on the index and the
        seed, not on batches or devices.
      epsilon: radius of the ball, in pixel values.
      seed: seed of all draws.
    """

    def draw(place: tf.Tensor) -> tf.Tensor:
        own = tf.random.experimental.stateless_fold_in([seed, _START], place)
        # The algorithm is fixed because the default depends on the device type.
        return tf.random.stateless_uniform(clean.shape[1:], own, alg="philox")

    noise = tf.map_fn(draw, index, fn_output_signature=tf.float32)
    return clean + epsilon * (2.0 * noise - 1.0)
