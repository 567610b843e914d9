"""From bytes on disk to batches on a device: knows nothing of networks, configs or trackers."""
