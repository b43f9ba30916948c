"""Attacks and corruptions of a labeled set: results, caching and files."""

from __future__ import annotations

import concurrent.futures
import json

import numpy as np
import pytest
import tensorflow as tf
from fakes import CLASSES, VALIDATION, settings, write_data

from efficientnet_ns.config import Config, ConfigError, CustomRobustnessConfig, RobustnessConfig
from efficientnet_ns.data import pipeline
from efficientnet_ns.evaluation import (
    accuracy,
    adversarial,
    corruptions,
    custom_robustness,
    custom_robustness_report,
    robustness_program,
)
from efficientnet_ns.evaluation import robustness_metrics as metrics
from efficientnet_ns.files import tfexamples
from efficientnet_ns.models import weights
from efficientnet_ns.resolve.resolved_config import ResolvedConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("own_set")
    write_data(path)
    for seed, name in enumerate(("model", "baseline")):
        tf.keras.utils.set_random_seed(seed)
        model = ResolvedConfig.from_config(settings(path, "unused")).build_model()
        weights.save_weights(model, str(path / f"{name}.safetensors"))
    return path


@pytest.fixture(scope="module")
def labeled(folder) -> custom_robustness.LabeledSet:
    resolved = ResolvedConfig.from_config(settings(folder, "unused"))
    return custom_robustness._labeled_set(resolved, "")


def darker(pixels, name, severity, seeds):
    """Replaces the library with a function that depends on all of its arguments."""
    salt = np.array(seeds, np.uint64)[:, None, None, None] % 7
    return (pixels // (severity + len(name) % 3) + salt).astype(np.uint8)


class Corruptor:
    """Runs `darker` synchronously and records its calls."""

    def __init__(self, seed=0, workers=1):
        self.seed, self.workers, self.calls = seed, workers, []

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        pass

    def submit(self, pixels, name, severity, first):
        self.calls.append((name, severity, len(pixels), first))
        seeds = corruptions.image_seeds(name, severity, first, len(pixels), self.seed)
        done = concurrent.futures.Future()
        done.set_result(darker(pixels, name, severity, seeds))
        return done


def by_brightness(modulus):
    """Returns a "model" that predicts a class from the sum of the pixels."""

    def classify(pixels):
        assert pixels.dtype == np.float32
        answers = pixels.sum((1, 2, 3)).astype(int) % modulus
        return np.eye(CLASSES, dtype=np.float32)[answers % CLASSES]

    return classify


def subjects(*names):
    every = {"model": by_brightness(7), "baseline": by_brightness(11)}
    return [custom_robustness.Subject(n, None, every[n], {"weights": n}) for n in names]


CHOSEN = custom_robustness.Settings(("fog", "snow", "saturate"), (1, 3), (), None)


def expected_errors(folder) -> dict:
    """Computes the errors in NumPy from the record files, one image at a time."""
    images, labels = [], []
    for path in sorted((folder / "labeled").glob("validation-*")):
        for raw in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            images.append(tf.io.decode_png(tfexamples.image_bytes(raw)).numpy())
            labels.append(tfexamples.label(raw))
    errors = {}
    for name, modulus in (("model", 7), ("baseline", 11)):
        for corruption, severity in [("clean", 0)] + [
            (c, s) for c in CHOSEN.corruptions for s in (1, 3)
        ]:
            wrong = 0
            for place, (image, label) in enumerate(zip(images, labels)):
                if severity:
                    seeds = corruptions.image_seeds(corruption, severity, place, 1, 0)
                    image = darker(image[None], corruption, severity, seeds)[0]
                wrong += int(image.astype(int).sum()) % modulus % CLASSES != label
            errors.setdefault((name, corruption), []).append(wrong / len(labels))
    return errors


def test_errors_as_numpy_counts(folder, labeled, tmp_path):
    corruptor = Corruptor()
    found = custom_robustness.corrupted(
        str(tmp_path), subjects("model", "baseline"), labeled, CHOSEN, corruptor.submit, {}, ahead=1
    )
    expected = expected_errors(folder)
    for name in ("model", "baseline"):
        assert found["clean"][name] == pytest.approx(expected[name, "clean"][0])
        for corruption in CHOSEN.corruptions:
            of_model = found["corruptions"][corruption][name]
            assert of_model == pytest.approx(expected[name, corruption])
    # Both models share each corruption.
    assert corruptor.calls == [(c, s, VALIDATION, 0) for c in CHOSEN.corruptions for s in (1, 3)]


def test_finished_parts_are_kept(labeled, tmp_path):
    def run(names, submit, **more):
        details = {"seed": 0, **more}
        chosen = subjects(*names)
        return custom_robustness.corrupted(
            str(tmp_path), chosen, labeled, CHOSEN, submit, details, ahead=1
        )

    first, left = Corruptor(), 3

    def stopped(*args):
        if len(first.calls) == left:
            raise KeyboardInterrupt
        return first.submit(*args)

    with pytest.raises(KeyboardInterrupt):
        run(["model"], stopped)
    resumed = Corruptor()
    whole = run(["model"], resumed.submit)
    assert [call[:2] for call in resumed.calls] == [
        (c, s) for c in CHOSEN.corruptions for s in (1, 3)
    ][left:]
    added = Corruptor()
    both = run(["model", "baseline"], added.submit)
    assert len(added.calls) == 6, "the model's own parts are there, the baseline's are not"
    assert {c: of["model"] for c, of in both["corruptions"].items()} == {
        c: of["model"] for c, of in whole["corruptions"].items()
    }
    other = Corruptor()
    run(["model"], other.submit, library="2")
    assert len(other.calls) == 6, "another version of the library corrupts in another way"


def test_other_crops_are_measured_anew(folder, labeled, tmp_path):
    fog = custom_robustness.Settings(("fog",), (1,), (), None)
    config = settings(folder, "unused", crop_fraction=0.5)
    cropped = custom_robustness._labeled_set(ResolvedConfig.from_config(config), "")
    measured = []
    for images in (labeled, cropped, labeled, cropped):
        corruptor = Corruptor()
        work = str(tmp_path), subjects("model"), images, fog, corruptor.submit, {}
        custom_robustness.corrupted(*work, ahead=1)
        measured.append(len(corruptor.calls))
    assert measured == [1, 1, 0, 0]


def test_a_lost_example_is_noticed(labeled, tmp_path):
    short = labeled._replace(source=labeled.source.examples(VALIDATION - 1))
    with pytest.raises(accuracy.IncompleteEvaluation, match=f"saw {VALIDATION} examples"):
        custom_robustness.corrupted(
            str(tmp_path), subjects("model"), short, CHOSEN, Corruptor().submit, {}, ahead=1
        )


# Relative errors.


def test_mce_relative_to_the_baseline():
    rng = np.random.default_rng(0)
    names = [*metrics.ALEXNET_ERROR, "spatter"]
    errors = {
        name: {m: list(rng.uniform(0.1, 0.9, 5)) for m in ("model", "baseline")} for name in names
    }
    ratios = {n: np.mean(of["model"]) / np.mean(of["baseline"]) for n, of in errors.items()}
    assert custom_robustness_report.relative_errors(errors) == pytest.approx(ratios)
    main = [ratios[n] for n in names if n != "spatter"]
    assert custom_robustness_report.mean_relative_error(errors) == pytest.approx(sum(main) / 15)
    results = {
        "models": {"model": "a", "baseline": "b"},
        "clean": {"model": 0.125, "baseline": 0.25},
        "corruptions": errors,
    }
    rows = custom_robustness_report.corruption_rows(results)
    assert rows[0]["model error"] == 12.5 and rows[0]["CE, relative to the baseline"] is None
    snow = next(row for row in rows if row["corruption"] == "snow")
    assert snow["baseline error"] == round(100 * np.mean(errors["snow"]["baseline"]), 1)
    assert snow["CE, relative to the baseline"] == round(100 * ratios["snow"], 1)
    assert rows[-1]["corruption"].startswith("mean of 15")
    assert rows[-1]["CE, relative to the baseline"] == round(100 * sum(main) / 15, 1)
    errors["fog"]["baseline"] = [0.0] * 5
    assert custom_robustness_report.mean_relative_error(errors) is None
    assert custom_robustness_report.relative_errors(errors)["fog"] is None


# Settings.


@pytest.mark.parametrize(
    "values, message",
    [
        ({"corrupt": "fog,smoke"}, r"--corrupt: unknown smoke; known: all, gaussian_noise"),
        ({"severities": "1,6"}, r"--severities=1,6: each must be in 1..5"),
        ({"severities": "1.5"}, r"integers from 1 to 5"),
        ({"severities": ""}, r"integers from 1 to 5"),
        ({"epsilons": "2,x"}, r"--epsilons=2,x: could not convert"),
        ({"epsilons": "-1"}, r"--epsilons=-1: each must be in 0..255"),
    ],
)
def test_settings_that_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        custom_robustness.Settings.from_config(CustomRobustnessConfig(**values), 0)


def test_all_are_those_of_the_mean():
    chosen = custom_robustness.Settings.from_config(
        CustomRobustnessConfig(corrupt="all", epsilons="16,2"), 0
    )
    assert chosen.corruptions == tuple(metrics.ALEXNET_ERROR)
    assert (chosen.severities, chosen.epsilons) == ((1, 2, 3, 4, 5), (2, 16))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"label_data_dir": None}, "--label_data_dir is required"),
        ({"weights": "", "model_dir": None}, "--report_dir are required"),
    ],
)
def test_what_is_missing(folder, tmp_path, change, message):
    path = change.pop("weights", str(folder / "model.safetensors"))
    config = settings(folder, "unused").override(**change)
    with pytest.raises(ConfigError, match=message):
        robustness_program.evaluate_custom_set(
            config,
            CustomRobustnessConfig(epsilons="1"),
            RobustnessConfig(weights=path, report_dir=str(tmp_path)),
        )


def test_settings_of_the_attack():
    own = CustomRobustnessConfig(epsilons="4,1", pgd_steps=3, pgd_step_size=1.5)
    chosen = custom_robustness.Settings.from_config(own, seed=7)
    assert chosen.epsilons == (1.0, 4.0)
    assert chosen.pgd == adversarial.Pgd(steps=3, step_size=1.5, seed=7)


def test_a_baseline_of_another_size_has_its_own_coefficients(folder):
    config = settings(folder, "unused", width_coefficient=0.5, depth_coefficient=0.5)
    resolved, path = ResolvedConfig.from_config(config), str(folder / "model.safetensors")
    assert custom_robustness._baseline_config(resolved, "", path) == config
    other = custom_robustness._baseline_config(resolved, "efficientnet-b1", path).model
    assert (other.model_name, other.width_coefficient) == ("efficientnet-b1", None)
    assert other.depth_coefficient is None


def test_several_machines_are_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {}}')
    with pytest.raises(ConfigError, match="one machine: unset TF_CONFIG"):
        robustness_program.evaluate_custom_set(
            settings(folder, "unused"),
            CustomRobustnessConfig(epsilons="1"),
            RobustnessConfig(weights="weights", report_dir=str(tmp_path)),
        )


def test_baseline_alone():
    sets = RobustnessConfig(weights="w", report_dir="r")
    with pytest.raises(ConfigError, match="--baseline requires --corrupt or --epsilons"):
        robustness_program.evaluate_and_report(Config(), CustomRobustnessConfig(baseline="b"), sets)


# End to end.


@pytest.mark.slow
def test_the_program(folder, tmp_path, monkeypatch):
    """Two models, attacks and corruptions, from records to output files."""
    made = []
    monkeypatch.setattr(corruptions, "check_installed", lambda: "1")
    monkeypatch.setattr(
        corruptions, "Corruptor", lambda seed: made.append(Corruptor(seed)) or made[-1]
    )
    config = settings(folder, "unused", num_eval_images=5, inference_engine="tf")
    paths = [str(folder / f"{name}.safetensors") for name in ("model", "baseline")]
    own = CustomRobustnessConfig(
        epsilons="0,4", pgd_steps=2, corrupt="fog,spatter", severities="2,5", baseline=paths[1]
    )
    out = tmp_path / "out"
    sets = RobustnessConfig(weights=paths[0], report_dir=str(out))
    results = robustness_program.evaluate_custom_set(config, own, sets)
    assert results["examples"] == 5 and list(results["attacks"]) == ["0", "4"]
    # The clean accuracy equals that of calling the model directly.
    chosen = ResolvedConfig.from_config(config)
    source = pipeline.Source.find(config.data.label_data_dir, "validation").examples(5)
    (first, second) = chosen.eval_batches(source).as_numpy_iterator()
    images = np.concatenate([first["image"], second["image"][:1]])
    labels = np.concatenate([first["label"], second["label"][:1]])
    for name, path in zip(("model", "baseline"), paths):
        model = chosen.build_model()
        weights.load_weights(model, path)
        top1 = np.mean(model(images, training=False).numpy().argmax(1) == labels)
        right = dict.fromkeys(("clean", "fgsm", "pgd"), top1)
        assert results["attacks"]["0"][name] == {**right, "examples": 5}
        assert results["clean"][name] == pytest.approx(1 - top1)
        assert [len(results["corruptions"][c][name]) for c in ("fog", "spatter")] == [2, 2]
    stored = json.loads((out / "own_set.json").read_text())
    assert {key: stored[key] for key in results} == results and "mce" in stored
    page = (out / "own_set.html").read_text()
    assert page.count("data:image/png;base64") == 4 and "spatter 5" in page
    calls = len(made[0].calls)
    printed = robustness_program.evaluate_and_report(config, own, sets)
    assert printed == (out / "own_set.md").read_text()
    assert "| fog | " in printed and "| epsilon | model clean | baseline clean |" in printed
    assert json.loads((out / "own_set.json").read_text()) == stored
    assert (calls, len(made[1].calls)) == (8, 4), "again only the pictures are made"
