"""Converts predictions of other models to those of a teacher."""
