"""Measuring: meters, scorers, comparisons of methods, plots, timing."""
