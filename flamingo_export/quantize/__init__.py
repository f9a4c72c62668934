"""Calibration tables and precisions to quantised weights and graphs."""
