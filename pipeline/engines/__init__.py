"""Workflows: from a study to commands, and the engine that runs them."""
