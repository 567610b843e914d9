"""From an index to batches on a device."""

from data.loading.nvjpeg import load_first

load_first()
