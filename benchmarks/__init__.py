"""Measurements beside peers, interleaved in one run; what they printed lies in README.md."""

import data.loading  # noqa: F401  # loads nvJPEG before torchvision brings an older one
