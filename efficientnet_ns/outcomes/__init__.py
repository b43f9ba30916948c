"""Results of a labeling run: its report, its review sheet, and the images to label next."""
