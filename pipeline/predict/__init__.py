"""The verb `predict`: classify images with a trained run."""
