"""Rounds of teacher and student, studies, and the demo."""
