"""The report verb."""
