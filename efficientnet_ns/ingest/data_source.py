"""Makes records and their task file from a folder, an archive or a TFDS set."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Sequence

import tensorflow as tf
from absl import logging

from efficientnet_ns.config import Config, ConfigError
from efficientnet_ns.config.ingest import MakeConfig
from efficientnet_ns.data import image_conversion, tasks
from efficientnet_ns.files import manifests, object_stores, shard_names, tfexamples
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.ingest import image_records, image_sources, listing, tfds_source
from efficientnet_ns.ingest.image_sources import Source
from efficientnet_ns.ingest.listing import Listing

# Square images up to this side use the small-image model, like SVHN with 32 pixels.
SMALL_SIDE, _FIXED_SIDE = 40, 64


def make_records(config: MakeConfig, leave_out: Collection[str] = ()) -> dict[str, int]:
    """Makes the records and `task.json`; resumes if called again.

    Args:
      leave_out: names of images in a folder or archive to skip.

    Returns:
      Prefix → number of records.

    Raises:
      ConfigError: If settings are invalid or do not fit other sets in the output folder.
      DataError, manifests.OutputConflict, processes.ProcessDied: See `image_records.make_sets`.
    """
    _check(config)
    _check_other_sets(config)
    if config.source.startswith(tfds_source.PREFIX):
        return _from_tfds(config)
    if not tf.io.gfile.exists(config.source):
        raise ConfigError(
            f"--source={config.source} does not exist: expected a folder of images, an archive "
            f"({', '.join(image_sources.ARCHIVES)}) or {tfds_source.PREFIX}<name>"
        )
    with image_sources.open_source(config.source, config.subfolder, config.output_dir) as source:
        found = listing.list_images(
            source,
            config.labeled,
            _class_names_of_other_sets(config),
            names_from="--imagenet_labels"
            if config.imagenet_labels
            else os.path.join(config.output_dir, tasks.TASK_FILE),
            subfolder=config.subfolder,
            accept_classes=config.accept_classes,
        )
        if leave_out:
            kept = [entry for entry in found.entries if entry.name not in leave_out]
            found = found._replace(entries=kept)
        made = _make(config, source, found)
    if config.labeled:
        _write_task(config, made, {"class_names": found.class_names})
    return {prefix: one.records for prefix, one in made.items()}


def _check(config: MakeConfig) -> None:
    """Raises ConfigError if the settings are invalid."""
    if not config.source or not config.output_dir:
        raise ConfigError("--source and --output_dir are required")
    for flag in ("source", "subfolder", "output_dir"):
        value = getattr(config, flag)
        if value != image_sources.readable(value):
            raise ConfigError(
                f"--{flag}={image_sources.readable(value)} is not UTF-8, which TensorFlow requires of paths: "
                "rename the folder"
            )
    if tf.io.gfile.exists(config.output_dir) and not tf.io.gfile.isdir(config.output_dir):
        raise ConfigError(f"--output_dir={config.output_dir} is a file, not a folder")
    fraction = config.validation_fraction
    if fraction and not (config.labeled and fraction < 1):
        raise ConfigError(
            f"--validation_fraction={fraction} must be below 1 and requires labeled images"
        )
    if config.imagenet_labels and (
        not config.labeled or config.source.startswith(tfds_source.PREFIX)
    ):
        raise ConfigError("--imagenet_labels requires labeled images in WordNet id folders")
    if fraction and _prefix(config) == config.validation_set:
        raise ConfigError(
            f"--validation_fraction={fraction} would split the set {config.validation_set!r} from "
            "itself: remove it, or use another --image_set or --validation_set"
        )


# Prefix by which training and evaluation programs recognize unlabeled sets.
_UNLABELED = "extra"


def _check_other_sets(config: MakeConfig) -> None:
    """Checks that names distinguish the labeled and unlabeled sets in a folder.

    Raises:
      ConfigError: If they do not or the classes of a set are unknown.
    """
    folder = os.path.join(config.output_dir, "manifests")
    # Each shard has a manifest here, named after it; one manifest per set describes the set.
    names = object_stores.names(folder)
    parsed = {name: shard_names.parse(name.removesuffix(".json")) for name in names}
    one_of = {found[0]: name for name, found in parsed.items() if found}
    others = {
        prefix: manifests.read_manifest(os.path.join(folder, name))["config"].get("labeled")
        for prefix, name in one_of.items()
    }
    # `labeled` is True or False; None in manifests of proc_svhn, which do not contain it.
    labeled = [prefix for prefix, value in others.items() if value]
    unlabeled = [p for p, value in others.items() if value is False and p != _UNLABELED]
    prefix = _prefix(config)
    if config.labeled and unlabeled and unlabeled != [prefix]:
        raise ConfigError(
            f"--output_dir={config.output_dir} contains unlabeled images as {unlabeled[0]}-…, which "
            "would be mistaken for a labeled set: choose another folder"
        )
    own = {prefix, config.validation_set} if config.validation_fraction else {prefix}
    # task.json is written last, so labeled sets without it are not finished.
    unfinished = sorted(set(labeled) - own)
    task = os.path.join(config.output_dir, tasks.TASK_FILE)
    if config.labeled and unfinished and not tf.io.gfile.exists(task):
        raise ConfigError(
            f"--output_dir={config.output_dir} contains {unfinished[0]}-… without {tasks.TASK_FILE}, from a run "
            "that did not finish, so its class indices are unknown: finish it with its own "
            "command first, or delete these files"
        )
    if config.labeled or not labeled:
        return
    if prefix not in (_UNLABELED, *labeled):
        raise ConfigError(
            f"--output_dir={config.output_dir} contains labeled sets ({', '.join(labeled)}): unlabeled "
            f"images as {prefix}-… would be mistaken for one. Choose another folder, or "
            f"--image_set={_UNLABELED}"
        )
    logging.info(
        "%s also contains labeled sets: to label these images, add --file_prefix=%s",
        *(config.output_dir, prefix),
    )


def _class_names_of_other_sets(config: MakeConfig) -> tuple[str, ...] | None:
    path = os.path.join(config.output_dir, tasks.TASK_FILE)
    names = tasks.get_task(path).class_names if tf.io.gfile.exists(path) else None
    if not config.imagenet_labels:
        return names
    if names not in (None, tasks.wnids()):
        raise ConfigError(
            f"--imagenet_labels: the sets in {config.output_dir} have other classes, listed in {path}: "
            "choose another folder"
        )
    return tasks.wnids()


def _prefix(config: MakeConfig) -> str:
    return config.image_set or ("train" if config.labeled else _UNLABELED)


def _make(config: MakeConfig, source: Source, found: Listing) -> dict[str, image_records.Made]:
    """Makes one set of the entries, or two with a validation fraction."""
    entries = image_records.shuffled(found.entries, config.seed, config.limit)
    parts = {_prefix(config): entries}
    if config.validation_fraction:
        # After shuffling, the first images of a class are random.
        rest, chosen = image_records.split(entries, config.validation_fraction)
        parts = {_prefix(config): rest, config.validation_set: chosen}
    sets = [
        _image_set(config, source, prefix, found._replace(entries=part))
        for prefix, part in parts.items()
    ]
    # Images that are in no set are listed with the first set.
    drawn = len(entries) / max(1, len(found.entries))
    sets[0] = dataclasses.replace(sets[0], lost=found.lost, drawn=drawn)
    made = image_records.make_sets(
        source,
        sets,
        image_conversion.Rules(config.check, config.max_side),
        num_workers=config.num_workers,
        max_bad_fraction=config.max_bad_fraction,
    )
    _report(source.path, found, made, len(found.entries) - len(entries))
    return dict(zip(parts, made))


def _report(path: str, found: Listing, made: Sequence[image_records.Made], undrawn: int) -> None:
    """Logs the use of every entry of the source."""
    ignored = sum(found.ignored.values())
    parts = [
        f"{sum(one.records for one in made)} records",
        f"{sum(len(one.bad) for one in made)} in quarantine",
        f"{ignored} ignored" + (f" ({listing.described(found.ignored)})" if ignored else ""),
        *([f"{undrawn} beyond --limit"] if undrawn else []),
    ]
    total = len(found.entries) + len(found.lost) + ignored
    logging.info("%s: %d entries = %s", path, total, " + ".join(parts))


def _image_set(
    config: MakeConfig, source: Source, prefix: str, found: Listing
) -> image_records.ImageSet:
    entries, class_names = found.entries, found.class_names or ()
    if not entries:
        raise DataError(f"the set {prefix!r} of {source.path} would have no images")
    if config.num_shards and config.num_shards > len(entries):
        raise ConfigError(f"--num_shards={config.num_shards} is more than {len(entries)} images")
    return image_records.ImageSet(
        folder=config.output_dir,
        prefix=prefix,
        entries=entries,
        num_shards=config.num_shards or image_records.default_num_shards(len(entries)),
        record=tfexamples.labeled_example if config.labeled else image_records.unlabeled_record,
        identity={
            "source": os.path.basename(source.path.rstrip("/")),
            "labeled": config.labeled,
            "classes": image_records.digest(class_names) if config.labeled else None,
            "seed": config.seed,
            "check": config.check,
            "max_side": config.max_side,
            # Only if True, so that records of earlier versions still match.
            **({"keep_names": True} if config.keep_names else {}),
        },
        num_classes=len(class_names) if config.labeled else None,
        keep_names=config.keep_names,
    )


def _write_task(config: MakeConfig, made: dict[str, image_records.Made], fields: dict) -> None:
    path = os.path.join(config.output_dir, tasks.TASK_FILE)
    fields = {"num_classes": len(fields["class_names"]), **fields}
    if "train" in made:
        fields["num_train_images"] = made["train"].records
        shape = made["train"].shape
        if shape and shape[0] == shape[1] <= _FIXED_SIDE and "image_size" not in fields:
            fields.update(image_size=shape[0], small_image=shape[0] <= SMALL_SIDE)
    evaluation = [prefix for prefix in ("validation", "dev") if prefix in made]
    # If there are only a training and a test set, the test set is used for evaluation.
    only_test = "test" in made and "train" in made and not evaluation
    if evaluation or only_test:
        fields["eval_set"] = evaluation[0] if evaluation else "test"
    if "test" in made and not only_test:
        fields["test_set"] = "test"
    tasks.write_task(path, **fields)
    logging.info("to train: --label_data_dir=%s --task_name=%s", config.output_dir, path)


# --- TensorFlow Datasets --------------------------------------------------------------------------


def _from_tfds(config: MakeConfig) -> dict[str, int]:
    name, split = tfds_source.parse(config.source)
    builder = tfds_source.load_builder(name, config.tfds_data_dir)
    # A single set is requested, so its name is that of the split, such as SVHN's `extra`.
    if split is None and (config.image_set or not config.labeled):
        split = _prefix(config)
    chosen = {_prefix(config): split} if split else tfds_source.sets_of(builder)
    made: dict[str, image_records.Made] = {}
    for prefix, part in chosen.items():
        source = tfds_source.Tfds(builder, part)
        if config.labeled and source.class_names is None:
            raise DataError(
                f"{source.path} has no labels: use --nolabeled to write only its images"
            )
        if split is None and source.is_unlabeled():
            logging.warning("skipping %s, which has no true labels", source.path)
            continue
        one = dataclasses.replace(config, image_set=prefix)
        if prefix != next(iter(chosen)) or config.validation_set in chosen:
            one = dataclasses.replace(one, validation_fraction=0.0)  # Only train is split.
        # A stratified split requires the labels, for which every example is read.
        entries = source.labeled_entries() if one.validation_fraction else source.entries()
        made.update(_make(one, source, Listing(entries, source.class_names)))
    if config.labeled:
        fields = {"class_names": source.class_names, **tfds_source.task_fields(builder)}
        _write_task(config, made, fields)
    return {prefix: one.records for prefix, one in made.items()}


def with_records(config: Config) -> Config:
    """Makes records of `data_source` unless they exist, and returns the configuration with them.

    Returns:
      A copy of `config` with the records and their task; `config` itself if it has no data_source.

    Raises:
      ConfigError: If data_source is not a TFDS set or other data is also given.
      DataError: See `tfds_source.load_builder`.
    """
    data = config.data
    if not data.data_source:
        return config
    if data.label_data_dir or data.task_name is not None:
        raise ConfigError(
            f"--data_source={data.data_source} defines records and task: remove --label_data_dir "
            "and --task_name"
        )
    if not data.data_source.startswith(tfds_source.PREFIX):
        raise ConfigError(
            f"--data_source={data.data_source} must be tfds:<name>; for other sources, make records with "
            "make_records.py and pass them as --label_data_dir"
        )
    name, split = tfds_source.parse(data.data_source)
    if split:
        raise ConfigError(
            f"--data_source={data.data_source}: remove the split, because all splits are used"
        )
    builder = tfds_source.load_builder(name, data.tfds_data_dir)
    cache = data.data_cache_dir or os.path.join(tfds_source.root(builder), "efficientnet_ns")
    folder = os.path.join(cache, builder.info.full_name)
    task = os.path.join(folder, tasks.TASK_FILE)
    # The task is written last. Record sizes are checked when the records are read.
    if not tf.io.gfile.exists(task):
        source, root = data.data_source, data.tfds_data_dir
        make_records(MakeConfig(source=source, output_dir=folder, tfds_data_dir=root))
    return config.override(data_source="", label_data_dir=folder, task_name=task)
