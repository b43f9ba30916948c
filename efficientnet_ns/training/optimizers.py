"""RMSProp as in TensorFlow 1, with which the published EfficientNets were trained, and Adam.

Adam is for fine-tuning. Both name their slots in checkpoints as TensorFlow 1 does.

RMSProp differs from `tf.keras.optimizers.RMSprop`: (1) the mean square starts at 1, not 0; (2) epsilon is
inside the square root; (3) the learning rate enters the momentum buffer, so a change of the rate
takes effect gradually.
"""

from __future__ import annotations

import tensorflow as tf

DECAY = 0.9
MOMENTUM = 0.9
EPSILON = 1e-3


@tf.keras.utils.register_keras_serializable("efficientnet_ns")
class RMSPropTF1(tf.keras.optimizers.Optimizer):
    """ms ← ρ·ms + (1-ρ)·g²;  mom ← μ·mom + lr·g/√(ms + ε);  v ← v - mom.

    Args:
      learning_rate: float or LearningRateSchedule, read at the step before the increment.
      rho: decay of the mean square.
      momentum: decay of the momentum buffer.
      epsilon: added to the mean square inside the root.
    """

    # Names of the slots in a checkpoint, with their initial values.
    SLOTS = {"RMSProp": 1.0, "RMSProp_1": 0.0}

    def __init__(
        self,
        learning_rate=0.016,
        rho: float = DECAY,
        momentum: float = MOMENTUM,
        epsilon: float = EPSILON,
        name: str = "RMSProp",
        **kwargs,
    ):
        # Keras' own defaults would decay every weight by 0 and create an XLA cluster per variable.
        super().__init__(name=name, **{"weight_decay": None, "jit_compile": False, **kwargs})
        self._learning_rate = self._build_learning_rate(learning_rate)
        self.rho, self.momentum, self.epsilon = rho, momentum, epsilon

    def build(self, var_list: list[tf.Variable]) -> None:
        super().build(var_list)
        # Keras calls `build` in every `apply_gradients`; the slots are created once.
        if getattr(self, "_built", False):
            return
        self._built = True
        self.mean_squares = [
            self.add_variable_from_reference(
                v, "mean_square", initial_value=tf.ones(v.shape, v.dtype)
            )
            for v in var_list
        ]
        self.momentums = [self.add_variable_from_reference(v, "momentum") for v in var_list]

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable) -> None:
        index = self._index_dict[self._var_key(variable)]
        # The kernel of TensorFlow 1's RMSPropOptimizer: differences (2) and (3) above.
        tf.raw_ops.ResourceApplyRMSProp(
            var=variable.handle,
            ms=self.mean_squares[index].handle,
            mom=self.momentums[index].handle,
            lr=tf.cast(self.learning_rate, variable.dtype),
            rho=tf.cast(self.rho, variable.dtype),
            momentum=tf.cast(self.momentum, variable.dtype),
            epsilon=tf.cast(self.epsilon, variable.dtype),
            grad=gradient,
            use_locking=True,
        )

    def slots(self, variable: tf.Variable) -> tuple[tf.Variable, tf.Variable]:
        """Returns (mean square, momentum) of a variable given to `build`."""
        index = self._index_dict[self._var_key(variable)]
        return self.mean_squares[index], self.momentums[index]

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "learning_rate": self._serialize_hyperparameter(self._learning_rate),
            "rho": self.rho,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
        }


@tf.keras.utils.register_keras_serializable("efficientnet_ns")
class Adam(tf.keras.optimizers.Adam):
    """Adam (arXiv 1412.6980) with Keras' defaults; its slots are stored in checkpoints."""

    SLOTS = {"Adam": 0.0, "Adam_1": 0.0}

    def __init__(self, learning_rate=0.001, name: str = "Adam", **kwargs):
        super().__init__(learning_rate, name=name, **{"jit_compile": False, **kwargs})

    def slots(self, variable: tf.Variable) -> tuple[tf.Variable, tf.Variable]:
        """Returns (first moment, second moment) of a variable given to `build`."""
        index = self._index_dict[self._var_key(variable)]
        return self._momentums[index], self._velocities[index]


OPTIMIZERS = {"rmsprop": RMSPropTF1, "adam": Adam}
