"""A run's folder: lock, journal, fingerprint, checkpoints."""
