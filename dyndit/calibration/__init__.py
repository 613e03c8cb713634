"""Measure what each choice does to pictures, search a plan, measure the plan."""
