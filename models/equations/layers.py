"""torch's layers with the notes' equations inside, and any network made of them: slow, to be compared and read.

Parameters, their names in a state_dict and hooks stay: a layer changes its forward and nothing else. Inputs may be in
any memory format; outputs are not in channels_last.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from models.equations import operations as reference

Net = TypeVar("Net", bound=nn.Module)


def in_autocast(tensor: Tensor) -> Tensor:
    """The tensor in the precision of the autocast around: torch casts for its own layers, not for these."""
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))


class ReferenceConv2d(nn.Conv2d):
    """A convolution by im2col, or a depthwise one where every channel is a group.

    Shapes: (N, C, H, W) -> (N, out_channels, H_out, W_out).
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else in_autocast(self.bias)
        operation = reference.convolution if self.groups == 1 else reference.depthwise
        return operation(in_autocast(x), in_autocast(self.weight), beta=bias, S=self.stride[0], P=int(self.padding[0]))


class ReferenceReLU(nn.ReLU):
    """max(0, x), never in place. Shapes: any -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        return reference.relu(x)


class ReferenceBatchNorm2d(nn.BatchNorm2d):
    """Batch norm: statistics of the batch in training, moving averages in evaluation.

    Shapes: (N, C, H, W) -> (N, C, H, W).
    """

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        wide = x.to(self.weight.dtype)  # statistics in bfloat16 would be too coarse
        if not self.training:
            normed = reference.normalized(wide, self.running_mean, variance=self.running_var, eps=self.eps)
            return reference.scaled(normed, self.weight, beta=self.bias).to(x.dtype)
        self._average(wide.detach())
        return reference.batch_norm(wide, self.weight, beta=self.bias, eps=self.eps).to(x.dtype)

    def _average(self, x: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        mean, variance = reference.moving_averages(
            x, self.running_mean, variance=self.running_var, momentum=self.momentum
        )
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)
        self.num_batches_tracked.add_(1)


class ReferenceMaxPool2d(nn.MaxPool2d):
    """The maximum of each window. Shapes: (N, C, H, W) -> (N, C, H_out, W_out)."""

    def forward(self, x: Tensor) -> Tensor:
        return reference.max_pool(x, _side(self.kernel_size), S=_side(self.stride), P=_side(self.padding))


class ReferenceAvgPool2d(nn.AdaptiveAvgPool2d):
    """The mean of each channel. Shapes: (N, C, H, W) -> (N, C, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return reference.global_average_pool(x)[:, :, None, None]


class ReferenceLinear(nn.Linear):
    """One matrix product and a sum. Shapes: (..., in_features) -> (..., out_features)."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else in_autocast(self.bias)
        return reference.linear(in_autocast(x), in_autocast(self.weight).T, b_cls=bias)


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: ReferenceConv2d,
    nn.ReLU: ReferenceReLU,
    nn.BatchNorm2d: ReferenceBatchNorm2d,
    nn.MaxPool2d: ReferenceMaxPool2d,
    nn.AdaptiveAvgPool2d: ReferenceAvgPool2d,
    nn.Linear: ReferenceLinear,
}


def with_reference_ops(net: Net) -> Net:
    """The same network, its convolutions, linear layers, ReLUs, batch norms and poolings computed by `reference`.

    Layers of other kinds stay as they are, dropout and flattening among them.

    Raises: ValueError, and no layer is changed, when the notes have no equation for one of these.
    """
    layers = {name: layer for name, layer in net.named_modules() if type(layer) in LAYERS}
    for name, layer in layers.items():
        for setting in _without_equation(layer):
            where = name or type(layer).__name__
            raise ValueError(f"{where}: {setting} is in no equation of the notes, leave this network to torch's ops")
    for layer in layers.values():
        layer.__class__ = LAYERS[type(layer)]
    return net


def _without_equation(layer: nn.Module) -> list[str]:
    """The settings of a layer that the notes do not know, as `name=value`."""
    match layer:
        case nn.Conv2d():
            known = {
                **{name: _is_square(getattr(layer, name)) for name in ("kernel_size", "stride", "padding")},
                "dilation": layer.dilation == (1, 1),
                "groups": layer.groups == 1 or layer.groups == layer.in_channels == layer.out_channels,
                "padding_mode": layer.padding_mode == "zeros",
            }
        case nn.BatchNorm2d():
            known = {
                "affine": layer.affine,
                "momentum": layer.momentum is not None,
                "track_running_stats": layer.track_running_stats,
            }
        case nn.MaxPool2d():
            known = {
                **{name: _is_square(getattr(layer, name)) for name in ("kernel_size", "stride", "padding")},
                "dilation": layer.dilation in (1, (1, 1)),
                "ceil_mode": not layer.ceil_mode,
                "return_indices": not layer.return_indices,
            }
        case nn.AdaptiveAvgPool2d():
            known = {"output_size": layer.output_size in (1, (1, 1))}
        case _:
            known = {}
    return [f"{name}={getattr(layer, name)}" for name, is_known in known.items() if not is_known]


def _is_square(size: object) -> bool:
    return isinstance(size, int) or (isinstance(size, tuple) and size[0] == size[1])


def _side(size: int | tuple[int, ...]) -> int:
    return size if isinstance(size, int) else size[0]
