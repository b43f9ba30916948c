"""Settings resolved against task and model."""
