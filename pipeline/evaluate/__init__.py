"""The verb `evaluate`: metrics, mistakes and calibration of a trained run."""
