"""The measurements of `python -m efficientnet_ns.benchmark`: one module per part of the package."""
