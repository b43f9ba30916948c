"""The EfficientNet family: layers, block tables and weights."""
