"""The dashboard: MLflow as a mirror of runs."""
