"""Predictions of other models, made into those of a teacher."""
