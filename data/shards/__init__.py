"""From images to tar shards, a manifest and an index."""
