"""Robustness on small folders in the published layouts, compared with independent definitions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from efficientnet_ns.data import tasks
from efficientnet_ns.evaluation import robustness
from efficientnet_ns.evaluation import robustness_metrics as metrics
from efficientnet_ns.evaluation import robustness_published as published
from efficientnet_ns.evaluation import robustness_sets as sets
from efficientnet_ns.evaluation import robustness_sources as sources
from efficientnet_ns.files import manifests
from efficientnet_ns.files.errors import DataError

WNIDS = ["n01440764", "n01443537", "n01484850"]
CORRUPTIONS = [
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
]


def classify(images):
    """A "model" that predicts one of the first six classes from a hash of the file."""
    probs = np.zeros([len(images), 1000], np.float32)
    for row, image in zip(probs, images):
        row[:6] = np.random.default_rng(list(image)).dirichlet(np.ones(6))
    return probs, {}


def write(folder, count):
    folder.mkdir(parents=True)
    for i in range(count):
        # Images need not be readable, as this model only looks at the bytes.
        content = hashlib.sha256(f"{i} {folder}".encode()).digest()[:16]
        (folder / f"{i:03d}.JPEG").write_bytes(content)


@pytest.fixture
def evaluation(tmp_path):
    return robustness.Evaluation(classify, 4, str(tmp_path / "parts"), {"weights": "w"})


@pytest.fixture
def three_classes(monkeypatch):
    """Reduces ImageNet to three classes, so that whole sets are small."""
    monkeypatch.setattr(tasks, "wnids", lambda name="imagenet": WNIDS)


@pytest.fixture
def imagenet_c(tmp_path, three_classes):
    root = tmp_path / "c"
    for name in [*CORRUPTIONS, "saturate"]:
        for severity in "12345":
            for number, wnid in enumerate(WNIDS):
                write(root / name / severity / wnid, number + 1)
    return root


def corruptions(evaluation, root, **options):
    return evaluation.corruptions(sources.open_corruptions(str(root), **options))


def answer(path) -> int:
    return int(classify([path.read_bytes()])[0][0].argmax())


def test_wnids_are_those_of_the_names():
    wnids = tasks.wnids()
    assert list(wnids) == sorted(set(wnids)) and len(wnids) == 1000 == len(
        tasks.class_names("imagenet")
    )
    assert (wnids[0], wnids[1], wnids[999]) == ("n01440764", "n01443537", "n15075141")


def test_mce_as_defined(evaluation, imagenet_c):
    alexnet = dict(
        zip(
            CORRUPTIONS,
            [0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816]
            + [0.826572, 0.819324, 0.564592, 0.853204, 0.646056, 0.717840, 0.606500],
        )
    )
    result = corruptions(evaluation, imagenet_c)
    relative = {}
    for name, divisor in alexnet.items():
        errors = []
        for severity in "12345":
            wrong = [
                answer(file) != label
                for label, wnid in enumerate(WNIDS)
                for file in (imagenet_c / name / severity / wnid).iterdir()
            ]
            assert len(wrong) == 6
            errors.append(sum(wrong) / len(wrong))
        relative[name] = sum(errors) / divisor / 5
    assert result["mce"] == pytest.approx(sum(relative.values()) / 15)
    assert {n: result["ce"][n] for n in relative} == pytest.approx(relative)
    assert "saturate" in result["ce"], "the extra ones are reported, and are not in the mean"
    row = robustness.rows({"imagenet-c": result}, 224)[0]
    assert row["measured"] == round(100 * result["mce"], 1)
    assert (row["EfficientNet-L2"], row["Noisy Student L2"]) == (47.5, 30.0)


def test_order_of_corruptions_does_not_matter():
    errors = {name: 0.1 + 0.05 * i for i, name in enumerate(CORRUPTIONS)}
    backwards = dict(reversed(errors.items()))
    assert metrics.mean_corruption_error(errors) == metrics.mean_corruption_error(backwards)
    assert metrics.mean_corruption_error(metrics.ALEXNET_ERROR) == pytest.approx(1)
    with pytest.raises(ValueError, match="missing: snow"):
        metrics.mean_corruption_error({n: e for n, e in errors.items() if n != "snow"})
    with pytest.raises(ValueError, match="unknown corruption snwo"):
        metrics.corruption_errors({"snwo": 0.5})


def test_finished_parts_are_kept(imagenet_c, tmp_path):
    calls = []

    def counted(images):
        calls.append(len(images))
        if len(calls) > 20:
            raise KeyboardInterrupt
        return classify(images)

    def start(model, weights="w"):
        folder = str(tmp_path / "parts")
        evaluation = robustness.Evaluation(model, 6, folder, {"weights": weights})
        return corruptions(evaluation, imagenet_c)

    with pytest.raises(KeyboardInterrupt):
        start(counted)
    calls_before, rest = len(calls) - 1, []
    resumed = start(lambda images: (rest.append(len(images)), classify(images))[1])
    assert calls_before == 20 and len(rest) == 16 * 5 - 20
    whole = robustness.Evaluation(classify, 6, str(tmp_path / "other"), {})
    assert resumed == corruptions(whole, imagenet_c)
    with pytest.raises(manifests.OutputConflict, match="weights"):
        start(classify, weights="others")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: shutil.rmtree(c / "fog"), r"1 missing parts .*fog"),
        (lambda c: shutil.rmtree(c / "fog/3"), r"fog: 1 missing parts .*: 3"),
        (lambda c: shutil.rmtree(c / "fog/3" / WNIDS[1]), rf"3: 1 of 3 classes .*{WNIDS[1]}"),
        (lambda c: (c / "fog/3/n99999999").mkdir(), r"3: 1 unknown class folders: n99999999"),
        (lambda c: (c / "smoke").mkdir(), r"unknown parts: smoke"),
        (lambda c: (c / "fog/6").mkdir(), r"fog: 1 unknown parts: 6"),
        (lambda c: (c / "fog/3" / WNIDS[0] / "000.JPEG").unlink(), rf"without images: {WNIDS[0]}"),
        (lambda c: [shutil.rmtree(d) for d in (c / "fog/3").iterdir()], "has no class folders"),
        (lambda c: [shutil.rmtree(d) for d in c.iterdir()], "15 missing parts"),
        (lambda c: shutil.rmtree(c), "is not a folder"),
    ],
)
def test_wrong_trees_are_refused(imagenet_c, change, message):
    change(imagenet_c)
    with pytest.raises(DataError, match=message):
        sources.open_corruptions(str(imagenet_c))


def test_every_set_that_is_not_there_is_named(tmp_path):
    from efficientnet_ns.evaluation import robustness_program

    there = tmp_path / "a"
    there.mkdir()
    given = {
        "imagenet_a": str(there),
        "imagenet_r": "no-r",
        "imagenet_v2": "tfds:x",
        "imagenet_c": "c",
    }
    with pytest.raises(DataError, match=r": --imagenet_r=no-r, --imagenet_c=c$"):
        robustness_program._open(given, False, None)


def test_parts_of_different_classes_are_refused_even_with_missing_ones(imagenet_c):
    shutil.rmtree(imagenet_c / "fog/3" / WNIDS[1])
    with pytest.raises(DataError, match=rf"fog/3: 1 missing classes: {WNIDS[1]}"):
        sources.open_corruptions(str(imagenet_c), allow_missing=True)


def test_all_thousand_classes_are_needed(tmp_path):
    write(tmp_path / "v2" / "7", 1)
    for name in CORRUPTIONS:
        for severity in "12345":
            for wnid in WNIDS:
                write(tmp_path / "c" / name / severity / wnid, 1)
    expected = r"997 of 1000 classes are missing \(--allow_missing.*: n01491361, n01494475"
    with pytest.raises(DataError, match=expected):
        sources.open_corruptions(str(tmp_path / "c"))
    assert len(sources.open_corruptions(str(tmp_path / "c"), allow_missing=True)) == 75
    for name in ("imagenet-sketch", "imagenet-v2", "imagenet-a", "imagenet-r"):
        classes = sets.classes_of(name)
        one = tmp_path / name / list(classes)[2]
        write(one, 2)
        message = rf"{name}: {len(classes) - 1} of {len(classes)} classes .*: {list(classes)[0]}, "
        with pytest.raises(DataError, match=message):
            sources.open_images(str(tmp_path / name), classes)
        found = sources.open_images(str(tmp_path / name), classes, allow_missing=True)
        assert found.classes == [list(classes.values())[2]]
    assert sources.open_images(str(tmp_path / "v2"), sets.classes_of("imagenet-v2"), None, True)


def test_classes_of_the_subsets():
    """Checks lengths, ends and sums of the authors' lists."""
    a, r = (list(sets.classes_of(name).values()) for name in ("imagenet-a", "imagenet-r"))
    assert len(a) == len(r) == 200 and a == sorted(set(a)) and r == sorted(set(r))
    assert a[:6] == [6, 11, 13, 15, 17, 22] and a[-4:] == [984, 986, 987, 988]
    assert r[:6] == [1, 2, 4, 6, 8, 9] and r[-4:] == [980, 981, 983, 988]
    assert (sum(a), sum(r)) == (102178, 86135)


def test_a_class_of_imagenet_that_the_subset_has_not(tmp_path):
    write(tmp_path / "a" / WNIDS[0], 1)
    write(tmp_path / "a" / "n01498041", 1)
    with pytest.raises(DataError, match=f"1 unknown class folders: {WNIDS[0]}"):
        sources.open_images(str(tmp_path / "a"), sets.classes_of("imagenet-a"), None, True)


def test_partial_results_have_no_mean(evaluation, imagenet_c):
    shutil.rmtree(imagenet_c / "fog")
    result = corruptions(evaluation, imagenet_c, allow_missing=True)
    assert "mce" not in result and "fog" not in result["ce"] and len(result["ce"]) == 15
    assert robustness.rows({"imagenet-c": result}, 224)[0]["measured"] is None


def test_subset_of_classes(evaluation, tmp_path):
    """Only the set's classes can be predicted."""
    root, kept = tmp_path / "a", [0, 2]
    for label in kept:
        write(root / WNIDS[label], 9)
    images = sources.open_images(str(root), {WNIDS[label]: label for label in kept})
    result = evaluation.accuracy("imagenet-a", images, among=kept)
    right = []
    for label in kept:
        for file in (root / WNIDS[label]).iterdir():
            row = classify([file.read_bytes()])[0][0]
            right.append(max(kept, key=lambda c: row[c]) == label)
    expected = {"top1": pytest.approx(np.mean(right)), "top5": 1.0, "examples": 18, "classes": 2}
    assert result == expected
    everything = evaluation.accuracy("all", images)
    assert everything["top1"] < result["top1"]


def test_crops_go_to_the_model_for_whole_pictures(tmp_path):
    """Images of -C and -P are already cropped; all others must be cropped."""
    asked = []

    def model(name):
        def answer(pictures):
            asked.append(name)
            return classify(pictures)

        return answer

    parts = str(tmp_path / "parts")
    evaluation = robustness.Evaluation(model("crop"), 99, parts, {}, model("whole"))
    images = {}
    for place in ("c", "a"):
        write(tmp_path / place / WNIDS[0], 2)
        images[place] = sources.open_images(str(tmp_path / place), sets.classes_of(), None, True)
    evaluation.accuracy("imagenet-a", images["a"])
    evaluation.corruptions({("fog", s): images["c"] for s in "12345"})
    write(tmp_path / "p" / "tilt" / WNIDS[0] / "clip", 2)
    evaluation.perturbations(sources.open_perturbations(str(tmp_path / "p"), allow_missing=True))
    assert asked == ["crop", *["whole"] * 6]


def test_ten_views_are_crops():
    from efficientnet_ns.config import ConfigError
    from efficientnet_ns.inference.teacher import TeacherPredictor

    predictor = TeacherPredictor.__new__(TeacherPredictor)
    predictor._views = 10
    with pytest.raises(ConfigError, match="--test_time_views=10: these images are already crops"):
        predictor.of_whole_images()


def test_top5_of_a_subset_as_counted(tmp_path):
    """The top 5 among eight allowed classes of twelve, one image at a time."""
    wnids, kept = tasks.wnids()[:12], [0, 1, 3, 4, 6, 8, 9, 11]

    def many(images):
        probs = np.zeros([len(images), 1000], np.float32)
        for row, image in zip(probs, images):
            row[:12] = np.random.default_rng(list(image)).dirichlet(np.ones(12))
        return probs, {}

    for label in kept:
        write(tmp_path / "r" / wnids[label], 4)
    images = sources.open_images(str(tmp_path / "r"), {wnids[label]: label for label in kept})
    model = robustness.Evaluation(many, 5, str(tmp_path / "parts"), {})
    result = model.accuracy("imagenet-r", images, among=kept)
    first = five = 0
    for label in kept:
        for file in (tmp_path / "r" / wnids[label]).iterdir():
            row = many([file.read_bytes()])[0][0]
            above = sum(row[other] > row[label] for other in kept)
            first, five = first + (above == 0), five + (above < 5)
    assert 0 < first < five < 32
    assert (result["top1"], result["top5"]) == (first / 32, five / 32)


def test_folders_of_v2_are_numbers(tmp_path):
    for number in range(12):
        write(tmp_path / "v2" / str(number), 1)
    images = sets.class_folders(str(tmp_path / "v2"), sets.classes_of("imagenet-v2"))
    labels = [entry.label for entry in images.entries]
    assert labels == list(range(12))
    assert [int(entry.name.split("/")[0]) for entry in images.entries] == labels
    with pytest.raises(DataError, match="988 of 1000 classes are missing .*: 12, 13"):
        sources.open_images(str(tmp_path / "v2"), sets.classes_of("imagenet-v2"))
    write(tmp_path / "repacked" / WNIDS[2], 1)
    found = sources.open_images(
        str(tmp_path / "repacked"), sets.classes_of("imagenet-v2"), None, True
    )
    assert found.classes == [2]


def test_flips_as_defined(rng):
    answers = rng.integers(0, 3, [5, 7])
    first = sum(row[t] != row[0] for row in answers for t in range(1, 7)) / 30
    previous = sum(row[t] != row[t - 1] for row in answers for t in range(1, 7)) / 30
    assert first != previous
    for name in metrics.ALEXNET_FLIPS:
        expected = first if name.endswith("_noise") else previous
        assert metrics.flips(answers, name) == pytest.approx(expected)
    with pytest.raises(ValueError, match="T at least 2"):
        metrics.flips(answers[:, :1], "snow")


def test_mfr_as_defined(evaluation, tmp_path, three_classes):
    root = tmp_path / "p"
    alexnet = {
        "gaussian_noise": 0.23653,
        "shot_noise": 0.30062,
        "motion_blur": 0.09297,
        "zoom_blur": 0.05942,
        "snow": 0.11928,
        "brightness": 0.04889,
        "translate": 0.11007,
        "rotate": 0.13104,
        "tilt": 0.07050,
        "scale": 0.23531,
    }
    for name in [*alexnet, "gaussian_noise_2"]:
        for clip in range(3):
            write(root / name / WNIDS[clip] / f"clip{clip}", 5)
    result = evaluation.perturbations(sources.open_perturbations(str(root)))
    rates = []
    hits = []
    for name, divisor in alexnet.items():
        changed = []
        for clip in sorted((root / name).glob("*/*")):
            seen = [answer(file) for file in sorted(clip.iterdir())]
            hits += [a == WNIDS.index(clip.parent.name) for a in seen]
            for t in range(1, 5):
                changed.append(seen[t] != seen[0 if name.endswith("_noise") else t - 1])
        assert len(changed) == 12
        assert result["flips"][name] == pytest.approx(sum(changed) / 12)
        rates.append(sum(changed) / 12 / divisor)
    assert result["mfr"] == pytest.approx(sum(rates) / 10)
    assert result["top1"] == pytest.approx(sum(hits) / len(hits))
    assert set(result["flips"]) == set(alexnet), "stronger noise is in no mean"
    next((root / "snow" / WNIDS[0] / "clip0").iterdir()).unlink()
    with pytest.raises(DataError, match="clips shorter than 5 frames: n01440764/clip0"):
        sources.open_perturbations(str(root))


def distance_by_definition(before, after) -> int:
    """The paper's sum over i of j from min(i, σ(i)) + 1 to max(i, σ(i)) with 1 ≤ j - 1 ≤ 5."""
    total = 0
    for i in range(1, 6):
        # Rank of the previous frame's i-th class in this frame, starting at 1.
        now = list(after).index(before[i - 1]) + 1
        for j in range(min(i, now) + 1, max(i, now) + 1):
            total += 1 <= j - 1 <= 5
    return total


def test_top5_distance_as_defined(rng):
    orders = np.stack([[rng.permutation(8) for _ in range(6)] for _ in range(4)])
    for name in ("snow", "gaussian_noise"):
        sums = [
            distance_by_definition(clip[0 if name.endswith("_noise") else t - 1], clip[t])
            for clip in orders
            for t in range(1, 6)
        ]
        assert 0 < sum(sums) < 15 * len(sums)
        measured = metrics.top5_distance(orders[..., :5], name)
        assert measured == pytest.approx(sum(sums) / len(sums))
    still = np.tile(np.arange(5), [2, 3, 1])
    assert metrics.top5_distance(still, "snow") == 0
    moved = np.array([[np.arange(5), np.arange(5, 10)]])
    assert metrics.top5_distance(moved, "snow") == 5 + 4 + 3 + 2 + 1
    with pytest.raises(ValueError, match=r"\[N, T, 5\]"):
        metrics.top5_distance(orders[..., :4], "snow")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: shutil.rmtree(p / "tilt"), "1 missing parts .*tilt"),
        (lambda p: (p / "smoke").mkdir(), "unknown parts: smoke"),
        (lambda p: (p / "tilt/n99999999").mkdir(), "tilt: 1 unknown class folders: n99999999"),
        (lambda p: shutil.rmtree(p / "tilt" / WNIDS[2]), f"tilt: 1 of 3 classes .*{WNIDS[2]}"),
        (lambda p: shutil.rmtree(p / "tilt" / WNIDS[2] / "clip"), f"without clips: {WNIDS[2]}"),
        (lambda p: [shutil.rmtree(d) for d in (p / "tilt").iterdir()], "tilt' has no clips"),
        (
            lambda p: (p / "tilt" / WNIDS[0] / "clip.gif").touch(),
            f"duplicate clips: {WNIDS[0]}/clip",
        ),
        (lambda p: (p / "tilt" / WNIDS[0] / "clip/000.JPEG").unlink(), "fewer than two frames"),
    ],
)
def test_wrong_trees_of_clips_are_refused(tmp_path, three_classes, change, message):
    for name in metrics.ALEXNET_FLIPS:
        for wnid in WNIDS:
            write(tmp_path / "p" / name / wnid / "clip", 2)
    change(tmp_path / "p")
    with pytest.raises(DataError, match=message):
        sources.open_perturbations(str(tmp_path / "p"))


def test_real_labels(evaluation, tmp_path):
    (tmp_path / "val").mkdir()
    for i in range(1, 6):
        file = tmp_path / "val" / f"ILSVRC2012_val_{i:08d}.JPEG"
        file.write_bytes(np.random.default_rng(i).bytes(16))
    files = sorted((tmp_path / "val").iterdir())
    answers = [answer(file) for file in files]
    right = [[answers[0], 900], [], [901], [answers[3]], [902, 903]]
    labels = tmp_path / "real.json"
    labels.write_text(json.dumps(right))
    found = sets.real_labels(str(labels), str(tmp_path / "val"))
    assert [entry.name for entry in found[0].entries] == [file.name for file in files]
    assert found[1] == right
    assert evaluation.real(str(labels), *found) == {"top1": 2 / 4, "examples": 4}
    files[2].unlink()
    with pytest.raises(DataError, match="4 different images, .* labels for 5"):
        sets.real_labels(str(labels), str(tmp_path / "val"))


def test_unreadable_pictures_are_named(tmp_path):
    write(tmp_path / "a" / WNIDS[0], 3)

    def broken(images):
        return np.zeros([len(images), 1000], np.float32), {1: "the image cannot be decoded"}

    evaluation = robustness.Evaluation(broken, 8, str(tmp_path / "parts"), {})
    images = sets.class_folders(str(tmp_path / "a"), sets.classes_of())
    with pytest.raises(DataError, match="001.JPEG: the image cannot be decoded"):
        evaluation.accuracy("imagenet-a", images)


def test_tables_are_laid_out_as_the_papers():
    """Rows are those of the paper and of timm's results; the measured row is last."""
    result = {"top1": 0.12345, "top5": 0.4, "examples": 7500, "classes": 200}
    assert published.table("imagenet-a", result, "efficientnet-b0", 224) == [
        {"method": "ResNeXt-101 WSL", "resolution": None, "top-1": 61.0, "top-5": None},
        {"method": "EfficientNet-L2", "resolution": None, "top-1": 49.6, "top-5": 78.6},
        {"method": "Noisy Student L2", "resolution": None, "top-1": 83.7, "top-5": 95.2},
        {"method": "Noisy Student B0 (timm)", "resolution": 224, "top-1": 11.1, "top-5": 39.9},
        {"method": "efficientnet-b0, measured", "resolution": 224, "top-1": 12.3, "top-5": 40.0},
    ]
    table = published.table("imagenet-c", {"mce": 0.5}, "efficientnet-b0", 224)
    assert {"method": "Noisy Student L2", "resolution": 299, "top-1": 77.8, "mCE": 28.3} in table
    assert table[-1]["mCE"] == 50.0 and table[-1]["top-1"] is None
    table = published.table("imagenet-p", {"mfr": 0.5, "ut5d": 4.567}, "efficientnet-l2", 475)
    assert table[-1]["uT5D"] == 4.57 and table[-2]["mFR"] == 12.2
    sketch = published.table("imagenet-sketch", result, "efficientnet-l2", 475)
    assert sketch[0]["top-1"] == 51.4 and len(sketch) == 2
    # No row is published at this resolution.
    assert len(published.table("imagenet-sketch", result, "efficientnet-l2", 500)) == 1


def test_incomplete_sets_are_marked():
    result = {"imagenet-a": {"top1": 0.5, "top5": 0.5, "examples": 9, "classes": 12}}
    assert robustness.rows(result, 224)[0]["set"] == "imagenet-a (12 of 200 classes)"
    assert list(robustness.tables(result, 224, "efficientnet-b0")) == [
        "imagenet-a (12 of 200 classes)"
    ]


def test_the_program(tmp_path, monkeypatch):
    """From weights and images to output files."""
    from efficientnet_ns.config import Config, RobustnessConfig
    from efficientnet_ns.evaluation import robustness_program
    from efficientnet_ns.models import weights
    from efficientnet_ns.resolve.resolved_config import ResolvedConfig

    tf.keras.utils.set_random_seed(0)
    config = Config().override(model_name="efficientnet-test", input_image_size=32)
    path = str(tmp_path / "weights.safetensors")
    weights.save_weights(ResolvedConfig.from_config(config).build_model(), path)
    pixels = np.random.default_rng(0).integers(0, 256, [40, 50, 3], np.uint8)
    for wnid in tasks.wnids("imagenet_a"):
        folder = tmp_path / "a" / wnid
        folder.mkdir(parents=True)
        Image.fromarray(pixels).save(folder / "x.png")
    out = tmp_path / "out"
    for name in metrics.ALEXNET_FLIPS:
        for i in range(2):
            folder = tmp_path / "p" / name / "n01440764/clip"
            folder.mkdir(parents=True, exist_ok=True)
            # Frames differ only outside the center crop of the evaluation.
            framed = np.pad(pixels[:24, :24], [(4, 4), (4, 4), (0, 0)], constant_values=250 * i)
            Image.fromarray(framed).save(folder / f"{i}.png")
    given = RobustnessConfig(
        weights=path,
        report_dir=str(out),
        imagenet_a=str(tmp_path / "a"),
        imagenet_p=str(tmp_path / "p"),
        allow_missing=True,
    )
    with pytest.raises(DataError, match="999 of 1000 classes are missing"):
        robustness_program.evaluate(config, dataclasses.replace(given, allow_missing=False))
    assert not out.exists(), "all sets are looked through before anything is measured"
    results = robustness_program.evaluate(config, given)
    # With one image in each of 200 classes, a constant prediction is right once.
    assert results["imagenet-a"]["top1"] == 1 / 200
    stability = results["imagenet-p"]
    assert len(set(stability["distances"].values())) == 1 and stability["ut5d"] > 0
    assert "imagenet-p (1 of 1000 classes)" in (out / "robustness.md").read_text()
    assert json.loads((out / "robustness.json").read_text())["sets"] == results
    text = (out / "robustness.md").read_text()
    assert "| imagenet-a | top-1 | 0.5 | 49.6 | 83.7 |" in text
    assert "### imagenet-a\n" in text and "| efficientnet-test, measured | 32 | 0.5 | 2.5 |" in text
    assert "83.7" in (out / "robustness.html").read_text()
    # Other weights at the same path do not reuse the finished parts.
    monkeypatch.setattr(
        "efficientnet_ns.evaluation.robustness_program.TeacherPredictor", mock.Mock()
    )
    again = robustness_program.evaluate(config, given)
    assert again == results
    # Predictions of other crops are not reused either.
    with pytest.raises(manifests.OutputConflict, match="crop_fraction"):
        robustness_program.evaluate(config.override(crop_fraction=0.5), given)
    Path(path).write_bytes(Path(path).read_bytes()[:-1])
    with pytest.raises(manifests.OutputConflict, match="weights"):
        robustness_program.evaluate(config, given)
