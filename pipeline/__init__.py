"""The verbs, one file or package each, and the rooms that they share."""

import data.loading  # noqa: F401  # loads nvJPEG before Lightning imports torchvision, which brings an older one
