"""Labeling, selection and writing by many machines: a Beam pipeline, a Ray cluster."""
