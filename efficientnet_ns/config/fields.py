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
    """A flag has a value that cannot work; the message names it."""


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
    """A dataclass field that is also a flag.

    Args:
      default: of the field, and of the flag unless `documented` is given.
      help: of the flag.
      choices: allowed values.
      low: smallest allowed value.
      high: largest allowed value.
      free: may change between the runs that continue one model_dir.
      documented: default that the flag shows. The field is None unless the flag is given, so code
        can distinguish "not given" from "given, and equal to the default".
      pattern: regular expression of values allowed in addition to `choices`.
      alias: earlier name of the flag, which old command lines still give.
    """
    if documented is not None and default is not None:
        raise TypeError("a setting with a documented default is None unless given")
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


# Paths that have other names.
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
    """Whether the setting of this name is a path, or several joined with ';'."""
    return name.endswith(("_dir", "_path")) or name in _PATHS


def subsections(cls: type) -> dict[str, type]:
    """Field name → dataclass, for the fields of a dataclass that are dataclasses themselves."""
    return {
        field.name: type(field.default)
        for field in dataclasses.fields(cls)
        if dataclasses.is_dataclass(field.default)
    }


def _flat(cls: type) -> list[type]:
    """The dataclasses whose fields are flags: the sections, or `cls` itself when it has none."""
    return list(subsections(cls).values()) or [cls]


def as_dict(settings: Any) -> dict[str, Any]:
    """The values by flag name, JSON-able; a flag not given has the default it documents.

    Stored settings are compared with these, so `--num_label_classes=1000` and its absence are the
    same training.
    """
    return {
        field.name: field.metadata["documented"] if value is None else value
        for field in dataclasses.fields(settings)
        for value in [getattr(settings, field.name)]
    }


def comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with trailing slashes stripped from paths, which do not make another training."""

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
    """Parses one of the choices, or a text that matches a pattern."""

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
            # `int | None` is defined as int: absl flags take None as a default of any type.
            kinds = [a for a in typing.get_args(hints[field.name]) if a is not type(None)]
            define = _DEFINE[kinds[0] if kinds else hints[field.name]]
            if choices:
                # Without a default, an empty value takes back that of a preset.
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
      ConfigError: a value is out of range, or a file is where a folder would be made.
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


# What `mark_given` notes in a dataclass: names.
_GIVEN = "_given"


def mark_given(settings: Any, names: Collection[str]) -> None:
    """Notes in a settings dataclass, or in its sections, which fields somebody chose; see `given`."""
    for section in subsections(type(settings)) or [""]:
        one = getattr(settings, section) if section else settings
        chosen = frozenset(names) & frozenset(one.__dataclass_fields__)
        # No field, so `dataclasses.replace` drops it, and `given` compares the copy with defaults.
        object.__setattr__(one, _GIVEN, chosen)


def given(settings: Any) -> dict[str, Any]:
    """The values that somebody chose, by name, even where they are the defaults.

    Args:
      settings: of `from_flags`: the flags given on the command line or in flag files; see
        `mark_given`. Others: the values that are not the defaults.
    """
    if sections := subsections(type(settings)):
        return {k: v for name in sections for k, v in given(getattr(settings, name)).items()}
    fields = {field.name: field.default for field in dataclasses.fields(settings)}
    names = getattr(settings, _GIVEN, None)
    if names is None:
        names = {n for n, default in fields.items() if getattr(settings, n) != default}
    return {name: getattr(settings, name) for name in fields if name in names}


def _value(field: dataclasses.Field, flag: flags.Flag) -> Any:
    """The field's value; None where the flag was not given or takes back that of a preset."""
    documented = field.metadata["documented"]
    if field.default is None and documented is not None and not flag.present:
        return None
    # Where a default is documented, as of unl_aug, `none` is a choice like any other.
    nothing = field.metadata["choices"] and documented is None and flag.value in ("", "none")
    return None if nothing else flag.value


# --- Checks -----------------------------------------------------------------------------------------

_FOLDERS_WRITTEN = {
    *("model_dir", "eval_dir", "data_cache_dir", "output_dir", "info_dir", "prelim_stats_dir"),
    *("work_dir", "export_dir", "report_dir"),
}


def check_no_file(name: str, path: str) -> None:
    """Raises ConfigError if the folder of flag `name` cannot be made because a file is there."""
    part = path.rstrip("/")
    # The nearest of its parents that exists; of a path on an object store, none does.
    while part and not os.path.lexists(part):
        part = os.path.dirname(part)
    if part and not os.path.isdir(part):
        hint = "choose another path"
        if name == "model_dir" and part == path:
            hint = "weights or an export in one file are given as --weights or --init_model_path"
        raise ConfigError(f"--{name}={path}: {part} is not a folder; {hint}")


def check(settings: Any) -> None:
    """Checks type, bounds and choices of every value; numbers must be finite.

    Raises:
      ConfigError: the first value that cannot be used, by the name of its flag.
    """
    if not dataclasses.is_dataclass(settings) or isinstance(settings, type):
        raise ConfigError(
            f"settings are needed, such as Config().override(train_steps=10), not {settings!r}"
        )
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            check(value)
        elif value is not None or field.default is not None:
            _check_type(field, value, hints[field.name])
            _check_text(field, value) if isinstance(value, str) else _check_bounds(field, value)


# Abstract, so that numbers of NumPy are numbers, too.
_KINDS: dict[type, tuple[str, Any]] = {
    str: ("a text", str),
    int: ("a whole number", numbers.Integral),
    float: ("a number", numbers.Real),
    bool: ("True or False", (bool, numbers.Integral)),
}


def _check_type(field: dataclasses.Field, value: Any, hint: Any) -> None:
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    needed, types = _KINDS[kinds[0] if kinds else hint]
    if not isinstance(value, types):
        raise ConfigError(f"--{field.name}={value!r}: {needed} is needed")


def _check_text(field: dataclasses.Field, value: str) -> None:
    choices, pattern = field.metadata["choices"], field.metadata["pattern"]
    known = not choices or value in choices or (pattern and re.fullmatch(pattern, value))
    if not known:
        raise ConfigError(f"--{field.name}={value!r}: one of {', '.join(choices)} is needed")
    # How Python represents bytes of the command line that are not UTF-8; TensorFlow rejects them.
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ConfigError(f"--{field.name}={value!r} is not UTF-8: rename it, or choose another")


def _check_bounds(field: dataclasses.Field, value: float) -> None:
    low, high = field.metadata["low"], field.metadata["high"]
    if not math.isfinite(value):
        raise ConfigError(f"--{field.name}={value}: a finite number is needed")
    if low is not None and value < low:
        raise ConfigError(f"--{field.name}={value} is too small: at least {low} is needed")
    if high is not None and value > high:
        raise ConfigError(f"--{field.name}={value} is too large: at most {high} is possible")


def require(settings: Any, *names: str) -> None:
    """Raises ConfigError naming the first of these settings that is not given."""
    for name in names:
        needed(getattr(settings, name), name)


def needed(value: str | None, name: str, meaning: str = "") -> str:
    """`value`, of the setting `name`; ConfigError, with its meaning, if it is not given."""
    if not value:
        raise ConfigError(f"--{name} is needed{meaning and f': {meaning}'}")
    return value
