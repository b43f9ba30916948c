"""Predictions of trained models: classes of photos and pseudo labels of a teacher."""

from efficientnet_ns.inference.photos import Image, Prediction, preprocess, top_k

__all__ = ["Image", "Prediction", "preprocess", "top_k"]
