"""What `python -m efficientnet_ns.benchmark` measures: one module per part of the product."""
