"""The verb `evaluate`: how good a trained run is, what it gets wrong, and how far its probabilities can be trusted."""
