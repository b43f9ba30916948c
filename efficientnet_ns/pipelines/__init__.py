"""Labeling, selection and writing on many machines: a Beam pipeline, a Ray cluster."""
