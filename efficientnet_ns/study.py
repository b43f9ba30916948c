"""The paper's ablations on your task: named questions, several seeds, one table.

`python -m efficientnet_ns.study --flagfile=flags/run/study/quick.flags --work_dir=runs/study`

Every training, labeling and selection is in a folder of `--work_dir` that is named by what
determines it, so whatever arms and studies share is done once, and a killed study continues with
the same command. Results: `study.json`, `study.md`, `study.png`, `study.html`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Mapping
from typing import Any

from absl import flags, logging

from efficientnet_ns import config as config_lib
from efficientnet_ns import demo, noisy_student
from efficientnet_ns.config import Config, ConfigError, LoopConfig, SelectConfig, Settings, setting
from efficientnet_ns.files.progress import Progress
from efficientnet_ns.loop.questions import STUDIES, Method, Study

# Update steps in a quick study, at most. With fewer, the teacher of the digits has learnt too little.
_QUICK_TEACHER_STEPS, _QUICK_STUDENT_STEPS = 400, 300


@dataclasses.dataclass(frozen=True)
class StudyConfig(Settings):
    """Which questions are asked, and how often."""

    studies: str = setting("all", f"Joined with ',', or all of them: {', '.join(STUDIES)}.")
    seeds: str = setting("0,1,2", "Seeds, joined with ','; every arm is run with each.")
    quick: bool = setting(
        False,
        f"The most telling arms alone, and at most {_QUICK_TEACHER_STEPS} update steps of the teacher "
        f"and {_QUICK_STUDENT_STEPS} of each student.",
    )


@dataclasses.dataclass(frozen=True)
class Work:
    """A piece of an arm: `kind` is a key of `_DO`, `config` what it takes."""

    kind: str
    config: Any


# --- Which arms, and what they are made of --------------------------------------------------------


def chosen_studies(names: str, quick: bool) -> dict[str, Study]:
    """The named studies, with the arms that are to be run.

    Raises:
      ConfigError: a name that no study has.
    """
    wanted = list(STUDIES) if names == "all" else [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in STUDIES]
    if unknown:
        raise ConfigError(
            f"--studies: there is no {unknown[0]!r}; known: all, {', '.join(STUDIES)}"
        )
    studies = {}
    for name in wanted:
        arms = {n: arm for n, arm in STUDIES[name].arms.items() if arm.quick or not quick}
        if len(arms) > 1 or not quick:
            studies[name] = dataclasses.replace(STUDIES[name], arms=arms)
        else:
            logging.info("--quick leaves out the study %s: its arms take long", name)
    if not studies:
        raise ConfigError(f"--quick has no arms of --studies={names}")
    return studies


def chosen_seeds(text: str) -> list[int]:
    """`"0,1,2"` → [0, 1, 2]; ConfigError unless they are different whole numbers from 0 on."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts) or len({int(p) for p in parts}) < len(parts):
        raise ConfigError(f"--seeds={text} should be different whole numbers joined with ','")
    return [int(part) for part in parts]


def split_changes(changes: Mapping[str, Any]) -> tuple[Method, dict[str, Any], dict[str, Any]]:
    """(method, changes of `Config`, changes of `SelectConfig`); ConfigError for other names."""
    method, settings, selecting = {}, {}, {}
    for name, value in changes.items():
        if name in Method.__dataclass_fields__:
            method[name] = value
        elif name in Config().values():
            settings[name] = value
        elif name in SelectConfig.__dataclass_fields__:
            selecting[name] = value
        else:
            raise ConfigError(f"no setting is called {name!r}")
    return Method(**method), settings, selecting


def pieces(config: Config, loop: LoopConfig, changes: Mapping[str, Any]) -> list[Work]:
    """What an arm is made of, in order; the last piece trains the model that is its result.

    Two arms share the pieces that are equal: a folder's name is a hash of all that determines what
    is in it, the names of the folders it is made from among them.

    Args:
      config: settings of every training, with the seed; see `noisy_student.run_loop`.
      loop: the teacher and the student, and the selection.
      changes: of an arm.
    """
    method, settings, selecting = split_changes(changes)
    teacher, student = noisy_student.model_configs(config, loop)
    student = student.override(**settings)
    steps = max(1, round(student.train.train_steps * method.steps))
    student = _widened(student, method.student_width).override(train_steps=steps)
    if method.labels_only:
        alone = {"unlabel_ratio": 0.0, "unlabel_data_dir": ""}
        student = student.override(train_steps=teacher.train.train_steps + steps, **alone)
        return [Work("train", _placed(student, loop))]
    work = [Work("train", _placed(_widened(teacher, method.teacher_width), loop))]
    for _ in range(method.rounds):
        labeling = _labeling(work[-1].config, config, loop, settings)
        selection = _selection(labeling, loop, method, selecting)
        pseudo_labeled = student.override(
            unlabel_data_dir=os.path.join(selection.output_dir, "data")
        )
        trainings = _trainings(pseudo_labeled, work[-1].config, method, loop)
        work += [Work("label", labeling), Work("select", selection)]
        work += [Work("train", training) for training in trainings]
    return work


def _widened(config: Config, factor: float) -> Config:
    if factor == 1:
        return config
    from efficientnet_ns.models import efficientnet

    width = config.model.width_coefficient
    width = width or efficientnet.get_variant(config.model.model_name).width
    return config.override(width_coefficient=width * factor)


def _placed(config: Config, loop: LoopConfig) -> Config:
    """With the model_dir that belongs to the settings."""
    return config.override(model_dir=_folder("train", config.identity(), loop))


def _folder(kind: str, settings: Mapping[str, Any], loop: LoopConfig) -> str:
    # Without work_dir, so that it may be moved, and be given with a slash at its end.
    work_dir = json.dumps(loop.work_dir.rstrip("/"))[1:-1]
    text = json.dumps(config_lib.comparable(settings), sort_keys=True).replace(work_dir, "")
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return os.path.join(loop.work_dir, "cache", f"{kind}-{key}")


_OF_LABELING = ("noised_teacher", "test_time_views")


def _labeling(teacher: Config, config: Config, loop: LoopConfig, settings: dict) -> Config:
    own = {name: value for name, value in settings.items() if name in _OF_LABELING}
    teacher = teacher.override(**own)
    decisive = {name: getattr(teacher.predict, name) for name in _OF_LABELING}
    unlabeled = config.data.unlabel_data_dir
    decisive.update(teacher=teacher.train.model_dir, unlabeled=unlabeled)
    return noisy_student.prediction_config(
        teacher, unlabeled, _folder("labels", decisive, loop)
    ).override(**own)


def _selection(
    labeling: Config, loop: LoopConfig, method: Method, selecting: dict[str, Any]
) -> SelectConfig:
    images = max(1, round(loop.num_image * method.images))
    plain = noisy_student.selection_config(
        labeling, dataclasses.replace(loop, num_image=images), ""
    )
    chosen = dataclasses.replace(plain, **selecting)
    folder = _folder("selected", dataclasses.asdict(chosen), loop)
    placed = noisy_student.selection_config(labeling, loop, folder)
    where = ("prelim_stats_dir", "output_dir")
    return dataclasses.replace(chosen, **{name: getattr(placed, name) for name in where})


def _trainings(student: Config, teacher: Config, method: Method, loop: LoopConfig) -> list[Config]:
    """Of one student."""
    if method.warm_start:
        student = student.override(init_model=True, init_model_path=teacher.train.model_dir)
    if not method.pretrain:
        return [_placed(student, loop)]
    pretrained = _placed(student.override(label_weight=0.0), loop)
    tuned = student.override(
        unlabel_ratio=0.0,
        unlabel_data_dir="",
        init_model=True,
        init_model_path=pretrained.train.model_dir,
        train_last_step_num=max(1, student.train.train_steps // 4),
    )
    return [pretrained, _placed(tuned, loop)]


# --- Doing it -------------------------------------------------------------------------------------


def _train(config: Config) -> dict[str, Any]:
    """Trains and measures a model; its result, or the recorded one."""
    import tensorflow as tf

    from efficientnet_ns.files import json_files
    from efficientnet_ns.training import train

    path = _result_path(config)
    if tf.io.gfile.exists(path):
        return json_files.read_json(path)
    started = time.monotonic()
    metrics = train.train_and_evaluate(config, evaluate=False)
    trained = time.monotonic()
    result = {
        "measured": train.evaluate(config),
        "steps": metrics["step"],
        "train_seconds": trained - started,
        "seconds": time.monotonic() - started,
    }
    tf.keras.backend.clear_session()
    json_files.write_json(path, result, indent=1)
    return result


def _result_path(config: Config) -> str:
    return os.path.join(config.train.model_dir, "result.json")


def _label(config: Config) -> None:
    from efficientnet_ns.pseudo_labels import predict

    predict.predict(config)


def _select(config: SelectConfig) -> None:
    from efficientnet_ns.pseudo_labels import write
    from efficientnet_ns.pseudo_labels.selection import select

    select(config)
    write.write(config)


_DO = {"train": _train, "label": _label, "select": _select}


def _images(config: Config) -> int:
    """Images that a training computes, by which its time is estimated."""
    from efficientnet_ns.resolve.resolved_config import ResolvedConfig

    resolved = ResolvedConfig.from_config(config)
    return resolved.steps_to_run * resolved.images_per_step


class Runner:
    """Does the pieces of arms that are not done yet, and says how long the rest will take.

    Args:
      arms: all that will be run, each a list of pieces.
    """

    def __init__(self, arms: list[list[Work]]):
        import tensorflow as tf

        trainings = {
            w.config.train.model_dir: w.config for a in arms for w in a if w.kind == "train"
        }
        done = {f for f, c in trainings.items() if tf.io.gfile.exists(_result_path(c))}
        self._left = {f: _images(c) for f, c in trainings.items() if f not in done}
        finished = sum(_images(c) for f, c in trainings.items() if f in done)
        total = finished + sum(self._left.values())
        logging.info("study: %d trainings, %d of them done", len(trainings), len(done))
        self._progress = Progress(total, "study", "images", done=finished, line_every=1)

    def result(self, name: str, arm: list[Work]) -> dict[str, Any] | None:
        """What the arm's last model reaches; None when it cannot be trained, which is logged.

        A teacher that cannot be trained is an error: no arm could be.
        """
        import tensorflow as tf

        from efficientnet_ns.files.errors import DataError
        from efficientnet_ns.training.session import TrainingDiverged

        result = None
        if tf.io.gfile.exists(_result_path(arm[-1].config)):
            arm = arm[-1:]
        for work in arm:
            try:
                result = _DO[work.kind](work.config)
            except (DataError, TrainingDiverged) as e:
                if work is arm[0]:
                    raise
                logging.error("%s has no result: %s", name, e)
                return None
            images = self._left.pop(work.config.train.model_dir, 0) if work.kind == "train" else 0
            if images:
                self._progress.update(images, f"after {name}")
        return result


# --- The whole ------------------------------------------------------------------------------------


def run_study(config: Config, loop: LoopConfig, options: StudyConfig) -> dict[str, Any]:
    """Runs the chosen studies and writes their results to `loop.work_dir`.

    Args:
      config: settings of every training. For the task digits without a `label_data_dir`, the demo's
        data are made, anew for each seed.
      loop: `models` names the teacher and the student.
      options: which questions and seeds.

    Returns:
      What `study.json` holds; see `studies.results.summary`.

    Raises:
      ConfigError, DataError: settings or data that cannot work, before anything is trained.
    """
    from efficientnet_ns.loop import study_results

    studies = chosen_studies(options.studies, options.quick)
    seeds = chosen_seeds(options.seeds)
    _check_loop(loop)
    if options.quick:
        config, loop = _shortened(config, loop)
    arms: dict[tuple[int, str, str], list[Work]] = {}
    for seed in seeds:
        seeded = _with_data(config.override(seed=seed), loop)
        noisy_student.check(seeded, loop)
        for name, study in studies.items():
            for arm in study.arms:
                arms[seed, name, arm] = pieces(seeded, loop, study.arms[arm].changes)
    _check_trainings(arms)
    runner, found = Runner(list(arms.values())), {}
    for (seed, name, arm), work in arms.items():
        found[seed, name, arm] = runner.result(f"{name}: {arm}, seed {seed}", work)
        if (seed, name, arm) == [key for key in arms if key[0] == seed][-1]:
            done = seeds[: seeds.index(seed) + 1]
            answer = study_results.summary(studies, done, found)
            study_results.write(loop.work_dir, answer)
    return answer


def _check_loop(loop: LoopConfig) -> None:
    if not loop.work_dir:
        raise ConfigError("--work_dir is needed: the folder of all runs and of their results")
    if len(loop.models.split(",")) != 2:
        raise ConfigError(f"--models={loop.models}: name the teacher and the student of a study")
    if loop.finetune_resolution:
        raise ConfigError("--finetune_resolution: a study does not fine-tune; leave it out")


def _shortened(config: Config, loop: LoopConfig) -> tuple[Config, LoopConfig]:
    steps = config.train.train_steps
    teacher_steps = min(loop.teacher_steps or steps, _QUICK_TEACHER_STEPS)
    short = config.override(train_steps=min(steps, _QUICK_STUDENT_STEPS))
    return short, dataclasses.replace(loop, teacher_steps=teacher_steps)


def _with_data(config: Config, loop: LoopConfig) -> Config:
    """With the demo's data of that seed, for digits that have none."""
    if config.data.task_name != "digits" or config.data.label_data_dir:
        return config
    seed = config.train.seed
    folder = os.path.join(loop.work_dir, "data", f"seed-{seed}")
    made = demo.DemoConfig(output_dir=folder, seed=seed)
    state = noisy_student.State(folder, {"seed": seed, "labels_per_class": made.labels_per_class})
    state.once("data", lambda: demo.prepare_data(folder, made))
    return config.override(
        label_data_dir=os.path.join(folder, "labeled"),
        unlabel_data_dir=os.path.join(folder, "unlabeled"),
    )


def _check_trainings(arms: Mapping[Any, list[Work]]) -> None:
    from efficientnet_ns.resolve.resolved_config import ResolvedConfig

    for work in arms.values():
        for piece in work:
            config_lib.check(piece.config)
            if piece.kind != "select":
                ResolvedConfig.from_config(piece.config)


def main(argv: list[str]) -> None:
    config_lib.no_arguments(argv)
    values = flags.FLAGS
    answer = run_study(
        *(config_lib.from_flags(cls, values) for cls in (Config, LoopConfig, StudyConfig))
    )
    from efficientnet_ns.loop import study_results

    print(study_results.markdown(answer), end="")


def run() -> None:
    """The command line."""
    for cls in (Config, LoopConfig, StudyConfig):
        config_lib.define_flags(cls)
    config_lib.run(main)


if __name__ == "__main__":
    run()
