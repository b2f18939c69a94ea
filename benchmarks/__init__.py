"""Measurements: performance as ratios within one run, and learning results over seeds."""
