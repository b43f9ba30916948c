"""Resolves settings against task and model."""
