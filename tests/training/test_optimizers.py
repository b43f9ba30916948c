"""RMSProp, compared with the original's trajectories and a NumPy implementation."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.training import optimizers, schedules

TRAINABLE = ("bn/gamma", "dense/bias", "dense/kernel", "small/w")


class FromTable(tf.keras.optimizers.schedules.LearningRateSchedule):
    """Returns the recorded rate of each step."""

    def __init__(self, rates):
        self.rates = tf.constant(rates, tf.float32)

    def __call__(self, step):
        return tf.gather(self.rates, step)


class NumpyRMSProp:
    """The update in double precision."""

    def __init__(self, values, rho=0.9, momentum=0.9, epsilon=1e-3):
        self.values = [np.asarray(v, np.float64) for v in values]
        self.mean_squares = [np.ones_like(v) for v in self.values]
        self.momentums = [np.zeros_like(v) for v in self.values]
        self.rho, self.momentum, self.epsilon = rho, momentum, epsilon

    def step(self, gradients, rate: float) -> None:
        for i, gradient in enumerate(np.asarray(g, np.float64) for g in gradients):
            square = self.rho * self.mean_squares[i] + (1 - self.rho) * gradient**2
            delta = rate * gradient / np.sqrt(square + self.epsilon)
            self.mean_squares[i] = square
            self.momentums[i] = self.momentum * self.momentums[i] + delta
            self.values[i] = self.values[i] - self.momentums[i]


def assert_state(optimizer, variables, reference: NumpyRMSProp, rtol=1e-5, atol=1e-6) -> None:
    for i, variable in enumerate(variables):
        mean_square, momentum = optimizer.slots(variable)
        np.testing.assert_allclose(variable, reference.values[i], rtol=rtol, atol=atol)
        np.testing.assert_allclose(mean_square, reference.mean_squares[i], rtol=rtol, atol=atol)
        np.testing.assert_allclose(momentum, reference.momentums[i], rtol=rtol, atol=atol)


@pytest.fixture(params=["rmsprop_ema_const_lr", "rmsprop_ema_varying_lr"])
def recorded(request, goldens) -> dict[str, np.ndarray]:
    return dict(np.load(goldens / "optimizer" / f"{request.param}.npz"))


def test_trajectory_equals_original(recorded):
    variables = [tf.Variable(recorded[f"init|{name}"], name=name) for name in TRAINABLE]
    optimizer = optimizers.RMSPropTF1(FromTable(recorded["lr"]))
    for step in range(len(recorded["lr"])):
        gradients = [tf.constant(recorded[f"grad|{name}"][step]) for name in TRAINABLE]
        optimizer.apply_gradients(zip(gradients, variables))
        for name, variable in zip(TRAINABLE, variables):
            mean_square, momentum = optimizer.slots(variable)
            for kind, value in (("var", variable), ("rms", mean_square), ("momentum", momentum)):
                np.testing.assert_allclose(
                    value,
                    recorded[f"{kind}|{name}"][step],
                    rtol=3e-7,
                    atol=3e-7,
                    err_msg=f"{kind} of {name} after step {step}",
                )
        assert int(optimizer.iterations) == recorded["global_step_after"][step]


def test_first_step_by_hand():
    variable = tf.Variable([1.0])
    optimizer = optimizers.RMSPropTF1(0.5, rho=0.75, momentum=0.5, epsilon=1.25)
    optimizer.apply_gradients([(tf.constant([4.0]), variable)])
    # 0.75·1 + 0.25·16 = 4.75;  √(4.75 + 1.25) = √6;  0.5·4/√6 = 0.816497.
    mean_square, momentum = optimizer.slots(variable)
    assert float(mean_square[0]) == 4.75
    assert float(momentum[0]) == pytest.approx(0.816497, rel=1e-6)
    assert float(variable[0]) == pytest.approx(1 - 0.816497, rel=1e-5)
    optimizer.apply_gradients([(tf.constant([0.0]), variable)])
    assert float(momentum[0]) == pytest.approx(0.408248, rel=1e-6)
    assert float(variable[0]) == pytest.approx(1 - 0.816497 - 0.408248, rel=1e-5)


def test_differs_from_keras():
    ours, theirs = tf.Variable([1.0]), tf.Variable([1.0])
    optimizers.RMSPropTF1(0.1).apply_gradients([(tf.constant([0.1]), ours)])
    keras = tf.keras.optimizers.RMSprop(0.1, rho=0.9, momentum=0.9, epsilon=1e-3)
    keras.apply_gradients([(tf.constant([0.1]), theirs)])
    # Keras' mean square starts at 0, which makes its first step about √10 times the rate.
    assert 1 - float(ours[0]) == pytest.approx(0.1 * 0.1 / np.sqrt(0.902), rel=1e-5)
    assert 1 - float(theirs[0]) > 0.2


@pytest.mark.parametrize("case", range(6))
def test_equals_numpy(case):
    rng = np.random.default_rng(case)
    hyper = {
        "rho": rng.uniform(0.5, 0.99),
        "momentum": [0.0, 0.5, 0.9, 0.99][case % 4],
        "epsilon": 10.0 ** rng.uniform(-8, 0),
    }
    rates = (10.0 ** rng.uniform(-4, -1, 10)).astype(np.float32)
    shapes = [(), (3,), (2, 4), (3, 3, 2, 1)]
    values = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    variables = [tf.Variable(v) for v in values]
    reference = NumpyRMSProp(values, **hyper)
    optimizer = optimizers.RMSPropTF1(FromTable(rates), **hyper)
    apply = tf.function(lambda *g: optimizer.apply_gradients(zip(g, variables)))
    optimizer.build(variables)
    for rate in rates:
        scale = 10.0 ** rng.uniform(-3, 2)
        gradients = [(scale * rng.normal(size=shape)).astype(np.float32) for shape in shapes]
        apply(*map(tf.constant, gradients))
        reference.step(gradients, rate)
        assert_state(optimizer, variables, reference, rtol=2e-5, atol=2e-6)


def test_default_hyper_parameters_are_the_papers():
    optimizer = optimizers.RMSPropTF1()
    assert (optimizer.rho, optimizer.momentum, optimizer.epsilon) == (0.9, 0.9, 1e-3)


def test_variable_without_gradient_stays():
    moved, still = tf.Variable([1.0]), tf.Variable([1.0])
    optimizer = optimizers.RMSPropTF1(0.1)
    optimizer.apply_gradients([(tf.constant([1.0]), moved), (None, still)])
    assert float(moved[0]) < 1.0
    assert float(still[0]) == 1.0
    assert float(optimizer.slots(still)[0][0]) == 1.0


@pytest.mark.parametrize(
    "learning_rate", [0.25, schedules.WarmupStaircase(0.128, 1501.4, 3127)], ids=["float", "table"]
)
def test_config_round_trip(learning_rate):
    optimizer = optimizers.RMSPropTF1(
        learning_rate, rho=0.8, momentum=0.7, epsilon=0.01, clipvalue=2.0
    )
    config = tf.keras.optimizers.serialize(optimizer)
    restored = tf.keras.optimizers.deserialize(config)
    assert isinstance(restored, optimizers.RMSPropTF1)
    assert restored.get_config() == optimizer.get_config()
    assert (restored.rho, restored.momentum, restored.epsilon) == (0.8, 0.7, 0.01)
    assert restored.clipvalue == 2.0


def test_no_weight_decay_is_applied_by_keras():
    # A decay of 0 would still rewrite every weight at every step.
    assert optimizers.RMSPropTF1().weight_decay is None
    variable = tf.Variable([2.0])
    optimizer = optimizers.RMSPropTF1(0.1, weight_decay=0.5)
    optimizer.apply_gradients([(tf.constant([0.0]), variable)])
    assert float(variable[0]) == pytest.approx(2.0 - 0.1 * 0.5 * 2.0)


def test_state_survives_a_checkpoint(tmp_path, rng):
    gradients = rng.normal(size=(6, 5)).astype(np.float32)
    schedule = schedules.WarmupStaircase(0.1, 2.0, 3)

    def fresh():
        variable = tf.Variable(np.ones(5, np.float32))
        optimizer = optimizers.RMSPropTF1(schedule)
        optimizer.build([variable])
        return variable, optimizer, tf.train.Checkpoint(variable=variable, optimizer=optimizer)

    variable, optimizer, checkpoint = fresh()
    for step in range(3):
        optimizer.apply_gradients([(tf.constant(gradients[step]), variable)])
    path = checkpoint.write(str(tmp_path / "state"))
    restored, restored_optimizer, restored_checkpoint = fresh()
    restored_checkpoint.read(path).assert_consumed()
    assert int(restored_optimizer.iterations) == 3
    for step in range(3, 6):
        optimizer.apply_gradients([(tf.constant(gradients[step]), variable)])
        restored_optimizer.apply_gradients([(tf.constant(gradients[step]), restored)])
    np.testing.assert_array_equal(restored, variable)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_inside_a_function(rng, jit_compile):
    values = rng.normal(size=(3, 4)).astype(np.float32)
    variable, reference = tf.Variable(values), NumpyRMSProp([values])
    optimizer = optimizers.RMSPropTF1(0.05)
    optimizer.build([variable])

    @tf.function(jit_compile=jit_compile)
    def step(gradient):
        optimizer.apply_gradients([(gradient, variable)])

    for _ in range(3):
        gradient = rng.normal(size=(3, 4)).astype(np.float32)
        step(tf.constant(gradient))
        reference.step([gradient], 0.05)
    assert_state(optimizer, [variable], reference)
    assert int(optimizer.iterations) == 3


def test_two_replicas_apply_the_sum_of_their_gradients(rng, two_replicas):
    values = rng.normal(size=(4,)).astype(np.float32)
    with two_replicas.scope():
        variable = tf.Variable(values)
        optimizer = optimizers.RMSPropTF1(0.05)
        optimizer.build([variable])
    reference = NumpyRMSProp([values])

    @tf.function
    def step(gradients):
        two_replicas.run(
            lambda gradient: optimizer.apply_gradients([(gradient, variable)]), args=(gradients,)
        )

    for _ in range(3):
        gradients = rng.normal(size=(2, 4)).astype(np.float32)
        step(
            two_replicas.experimental_distribute_values_from_function(
                lambda context, values=gradients: tf.constant(
                    values[context.replica_id_in_sync_group]
                )
            )
        )
        reference.step([gradients.sum(0)], 0.05)
    assert_state(optimizer, [variable], reference)
    for distributed in (variable, *optimizer.slots(variable)):
        first, second = two_replicas.experimental_local_results(distributed)
        assert first.device != second.device
        np.testing.assert_array_equal(first, second)
    assert optimizer.iterations.numpy() == 3
