"""AutoAugment: the published tables, and how often and with which arguments each op runs."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.config import Config, ConfigError
from efficientnet_ns.data import augment, autoaugment, levels, pipeline
from efficientnet_ns.resolve.resolved_config import ResolvedConfig


@pytest.fixture
def image():
    return tf.constant(np.random.default_rng(0).integers(0, 256, (20, 28, 3), np.uint8))


@pytest.mark.parametrize(
    "policy, first, last, ops",
    [
        (
            "imagenet",
            (("Equalize", 0.8, 1), ("ShearY", 0.8, 4)),
            (("Color", 0.8, 6), ("Rotate", 0.4, 5)),
            {"Equalize": 12, "Color": 9, "Rotate": 7, "Solarize": 8, "SolarizeAdd": 2, "Invert": 1}
            | {"ShearX": 2, "ShearY": 4, "TranslateY": 1, "Posterize": 2, "AutoContrast": 2},
        ),
        (
            "svhn",
            (("ShearX", 0.9, 4), ("Invert", 0.2, 3)),
            (("ShearX", 0.7, 2), ("Invert", 0.1, 5)),
            {"Invert": 12, "ShearY": 8, "ShearX": 6, "Equalize": 6, "Solarize": 5, "Rotate": 4}
            | {"TranslateY": 4, "AutoContrast": 3, "Contrast": 1, "TranslateX": 1},
        ),
        (
            "cifar10",
            (("Invert", 0.1, 7), ("Contrast", 0.2, 6)),
            (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 1)),
            {"Equalize": 9, "AutoContrast": 7, "Sharpness": 5, "TranslateY": 5, "Color": 5}
            | {"Brightness": 4, "Invert": 3, "Solarize": 4, "Contrast": 2, "ShearY": 2}
            | {"TranslateX": 2, "Rotate": 1, "Posterize": 1},
        ),
    ],
)
def test_policies(policy, first, last, ops):
    sub_policies = autoaugment.POLICIES[policy]
    assert len(sub_policies) == 25 and {len(sub) for sub in sub_policies} == {2}
    assert sub_policies[0] == first and sub_policies[-1] == last
    assert collections.Counter(name for sub in sub_policies for name, _, _ in sub) == ops
    for name, probability, level in (op for sub in sub_policies for op in sub):
        assert name in augment.OPS and 0 <= level <= 10
        assert 0 <= probability <= 1 and round(probability, 1) == probability


def expected_argument(name, level, translate_const):
    """Computes an argument from a level as the papers' code does, in plain arithmetic."""
    fraction = level / 10
    return {
        "Rotate": 30 * fraction,
        "ShearX": 0.3 * fraction,
        "ShearY": 0.3 * fraction,
        "TranslateX": translate_const * fraction,
        "TranslateY": translate_const * fraction,
        "Posterize": int(4 * fraction),
        "Solarize": int(256 * fraction),
        "SolarizeAdd": int(110 * fraction),
    }.get(name, 1.8 * fraction + 0.1)


@pytest.mark.parametrize("policy", autoaugment.POLICIES)
def test_each_op_runs_with_its_probability_and_argument(policy, monkeypatch):
    """Each sub-policy runs alone, with ops that record calls instead of changing the image."""
    calls = []

    def recording(name):
        def op(image, *args):
            def record(image, *args):
                calls.append((name, *map(float, args)))
                return image

            return tf.numpy_function(record, [image, *args], tf.uint8)

        return op

    monkeypatch.setattr(augment, "OPS", {name: recording(name) for name in augment.OPS})
    image = tf.zeros([4, 4, 3], tf.uint8)
    for sub in autoaugment.POLICIES[policy][::4]:
        monkeypatch.setitem(autoaugment.POLICIES, "alone", (sub,))
        calls.clear()
        runs = 120
        data = tf.data.Dataset.range(runs).map(
            lambda i: autoaugment.auto_augment(
                image, tf.stack([i, 3]), policy="alone", translate_const=10.0
            )
        )
        assert sum(1 for _ in data) == runs
        expected = collections.Counter()
        for name, probability, _ in sub:
            expected[name] += probability * runs
        ran = collections.Counter(name for name, *_ in calls)
        for name, mean in expected.items():
            certain = all(p in (0, 1) for n, p, _ in sub if n == name)
            assert abs(ran[name] - mean) <= (0 if certain else 4 * (runs / 4) ** 0.5 * 1.5), name
        assert set(ran) <= set(expected)
        arguments = {
            (name, round(expected_argument(name, level, 10.0), 4)) for name, _, level in sub
        }
        for name, *args in calls:
            if args:
                assert (name, round(abs(args[0]), 4)) in arguments
            if name in levels.SIGNED_OPS and expected[name] > 60 and args[0]:
                signs = [call[1] < 0 for call in calls if call[0] == name]
                assert 0.2 < np.mean(signs) < 0.8


def test_sub_policies_are_drawn_uniformly(image, monkeypatch):
    # Each sub-policy solarizes above a different threshold, so the result identifies it.
    subs = tuple(((("Solarize", 1.0, level)), ("Invert", 0.0, 0)) for level in range(1, 10))
    monkeypatch.setitem(autoaugment.POLICIES, "marked", subs)
    outcomes = {
        augment.solarize(image, int(level / 10 * 256)).numpy().tobytes(): level
        for level in range(1, 10)
    }
    run = tf.function(lambda seed: autoaugment.auto_augment(image, seed, policy="marked"))
    counts = collections.Counter(
        outcomes[run(tf.constant([seed, 0])).numpy().tobytes()] for seed in range(450)
    )
    assert set(counts) == set(range(1, 10))
    assert all(abs(count - 50) < 4 * 50**0.5 for count in counts.values())


def test_depends_on_the_seed_alone(image):
    def apply(seed):
        return autoaugment.auto_augment(image, seed, policy="svhn", translate_const=10.0)

    seeds = [tf.constant([seed, 5], tf.int64) for seed in range(12)]
    mapped = tf.data.Dataset.from_tensor_slices(seeds).map(apply)
    results = [result.numpy() for result in mapped]
    np.testing.assert_array_equal([apply(seed) for seed in seeds], results)  # Eagerly.
    assert mapped.element_spec == tf.TensorSpec([20, 28, 3], tf.uint8)
    np.testing.assert_array_equal(list(mapped), results)
    assert len({result.tobytes() for result in results}) > 6


def test_description():
    text = autoaugment.AutoAugment(policy="imagenet").describe()
    assert text.startswith(
        "autoaugment(imagenet): 0.8 Equalize + 0.8 ShearY(±0.12) | 0.4 Color(1.72) + 0.6 Equalize |"
    )
    assert "0.8 Posterize(0→1) + 0.6 Solarize(256→0)" in text and "TranslateY(±225.0)" in text
    assert text.count("|") == 24
    clipped = autoaugment.AutoAugment(policy="imagenet", mode="clipped").describe()
    assert "(imagenet, mode=clipped)" in clipped and "Solarize(256)" in clipped


def test_unknown_names_are_refused(image):
    with pytest.raises(
        ValueError, match="policy 'v9' is unknown; allowed: imagenet, svhn, cifar10"
    ):
        autoaugment.auto_augment(image, [1, 2], policy="v9")
    with pytest.raises(ValueError, match="mode 'sane' is unknown"):
        autoaugment.auto_augment(image, [1, 2], mode="sane")


@pytest.mark.parametrize(
    "task, policy, expected",
    [
        ("imagenet", None, "imagenet"),
        ("svhn", None, "svhn"),
        ("svhn", "cifar10", "cifar10"),
        ("imagenet", "svhn", "svhn"),
    ],
)
def test_policy_by_task_or_flag(task, policy, expected):
    config = Config().override(
        task_name=task, augment_name="autoaugment", autoaugment_policy=policy
    )
    preprocessing = ResolvedConfig.from_config(config).preprocessing("autoaugment")
    assert preprocessing.augmentation == pipeline.AutoAugment(expected)


def test_preprocessing_applies_and_describes_it(monkeypatch):
    encoded = tf.io.encode_png(np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8))
    noise = pipeline.AutoAugment("svhn")
    for small, size, reach in ((False, 24, 250.0), (True, 32, 10.0)):
        preprocessing = pipeline.Preprocessing(size, small, augmentation=noise)
        assert noise.constants(size, small) == {"translate_const": reach}
        result = preprocessing.train(encoded, tf.constant([3, 4]))
        assert result.dtype == tf.uint8 and result.shape == [size, size, 3]
        text = preprocessing.describe()
        assert autoaugment.AutoAugment("svhn").describe(reach) in text
        assert "\n" not in text
    assert pipeline.Preprocessing(24).describe() == "random crop to 24 px; flip"
    assert "no augmentation" in pipeline.Preprocessing(24, clean=True).describe()
    small = pipeline.Preprocessing(32, True, flip=False, augmentation=pipeline.RandAugment(1, 5))
    assert small.describe().startswith("randaugment(N=1, M=5): ")
    assert small.describe().endswith("; cutout(8); shift(±4)")


@pytest.mark.parametrize(
    "policy",
    [
        pipeline.RandAugment(3, 9, "clipped", use_cutout=False),
        pipeline.RandAugment(2, 27),
        pipeline.AutoAugment("svhn", "clipped"),
        pipeline.AutoAugment(),
    ],
)
def test_policy_is_given_as_the_log_prints_it(policy):
    """The list of operations is optional; the text works for labeled and unlabeled images."""
    for text in (str(policy), policy.describe(**policy.constants(224, False))):
        config = Config().override(augment_name=text, unl_aug=text, randaug_mag=1)
        resolved = ResolvedConfig.from_config(config)
        assert resolved.labeled_preprocessing.augmentation == policy
        assert text in resolved.unlabeled_preprocessing.describe()


@pytest.mark.parametrize(
    "text, message",
    [
        ("randaugment(N=2)", "known forms: randaugment, v1"),
        ("randaugment(N=2, M=27, mode=sane)", "known forms"),
        ("autoaugment(v9)", "known forms"),
        ("randaugment(N=2, M=27): Invert", "operations listed"),
    ],
)
def test_policies_that_are_none_are_refused(text, message):
    resolved = ResolvedConfig.from_config(Config().override(augment_name=text))
    with pytest.raises(ConfigError, match=message):
        assert resolved.labeled_preprocessing
