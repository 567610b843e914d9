"""One verb a file, each a command: `python -m pipeline.VERB`."""
