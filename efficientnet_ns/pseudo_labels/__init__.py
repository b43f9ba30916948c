"""From a teacher and unlabeled images to balanced, pseudo-labeled records."""
