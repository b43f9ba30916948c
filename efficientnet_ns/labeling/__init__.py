"""The pseudo-label stages: predict, select, write, report."""
