"""One classifier per family of architectures, with its initial weights.

The last layer of each starts small, so that the first loss is ln K for any number K of classes. Published ranges are
made for 1,000 classes: Tan & Le's starts 2 classes of EfficientNet at five times ln 2. Zero would be exact, but the
layers below then wait for the last one to grow, which takes hundreds of steps.
"""

import math

from torch import nn

from models.attention import RelativeBias
from models.learning.classifier import Classifier

LAST_STD = 0.01  # of the last layer
HIDDEN_SCALE = 0.25  # of a sequential network's hidden matrices, relative to He et al. 2015


def _zero_bias(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _start_small(net: nn.Module) -> None:
    """Draw the last layer again."""
    for last in [layer for layer in net.modules() if isinstance(layer, nn.Linear)][-1:]:
        nn.init.normal_(last.weight, std=LAST_STD)
        _zero_bias(last)


class SequentialClassifier(Classifier):
    """Sequential networks: He initialisation, zero biases.

    He, Zhang, Ren & Sun 2015: sqrt(2 / fan-in) trains deep networks without starting from shallow ones. Max pooling
    enlarges the signal, so hidden matrices start at a quarter of it: the input of AlexNet's last layer would have a
    norm of 321, and the first loss would be far above ln K. The last layer keeps the 0.01 of Krizhevsky et al. 2012,
    section 5. Their biases of 1, which feed ReLU early, are not needed.
    """

    def initialize(self) -> None:
        """Draw kernels and matrices, zero the biases."""
        layers = [layer for layer in self.net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
            _zero_bias(layer)
            if isinstance(layer, nn.Linear):
                layer.weight.data *= HIDDEN_SCALE
        _start_small(self.net)


class ResidualClassifier(Classifier):
    """Residual networks: the initialisation of He, Zhang, Ren & Sun 2015, by fan-out as in torchvision.

    The last layer has the 0.01 of Goyal et al. 2017, section 5.1.
    """

    def initialize(self) -> None:
        """Draw the kernels."""
        for layer in self.net.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        _start_small(self.net)


class SeparableClassifier(Classifier):
    """Depthwise separable networks: the initialisation of Tan & Le 2019's code.

    Kernels are N(0, 2 / fan-out), where the fan-out of a depthwise one is K^2, not C K^2; matrices U(-1, 1) / sqrt(K),
    except for the last one, which has the 0.01 of torchvision's MobileNets. Biases and depthwise kernels decay in that
    code; here they do not (Howard et al. 2017, section 3.2).
    """

    is_depthwise = True

    def initialize(self) -> None:
        """Draw kernels and matrices, zero the biases."""
        for layer in self.net.modules():
            if isinstance(layer, nn.Conv2d):
                fan_out = layer.weight[0, 0].numel() * layer.out_channels // layer.groups
                nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))
            elif isinstance(layer, nn.Linear):
                nn.init.uniform_(layer.weight, -1 / math.sqrt(layer.out_features), 1 / math.sqrt(layer.out_features))
            _zero_bias(layer)
        _start_small(self.net)


class AttentionClassifier(Classifier):
    """Attention-augmented networks: initial weights from N(0, 0.02), as in the code of Liu et al. 2022.

    Their table 5 says 0.2. Dai et al. 2021 do not state theirs.
    """

    def initialize(self) -> None:
        """Draw kernels, matrices and tables, zero the biases."""
        for layer in self.net.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)  # truncated at a hundred deviations, as in that code
                _zero_bias(layer)
            elif isinstance(layer, RelativeBias):
                nn.init.trunc_normal_(layer.table, std=0.02)
        _start_small(self.net)
