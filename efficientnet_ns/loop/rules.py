"""Settings by rule: one table derives every setting from facts about pictures and machine.

A row may use the settings of the rows above it and every given one, so a value given by the user affects
everything that depends on it. To change a rule, change its row: nothing else in the package decides a setting.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from efficientnet_ns.ingest import data_source

# Models whose published weights are available as packages, the smallest first.
PUBLISHED = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
# Labels per class below which the fine-tuned teacher is not much better than the linear probe.
_FEW_PER_CLASS = 40


@dataclasses.dataclass(frozen=True)
class Facts:
    """Inputs of the rules.

    Attributes:
      labeled: number of labeled pictures, including those to be held out.
      classes: number of their classes.
      smallest_class: number of pictures in the smallest class.
      unlabeled: number of unlabeled pictures.
      median_side: shorter side of the median picture in pixels.
      cores: number of CPU cores that may be used.
      accelerators: number of GPUs.
      published: models whose published weights are installed.
    """

    labeled: int
    classes: int
    smallest_class: int
    unlabeled: int
    median_side: int
    cores: int
    accelerators: int = 0
    published: tuple[str, ...] = ()


Chosen = Mapping[str, Any]


# Values that turn a setting off.
_OFF = (False, 0, -1, "")


class Rule(NamedTuple):
    """A row of the table.

    Attributes:
      name: name of the setting: the flag.
      value: (facts, settings of the rows above) → value.
      reason: why, briefly; a format string for the fields of the facts.
      source: where the value comes from.
      off: why a value in `_OFF` was chosen; "" if the reason is the same.
    """

    name: str
    value: Callable[[Facts, Chosen], Any]
    reason: str
    source: str
    off: str = ""


class Setting(NamedTuple):
    """A chosen setting."""

    name: str
    value: Any
    reason: str
    source: str


def _pretrained(chosen: Chosen) -> bool:
    return bool(chosen["init_weights"])


def _either(pretrained: Any, scratch: Any) -> Callable[[Facts, Chosen], Any]:
    """Makes a rule with one value for published weights, another for training from scratch."""
    return lambda _, chosen: pretrained if _pretrained(chosen) else scratch


def _always(value: Any) -> Callable[[Facts, Chosen], Any]:
    return lambda *_: value


def _small_or(small: Any, other: Callable[[Facts, Chosen], Any]) -> Callable[[Facts, Chosen], Any]:
    """Makes a rule with a value for small pictures from scratch, and another rule for the rest."""
    return lambda facts, chosen: small if _use_small_model(facts, chosen) else other(facts, chosen)


def _variants(chosen: Chosen) -> set[str]:
    return {name.strip() for name in chosen.get("models", "").split(",")} - {""}


def _models(facts: Facts, chosen: Chosen) -> str:
    model = "efficientnet-b0"
    if _pretrained(chosen):
        model = next((m for m in PUBLISHED if m in facts.published), PUBLISHED[0])
    students = 2 if facts.accelerators or facts.cores >= 8 else 1
    return ",".join([model] * (1 + students))


def _side(facts: Facts, chosen: Chosen) -> int:
    """Returns the shorter side of the median picture in the records, at least 8 pixels."""
    return max(8, min(facts.median_side, chosen.get("max_side", facts.median_side)))


def _are_small(facts: Facts, chosen: Chosen) -> bool:
    # Published weights have the strides for large images.
    return not _pretrained(chosen) and _side(facts, chosen) <= data_source.SMALL_SIDE


def _use_small_model(facts: Facts, chosen: Chosen) -> bool:
    """Checks whether the small-image model is to learn small pictures from scratch."""
    return chosen["small_image_model"] and _are_small(facts, chosen)


def _image_size(facts: Facts, chosen: Chosen) -> int:
    side = _side(facts, chosen)
    if _are_small(facts, chosen):
        return side
    if facts.accelerators:
        return 224
    if _pretrained(chosen):
        return 160 if side > 64 else 128
    return 96


def _held_out(facts: Facts, _: Chosen) -> float:
    return round(min(0.1, max(0.02, 1000 / facts.labeled)), 3)


def _steps(pretrained: int, scratch: int, batch: str, *, small_passes: int) -> Callable:
    """Makes a rule: at least this many updates, and passes over the labels; at most 20,000.

    Args:
      small_passes: passes over small pictures from scratch, whose updates take little time; over
        others 10.
    """

    def steps(facts: Facts, chosen: Chosen) -> int:
        least = pretrained if _pretrained(chosen) else scratch
        passes = small_passes if _use_small_model(facts, chosen) else 10
        wanted = passes * facts.labeled * (1 - chosen["held_out"]) / chosen[batch]
        return round(min(max(least, wanted), 20_000))

    return steps


def _updates(chosen: Chosen, name: str) -> int:
    """Returns the updates of `teacher_steps` or `train_steps`, stretched by `train_ratio`."""
    return max(1, int(chosen[name] * chosen.get("train_ratio", 1.0)))


def _warmup(facts: Facts, chosen: Chosen) -> float:
    """Returns a twentieth of a student's updates, in passes over the labeled pictures."""
    images = facts.labeled * (1 - chosen["held_out"])
    return round(0.05 * _updates(chosen, "train_steps") * chosen["train_batch_size"] / images, 2)


def _bn_momentum(_: Facts, chosen: Chosen) -> float:
    """Returns a decay after which at most 0.1 % of the initial statistics are left."""
    updates = min(_updates(chosen, name) for name in ("teacher_steps", "train_steps"))
    return min(0.97, max(0.5, math.floor(100 * 0.001 ** (1 / updates)) / 100))


def _warm_start(facts: Facts, chosen: Chosen) -> bool:
    return _use_small_model(facts, chosen) and len(_variants(chosen)) == 1


def _steps_per_eval(_: Facts, chosen: Chosen) -> int:
    return max(_updates(chosen, "train_steps") // 4, 25)


def _initial_share(facts: Facts, chosen: Chosen) -> float:
    """Returns the first teacher's share. Students, which see more pictures, are better at 0."""
    # A value given for all training runs also applies to the teacher.
    if "ema_initial_share" in chosen:
        return chosen["ema_initial_share"]
    few = facts.labeled < _FEW_PER_CLASS * facts.classes
    return 0.5 if _pretrained(chosen) and chosen["keep_bn_statistics"] and few else 0.0


def _frozen_blocks(facts: Facts, chosen: Chosen) -> int:
    """On CPUs, freezes the stem and first stages of published weights: they process most pixels."""
    # Five blocks are the first three stages of EfficientNet-Lite0.
    return 5 if _pretrained(chosen) and not facts.accelerators else -1


def _per_class(facts: Facts, _: Chosen) -> int:
    return max(20, min(round(0.7 * facts.unlabeled / facts.classes), 5000))


def _published(facts: Facts, chosen: Chosen) -> str:
    """Chooses published weights if the models that the user gave have some."""
    # Published weights fit only the published shapes.
    other_shape = any(chosen.get(f"{side}_coefficient") for side in ("width", "depth"))
    models = _variants(chosen)
    # All models start from one probe, so they must be of one variant.
    fit = not other_shape and len(models) <= 1 and models <= set(facts.published)
    # With enough pictures, initial weights help little.
    return "published" if facts.published and fit and facts.labeled < 200_000 else ""


_PROTOTYPE = "measured with published weights; from scratch, an initial guess"
_PROTOTYPE_SMALL = "measured with published weights, and on CIFAR-10 from scratch"
_PAPER = "arXiv 1911.04252"

RULES: tuple[Rule, ...] = (
    Rule(
        "held_out",
        _held_out,
        "reveals failures; 1,000 pictures are enough, the rest are for training",
        "convention",
    ),
    Rule(
        "init_weights",
        _published,
        "pretrained features help with only {labeled} labels",
        "arXiv 1805.08974",
        off="none are installed that fit all models, or there are at least 200,000 labels",
    ),
    Rule("models", _models, "teacher and students; CPU cores: {cores}", _PROTOTYPE),
    Rule(
        "input_image_size",
        _image_size,
        "pictures of {median_side} px; CPU cores: {cores}",
        _PROTOTYPE,
    ),
    Rule(
        "small_image_model",
        _are_small,
        "from scratch, pictures of up to 40 px need all their pixels: two strides less",
        "the original code's SVHN model",
        off="larger pictures, or published weights, have the usual strides",
    ),
    Rule(
        "max_side",
        lambda _, chosen: max(320, 2 * chosen["input_image_size"]),
        "larger pictures only cost time to decode",
        "twice the model's size leaves room for random crops",
    ),
    Rule("crop_fraction", _always(0.875), "same field of view at any size", "224 of 256 px"),
    Rule("train_batch_size", _either(16, 32), "labeled pictures per update", _PROTOTYPE),
    Rule("teacher_batch_size", _always(32), "the teacher sees only labeled pictures", _PROTOTYPE),
    Rule("unlabel_ratio", _always(3.0), "unlabeled pictures per labeled one", _PROTOTYPE),
    Rule(
        "teacher_steps",
        _steps(500, 2000, "teacher_batch_size", small_passes=64),
        "at least 10 passes over the labels, 64 over small pictures from scratch; at most 20,000",
        _PROTOTYPE_SMALL,
    ),
    Rule(
        "train_steps",
        _steps(600, 3000, "train_batch_size", small_passes=32),
        "at least 10 passes over the labels, 32 over small pictures from scratch; at most 20,000",
        _PROTOTYPE_SMALL,
    ),
    Rule(
        "warm_start",
        _warm_start,
        "small pictures from scratch: each student continues from its teacher",
        "measured on CIFAR-10",
        off="each student learns anew, from the probe or from scratch",
    ),
    Rule("optimizer", _always("adam"), "few updates, no tuning", "arXiv 1412.6980"),
    Rule("lr_schedule", _always("cosine"), "ends at 0 after any number of updates", _PROTOTYPE),
    Rule(
        "base_learning_rate",
        _small_or(4e-3, _either(5e-4, 1e-3)),
        "for Adam; lower for published weights, higher for small pictures from scratch",
        _PROTOTYPE_SMALL,
    ),
    Rule("warmup_epochs", _warmup, "a twentieth of the updates", _PROTOTYPE),
    Rule(
        "moving_average_decay", _always(0.99), "the average of the last hundred updates", _PROTOTYPE
    ),
    Rule(
        "keep_bn_statistics",
        _either(True, False),
        "a few pictures give worse statistics than the published ones",
        "keras.io: BatchNormalization in fine-tuning",
        off="from scratch, there are no statistics to keep",
    ),
    Rule(
        "teacher_initial_share",
        _initial_share,
        "with few labels, a model between the probe and the fine-tuned one is better",
        "arXiv 2109.01903; measured on TrashNet and CIFAR-10",
        off="enough labels, no published weights, or statistics that are not kept",
    ),
    Rule(
        "fix_layer_num",
        _frozen_blocks,
        "early layers transfer well; freezing them halves the time of an update",
        "measured on TrashNet; arXiv 1411.1792",
        off="all layers are trained: new weights, or an accelerator",
    ),
    Rule("bn_momentum", _bn_momentum, "converges within the updates", "the digits' presets"),
    Rule("weight_decay", _always(1e-5), "as published", _PAPER),
    Rule("label_smoothing", _always(0.1), "as published", _PAPER),
    Rule("dropout_rate", _small_or(0.1, _always(0.3)), "noise of the student", _PROTOTYPE_SMALL),
    Rule(
        "stochastic_depth_rate",
        _small_or(0.0, _always(0.2)),
        "noise of the student",
        _PAPER,
        off="small pictures from scratch: too much noise for so few updates",
    ),
    Rule("augment_name", _always("randaugment"), "noise of the student", _PAPER),
    Rule(
        "randaug_layer",
        _small_or(1, _always(2)),
        "2 as published; 1 for small pictures from scratch",
        f"{_PAPER}; measured on CIFAR-10",
    ),
    Rule(
        "randaug_mag",
        _small_or(5, _always(10)),
        "10 keeps Posterize and Solarize weak; 5 for small pictures from scratch",
        _PROTOTYPE_SMALL,
    ),
    Rule(
        "randaug_mode", _always("clipped"), "keeps images recognizable at every level", _PROTOTYPE
    ),
    Rule(
        "randaug_reach", _always("proportional"), "100 px would erase a small picture", _PROTOTYPE
    ),
    Rule("teacher_softmax_temp", _always(1.0), "soft labels tolerate a weak teacher", _PAPER),
    Rule("min_threshold", _always(0.5), "below it, labels are mostly wrong", _PROTOTYPE),
    Rule(
        "num_image", _per_class, "0.7 of the unlabeled pictures per class; 20 to 5,000", _PROTOTYPE
    ),
    Rule("eval_batch_size", _always(64), "no influence on results", "speed"),
    Rule(
        "steps_per_eval",
        _steps_per_eval,
        "four points of a learning curve",
        "no influence on results",
    ),
    Rule(
        "patience",
        _always(0),
        "the schedule gains most at its end; accuracy on few held-out pictures is noisy",
        "convention",
    ),
    Rule(
        "save_checkpoints_steps", _always(100), "a kill loses at most a few minutes", "convention"
    ),
    Rule(
        "iterations_per_loop",
        _always(25),
        "interval of progress lines and of checks for stop requests",
        "convention",
    ),
    Rule("keep_checkpoint_max", _always(1), "saves disk space", "convention"),
    Rule("stop_when_worse", _always(True), "a worse student must not teach", _PAPER),
)


def choose(facts: Facts, given: Chosen) -> list[Setting]:
    """Chooses every setting of the table; appends the other given ones.

    Args:
      given: the user's settings, which override their rows.
    """
    chosen: dict[str, Any] = dict(given)
    settings = []
    for rule in RULES:
        if rule.name in given:
            setting = Setting(rule.name, given[rule.name], "given", "")
        else:
            value = rule.value(facts, chosen)
            text = rule.off if rule.off and value in _OFF else rule.reason
            reason = text.format(**dataclasses.asdict(facts))
            setting = Setting(rule.name, value, reason, rule.source)
        chosen[setting.name] = setting.value
        settings.append(setting)
    ruled = {rule.name for rule in RULES}
    others = [Setting(k, v, "given", "") for k, v in given.items() if k not in ruled]
    return settings + others


def values(settings: list[Setting]) -> dict[str, Any]:
    """Returns {name: value}."""
    return {setting.name: setting.value for setting in settings}


# --- Time -------------------------------------------------------------------------------------------

# A forward pass on XNNPACK takes about this fraction of an update on the same picture.
_LABELING = 0.25
# Time until a training run's graph is built and its first batch is ready.
STARTUP_SECONDS = 30.0
# Records, probe, export and report.
_OVERHEAD_SECONDS = 60.0


def seconds(facts: Facts, chosen: Chosen, pace: float, *, control: bool) -> dict[str, float]:
    """Estimates the seconds of each part of the run.

    Args:
      pace: pictures per second in training at the chosen size.
    """
    students = chosen["models"].count(",")
    # Pictures in a batch for each labeled one.
    labeled = 1 + chosen["unlabel_ratio"]
    teacher_updates, student_updates = (
        _updates(chosen, name) for name in ("teacher_steps", "train_steps")
    )
    parts = {
        "teacher": teacher_updates * chosen["teacher_batch_size"] / pace,
        "students": students * student_updates * chosen["train_batch_size"] * labeled / pace,
        # Once for each student, and at the end with the best model.
        "labeling": (students + 1) * facts.unlabeled * _LABELING / pace,
        "other": _OVERHEAD_SECONDS + (1 + students + control) * STARTUP_SECONDS,
    }
    if control:
        updates = teacher_updates + students * student_updates
        parts["control"] = updates * chosen["teacher_batch_size"] / pace
    return parts


# What a time limit may reduce, in this order: rounds, updates down to half, pixels, more updates.
_LEAST_STEPS = 50
_SIZES = (128, 96, 64)


def fit(
    settings: list[Setting], facts: Facts, given: Chosen, pace: float, limit: float, control: bool
) -> list[Setting]:
    """Reduces settings so that the run ends within `limit` seconds, as far as possible."""
    chosen, size = values(settings), values(settings)["input_image_size"]
    changed: dict[str, Any] = {}

    def estimate() -> float:
        now = {**chosen, **changed}
        speed = pace * (size / now["input_image_size"]) ** 2
        return sum(seconds(facts, now, speed, control=control).values())

    def shorten(least: float) -> None:
        names = [n for n in ("teacher_steps", "train_steps") if n not in given]
        start = {name: {**chosen, **changed}[name] for name in names}
        # By search, because parts of the estimate do not depend on the updates.
        factor = 1.0
        while names and estimate() > limit and factor > least:
            factor = max(least, factor * 0.95)
            changed.update({n: max(_LEAST_STEPS, round(v * factor)) for n, v in start.items()})

    if estimate() > limit and "models" not in given:
        changed["models"] = ",".join(chosen["models"].split(",")[:2])
    shorten(0.5)
    for smaller in _SIZES:
        if estimate() > limit and smaller < size and "input_image_size" not in given:
            changed["input_image_size"] = smaller
    shorten(0.05)
    of_updates = {
        "warmup_epochs": _warmup,
        "steps_per_eval": _steps_per_eval,
        "bn_momentum": _bn_momentum,
    }
    for name in of_updates.keys() - given.keys():
        changed[name] = of_updates[name](facts, {**chosen, **changed})
    changed = {name: value for name, value in changed.items() if value != chosen[name]}
    return [
        s._replace(value=changed[s.name], reason="fits --time_limit", source="measured pace")
        if s.name in changed
        else s
        for s in settings
    ]


# --- Settings that cannot work ----------------------------------------------------------------------


def warnings(facts: Facts, chosen: Chosen) -> list[str]:
    """Returns what is likely to go wrong with these settings, and what to do about it."""
    found = []
    decay, steps = chosen["bn_momentum"], _updates(chosen, "teacher_steps")
    # The average of the weights needs no check: its decay ramps up, as (1 + t) / (10 + t).
    if not chosen["keep_bn_statistics"] and decay**steps > 0.01:
        found.append(
            f"{steps} updates are too few for --bn_momentum={decay}: {decay**steps:.0%} of the "
            "statistics used for evaluation will still be their initial values; lower it to "
            f"{0.001 ** (1 / steps):.2f} or less"
        )
    passes = steps * chosen["teacher_batch_size"] / facts.labeled
    if passes > 2000:
        found.append(
            f"--teacher_steps={chosen['teacher_steps']} are {passes:.0f} passes over {facts.labeled} "
            "labeled pictures, a schedule for far larger sets"
        )
    if facts.smallest_class < 5:
        found.append(
            f"a class has only {facts.smallest_class} labeled pictures: its accuracy will be unreliable"
        )
    if facts.unlabeled < facts.labeled:
        found.append(
            f"{facts.unlabeled} unlabeled pictures for {facts.labeled} labeled ones: students will "
            "gain little"
        )
    return found
