"""List the programs: `python -m efficientnet_ns`."""

from __future__ import annotations

import sys

from efficientnet_ns.config import program_table

if __name__ == "__main__":
    words = sys.argv[1:]
    if words and words[0] in program_table.PROGRAMS:
        print(f"Did you mean: python -m efficientnet_ns.{' '.join(words)}", file=sys.stderr)
        sys.exit(2)
    print(program_table.listing())
