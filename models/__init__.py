"""Networks, their training modules and published weights, and what can be computed about them.

Only `weights/` reads files. No configs, no trackers, no shards.
"""
