"""Calibration, ranges, placement and quantisation."""
