"""Measure quality, speed and cost: features in, named values out."""
