"""Devices: strategies, precision, and which worker is the chief."""
