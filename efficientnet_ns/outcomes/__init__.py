"""What a labeling run has produced: its report, its review sheet, what to label next."""
