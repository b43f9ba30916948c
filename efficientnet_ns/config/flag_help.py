"""What `--help` prints: a program's own flags, under the headings of their sections."""

from __future__ import annotations

from absl import flags


def text(values: flags.FlagValues, program: str, description: str) -> str:
    """The help of one program.

    Args:
      values: the flags; those of module `program` come first, then those of `program: heading`.
      description: what stands above them.
    """
    lines = [description.strip(), ""]
    for module, defined in values.flags_by_module_dict().items():
        owner, _, heading = module.partition(": ")
        if owner != program:
            continue
        lines += [heading or "The program itself.", ""]
        for flag in defined:
            words = flag.help.split(">: ", 1)[-1] if _choices(flag) else flag.help
            lines += [_usage(flag), flags.text_wrap(words, indent="      "), ""]
    return "\n".join([*lines, "All flags, including those of the libraries: --helpfull"])


def _choices(flag: flags.Flag) -> list[str]:
    # absl puts them before the help of such a flag as well.
    # The empty one takes back a preset's.
    return [value for value in getattr(flag.parser, "enum_values", []) if value]


def _usage(flag: flags.Flag) -> str:
    if flag.boolean:
        return f"  --[no]{flag.name}  (default: {'on' if flag.default else 'off'})"
    kind = "|".join(_choices(flag)) or flag.flag_type()
    default = "none" if flag.default is None else repr(flag.default)
    return f"  --{flag.name}=<{kind}>  (default: {default})"
