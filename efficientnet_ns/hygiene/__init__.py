"""Leaks, duplicates and doubtful labels in sets of images."""
