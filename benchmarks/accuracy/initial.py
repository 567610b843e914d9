"""timm's initial weights for a MobileNetV3, to compare recipes without this difference."""

import math

from torch import nn

from models.learning.families import SeparableClassifier


class TimmsInitialWeights(SeparableClassifier):
    """Draw the last two layers as timm does: N(0, 2 / fan-out) for a 1x1, which is linear here; U(-1, 1) / sqrt(K)."""

    def initialize(self) -> None:
        """Draw all weights, then those of these two."""
        super().initialize()
        hidden, last = [layer for layer in self.net.modules() if isinstance(layer, nn.Linear)]
        nn.init.normal_(hidden.weight, std=math.sqrt(2 / hidden.out_features))
        nn.init.uniform_(last.weight, -1 / math.sqrt(last.out_features), 1 / math.sqrt(last.out_features))
