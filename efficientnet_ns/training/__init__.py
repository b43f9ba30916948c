"""Losses, schedules, optimizer, EMA, and the student's training loop."""
