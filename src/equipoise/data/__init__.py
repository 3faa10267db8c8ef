"""Calibration and evaluation streams, preprocessing, and task metrics."""
