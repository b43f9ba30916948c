"""Run the method on real images in a few minutes: 5,000 of MNIST's handwritten digits.

A teacher is trained on five labels per class and labels 3,450 other pictures; two noised students
are trained on both, in turn. A control is trained on the labels only, with as many updates as all
three.
"""

from __future__ import annotations

from efficientnet_ns import config
from efficientnet_ns.config import DemoConfig


def main(options: DemoConfig) -> None:
    from efficientnet_ns.loop import demo

    demo.run_demo(options)


if __name__ == "__main__":
    config.run(main, DemoConfig)
