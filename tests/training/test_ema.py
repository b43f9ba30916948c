"""The moving average, compared with the original's trajectories and on two replicas."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.training import ema

AVERAGED = ("bn/gamma", "bn/moving_mean", "dense/bias", "dense/kernel", "small/w")


@pytest.fixture(params=["rmsprop_ema_const_lr", "rmsprop_ema_varying_lr"])
def recorded(request, goldens) -> dict[str, np.ndarray]:
    return dict(np.load(goldens / "optimizer" / f"{request.param}.npz"))


def test_decay_equals_original(recorded):
    for step, expected in zip(recorded["global_step_after"], recorded["ema_decay_used"]):
        assert float(ema.ramped_decay(0.9999, tf.constant(step))) == pytest.approx(
            expected, rel=1e-7
        )


def test_trajectory_equals_original(recorded):
    sources = [tf.Variable(recorded[f"init|{name}"]) for name in AVERAGED]
    copies = [tf.Variable(recorded[f"ema_init|{name}"]) for name in AVERAGED]
    for step, count in enumerate(recorded["global_step_after"]):
        for name, source in zip(AVERAGED, sources):
            source.assign(recorded[f"var|{name}"][step])
        ema.update(copies, sources, ema.ramped_decay(0.9999, tf.constant(count)))
        for name, copy in zip(AVERAGED, copies):
            np.testing.assert_allclose(
                copy,
                recorded[f"ema|{name}"][step],
                rtol=3e-7,
                atol=3e-7,
                err_msg=f"{name} after step {step}",
            )


@pytest.mark.parametrize(
    "num_updates, expected",
    [(0, 0.1), (1, 2 / 11), (8, 0.5), (90, 0.91), (89_989, 0.9999), (10_000_000, 0.9999)],
)
def test_decay_ramp(num_updates, expected):
    decay = ema.ramped_decay(0.9999, tf.constant(num_updates, tf.int64))
    assert float(decay) == pytest.approx(expected, rel=1e-6)


def test_decay_grows_up_to_its_ceiling():
    decays = [float(ema.ramped_decay(0.99, tf.constant(n))) for n in range(0, 2000, 7)]
    assert decays == sorted(decays)
    assert max(decays) == np.float32(0.99)
    assert decays[-1] == decays[-100] > decays[0]


def test_update_by_hand():
    copy, source = tf.Variable([1.0, 2.0]), tf.Variable([3.0, -2.0])
    ema.update([copy], [source], tf.constant(0.75))
    np.testing.assert_array_equal(copy, [1.5, 1.0])
    np.testing.assert_array_equal(source, [3.0, -2.0])


def test_anchors_hold_a_share_of_the_average():
    """The result is a quarter of the anchor plus three quarters of the plain average."""
    anchor, source = tf.constant([1.0, -2.0]), tf.Variable([0.0, 0.0])
    plain, mixed = tf.Variable(anchor), tf.Variable(anchor)
    for values in ([3.0, 5.0], [-1.0, 2.0], [4.0, 4.0]):
        source.assign(values)
        ema.update([plain], [source], tf.constant(0.75))
        ema.update([mixed], [source], tf.constant(0.75), anchors=[anchor], share=0.25)
    np.testing.assert_allclose(mixed, 0.25 * anchor + 0.75 * plain, rtol=1e-6)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_inside_a_function(jit_compile):
    copy, source = tf.Variable([1.0, 2.0]), tf.Variable([3.0, -2.0])

    @tf.function(jit_compile=jit_compile)
    def step():
        ema.update([copy], [source], tf.constant(0.75))

    step()
    step()
    np.testing.assert_array_equal(copy, [1.875, 0.25])


def test_two_replicas(two_replicas):
    def statistic():
        return tf.Variable(
            [0.0],
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.MEAN,
        )

    with two_replicas.scope():
        source, copy = tf.Variable([3.0, -2.0]), tf.Variable([1.0, 2.0])
        anchor, mixed = tf.Variable([1.0, 2.0]), tf.Variable([1.0, 2.0])
        statistic_source, statistic_copy = statistic(), statistic()
        statistic_anchor, statistic_mixed = statistic(), statistic()

    @tf.function
    def step():
        def replica():
            number = tf.distribute.get_replica_context().replica_id_in_sync_group
            statistic_source.assign([tf.cast(4 + 4 * number, tf.float32)])
            ema.update(
                [statistic_copy, copy], [statistic_source, source], tf.constant(0.75, tf.float32)
            )
            ema.update(
                [statistic_mixed, mixed],
                [statistic_source, source],
                tf.constant(0.75),
                anchors=[statistic_anchor, anchor],
                share=0.5,
            )

        two_replicas.run(replica)

    step()
    # Each copy moves once, by a quarter; one move per replica would give 1.875 and 0.25.
    for local in two_replicas.experimental_local_results(copy):
        np.testing.assert_array_equal(local, [1.5, 1.0])
    for local in two_replicas.experimental_local_results(mixed):
        np.testing.assert_array_equal(local, [1.25, 1.5])
    locals_ = two_replicas.experimental_local_results(statistic_mixed)
    np.testing.assert_array_equal([float(v[0]) for v in locals_], [0.5, 1.0])
    # Each replica averages its own statistic; reading returns the mean over replicas.
    locals_ = two_replicas.experimental_local_results(statistic_copy)
    np.testing.assert_array_equal([float(v[0]) for v in locals_], [1.0, 2.0])
    assert float(statistic_copy.read_value()[0]) == 1.5
    step()
    np.testing.assert_array_equal(copy.read_value(), [1.875, 0.25])
    assert float(statistic_copy.read_value()[0]) == 0.75 * 1.5 + 0.25 * 6.0
