"""From an index to batches on a device."""

import os

from data.loading.nvjpeg import load_first

# On a GPU, streams that share a connection wait for each other. With CUDA's default of 8 connections decoding waits for
# the kernels of the training: a ResNet-50 on an H200 loses a tenth of its rate (benchmarks/README.md).
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
load_first()
