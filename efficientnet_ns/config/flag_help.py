"""Output of `--help`, a program's main flags, and of `--helpfull`, all flags by section."""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags


def short(values: flags.FlagValues, program: str, description: str, names: Sequence[str]) -> str:
    """Returns the help of a program with its most important flags.

    Args:
      values: flags; the program's own are those of module `program: heading`.
      description: text shown above the flags.
      names: names of the flags to show, in order; if empty, all flags of the program.
    """
    own = [flag for _, defined in _sections(values, program) for flag in defined]
    by_name = {flag.name: flag for flag in own}
    lines = [description.strip(), ""]
    for flag in [by_name[name] for name in names] or own:
        lines += _described(flag)
    rest = len(own) - len(names) if names else 0
    more = f"{rest} more flags of this program, and those of libraries" if rest else "Other flags"
    return "\n".join(
        [*lines, f"{more}: --helpfull", "Flags from a file, one per line: --flagfile=PATH"]
    )


def full(values: flags.FlagValues, program: str, description: str) -> str:
    """Returns the help of a program with all its flags by section, then those of libraries."""
    lines = [description.strip(), ""]
    for heading, defined in _sections(values, program):
        lines += [heading, ""]
        for flag in defined:
            lines += _described(flag)
    for module, defined in sorted(values.flags_by_module_dict().items()):
        if module.partition(": ")[0] != program:
            lines += [f"Of the library {module}.", ""]
            for flag in defined:
                lines += _described(flag)
    return "\n".join(lines).rstrip()


def _sections(values: flags.FlagValues, program: str) -> list[tuple[str, list[flags.Flag]]]:
    """Returns (heading, flags) of each section of the program's own flags, without aliases."""
    found = []
    for module, defined in values.flags_by_module_dict().items():
        owner, _, heading = module.partition(": ")
        if owner == program:
            own = [flag for flag in defined if not flag.help.startswith("Alias for --")]
            found.append((heading or "The program itself.", own))
    return found


def _described(flag: flags.Flag) -> list[str]:
    # absl prefixes the help of a flag that has choices with `<a|b>: `, which `_usage` shows.
    words = flag.help.split(">: ", 1)[-1] if _choices(flag) else flag.help
    return [_usage(flag), flags.text_wrap(words or "", indent="      "), ""]


def _choices(flag: flags.Flag) -> list[str]:
    # Without the empty choice, which resets the value of a preset.
    return [value for value in getattr(flag.parser, "enum_values", []) if value]


def _usage(flag: flags.Flag) -> str:
    if flag.boolean:
        return f"  --[no]{flag.name}  (default: {'on' if flag.default else 'off'})"
    kind = "|".join(_choices(flag)) or flag.flag_type()
    default = "none" if flag.default is None else repr(flag.default)
    return f"  --{flag.name}=<{kind}>  (default: {default})"
