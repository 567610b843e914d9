"""torch's layers with the notes' equations inside, for any network built from them.

Parameters, their names in a state dict and hooks stay; only the forward changes. Inputs may be in any memory format;
outputs are not in channels_last.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

from models.equations.activation import relu
from models.equations.classification import linear
from models.equations.convolution import convolution, depthwise
from models.equations.normalization import batch_norm, moving_averages, normalized, scaled
from models.equations.pooling import global_average_pool, max_pool

Net = TypeVar("Net", bound=nn.Module)


def _autocast(tensor: Tensor) -> Tensor:
    """Return the tensor in the precision of the surrounding autocast, which casts for torch's own layers only."""
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))


class ReferenceConv2d(nn.Conv2d):
    """Convolution by im2col, or depthwise. Shapes: (N, C, H, W) -> (N, out_channels, H_out, W_out)."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else _autocast(self.bias)
        operation = convolution if self.groups == 1 else depthwise
        return operation(_autocast(x), _autocast(self.weight), beta=bias, S=self.stride[0], P=int(self.padding[0]))


class ReferenceReLU(nn.ReLU):
    """max(0, x), never in place. Shapes: any -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        return relu(x)


class ReferenceBatchNorm2d(nn.BatchNorm2d):
    """Batch norm; moving averages in evaluation. Shapes: (N, C, H, W) -> (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        mean, variance, count = self.running_mean, self.running_var, self.num_batches_tracked
        assert mean is not None
        assert variance is not None
        wide = x.to(self.weight.dtype)  # statistics in bfloat16 would be too coarse
        if not self.training:
            normed = normalized(wide, mean, variance=variance, eps=self.eps)
            return scaled(normed, self.weight, beta=self.bias).to(x.dtype)
        assert count is not None
        assert self.momentum is not None
        updated = moving_averages(wide.detach(), mean, variance=variance, momentum=self.momentum)
        mean.copy_(updated[0])
        variance.copy_(updated[1])
        count.add_(1)
        return batch_norm(wide, self.weight, beta=self.bias, eps=self.eps).to(x.dtype)


class ReferenceMaxPool2d(nn.MaxPool2d):
    """The maximum under each kernel position. Shapes: (N, C, H, W) -> (N, C, H_out, W_out)."""

    def forward(self, x: Tensor) -> Tensor:
        return max_pool(x, _side(self.kernel_size), S=_side(self.stride), P=_side(self.padding))


class ReferenceAvgPool2d(nn.AdaptiveAvgPool2d):
    """The mean of each channel. Shapes: (N, C, H, W) -> (N, C, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return global_average_pool(x)[:, :, None, None]


class ReferenceLinear(nn.Linear):
    """One matrix product and a sum. Shapes: (..., in_features) -> (..., out_features)."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else _autocast(self.bias)
        return linear(_autocast(x), _autocast(self.weight).T, b_cls=bias)


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: ReferenceConv2d,
    nn.ReLU: ReferenceReLU,
    nn.BatchNorm2d: ReferenceBatchNorm2d,
    nn.MaxPool2d: ReferenceMaxPool2d,
    nn.AdaptiveAvgPool2d: ReferenceAvgPool2d,
    nn.Linear: ReferenceLinear,
}
# Settings that the equations know, beside square kernels, strides and paddings.
KNOWN: dict[type[nn.Module], dict[str, tuple[object, ...]]] = {
    nn.Conv2d: {"dilation": ((1, 1),), "padding_mode": ("zeros",)},
    nn.BatchNorm2d: {"affine": (True,), "track_running_stats": (True,)},
    nn.MaxPool2d: {"dilation": (1, (1, 1)), "ceil_mode": (False,), "return_indices": (False,)},
    nn.AdaptiveAvgPool2d: {"output_size": (1, (1, 1))},
}


def _side(size: int | tuple[int, ...]) -> int:
    return size if isinstance(size, int) else size[0]


def _is_square(size: object) -> bool:
    return isinstance(size, int) or (isinstance(size, tuple) and size[0] == size[1])


def _without_equation(layer: nn.Module) -> list[str]:
    """Return the settings of a layer that the notes' equations do not cover, as `name=value`."""
    unknown = [name for name, values in KNOWN.get(type(layer), {}).items() if getattr(layer, name) not in values]
    if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
        unknown += [name for name in ("kernel_size", "stride", "padding") if not _is_square(getattr(layer, name))]
    if isinstance(layer, nn.Conv2d) and layer.groups > 1 and {layer.in_channels, layer.out_channels} != {layer.groups}:
        unknown.append("groups")
    if isinstance(layer, nn.BatchNorm2d) and layer.momentum is None:
        unknown.append("momentum")
    return [f"{name}={getattr(layer, name)}" for name in unknown]


def with_reference_ops(net: Net) -> Net:
    """Let the notes' equations compute the convolutions, linear layers, ReLUs, batch norms and poolings of `net`.

    Other layers, such as dropout, stay. Returns the same network.
    Raises: ValueError, and no layer is changed, when the notes have no equation for one of these layers.
    """
    layers = {name: layer for name, layer in net.named_modules() if type(layer) in LAYERS}
    for name, layer in layers.items():
        for setting in _without_equation(layer):
            place = name or type(layer).__name__
            raise ValueError(f"{place}: the notes have no equation for {setting}, keep torch's layers")
    for layer in layers.values():
        layer.__class__ = LAYERS[type(layer)]
    return net
