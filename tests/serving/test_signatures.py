"""Signatures as TensorFlow Serving calls them, on valid, unusual and malicious images."""

from __future__ import annotations

import io
import resource
import sys

import image_files
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from served_models import (
    CLASSES,
    NAMES,
    PREPROCESSING,
    elsewhere,
    expected,
    jpeg,
    lying_files,
    noise,
)

from efficientnet_ns.files import tfexamples
from efficientnet_ns.models import efficientnet


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


def test_plain_tensorflow_session(model, base, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    done = elsewhere([sys.executable, "-c", PLAIN, str(base / "1"), "a.jpg"], tmp_path)
    assert done.stdout.split("\n")[0] == f"[True, False] {expected(model, [jpeg()]).argmax()}"


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
    pixels = [eight_bits(name) for name in exact]
    rows = [index for index, name in enumerate(contents) if name in exact]
    np.testing.assert_allclose(answer["probabilities"][rows], expected(model, pixels), atol=1e-5)
    assert not answer["probabilities"][~answer["valid"]].any()
    others = [n for n in contents if not n.startswith(("PNG", "BMP", "GIF", "JPEG "))]
    assert not any(valid[name] for name in others if name != "JPEG, two frames (MPO)")


def eight_bits(name: str) -> np.ndarray:
    image = Image.open(io.BytesIO(image_files.FILES[name]()))
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image_files.as_decoded(name, image)


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
    """Returns `content` truncated, with changed bytes, or both."""
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
