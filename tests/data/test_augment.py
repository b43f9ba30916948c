"""RandAugment: every op against the original's output, the level table, and the random draws."""

from __future__ import annotations

import collections
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.data import augment, levels, randaugment

GOLDENS = Path(__file__).parents[1] / "goldens" / "randaugment"
UNKNOWN_SIZE = tf.TensorSpec([None, None, 3], tf.uint8)


def load(name):
    with np.load(GOLDENS / name) as arrays:
        return {key: arrays[key] for key in arrays.files}


def parse_call(call):
    """Parses `Op(1,name=2.5)` into ("Op", [1, 2.5])."""
    name, args = re.fullmatch(r"(\w+)\((.*)\)", call).groups()
    return name, [json.loads(arg.split("=")[-1]) for arg in args.split(",") if arg]


def single_op_cases():
    """Returns (op, args, image, expected) for every stored call of a single op."""
    cases = []
    for file in ("ops_noise_64x48.npz", "edge_cases.npz"):
        arrays = load(file)
        for key, expected in arrays.items():
            if key.startswith("input"):
                continue
            prefix, _, call = key.rpartition("|")
            image = arrays[f"input|{prefix}" if prefix else "input"]
            cases.append((*parse_call(call), image, expected))
    return cases


CASES = single_op_cases()


def pipeline_cases():
    """Returns (op, fields, expected) for every stored layer; fields are M, cutout_const, etc."""
    cases = []
    for key, expected in load("pipeline_synth_96x96.npz").items():
        if key != "input":
            name, *fields = key.split(",")
            cases.append((name, {f.split("=")[0]: int(f.split("=")[1]) for f in fields}, expected))
    return cases


@pytest.fixture(scope="module")
def synth():
    return tf.constant(load("pipeline_synth_96x96.npz")["input"])


def noise(height=40, width=56, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return tf.constant(pixels)


def example_args(name):
    args = levels.LEVEL_TO_ARGS[name](9, 4.0, 4.0)
    return args + ((11, 50) if name == "Cutout" else ())


# Ops.


def test_names():
    names = [
        "AutoContrast",
        "Equalize",
        "Invert",
        "Rotate",
        "Posterize",
        "Solarize",
        "Color",
        "Contrast",
        "Brightness",
        "Sharpness",
        "ShearX",
        "ShearY",
        "TranslateX",
        "TranslateY",
        "SolarizeAdd",
        "Cutout",
    ]
    assert list(randaugment.RANDAUGMENT_OPS) == names
    assert set(names) <= set(augment.OPS) == set(levels.LEVEL_TO_ARGS)


@pytest.mark.parametrize("name", randaugment.RANDAUGMENT_OPS)
def test_op_equals_original(name):
    cases = [case for case in CASES if case[0] == name]
    assert cases
    for _, args, image, expected in cases:
        result = augment.OPS[name](tf.constant(image), *args)
        assert result.dtype == tf.uint8
        np.testing.assert_array_equal(result, expected, err_msg=f"{name}{args}")


@pytest.mark.parametrize("name", sorted(levels.SIGNED_OPS))
def test_geometric_op_takes_a_tensor(name):
    for _, args, image, expected in [case for case in CASES if case[0] == name]:
        result = augment.OPS[name](tf.constant(image), tf.constant(args[0], tf.float32))
        np.testing.assert_array_equal(result, expected, err_msg=f"{name}{args}")


def test_every_execution_mode_gives_the_same():
    # The graph optimizer may reorder float operations once shapes are known; pixels stay the same.
    image = noise()

    def all_ops(image):
        return {n: op(image, *example_args(n)) for n, op in augment.OPS.items()}

    eager = all_ops(image)
    static = tf.data.Dataset.from_tensors(image).map(all_ops)
    from_bytes = tf.data.Dataset.from_tensors(tf.io.encode_png(image))
    unknown = from_bytes.map(lambda b: all_ops(tf.io.decode_png(b, channels=3)))
    results = {
        "static shape": next(iter(static)),
        "unknown shape": next(iter(unknown)),
    }
    for how, outputs in results.items():
        for name, output in outputs.items():
            np.testing.assert_array_equal(output, eager[name], err_msg=f"{name}: {how}")
    assert all(spec.shape == [40, 56, 3] for spec in static.element_spec.values())


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 2)])
def test_degenerate_images_keep_their_shape(shape):
    image = noise(*shape)
    for name, op in augment.OPS.items():
        args = levels.LEVEL_TO_ARGS[name](9, 4.0, 4.0) + ((0, 0) if name == "Cutout" else ())
        assert op(image, *args).shape == image.shape, name


def projected(image, coefficients):
    """Applies the first six coefficients of a projective transform to an image [H, W, 3]."""
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.convert_to_tensor(image)[tf.newaxis],
        transforms=tf.stack([*coefficients, 0.0, 0.0])[tf.newaxis],
        output_shape=image.shape[:2],
        fill_value=128.0,
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )[0]


def rotation(degrees, height, width):
    """Returns six coefficients; a separate test compares them with TensorFlow Addons'."""
    radians = tf.constant(degrees) * (np.pi / 180)
    return tf.unstack(augment._rotation(radians, float(height), float(width))[0])[:6]


def test_rotation_is_that_of_tensorflow_addons(rng):
    """Both agree bit for bit, including the rounding in a graph."""
    image = pytest.importorskip("tensorflow_addons").image
    addons = image.transform_ops.angles_to_projective_transforms
    radians = rng.uniform(-4, 4, 200).astype(np.float32)
    sizes = rng.integers(1, 1500, [200, 2]).astype(np.float32)
    signature = [tf.TensorSpec([], tf.float32)] * 3
    for ours, theirs in ((augment._rotation, addons),) + (
        tuple(tf.function(f, input_signature=signature) for f in (augment._rotation, addons)),
    ):
        for angle, (height, width) in zip(radians, sizes):
            numbers = [tf.constant(x) for x in (angle, height, width)]
            np.testing.assert_array_equal(ours(*numbers), theirs(*numbers), err_msg=str(numbers))


@pytest.mark.parametrize("axis", [0, 1])
def test_translation_equals_projective_transform(axis):
    image = noise(9, 12)
    op = augment.OPS["TranslateY" if axis == 0 else "TranslateX"]
    for pixels in np.arange(-14, 14.5, 0.25, np.float32):
        coefficients = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        coefficients[5 if axis == 0 else 2] = pixels
        expected = projected(image, coefficients)
        np.testing.assert_array_equal(op(image, pixels), expected, err_msg=str(pixels))


SHAPES = [(1, 1), (1, 9), (8, 1), (33, 20), (20, 33)]


def in_both_shapes(function, image):
    """Yields the result with a known size, and in a graph with an unknown size."""
    yield function(image).numpy()
    yield tf.function(function, input_signature=[UNKNOWN_SIZE])(image).numpy()


@functools.cache
def compiled(op):
    """Compiles an op into a graph that knows neither the size nor the level."""
    return tf.function(augment.OPS[op], input_signature=[UNKNOWN_SIZE, tf.TensorSpec([])])


@pytest.mark.parametrize("shape", SHAPES)
def test_warps_equal_projective_transform(shape):
    image = noise(*shape)
    # At levels 0.5 and 1, sources fall exactly between pixels.
    for level in (-0.81, -0.5, 0.0, 0.09, 1.0):
        for op, coefficients in (
            ("ShearX", (1.0, level, 0.0, 0.0, 1.0, 0.0)),
            ("ShearY", (1.0, 0.0, 0.0, level, 1.0, 0.0)),
        ):
            expected = projected(image, coefficients)
            for result in (augment.OPS[op](image, level), compiled(op)(image, level)):
                np.testing.assert_array_equal(result, expected, err_msg=f"{op}({level})")
    for degrees in (-90.0, -81.0, -45.0, 0.0, 7.5, 90.0):
        expected = projected(image, rotation(degrees, *shape))
        for result in (augment.OPS["Rotate"](image, degrees), compiled("Rotate")(image, degrees)):
            np.testing.assert_array_equal(result, expected, err_msg=f"Rotate({degrees})")


def test_warps_of_the_usual_size_equal_projective_transform():
    image = noise(224, 224)
    for magnitude in (1, 5, 9, 10, 20, 27, 30):
        for sign in (-1, 1):
            level = tf.constant(sign * magnitude / 10 * 0.3, tf.float32)
            coefficients = [1.0, level, 0.0, 0.0, 1.0, 0.0]
            np.testing.assert_array_equal(
                augment.OPS["ShearX"](image, level),
                projected(image, coefficients),
            )
            degrees = tf.constant(sign * magnitude * 3.0)
            np.testing.assert_array_equal(
                augment.OPS["Rotate"](image, degrees),
                projected(image, rotation(degrees, 224, 224)),
            )


def pil_equalize(channel):
    """Equalizes with the loop of Pillow's ImageOps.equalize."""
    histogram = np.bincount(channel.ravel(), minlength=256)
    occupied = histogram[histogram > 0]
    step = (occupied.sum() - occupied[-1]) // 255
    if not step:
        return channel
    table, n = [], step // 2
    for count in histogram:
        table.append(min(n // step, 255))
        n += count
    return np.array(table, np.uint8)[channel]


# The last shapes take the path that looks up pairs of values.
@pytest.mark.parametrize("shape", [*SHAPES, (200, 131), (128, 128), (129, 130)])
def test_equalize_and_auto_contrast_follow_their_definition(shape):
    flat = np.full((*shape, 3), 7, np.uint8)
    narrow = noise(*shape).numpy() // [4, 16, 1]
    # Each channel has a different distribution, so that mixed-up channels are detected.
    for image in (noise(*shape).numpy(), narrow.astype(np.uint8), flat):
        expected = np.stack([pil_equalize(image[..., c]) for c in range(3)], axis=-1)
        for result in in_both_shapes(augment.OPS["Equalize"], tf.constant(image)):
            np.testing.assert_array_equal(result, expected)

        low, high = image.min((0, 1)), image.max((0, 1))
        for result in in_both_shapes(augment.OPS["AutoContrast"], tf.constant(image)):
            for c in range(3):
                if low[c] == high[c]:
                    np.testing.assert_array_equal(result[..., c], image[..., c])
                else:
                    scale = np.float32(255) / (np.float32(high[c]) - np.float32(low[c]))
                    stretched = image[..., c] * scale + -np.float32(low[c]) * scale
                    np.testing.assert_array_equal(
                        result[..., c], np.clip(stretched, 0, 255).astype(np.uint8)
                    )


def test_solarize_for_all_values():
    levels_ = np.arange(256)
    image = tf.constant(np.repeat(levels_[None, :, None], 3, axis=2).astype(np.uint8))
    for threshold in range(-5, 700, 3):
        expected = np.where(levels_ >= threshold % 256, 255 - levels_, levels_)
        result = augment.OPS["Solarize"](image, threshold)
        np.testing.assert_array_equal(result[0, :, 0], expected, err_msg=str(threshold))
    for addition in range(-300, 301, 4):
        for threshold in (0, 1, 128, 255):
            expected = np.where(levels_ < threshold, np.clip(levels_ + addition, 0, 255), levels_)
            result = augment.OPS["SolarizeAdd"](image, addition, threshold)
            np.testing.assert_array_equal(result[0, :, 0], expected, err_msg=str(addition))


def test_blends_follow_their_definition_for_all_pairs_of_value_and_gray():
    def blend(degenerate, image, factor):
        degenerate, image = np.float32(degenerate), np.float32(image)
        return np.clip(degenerate + np.float32(factor) * (image - degenerate), 0, 255)

    # One channel and the other two take all pairs of values, so each value of a channel meets every
    # gray level possible with it: a step of the others changes gray by less than one.
    value, others = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    channels = [[value if c == one else others for c in range(3)] for one in range(3)]
    image = np.concatenate([np.stack(planes, axis=-1) for planes in channels])
    gray = tf.image.rgb_to_grayscale(image).numpy()
    for magnitude in (0, 3, 9, 27, 30):
        factor = magnitude / 10 * 1.8 + 0.1
        for name, degenerate in (("Color", gray), ("Brightness", 0), ("Contrast", 255)):
            if factor != 1:
                expected = blend(degenerate, image, factor).astype(np.uint8)
                for result in in_both_shapes(
                    lambda x, name=name, factor=factor: augment.OPS[name](x, factor),
                    tf.constant(image),
                ):
                    np.testing.assert_array_equal(result, expected, err_msg=f"{name}({factor})")


def test_contrast_of_a_large_image_blends_towards_white():
    black = tf.zeros([270, 272, 3], tf.uint8)
    np.testing.assert_array_equal(augment.OPS["Contrast"](black, 0.5), 127)  # 255 / 2, not 286 / 2
    np.testing.assert_array_equal(augment.OPS["Contrast"](noise(32, 32), 0.0), 4)


# Levels.


def test_level_table_equals_original():
    entries = json.loads((GOLDENS / "level_to_arg.json").read_text())
    assert {entry["op"] for entry in entries} == set(randaugment.RANDAUGMENT_OPS)
    for entry in entries:
        constants = entry["magnitude"], entry["cutout_const"], entry["translate_const"]
        args = levels.LEVEL_TO_ARGS[entry["op"]](*constants)
        assert list(args) == entry["args"], entry
        assert [type(arg) for arg in args] == [type(arg) for arg in entry["args"]], entry


@pytest.mark.parametrize("name", randaugment.RANDAUGMENT_OPS)
def test_layer_at_level_equals_original(name, synth):
    cases = [case for case in pipeline_cases() if case[0] == name]
    assert cases
    for _, fields, expected in cases:
        constants = fields["M"], fields["cutout_const"], fields["translate_const"]
        args = levels.LEVEL_TO_ARGS[name](*constants)
        if "sign" in fields:
            args = (fields["sign"] * args[0],)
        if "cy" in fields:
            args += (fields["cy"], fields["cx"])
        np.testing.assert_array_equal(
            augment.OPS[name](synth, *args), expected, err_msg=str(fields)
        )


# RandAugment.


@pytest.mark.parametrize("name", sorted(set(randaugment.RANDAUGMENT_OPS) - {"Cutout"}))
def test_rand_augment_applies_the_op_at_its_level(name, synth, monkeypatch):
    monkeypatch.setattr(randaugment, "RANDAUGMENT_OPS", (name,))
    # At this level, Translate moves the whole image out of the frame with either sign.
    expected = {case[2].tobytes() for case in pipeline_cases() if case[0] == name}
    run = tf.function(
        lambda seed: randaugment.rand_augment(synth, seed, num_layers=1, magnitude=27)
    )
    results = {run(tf.constant([seed, 0])).numpy().tobytes() for seed in range(12)}
    assert results == expected


@pytest.mark.parametrize("use_cutout", [True, False])
def test_each_layer_runs_exactly_one_op_drawn_uniformly(use_cutout, monkeypatch):
    runs, layers, height, width = 400, 3, 8, 24
    calls, sequence = collections.defaultdict(list), []

    def recording(name):
        def op(image, *args):
            def record(image, *args):
                calls[name].append([float(arg) for arg in args])
                sequence.append((name, *np.sign(args[:1])))
                return image

            return tf.numpy_function(record, [image, *args], tf.uint8)

        return op

    monkeypatch.setattr(augment, "OPS", {name: recording(name) for name in augment.OPS})
    image = tf.zeros([height, width, 3], tf.uint8)
    dataset = tf.data.Dataset.range(runs).map(
        lambda i: randaugment.rand_augment(
            image,
            tf.stack([i, 7]),
            num_layers=layers,
            magnitude=9,
            use_cutout=use_cutout,
        )
    )
    assert sum(1 for _ in dataset) == runs

    expected_ops = randaugment.RANDAUGMENT_OPS[: 16 if use_cutout else 15]
    assert set(calls) == set(expected_ops)
    assert sum(map(len, calls.values())) == runs * layers
    # Layers draw independently: op and sign match those of the previous layer only by chance.
    pairs = [pair for i, pair in enumerate(zip(sequence, sequence[1:])) if (i + 1) % layers]
    assert sum(before[0] == after[0] for before, after in pairs) < len(pairs) / 8
    signs = [(b[1], a[1]) for b, a in pairs if {b[0], a[0]} <= levels.SIGNED_OPS]
    assert 0.3 < np.mean([before == after for before, after in signs]) < 0.7

    mean = runs * layers / len(expected_ops)
    for name, args in calls.items():
        assert abs(len(args) - mean) < 4 * mean**0.5, name
        expected = levels.LEVEL_TO_ARGS[name](9, 40.0, 100.0)
        np.testing.assert_allclose(
            [np.abs(a[: len(expected)]) for a in args], [expected] * len(args)
        )
        if name in levels.SIGNED_OPS:
            negative = sum(a[0] < 0 for a in args)
            assert abs(negative - len(args) / 2) < 2 * mean**0.5, name
        elif expected:
            assert all(a[0] > 0 for a in args)
    if use_cutout:
        _, rows, columns = np.array(calls["Cutout"]).T
        assert set(rows) == set(range(height))
        assert columns.min() >= 0 and columns.max() < width
        assert len(set(zip(rows, columns))) > width, "row and column are drawn apart"


def test_rand_augment_depends_on_the_seed_alone(synth):
    @tf.function
    def run(seed):
        return randaugment.rand_augment(synth, seed, num_layers=2, magnitude=9)

    results = [run(tf.constant([i, 5], tf.int64)).numpy() for i in range(20)]
    again = [run(tf.constant([i, 5], tf.int64)).numpy() for i in range(20)]
    np.testing.assert_array_equal(results, again)
    assert len({result.tobytes() for result in results}) > 15

    eager = randaugment.rand_augment(synth, tf.constant([3, 5]), num_layers=2, magnitude=9)
    np.testing.assert_array_equal(eager, results[3])


def test_no_layers_leave_the_image_alone(synth):
    np.testing.assert_array_equal(
        randaugment.rand_augment(synth, [1, 2], num_layers=0, magnitude=9), synth
    )


def test_rand_augment_keeps_the_static_shape(monkeypatch):
    monkeypatch.setattr(randaugment, "RANDAUGMENT_OPS", ("Rotate", "Equalize", "Cutout"))

    def element_spec(shape):
        dataset = tf.data.Dataset.from_generator(
            lambda: iter(()), output_signature=tf.TensorSpec(shape, tf.uint8)
        )
        return dataset.map(
            lambda image: randaugment.rand_augment(image, [1, 2], num_layers=1, magnitude=9)
        ).element_spec

    for shape in ([40, 56, 3], [None, None, 3]):
        assert element_spec(shape) == tf.TensorSpec(shape, tf.uint8)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'sane' is unknown; allowed: original, clipped"):
        randaugment.rand_augment(noise(), [1, 2], num_layers=1, magnitude=9, mode="sane")


@pytest.mark.parametrize(
    "name, magnitude, keeps_image",
    [
        ("Solarize", 27, True),
        ("Solarize", 10, True),
        ("Posterize", 27, True),
        ("Posterize", 0, False),
    ],
)
def test_clipped_mode_does_not_wrap(name, magnitude, keeps_image, monkeypatch):
    monkeypatch.setattr(randaugment, "RANDAUGMENT_OPS", (name,))
    image = noise()

    def run(mode):
        return randaugment.rand_augment(image, [1, 2], num_layers=1, magnitude=magnitude, mode=mode)

    assert np.array_equal(run("clipped"), image) == keeps_image
    assert not np.array_equal(run("original"), image)


def test_clipped_mode_limits_the_arguments():
    text = randaugment.RandAugment(num_layers=2, magnitude=27, mode="clipped").describe()
    assert text.startswith("randaugment(N=2, M=27, mode=clipped): ")
    for op in (
        "Posterize(8)",
        "Solarize(256)",
        "SolarizeAdd(128)",
        "TranslateX(±100.0)",
        "TranslateY(±100.0)",
        "Cutout(40)",
        "Rotate(±81.0)",
        "Color(4.96)",
    ):
        assert op in text
    low = randaugment.RandAugment(num_layers=1, magnitude=1, mode="clipped").describe()
    assert "Posterize(1)" in low


def test_modes_agree_in_range():
    kwargs = {"num_layers": 2, "magnitude": 9}
    image = noise()
    for seed in range(10):
        original, clipped = (
            randaugment.rand_augment(image, [seed, 0], mode=mode, **kwargs) for mode in levels.MODES
        )
        np.testing.assert_array_equal(original, clipped)


def test_description_names_the_effective_arguments():
    text = randaugment.RandAugment(num_layers=2, magnitude=27).describe()
    assert text.startswith(
        "randaugment(N=2, M=27): AutoContrast, Equalize, Invert, Rotate(±81.0), "
    )
    for op in ("Posterize(10→1)", "Solarize(691→179)", "Color(4.96)", "Cutout(108)"):
        assert op in text
    without = randaugment.RandAugment(num_layers=2, magnitude=27, use_cutout=False).describe()
    assert "Cutout" not in without


# Cutout.


def test_cutout_grays_a_random_square():
    image = tf.zeros([32, 32, 3], tf.uint8)
    run = tf.function(lambda seed: augment.cutout(image, seed, 8))
    boxes = []
    for seed in range(300):
        result = run(tf.constant([seed, 0])).numpy()
        rows, columns = np.nonzero(result[..., 0])
        top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
        boxes.append((top, left, bottom, right))
        square = np.zeros_like(result)
        square[top:bottom, left:right] = 128
        np.testing.assert_array_equal(result, square)
    tops, lefts, bottoms, rights = np.array(boxes).T
    # Of 32 equally likely centers, 0..8 give squares at the first border, 24..31 at the last.
    for first, last in ((tops, bottoms), (lefts, rights)):
        assert abs(np.mean(first == 0) - 9 / 32) < 0.1
        assert abs(np.mean(last == 32) - 8 / 32) < 0.1
        assert (last - first).max() == 16 and (last - first).min() >= 8
    assert len(set(boxes)) > 150
    np.testing.assert_array_equal(run(tf.constant([5, 0])), run(tf.constant([5, 0], tf.int64)))
