"""Exported models as TensorFlow Serving uses them: sessions, warm-up, REST, gRPC, odd images."""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import flatbuffers
import image_files
import numpy as np
import pytest
import tensorflow as tf
import yaml
from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    text_format,
    wrappers_pb2,
)
from PIL import Image

from efficientnet_ns import inference
from efficientnet_ns.benchmarks import tables
from efficientnet_ns.data import tasks
from efficientnet_ns.data.pipeline import Preprocessing
from efficientnet_ns.files import tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.inference import engines, folding
from efficientnet_ns.models import efficientnet
from efficientnet_ns.serving import check, client, deployment, export, image_sizes, tflite, warmup
from efficientnet_ns.serving.classifier import OutputSpec

CLASSES, SIZE = 5, 32
NAMES = ("ant", "bee", "cat", "dog", "eel")
OPTIONS = export.Options(OutputSpec(NAMES, top_k=3))
PREPROCESSING = Preprocessing(SIZE)


@pytest.fixture(scope="module")
def model() -> tf.keras.Model:
    made = efficientnet.build_model("efficientnet-test", CLASSES, SIZE)
    rng = np.random.default_rng(2)
    made.set_weights([w + rng.uniform(0, 0.1, w.shape) for w in made.get_weights()])
    return made


@pytest.fixture(scope="module")
def base(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    export.export(model, PREPROCESSING, str(folder), 1, OPTIONS)
    return folder


class Session:
    """A SavedModel in the C++ session loader, each signature by name."""

    def __init__(self, folder: str):
        self._session = tf.compat.v1.Session(graph=tf.Graph())
        with self._session.graph.as_default():
            loader = tf.compat.v1.saved_model.loader
            self.signatures = loader.load(self._session, ["serve"], folder).signature_def

    def __call__(self, name: str, **inputs) -> dict[str, np.ndarray]:
        signature = self.signatures[name]
        outputs = {key: info.name for key, info in signature.outputs.items()}
        feed = {signature.inputs[key].name: value for key, value in inputs.items()}
        return self._session.run(outputs, feed)


@pytest.fixture(scope="module")
def served(base) -> Session:
    return Session(str(base / "1"))


def noise(height: int = 40, width: int = 50, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, [height, width, 3], np.uint8)


def jpeg(seed: int = 0) -> bytes:
    return tf.io.encode_jpeg(noise(seed=seed)).numpy()


def expected(model: tf.keras.Model, images: list) -> np.ndarray:
    pixels = tf.stack([PREPROCESSING.evaluate(tf.constant(image)) for image in images])
    return tf.nn.softmax(model(pixels, training=False)).numpy()


# Graphs.


def test_folding_changes_no_number(model):
    folded = folding.fold_batch_norm(model)
    pixels = np.random.default_rng(0).uniform(0, 255, [3, SIZE, SIZE, 3])
    np.testing.assert_allclose(folded(pixels), model(pixels), atol=1e-4, rtol=1e-4)
    assert not any("moving" in weight.name for weight in folded.weights)


def test_pointwise_convolutions_of_small_maps_are_products():
    """At 128 pixels the first maps are 64 wide, the others at most 32."""
    model = efficientnet.build_model("efficientnet-test", CLASSES, 128)
    folded = folding.fold_batch_norm(model, for_cpu=True)
    call = tf.function(folded).get_concrete_function(tf.TensorSpec([None, 128, 128, 3]))
    kinds = [op.type for op in call.graph.get_operations()]
    pointwise = [layer for layer in folded.layers if isinstance(layer, folding.Pointwise)]
    convolved = [layer for layer in pointwise if layer.input_shape[2] >= 56]
    assert 0 < len(convolved) < len(pointwise)
    assert kinds.count("Conv2D") == len(convolved) + 1  # The stem.
    assert kinds.count("MatMul") == len(pointwise) - len(convolved) + 1  # The classifier.
    pixels = np.random.default_rng(0).uniform(0, 255, [2, 128, 128, 3]).astype(np.float32)
    np.testing.assert_allclose(folded(pixels), model(pixels), atol=1e-4, rtol=1e-4)


def test_every_signature_by_name(model, served):
    images = [jpeg(), tf.io.encode_png(noise(90, 33)).numpy()]
    probabilities = expected(model, images)
    answer = served("serving_default", image_bytes=images)
    np.testing.assert_allclose(answer["probabilities"], probabilities, atol=1e-5)
    best = np.argsort(-probabilities, 1)[:, :3]
    assert (answer["top_classes"] == best).all()
    assert answer["top_class_names"].tolist() == [[NAMES[i].encode() for i in r] for r in best]
    assert answer["class_names"].tolist() == [NAMES[i].encode() for i in best[:, 0]]
    assert answer["valid"].all()

    pixels = np.stack([noise(seed=1), noise(seed=2)])
    for name, dtype in (("predict_images", np.float32), ("predict_images_uint8", np.uint8)):
        answer = served(name, images=pixels.astype(dtype))
        np.testing.assert_allclose(
            answer["probabilities"], expected(model, list(pixels)), atol=1e-5
        )
    pooled = tf.keras.Model(model.input, efficientnet.endpoints(model)["pooled"])
    answer = served("features", image_bytes=images[:1])
    np.testing.assert_allclose(
        answer["features"], pooled(PREPROCESSING.evaluate(images[0])[None]), atol=1e-4
    )
    examples = [tfexamples.unlabeled_example(image) for image in images]
    answer = served("classify", inputs=[*examples, b"no example"])
    np.testing.assert_allclose(answer["scores"][:2], -np.sort(-probabilities, 1)[:, :3], atol=1e-5)
    assert answer["classes"][2].tolist() == [b""] * 3 and set(answer) == {"classes", "scores"}
    assert served.signatures["classify"].method_name == "tensorflow/serving/classify"


@pytest.mark.parametrize("target", ["accelerator", "none"])
def test_other_targets_answer_the_same(model, target, tmp_path):
    options = export.Options(OutputSpec(NAMES), target)
    export.export(model, PREPROCESSING, str(tmp_path), 4, options)
    answer = Session(str(tmp_path / "4"))("serving_default", image_bytes=[jpeg()])
    np.testing.assert_allclose(answer["probabilities"], expected(model, [jpeg()]), atol=1e-5)


PLAIN = """
import sys, tensorflow as tf
with tf.compat.v1.Session(graph=tf.Graph()) as session:
    meta = tf.compat.v1.saved_model.loader.load(session, ["serve"], sys.argv[1])
    signature = meta.signature_def["serving_default"]
    names = {k: v.name for k, v in signature.outputs.items()}
    with open(sys.argv[2], "rb") as f:
        answer = session.run(names, {signature.inputs["image_bytes"].name: [f.read(), b"bad"]})
assert not [name for name in sys.modules if name.startswith("efficientnet_ns")]
print(answer["valid"].tolist(), answer["classes"][0])
"""


def elsewhere(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    )


def test_plain_tensorflow_session(model, base, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    done = elsewhere([sys.executable, "-c", PLAIN, str(base / "1"), "a.jpg"], tmp_path)
    assert done.stdout.split("\n")[0] == f"[True, False] {expected(model, [jpeg()]).argmax()}"


@pytest.mark.slow
def test_saved_model_cli(base, tmp_path):
    cli = [str(Path(sys.executable).with_name("saved_model_cli"))]
    shown = elsewhere([*cli, "show", "--dir", str(base / "1"), "--all"], tmp_path).stdout
    for name in ("serving_default", "predict_images", "features", "classify"):
        assert f"signature_def['{name}']" in shown
    np.save(tmp_path / "images.npy", noise()[None])
    call = ["run", "--dir", str(base / "1"), "--tag_set", "serve"]
    call += ["--signature_def", "predict_images_uint8", "--inputs", "images=images.npy"]
    assert "Result for output key probabilities" in elsewhere([*cli, *call], tmp_path).stdout


# Files beside the graph.


def test_files_of_a_version(base):
    assert (base / "1" / "assets" / "labels.txt").read_text().split() == list(NAMES)
    card = (base / "1" / "README.md").read_text()
    assert "efficientnet-test, version 1" in card and "| `classify` |" in card
    assert {path.name for path in (base / "deploy").iterdir()} == set(deployment.texts("m"))


def test_changed_deployment_files_stay(base, model):
    path = base / "deploy" / "models.config"
    before = path.read_text()
    path.write_text("mine")
    deployment.write(str(base), model.name)
    assert path.read_text() == "mine"
    path.write_text(before)


def batching_parameters():
    """An empty message with the server's fields of that name, whose package has no such file."""
    file = descriptor_pb2.FileDescriptorProto(
        name="batching.proto", dependency=[wrappers_pb2.DESCRIPTOR.name]
    )
    message = file.message_type.add(name="BatchingParameters")
    limits = ("max_batch_size", "batch_timeout_micros", "max_enqueued_batches", "num_batch_threads")
    for number, name in enumerate(limits, 1):
        kind = ".google.protobuf.Int64Value"
        message.field.add(name=name, number=number, label=1, type=11, type_name=kind)
    message.field.add(name="allowed_batch_sizes", number=6, label=3, type=3)
    pool = descriptor_pool.Default()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("BatchingParameters"))()


def test_text_protos_parse(base):
    from tensorflow_serving.config import model_server_config_pb2

    server = text_format.Parse(
        (base / "deploy" / "models.config").read_text(),
        model_server_config_pb2.ModelServerConfig(),
    )
    (model,) = server.model_config_list.config
    assert (model.name, model.model_platform) == ("efficientnet-test", "tensorflow")
    assert model.base_path == "/models/efficientnet-test"
    assert model.model_version_policy.latest.num_versions == 1
    batching = text_format.Parse(
        (base / "deploy" / "batching_parameters.txt").read_text(),
        batching_parameters(),
    )
    # The server refuses a file whose last allowed size is not the largest batch.
    assert list(batching.allowed_batch_sizes) == list(deployment.BATCH_SIZES)
    assert batching.max_batch_size.value == deployment.BATCH_SIZES[-1]


def test_start_script_is_sound(base):
    script = base / "deploy" / "start.sh"
    assert os.access(script, os.X_OK)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_start_script_turns_onednn_on_unless_told_otherwise(base, tmp_path):
    server = tmp_path / "tensorflow_model_server"
    server.write_text('#!/bin/sh\necho "$TF_ENABLE_ONEDNN_OPTS $*"\n')
    server.chmod(0o755)
    command = [str(base / "deploy" / "start.sh"), "--version"]
    for given, expected in (({}, "1"), ({tables.ONEDNN: "0"}, "0")):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **given}
        printed = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
        onednn, *arguments = printed.split()
        assert onednn == expected and arguments[-1] == "--version"
        assert f"--model_base_path={base}" in arguments


def test_start_script_without_a_server_starts_a_container(base, tmp_path):
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\necho "$*"\n')
    docker.chmod(0o755)
    command = [str(base / "deploy" / "start.sh"), "--version"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    options, _, arguments = done.partition(f" tensorflow/serving:{tf.__version__} ")
    # Only so do signals reach the server.
    assert "--init --entrypoint tensorflow_model_server" in options
    assert arguments.split()[:2] == ["--port=8500", "--rest_api_port=8501"]
    assert arguments.split()[-1] == "--version"


def test_files_of_another_model_are_left_with_a_warning(tmp_path, caplog):
    deployment.write(str(tmp_path), "one")
    deployment.write(str(tmp_path), "one")
    assert not caplog.records
    before = (tmp_path / "deploy" / "models.config").read_text()
    with caplog.at_level("WARNING"):
        deployment.write(str(tmp_path), "two")
    assert "models.config differs from the template for two" in caplog.text
    assert (tmp_path / "deploy" / "models.config").read_text() == before


def test_compose_file_and_kubernetes_manifest(base):
    compose = yaml.safe_load((base / "deploy" / "docker-compose.yml").read_text())
    service = compose["services"]["serving"]
    inside = "/models/efficientnet-test"
    assert service["volumes"] == [f"..:{inside}:ro"]
    assert f"--model_config_file={inside}/deploy/models.config" in service["command"]
    # A shell reads the check as it is written, with \\r\\n for printf.
    kind, *check_command = service["healthcheck"]["test"]
    assert kind == "CMD" and check_command[:2] == ["bash", "-c"]
    assert "GET /v1/models/efficientnet-test HTTP/1.0\\r\\n\\r\\n" in check_command[2]
    subprocess.run(["bash", "-n", "-c", check_command[2]], check=True)

    text = (base / "deploy" / "kubernetes.yaml").read_text()
    workload, entry = yaml.safe_load_all(text)
    pod = workload["spec"]["template"]
    assert (workload["kind"], entry["kind"]) == ("Deployment", "Service")
    labels = pod["metadata"]["labels"]
    assert labels == workload["spec"]["selector"]["matchLabels"] == entry["spec"]["selector"]
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": 8500, "rest": 8501}
    assert {port["targetPort"] for port in entry["spec"]["ports"]} == set(ports)
    for probe in ("startupProbe", "readinessProbe"):
        path = container[probe]["httpGet"]["path"]
        assert path == "/v1/models/efficientnet-test/metadata"
        assert container[probe]["httpGet"]["port"] in ports
    assert container["image"] == service["image"] and container["args"] == service["command"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment == service["environment"] == {tables.ONEDNN: "1"}
    assert service["init"] and pod["spec"]["shareProcessNamespace"]
    assert container["command"] == service["entrypoint"] == ["tensorflow_model_server"]
    (mount,), (volume,) = container["volumeMounts"], pod["spec"]["volumes"]
    assert mount["name"] == volume["name"] and mount["mountPath"] == inside and mount["readOnly"]


def test_warm_up_requests_run(base, served):
    from tensorflow_serving.apis import prediction_log_pb2

    seen = set()
    for record in tfrecords.read(str(base / "1" / warmup.FILE)):
        log = prediction_log_pb2.PredictionLog.FromString(record.payload)
        if log.WhichOneof("log_type") == "classify_log":
            request = log.classify_log.request
            examples = request.input.example_list.examples
            inputs = {"inputs": [example.SerializeToString() for example in examples]}
        else:
            request = log.predict_log.request
            inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
        name = request.model_spec.signature_name
        answer = served(name, **inputs)
        assert answer.get("valid", np.array(True)).all()
        assert request.model_spec.name == "efficientnet-test"
        seen.add((name, len(next(iter(inputs.values())))))
    names = set(served.signatures) - {"__saved_model_init_op"}
    assert seen == {(name, batch) for name in names for batch in (1, 8)} and len(names) == 5


def test_next_version(base, tmp_path):
    assert export.next_version(str(base)) == 2
    assert export.next_version(str(tmp_path / "none")) == 1


# Odd images.


def bomb(side: int = 30_000) -> bytes:
    """A PNG of one colour; its compressed rows are made without the whole of them."""
    squeeze = zlib.compressobj(9)
    row = bytes(1 + side * 3)
    data = b"".join(squeeze.compress(row) for _ in range(side // 100)) + squeeze.flush()

    def chunk(kind: bytes, body: bytes) -> bytes:
        check_sum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check_sum

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def lying_files() -> dict[str, bytes]:
    frame = struct.pack(">BHHB", 8, 65500, 65500, 3) + bytes([1, 17, 0, 2, 17, 1, 3, 17, 1])
    bmp = b"BM" + bytes(8) + struct.pack("<IIiiHHI", 54, 40, 20_000, -20_000, 1, 24, 0) + bytes(24)
    gif = b"GIF89a" + struct.pack("<HH", 65000, 65000) + bytes(3)
    return {
        "bomb.png": bomb(),
        "huge.jpg": b"\xff\xd8\xff\xc0" + struct.pack(">H", len(frame) + 2) + frame + b"\xff\xd9",
        "huge.bmp": bmp,
        "huge.gif": gif + b"\x2c" + struct.pack("<HHHH", 0, 0, 65000, 65000) + bytes(20) + b";",
        "frame larger than its screen.gif": b"GIF89a"
        + struct.pack("<HH", 2, 2)
        + bytes(3)
        + b"\x2c"
        + struct.pack("<HHHH", 0, 0, 65000, 65000)
        + b"\x00\x02\x02\x4c\x01\x00;",
        "data missing.bmp": b"BM" + bytes(8) + struct.pack("<IIiiHHI", 54, 40, 90, 90, 1, 24, 0),
        "empty": b"",
        "text": b"not an image",
    }


@pytest.mark.parametrize("height, width", [(1, 1), (3, 500), (70, 41)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_pixels_are_counted_from_the_header(kind, height, width):
    file = io.BytesIO()
    Image.fromarray(noise(height, width)).save(file, kind)
    assert image_sizes.num_pixels(tf.constant(file.getvalue())) == height * width


def test_pixels_that_files_claim():
    huge = bytearray(jpeg())
    start = huge.index(b"\xff\xc0") + 5  # Behind marker, length and bits per sample.
    huge[start : start + 4] = struct.pack(">HH", 65_500, 65_500)
    files = {**lying_files(), "huge.jpg": bytes(huge)}
    sizes = {"bomb.png": 30_000**2, "huge.jpg": 65_500**2, "huge.bmp": 20_000**2}
    sizes.update({"huge.gif": 65_000**2, "empty": 0, "text": 0})
    for name, pixels in sizes.items():
        assert image_sizes.num_pixels(tf.constant(files[name])) == pixels, name
    with pytest.raises(tf.errors.InvalidArgumentError):
        image_sizes.num_pixels(tf.constant(b"\xff\xd8\xff\xc0 and no more"))
    small = files["data missing.bmp"]
    assert image_sizes.refuse_large(tf.constant(small), 8100) == small
    with pytest.raises(tf.errors.InvalidArgumentError, match="larger than 8099 pixels"):
        image_sizes.refuse_large(tf.constant(small), 8099)


def test_every_kind_of_file_is_answered_right_or_as_invalid(model, served):
    contents = {name: make() for name, make in image_files.FILES.items()}
    answer = served("serving_default", image_bytes=list(contents.values()))
    features = served("features", image_bytes=list(contents.values()))
    np.testing.assert_array_equal(features["valid"], answer["valid"])
    valid = dict(zip(contents, answer["valid"]))
    assert all(valid[name] for name in contents if name.startswith("PNG"))
    for name in ("BMP 24 bit", "BMP 32 bit, masks", "BMP gray 8 bit", "GIF", "GIF animated"):
        assert valid[name], name
    for name in ("BMP palette 8 bit", "BMP RLE8", "BMP 32 bit, masks RGBX", "GIF transparent"):
        assert not valid[name], name
    exact = [n for n in contents if n.startswith(("PNG", "BMP", "GIF")) and valid[n]]
    pixels = [np.asarray(sixteen_to_eight(contents[name])) for name in exact]
    rows = [index for index, name in enumerate(contents) if name in exact]
    np.testing.assert_allclose(answer["probabilities"][rows], expected(model, pixels), atol=1e-5)
    assert not answer["probabilities"][~answer["valid"]].any()
    others = [n for n in contents if not n.startswith(("PNG", "BMP", "GIF", "JPEG "))]
    assert not any(valid[name] for name in others if name != "JPEG, two frames (MPO)")


def sixteen_to_eight(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_lying_files_are_invalid_and_never_allocated(served):
    good = jpeg()
    alone = served("serving_default", image_bytes=[good])["probabilities"][0]
    before = peak_megabytes()
    for name, content in lying_files().items():
        answer = served("serving_default", image_bytes=[content, good])
        assert answer["valid"].tolist() == [False, True], name
        assert answer["classes"][0] == -1 and answer["class_names"][0] == b"", name
        assert not answer["probabilities"][0].any(), name
        np.testing.assert_allclose(answer["probabilities"][1], alone, atol=1e-6, err_msg=name)
    assert peak_megabytes() - before < 500


def test_no_images(served):
    assert served("serving_default", image_bytes=[])["probabilities"].shape == (0, CLASSES)


def odd(rng: np.random.Generator, content: bytes) -> bytes:
    """Truncated, with bytes changed, or both."""
    data = bytearray(content)
    for _ in range(rng.integers(0, 20)):
        data[rng.integers(0, len(data))] = rng.integers(0, 256)
    return bytes(data[: rng.integers(0, len(data) + 1)] if rng.random() < 0.6 else data)


@pytest.mark.parametrize("number", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_fuzzed_images_harm_nobody(served, rng, number):
    seeds = [
        jpeg(),
        tf.io.encode_jpeg(noise(), format="rgb", progressive=True).numpy(),
        tf.io.encode_png(noise()).numpy(),
    ]
    good = jpeg(seed=9)
    alone = served("serving_default", image_bytes=[good])["probabilities"][0]
    valid, memory = 0, []
    for i in range(0, number, 10):
        batch = [odd(rng, seeds[rng.integers(len(seeds))]) for _ in range(10)]
        place = int(rng.integers(0, 11))
        answer = served("serving_default", image_bytes=[*batch[:place], good, *batch[place:]])
        np.testing.assert_allclose(answer["probabilities"][place], alone, atol=1e-6)
        single = served("serving_default", image_bytes=batch[:1])
        assert single["valid"][0] == np.delete(answer["valid"], place)[0]
        assert np.isfinite(answer["probabilities"]).all()
        valid += int(answer["valid"].sum()) - 1
        if i >= number // 2:
            memory.append(peak_megabytes())
    assert 0 < valid < number
    assert memory[-1] - memory[0] < 100


# Killed exports.

SLOW_EXPORT = """
import sys
from efficientnet_ns.data.pipeline import Preprocessing
from efficientnet_ns.models import efficientnet
from efficientnet_ns.serving import export
model = efficientnet.build_model("efficientnet-test", 5, 32)
print("go", flush=True)
while True:
    version = export.next_version(sys.argv[1])
    export.export(model, Preprocessing(32), sys.argv[1], version)
    print(version, flush=True)
"""


@pytest.mark.slow
def test_killed_exports_leave_complete_versions_only(tmp_path, rng, model):
    for _ in range(4):
        worker = subprocess.Popen(
            [sys.executable, "-c", SLOW_EXPORT, str(tmp_path)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
        )
        assert worker.stdout.readline() == b"go\n"
        time.sleep(rng.uniform(0.5, 8))  # Somewhere inside an export.
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        for version in (path for path in tmp_path.iterdir() if path.name.isdigit()):
            assert Session(str(version))("serving_default", image_bytes=[jpeg()])["valid"][0]
            assert (version / warmup.FILE).exists() and (version / "README.md").exists()
    number = export.next_version(str(tmp_path))
    export.export(model, PREPROCESSING, str(tmp_path), number, OPTIONS)
    assert number > 1 and not list(tmp_path.glob(".tmp-*"))


# TensorFlow Lite.


@pytest.mark.parametrize(
    "kind, tolerance",
    [("float32", 1e-5)]
    + [pytest.param(k, t, marks=pytest.mark.slow) for k, t in (("float16", 0.01), ("dynamic", 0.1))]
    + [pytest.param("int8", 0.3, marks=pytest.mark.slow)],
)
def test_tflite(model, tmp_path, kind, tolerance):
    images = inference.preprocess([jpeg(seed=i) for i in range(8)], PREPROCESSING).numpy()
    path = str(tmp_path / "model.tflite")
    export.export_tflite(model, PREPROCESSING, path, kind, OPTIONS, images)
    answers = tflite.runner(Path(path).read_bytes())(images)
    np.testing.assert_allclose(answers, tf.nn.softmax(model(images)), atol=tolerance)
    with zipfile.ZipFile(path) as attached:
        assert attached.read("labels.txt").decode().split() == list(NAMES)
        facts = json.loads(attached.read("metadata.json"))
    assert facts["image_size"] == SIZE and facts["type"] == kind and len(facts["mean"]) == 3
    details = engines.Interpreter(path).get_input_details()[0]
    assert details["dtype"] == (np.uint8 if kind == "int8" else np.float32)


class Fields:
    """A table of a flatbuffer, read by the positions of its fields."""

    def __init__(self, data: bytes, position: int | None = None):
        start = int.from_bytes(data[:4], "little") if position is None else position
        self.table = flatbuffers.table.Table(bytearray(data), start)

    def _at(self, slot: int) -> int:
        offset = self.table.Offset(4 + 2 * slot)
        assert offset, f"field {slot} is absent"
        return self.table.Pos + offset

    def number(self, slot: int, kind=flatbuffers.number_types.Uint8Flags) -> int:
        return self.table.Get(kind, self._at(slot))

    def text(self, slot: int) -> str:
        return self.table.String(self._at(slot)).decode()

    def child(self, slot: int) -> Fields:
        return Fields(self.table.Bytes, self.table.Indirect(self._at(slot)))

    def floats(self, slot: int) -> list[float]:
        offset = self._at(slot) - self.table.Pos
        start, count = self.table.Vector(offset), self.table.VectorLen(offset)
        return np.frombuffer(self.table.Bytes, "<f4", count, start).tolist()

    def only(self, slot: int) -> Fields:
        offset = self._at(slot) - self.table.Pos
        assert self.table.VectorLen(offset) == 1
        return Fields(self.table.Bytes, self.table.Indirect(self.table.Vector(offset)))


def test_tflite_metadata_is_of_the_public_schema(model, tmp_path):
    from tensorflow.lite.python import schema_py_generated as schema

    path = str(tmp_path / "model.tflite")
    content = export.export_tflite(model, PREPROCESSING, path, "float32", OPTIONS)
    stored = schema.Model.GetRootAs(content)
    entries = [stored.Metadata(i) for i in range(stored.MetadataLength())]
    (buffer,) = [entry.Buffer() for entry in entries if entry.Name() == b"TFLITE_METADATA"]
    data = stored.Buffers(buffer).DataAsNumpy().tobytes()
    assert data[4:8] == b"M001"
    root = Fields(data)
    assert root.text(0) == "efficientnet-test" and root.text(7) == "1.0.0"
    image, probability = root.only(3).only(2), root.only(3).only(3)
    assert image.child(3).number(0) == 2  # The union's member: image properties.
    size = image.child(3).child(1).child(1)
    uint = flatbuffers.number_types.Uint32Flags
    assert (size.number(0, uint), size.number(1, uint)) == (SIZE, SIZE)
    assert image.child(3).child(1).number(0) == 1  # RGB.
    unit = image.only(4)
    # The graph takes 0..255: whoever follows the metadata must change nothing.
    assert unit.number(0) == 1 and (unit.child(1).floats(0), unit.child(1).floats(1)) == ([0], [1])
    labels = probability.only(6)
    assert labels.number(2) == 2  # Labels of the tensor's axis.
    with zipfile.ZipFile(path) as attached:
        assert attached.read(labels.text(0)).decode().split() == list(NAMES)
    for i in range(stored.BuffersLength()):  # Weights where kernels may load vectors from.
        if stored.Buffers(i).DataLength():
            address = stored.Buffers(i).DataAsNumpy().__array_interface__["data"][0]
            start = np.frombuffer(content, np.uint8).__array_interface__["data"][0]
            assert (address - start) % 16 == 0


def test_tflite_refusals(model):
    with pytest.raises(ValueError, match="int8 needs representative"):
        tflite.convert(model, "int8")
    with pytest.raises(ValueError, match="unknown TFLite type 'int4'"):
        tflite.convert(model, "int4")


def test_difference():
    one = np.array([[0.6, 0.4], [0.2, 0.8]])
    found = check.difference(one, np.array([[0.45, 0.55], [0.2, 0.8]]))
    assert found.images == 2 and found.agreement == 0.5 and found.largest == pytest.approx(0.15)


def test_check_data(tmp_path, caplog):
    with pytest.raises(DataError, match="there is nothing in"):
        check.encoded_images(str(tmp_path), 3)
    examples = [tfexamples.unlabeled_example(jpeg(i)) for i in range(4)]
    tfrecords.write_sharded(str(tmp_path), "train", examples, 2)
    (tmp_path / "train-00000-of-00002.manifest.json").write_text("{}")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "x.png").write_bytes(b"of something else")
    assert check.encoded_images(str(tmp_path), 3) == [jpeg(0), jpeg(2), jpeg(1)]
    (tmp_path / "a.jpg").write_bytes(jpeg())
    assert check.encoded_images(str(tmp_path), 3) == [jpeg()]
    (tmp_path / "0.png").write_bytes(b"no picture")
    assert check.encoded_images(str(tmp_path), 1) == [jpeg()]
    assert f"{tmp_path / '0.png'} is skipped" in caplog.text
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DataError, match="neither images that can be decoded nor"):
        check.encoded_images(str(tmp_path), 3)
    with pytest.raises(DataError, match="does not exist"):
        check.encoded_images(str(tmp_path / "nowhere"), 3)


def test_check_data_of_class_folders_takes_from_each(tmp_path):
    images = {"ant": [jpeg(1), jpeg(2), jpeg(3)], "bee": [jpeg(4)], "cat": [jpeg(5), jpeg(6)]}
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name, of_class in images.items():
            (tmp_path / "all" / name).mkdir(parents=True)
            for i, image in enumerate(of_class):
                (tmp_path / "all" / name / f"{i}.JPG").write_bytes(image)
                archive.writestr(f"all/{name}/{i}.JPG", image)
    (tmp_path / "all" / "notes.txt").write_text("not an image")
    for path in (tmp_path / "all", tmp_path / "all.zip"):
        found = check.encoded_images(str(path), 5)
        assert found == [jpeg(1), jpeg(4), jpeg(5), jpeg(2), jpeg(6)]
        assert len(check.encoded_images(str(path), 100)) == 6


def test_check_data_takes_what_records_take(tmp_path):
    """Formats that are converted when records are made."""
    Image.fromarray(noise()).save(tmp_path / "a.webp", lossless=True)
    (found,) = check.encoded_images(str(tmp_path), 9)
    np.testing.assert_array_equal(tf.io.decode_png(found), noise())


def test_records_without_images_are_named(tmp_path):
    tfrecords.write(
        str(tmp_path / "train-00000-of-00001"), [tfexamples.prediction_example([0.5, 0.5])]
    )
    with pytest.raises(DataError, match="train-00000-of-00001, record 0: .*image/encoded"):
        check.encoded_images(str(tmp_path), 3)


# REST.


@pytest.mark.parametrize(
    "wrong",
    [
        "--server=localhost:abc",
        "--server=ftp://localhost",
        "--server=http://ho st",
        "--server=http://a..b",
        "--server=http://[::1",
        "--timeout=-1",
        "--timeout=inf",
        "--timeout=nan",
        "--version=-1",
    ],
)
def test_client_refuses_what_cannot_work(wrong, capsys):
    with pytest.raises(SystemExit):
        client.main(["--model=m", wrong, "photo.jpg"])
    assert wrong.partition("=")[2] in capsys.readouterr().err


def decoded(value):
    """JSON → numpy input as the published REST API reads it: {"b64": …} are bytes."""
    if isinstance(value, dict) and set(value) == {"b64"}:
        return base64.b64decode(value["b64"], validate=True)
    return [decoded(item) for item in value] if isinstance(value, list) else value


def rest_answer(served: Session, body: dict) -> dict:
    """What `POST …:predict` answers, by the published rules for rows and columns."""
    signature = body.get("signature_name", "serving_default")
    (name,) = served.signatures[signature].inputs
    rows = "instances" in body
    content = body["instances" if rows else "inputs"]
    if rows:  # One input: each instance is its value, or an object with its name.
        content = [x[name] if isinstance(x, dict) and name in x else x for x in content]
    elif isinstance(content, dict) and name in content:
        content = content[name]
    outputs = served(signature, **{name: decoded(content)})
    lists = {
        key: [x.decode() if isinstance(x, bytes) else x for x in value.ravel().tolist()]
        for key, value in outputs.items()
    }
    lists = {k: np.array(v, object).reshape(outputs[k].shape).tolist() for k, v in lists.items()}
    if not rows:
        return {"outputs": lists}
    return {"predictions": [dict(zip(lists, row)) for row in zip(*lists.values())]}


@pytest.fixture(scope="module")
def rest(served):
    """Address and log of a server with the REST API; `failures` statuses are sent first."""

    class Handler(BaseHTTPRequestHandler):
        failures: list[int] = []
        paths: list[str] = []

        def do_POST(self):
            content = self.rfile.read(int(self.headers["Content-Length"]))
            Handler.paths.append(self.path)
            status, text = 200, b""
            if Handler.failures:
                status, text = Handler.failures.pop(0), b'{"error": "busy"}'
            else:
                text = json.dumps(rest_answer(served, json.loads(content))).encode()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Handler
    server.shutdown()


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"image_bytes": x}])
def test_rest_bodies(model, served, wrap):
    images = [jpeg(1), jpeg(2)]
    objects = [{"b64": base64.b64encode(image).decode()} for image in images]
    rows = rest_answer(served, {"instances": [wrap(item) for item in objects]})["predictions"]
    columns = rest_answer(served, {"inputs": wrap(objects)})["outputs"]
    np.testing.assert_allclose(columns["probabilities"], expected(model, images), atol=1e-5)
    assert [row["class_names"] for row in rows] == columns["class_names"]
    assert not any(name.endswith("_bytes") for name in columns)  # Would come back as base64.


@pytest.fixture
def photos(tmp_path) -> list[str]:
    paths = []
    for i, content in enumerate([jpeg(1), jpeg(2), b"broken", jpeg(3)]):
        paths.append(str(tmp_path / f"{i}.jpg"))
        Path(paths[-1]).write_bytes(content)
    return paths


def test_client_by_rest(model, rest, photos, capsys):
    address, handler = rest
    handler.failures, handler.paths = [503, 429], []
    arguments = ["--model=m", "--version=3", f"--server={address}", "--format=json", "--top=2"]
    assert client.main([*arguments, "--batch_size=2", *photos, "missing.jpg"]) == 1
    shown = capsys.readouterr()
    answers = [json.loads(line) for line in shown.out.splitlines()]
    assert [answer["photo"] for answer in answers] == [*photos, "missing.jpg"]
    assert "cannot decode" in answers[2]["error"] and "No such file" in answers[4]["error"]
    best = expected(model, [jpeg(1)])[0]
    first = answers[0]["predictions"]
    assert [g["index"] for g in first] == np.argsort(-best)[:2].tolist()
    assert first[0]["name"] == NAMES[best.argmax()]
    assert first[0]["probability"] == pytest.approx(best.max(), abs=1e-5)
    assert set(handler.paths) == {"/v1/models/m/versions/3:predict"} and len(handler.paths) == 4
    assert "3 photos in" in shown.err and "p99" in shown.err


def test_client_gives_up(rest, photos, capsys):
    address, handler = rest
    handler.failures, handler.paths = [404], []
    assert client.main(["--model=m", f"--server={address}", photos[0]]) == 1
    assert "HTTP 404" in capsys.readouterr().out and len(handler.paths) == 1
    handler.failures = []
    assert client.main(["--model=m", f"--server={address}", "--format=csv", photos[0]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "photo,rank,index,name,probability,error" and len(lines) == 4
    assert client.main(["--model=m", "--server=127.0.0.1:1", "--retries=0", photos[0]]) == 1
    with pytest.raises(SystemExit) as stop:
        client.main(["--model=m", "--server=ftp://x", photos[0]])
    assert stop.value.code == 2


def answering(status: int, body: bytes, **headers: str):
    """Address of a server that always gives this; a context."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    @contextlib.contextmanager
    def running():
        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()

    return running()


def outputs(**changed) -> dict:
    """What an exported model answers to two photos, with some of it changed or, if None, missing."""
    good = {
        "valid": [True, True],
        "top_classes": [[1, 0], [0, 1]],
        "top_class_names": [["b", "a"], ["a", "b"]],
        "top_probabilities": [[0.7, 0.3], [0.6, 0.4]],
    }
    return {key: value for key, value in {**good, **changed}.items() if value is not None}


_HTML = b"<!DOCTYPE html><html><head><title>502 Bad\n Gateway &lt;nginx&gt;</title></head></html>"
_OTHER_SERVERS = {
    "other model": (200, {"outputs": {"scores": [[0.1, 0.9]] * 2}}, "missing: valid, top_classes"),
    "one output": (200, {"outputs": [[0.1, 0.9]] * 2}, "one without a name"),
    "no outputs": (200, {"outputs": {}}, "its outputs are none"),
    "null": (200, {"outputs": None}, "one without a name"),
    "some missing": (200, {"outputs": outputs(valid=None)}, "missing: valid"),
    "fewer rows": (200, {"outputs": outputs(valid=[True])}, "a list of 2 is needed"),
    "no lists": (200, {"outputs": outputs(top_classes=[1, 0])}, "not the outputs of an exported"),
    "fewer names": (200, {"outputs": outputs(top_class_names=[["b"], ["a"]])}, "a list of 2"),
    "numbers as names": (200, {"outputs": outputs(top_class_names=[[1, 0]] * 2)}, "as the name"),
    "texts as numbers": (200, {"outputs": outputs(top_classes=[["x", "y"]] * 2)}, "'x'"),
    "no classes": (
        200,
        {"outputs": {"valid": [True] * 2, **dict.fromkeys(client._TOP, [[], []])}},
        "a photo without classes",
    ),
    "rows": (200, {"predictions": [1, 2]}, "does not respond like TensorFlow Serving"),
    "error in a good answer": (200, {"error": "no such thing"}, "no such thing"),
    "a list": (200, ["x"], "does not respond like TensorFlow Serving"),
    "a page": (200, _HTML, "a web page, 502 Bad Gateway <nginx>"),
    "nothing": (200, b"", "an empty body"),
    "no text": (200, b"\xff\xfe\x00", "does not respond like TensorFlow Serving"),
    "deep": (200, b"[" * 100_000, "does not respond like TensorFlow Serving"),
    "wrong input": (400, {"error": "missing inputs: x\nof the signature"}, "HTTP 400: missing inp"),
    "unknown model": (
        404,
        {"error": "Servable not found for request: Latest(m)"},
        "HTTP 404: Serv",
    ),
    "no interface": (404, _HTML, "HTTP 404: a web page, 502 Bad Gateway"),
    "fails": (500, b"Internal\nerror", "HTTP 500: Internal error"),
    "nothing known": (503, b"", "HTTP 503: an empty body"),
}


@pytest.mark.parametrize("case", _OTHER_SERVERS)
@pytest.mark.parametrize("shown", client.FORMATS)
def test_client_names_what_other_servers_answer(case, shown, tmp_path, capsys):
    status, body, message = _OTHER_SERVERS[case]
    photos = [str(tmp_path / name) for name in ("a.jpg", "b.jpg")]
    for path in photos:
        Path(path).write_bytes(b"x")
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    with answering(status, body) as address:
        arguments = ["--model=m", f"--server={address}", "--retries=0", f"--format={shown}"]
        assert client.main([*arguments, *photos]) == 1
    out, err = capsys.readouterr()
    lines = {
        "json": lambda: [json.loads(line)["error"] for line in out.splitlines()],
        "csv": lambda: [row["error"] for row in csv.DictReader(out.splitlines())],
        "table": lambda: [line.strip() for line in out.splitlines()[1::2]],
    }[shown]()
    assert len(lines) == 2 and all(message in line for line in lines)
    assert "0 photos in" in err


def test_client_names_where_it_is_sent(tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(b"x")
    with answering(301, b"", Location="https://elsewhere") as address:
        assert client.main(["--model=m", f"--server={address}", str(tmp_path / "a.jpg")]) == 1
    assert "HTTP 301 to https://elsewhere" in capsys.readouterr().out


@pytest.mark.parametrize("reply", [b"", b"SSH-2.0-OpenSSH_9\r\n", None])
def test_client_of_servers_without_http(reply, tmp_path, capsys):
    """One that closes, one of another protocol, one that says nothing in time."""
    (tmp_path / "a.jpg").write_bytes(b"x")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                if reply is None:
                    asked.wait(30)
                else:
                    connection.sendall(reply)

        asked = threading.Event()
        thread = threading.Thread(target=serve)
        thread.start()
        arguments = ["--model=m", f"--server=127.0.0.1:{server.getsockname()[1]}", "--retries=0"]
        seconds = "0.2" if reply is None else "30"
        photo = str(tmp_path / "a.jpg")
        assert client.main([*arguments, f"--timeout={seconds}", photo]) == 1
        asked.set()
        thread.join()
    assert re.search(r"no response from 127\.0\.0\.1:\d+: \S", capsys.readouterr().out)


def test_names_of_models_are_quoted(rest, tmp_path):
    address, handler = rest
    handler.failures, handler.paths = [404], []
    (tmp_path / "a.jpg").write_bytes(b"x")
    client.main(["--model=Käfer/a b?", f"--server={address}/x y", str(tmp_path / "a.jpg")])
    assert handler.paths == ["/x%20y/v1/models/K%C3%A4fer%2Fa%20b%3F:predict"]


def test_client_prints_names_that_are_no_text(rest, tmp_path, capsys):
    path = os.fsdecode(bytes(tmp_path / "caf") + b"\xe9.jpg")
    Path(path).write_bytes(jpeg())
    address, handler = rest
    handler.failures = []
    assert client.main(["--model=m", f"--server={address}", path]) == 0
    assert "caf\\udce9.jpg" in capsys.readouterr().out


def test_back_off():
    waits, attempts = [], []

    def request():
        attempts.append(1)
        raise client.RequestFailed("busy", retry=True)

    with pytest.raises(client.RequestFailed, match="busy"):
        client.with_retries(request, 3, 1.0, waits.append)
    assert len(attempts) == 4
    assert all(low <= wait <= 1.5 * low for low, wait in zip([1, 2, 4], waits))


def test_percentile():
    values = list(range(1, 101))
    assert [client.percentile(values, p) for p in (50, 99, 100)] == [50, 99, 100]
    assert client.percentile([7], 50) == 7


def test_rest_loads_no_tensorflow():
    code = "import sys, efficientnet_ns.serving.client; print(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    for name in ("tensorflow", "numpy", "grpc", "absl", "efficientnet_ns.config"):
        assert f"'{name}'" not in done.stdout


# gRPC.


def test_client_by_grpc(model, served, photos, capsys):
    import grpc
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
        calls = 0

        def Predict(self, request, context):  # noqa: N802 - name of the service's method
            Service.calls += 1
            if Service.calls == 1:
                context.abort(grpc.StatusCode.UNAVAILABLE, "loading")
            assert request.model_spec.name == "m"
            inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
            outputs = served(request.model_spec.signature_name, **inputs)
            answer = predict_pb2.PredictResponse()
            for name, value in outputs.items():
                answer.outputs[name].CopyFrom(tf.make_tensor_proto(value))
            return answer

    server = grpc.server(futures.ThreadPoolExecutor(2))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        arguments = ["--protocol=grpc", "--model=m", f"--server=127.0.0.1:{port}"]
        assert client.main([*arguments, *photos]) == 1
    finally:
        server.stop(None)
    shown = capsys.readouterr().out
    assert NAMES[expected(model, [jpeg(1)]).argmax()] in shown.splitlines()[1]
    assert "cannot decode" in shown and Service.calls == 2


@pytest.mark.parametrize(
    "answer, message",
    [
        ({"scores": [[0.1, 0.9]]}, "its outputs are scores; missing: valid, top_classes"),
        (outputs(valid=[True]), "a list of 1 is needed"),
        ({**outputs(), "valid": [True, True]}, "a list of 1 is needed"),
    ],
)
def test_grpc_answers_of_other_models(answer, message, photos, capsys):
    import grpc
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):  # noqa: N802 - name of the service's method
            found = predict_pb2.PredictResponse()
            for name, value in answer.items():
                found.outputs[name].CopyFrom(tf.make_tensor_proto(value))
            return found

    server = grpc.server(futures.ThreadPoolExecutor(2))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        arguments = ["--protocol=grpc", "--model=m", f"--server=127.0.0.1:{port}"]
        assert client.main([*arguments, photos[0]]) == 1
    finally:
        server.stop(None)
    assert message in capsys.readouterr().out


def test_names_of_imagenet_fit_a_label_file():
    assert not any("\n" in name for name in tasks.class_names("imagenet"))
