"""List the published models: `python -m efficientnet_ns.list_models [--count] [--json]`."""

from __future__ import annotations

from efficientnet_ns import config
from efficientnet_ns.config import ListConfig


def main(options: ListConfig) -> None:
    from efficientnet_ns.models import recipe_table

    print(recipe_table.listing(count=options.count, as_json=options.json))


if __name__ == "__main__":
    config.run(main, ListConfig)
