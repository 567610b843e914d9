"""Accuracies of short trainings on photographs of CIFAR-10."""
