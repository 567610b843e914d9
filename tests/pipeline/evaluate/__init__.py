"""Tests of the verb `evaluate`."""
