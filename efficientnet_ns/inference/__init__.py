"""Predictions of trained models: photos in and classes out, and a teacher that labels."""

from efficientnet_ns.inference.photos import Guess, Image, preprocess, top_k

__all__ = ["Guess", "Image", "preprocess", "top_k"]
