"""The notes' equations against torch's layers, finite differences and brute force, and in a training."""

from __future__ import annotations

import ast
import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2.functional import normalize as torchvision_normalize

from models.equations import activation, classification, convolution, normalization, pooling
from models.equations.activation import relu
from models.equations.classification import cross_entropy, linear, softmax
from models.equations.convolution import (
    convolution_im2col,
    convolution_sum,
    depthwise,
    gradient_beta,
    gradient_W,
    gradient_X,
    pointwise,
)
from models.equations.layers import with_reference_ops
from models.equations.normalization import batch_norm, moving_averages, normalize, normalized, scaled
from models.equations.pooling import global_average_pool, max_pool
from tests.support.networks import build

Operation = Callable[..., Tensor]
MODULES = (activation, classification, convolution, normalization, pooling)
CONVOLUTIONS = (convolution.convolution, convolution_im2col, convolution_sum)


class Geometry(NamedTuple):
    """Shapes of a layer, in the notes' symbols."""

    B: int
    C_in: int
    C_out: int
    size: tuple[int, int]
    K: int
    S: int
    P: int


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    B, C_in, C_out = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    K, S, P = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(0, 3))
    sides = st.integers(max(1, K - 2 * P), 9)
    return Geometry(B, C_in, C_out, (draw(sides), draw(sides)), K, S, P)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def assert_same(ours: Operation, theirs: Operation, *tensors: Tensor) -> None:
    """Assert equal results to 1e-12, and equal gradients of a random sum of them to 1e-10."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    our_result, their_result = ours(*leaves), theirs(*leaves)
    assert their_result.numel() > 0
    assert_close(our_result, their_result, rtol=0, atol=1e-12)
    upstream = normal(*their_result.shape, seed=1)
    gradients = [torch.autograd.grad(result, leaves, upstream) for result in (our_result, their_result)]
    assert len(gradients[1]) == len(tensors)
    for our_gradient, their_gradient in zip(*gradients, strict=True):
        assert_close(our_gradient, their_gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("convolve", CONVOLUTIONS, ids=lambda function: function.__name__)
@given(geometry=geometries())
def test_a_convolution_equals_torchs(convolve: Operation, geometry: Geometry) -> None:
    B, C_in, C_out, size, K, S, P = geometry
    X, W, beta = normal(B, C_in, *size), normal(C_out, C_in, K, K), normal(C_out)
    assert_same(
        lambda X, W, beta: convolve(X, W, beta=beta, S=S, P=P),
        lambda X, W, beta: functional.conv2d(X, W, beta, stride=S, padding=P),
        *(X, W, beta),
    )
    assert_close(convolve(X, W, S=S, P=P), functional.conv2d(X, W, stride=S, padding=P), rtol=0, atol=1e-12)


@given(geometry=geometries())
def test_the_matrix_product_equals_the_sum(geometry: Geometry) -> None:
    B, C_in, C_out, size, K, S, P = geometry
    X, W, beta = normal(B, C_in, *size), normal(C_out, C_in, K, K), normal(C_out)
    by_sum = convolution_sum(X, W, beta=beta, S=S, P=P)
    assert by_sum.shape == (B, C_out, *((side + 2 * P - K) // S + 1 for side in size))
    assert_close(convolution_im2col(X, W, beta=beta, S=S, P=P), by_sum, rtol=0, atol=1e-12)


def test_the_gradients_are_the_sums_of_the_notes() -> None:
    """Section 3, "Backward Pass", symbol by symbol: one image, stride 1, no padding; delta_Y is 0 outside."""
    X, W, delta_Y = normal(1, 2, 5, 6), normal(3, 2, 3, 3), normal(1, 3, 3, 4)
    to_W, to_X, to_beta = torch.zeros_like(W), torch.zeros_like(X), torch.zeros(3, dtype=torch.float64)
    for k, i, j in itertools.product(range(3), range(3), range(4)):
        to_beta[k] += delta_Y[0, k, i, j]
    for k, c, u, v in itertools.product(range(3), range(2), range(3), range(3)):
        for i, j in itertools.product(range(3), range(4)):
            to_W[k, c, u, v] += delta_Y[0, k, i, j] * X[0, c, i + u, j + v]
        for p, q in itertools.product(range(5), range(6)):
            if 0 <= p - u < 3 and 0 <= q - v < 4:
                to_X[0, c, p, q] += delta_Y[0, k, p - u, q - v] * W[k, c, u, v]
    assert_close(gradient_W(delta_Y, X, K=3), to_W, rtol=0, atol=1e-12)
    assert_close(gradient_X(delta_Y, W, size=(5, 6)), to_X, rtol=0, atol=1e-12)
    assert_close(gradient_beta(delta_Y), to_beta, rtol=0, atol=1e-12)


@given(geometry=geometries())
def test_a_depthwise_convolution_equals_torchs(geometry: Geometry) -> None:
    B, C, _, size, K, S, P = geometry
    X, W, beta = normal(B, C, *size), normal(C, 1, K, K), normal(C)
    assert_same(
        lambda X, W, beta: depthwise(X, W, beta=beta, S=S, P=P),
        lambda X, W, beta: functional.conv2d(X, W, beta, stride=S, padding=P, groups=C),
        *(X, W, beta),
    )
    alone = functional.conv2d(X, W, stride=S, padding=P, groups=C)
    assert_close(depthwise(X, W, S=S, P=P), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [normal(4), None], ids=["bias", "no bias"])
def test_a_pointwise_convolution_equals_torchs(beta: Tensor | None) -> None:
    assert_same(
        lambda X, W: pointwise(X, W, beta=beta),
        lambda X, W: functional.conv2d(X, W[:, :, None, None], beta),
        *(normal(2, 3, 5, 6), normal(4, 3)),
    )


@given(geometry=geometries())
def test_max_pooling_equals_torchs(geometry: Geometry) -> None:
    B, C, _, size, K, S, P = geometry
    P = min(P, K // 2)
    X = normal(B, C, *(max(side, K) for side in size))
    ties = normal(*X.shape).round()  # six values: most kernels cover their maximum more than once
    for images in (X, ties, -X.abs() - 1):  # the last all below a padding with zeros
        assert_same(
            lambda X: max_pool(X, K, S=S, P=P),
            lambda X: functional.max_pool2d(X, K, stride=S, padding=P),
            images + 0.0,
        )


def test_a_tie_sends_the_gradient_to_the_first_maximum() -> None:
    X = torch.tensor([[[[1.0, 5.0], [5.0, 5.0]]]], requires_grad=True)
    max_pool(X, 2, S=2).backward()
    assert X.grad is not None
    assert X.grad.tolist() == [[[[0.0, 1.0], [0.0, 0.0]]]]


def test_relu_equals_torchs_also_at_zero() -> None:
    X = torch.cat([normal(50), torch.zeros(3, dtype=torch.float64), -torch.zeros(3, dtype=torch.float64)])
    assert_same(relu, functional.relu, X)


def test_batch_norm_equals_torchs_over_steps_and_in_evaluation() -> None:
    theirs = nn.BatchNorm2d(3, eps=1e-3, momentum=0.3).double()
    with torch.no_grad():
        theirs.weight.copy_(normal(3))
        theirs.bias.copy_(normal(3, seed=1))
    gamma, beta = theirs.weight.detach(), theirs.bias.detach()
    mu, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for step in range(4):
        X = 3 * normal(2, 3, 4, 5, seed=step) + step
        assert_same(
            lambda X, gamma, beta: batch_norm(X, gamma, beta=beta, eps=1e-3),
            lambda X, gamma, beta: functional.batch_norm(X, None, None, gamma, beta, training=True, eps=1e-3),
            *(X, gamma, beta),
        )
        theirs.train()(X)
        mu, variance = moving_averages(X, mu, variance=variance, momentum=0.3)
        assert_close(mu, theirs.running_mean, rtol=0, atol=1e-12)
        assert_close(variance, theirs.running_var, rtol=0, atol=1e-12)
        theirs.eval()
        assert_same(
            lambda X, mu=mu, variance=variance: scaled(
                normalized(X, mu, variance=variance, eps=1e-3), gamma, beta=beta
            ),
            theirs,
            X,
        )


def test_the_head_equals_torchs() -> None:
    assert_same(global_average_pool, lambda X: functional.adaptive_avg_pool2d(X, 1)[:, :, 0, 0], normal(2, 3, 4, 5))
    z, W_cls, b_cls = normal(4, 6), normal(6, 3), normal(3)
    assert_same(
        lambda z, W_cls, b_cls: linear(z, W_cls, b_cls=b_cls),
        lambda z, W_cls, b_cls: functional.linear(z, W_cls.T, b_cls),  # torch's weight is (C, features)
        *(z, W_cls, b_cls),
    )
    assert_same(linear, lambda z, W_cls: functional.linear(z, W_cls.T), z, W_cls)


@pytest.mark.parametrize("scale", [1.0, 1000.0])  # e^1000 is beyond float64
def test_softmax_and_cross_entropy_equal_torchs(scale: float) -> None:
    logits, labels = scale * normal(5, 7), torch.tensor([0, 6, 3, 3, 1])
    assert_same(softmax, lambda logits: functional.softmax(logits, 1), logits)
    assert_same(
        lambda logits: cross_entropy(logits, labels),
        lambda logits: functional.cross_entropy(logits, labels),
        logits,
    )


def test_normalization_equals_torchvisions() -> None:
    pixels = torch.randint(0, 256, (5, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of 1, not of 255
    ours = normalize(pixels, 255 * torch.tensor(mean), sigma=255 * torch.tensor(std))
    assert ours.dtype == torch.float32
    assert_close(ours.permute(2, 0, 1), torchvision_normalize(pixels.permute(2, 0, 1) / 255, mean, std))


LABELS = torch.tensor([2, 0, 1])
# Functions and the tensors to differentiate by. Kinks of ReLU and maxima are farther away than a step.
DIFFERENTIATED: dict[str, tuple[Operation, tuple[Tensor, ...]]] = {
    "Convolution": (
        lambda X, W, beta: convolution.convolution(X, W, beta=beta, S=2, P=1),
        (normal(2, 2, 5, 6), normal(3, 2, 3, 3), normal(3)),
    ),
    "ReLU": (relu, (normal(2, 3, 4),)),
    "BatchNorm": (
        lambda X, gamma, beta: batch_norm(X, gamma, beta=beta),
        (normal(2, 3, 2, 3), normal(3), normal(3, seed=1)),
    ),
    "MaxPooling": (lambda X: max_pool(X, 3, S=2, P=1), (normal(2, 2, 5, 6),)),
    "CrossEntropy": (lambda logits: cross_entropy(logits, LABELS), (normal(3, 4),)),
    "depthwise": (lambda X, W: depthwise(X, W, S=2, P=1), (normal(2, 2, 5, 6), normal(2, 1, 3, 3))),
    "pointwise": (pointwise, (normal(2, 3, 2, 2), normal(4, 3))),
    "softmax": (softmax, (normal(3, 4),)),
}


def test_every_function_with_a_backward_is_differentiated() -> None:
    members = [member for module in MODULES for member in vars(module).values() if inspect.isclass(member)]
    functions = {member.__name__ for member in members if hasattr(member, "apply")}
    assert len(functions) == 5
    assert functions <= DIFFERENTIATED.keys()


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_autograd_accepts_first_and_second_derivatives(name: str) -> None:
    operation, tensors = DIFFERENTIATED[name]
    leaves = tuple(tensor.clone().requires_grad_() for tensor in tensors)
    assert torch.autograd.gradcheck(operation, leaves)
    assert torch.autograd.gradgradcheck(operation, leaves)


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_the_gradient_equals_finite_differences(name: str) -> None:
    operation, tensors = DIFFERENTIATED[name]
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    result = operation(*leaves)
    upstream = normal(*result.shape, seed=1)
    gradients = torch.autograd.grad(result, leaves, upstream)
    step = 1e-6
    for leaf, gradient in zip(leaves, gradients, strict=True):
        values = leaf.data.view(-1)
        for place, value in enumerate(values.tolist()):
            with torch.no_grad():
                values[place] = value + step
                above = (operation(*leaves) * upstream).sum()
                values[place] = value - step
                below = (operation(*leaves) * upstream).sum()
                values[place] = value
            assert (above - below).item() / (2 * step) == pytest.approx(gradient.flatten()[place].item(), abs=1e-7)


def test_a_shortcut_adds_one_to_the_gradient() -> None:
    """Section 9: y = F(x) + x has dL/dx = dL/dy (1 + dF/dx)."""
    x, W, delta_y = normal(1, 2, 3, 3), normal(2, 2, 3, 3), normal(1, 2, 3, 3, seed=1)

    def F(x: Tensor) -> Tensor:
        return relu(convolution.convolution(x, W, P=1))

    jacobian = torch.autograd.functional.jacobian(F, x).view(18, 18)  # dF/dx
    assert jacobian.abs().max() > 0.1
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(F(x) + x, x, delta_y)
    one = torch.eye(18, dtype=torch.float64)
    assert_close(gradient.flatten(), delta_y.flatten() @ (one + jacobian), rtol=0, atol=1e-12)


@pytest.mark.parametrize("in_channels", [1, 3])
def test_50_steps_of_lenet_end_with_torchs_weights(in_channels: int) -> None:
    torch.manual_seed(0)
    nets = [build("lenet", "lenet5", in_channels=in_channels, ops=ops).double() for ops in ("torch", "reference")]
    nets[1].load_state_dict(nets[0].state_dict())
    first = {name: tensor.clone() for name, tensor in nets[0].state_dict().items()}
    for net, loss in zip(nets, (functional.cross_entropy, cross_entropy), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for step in range(50):  # over four batches
            images, labels = normal(8, in_channels, 32, 32, seed=step % 4), (torch.arange(8) + step % 4) % 10
            optimizer.zero_grad()
            loss(net(images), labels).backward()
            optimizer.step()
    theirs, ours = (net.state_dict() for net in nets)
    assert len(theirs) == 10
    for name, tensor in theirs.items():
        assert (tensor - first[name]).abs().max() > 0.1, name
        assert (tensor - ours[name]).abs().max() <= 1e-9, name


class Called(TorchDispatchMode):
    """Records the name of each of torch's operations, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations(net: nn.Module, loss: Operation) -> set[str]:
    """The names of torch's operations in a training step."""
    with Called() as called:
        loss(net(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
    return called.names


def test_a_training_step_calls_no_layer_of_torch() -> None:
    def make() -> nn.Sequential:
        first = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        second = (nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.AdaptiveAvgPool2d(1))
        return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(8, 5))

    words = ("convolution", "batch_norm", "relu", "threshold", "max_pool", "softmax", "nll_loss", "addmm")
    theirs = operations(make(), functional.cross_entropy)
    assert [word for word in words if not any(word in name for name in theirs)] == []
    ours = operations(with_reference_ops(make()), cross_entropy)
    assert {"mm", "maximum", "scatter_add", "exp"} <= ours
    assert [name for name in ours if any(word in name for word in words)] == []


def test_the_equations_use_arithmetic_only() -> None:
    nodes = [node for module in MODULES for node in ast.walk(ast.parse(Path(module.__file__).read_text()))]
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    ours = {f"models.equations.{name}" for name in ("context", "convolution", "counts")}
    assert imported - {"__future__"} == {"itertools", "torch", *ours}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    of_torch = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "torch"}
    assert of_torch == {"autograd", "maximum", "where", "sqrt", "exp", "log", "arange", "inf", "float32"}
    # Tensor.unfold is a view of the patches; functional.unfold copies them.
    assert {node.attr for node in attributes} & vars(functional).keys() == {"unfold"}
