"""Settings as frozen dataclasses whose fields are the flags: name, type, default and help in one place.

Importing this module does not import TensorFlow, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import re
import sys
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from absl import flags

T = TypeVar("T")


class ConfigError(ValueError):
    """A flag has an invalid value; the message names the flag."""


def setting(
    default: Any,
    help: str,  # noqa: A002 - the word absl uses
    *,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    free: bool = False,
    documented: Any = None,
    pattern: str | None = None,
    alias: str | None = None,
) -> Any:
    """Defines a dataclass field that is also a flag.

    Args:
      default: default of the field, and of the flag unless `documented` is given.
      help: help text of the flag.
      choices: allowed values.
      low: smallest allowed value.
      high: largest allowed value.
      free: whether the value may change between runs that continue one model_dir.
      documented: default that the flag shows. The field is None unless the flag is given, so code
        can distinguish "not given" from "given, and equal to the default".
      pattern: regular expression of values allowed in addition to `choices`.
      alias: earlier name of the flag, which old command lines still use.
    """
    if documented is not None and default is not None:
        raise TypeError("a setting with a documented default must default to None")
    metadata = {
        "help": help,
        "choices": choices,
        "pattern": pattern,
        "alias": alias,
        "low": low,
        "high": high,
        "free": free,
        "documented": default if documented is None else documented,
    }
    return dataclasses.field(default=default, metadata=metadata)


# Paths whose names do not end in _dir or _path.
_PATHS = frozenset(
    (
        *("task_name", "baseline", "json_file", "weights", "init_weights"),
        *("source", "target", "labeled", "unlabeled", "test"),
        *("check_data", "calibration_data", "class_map", "class_names"),
        *("exclude", "reviewed", "truth"),
    )
)


class Settings:
    """Base of the settings dataclasses: paths may be `pathlib.Path`, and may begin with `~`."""

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            plain = os.fspath(value) if isinstance(value, os.PathLike) else value
            if isinstance(plain, str) and _is_path(name):
                plain = ";".join(map(os.path.expanduser, plain.split(";")))
            # The dataclasses are frozen.
            if plain is not value:
                object.__setattr__(self, name, plain)


def _is_path(name: str) -> bool:
    """Checks whether the setting of this name is a path, or several paths joined with ';'."""
    return name.endswith(("_dir", "_path")) or name in _PATHS


def subsections(cls: type) -> dict[str, type]:
    """Returns field name → dataclass for the fields of a dataclass that are also dataclasses."""
    return {
        field.name: type(field.default)
        for field in dataclasses.fields(cls)
        if dataclasses.is_dataclass(field.default)
    }


def _flat(cls: type) -> list[type]:
    """Returns the dataclasses whose fields are flags: the sections, or `cls` if it has none."""
    return list(subsections(cls).values()) or [cls]


def as_dict(settings: Any) -> dict[str, Any]:
    """Returns the values by flag name, JSON-serializable; omitted flags have the documented default.

    Stored settings are compared with these values, so `--num_label_classes=1000` and omitting the
    flag give the same training run.
    """
    return {
        field.name: field.metadata["documented"] if value is None else value
        for field in dataclasses.fields(settings)
        for value in [getattr(settings, field.name)]
    }


def comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings without trailing slashes in paths, which do not affect training."""

    def plain(name: str, value: Any) -> Any:
        if not _is_path(name) or value is None:
            return value
        return ";".join(part.rstrip("/") for part in value.split(";"))

    return {name: plain(name, value) for name, value in settings.items()}


# --- Flags ------------------------------------------------------------------------------------------

_DEFINE: dict[type, Callable[..., Any]] = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
}


class _ChoiceOrPattern(flags.EnumParser):
    """Parses one of the choices, or a string that matches a pattern."""

    def __init__(self, choices: list[str], pattern: str):
        super().__init__(choices)
        self._pattern = pattern

    def parse(self, argument: str) -> str:
        if re.fullmatch(self._pattern, argument):
            return argument
        return super().parse(argument)


def define_flags(cls: type, flag_values: flags.FlagValues) -> None:
    """Defines one absl flag per field of a settings dataclass, or of its sections."""
    for section in _flat(cls):
        hints = typing.get_type_hints(section)
        # Attributed to the program and the section, so that --help shows them in groups.
        group = f"{sys.argv[0]}: {(section.__doc__ or '').splitlines()[0]}"
        for field in dataclasses.fields(section):
            default, choices = field.metadata["documented"], field.metadata["choices"]
            # `int | None` is defined as int: absl flags of any type accept None as the default.
            kinds = [a for a in typing.get_args(hints[field.name]) if a is not type(None)]
            define = _DEFINE[kinds[0] if kinds else hints[field.name]]
            if choices:
                # Without a default, an empty value resets the value of a preset.
                values = [*choices, ""] if default is None else [*choices]
                define = functools.partial(flags.DEFINE_enum, enum_values=values)
                if pattern := field.metadata["pattern"]:
                    parser = _ChoiceOrPattern(values, pattern)
                    define = functools.partial(flags.DEFINE, parser)
            define(
                name=field.name,
                default=default,
                help=field.metadata["help"],
                flag_values=flag_values,
                module_name=group,
            )
            if alias := field.metadata["alias"]:
                flags.DEFINE_alias(alias, field.name, flag_values, module_name=group)


def from_flags(cls: type[T], values: flags.FlagValues) -> T:
    """Builds and checks the dataclass from parsed flags.

    Raises:
      ConfigError: If a value is out of range, or a file blocks the path of an output folder.
    """
    sections = subsections(cls)
    if sections:
        return cls(**{name: from_flags(section, values) for name, section in sections.items()})
    fields = cls.__dataclass_fields__  # type: ignore[attr-defined]
    result = cls(**{name: _value(field, values[name]) for name, field in fields.items()})
    mark_given(result, [name for name in fields if values[name].present])
    check(result)
    for name in sorted(_FOLDERS_WRITTEN & vars(result).keys()):
        check_no_file(name, getattr(result, name) or "")
    return result


# Attribute in which `mark_given` stores names of fields.
_GIVEN = "_given"


def mark_given(settings: Any, names: Collection[str]) -> None:
    """Records in a settings dataclass, or its sections, which fields were set; see `given`."""
    for section in subsections(type(settings)) or [""]:
        one = getattr(settings, section) if section else settings
        chosen = frozenset(names) & frozenset(one.__dataclass_fields__)
        # Not a field: `dataclasses.replace` drops it, and `given` compares the copy with defaults.
        object.__setattr__(one, _GIVEN, chosen)


def given(settings: Any) -> dict[str, Any]:
    """Returns the values that were set explicitly, by name, even if they equal the defaults.

    Args:
      settings: if built by `from_flags`, set explicitly means given on the command line or in flag
        files; see `mark_given`. Otherwise, it means different from the default.
    """
    if sections := subsections(type(settings)):
        return {k: v for name in sections for k, v in given(getattr(settings, name)).items()}
    fields = {field.name: field.default for field in dataclasses.fields(settings)}
    names = getattr(settings, _GIVEN, None)
    if names is None:
        names = {n for n, default in fields.items() if getattr(settings, n) != default}
    return {name: getattr(settings, name) for name in fields if name in names}


def _value(field: dataclasses.Field, flag: flags.Flag) -> Any:
    """Returns the field's value; None if the flag was not given or resets the value of a preset."""
    documented = field.metadata["documented"]
    if field.default is None and documented is not None and not flag.present:
        return None
    # With a documented default, as for unl_aug, `none` is a choice like any other.
    nothing = field.metadata["choices"] and documented is None and flag.value in ("", "none")
    return None if nothing else flag.value


# --- Checks -----------------------------------------------------------------------------------------

_FOLDERS_WRITTEN = {
    *("model_dir", "eval_dir", "data_cache_dir", "output_dir", "info_dir", "prelim_stats_dir"),
    *("work_dir", "export_dir", "report_dir"),
}


def check_no_file(name: str, path: str) -> None:
    """Raises ConfigError if the folder of flag `name` cannot be created because a file exists."""
    part = path.rstrip("/")
    # The nearest existing parent; a path on an object store has none.
    while part and not os.path.lexists(part):
        part = os.path.dirname(part)
    if part and not os.path.isdir(part):
        hint = "choose another path"
        if name == "model_dir" and part == path:
            hint = "to use weights or an export in one file, set --weights or --init_model_path"
        raise ConfigError(f"--{name}={path}: {part} is not a folder; {hint}")


def check(settings: Any) -> None:
    """Checks type, bounds and choices of every value; numbers must be finite.

    Raises:
      ConfigError: If a value is invalid; names the flag of the first one.
    """
    if not dataclasses.is_dataclass(settings) or isinstance(settings, type):
        raise ConfigError(
            f"settings are required, such as Config().override(train_steps=10), not {settings!r}"
        )
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            check(value)
        elif value is not None or field.default is not None:
            _check_type(field, value, hints[field.name])
            _check_text(field, value) if isinstance(value, str) else _check_bounds(field, value)


# Abstract, so that NumPy's numbers are accepted.
_KINDS: dict[type, tuple[str, Any]] = {
    str: ("a string", str),
    int: ("a whole number", numbers.Integral),
    float: ("a number", numbers.Real),
    bool: ("True or False", (bool, numbers.Integral)),
}


def _check_type(field: dataclasses.Field, value: Any, hint: Any) -> None:
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    needed, types = _KINDS[kinds[0] if kinds else hint]
    if not isinstance(value, types):
        raise ConfigError(f"--{field.name}={value!r}: {needed} is required")


def _check_text(field: dataclasses.Field, value: str) -> None:
    choices, pattern = field.metadata["choices"], field.metadata["pattern"]
    known = not choices or value in choices or (pattern and re.fullmatch(pattern, value))
    if not known:
        raise ConfigError(f"--{field.name}={value!r}: must be one of {', '.join(choices)}")
    # How Python represents command-line bytes that are not UTF-8, which TensorFlow rejects.
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ConfigError(f"--{field.name}={value!r} is not UTF-8: rename it, or choose another")


def _check_bounds(field: dataclasses.Field, value: float) -> None:
    low, high = field.metadata["low"], field.metadata["high"]
    if not math.isfinite(value):
        raise ConfigError(f"--{field.name}={value}: a finite number is required")
    if low is not None and value < low:
        raise ConfigError(f"--{field.name}={value} is too small: must be at least {low}")
    if high is not None and value > high:
        raise ConfigError(f"--{field.name}={value} is too large: must be at most {high}")


def require(settings: Any, *names: str) -> None:
    """Raises ConfigError for the first of these settings that is not given."""
    for name in names:
        needed(getattr(settings, name), name)


def needed(value: str | None, name: str, meaning: str = "") -> str:
    """Returns the value of setting `name`; raises ConfigError, with its meaning, if not given."""
    if not value:
        raise ConfigError(f"--{name} is required{meaning and f': {meaning}'}")
    return value
