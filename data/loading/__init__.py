"""From an index to batches on a device."""
