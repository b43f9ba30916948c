"""Measuring models: accuracy over every example exactly once."""
