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
    """Another worker of the cluster was lost, so this one cannot continue."""


def get_strategy(hardware: HardwareConfig, *, local_only: bool = False) -> tf.distribute.Strategy:
    """Returns the strategy for the given hardware. Call it before TensorFlow computes anything.

    Uses a TPU if one is named, several workers if TF_CONFIG describes a cluster, several local
    devices if `num_replicas` requires them or there are several GPUs, and otherwise one local device.

    Args:
      local_only: use only this machine's devices, even if TF_CONFIG describes a cluster.

    Raises:
      ConfigError: If there are fewer devices than num_replicas, or TF_CONFIG is invalid.
    """
    if hardware.use_tpu and hardware.tpu:
        return _tpu_strategy(hardware)
    if not local_only and _in_cluster(os.environ.get("TF_CONFIG") or "{}"):
        if hardware.num_replicas > 1 and not tf.config.list_physical_devices("GPU"):
            raise ConfigError(
                f"--num_replicas={hardware.num_replicas}: with TF_CONFIG, a worker without GPUs is "
                "one replica. Start more workers, or unset TF_CONFIG."
            )
        # No timeout for collectives: TensorFlow would keep a sleeping thread for each until it
        # expires. Connections and heartbeats reveal lost workers.
        return tf.distribute.MultiWorkerMirroredStrategy()
    devices = _local_devices(hardware.num_replicas)
    return tf.distribute.MirroredStrategy(devices) if devices else tf.distribute.get_strategy()


def _in_cluster(tf_config: str) -> bool:
    """Returns whether TF_CONFIG describes a cluster; raises ConfigError if it is invalid."""
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
            f"the environment variable TF_CONFIG is invalid: {problem}. Expected: "
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
            return f"{job} must be a list of host:port, but is {addresses!r}"
    if not isinstance(task, dict):
        return "the task, which identifies this worker, is missing"
    kind, index = str(task.get("type")), str(task.get("index"))
    if kind not in cluster:
        return f"the task's type is {kind!r}, but the cluster has {', '.join(cluster)}"
    if not index.isdecimal() or int(index) >= len(cluster[kind]):
        return f"the task's index is {index}, but the cluster has {len(cluster[kind])} of {kind!r}"
    return None


def _tpu_strategy(hardware: HardwareConfig) -> tf.distribute.Strategy:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(
            hardware.tpu, zone=hardware.tpu_zone, project=hardware.gcp_project
        )
    except Exception as e:  # Errors of the network, the TPU service or the credentials.
        raise ConfigError(
            f"--tpu={hardware.tpu} cannot be found ({e}): check --tpu, --tpu_zone={hardware.tpu_zone} "
            f"and --gcp_project={hardware.gcp_project}"
        ) from e
    # `local` is the TPU of this machine, which needs no connection.
    if hardware.tpu != "local":
        tf.config.experimental_connect_to_cluster(resolver)
    # Required before the strategy is created.
    tf.tpu.experimental.initialize_tpu_system(resolver)
    return tf.distribute.TPUStrategy(resolver)


def _local_devices(num_replicas: int) -> list[str]:
    """Returns the device names for a MirroredStrategy; [] if one device suffices."""
    kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    if kind == "CPU" and num_replicas > 1:
        _split_cpu(num_replicas)
    available = len(tf.config.list_logical_devices(kind))
    if num_replicas > available:
        raise ConfigError(f"--num_replicas={num_replicas}, but there are {available} {kind}s")
    # By default all GPUs, but only one CPU, because its parts would share the cores.
    count = num_replicas or (available if kind == "GPU" else 1)
    return [f"{kind}:{i}" for i in range(count)] if count > 1 else []


def _split_cpu(count: int) -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    # Already divided, e.g. by an earlier training run in this process.
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
    """Sets mixed_bfloat16 or float32, as `precision` and, on a TPU, `use_bfloat16` require."""
    policy = hardware.precision
    if policy == "auto":
        on_tpu = isinstance(strategy, tf.distribute.TPUStrategy)
        policy = "mixed_bfloat16" if on_tpu and hardware.use_bfloat16 else "float32"
    # Layers use the policy that is global when they are created.
    tf.keras.mixed_precision.set_global_policy(policy)


def check(resolved: ResolvedConfig, strategy: tf.distribute.Strategy) -> None:
    """Raises ConfigError unless batches and batch-norm groups divide evenly among the replicas."""
    replicas, train = strategy.num_replicas_in_sync, resolved.config.train
    batches = {f"--train_batch_size={train.train_batch_size}": train.train_batch_size}
    if train.unlabel_ratio:
        size = resolved.unlabeled_batch_size
        batches[f"--unlabel_ratio={train.unlabel_ratio} (a batch of {size})"] = size
    for name, size in batches.items():
        if size % replicas:
            raise ConfigError(
                f"{name} is not divisible by {replicas} replicas, which need equal shares: "
                f"choose a multiple of {replicas}"
            )
    try:
        # Its message begins with the name of the setting, hence the dashes below.
        layers.replicas_per_group(train.num_shards_per_group, replicas)
    except ValueError as e:
        raise ConfigError(f"--{e}") from e
    on_cpu = replicas > 1 and not tf.config.list_physical_devices("GPU")
    if compiles(resolved.config.hardware, strategy) and on_cpu:
        raise ConfigError("--jit_compile: XLA cannot compile several CPU replicas together")


def compiles(hardware: HardwareConfig, strategy: tf.distribute.Strategy) -> bool:
    """Returns whether Keras must compile the step with XLA; on a TPU it is always compiled."""
    return hardware.jit_compile and not isinstance(strategy, tf.distribute.TPUStrategy)


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether this process writes checkpoints, logs and results."""
    return strategy.extended.should_checkpoint


def distribute(
    strategy: tf.distribute.Strategy, make: Callable[[pipeline.Share], tf.data.Dataset]
) -> tf.distribute.DistributedDataset:
    """Returns the dataset of all hosts; each makes its share of every batch with `make(share)`."""
    return strategy.distribute_datasets_from_function(lambda context: make(share(context)))


def share(context: tf.distribute.InputContext) -> pipeline.Share:
    """Returns the share of each batch that a host prepares."""
    return pipeline.Share(
        context.input_pipeline_id, context.num_input_pipelines, context.num_replicas_in_sync
    )


def eval_share(
    resolved: ResolvedConfig,
    source: pipeline.Source,
    context: tf.distribute.InputContext,
    preprocessing: pipeline.Preprocessing | None = None,
) -> tf.data.Dataset:
    """Returns a host's share of `ResolvedConfig.eval_batches` of `source`."""
    return resolved.eval_batches(source, share(context), preprocessing)


def check_agreement(strategy: tf.distribute.Strategy, step: int) -> None:
    """Raises ConfigError if the workers would continue from different steps."""
    # With any other strategy, one process drives all replicas.
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
    """Returns a function that all workers call together; it is True for all if for any of them.

    Returns None if there is only one worker.
    """
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return None

    @tf.function
    def wishes(own: tf.Tensor) -> tf.Tensor:
        return strategy.reduce("SUM", strategy.run(tf.identity, args=(own,)), axis=None)

    # The sum may exceed 1, because every replica of a worker adds its wish.
    return lambda wish: int(wishes(tf.constant(int(wish)))) > 0


def chief_first(strategy: tf.distribute.Strategy, make: Callable[[], T]) -> T:
    """Calls `make()` on the chief, then on the other workers, which can read what it wrote."""
    meet = agreement(strategy)
    if meet is None:
        return make()
    if not is_chief(strategy):
        meet(False)
        return make()
    try:
        return make()
    finally:
        # Even after an error, because the others would wait forever.
        meet(False)


_LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
)


@contextlib.contextmanager
def noticing_lost_workers(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Turns TensorFlow's error about a lost worker into `WorkerLost`."""
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
