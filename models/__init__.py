"""Networks and what can be computed about them. Knows no configs, no trackers, no shards."""
