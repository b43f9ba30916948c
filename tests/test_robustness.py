"""Robustness: small trees in the distributed layouts, against the definitions written out here."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from efficientnet_ns.data import manifests, records
from efficientnet_ns.evaluation import robustness
from efficientnet_ns.evaluation import robustness_metrics as metrics
from efficientnet_ns.evaluation import robustness_sets as sets

WNIDS = ["n01440764", "n01443537", "n01484850"]
CORRUPTIONS = (
    "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow "
    "frost fog brightness contrast elastic_transform pixelate jpeg_compression"
).split()


def classify(images):
    """A "model" that answers what a hash of the file says, among the first six classes."""
    probs = np.zeros([len(images), 1000], np.float32)
    for row, image in zip(probs, images):
        row[:6] = np.random.default_rng(list(image)).dirichlet(np.ones(6))
    return probs, {}


def write(folder, count, seed=0):
    folder.mkdir(parents=True)
    for i in range(count):
        # Pictures need not be readable: this model looks at the bytes.
        content = np.random.default_rng([seed, i, *str(folder).encode()]).bytes(16)
        (folder / f"{i:03d}.JPEG").write_bytes(content)


@pytest.fixture
def evaluation(tmp_path):
    return robustness.Evaluation(classify, 4, str(tmp_path / "parts"), {"weights": "w"})


@pytest.fixture
def imagenet_c(tmp_path):
    root = tmp_path / "c"
    for name in [*CORRUPTIONS, "saturate"]:
        for severity in "12345":
            for number, wnid in enumerate(WNIDS):
                write(root / name / severity / wnid, number + 1)
    return root


def answer(path) -> int:
    return int(classify([path.read_bytes()])[0][0].argmax())


def test_wnids_are_those_of_the_names():
    from efficientnet_ns.data import tasks

    wnids = sets.wnids()
    assert wnids == sorted(set(wnids)) and len(wnids) == 1000 == len(tasks.class_names("imagenet"))
    assert (wnids[0], wnids[1], wnids[999]) == ("n01440764", "n01443537", "n15075141")


def test_mce_as_defined(evaluation, imagenet_c):
    alexnet = dict(
        zip(
            CORRUPTIONS,
            [0.886428, 0.894468, 0.922640, 0.819880, 0.826268, 0.785948, 0.798360, 0.866816]
            + [0.826572, 0.819324, 0.564592, 0.853204, 0.646056, 0.717840, 0.606500],
        )
    )
    result = evaluation.corruptions(str(imagenet_c))
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
    published = robustness.rows({"imagenet-c": result}, 224)[0]
    assert published["measured"] == round(100 * result["mce"], 1)
    assert (published["EfficientNet-L2"], published["Noisy Student L2"]) == (47.5, 30.0)


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
        return robustness.Evaluation(model, 6, folder, {"weights": weights}).corruptions(
            str(imagenet_c)
        )

    with pytest.raises(KeyboardInterrupt):
        start(counted)
    calls_before, rest = len(calls) - 1, []
    resumed = start(lambda images: (rest.append(len(images)), classify(images))[1])
    assert calls_before == 20 and len(rest) == 16 * 5 - 20
    whole = robustness.Evaluation(classify, 6, str(tmp_path / "other"), {})
    assert resumed == whole.corruptions(str(imagenet_c))
    with pytest.raises(manifests.OutputConflict, match="weights"):
        start(classify, weights="others")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: shutil.rmtree(c / "fog"), r"missing folders .*fog"),
        (lambda c: shutil.rmtree(c / "fog/3"), r"fog: 1 missing folders .*: 3"),
        (lambda c: shutil.rmtree(c / "fog/3" / WNIDS[1]), rf"3: 1 missing class.*{WNIDS[1]}"),
        (lambda c: (c / "fog/3/n99999999").mkdir(), r"3: 1 unknown class folders: n99999999"),
        (lambda c: (c / "smoke").mkdir(), r"unknown folders: smoke"),
        (lambda c: (c / "fog/3" / WNIDS[0] / "000.JPEG").unlink(), rf"without images: {WNIDS[0]}"),
    ],
)
def test_wrong_trees_are_refused(imagenet_c, tmp_path, change, message):
    change(imagenet_c)

    def never(images):
        raise AssertionError("measured before all folders were looked at")

    evaluation = robustness.Evaluation(never, 4, str(tmp_path / "parts"), {})
    with pytest.raises(records.DataError, match=message):
        evaluation.corruptions(str(imagenet_c))


def test_partial_results_have_no_mean(evaluation, imagenet_c):
    shutil.rmtree(imagenet_c / "fog")
    result = evaluation.corruptions(str(imagenet_c), allow_missing=True)
    assert "mce" not in result and "fog" not in result["ce"] and len(result["ce"]) == 15
    assert robustness.rows({"imagenet-c": result}, 224)[0]["measured"] is None


def test_subset_of_classes(evaluation, tmp_path):
    """Only classes with a folder may be answered."""
    root, kept = tmp_path / "a", [0, 2]
    for label in kept:
        write(root / WNIDS[label], 9)
    images = sets.class_folders(str(root), sets.by_wnid())
    result = evaluation.accuracy("imagenet-a", str(root), images, subset=True)
    right = []
    for label in kept:
        for file in (root / WNIDS[label]).iterdir():
            row = classify([file.read_bytes()])[0][0]
            right.append(max(kept, key=lambda c: row[c]) == label)
    assert result == {"top1": pytest.approx(np.mean(right)), "top5": 1.0, "examples": 18}
    everything = evaluation.accuracy("all", str(root), images, subset=False)
    assert everything["top1"] < result["top1"]


def test_folders_of_v2_are_numbers(tmp_path):
    for number in range(12):
        write(tmp_path / "v2" / str(number), 1)
    images = sets.class_folders(str(tmp_path / "v2"), sets.by_number())
    assert images.labels == list(range(12))
    assert [int(path.split("/")[-2]) for path in images.paths] == images.labels
    with pytest.raises(records.DataError, match="988 missing class folders: 12, 13"):
        sets.class_folders(str(tmp_path / "v2"), sets.by_number(), whole=True)


def test_flips_as_defined(rng):
    answers = rng.integers(0, 3, [5, 7])
    first = sum(row[t] != row[0] for row in answers for t in range(1, 7)) / 30
    previous = sum(row[t] != row[t - 1] for row in answers for t in range(1, 7)) / 30
    assert first != previous
    for name in metrics.ALEXNET_FLIPS:
        expected = first if name.endswith("_noise") else previous
        assert metrics.flips(answers, name) == pytest.approx(expected)
    with pytest.raises(ValueError, match="two frames"):
        metrics.flips(answers[:, :1], "snow")


def test_mfr_as_defined(evaluation, tmp_path):
    root = tmp_path / "p"
    for name in metrics.ALEXNET_FLIPS:
        for clip in range(2):
            write(root / name / WNIDS[clip] / f"clip{clip}", 5)
    result = evaluation.perturbations(str(root))
    rates = []
    for name, alexnet in metrics.ALEXNET_FLIPS.items():
        changed = []
        for clip in sorted((root / name).glob("*/*")):
            seen = [answer(file) for file in sorted(clip.iterdir())]
            for t in range(1, 5):
                changed.append(seen[t] != seen[0 if name.endswith("_noise") else t - 1])
        assert result["flips"][name] == pytest.approx(np.mean(changed))
        rates.append(np.mean(changed) / alexnet)
    assert result["mfr"] == pytest.approx(np.mean(rates))
    next((root / "snow" / WNIDS[0] / "clip0").iterdir()).unlink()
    with pytest.raises(records.DataError, match="clips shorter than 5 frames: n01440764/clip0"):
        evaluation.perturbations(str(root))


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
    assert found == ([str(file) for file in files], right)
    assert evaluation.real(str(labels), *found) == {"top1": 2 / 4, "examples": 4}
    files[2].unlink()
    with pytest.raises(records.DataError, match="4 different images, .* labels for 5"):
        sets.real_labels(str(labels), str(tmp_path / "val"))


def test_unreadable_pictures_are_named(tmp_path):
    write(tmp_path / "a" / WNIDS[0], 3)

    def broken(images):
        return np.zeros([len(images), 1000], np.float32), {1: "the image cannot be decoded"}

    evaluation = robustness.Evaluation(broken, 8, str(tmp_path / "parts"), {})
    images = sets.class_folders(str(tmp_path / "a"), sets.by_wnid())
    with pytest.raises(records.DataError, match="001.JPEG: the image cannot be decoded"):
        evaluation.accuracy("imagenet-a", str(tmp_path / "a"), images, subset=True)


def test_the_program(tmp_path):
    """From weights and pictures to the files, once through everything."""
    from efficientnet_ns import evaluate_robustness
    from efficientnet_ns.config import Config
    from efficientnet_ns.experiment import Experiment
    from efficientnet_ns.models import weights

    config = Config().override(model_name="efficientnet-test", input_image_size=32)
    path = str(tmp_path / "weights.safetensors")
    weights.save_weights(Experiment.from_config(config).build_model(), path)
    for wnid in WNIDS:
        folder = tmp_path / "a" / wnid
        folder.mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, [40, 50, 3], np.uint8)
        Image.fromarray(pixels).save(folder / "x.png")
    out = tmp_path / "out"
    folders = {"imagenet_a": str(tmp_path / "a"), "imagenet_c": ""}
    results = evaluate_robustness.evaluate(config, path, folders, str(out))
    # One picture in three classes: whatever is answered, a third is right.
    assert results["imagenet-a"]["top1"] == pytest.approx(1 / 3)
    assert json.loads((out / "robustness.json").read_text())["sets"] == results
    assert "| imagenet-a | top-1 | 33.3 | 49.6 | 83.7 |" in (out / "robustness.md").read_text()
    assert "83.7" in (out / "robustness.html").read_text()
