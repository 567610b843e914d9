"""Lightning modules: how a network learns to classify."""
