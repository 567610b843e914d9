"""MLflow and the queue in front of it."""
