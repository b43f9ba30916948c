"""Where the computation runs: one device, local replicas, several machines, or a TPU.

Several workers run the same program on one `model_dir`. All of them read it; only the chief writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import tensorflow as tf

from efficientnet_ns.config.fields import ConfigError
from efficientnet_ns.config.sections import HardwareConfig
from efficientnet_ns.data import pipeline
from efficientnet_ns.devices import stack
from efficientnet_ns.models import layers
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

T = TypeVar("T")


class WorkerLost(RuntimeError):
    """Another worker of the cluster went away, so this one cannot continue."""


def get_strategy(hardware: HardwareConfig, *, local_only: bool = False) -> tf.distribute.Strategy:
    """The distribution strategy for the given hardware. Call it before TensorFlow computes anything.

    A TPU when one is named; several workers when TF_CONFIG describes a cluster; several local
    devices when `num_replicas` requires it or there are several GPUs; else the one local device.

    Args:
      local_only: use only this machine's devices, even if TF_CONFIG describes a cluster.

    Raises:
      ConfigError: fewer devices than num_replicas, or TF_CONFIG does not describe a cluster.
    """
    if hardware.use_tpu and hardware.tpu:
        return _tpu_strategy(hardware)
    if not local_only and _in_cluster(os.environ.get("TF_CONFIG") or "{}"):
        if hardware.num_replicas > 1 and not tf.config.list_physical_devices("GPU"):
            raise ConfigError(
                f"--num_replicas={hardware.num_replicas}: with TF_CONFIG, a worker without GPUs is "
                "one replica. Start more workers, or unset TF_CONFIG."
            )
        # Without a timeout for its collectives: for each, TensorFlow would keep a thread asleep until
        # then. Lost workers are noticed by their connections and heartbeats.
        return tf.distribute.MultiWorkerMirroredStrategy()
    devices = _local_devices(hardware.num_replicas)
    return tf.distribute.MirroredStrategy(devices) if devices else tf.distribute.get_strategy()


def _in_cluster(tf_config: str) -> bool:
    """Whether TF_CONFIG describes a cluster; ConfigError when the description cannot be used."""
    try:
        described = json.loads(tf_config)
        problem = None if isinstance(described, dict) else "it is not a JSON object"
    except ValueError as e:
        problem = f"it is not JSON: {e}"
    if problem is None:
        cluster = described.get("cluster")
        if not cluster:
            return False
        problem = _cluster_problem(cluster, described.get("task"))
    if problem is not None:
        raise ConfigError(
            f"the environment variable TF_CONFIG is wrong: {problem}. Expected: "
            '{"cluster": {"worker": ["host:port", …]}, "task": {"type": "worker", "index": 0}}. '
            "Unset it to use one machine."
        )
    return True


def _cluster_problem(cluster: Any, task: Any) -> str | None:
    if not isinstance(cluster, dict):
        return f"the cluster is not a JSON object: {cluster!r}"
    for job, addresses in cluster.items():
        is_list = isinstance(addresses, list)
        if not is_list or not all(re.fullmatch(r".+:\d+", str(a)) for a in addresses):
            return f"{job} should be a list of host:port, but is {addresses!r}"
    if not isinstance(task, dict):
        return "there is no task, which identifies this worker"
    kind, index = str(task.get("type")), str(task.get("index"))
    if kind not in cluster:
        return f"the task's type is {kind!r}, but the cluster has {', '.join(cluster)}"
    if not index.isdigit() or int(index) >= len(cluster[kind]):
        return f"the task's index is {index}, but the cluster has {len(cluster[kind])} of {kind!r}"
    return None


def _tpu_strategy(hardware: HardwareConfig) -> tf.distribute.Strategy:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(
            hardware.tpu, zone=hardware.tpu_zone, project=hardware.gcp_project
        )
    except Exception as e:  # Of the network, of the TPU's service, or of credentials.
        raise ConfigError(
            f"--tpu={hardware.tpu} cannot be found ({e}): check --tpu, --tpu_zone={hardware.tpu_zone} "
            f"and --gcp_project={hardware.gcp_project}"
        ) from e
    # `local` is the TPU of this very machine, to which there is nothing to connect.
    if hardware.tpu != "local":
        tf.config.experimental_connect_to_cluster(resolver)
    # Must come before the strategy.
    tf.tpu.experimental.initialize_tpu_system(resolver)
    return tf.distribute.TPUStrategy(resolver)


def _local_devices(num_replicas: int) -> list[str]:
    """Names of the devices of a MirroredStrategy; none when one device does everything."""
    kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    if kind == "CPU" and num_replicas > 1:
        _split_cpu(num_replicas)
    available = len(tf.config.list_logical_devices(kind))
    if num_replicas > available:
        raise ConfigError(f"--num_replicas={num_replicas}, but there are {available} {kind}s")
    # All GPUs unless told otherwise; but one CPU, whose parts would share its cores.
    count = num_replicas or (available if kind == "GPU" else 1)
    return [f"{kind}:{i}" for i in range(count)] if count > 1 else []


def _split_cpu(count: int) -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    # Divided already, as by an earlier training in this process.
    if len(tf.config.get_logical_device_configuration(cpu) or []) >= count:
        return
    try:
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * count
        )
    except RuntimeError as e:
        raise ConfigError(
            f"--num_replicas={count}: TensorFlow already runs in this process, so its CPU "
            "can no longer be divided. Request the replicas before the first computation."
        ) from e


def start_xla() -> None:
    """Compiles a tiny function: TensorFlow 2.15 logs its first use of XLA at every log level."""
    with stack.without_native_log(), tf.device("CPU:0"):
        tf.function(lambda: tf.constant(0.0) + 1.0, jit_compile=True)()


def set_precision(hardware: HardwareConfig, strategy: tf.distribute.Strategy) -> None:
    """mixed_bfloat16 or float32, as `precision` and, on a TPU, `use_bfloat16` require."""
    policy = hardware.precision
    if policy == "auto":
        on_tpu = isinstance(strategy, tf.distribute.TPUStrategy)
        policy = "mixed_bfloat16" if on_tpu and hardware.use_bfloat16 else "float32"
    # Layers take the policy that is global when they are made.
    tf.keras.mixed_precision.set_global_policy(policy)


def check(resolved: ResolvedConfig, strategy: tf.distribute.Strategy) -> None:
    """Raises ConfigError unless the batches and the batch-norm groups divide the replicas evenly."""
    replicas, train = strategy.num_replicas_in_sync, resolved.config.train
    batches = {f"--train_batch_size={train.train_batch_size}": train.train_batch_size}
    if train.unlabel_ratio:
        size = resolved.unlabeled_batch_size
        batches[f"--unlabel_ratio={train.unlabel_ratio} (a batch of {size})"] = size
    for name, size in batches.items():
        if size % replicas:
            raise ConfigError(
                f"{name} does not divide by {replicas} replicas, so that they cannot have equal "
                f"shares: choose a multiple of {replicas}"
            )
    try:
        # Its message begins with the name of the setting, hence the dashes below.
        layers.replicas_per_group(train.num_shards_per_group, replicas)
    except ValueError as e:
        raise ConfigError(f"--{e}") from e
    on_cpu = replicas > 1 and not tf.config.list_physical_devices("GPU")
    if compiles(resolved.config.hardware, strategy) and on_cpu:
        raise ConfigError("--jit_compile: several CPU replicas cannot be compiled together by XLA")


def compiles(hardware: HardwareConfig, strategy: tf.distribute.Strategy) -> bool:
    """Whether Keras must compile the step with XLA; on a TPU it is always compiled."""
    return hardware.jit_compile and not isinstance(strategy, tf.distribute.TPUStrategy)


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process writes checkpoints, logs and results."""
    return strategy.extended.should_checkpoint


def distribute(
    strategy: tf.distribute.Strategy, make: Callable[[pipeline.Share], tf.data.Dataset]
) -> tf.distribute.DistributedDataset:
    """The dataset of all hosts; each makes its own share of every batch, by `make(share)`."""
    return strategy.distribute_datasets_from_function(lambda context: make(share(context)))


def share(context: tf.distribute.InputContext) -> pipeline.Share:
    """The share of each batch that a host prepares."""
    return pipeline.Share(
        context.input_pipeline_id, context.num_input_pipelines, context.num_replicas_in_sync
    )


def eval_share(
    resolved: ResolvedConfig,
    source: pipeline.Source,
    context: tf.distribute.InputContext,
    preprocessing: pipeline.Preprocessing | None = None,
) -> tf.data.Dataset:
    """A host's share of the batches that evaluate on `source`; see `ResolvedConfig.eval_batches`."""
    return resolved.eval_batches(source, share(context), preprocessing)


def check_agreement(strategy: tf.distribute.Strategy, step: int) -> None:
    """Raises ConfigError when the workers would continue from different steps."""
    # One process drives all replicas of any other strategy.
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return

    @tf.function
    def gather() -> tf.Tensor:
        own = strategy.run(lambda: tf.constant([step], tf.int64))
        return strategy.gather(own, axis=0)

    steps = sorted({int(s) for s in gather()})
    if len(steps) > 1:
        raise ConfigError(
            f"the workers found checkpoints of different steps {steps}: --model_dir must be one "
            "folder that all workers read"
        )


def agreement(strategy: tf.distribute.Strategy) -> Callable[[bool], bool] | None:
    """A function that all workers call at one point, and that is true for all if for any of them.

    None when there is one worker.
    """
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return None

    @tf.function
    def wishes(own: tf.Tensor) -> tf.Tensor:
        return strategy.reduce("SUM", strategy.run(tf.identity, args=(own,)), axis=None)

    # Not compared with 1: every replica of a worker adds its wish.
    return lambda wish: int(wishes(tf.constant(int(wish)))) > 0


def chief_first(strategy: tf.distribute.Strategy, make: Callable[[], T]) -> T:
    """`make()` of every worker, of the chief before the others, which find what it left."""
    meet = agreement(strategy)
    if meet is None:
        return make()
    if not is_chief(strategy):
        meet(False)
        return make()
    try:
        return make()
    finally:
        # Even after an error: the others would wait without end.
        meet(False)


_LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
)


@contextlib.contextmanager
def noticing_lost_workers(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Turns TensorFlow's error when another worker goes away into `WorkerLost`."""
    try:
        yield
    except _LOST as e:
        # Without other workers, the error means something else.
        if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            raise
        raise WorkerLost(
            f"another worker stopped, or cannot be reached ({str(e).splitlines()[0]}). Start the "
            "same command again on all workers; training continues from the last checkpoint."
        ) from e
