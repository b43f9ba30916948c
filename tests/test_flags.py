"""The presets under flags/ parse, build their models, match the published runs and have headers."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
from pathlib import Path

import pytest
import tensorflow as tf

from efficientnet_ns import config
from efficientnet_ns.config import Config, LoopConfig, SelectConfig
from efficientnet_ns.data import tasks
from efficientnet_ns.loop import demo, rounds, study
from efficientnet_ns.models import complexity, efficientnet
from efficientnet_ns.models.recipes import RECIPES
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

ROOT = Path(__file__).parent.parent
PRESETS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("flags/**/*.flags"))
RUNS = [name for name in PRESETS if name.startswith("flags/run/")]
MODELS = [name.split("-")[1] for name in RECIPES]
# The paper's sizes; it has no Lite models.
SIZES = [name.split("-")[1] for name, recipe in RECIPES.items() if recipe.top1]
# Building the other graphs is too slow for every test run.
QUICK = {"efficientnet-b0"}


def entry_of(preset: str) -> str:
    """Returns the program that a preset is for; partial presets are for main."""
    command = re.search(r"^# Command: python -m efficientnet_ns\.(\w+)", text_of(preset), re.M)
    return command[1] if command else "main"


def text_of(preset: str) -> str:
    return (ROOT / preset).read_text()


@pytest.fixture
def parse(entry_flags):
    """Maps a preset to the flags of its program."""
    return lambda preset, *more: entry_flags(entry_of(preset), [f"--flagfile={preset}", *more])


@pytest.fixture
def settings(parse):
    """Maps a preset for training or prediction to its configuration."""
    return lambda preset, *more: config.from_flags(Config, parse(preset, *more))


# --- All presets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_parses(preset, parse):
    lines = text_of(preset).splitlines()
    assert lines[0].startswith("# ")
    for line in lines:
        # A comment after a value would silently become part of it; an indented one, an argument.
        assert "#" not in line[1:] and line == line.strip()
    values = parse(preset)
    if entry_of(preset) in ("main", "noisy_student", "study"):
        resolved = ResolvedConfig.from_config(config.from_flags(Config, values))
        assert resolved.train_steps > 0


def test_installed_package_includes_every_folder_of_presets():
    # Python 3.10 has no module that reads TOML.
    form = r'^"share/efficientnet_ns/(flags/.+)" = \["(.+)/\*"\]$'
    listed = re.findall(form, text_of("pyproject.toml"), re.M)
    folders = sorted({str(Path(preset).parent) for preset in PRESETS})
    assert listed == [(folder, folder) for folder in folders]


@pytest.mark.parametrize("preset", RUNS)
def test_header_says_what_how_and_what_to_expect(preset, entry_flags):
    header = "\n".join(line for line in text_of(preset).splitlines() if line.startswith("#"))
    assert re.search(r"^# Expected: ", header, re.M)
    run_here = "run/digits" in preset or preset == "flags/run/study/quick.flags"
    assert run_here or "ot run here" in header
    command = re.search(r"^# Command: ((?:.*)(?:\n#   .*)*)", header, re.M)[1]
    words = shlex.split(command.replace("\n#   ", " "))
    assert words[:3] == ["python", "-m", f"efficientnet_ns.{entry_of(preset)}"]
    assert f"--flagfile={preset}" in words
    entry_flags(entry_of(preset), words[3:])


def model_of(preset: str) -> str:
    """Returns the model name without parsing flags."""
    for line in reversed(text_of(preset).splitlines()):
        if line.startswith("--model_name="):
            return line.split("=")[1]
        if line.startswith("--flagfile=") and model_of(line.split("=")[1]):
            return model_of(line.split("=")[1])
    return ""


def with_a_model():
    for preset in PRESETS:
        name = model_of(preset)
        if name:
            marks = [] if name in QUICK else [pytest.mark.slow]
            yield pytest.param(preset, marks=marks)


@functools.cache
def output_shape(resolved: ResolvedConfig) -> tuple:
    with tf.Graph().as_default():
        model = resolved.build_model()
    complexity.restore_classes(model)
    return model.output_shape


@pytest.mark.parametrize("preset", with_a_model())
def test_model_of_preset_is_built(preset, settings):
    chosen = settings(preset)
    # Omits what does not shape the model, so that presets of one model share it.
    shaping = Config(model=chosen.model).override(task_name=chosen.data.task_name)
    resolved = ResolvedConfig.from_config(shaping)
    assert output_shape(resolved) == (None, resolved.num_classes)
    assert resolved.image_size == ResolvedConfig.from_config(chosen).image_size


# --- ImageNet -------------------------------------------------------------------------------------


def test_there_are_presets_for_every_published_model():
    assert {Path(p).stem for p in PRESETS if p.startswith("flags/model/")} == set(MODELS)
    assert set(MODELS) == {name.split("-")[1] for name in efficientnet.VARIANTS} - {"test"}
    for role in ("teacher", "student", "student_on_the_fly"):
        for size in SIZES:
            assert f"flags/run/imagenet/{size}_{role}.flags" in PRESETS


def epochs(chosen: Config, steps: int | None = None) -> float:
    resolved = ResolvedConfig.from_config(chosen)
    images = tasks.TASKS["imagenet"].num_train_images
    return (steps or resolved.train_steps) * chosen.train.train_batch_size / images


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("role", ["student", "student_on_the_fly"])
def test_imagenet_student_is_the_recipe(size, role, settings):
    chosen, recipe = (
        settings(f"flags/run/imagenet/{size}_{role}.flags"),
        RECIPES[f"efficientnet-{size}"],
    )
    assert epochs(chosen) == pytest.approx(recipe.epochs, rel=1e-3)
    assert ResolvedConfig.from_config(chosen).image_size == recipe.train_resolution
    assert chosen.train.unlabel_ratio == recipe.unlabel_ratio
    magnitude = chosen.data.randaug_mag if chosen.data.augment_name else None
    assert magnitude == recipe.randaugment_magnitude
    assert chosen.train.teacher_softmax_temp == 1
    teacher = {"student": None, "student_on_the_fly": f"efficientnet-{size}"}[role]
    if role == "student_on_the_fly" and size == "l2":
        teacher = "efficientnet-b7"
    assert chosen.train.teacher_model_name == teacher
    assert chosen.hardware.use_tpu and chosen.hardware.use_bfloat16


@pytest.mark.parametrize("size", SIZES)
def test_imagenet_teacher_learns_from_labels_alone(size, settings):
    chosen = settings(f"flags/run/imagenet/{size}_teacher.flags")
    assert (chosen.train.unlabel_ratio, chosen.train.teacher_model_name) == (0, None)
    assert epochs(chosen) == pytest.approx(350, rel=1e-3)


def test_stated_accuracies_are_those_of_the_papers():
    for size in set(MODELS) - set(SIZES):
        recipe = RECIPES[f"efficientnet-{size}"]
        assert f"{recipe.top1_supervised} %" in text_of(f"flags/model/{size}.flags")
    for size in SIZES:
        recipe = RECIPES[f"efficientnet-{size}"]
        runs = {
            role: text_of(f"flags/run/imagenet/{size}_{role}.flags")
            for role in ("teacher", "student")
        }
        assert f"{recipe.top1_supervised} %" in runs["teacher"]
        assert f"{recipe.top1} %" in runs["student"]


def test_page_lists_every_run_with_its_accuracy():
    """A run of one size is a cell of the table by size; all other runs are named."""
    page = (ROOT / "docs/presets.md").read_text()
    rows = {
        row[0]: row[1:4] for row in re.findall(r"^\| (\w\d) " + 3 * r"\| ([\d.]+).*? ", page, re.M)
    }
    assert sorted(rows) == sorted(SIZES)
    roles = ("teacher", "student", "student_on_the_fly")
    for preset in RUNS:
        name = preset.removeprefix("flags/run/").removesuffix(".flags")
        size, _, role = name.removeprefix("imagenet/").partition("_")
        if name.startswith("imagenet/") and role in roles:
            assert f"{rows[size][roles.index(role)]} %" in text_of(preset), preset
        else:
            assert f"`{name}`" in page, preset


@pytest.mark.parametrize(
    "preset, more",
    [
        ("flags/run/imagenet/l2_finetune.flags", []),
        ("flags/role/finetune.flags", ["--flagfile=flags/data/imagenet.flags"]),
    ],
)
def test_fine_tuning(preset, more, settings):
    chosen = settings(preset, *more)
    train = chosen.train
    assert epochs(chosen, train.train_last_step_num) == pytest.approx(1.5, rel=1e-3)
    assert (train.init_model, chosen.data.remove_aug, train.unlabel_ratio) == (True, True, 0)
    assert (train.train_ratio, train.train_steps) == (1, 109474)


def test_fine_tuning_of_l2_freezes_three_stages_at_800(settings):
    chosen = settings("flags/run/imagenet/l2_finetune.flags")
    assert (chosen.model.model_name, chosen.model.input_image_size) == ("efficientnet-l2", 800)
    assert chosen.train.fix_layer_num == 28


def test_chain_is_the_published_one(parse):
    values = parse("flags/run/imagenet/l2_chain.flags", "--label_data_dir=l", "--work_dir=w")
    base, loop = config.from_flags(Config, values), config.from_flags(LoopConfig, values)
    chain = rounds.model_configs(base, loop)
    assert [
        (c.model.model_name, c.model.input_image_size, c.data.randaug_mag, c.train.unlabel_ratio)
        for c in chain
    ] == [
        ("efficientnet-b7", 600, 27, 0),
        ("efficientnet-l2", 475, 27, 14),
        ("efficientnet-l2", 475, 27, 14),
        ("efficientnet-l2", 475, 27, 28),
    ]
    for chosen in chain:
        assert epochs(chosen) == pytest.approx(350, rel=1e-3)
        assert chosen.data.augment_name == "randaugment"
        ResolvedConfig.from_config(chosen)
    tuning = rounds.finetune_config(base, loop, 3)
    alone = config.from_flags(Config, parse("flags/run/imagenet/l2_finetune.flags"))
    changed = {"model_dir", "init_model_path", "label_data_dir"}
    assert {k: v for k, v in tuning.identity().items() if k not in changed} == {
        k: v for k, v in alone.identity().items() if k not in changed
    }
    assert (loop.num_image, loop.min_threshold) == (130000, 0.3)


# --- SVHN and digits ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["teacher", "student", "student_on_the_fly"])
def test_svhn_is_the_originals(name, settings):
    """The values of local_scripts/run_svhn.sh and svhn_offline.sh."""
    chosen = settings(f"flags/run/svhn/{name}.flags")
    train, data = chosen.train, chosen.data
    assert (chosen.model.model_name, data.task_name) == ("efficientnet-b0", "svhn")
    assert (data.augment_name, data.randaug_mag, data.randaug_layer) == ("randaugment", 5, 2)
    assert (train.train_batch_size, train.train_steps, train.train_ratio) == (128, 109474, 1)
    assert (train.base_learning_rate, train.final_base_lr) == (0.016, 0.0002)
    assert (train.weight_decay, train.teacher_softmax_temp) == (1e-4, 1)
    assert train.unlabel_ratio == (0 if name == "teacher" else 5)
    on_the_fly = "efficientnet-b0" if name == "student_on_the_fly" else None
    assert train.teacher_model_name == on_the_fly
    assert not chosen.hardware.use_tpu


@pytest.mark.parametrize("task, classes, images", [("imagenet", 1000, 130000), ("svhn", 10, 53113)])
def test_filtering_is_the_originals(task, classes, images, parse):
    """The values of local_scripts/<task>/filter_unlabel.sh."""
    chosen = config.from_flags(SelectConfig, parse(f"flags/run/{task}/filter.flags"))
    assert (chosen.num_label_classes, chosen.num_image) == (classes, images)
    assert (chosen.min_threshold, chosen.task, chosen.upsample) == (0.3, 0, 1)
    assert (chosen.file_prefix, chosen.num_shards) == ("extra", 128)


@pytest.mark.parametrize("task", ["imagenet", "svhn"])
def test_prediction_is_the_originals(task, settings):
    """The values of local_scripts/<task>/predict.sh and reassign.sh, with the right task."""
    for name, prefix in (("predict", "extra"), ("reassign", "train")):
        chosen = settings(f"flags/run/{task}/{name}.flags")
        assert (chosen.data.task_name, chosen.model.model_name) == (task, "efficientnet-b0")
        assert (chosen.predict.file_prefix, chosen.predict.num_shards) == (prefix, 128)
        shards = config.shard_list(chosen.predict.shard_id, 128)
        assert shards == list(range(128))
        assert chosen.predict.reassign_label == (name == "reassign")


@pytest.mark.parametrize("name, quick", [("digits", False), ("quick", True)])
def test_study_of_digits_is_the_demo_with_one_student(name, quick, parse):
    values = parse(f"flags/run/study/{name}.flags")
    chosen, loop = config.from_flags(Config, values), config.from_flags(LoopConfig, values)
    expected, expected_loop = demo.settings(demo.DemoConfig())
    expected = expected.override(label_data_dir="", unlabel_data_dir="")
    assert chosen.identity() == expected.identity()
    models = "efficientnet-b0,efficientnet-b0"
    assert loop == dataclasses.replace(expected_loop, work_dir="", models=models)
    options = config.from_flags(study.StudyConfig, values)
    assert options == study.StudyConfig(quick=quick)


def test_study_of_svhn_is_the_originals_student(parse):
    values = parse("flags/run/study/svhn.flags")
    chosen = config.from_flags(Config, values)
    student = config.from_flags(Config, parse("flags/run/svhn/student.flags"))
    assert chosen.identity() == student.identity()
    loop, filtering = (
        config.from_flags(LoopConfig, values),
        config.from_flags(SelectConfig, parse("flags/run/svhn/filter.flags")),
    )
    assert (loop.num_image, loop.min_threshold) == (filtering.num_image, filtering.min_threshold)


def test_digits_preset_is_the_loop_of_the_demo(parse):
    values = parse("flags/run/digits/noisy_student.flags")
    chosen, loop = config.from_flags(Config, values), config.from_flags(LoopConfig, values)
    expected, expected_loop = demo.settings(demo.DemoConfig())
    assert chosen.identity() == expected.identity()
    assert chosen.train.steps_per_eval == expected.train.steps_per_eval
    assert dataclasses.replace(loop, work_dir="") == dataclasses.replace(expected_loop, work_dir="")
