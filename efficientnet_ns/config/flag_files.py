"""Flag files, whose lines replace `--flagfile=PATH`, and the presets that come with the package."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from efficientnet_ns.config.fields import ConfigError

_FLAG = re.compile(r"--?flagfile(?:=(.*))?", re.DOTALL)


def presets() -> Path:
    """Returns the folder with `flags` and `tpu_scripts`: the repository or pip's data folder."""
    repository = Path(__file__).parents[2]
    if (repository / "flags").is_dir():
        return repository
    return Path(sysconfig.get_path("data"), "share", "efficientnet_ns")


def expanded(arguments: Sequence[str], outer: tuple[Path, ...] = ()) -> list[str]:
    """Returns the arguments with flag files, including nested ones, replaced by their lines.

    Skips empty lines and lines that begin with `#` or `//`. Arguments after `--` are not flags.

    Args:
      outer: files that are already being read, which are skipped.

    Raises:
      ConfigError: If a flag file does not exist, cannot be read, or is not UTF-8 text.
    """
    result: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            # absl also treats what follows as positional arguments.
            return [*result, argument, *rest]
        match = _FLAG.fullmatch(argument)
        if not match:
            result.append(argument)
            continue
        if match[1] is None and not rest:
            raise ConfigError("--flagfile requires the path of a file")
        path = _found(match[1] if match[1] is not None else rest.pop(0))
        if path not in outer:
            result += expanded(_lines(path), (*outer, path))
    return result


def _found(name: str) -> Path:
    """Returns the file at that path or, if there is none, the preset of that name."""
    given, preset = Path(name).expanduser(), presets() / name
    for path in (given, preset):
        if path.is_file():
            return path
    raise ConfigError(f"--flagfile={name}: no such file, here or in {presets()}")


def _lines(path: Path) -> list[str]:
    try:
        # A byte order mark would become part of the first flag.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ConfigError(f"--flagfile={path} is not UTF-8 text") from e
    except OSError as e:
        raise ConfigError(f"--flagfile={path}: {e.strerror}") from e
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith(("#", "//"))]
