"""The table of settings: complete rows, precedence of given values, and time limits."""

from __future__ import annotations

import dataclasses

import pytest

from efficientnet_ns.config import Config, LoopConfig, PicturesConfig, check
from efficientnet_ns.loop import plan, rounds, rules

FEW = rules.Facts(
    labeled=300,
    classes=10,
    smallest_class=30,
    unlabeled=2800,
    median_side=400,
    cores=2,
    published=("efficientnet-lite0",),
)


def chosen(facts: rules.Facts = FEW, **given) -> dict:
    return rules.values(rules.choose(facts, given))


def test_every_row_is_a_setting_with_reason_and_source():
    known = {*Config().values(), *LoopConfig.__dataclass_fields__, "init_weights"}
    known |= set(PicturesConfig.__dataclass_fields__)
    names = [rule.name for rule in rules.RULES]
    assert len(names) == len(set(names)) and set(names) <= known
    for setting in rules.choose(FEW, {}):
        assert setting.reason and setting.source and "{" not in setting.reason


@pytest.mark.parametrize(
    "facts",
    [
        FEW,
        dataclasses.replace(FEW, published=()),
        dataclasses.replace(FEW, published=(), median_side=32, labeled=400_000, cores=64),
        dataclasses.replace(FEW, labeled=20, smallest_class=2, classes=2, unlabeled=3),
    ],
)
def test_values_can_be_used(facts):
    config, loop = plan.configs(chosen(facts))
    check(config)
    check(loop)
    assert config.train.unlabel_ratio > 0 and 0 < chosen(facts)["held_out"] <= 0.2


def test_published_weights_decide_the_start():
    assert chosen()["models"] == "efficientnet-lite0,efficientnet-lite0"
    assert chosen()["keep_bn_statistics"] and chosen()["init_weights"] == "published"
    scratch = chosen(dataclasses.replace(FEW, published=()))
    assert not scratch["keep_bn_statistics"] and scratch["init_weights"] == ""
    assert scratch["train_steps"] > chosen()["train_steps"]


def test_a_setting_that_is_off_has_a_reason_of_its_own():
    def reasons(facts):
        return {setting.name: setting.reason for setting in rules.choose(facts, {})}

    on, off = reasons(FEW), reasons(dataclasses.replace(FEW, published=(), median_side=32))
    for name in ("init_weights", "keep_bn_statistics", "teacher_initial_share", "fix_layer_num"):
        assert on[name] != off[name], name
    assert "strides less" in off["small_image_model"] != on["small_image_model"]


def test_few_labels_keep_the_teacher_near_the_probe():
    assert chosen()["teacher_initial_share"] == 0.5
    many = dataclasses.replace(FEW, labeled=400, smallest_class=40)
    assert chosen(many)["teacher_initial_share"] == 0
    assert chosen(dataclasses.replace(FEW, published=()))["teacher_initial_share"] == 0
    config, loop = plan.configs(chosen())
    teacher, student = rounds.model_configs(config, loop)
    assert (teacher.train.ema_initial_share, student.train.ema_initial_share) == (0.5, 0)
    assert chosen(ema_initial_share=0.25)["teacher_initial_share"] == 0.25


def test_a_schedule_stretched_to_nothing_is_left_to_its_check():
    values = chosen(dataclasses.replace(FEW, published=()), train_ratio=0.0)
    assert rules.warnings(FEW, values)


@pytest.mark.parametrize(
    "given",
    [
        {"width_coefficient": 0.35},
        {"depth_coefficient": 0.25},
        {"models": "efficientnet-b0,efficientnet-lite0"},
    ],
)
def test_models_without_published_weights_start_from_scratch(given):
    assert chosen(**given)["init_weights"] == "" and chosen(**given)["train_batch_size"] == 32
    assert chosen(models="efficientnet-lite0,efficientnet-lite0")["init_weights"] == "published"


@pytest.mark.parametrize(
    "models, weights",
    [
        ("efficientnet-lite0,efficientnet-lite1", ""),
        ("efficientnet-lite0, efficientnet-lite0", "published"),
    ],
)
def test_one_probe_starts_models_of_one_variant_only(models, weights):
    facts = dataclasses.replace(FEW, published=("efficientnet-lite0", "efficientnet-lite1"))
    assert chosen(facts, models=models)["init_weights"] == weights


def test_given_values_take_the_place_of_rules_and_reach_what_depends_on_them():
    settings = rules.choose(FEW, {"train_batch_size": 4, "seed": 7})
    values = rules.values(settings)
    assert values["train_batch_size"] == 4 and values["seed"] == 7
    assert next(s for s in settings if s.name == "train_batch_size").reason == "given"
    assert values["warmup_epochs"] < chosen()["warmup_epochs"]


def test_more_labels_more_updates():
    many = dataclasses.replace(FEW, labeled=30_000, smallest_class=2500)
    assert chosen(many)["teacher_steps"] > chosen()["teacher_steps"]
    assert chosen(many)["held_out"] < chosen()["held_out"]


def test_students_by_cores():
    assert chosen(dataclasses.replace(FEW, cores=16))["models"].count(",") == 2


@pytest.mark.parametrize(
    "side, given, size, small",
    [
        (32, {}, 32, True),
        (4, {}, 8, True),
        (40, {}, 40, True),
        (41, {}, 96, False),
        (100, {"max_side": 32}, 32, True),
        (32, {"input_image_size": 96}, 96, True),
        (64, {"small_image_model": True}, 96, True),
        (32, {"init_weights": "published"}, 128, False),
    ],
)
def test_small_pictures_keep_their_size_from_scratch(side, given, size, small):
    values = chosen(dataclasses.replace(FEW, published=(), median_side=side), **given)
    assert (values["input_image_size"], values["small_image_model"]) == (size, small)


def test_small_pictures_from_scratch_get_weak_noise_and_many_updates():
    small = dataclasses.replace(FEW, labeled=4000, published=(), median_side=32)
    weak, usual = chosen(small), chosen(dataclasses.replace(small, median_side=64))
    for noise in ("dropout_rate", "stochastic_depth_rate", "randaug_layer", "randaug_mag"):
        assert weak[noise] < usual[noise], noise
    for number in ("teacher_steps", "train_steps", "base_learning_rate"):
        assert weak[number] > usual[number], number
    assert weak["warm_start"] and not usual["warm_start"] and not chosen()["warm_start"]
    # Only models of one variant can start from each other.
    assert not chosen(small, models="efficientnet-b0,efficientnet-b1")["warm_start"]
    assert chosen(small, models="efficientnet-b0, efficientnet-b0")["warm_start"]
    # The model variant that the user gives does not make the pictures small, nor the start new.
    large = dataclasses.replace(small, median_side=400)
    for facts in (large, dataclasses.replace(large, published=FEW.published)):
        given = chosen(facts, small_image_model=True)
        assert given == {**chosen(facts, small_image_model=False), "small_image_model": True}


@pytest.mark.parametrize("limit", [60, 600, 1800])
def test_time_limit(limit):
    facts = dataclasses.replace(FEW, cores=16)
    settings = rules.choose(facts, {})
    fitted = rules.values(rules.fit(settings, facts, {}, 20.0, limit, False))
    before, after = rules.values(settings), fitted
    assert after["models"].count(",") == 1
    assert rules.seconds(facts, before, 20.0, control=False)["teacher"] > limit / 4
    pace = 20.0 * (before["input_image_size"] / after["input_image_size"]) ** 2
    if limit > 60:  # 60 s is below the minimum.
        assert sum(rules.seconds(facts, after, pace, control=False).values()) <= limit
    assert after["steps_per_eval"] <= after["train_steps"]


def test_few_updates_forget_the_initial_statistics():
    facts = dataclasses.replace(FEW, published=())
    assert chosen(facts)["bn_momentum"] == 0.97
    assert chosen(facts, teacher_steps=50)["bn_momentum"] == 0.87
    fitted = rules.values(rules.fit(rules.choose(facts, {}), facts, {}, 20.0, 60, False))
    assert not [text for text in rules.warnings(facts, fitted) if "bn_momentum" in text]


def test_time_limit_leaves_given_values_alone():
    given = {"teacher_steps": 5000, "input_image_size": 300, "models": "a,b,c"}
    settings = rules.choose(FEW, given)
    fitted = rules.values(rules.fit(settings, FEW, given, 20.0, 60, True))
    assert {name: fitted[name] for name in given} == given
    assert fitted["train_steps"] < rules.values(settings)["train_steps"]


def test_a_shorter_schedule_has_a_shorter_warm_up():
    settings = rules.choose(FEW, {})
    before, after = (
        rules.values(settings),
        rules.values(rules.fit(settings, FEW, {}, 20, 600, False)),
    )
    assert after["train_steps"] < before["train_steps"]
    part = after["train_steps"] / before["train_steps"]
    assert after["warmup_epochs"] == pytest.approx(before["warmup_epochs"] * part, abs=0.01)
    given = {"warmup_epochs": 3.0}
    fitted = rules.fit(rules.choose(FEW, given), FEW, given, 20, 600, False)
    assert rules.values(fitted)["warmup_epochs"] == 3


def test_enough_time_changes_nothing():
    settings = rules.choose(FEW, {})
    assert rules.fit(settings, FEW, {}, 20.0, 1e6, False) == settings


def test_warnings():
    assert rules.warnings(FEW, chosen()) == []
    scratch = dataclasses.replace(FEW, published=())
    (text,) = rules.warnings(scratch, chosen(scratch, bn_momentum=0.999, teacher_steps=900))
    assert "--bn_momentum=0.999" in text and "900 updates" in text
    assert rules.warnings(FEW, chosen(bn_momentum=0.999)) == []  # Statistics are kept.
    (text,) = rules.warnings(FEW, chosen(teacher_steps=109_474))
    assert "passes over 300 labeled pictures" in text
    small = dataclasses.replace(FEW, smallest_class=3, unlabeled=10)
    texts = " ".join(rules.warnings(small, chosen(small)))
    assert "only 3 labeled pictures" in texts and "10 unlabeled pictures" in texts
