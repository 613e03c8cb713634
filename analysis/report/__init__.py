"""Runs in, tables, figures and pages out."""
