"""The whole loop from one command: teacher, then rounds of label → select → write → student.

Started again after a kill, it continues: finished stages are recorded in `state.json`, and the
stage that was interrupted resumes from its own checkpoints and manifests. Prints one line of JSON
per model.
"""

from __future__ import annotations

import json

from efficientnet_ns import config
from efficientnet_ns.config import Config, LoopConfig


def main(settings: Config, loop: LoopConfig) -> None:
    from efficientnet_ns.loop import rounds

    print("\n".join(map(json.dumps, rounds.run_loop(settings, loop))))


if __name__ == "__main__":
    config.run(main, Config, LoopConfig)
