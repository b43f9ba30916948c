"""The same training on one device, on several replicas and on several workers."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from fakes import (
    PACE,
    ROOT,
    free_ports,
    make_batch,
    make_trainer,
    noised,
    settings,
    tensors,
    tiny,
    worker_environment,
    write_data,
)
from fakes import variable_values as values

from efficientnet_ns.config import Config, ConfigError, HardwareConfig, preemption
from efficientnet_ns.data import pipeline
from efficientnet_ns.devices import distribution
from efficientnet_ns.files import metrics_log
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.models import layers
from efficientnet_ns.resolve.resolved_config import ResolvedConfig
from efficientnet_ns.training import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("distribution")
    write_data(path)
    return path


def mirrored(count: int) -> tf.distribute.MirroredStrategy:
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(count)], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


# --------------------------------------------------------------------------------------------------
# Noise by row


@pytest.mark.parametrize("width", [1, 32, 6])
@pytest.mark.parametrize("replicas", [2, 4])
def test_replicas_draw_their_rows_of_one_noise(width, replicas):
    labeled, unlabeled = 8, 16
    layer = layers.Dropout(0.5, name="drop")
    seed = tf.constant([3, 4])

    def draw(count: int, *scope) -> np.ndarray:
        with layers.noise_seed(seed, *scope):
            return layer(tf.ones([count, width]), training=True).numpy()

    whole = draw(labeled + unlabeled)
    assert 0 < np.mean(whole == 0) < 1
    lab, unl = labeled // replicas, unlabeled // replicas
    for replica in range(replicas):
        rows = [
            layers.Rows(tf.constant(replica * lab), lab),
            layers.Rows(tf.constant(labeled + replica * unl), unl),
        ]
        own = np.concatenate([whole[first : first + n] for first, n in rows])
        np.testing.assert_array_equal(draw(lab + unl, rows, labeled + unlabeled), own)


@pytest.mark.parametrize("number", [2, -2])
def test_noise_is_the_same_compiled_by_xla(number):
    layer = layers.Dropout(0.3, name="drop")

    def draw(second):
        with layers.noise_seed(tf.stack([-1, second])):
            return layer(tf.ones([6, 8]), training=True)

    seed = tf.random.experimental.stateless_fold_in([-1, number], zlib.crc32(b"drop") & 0x7FFFFFFF)
    expected = tf.nn.experimental.stateless_dropout(tf.ones([6, 8]), 0.3, seed=seed)
    second = tf.constant(number)
    np.testing.assert_array_equal(draw(second), expected)
    np.testing.assert_array_equal(tf.function(draw, jit_compile=True)(second), expected)


# --------------------------------------------------------------------------------------------------
# Batch norm over groups of replicas


@pytest.mark.parametrize(
    "setting, replicas, group",
    [(-1, 1, 1), (-1, 8, 1), (-1, 16, 8), (-1, 128, 16), (-1, 64, 8), (1, 4, 1), (2, 4, 2)]
    + [(-2, 4, 4), (-2, 1, 1), (4, 1, 1), (-1, 512, 64)],
)
def test_size_of_groups(setting, replicas, group):
    assert layers.replicas_per_group(setting, replicas) == group


@pytest.mark.parametrize("setting, replicas", [(3, 4), (0, 4), (8, 4)])
def test_groups_that_do_not_divide(setting, replicas):
    with pytest.raises(ValueError, match=f"{setting} does not divide {replicas} replicas"):
        layers.replicas_per_group(setting, replicas)


@pytest.mark.slow
@pytest.mark.parametrize("setting, group", [(1, 1), (2, 2), (-2, 4)])
def test_group_equals_one_device_with_its_rows(rng, setting, group):
    """Compares outputs, statistics and gradients of 4 replicas with one layer on whole groups."""
    pixels = (3 * rng.standard_normal([8, 5, 5, 3]) + 1).astype(np.float32)
    weight = rng.standard_normal(pixels.shape).astype(np.float32)
    strategy = mirrored(4)
    with strategy.scope():
        layer = layers.BatchNorm(num_shards_per_group=setting)
        layer.build([None, 5, 5, 3])

    def step(x, w):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(tf.sin(y) * w)
        dx, dgamma, dbeta = tape.gradient(loss, [x, *layer.trainable_variables])
        return {"y": y, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}

    def share(array):
        return strategy.experimental_distribute_values_from_function(
            lambda c: tf.constant(np.split(array, 4)[c.replica_id_in_sync_group])
        )

    found = tf.function(lambda *args: strategy.run(step, args=args))(share(pixels), share(weight))
    found = {k: np.stack(strategy.experimental_local_results(v)) for k, v in found.items()}
    means, variances, sums = [], [], {"dgamma": 0.0, "dbeta": 0.0}
    for number in range(4 // group):
        rows = slice(number * 2 * group, (number + 1) * 2 * group)
        members = slice(number * group, (number + 1) * group)
        alone = layers.BatchNorm()
        x, w = tf.constant(pixels[rows]), tf.constant(weight[rows])
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = alone(x, training=True)
            loss = tf.reduce_sum(tf.sin(y) * w)
        dx, dgamma, dbeta = tape.gradient(loss, [x, *alone.trainable_variables])
        flat = [found[key][members].reshape(x.shape) for key in ("y", "dx")]
        np.testing.assert_allclose(flat[0], y, atol=2e-5)
        np.testing.assert_allclose(flat[1], dx, atol=2e-5)
        sums["dgamma"], sums["dbeta"] = sums["dgamma"] + dgamma, sums["dbeta"] + dbeta
        means.append(alone.moving_mean.numpy())
        variances.append(alone.moving_variance.numpy())
    for key, total in sums.items():
        np.testing.assert_allclose(found[key].sum(0), total, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(layer.moving_mean.numpy(), np.mean(means, 0), atol=1e-6)
    np.testing.assert_allclose(layer.moving_variance.numpy(), np.mean(variances, 0), rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# One update


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_update_is_the_same_on_any_number_of_replicas(replicas):
    """Covers all noise, a teacher, every kind of loss, dropped labels and weight decay."""
    batch = make_batch(8, 16)
    kwargs = {
        "temperature": 0.7,
        "unlabel_ratio": 2.0,
        "seed": 3,
        "survival_prob": 0.5,
        "dropout_rate": 0.4,
        "num_shards_per_group": -2,
        "label_data_sample_prob": 0.5,
    }
    alone = make_trainer(teacher=tiny(9), **kwargs)
    strategy = mirrored(replicas)
    with strategy.scope():
        shared = make_trainer(teacher=tiny(9), **kwargs)

    def share(context):
        return {
            key: tf.split(value, replicas)[context.replica_id_in_sync_group]
            for key, value in batch.items()
        }

    shares = strategy.experimental_distribute_values_from_function(share)
    # Runs eagerly: three steps take less time than tracing one.
    for _ in range(3):
        for metric in (*alone.metrics, *shared.metrics):
            metric.reset_state()
        alone.train_step(batch)
        strategy.run(shared.train_step, args=(shares,))
        expected = {metric.name: float(metric.result()) for metric in alone.metrics}
        found = {metric.name: float(metric.result()) for metric in shared.metrics}
        assert found == pytest.approx(expected, rel=2e-4)
    for mine, theirs in ((shared.student, alone.student), (shared.ema_student, alone.ema_student)):
        expected = values(theirs)
        for name, value in values(mine).items():
            np.testing.assert_allclose(value, expected[name], rtol=2e-3, atol=2e-4, err_msg=name)
    for variable in shared.student.weights:
        first, *others = strategy.experimental_local_results(variable)
        assert all((first == other).numpy().all() for other in others), variable.name


def test_sampled_labels_shrink_the_labeled_loss():
    """The mean is still over all labeled images; the sampled ones change with every step."""
    batch = make_batch(64)
    trainers = [
        make_trainer(learning_rate=0.0, label_data_sample_prob=p, survival_prob=1.0, dropout_rate=0)
        for p in (1.0, 0.25)
    ]
    whole, part = (float(t.train_step(batch)["lab/loss"]) for t in trainers)
    assert 0.1 < part / whole < 0.45
    trainers[1].metrics[2].reset_state()
    assert float(trainers[1].train_step(batch)["lab/loss"]) != part


# --------------------------------------------------------------------------------------------------
# Input


def gathered(hosts: list[list[dict[str, np.ndarray]]], local: int) -> list[dict[str, np.ndarray]]:
    """Assembles whole batches from what each host passes to its `local` replicas."""
    return [
        {
            key: np.concatenate([host[first + i][key] for host in hosts for i in range(local)])
            for key in hosts[0][0]
        }
        for first in range(0, len(hosts[0]), local)
    ]


@pytest.fixture(scope="module")
def training_batches(folder) -> Callable[[pipeline.Share], tf.data.Dataset]:
    resolved = ResolvedConfig.from_config(noised(folder, "unused", unlabel_ratio=2.0))
    labeled = pipeline.Source.find(str(folder / "labeled"), "train")
    unlabeled = pipeline.Source.find(str(folder / "pseudo"), "train")
    return lambda share: resolved.training_batches(labeled, unlabeled, 3, share)


@pytest.fixture(scope="module")
def undivided(training_batches) -> list[dict[str, np.ndarray]]:
    """The first five batches on one device."""
    return list(training_batches(pipeline.WHOLE).take(5).as_numpy_iterator())


@pytest.mark.parametrize("replicas, num_hosts", [(2, 1), (4, 2)])
def test_hosts_prepare_their_rows_of_the_same_batches(
    training_batches, undivided, replicas, num_hosts
):
    data = [training_batches(pipeline.Share(h, num_hosts, replicas)) for h in range(num_hosts)]
    shapes = {key: spec.shape for key, spec in data[0].element_spec.items()}
    assert shapes["image"] == [4 // replicas, 8, 8, 3] and shapes["unl_probs"] == [8 // replicas, 3]
    local = replicas // num_hosts
    hosts = [list(one.take(5 * local).as_numpy_iterator()) for one in data]
    for one, other in zip(undivided, gathered(hosts, local), strict=True):
        for key, value in one.items():
            np.testing.assert_array_equal(other[key], value, err_msg=key)


@pytest.fixture(scope="module")
def validation(folder) -> tuple[pipeline.Source, np.ndarray]:
    """The evaluation set, and its images in one batch."""
    source = pipeline.Source.find(str(folder / "labeled"), "validation", max_bad_fraction=0)
    resolved = ResolvedConfig.from_config(noised(folder, "unused", eval_batch_size=source.total))
    (whole,) = resolved.eval_batches(source, pipeline.WHOLE).as_numpy_iterator()
    return source, whole["image"]


@pytest.mark.parametrize("replicas, num_hosts, batch", [(4, 2, 4), (4, 4, 3), (2, 2, 64)])
def test_hosts_measure_every_example_once(folder, validation, replicas, num_hosts, batch):
    resolved = ResolvedConfig.from_config(noised(folder, "unused", eval_batch_size=batch))
    source, images = validation
    shares = [pipeline.Share(h, num_hosts, replicas) for h in range(num_hosts)]
    hosts = [list(resolved.eval_batches(source, share).as_numpy_iterator()) for share in shares]
    steps, local = -(-source.total // (-(-batch // replicas) * replicas)), replicas // num_hosts
    assert {len(host) for host in hosts} == {steps * local}
    # Each host reads a part of the set, in order.
    found = [batch for host in hosts for batch in host]
    mask = np.concatenate([b["mask"] for b in found])
    np.testing.assert_array_equal(np.concatenate([b["image"] for b in found])[mask == 1], images)


@pytest.mark.parametrize("fails", [False, True])
def test_the_chief_counts_before_the_others(monkeypatch, fails):
    events: list[str] = []

    def make() -> str:
        events.append("make")
        if fails:
            raise DataError("no records")
        return "made"

    monkeypatch.setattr(distribution, "agreement", lambda _: lambda _: events.append("meet"))
    for chief, expected in ((True, ["make", "meet"]), (False, ["meet", "make"])):
        monkeypatch.setattr(distribution, "is_chief", lambda _, chief=chief: chief)
        events.clear()
        with pytest.raises(DataError) if fails else contextlib.nullcontext():
            assert distribution.chief_first(tf.distribute.get_strategy(), make) == "made"
        assert events == expected


# --------------------------------------------------------------------------------------------------
# Settings that cannot work


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train_batch_size": 6}, "--train_batch_size=6 is not divisible by 4 replicas"),
        ({"unlabel_ratio": 1.5, "train_batch_size": 4}, "--unlabel_ratio=1.5 .a batch of 6."),
        ({"num_shards_per_group": 3}, "--num_shards_per_group=3 does not divide 4 replicas"),
        ({"jit_compile": True}, "--jit_compile"),
    ],
)
def test_what_does_not_divide(folder, changes, message):
    settings = {"unlabel_ratio": 2.0, "train_batch_size": 4, "num_replicas": 4, **changes}
    config = noised(folder, "refused", **settings)
    with pytest.raises(ConfigError, match=message):
        train.train_and_evaluate(config)
    assert not (folder / "refused").exists()


def test_devices_that_are_not_there():
    with pytest.raises(ConfigError, match="--num_replicas=64"):
        distribution.get_strategy(HardwareConfig(num_replicas=64))


@pytest.mark.parametrize("probability", [0.0, 1.5])
def test_probability_of_labels_out_of_range(folder, probability):
    config = noised(folder, "refused", label_data_sample_prob=probability)
    with pytest.raises(ConfigError, match=f"--label_data_sample_prob={probability}"):
        train.train_and_evaluate(config)


def test_tpu_that_is_not_there_is_named(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("<urlopen error [Errno -2]>")

    monkeypatch.setattr(tf.distribute.cluster_resolver, "TPUClusterResolver", unreachable)
    with pytest.raises(ConfigError, match="--tpu=mine .*urlopen.*--tpu_zone=None and --gcp_proj"):
        distribution.get_strategy(HardwareConfig(tpu="mine"))


def test_sampled_labels_make_the_unlabeled_batch_smaller():
    config = Config().override(
        train_batch_size=512, unlabel_ratio=14.0, label_data_sample_prob=0.25
    )
    assert ResolvedConfig.from_config(config).unlabeled_batch_size == 1792


@pytest.mark.parametrize(
    "precision, policy",
    [("auto", "float32"), ("float32", "float32"), ("mixed_bfloat16", "mixed_bfloat16")],
)
def test_precision_off_tpu(precision, policy):
    distribution.set_precision(HardwareConfig(precision=precision), tf.distribute.get_strategy())
    assert tf.keras.mixed_precision.global_policy().name == policy


# --------------------------------------------------------------------------------------------------
# The command line


class Launcher:
    """Starts training programs, and kills those still running at the end."""

    def __init__(self, folder: Path):
        self.folder, self.running = folder, []

    def start(self, model_dir: str, *flags: str, workers: int = 1) -> list[subprocess.Popen]:
        data = {
            "task_name": self.folder / "task.json",
            "label_data_dir": self.folder / "labeled",
            "unlabel_data_dir": self.folder / "pseudo",
            "model_dir": self.folder / model_dir,
        }
        paths = [f"--{name}={path}" for name, path in data.items()]
        common = [f"--{name}={value}" for name, value in COMMON.items()]
        command = [sys.executable, "-m", "efficientnet_ns.main", *common, *paths, *flags]
        addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
        started = []
        for index in range(workers):
            environment = worker_environment(addresses, index)
            with open(self.folder / f"{model_dir}.{index}.log", "a") as log:
                started.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
                    )
                )
        self.running += started
        return started

    def finish(self, processes: list[subprocess.Popen], model_dir: str) -> list[dict[str, float]]:
        for index, process in enumerate(processes):
            code = process.wait(timeout=300)
            assert code == 0, (self.folder / f"{model_dir}.{index}.log").read_text()[-3000:]
        return metrics_log.read_metrics(str(self.folder / model_dir))

    def kill(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.kill()
                process.wait()


COMMON = {
    "model_name": "efficientnet-test",
    "train_batch_size": 4,
    "unlabel_ratio": 2.0,
    "teacher_softmax_temp": 1.0,
    "augment_name": "none",
    "base_learning_rate": 0.5,
    "warmup_epochs": 0.0,
    "eval_batch_size": 4,
    "iterations_per_loop": 1,
    "save_checkpoints_steps": 2,
    "train_steps": 4,
    "steps_per_eval": 2,
    "num_shards_per_group": -2,
    "stochastic_depth_rate": 0.5,
    "preview_images": 0,
}


@pytest.mark.parametrize(
    "text, problem",
    [
        ("{'cluster': 1}", "it is not JSON"),
        ("[]", "it is not a JSON object"),
        ('{"cluster": ["a:1"]}', "the cluster is not a JSON object"),
        ('{"cluster": {"worker": "a:1"}}', "worker must be a list of host:port, but is 'a:1'"),
        ('{"cluster": {"worker": ["a"]}}', "worker must be a list of host:port"),
        ('{"cluster": {"worker": ["a:1"]}}', "the task, which identifies this worker, is missing"),
        (
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": "chief", "index": 0}}',
            "the task's type is 'chief', but the cluster has worker",
        ),
        (
            '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
            "the task's index is 1, but the cluster has 1 of 'worker'",
        ),
    ],
)
def test_wrong_descriptions_of_a_cluster(monkeypatch, text, problem):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ConfigError, match=f"TF_CONFIG is invalid: {problem}.*Unset it"):
        distribution.get_strategy(HardwareConfig())


def test_machine_of_a_cluster_that_works_alone(monkeypatch):
    """Without `local_only`, TensorFlow would wait for the other machine."""
    workers = {"cluster": {"worker": ["absent:1", "b:1"]}, "task": {"type": "worker", "index": 1}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(workers))
    strategy = distribution.get_strategy(HardwareConfig(), local_only=True)
    assert not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    assert strategy.num_replicas_in_sync == 1


@pytest.mark.parametrize("text", ["", "{}", '{"cluster": {}}', '{"task": {"index": 0}}'])
def test_descriptions_of_no_cluster(monkeypatch, text):
    monkeypatch.setenv("TF_CONFIG", text)
    assert distribution.get_strategy(HardwareConfig()).num_replicas_in_sync == 1


@pytest.fixture
def launcher(folder) -> Iterator[Launcher]:
    made = Launcher(folder)
    yield made
    made.kill()


def curve(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k not in PACE} for row in rows]


def assert_same_curve(found, expected, rel=1e-3) -> None:
    assert [set(row) for row in found] == [set(row) for row in expected]
    for mine, theirs in zip(curve(found), curve(expected)):
        assert mine == pytest.approx(theirs, rel=rel, abs=1e-4)


@pytest.fixture(scope="module")
def train_here(folder) -> Callable[..., list[dict[str, float]]]:
    """Trains in this process with the settings of `COMMON`; returns the rows of metrics."""

    def run(model_dir: str, **values) -> list[dict[str, float]]:
        train.train_and_evaluate(settings(folder, model_dir, **data, **COMMON, **values))
        return metrics_log.read_metrics(str(folder / model_dir))

    data = {"unlabel_data_dir": str(folder / "pseudo")}
    return run


@pytest.fixture(scope="module")
def alone(train_here) -> list[dict[str, float]]:
    """Metrics of one device."""
    rows = train_here("alone")
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4]
    assert {row["eval/examples"] for row in rows if "eval/examples" in row} == {7}
    return rows


def assert_same_result(folder: Path, name: str) -> None:
    weights, own = tensors(str(folder / "alone"), 4), tensors(str(folder / name), 4)
    assert set(own) == set(weights)
    for key, value in weights.items():
        np.testing.assert_allclose(own[key], value, rtol=1e-3, atol=1e-4, err_msg=key)


@pytest.mark.slow
def test_two_replicas_train_as_one_device(train_here, alone, folder):
    assert_same_curve(train_here("replicas", num_replicas=2), alone)
    assert_same_result(folder, "replicas")


def test_two_workers_train_as_one_device(launcher, alone, folder):
    """Each worker of `MultiWorkerMirroredStrategy` is a separate process."""
    assert_same_curve(launcher.finish(launcher.start("workers", workers=2), "workers"), alone)
    assert_same_result(folder, "workers")
    # Only one worker writes: the files are those of a single process, with one event file.
    assert len(list((folder / "workers").glob("events*"))) == 1
    files = [
        {p.name for p in (folder / where).iterdir() if "events" not in p.name}
        for where in ("alone", "workers")
    ]
    assert files[0] == files[1]


STEPS = 16


@pytest.fixture(scope="module")
def uninterrupted(folder) -> list[dict[str, float]]:
    """Metrics of two workers that are not interrupted."""
    launcher = Launcher(folder)
    try:
        started = launcher.start("straight", f"--train_steps={STEPS}", workers=2)
        return launcher.finish(started, "straight")
    finally:
        launcher.kill()


def wait_for(condition, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_worker_stops_the_others_and_all_continue(launcher, folder, uninterrupted):
    steps, broken = f"--train_steps={STEPS}", folder / "broken"
    first = launcher.start("broken", steps, workers=2)
    wait_for(lambda: list(broken.glob("model.ckpt-*.index")), first)
    first[1].kill()
    assert first[0].wait(timeout=180) not in (0, preemption.EXIT_CODE)
    assert "another worker stopped" in (folder / "broken.0.log").read_text()
    saved = [int(p.stem.split("-")[1]) for p in broken.glob("*.index")]
    assert saved and max(saved) < STEPS
    found = launcher.finish(launcher.start("broken", steps, workers=2), "broken")
    assert f"steps {max(saved)} to {STEPS}" in (folder / "broken.0.log").read_text()
    assert_same_curve(found, uninterrupted, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_one_worker_asked_to_stop_stops_all_at_one_step(launcher, folder, uninterrupted, asked):
    """Either the chief, which saves, or the other worker, which only takes part, may be asked."""
    name = f"asked_{asked}"
    flags = (f"--train_steps={STEPS}", "--save_checkpoints_steps=1000")
    workers = launcher.start(name, *flags, workers=2)
    wait_for(lambda: len(metrics_log.read_metrics(str(folder / name))) >= 3, workers)
    workers[asked].send_signal(signal.SIGTERM)
    assert [worker.wait(timeout=180) for worker in workers] == [preemption.EXIT_CODE] * 2
    (saved,) = (folder / name).glob("model.ckpt-*.index")
    step = int(saved.stem.split("-")[1])
    assert 3 <= step < STEPS
    for index in range(2):
        log = (folder / f"{name}.{index}.log").read_text()
        assert f"stopped at step {step}; the checkpoint is saved" in log
    found = launcher.finish(launcher.start(name, *flags, workers=2), name)
    assert f"steps {step} to {STEPS}" in (folder / f"{name}.0.log").read_text()
    assert_same_curve(found, uninterrupted, rel=1e-2)


@pytest.mark.slow
def test_digits_on_four_replicas_and_two_workers(launcher, tmp_path, folder):
    """Trains the demo's student network for 100 steps on the handwritten digits."""
    from efficientnet_ns.loop import digits

    digits.make_records(str(tmp_path / "data"), seed=0, labels_per_class=10)
    settings = (
        "--task_name=digits",
        f"--label_data_dir={tmp_path}/data/labeled",
        "--model_name=efficientnet-b0",
        "--width_coefficient=0.35",
        "--depth_coefficient=0.25",
        "--unlabel_data_dir=",
        "--unlabel_ratio=0",
        "--train_batch_size=32",
        "--train_steps=100",
        # At ten times this rate, any difference grows by a third with every step.
        "--base_learning_rate=0.004",
        "--iterations_per_loop=1",
        "--save_checkpoints_steps=100",
        "--steps_per_eval=100",
        "--eval_batch_size=100",
        "--randaug_mag=5",
        "--num_shards_per_group=-2",
    )
    rows = {}
    for name, extra, workers in (
        ("one", (), 1),
        ("replicas", ("--num_replicas=4",), 1),
        ("workers", (), 2),
    ):
        model_dir = f"digits_{name}"
        started = launcher.start(model_dir, *settings, *extra, workers=workers)
        rows[name] = launcher.finish(started, model_dir)
    losses = {k: [r["train/loss"] for r in v if "train/loss" in r] for k, v in rows.items()}
    assert len(losses["one"]) == 100 and np.mean(losses["one"][-10:]) < np.mean(losses["one"][:10])
    for name in ("replicas", "workers"):
        # Rounding errors still grow, about tenfold in twenty steps.
        np.testing.assert_allclose(losses[name][:50], losses["one"][:50], rtol=1e-3)
        np.testing.assert_allclose(losses[name], losses["one"], rtol=0.05)
        assert rows[name][-1]["eval/examples"] == rows["one"][-1]["eval/examples"]
