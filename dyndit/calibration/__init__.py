"""Measure the effect of each choice on pictures, search a plan, measure the plan."""
