"""Studies: the table of questions, shared and resumed runs, and summaries."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes import loop_settings as settings
from fakes import write_loop_data as write_data
from scipy import stats

from efficientnet_ns import config as config_lib
from efficientnet_ns.config import Config, ConfigError, LoopConfig, SelectConfig
from efficientnet_ns.evaluation import evaluate
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.loop import questions, study, study_results
from efficientnet_ns.loop.questions import STUDIES, Arm, Study
from efficientnet_ns.pseudo_labels import predict
from efficientnet_ns.resolve.resolved_config import ResolvedConfig
from efficientnet_ns.training import train
from efficientnet_ns.training.session import TrainingDiverged

ROOT = Path(__file__).parents[2]
EVERY_ARM = [(name, arm) for name, of in STUDIES.items() for arm in of.arms]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("study")
    write_data(path)
    return path


@pytest.fixture(scope="module")
def config(folder) -> Config:
    return Config().override(**settings(folder))


def loop_in(folder: Path) -> LoopConfig:
    return LoopConfig(
        work_dir=str(folder),
        models="efficientnet-test,efficientnet-test",
        teacher_steps=3,
        num_image=5,
        min_threshold=0.2,
    )


def pieces(config: Config, folder: Path, **changes) -> list[study.Work]:
    return study.pieces(config, loop_in(folder), changes)


def kinds(work: list[study.Work]) -> list[str]:
    return [piece.kind for piece in work]


def test_images_of_a_training_are_those_it_computes(config):
    """The estimate of the remaining time uses them; the paper's ablations set train_ratio."""
    plain = config.override(train_steps=10, train_batch_size=4, unlabel_ratio=1.5)
    assert study._images(plain) == 10 * (4 + 6)
    assert study._images(plain.override(train_ratio=2.0)) == 20 * 10
    last = plain.override(train_ratio=2.0, train_last_step_num=3, label_data_sample_prob=0.5)
    assert study._images(last) == 6 * (4 + 3)


def test_slash_at_the_end_of_a_path_makes_no_other_folder(config, folder):
    slashed = config.override(label_data_dir=f"{config.data.label_data_dir}/")
    assert [w.config.train.model_dir for w in pieces(slashed, folder) if w.kind == "train"] == [
        w.config.train.model_dir for w in pieces(config, folder) if w.kind == "train"
    ]


# --- The table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, arm", EVERY_ARM)
def test_every_arm_can_be_configured(name, arm, config, folder):
    changes = STUDIES[name].arms[arm].changes
    work = pieces(config, folder, **changes)
    assert work[-1].kind == "train"
    for piece in work:
        config_lib.check(piece.config)
        if piece.kind != "select":
            ResolvedConfig.from_config(piece.config)
    sections = (*(type(section) for section in vars(Config()).values()), SelectConfig)
    fields = {field.name: field for cls in sections for field in dataclasses.fields(cls)}
    for key in set(changes) & set(fields):
        choices = fields[key].metadata["choices"]
        assert not choices or changes[key] in choices, key


def test_comparisons_of_the_table():
    for name, of in STUDIES.items():
        first = next(iter(of.arms))
        assert of.arms[first].quick and not of.arms[first].against
        for arm in of.arms.values():
            assert arm.expected in (-1, 0, 1, None)
            if arm.against:
                assert arm.against in of.arms
                assert of.arms[arm.against].quick or not arm.quick
        differing = {json.dumps(dict(arm.changes), sort_keys=True) for arm in of.arms.values()}
        assert len(differing) == len(of.arms), name


@pytest.mark.parametrize("temperature", [-1.0, 1.0])
def test_labels_are_as_their_arms_say_whatever_the_loop_has(temperature, config, folder):
    own = config.override(teacher_softmax_temp=temperature)
    for name, arm in STUDIES["labels"].arms.items():
        student = pieces(own, folder, **arm.changes)[-1].config
        assert (student.train.teacher_softmax_temp > 0) == name.startswith("soft"), name


def test_quick_study_leaves_out_what_has_nothing_to_compare():
    chosen = study.chosen_studies("noise,joint,labels", quick=True)
    assert list(chosen) == ["noise", "labels"]
    assert "hard" in chosen["labels"].arms
    assert "hard, confidence from 0.7" not in chosen["labels"].arms
    assert set(study.chosen_studies("all", quick=False)) == set(STUDIES)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"studies": "noise,nois"}, "--studies: there is no 'nois'; known: all, noise, labels"),
        ({"studies": "joint", "quick": True}, "--quick has no arms of --studies=joint"),
        ({"seeds": "0,one"}, "--seeds=0,one"),
        ({"seeds": "1,1"}, "--seeds=1,1"),
    ],
)
def test_options_that_cannot_work(options, message, config, tmp_path):
    with pytest.raises(ConfigError, match=message):
        study.run_study(config, loop_in(tmp_path / "w"), study.StudyConfig(**options))
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "loop, message",
    [
        ({"work_dir": ""}, "--work_dir"),
        ({"models": "efficientnet-test"}, "--models=efficientnet-test"),
        ({"finetune_resolution": 16}, "--finetune_resolution"),
    ],
)
def test_loops_that_are_no_study(loop, message, config, tmp_path):
    with pytest.raises(ConfigError, match=message):
        study.run_study(config, dataclasses.replace(loop_in(tmp_path), **loop), study.StudyConfig())


def test_unknown_setting_of_an_arm():
    with pytest.raises(ConfigError, match="'unlabel_ration'"):
        study.split_changes({"unlabel_ration": 1.0})


# --- Pieces of arms -------------------------------------------------------------------------------


def test_pieces_of_the_loop(config, folder):
    work = pieces(config, folder, rounds=2)
    assert kinds(work) == ["train", "label", "select", "train", "label", "select", "train"]
    teacher, _, selection, first, labeling, _, second = (piece.config for piece in work)
    assert (teacher.train.train_steps, teacher.train.unlabel_ratio) == (3, 0)
    assert first.data.unlabel_data_dir == os.path.join(selection.output_dir, "data")
    assert labeling.predict.predict_ckpt_path == first.train.model_dir
    assert first.train.train_steps == second.train.train_steps == 2
    assert len({piece.train.model_dir for piece in (teacher, first, second)}) == 3


def test_what_the_method_changes(config, folder):
    def last(**changes) -> Config:
        return pieces(config, folder, **changes)[-1].config

    teacher = pieces(config, folder, rounds=0)
    assert kinds(teacher) == ["train"]
    alone = pieces(config, folder, labels_only=True)
    assert kinds(alone) == ["train"]
    assert (alone[0].config.train.train_steps, alone[0].config.train.unlabel_ratio) == (5, 0)
    own = pieces(config, folder, own_labels=True)
    assert kinds(own) == ["train"]
    assert (own[0].config.train.train_steps, own[0].config.train.unlabel_ratio) == (5, 1)
    assert own[0].config.train.consistency_threshold == 0.95
    assert own[0].config.data.unlabel_data_dir == config.data.unlabel_data_dir
    warm = last(warm_start=True)
    assert warm.train.init_model
    assert warm.train.init_model_path == teacher[0].config.train.model_dir
    *_, before, tuned = pieces(config, folder, pretrain=True)
    assert (before.config.train.label_weight, before.config.train.unlabel_ratio) == (0, 1)
    assert tuned.config.train.init_model_path == before.config.train.model_dir
    assert (tuned.config.train.unlabel_ratio, tuned.config.train.train_last_step_num) == (0, 1)
    skipping = config.override(init_weights="published", init_skip="dense")
    *_, before, tuned = pieces(skipping, folder, pretrain=True)
    assert before.config.train.init_skip == "dense" and tuned.config.train.init_model
    assert (tuned.config.train.init_weights, tuned.config.train.init_skip) == (None, "")
    assert last(student_width=2.0).model.width_coefficient == 2
    wide = pieces(config, folder, teacher_width=1.5)
    assert wide[0].config.model.width_coefficient == 1.5
    assert wide[-1].config.model.width_coefficient is None
    few = pieces(config, folder, images=0.4, use_top=0)[2].config
    assert (few.num_image, few.use_top) == (2, 0)
    noised = pieces(config, folder, noised_teacher=True)
    assert noised[1].config.predict.noised_teacher
    assert noised[0] == pieces(config, folder)[0]
    assert (
        noised[1].config.predict.output_dir != pieces(config, folder)[1].config.predict.output_dir
    )


def test_folders_are_named_by_all_that_determines_them(config, folder):
    """A change of the teacher's settings also changes the student's folder."""

    def folders(config: Config, **changes) -> list[str]:
        return [
            getattr(piece.config, "output_dir", None) or piece.config.train.model_dir
            for piece in pieces(config, folder, **changes)
            if piece.kind != "label"
        ]

    assert folders(config) == folders(config)
    # Settings that may change between runs of one training do not affect folder names.
    assert folders(config.override(eval_batch_size=3)) == folders(config)
    for other in (
        folders(config.override(seed=4)),
        folders(config, teacher_width=2.0),
        folders(config.override(weight_decay=0.5)),
    ):
        assert not set(other) & set(folders(config))
    hard = folders(config, teacher_softmax_temp=-1.0), folders(config, teacher_softmax_temp=1.0)
    assert hard[0][:2] == hard[1][:2] and hard[0][2] != hard[1][2]


def test_folders_do_not_depend_on_where_the_work_dir_is(config, tmp_path):
    def names(work_dir: str) -> list[str]:
        # A study stores the data it creates in its work_dir.
        own = config.override(label_data_dir=os.path.join(work_dir, "data"))
        loop = dataclasses.replace(loop_in(tmp_path), work_dir=work_dir)
        work = study.pieces(own, loop, {})
        return [Path(p.config.train.model_dir).name for p in work if p.kind == "train"]

    first = names(f"{tmp_path}/a")
    assert names(f"{tmp_path}/b") == names(f"{tmp_path}/a/") == first
    assert len(set(first)) == 2


# --- Running --------------------------------------------------------------------------------------

TABLE = {
    "tiny": Study(
        "?",
        "§0",
        "Nothing.",
        {
            "as it is": Arm({}, "1.0"),
            "soft": Arm({"teacher_softmax_temp": 1.0}, "2.0", 1),
            "the same": Arm({"unlabel_ratio": 1.0}, "", 0, against="soft"),
        },
    ),
    "none": Study(
        "?", "§0", "Nothing.", {"as it is": Arm({}), "empty": Arm({"min_threshold": 0.99})}
    ),
}


MAY_FINISH = "may finish"


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Replaces training and evaluation with stubs; returns the training folders."""
    folders = []

    def training(config: Config, evaluate: bool) -> dict:
        folders.append(config.train.model_dir)
        if len(folders) == 4 and folders[0] != MAY_FINISH:
            raise KeyboardInterrupt
        os.makedirs(config.train.model_dir)
        return {"step": config.train.train_steps}

    def measure(config: Config) -> dict:
        number = int(Path(config.train.model_dir).name.split("-")[1], 16)
        return {"validation": {"top1": 0.0}, "test": {"top1": number % 1000 / 1000}}

    monkeypatch.setattr(train, "train_and_evaluate", training)
    monkeypatch.setattr(evaluate, "evaluate", measure)
    monkeypatch.setattr(study, "_DO", {**study._DO, "label": lambda _: None, "select": select})
    monkeypatch.setattr(study, "STUDIES", TABLE)
    return folders


def select(config: SelectConfig) -> None:
    """Stub of a selection; no image is as confident as one arm of `TABLE` requires."""
    if config.min_threshold > 0.98:
        raise DataError("no image is left")


@pytest.mark.slow
def test_interrupted_study_does_not_train_twice(trained, config, tmp_path):
    """Two seeds, each a teacher and two students for five arms; the fourth run is interrupted."""
    arguments = config, loop_in(tmp_path), study.StudyConfig(seeds="3,4")
    with pytest.raises(KeyboardInterrupt):
        study.run_study(*arguments)
    begun, trained[:] = list(trained), [MAY_FINISH]
    # The first seed is complete.
    assert list(json.loads((tmp_path / "study.json").read_text())["seeds"]) == [3]
    answer = study.run_study(*arguments)
    # The interrupted training restarts; earlier ones are not repeated.
    assert trained[1] == begun[3]
    assert len(set(begun)) == 4 and len(set(trained[1:])) == len(trained[1:]) == 3
    assert len({*begun, *trained[1:]}) == 6
    assert answer["seeds"] == [3, 4]
    arms = answer["studies"]["tiny"]["arms"]
    assert arms["the same"]["top1"] == arms["as it is"]["top1"] != arms["soft"]["top1"]
    assert len(set(arms["as it is"]["top1"].values())) == 2
    assert answer["studies"]["none"]["arms"]["empty"]["top1"] == {"3": None, "4": None}
    trained[:] = [MAY_FINISH]
    assert study.run_study(*arguments) == answer
    assert trained == [MAY_FINISH]


def test_teacher_that_cannot_be_trained_ends_the_study(trained, config, tmp_path, monkeypatch):
    def diverging(config: Config, evaluate: bool):
        raise TrainingDiverged("the loss became nan")

    monkeypatch.setattr(train, "train_and_evaluate", diverging)
    with pytest.raises(TrainingDiverged):
        study.run_study(config, loop_in(tmp_path), study.StudyConfig(seeds="3"))


def test_a_diverging_arm_of_one_training_has_no_result(config, tmp_path, monkeypatch):
    """No other arm depends on it, so the study continues."""

    def diverging(config: Config, evaluate: bool):
        raise TrainingDiverged("the loss became nan")

    monkeypatch.setattr(train, "train_and_evaluate", diverging)
    alone = pieces(config, tmp_path, labels_only=True)
    assert study.Runner([alone]).result("labels only", alone) is None
    student = pieces(config, tmp_path)
    with pytest.raises(TrainingDiverged):
        study.Runner([student]).result("student", student)


@pytest.fixture(scope="module")
def finished(config, folder) -> tuple[Path, dict, list[str], list[str]]:
    """Returns (work_dir, answer, training folders, labeling folders) of a complete study."""
    trained, labeled = [], []
    original, label = train.train_and_evaluate, predict.predict

    def training(config: Config, **kwargs):
        trained.append(config.train.model_dir)
        return original(config, **kwargs)

    def labeling(config: Config):
        counts = label(config)
        labeled.extend([config.predict.output_dir] * (counts["skipped_shards"] == 0))
        return counts

    work_dir = folder / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "STUDIES", TABLE)
        patch.setattr(train, "train_and_evaluate", training)
        patch.setattr(predict, "predict", labeling)
        answer = study.run_study(config, loop_in(work_dir), study.StudyConfig(seeds="3"))
    return work_dir, answer, trained, labeled


@pytest.mark.slow
def test_arms_share_what_is_equal(finished):
    """Arms share a teacher, its labels and two students; the arm without images trains nothing."""
    _, _, trained, labeled = finished
    assert len(trained) == len(set(trained)) == 3
    assert all((Path(folder) / "measured.json").exists() for folder in trained)
    assert len(labeled) == 1


@pytest.mark.slow
def test_answer(finished):
    work_dir, answer, _, _ = finished
    assert (answer["set"], answer["seeds"]) == ("test", [3])
    arms = answer["studies"]["tiny"]["arms"]
    assert list(arms) == ["as it is", "soft", "the same"]
    assert arms["the same"]["top1"] == arms["as it is"]["top1"]
    assert arms["the same"]["against"] == "soft"
    value, other = arms["as it is"]["top1"]["3"], arms["soft"]["top1"]["3"]
    assert arms["soft"]["mean"] == pytest.approx(100 * other)
    assert arms["soft"]["difference"] == pytest.approx(100 * (other - value))
    assert arms["the same"]["difference"] == pytest.approx(100 * (value - other))
    assert (arms["soft"]["sd"], arms["soft"]["n"]) == (None, 1)


@pytest.mark.slow
def test_arm_without_images_has_no_result(finished):
    """A threshold above every confidence leaves no images; the other arms continue."""
    _, answer, _, _ = finished
    arms = answer["studies"]["none"]["arms"]
    assert (arms["empty"]["top1"], arms["empty"]["n"]) == ({"3": None}, 0)
    assert arms["as it is"]["n"] == 1


@pytest.mark.slow
def test_files(finished):
    work_dir, answer, _, _ = finished
    assert json.loads((work_dir / "study.json").read_text()) == answer
    text = (work_dir / "study.md").read_text()
    mean = answer["studies"]["tiny"]["arms"]["soft"]["mean"]
    assert f"| soft | {mean:.1f} (n=1) |" in text
    assert "(to 'soft')" in text and "| empty | – (n=0) | – |" in text
    assert (work_dir / "study.png").read_bytes().startswith(b"\x89PNG")
    assert "tiny: ?" in (work_dir / "study.html").read_text()


@pytest.mark.slow
def test_every_kind_of_change_can_be_run(finished, config, monkeypatch):
    """Each change yields a separate model; the teacher is shared with the other study."""
    work_dir, _, trained, _ = finished
    changes = {
        "as it is": {},
        "noised": {"noised_teacher": True, "dropout_rate": 0.5},
        "pretrained": {"pretrain": True},
        "warm": {"warm_start": True},
        "wide": {"student_width": 2.0},
        "few": {"images": 0.4, "use_top": 0},
        "once": {"use_all": True, "unl_aug": "clean", "unl_model_noise": False},
        "again": {"rounds": 2},
        "alone": {"labels_only": True},
    }
    arms = {name: Arm(of) for name, of in changes.items()}
    monkeypatch.setattr(study, "STUDIES", {"kinds": Study("?", "§0", "Nothing.", arms)})
    before = len(list((work_dir / "cache").glob("train-*")))
    answer = study.run_study(config, loop_in(work_dir), study.StudyConfig(seeds="3"))
    assert all(arm["n"] == 1 for arm in answer["studies"]["kinds"]["arms"].values())
    # The pretrained arm takes two training runs, the first arm none.
    assert len(list((work_dir / "cache").glob("train-*"))) == before + len(changes)


KILLED_ONCE = """
import json, os, signal, sys
import test_study
from efficientnet_ns.loop import study
from efficientnet_ns.config import Config
from efficientnet_ns.models import checkpoint_files

moment, settings, folder = json.loads(sys.argv[1])
save = checkpoint_files.write_checkpoint

def killing(prefix, tensors):
    save(prefix, tensors)
    if moment in prefix:
        os.kill(os.getpid(), signal.SIGKILL)

study.STUDIES = test_study.TABLE
checkpoint_files.write_checkpoint = killing
config = Config().override(**settings)
study.run_study(config, test_study.loop_in(folder), study.StudyConfig(seeds="3"))
"""


@pytest.mark.slow
def test_killed_study_continues(finished, folder, config, monkeypatch):
    """Killed after one of the student's two steps, then continued by the same call."""
    done_dir, answer, trained, _ = finished
    student = Path(trained[1]).name
    arguments = [f"{student}/model.ckpt-1", settings(folder), str(folder / "killed")]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_ONCE, json.dumps(arguments)],
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/loop'}",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        },
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    work_dir = folder / "killed"
    teacher = work_dir / "cache" / Path(trained[0]).name / "measured.json"
    before = teacher.stat().st_mtime_ns
    assert not (work_dir / "study.json").exists()
    assert not (work_dir / "cache" / student / "measured.json").exists()
    monkeypatch.setattr(study, "STUDIES", TABLE)
    again = study.run_study(config, loop_in(work_dir), study.StudyConfig(seeds="3"))
    assert teacher.stat().st_mtime_ns == before
    for name, of in again["studies"].items():
        for label, arm in of["arms"].items():
            assert arm["top1"] == answer["studies"][name]["arms"][label]["top1"]
    same = [work_dir / "cache" / student, done_dir / "cache" / student]
    first, second = (next(path.glob("model.ckpt-2.data*")).read_bytes() for path in same)
    assert first == second


def test_digits_are_made_by_themselves(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        study.digits, "make_records", lambda folder, seed, labels_per_class: made.append(seed) or {}
    )
    digits = Config().override(task_name="digits", label_data_dir="", seed=5)
    for _ in range(2):
        ready = study._with_data(digits, loop_in(tmp_path))
    assert made == [5]
    assert ready.data.label_data_dir == str(tmp_path / "data" / "seed-5" / "labeled")
    assert ready.data.unlabel_data_dir == str(tmp_path / "data" / "seed-5" / "unlabeled")
    own = digits.override(label_data_dir="mine")
    assert study._with_data(own, loop_in(tmp_path)) == own


# --- Numbers --------------------------------------------------------------------------------------


def found(values: dict[str, list[float | None]]) -> dict:
    """Returns top-1 by arm and seed (0, 1, …) in the form that `summary` expects."""
    return {
        (seed, "s", arm): value
        and {"measured": {"dev": {"top1": 0.0}, "test": {"top1": value}}, "seconds": 1.0}
        for arm, of in values.items()
        for seed, value in enumerate(of)
    }


def test_mean_and_spread_are_numpys(rng):
    first, second = rng.uniform(0.8, 0.9, [2, 4]).tolist()
    of = {"s": Study("?", "", "", {"a": Arm({}), "b": Arm({}, expected=1)})}
    answer = study_results.summary(of, range(4), found({"a": first, "b": second}))
    arms = answer["studies"]["s"]["arms"]
    assert answer["set"] == "test"
    assert arms["a"]["mean"] == pytest.approx(100 * np.mean(first))
    assert arms["a"]["sd"] == pytest.approx(100 * np.std(first, ddof=1))
    difference = 100 * (np.array(second) - first)
    assert arms["b"]["difference"] == pytest.approx(difference.mean())
    assert arms["b"]["difference_sd"] == pytest.approx(difference.std(ddof=1))
    assert arms["a"]["difference"] is None


def test_seeds_without_a_result_are_left_out_of_both_sides():
    of = {"s": Study("?", "", "", {"a": Arm({}), "b": Arm({})})}
    values = {"a": [0.5, 0.75, 0.25], "b": [0.75, None, 0.75]}
    arms = study_results.summary(of, range(3), found(values))["studies"]["s"]["arms"]
    assert (arms["b"]["mean"], arms["b"]["n"]) == (75.0, 2)
    assert (arms["b"]["difference"], arms["a"]["mean"]) == (37.5, 50.0)


@pytest.mark.parametrize("shift", [0.1, 0.6, 1.5, -1.5])
def test_noise_is_that_of_the_paired_t_test(rng, shift):
    differences = shift + rng.normal(size=5)
    beyond = abs(differences.mean()) > study_results.noise(differences)
    assert beyond == (stats.ttest_1samp(differences, 0).pvalue < 0.05)


@pytest.mark.parametrize(
    "differences, expected, words",
    [
        ([1.0, 1.1, 0.9], 1, "better: as in the paper"),
        ([-1.0, -1.1, -0.9], -1, "worse: as in the paper"),
        ([-1.0, -1.1, -0.9], 1, "worse: not as in the paper"),
        ([1.0, 1.1, 0.9], 0, "better: not as in the paper"),
        ([1.0, 1.1, 0.9], None, "better: not stated in the paper"),
        ([1.0, -1.1, 0.9], 1, "below the noise"),
        ([0.0, 0.0], -1, "below the noise"),
        ([1.0, -1.1, 0.9], 0, "below the noise, as in the paper"),
        ([3.0], 1, "one seed is not enough"),
        ([], None, ""),
    ],
)
def test_readings(differences, expected, words):
    assert study_results.reading(differences, expected) == words


def test_names_of_the_method_are_no_settings():
    """The name of a change must be unambiguous."""
    others = {*Config().values(), *SelectConfig.__dataclass_fields__}
    assert not set(questions.Method.__dataclass_fields__) & others
