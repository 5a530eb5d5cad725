"""Measurements: both sides of a claim in one run."""
