"""List the programs: `python -m efficientnet_ns`."""

from __future__ import annotations

from efficientnet_ns.config import program_table

if __name__ == "__main__":
    print(program_table.listing())
