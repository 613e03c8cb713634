"""Turn runs into tables, figures and pages."""
