"""Train, evaluate or predict: `python -m efficientnet_ns.main --mode=train --flagfile=flags/…`.

Exit codes: 0 done; 2 invalid flag or unusable data; 75 stopped by SIGTERM or Ctrl-C after saving:
run the same command again to continue.
"""

from __future__ import annotations

import json

from efficientnet_ns import config
from efficientnet_ns.config import Config, ModeConfig


def main(options: ModeConfig, settings: Config) -> None:
    # TensorFlow is loaded only after --help and wrong flags have been handled.
    from efficientnet_ns.loop import modes

    print(json.dumps(modes.run(options.mode, settings)))


if __name__ == "__main__":
    config.run(main, ModeConfig, Config)
