"""From images to batches on a device. Knows no networks, no configs, no trackers."""
