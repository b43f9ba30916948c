"""Evaluation of models, which counts every example exactly once."""
