"""Flags: one per field, the original's names and defaults, and early errors for invalid values."""

from __future__ import annotations

import ast
import dataclasses
import json
import typing
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from efficientnet_ns import config
from efficientnet_ns.config import (
    BenchmarkConfig,
    CheckConfig,
    Config,
    ConfigError,
    ConvertConfig,
    CustomRobustnessConfig,
    DataConfig,
    DemoConfig,
    EvalConfig,
    ExportConfig,
    FilterConfig,
    HardwareConfig,
    ImportConfig,
    LabelsConfig,
    LegacyConfig,
    ListConfig,
    LoopConfig,
    MakeConfig,
    ModeConfig,
    ModelConfig,
    PhotosConfig,
    PicturesConfig,
    PipelineConfig,
    PredictConfig,
    RayConfig,
    ReportConfig,
    RobustnessConfig,
    SelectConfig,
    StudyConfig,
    SvhnConfig,
    TrainConfig,
)
from efficientnet_ns.loop.questions import STUDIES
from efficientnet_ns.resolve.resolved_config import ResolvedConfig

ROOT = Path(__file__).parents[2]
SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "evaluation": EvalConfig,
    "predict": PredictConfig,
    "hardware": HardwareConfig,
    "legacy": LegacyConfig,
}
# Maps each program to the dataclasses whose fields are its flags.
ENTRIES = {
    "main": [ModeConfig, Config],
    "noisy_student": [PicturesConfig, Config, LoopConfig],
    "study": [Config, LoopConfig, StudyConfig],
    "filter_unlabel": [SelectConfig, FilterConfig],
    "demo": [DemoConfig],
    "export_model": [Config, ExportConfig],
    "import_predictions": [ImportConfig],
    "check_data": [CheckConfig],
    "check_labels": [LabelsConfig],
    "labeling_report": [SelectConfig, ReportConfig],
    "label_beam": [Config, PipelineConfig],
    "label_ray": [Config, PipelineConfig, RayConfig],
    "evaluate_robustness": [Config, CustomRobustnessConfig, RobustnessConfig],
    "make_records": [MakeConfig],
    "proc_svhn": [SvhnConfig],
    "predict_image": [Config, PhotosConfig],
    "convert_checkpoint": [ModelConfig, ConvertConfig],
    "list_models": [ListConfig],
    "benchmark": [BenchmarkConfig],
}
ALL = list(
    dict.fromkeys(
        cls
        for classes in ENTRIES.values()
        for one in classes
        for cls in (SECTIONS.values() if one is Config else [one])
    )
)

# Maps each program to the programs of google-research/noisystudent (commit aac52bf) whose flags it
# takes, with their names, types and defaults. Here, predict_label.py is `main --mode=predict`.
ORIGINAL = {
    "main": ["main.py", "predict_label.py"],
    "filter_unlabel": ["filter_unlabel.py"],
    "proc_svhn": ["proc_svhn.py"],
}
KINDS = {"string": "str", "integer": "int", "float": "float", "bool": "bool"}


def flatten(cls: type) -> list[tuple[type, dataclasses.Field]]:
    """Returns (dataclass, field) for every setting."""
    classes = SECTIONS.values() if cls is Config else [cls]
    return [(owner, field) for owner in classes for field in dataclasses.fields(owner)]


def kind_of(cls: type, name: str) -> type:
    hint = typing.get_type_hints(cls)[name]
    (kind,) = [a for a in typing.get_args(hint) or [hint] if a is not type(None)]
    return kind


@pytest.fixture
def flags_of(entry_flags):
    """Maps a program to its flags by name."""

    def found(entry: str) -> dict[str, flags.Flag]:
        values = entry_flags(entry, [])
        return {name: values[name] for name in values if name not in flags.FlagValues()}

    return found


def kind_of_flag(flag: flags.Flag) -> str:
    return {"string": "str", "string enum": "str"}.get(flag.flag_type(), flag.flag_type())


# One flag per field.


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_field_is_a_flag(entry, flags_of):
    found = flags_of(entry)
    fields = [pair for cls in ENTRIES[entry] for pair in flatten(cls)]
    aliases = {field.metadata["alias"] for _, field in fields} - {None}
    assert set(found) == {field.name for _, field in fields} | aliases
    for cls, field in fields:
        flag, default = found[field.name], field.metadata["documented"]
        assert (type(flag.default), flag.default) == (type(default), default), field.name
        assert kind_of_flag(flag) == kind_of(cls, field.name).__name__, field.name
        choices = getattr(flag.parser, "enum_values", None) or []
        assert [value for value in choices if value] == list(field.metadata["choices"] or [])
        assert not choices or ("" in choices) == (default is None), field.name
        assert flag.help.endswith(field.metadata["help"]), field.name


def test_every_program_is_known():
    root = {path.stem for path in (ROOT / "efficientnet_ns").glob("*.py")}
    assert set(ENTRIES) == root - {"__init__", "__main__"}


def test_studies_are_listed_in_help():
    listed = StudyConfig.__dataclass_fields__["studies"].metadata["help"]
    assert listed.endswith(f": {', '.join(STUDIES)}.")


@pytest.mark.parametrize("argument, shard", [([], None), (["--shard_id=0"], 0)])
def test_not_given_is_none(argument, shard):
    """The value is None although --help shows a default, which may also be given explicitly."""
    assert parse(SelectConfig, *argument).shard_id == shard
    assert Config().identity()["num_label_classes"] == 1000


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_fields_are_consistent(cls):
    for _, field in flatten(cls):
        kind, default = kind_of(cls, field.name), field.default
        assert kind in (str, int, float, bool), field.name
        optional = type(None) in typing.get_args(typing.get_type_hints(cls)[field.name])
        assert optional if default is None else type(default) is kind, field.name
        choices, low = field.metadata["choices"], field.metadata["low"]
        assert not choices or default is None or default in choices, field.name
        assert low is None or default is None or default >= low, field.name
        assert field.metadata["help"].endswith("."), field.name


def test_sections_share_no_names():
    names = [field.name for cls in (Config, LoopConfig) for _, field in flatten(cls)]
    assert len(names) == len(set(names))
    assert {f.name: type(f.default) for f in dataclasses.fields(Config)} == SECTIONS


@pytest.mark.parametrize("entry", ORIGINAL)
def test_the_originals_names_types_and_defaults(entry, flags_of, goldens):
    table = json.loads((goldens / "flags" / "original_flags.json").read_text())
    found = flags_of(entry)
    originals = [flag for program in ORIGINAL[entry] for flag in table[program]]
    assert len(originals) > 3
    for flag in originals:
        ours = found[flag["name"]]
        kind, default = KINDS[flag["type"]], flag["default"]
        assert [kind_of_flag(ours), ours.default] == [kind, default], flag["name"]


def test_values_of_the_original_are_accepted():
    """The original's help texts list no choices. Its code accepts these values."""
    for argument in (
        "--augment_name=v1",
        "--unl_aug=default",
        "--unl_aug=v1",
        "--data_format=channels_first",
        "--data_format=channels_last",
        "--master=grpc://10.0.0.2:8470",
        "--notranspose_input",
        "--fix_layer_num=-1",
        "--num_tpu_cores=8",
    ):
        parse(Config, argument)


def test_flags_without_effect_are_named():
    settings = parse(Config, "--master=x", "--skip_host_call", "--num_tpu_cores=8", "--seed=3")
    assert settings.legacy.without_effect() == [
        "--master=x",
        "--skip_host_call=True",
        "--num_tpu_cores=8",
    ]
    assert not Config().legacy.without_effect()
    for _, field in flatten(LegacyConfig):
        assert field.metadata["help"].startswith("Accepted for old command lines; "), field.name
        assert field.metadata["free"], field.name


# From the command line.


def parse(cls: type, *arguments: str):
    values = flags.FlagValues()
    config.define_flags(cls, flag_values=values)
    values(["program", *arguments])
    return config.from_flags(cls, values)


def test_defaults():
    assert parse(Config) == Config()
    assert parse(SelectConfig) == SelectConfig()
    assert parse(LoopConfig) == LoopConfig()


def test_values_reach_their_fields():
    settings = parse(
        Config,
        "--model_name=efficientnet-b7",
        "--input_image_size=300",
        "--dropout_rate=0.4",
        "--nocutout_op",
        "--randaug_mode=clipped",
        "--train_ratio=2",
        "--shard_id=3,5-7",
        "--use_tpu=false",
    )
    expected = {
        "model_name": "efficientnet-b7",
        "input_image_size": 300,
        "dropout_rate": 0.4,
        "cutout_op": False,
        "randaug_mode": "clipped",
        "train_ratio": 2.0,
        "shard_id": "3,5-7",
        "use_tpu": False,
    }
    assert settings == Config().override(**expected)
    assert settings != Config()


@pytest.mark.parametrize(
    "argument",
    [
        "--train_steps=many",
        "--train_steps=1.5",
        "--base_learning_rate=high",
        "--cutout_op=perhaps",
        "--augment_name=autoaugment2",
        "--unl_aug=randaugmnt",
        "--randaug_mode=clip",
        "--trian_steps=1",
    ],
)
def test_wrong_values_and_names_are_refused(argument):
    with pytest.raises(flags.Error) as e:
        parse(Config, argument)
    assert argument.split("=")[0].lstrip("-") in str(e.value)


BOUNDED = [
    (cls, field.name, field.metadata["low"])
    for cls in ALL
    for _, field in flatten(cls)
    if field.metadata["low"] is not None
]


@pytest.mark.parametrize("cls, name, low", BOUNDED, ids=lambda x: getattr(x, "__name__", str(x)))
def test_values_below_the_bound_name_the_flag(cls, name, low):
    entry = Config if cls in SECTIONS.values() else cls
    below = low - 1
    with pytest.raises(ConfigError, match=rf"--{name}={below}.*at least {low}"):
        parse(entry, f"--{name}={below}")
    assert parse(entry, f"--{name}={low}") is not None


CEILINGS = [
    (cls, field.name, field.metadata["high"])
    for cls in ALL
    for _, field in flatten(cls)
    if field.metadata["high"] is not None
]


@pytest.mark.parametrize("cls, name, high", CEILINGS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_values_above_the_bound_name_the_flag(cls, name, high):
    entry = Config if cls in SECTIONS.values() else cls
    above = high + (1 if isinstance(high, int) else 0.5)
    with pytest.raises(ConfigError, match=rf"--{name}={above}.*at most {high}"):
        parse(entry, f"--{name}={above}")
    assert parse(entry, f"--{name}={high}") is not None


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_that_are_not_finite_are_refused(value):
    for name in ("base_learning_rate", "teacher_softmax_temp", "max_bad_fraction", "final_base_lr"):
        with pytest.raises(ConfigError, match=f"--{name}={value}: a finite number"):
            parse(Config, f"--{name}={value}")
    for cls, name in ((SelectConfig, "max_prob"), (LoopConfig, "min_threshold")):
        with pytest.raises(ConfigError, match=f"--{name}={value}: a finite number"):
            parse(cls, f"--{name}={value}")


@pytest.mark.parametrize(
    "values, message",
    [
        ({"augment_name": "randaugmnet"}, "--augment_name='randaugmnet': must be one of"),
        ({"train_batch_size": "8"}, "--train_batch_size='8': a whole number"),
        ({"train_batch_size": 0}, "--train_batch_size=0 is too small"),
        ({"label_data_dir": ["a", "b"]}, r"--label_data_dir=\['a', 'b'\]: a string"),
        ({"base_learning_rate": "0.1"}, "--base_learning_rate='0.1': a number"),
        ({"use_cache": "no"}, "--use_cache='no': True or False"),
        ({"train_steps": None}, "--train_steps=None: a whole number"),
        ({"model_dir": "m\udce4"}, r"--model_dir='m\\udce4' is not UTF-8"),
    ],
)
def test_values_set_in_python_are_checked(values, message):
    with pytest.raises(ConfigError, match=message):
        config.check(Config().override(**values))


def test_numbers_of_numpy_are_numbers():
    config.check(Config().override(train_steps=np.int64(3), warmup_epochs=np.float32(1)))
    config.check(Config().override(warmup_epochs=1))


@pytest.mark.parametrize("settings", [{"train_steps": 3}, Config, None])
def test_settings_of_another_kind_are_refused(settings):
    with pytest.raises(ConfigError, match="settings are required, such as Config"):
        config.check(settings)


def test_home_folders_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere/me")
    parsed = parse(Config, "--model_dir=~/m", "--label_data_dir=~/a;b;~", "--init_skip=~")
    assert parsed.train.model_dir == "/somewhere/me/m"
    assert parsed.data.label_data_dir == "/somewhere/me/a;b;/somewhere/me"
    assert parsed.train.init_skip == "~"
    assert Config().override(unlabel_data_dir="~/u").data.unlabel_data_dir == "/somewhere/me/u"


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (PicturesConfig, "labeled"),
        (PicturesConfig, "unlabeled"),
        (PicturesConfig, "test"),
        (SelectConfig, "exclude"),
        (SelectConfig, "reviewed"),
        (ReportConfig, "truth"),
        (RobustnessConfig, "weights"),
        (ImportConfig, "source"),
        (ImportConfig, "class_map"),
        (ConvertConfig, "target"),
        (Config, "init_weights"),
    ],
)
def test_home_folders_are_expanded_in_paths_of_any_name(cls, name, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere/me")
    values = config.as_dict if cls is not Config else Config.identity
    assert values(parse(cls, f"--{name}=~/a"))[name] == "/somewhere/me/a"
    # Keywords that stand for a location are not expanded.
    assert values(parse(cls, f"--{name}=published"))[name] == "published"


def test_there_are_bounds():
    names = {name for _, name, _ in BOUNDED}
    assert {"train_steps", "train_batch_size", "num_shards", "seed", "unlabel_ratio"} <= names


@pytest.mark.parametrize("below", ["", "/", "/model", "/runs/model"])
def test_folder_to_write_that_is_a_file(tmp_path, below):
    path = tmp_path / "notes.txt"
    path.touch()
    with pytest.raises(ConfigError, match=f"--model_dir={path}{below}: {path} is not a folder"):
        parse(Config, f"--model_dir={path}{below}")


def test_folders_to_write_that_can_be_made(tmp_path):
    for path in (tmp_path, tmp_path / "new/model", "new/model", "gs://bucket/model", ""):
        assert parse(Config, f"--model_dir={path}").train.model_dir == str(path)


def test_paths_compare_without_the_slash_at_their_end():
    ours = {"label_data_dir": "a/;b", "task_name": "t/", "init_skip": "head/", "seed": 1}
    assert config.comparable({**ours, "init_model_path": None}) == {
        **ours,
        "label_data_dir": "a;b",
        "task_name": "t",
        "init_model_path": None,
    }


@pytest.mark.parametrize("nothing", ["none", ""])
def test_a_preset_can_be_taken_back(nothing):
    """Training is then the same as without the preset's value."""
    preset = f"--flagfile={ROOT}/flags/model/b2.flags"
    assert parse(Config, preset).data.augment_name == "randaugment"
    plain = parse(Config, preset, f"--augment_name={nothing}")
    assert plain.data.augment_name is None
    assert plain.override(augment_name="randaugment") == parse(Config, preset)
    assert ResolvedConfig.from_config(plain).labeled_preprocessing.augmentation is None


def test_none_means_something_where_it_is_not_the_default():
    assert parse(Config, "--unl_aug=none").data.unl_aug == "none"
    with pytest.raises(flags.Error, match="unl_aug"):
        parse(Config, "--unl_aug=")


# Config.


def test_override():
    base = Config()
    changed = base.override(model_name="efficientnet-b1", seed=7, num_shards=3, tpu="local")
    assert (changed.model.model_name, changed.train.seed) == ("efficientnet-b1", 7)
    assert (changed.predict.num_shards, changed.hardware.tpu) == (3, "local")
    assert base == Config()
    assert changed.override(model_name=None, seed=0, num_shards=128, tpu=None) == base


def test_override_of_an_unknown_name():
    with pytest.raises(ConfigError, match="'trian_steps'"):
        Config().override(train_steps=3, trian_steps=3)
    with pytest.raises(ConfigError, match="'model'"):
        Config().override(model=ModelConfig())


def test_identity():
    """Covers sections that determine the weights, except what may change between runs, as JSON."""
    identity = Config().identity()
    free = {
        "data_source",
        "data_cache_dir",
        "tfds_data_dir",
        "model_dir",
        "num_eval_images",
        "num_test_images",
        "log_step_count_steps",
        "preview_images",
        "debug",
        "steps_per_eval",
        "patience",
        "save_checkpoints_steps",
        "keep_checkpoint_max",
        "iterations_per_loop",
    }
    fields = [f.name for s in ("model", "data", "train") for _, f in flatten(SECTIONS[s])]
    assert set(identity) == set(fields) - free and free < set(fields)
    assert json.loads(json.dumps(identity)) == identity
    assert {"seed", "train_steps", "model_name", "label_data_dir", "randaug_mag"} <= set(identity)


def test_identity_changes_with_what_matters_only():
    base = Config().identity()
    assert Config().override(seed=1).identity() == {**base, "seed": 1}
    for name in ("eval_batch_size", "keep_checkpoint_max", "worker_id"):
        assert Config().override(**{name: 3}).identity() == base
    assert Config().override(model_dir="a", tpu="b", use_bfloat16=False).identity() == base


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0", [0]),
        ("127", [127]),
        ("0,3,8-11", [0, 3, 8, 9, 10, 11]),
        ("5-5", [5]),
        (" 1, 2-3 ", [1, 2, 3]),
        ("7,2", [7, 2]),
    ],
)
def test_shard_list(text, expected):
    assert config.shard_list(text, 128) == expected


@pytest.mark.parametrize(
    "text, named",
    [
        ("128", "128"),
        ("0-128", "128"),
        ("a", "'a'"),
        ("", "''"),
        ("1,", "''"),
        ("-3", "'-3'"),
        ("1-2-3", "'1-2-3'"),
        ("1.5", "'1.5'"),
        ("8-3", "'8-3'"),
        ("²", "'²'"),
    ],
)
def test_wrong_shard_list(text, named):
    with pytest.raises(ConfigError) as e:
        config.shard_list(text, 128)
    assert f"--shard_id={text}" in str(e.value)
    assert named in str(e.value).split(f"--shard_id={text}", 1)[1]


# Every setting has an effect.


def names_read(source: str) -> set[str]:
    """Returns attributes that are read, and strings in functions that call `getattr`."""
    found = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        if isinstance(node, ast.FunctionDef):
            calls = [n for n in ast.walk(node) if isinstance(n, ast.Call)]
            if any(isinstance(c.func, ast.Name) and c.func.id == "getattr" for c in calls):
                texts = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
                found.update(text for text in texts if isinstance(text, str))
    return found


def test_names_read():
    source = """
def f(x):
    "a docstring"
    x.written = x.read(keyword=1)
    return "text"
def g(x):
    return [getattr(x, name) for name in ("by_name",)]
"""
    found = names_read(source)
    assert {"read", "by_name"} <= found
    assert not {"written", "keyword", "text", "a docstring"} & found


def test_every_setting_is_read_somewhere():
    package = ROOT / "efficientnet_ns"
    sources = [p for p in package.rglob("*.py") if p != package / "config.py"]
    read = set().union(*(names_read(path.read_text()) for path in sources))
    # Legacy flags have no effect, as their help states.
    settings = {f.name for cls in ALL if cls is not LegacyConfig for _, f in flatten(cls)}
    assert len(settings) > 60
    # Accepted for old scripts: they allow one value or have no effect, as their help states.
    assert settings - read == {"data_type", "eval_imagenet_p"}


def test_shards_named_twice_count_once():
    assert config.shard_list("0-2,1,2", 4) == [0, 1, 2]


def test_paths_become_strings(tmp_path):
    """Every dataclass of settings accepts `pathlib.Path` for a path."""
    classes = [
        ModelConfig,
        DataConfig,
        TrainConfig,
        EvalConfig,
        PredictConfig,
        SelectConfig,
        LoopConfig,
    ]
    classes += [MakeConfig, SvhnConfig, ExportConfig]
    for cls in classes:
        names = [f.name for f in dataclasses.fields(cls) if f.name.endswith(("_dir", "_path"))]
        made = cls(**dict.fromkeys(names, tmp_path))
        assert all(getattr(made, name) == str(tmp_path) for name in names)
    config = Config().override(model_dir=tmp_path, label_data_dir=tmp_path)
    assert config.train.model_dir == config.data.label_data_dir == str(tmp_path)
