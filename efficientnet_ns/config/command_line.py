"""Behavior of all programs: flags, `--help`, one-line errors, exit codes, requests to stop."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from efficientnet_ns.config import (
    fields,
    flag_files,
    flag_help,
    log_lines,
    preemption,
    program_table,
    remote_paths,
)
from efficientnet_ns.files import standard_output

_HELP = {"-h", "--h", "-help", "--help", "-helpshort", "--helpshort", "-?", "--?"}
_HELP_FULL = {"-helpfull", "--helpfull"}
_STORAGE_ERRORS = (
    "NotFoundError",
    "PermissionDeniedError",
    "ResourceExhaustedError",
    "AlreadyExistsError",
)
# What reading and writing gs:// raises without a network or credentials, or while it is overloaded.
# Training also raises errors of these classes.
_REMOTE_ERRORS = (
    *("FailedPreconditionError", "UnavailableError", "AbortedError", "DeadlineExceededError"),
    *("UnauthenticatedError", "UnimplementedError"),
)
_REMOTE_STORAGE = re.compile(r"gs://|libcurl|executing an HTTP request|File system scheme")


def run(main: Callable[..., int | None], *settings: type, words: bool = False) -> None:
    """Runs a program: defines and parses its flags, and calls `main` with the settings.

    Errors that the user can fix are logged on one line, without a stack trace. Exit codes: the
    value that `main` returns (0 for None); 2 for an invalid flag or unusable data; 75 after SIGTERM
    or SIGINT (see `preemption`); 141, as is customary, if the reader of the output has exited.

    Args:
      main: function of an instance of each of `settings` and, if `words`, the other arguments.
      settings: dataclasses whose fields are the program's flags.
      words: whether to allow arguments that are not flags.
    """
    values = flags.FLAGS
    for cls in settings:
        fields.define_flags(cls, values)
    with standard_output.quiet_when_unread():
        # absl also accepts Boolean flags with a value: --help=1.
        given = {re.sub("=(1|true)$", "", argument) for argument in sys.argv[1:]}
        about = sys.modules["__main__"].__doc__ or ""
        if given & _HELP_FULL:
            print(flag_help.full(values, sys.argv[0], about))
            sys.exit(0)
        if given & _HELP:
            names = program_table.PROGRAMS.get(Path(sys.argv[0]).stem, ())
            print(flag_help.short(values, sys.argv[0], about, names))
            sys.exit(0)
        # Before `main` imports TensorFlow, which reads its native log level on import.
        log_lines.begin()
        app.run(
            lambda argv: _exit_code(
                lambda: _run(main, _arguments(settings, values, argv[1:], words))
            ),
            flags_parser=functools.partial(_parse, values),
        )


def _parse(values: flags.FlagValues, arguments: Sequence[str]) -> list[str]:
    try:
        expanded = flag_files.expanded(arguments[1:])
        _refuse_shell_habits(values, expanded)
        return values([arguments[0], *expanded])
    except (flags.Error, fields.ConfigError) as e:
        print(f"{e}\n--help lists the flags.", file=sys.stderr)
        sys.exit(2)


def _refuse_shell_habits(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    """Raises ConfigError for shell syntax, which flag files do not interpret.

    That is, two flags on one line, which would become a single value, or quotes around a value.
    """
    for argument in arguments:
        # `--a=1 --b=2`, and `--a=1 --nob`.
        match = re.match(r"--?(\w+)=(.*?\s--?(?:no)?(\w+)(?:=.*|\s*))$", argument, re.DOTALL)
        if match and match[1] in values and match[3] in values:
            raise fields.ConfigError(
                f"--{match[3]} is not on a separate line: it would become part of the value of "
                f"--{match[1]}, {match[2]!r}"
            )
        quoted = re.fullmatch(r"--?(\w+)=(['\"].*['\"])", argument, re.DOTALL)
        if quoted and quoted[1] in values:
            raise fields.ConfigError(
                f"--{quoted[1]}={quoted[2]}: quotes in a flag file are part of the value; remove them"
            )


def _arguments(
    settings: Sequence[type], values: flags.FlagValues, rest: Sequence[str], words: bool
) -> list[Any]:
    """Returns the arguments of `main`."""
    if rest and not words:
        # Otherwise, a mistyped flag might go unnoticed for hours.
        raise fields.ConfigError(
            f"unexpected argument {rest[0]!r}; settings must be given as --flag=value"
        )
    built: list[Any] = [fields.from_flags(cls, values) for cls in settings]
    for one in built:
        _refuse_other_schemes(one)
    return [*built, list(rest)] if words else built


# File systems built into TensorFlow. TPU addresses are not paths.
_SCHEMES = ("gs", "file", "ram")
_ADDRESSES = ("tpu", "master")


def _refuse_other_schemes(settings: Any) -> None:
    """Raises ConfigError for the first path on a file system that TensorFlow does not support."""
    for name, value in _texts(settings):
        # Several folders are joined with ';'.
        for part in value.split(";") if name not in _ADDRESSES else ():
            scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", part)
            if scheme and scheme[1] not in _SCHEMES:
                raise fields.ConfigError(
                    f"--{name}={part}: a local path or gs:// is required; download the file "
                    "first, or write to a local folder and copy it"
                )


def _run(main: Callable[..., int | None], arguments: Sequence[Any]) -> int | None:
    settings = filter(dataclasses.is_dataclass, arguments)
    texts = {
        part: name
        for one in settings
        for name, value in _texts(one)
        for part in value.split(";")
        if name not in _ADDRESSES
    }
    with remote_paths.prepared(texts):
        return main(*arguments)


def _texts(settings: Any) -> Iterator[tuple[str, str]]:
    for name, value in vars(settings).items():
        if dataclasses.is_dataclass(value):
            yield from _texts(value)
        elif isinstance(value, str):
            yield name, value


def _exit_code(program: Callable[[], int | None]) -> int | None:
    """Runs the program and returns its exit code; logs errors that the user can fix on one line."""
    try:
        with preemption.StopRequest() as stop, stop.immediate():
            code = program()
        standard_output.flush()
        return code
    except preemption.Preempted as e:
        logging.warning("%s: start the same command again to continue", e)
        return preemption.EXIT_CODE
    except Exception as e:
        # `quiet_when_unread` handles it and exits with 141.
        if isinstance(e, BrokenPipeError) and standard_output.is_unread():
            raise
        if not _is_fixable(e):
            raise
        logging.error("%s%s", _message(e), _permissions(e))
        return 2


def _message(error: Exception) -> str:
    """Returns an error's message; if memory ran out, advice instead of a trace of the graph."""
    refused = re.search(r"OOM when allocating (tensor with shape ?\S+)", str(error))
    if refused is None:
        return str(error)
    return (
        f"out of memory for a {refused[1]}: lower the batch size (--train_batch_size, "
        "--eval_batch_size), then --input_image_size"
    )


def _permissions(error: Exception) -> str:
    """Returns the permissions to grant if access was denied; "" for other errors."""
    if type(error).__name__ != "PermissionDeniedError" or "gs://" not in str(error):
        return ""
    return f"\nThe account needs {remote_paths.PERMISSIONS}."


def _is_fixable(error: Exception) -> bool:
    """Checks whether the user can fix the cause: settings, data or storage."""
    kind = type(error)
    # Storage raises an OSError or one of TensorFlow's errors, which name the path. The latter are
    # recognized by name, because importing TensorFlow would delay programs that do not need it.
    storage = isinstance(error, OSError) or kind.__name__ in _STORAGE_ERRORS
    # FailedPreconditionError concerns storage if a folder is in place of a file, or vice versa.
    mixed_up = kind.__name__ == "FailedPreconditionError" and "directory" in str(error)
    remote = kind.__name__ in _REMOTE_ERRORS and bool(_REMOTE_STORAGE.search(str(error)))
    return kind.__module__.startswith("efficientnet_ns") or storage or mixed_up or remote
