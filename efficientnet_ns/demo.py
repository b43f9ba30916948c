"""The method on real images in a few minutes: 5,000 of MNIST's handwritten digits.

A teacher learns from five labels per class and labels 3,450 other pictures; two noised students in turn
learn from both. A control model gets only the labels, but all the update steps.
"""

from __future__ import annotations

from efficientnet_ns import config
from efficientnet_ns.config import DemoConfig


def main(options: DemoConfig) -> None:
    from efficientnet_ns.loop import demo

    demo.run_demo(options)


if __name__ == "__main__":
    config.run(main, DemoConfig)
