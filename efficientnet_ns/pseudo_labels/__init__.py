"""Makes balanced, pseudo-labeled records from a teacher and unlabeled images."""
