"""Kubernetes: a command as a TrainJob of Kubeflow Trainer or as a JobSet, from its manifest to its exit code."""
