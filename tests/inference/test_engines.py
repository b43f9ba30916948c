"""Every engine returns the same probabilities, for any number of images."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.inference import engines
from efficientnet_ns.models import efficientnet

CLASSES, SIZE = 7, 32


def unsure(model: tf.keras.Model, rng: np.random.Generator) -> tf.keras.Model:
    """Sets random weights and statistics that keep logits far from uniform and one-hot."""
    for variable in model.weights:
        if "head_dense/kernel" in variable.name:
            variable.assign(rng.normal(0, 1, variable.shape))
        elif "variance" in variable.name:
            variable.assign(rng.uniform(0.5, 2, variable.shape))
        elif "gamma" in variable.name:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        elif variable.shape.rank == 1:
            variable.assign(rng.normal(0, 0.3, variable.shape))
    return model


@pytest.fixture(scope="module")
def model() -> tf.keras.Model:
    tf.keras.utils.set_random_seed(0)
    model = efficientnet.build_model("efficientnet-test", CLASSES, SIZE)
    return unsure(model, np.random.default_rng(0))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.uniform(-15, 282, [11, SIZE, SIZE, 3]).astype(np.float32)


@pytest.fixture(scope="module")
def expected(model, pixels) -> np.ndarray:
    return tf.nn.softmax(model(pixels, training=False)).numpy()


@pytest.fixture(scope="module", params=["tf", "xnnpack", "openvino"])
def engine(request, model):
    if request.param == "openvino":
        pytest.importorskip("openvino")
    return engines.make(request.param, model, batch_size=4)


@pytest.mark.parametrize("n", [1, 4, 5, 11])
def test_probabilities(engine, pixels, expected, n):
    answer = engine(pixels[:n])
    assert answer.dtype == np.float32 and answer.shape == (n, CLASSES)
    np.testing.assert_allclose(answer, expected[:n], atol=1e-5)
    assert expected.std(0).max() > 1e-2  # The model tells the images apart.


def test_views_of_an_array(engine, pixels, expected):
    """The rows of one of several views per image are not contiguous in memory."""
    views = np.stack([pixels, pixels[:, :, ::-1]], 1)
    np.testing.assert_allclose(engine(views[:, 0]), expected, atol=1e-5)


def test_many_threads(engine, pixels, expected):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: engine(pixels[i : i + 3]), [i % 8 for i in range(64)]))
    for i, answer in enumerate(answers):
        np.testing.assert_allclose(answer, expected[i % 8 : i % 8 + 3], atol=1e-5)


def test_answers_repeat_bit_by_bit(engine, pixels):
    """Results depend neither on the other rows nor on the thread."""
    first = engine(pixels[:8])
    others = pixels[:8].copy()
    others[4:] = 0
    for _ in range(3):
        np.testing.assert_array_equal(engine(pixels[:8]), first)
        np.testing.assert_array_equal(engine(others)[:4], first[:4])


@pytest.mark.parametrize("n", [1, 3, 4, 11])
def test_all_workers_give_the_results_of_one_call(model, pixels, n):
    """Bitwise, because the rows that share a batch never change a result."""
    engine = engines.XnnpackEngine(model, threads=3)
    np.testing.assert_array_equal(engines.on_all_workers(engine)(pixels[:n]), engine(pixels[:n]))


def test_parts_are_whole_batches_and_few():
    called = []

    def engine(rows):
        called.append(len(rows))
        return rows

    engine.batch_size, engine.concurrency = 3, 2
    rows = np.arange(100)
    np.testing.assert_array_equal(engines.on_all_workers(engine)(rows), rows)
    # At most four parts per worker, each of whole batches except for the last one.
    assert sorted(called) == [10, 15, 15, 15, 15, 15, 15]


@pytest.fixture(params=[1, 2])
def device_engine(request, model) -> engines.TensorFlowEngine:
    """TensorFlow's engine on one or two replicas."""
    if request.param == 1:
        return engines.TensorFlowEngine(model, 4)
    strategy = request.getfixturevalue("two_replicas")
    with strategy.scope():
        copy = efficientnet.build_model("efficientnet-test", CLASSES, SIZE)
    copy.set_weights(model.get_weights())
    return engines.TensorFlowEngine(copy, 4, strategy)


def test_replicas_compute_their_parts_of_a_batch(device_engine, model, pixels):
    """Results are bitwise equal to those of the model on the same number of rows."""
    alone = tf.function(lambda rows: tf.nn.softmax(model(rows, training=False)))
    rows = device_engine._per_replica
    expected = [alone(tf.constant(pixels[i : i + rows])).numpy() for i in range(0, 8, rows)]
    np.testing.assert_array_equal(device_engine(pixels[:8]), np.concatenate(expected))


def test_transfers_and_results_do_not_wait_for_the_device(device_engine, pixels, monkeypatch):
    """The next batch is transferred during a step, and its step starts before results are read."""
    expected = [device_engine(pixels[:4]), device_engine(pixels[4:8])]
    transfer, step, fetch = (getattr(device_engine, f"_{n}") for n in ("transfer", "step", "fetch"))
    transferred, begun = threading.Semaphore(0), []
    second_step = threading.Event()

    def transfer_and_tell(rows):
        values = transfer(rows)
        transferred.release()
        return values

    def slow_step(values):
        begun.append(values)
        if len(begun) == 1:
            assert all(transferred.acquire(timeout=30) for _ in range(2))
        else:
            second_step.set()
        return step(values)

    def slow_fetch(results):
        assert second_step.wait(30)
        return fetch(results)

    monkeypatch.setattr(device_engine, "_transfer", transfer_and_tell)
    monkeypatch.setattr(device_engine, "_step", slow_step)
    monkeypatch.setattr(device_engine, "_fetch", slow_fetch)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(device_engine, [pixels[:4], pixels[4:8]]))
    np.testing.assert_array_equal(found, expected)


def test_one_step_at_a_time(device_engine, pixels, monkeypatch):
    step, inside = device_engine._step, threading.Lock()

    def alone(values):
        assert inside.acquire(blocking=False)
        try:
            return step(values)
        finally:
            inside.release()

    monkeypatch.setattr(device_engine, "_step", alone)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(device_engine, [pixels[:4]] * 16))


def test_auto_is_xnnpack_on_one_cpu(model, two_replicas, monkeypatch):
    monkeypatch.setattr(engines, "has_choice", lambda: False)
    assert engines.make("auto", model, 4).name == "xnnpack"
    assert engines.make("auto", model, 4, two_replicas).name == "tf"


@pytest.mark.parametrize(("rates", "name"), [((10, 12), "openvino"), ((10, 10.5), "xnnpack")])
def test_auto_takes_openvino_where_it_is_clearly_faster(model, monkeypatch, caplog, rates, name):
    pytest.importorskip("openvino")
    measured = iter(rates)
    monkeypatch.setattr(engines, "_rate", lambda *_: next(measured))
    caplog.set_level("INFO")
    assert engines.make("auto", model, 4).name == name
    assert f"xnnpack: 10.0 images/s, openvino: {rates[1]:.1f} images/s; using {name}" in caplog.text


def test_rates_are_of_all_cores(model):
    assert engines._rate(engines.XnnpackEngine(model), model.input_shape[1:]) > 0


def test_an_engine_that_is_not_installed(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)  # Makes its import fail.
    with pytest.raises(
        engines.EngineError,
        match=r"^--inference_engine=openvino: .*pip install 'efficientnet-ns\[open",
    ):
        engines.make("openvino", model, 4)
    # Names the flag that was given.
    with pytest.raises(engines.EngineError, match=r"^--inference_dtype=bfloat16: .*pip install"):
        engines.make("auto", model, 4, dtype="bfloat16")
    # `auto` tolerates a broken installation.
    monkeypatch.setattr(engines, "has_choice", lambda: True)
    assert engines.make("auto", model, 4).name == "xnnpack"


class OpenVino:
    """Replaces the module with one that cannot compile the model.

    Args:
      error: what compiling raises; None to raise when computing.
    """

    def __init__(self, error: Exception | None):
        self._error = error

    def Core(self):  # noqa: N802
        return self

    def get_property(self, *_):
        return ["BF16"]

    def compile_model(self, *_):
        if self._error:
            raise self._error
        return self

    def create_infer_request(self):
        return self

    def infer(self, *_, **__):
        raise RuntimeError("Exception from core.cpp:1:\nno memory")


@pytest.mark.parametrize(
    ("error", "text"),
    [(RuntimeError("from core.cpp:7:\nodd"), "core.cpp:7: odd"), (None, "memory")],
)
def test_auto_does_without_an_engine_that_fails(model, monkeypatch, caplog, error, text):
    monkeypatch.setitem(sys.modules, "openvino", OpenVino(error))
    monkeypatch.setattr(engines, "has_choice", lambda: True)
    assert engines.make("auto", model, 4).name == "xnnpack"
    assert f"{text}; using XNNPACK instead" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_that_fails_is_named(model, monkeypatch, dtype):
    monkeypatch.setitem(sys.modules, "openvino", OpenVino(RuntimeError("from core.cpp:7:\nodd")))
    flag = "inference_engine=openvino" if dtype == "float32" else "inference_dtype=bfloat16"
    with pytest.raises(engines.EngineError, match=f"^--{flag}: from core.cpp:7: odd; use "):
        engines.make("openvino", model, 4, dtype=dtype)
    monkeypatch.setattr(engines, "_MAX_PARAMETERS", 1)
    with pytest.raises(engines.EngineError, match=f"^--{flag}: .* does not fit into a flatbuffer"):
        engines.make("openvino", model, 4, dtype=dtype)


def test_bfloat16_does_not_replace_an_accelerator(model, two_replicas, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", OpenVino(RuntimeError("compiled")))
    message = "--inference_dtype=bfloat16 is for CPUs.*--precision=mixed_bfloat16"
    with pytest.raises(engines.EngineError, match=message):
        engines.make("auto", model, 4, two_replicas, dtype="bfloat16")
    with pytest.raises(engines.EngineError, match="compiled"):
        engines.make("openvino", model, 4, two_replicas, dtype="bfloat16")


@pytest.mark.parametrize("kind", ["tf", "xnnpack"])
def test_only_openvino_has_a_precision_of_its_own(model, kind):
    with pytest.raises(engines.EngineError, match=f"=bfloat16: --inference_engine={kind} computes"):
        engines.make(kind, model, 4, dtype="bfloat16")


def test_bfloat16_in_openvino(model, pixels, expected):
    openvino = pytest.importorskip("openvino")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(engines.EngineError, match="does not support bfloat16"):
            engines.make("auto", model, 4, dtype="bfloat16")
        return
    engine = engines.make("auto", model, 4, dtype="bfloat16")
    assert engine.name == "openvino-bfloat16"
    difference = abs(engine(pixels) - expected).max()
    assert 1e-5 < difference < 0.03  # The significand has eight bits.


def test_model_that_fits_no_flatbuffer(model, monkeypatch, caplog, pixels, expected):
    """A fallback from `auto` is logged; an explicit choice is never replaced."""
    monkeypatch.setattr(engines, "_MAX_PARAMETERS", 1000)
    with pytest.raises(engines.EngineError, match="=xnnpack: .* does not fit into a flatbuffer"):
        engines.make("xnnpack", model, 4)
    engine = engines.make("auto", model, 4)
    assert engine.name == "tf"
    assert "does not fit into a flatbuffer" in caplog.text
    np.testing.assert_allclose(engine(pixels), expected, atol=1e-6)


def test_bfloat16_is_computed_by_tensorflow(caplog):
    tf.keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = efficientnet.build_model("efficientnet-test", CLASSES, SIZE)
    with pytest.raises(engines.EngineError, match="bfloat16"):
        engines.make("xnnpack", model, 4)
    assert engines.make("auto", model, 4).name == "tf"
    assert "bfloat16" in caplog.text


def test_l2_fits_into_a_flatbuffer():
    """L2 has 480 million parameters, 1.9 GB."""
    assert 481_400_003 < engines._MAX_PARAMETERS < 2**31 // 4


def test_large_models_share_interpreters(model, monkeypatch, pixels, expected):
    monkeypatch.setattr(engines, "_MAX_INTERPRETER_BYTES", 1)
    engine = engines.XnnpackEngine(model, threads=4)
    assert engine.concurrency == 1
    np.testing.assert_allclose(engine(pixels), expected, atol=1e-5)


def test_native_code_prints_nothing(model, capfd):
    engines.XnnpackEngine(model, threads=1)
    assert capfd.readouterr().err == ""


def test_normalization_and_batch_norm_are_folded(model):
    interpreter = engines.interpreter(engines.convert(model, 2))
    assert interpreter.get_input_details()[0]["shape"].tolist() == [2, SIZE, SIZE, 3]
    names = [op["op_name"] for op in interpreter._get_ops_details()]
    assert "CONV_2D" in names
    kinds = (tf.keras.layers.Conv2D, tf.keras.layers.DepthwiseConv2D)
    convolutions = sum(isinstance(layer, kinds) for layer in model.layers)
    # Each swish is one LOGISTIC and one MUL; batch norms add no ops.
    assert names.count("MUL") <= names.count("LOGISTIC") + 1
    assert names.count("CONV_2D") + names.count("DEPTHWISE_CONV_2D") == convolutions


def test_lite_is_convolutions_and_nothing_else(small_lite):
    lite = efficientnet.build_model(small_lite, CLASSES, SIZE)
    interpreter = engines.interpreter(engines.convert(lite, 2))
    names = {op["op_name"] for op in interpreter._get_ops_details()} - {"DELEGATE"}
    # SUB and MUL normalize the input, ADD is the shortcut, MEAN the pooling; relu6 is fused.
    assert names == {
        *("SUB", "MUL", "CONV_2D", "DEPTHWISE_CONV_2D", "ADD"),
        *("MEAN", "FULLY_CONNECTED", "SOFTMAX"),
    }


@pytest.mark.slow
def test_b0_and_the_numbers_of_the_original(large_goldens):
    """Compares with probabilities that the original code computed from its checkpoint."""
    from efficientnet_ns.models import weights

    folder = large_goldens / "6_model" / "b0_224_1000"
    model = efficientnet.build_model("efficientnet-b0", 1000, 224)
    weights.load_weights(model, str(folder / "model.ckpt"))
    arrays = np.load(folder / "eval_logits.npz")
    answer = engines.XnnpackEngine(model)(arrays["images"])
    np.testing.assert_allclose(answer, arrays["probabilities_ema"], atol=1e-4)
    assert answer.argmax(1).tolist() == arrays["classes_ema"].tolist()
