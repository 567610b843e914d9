"""The numbers worked out in the notes, and the ones that are wrong there."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import nn

from models.equations.classification import linear
from models.equations.convolution import convolution, convolution_sum, depthwise
from models.equations.counts import (
    convolution_parameters,
    convolution_shape,
    fully_connected_weights,
    linear_parameters,
    output_size,
    receptive_fields,
    separable_cost,
    separable_ratio,
    standard_cost,
)
from models.equations.normalization import moving_averages, normalize
from models.equations.pooling import global_average_pool, max_pool

FIGURE = [[1.0, 3, 8, 2], [4, 2, 1, 0], [5, 6, 7, 3], [1, 2, 4, 9]]  # "1382 4210 5673 1249"
STEM = [(7, 2), (3, 2)]  # (K, S) of the first convolution and the pooling after it


def shape_of(operation: Callable[..., torch.Tensor], *shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a result, for inputs of some shapes."""
    return tuple(operation(*(torch.empty(shape, device="meta") for shape in shapes)).shape)


def pooled(K: int, *, S: int, P: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda X: max_pool(X, K, S=S, P=P)


def field_sizes(layers: list[tuple[int, int]]) -> list[int]:
    return [r for r, _ in receptive_fields(layers)]


def bottlenecks() -> list[int]:
    """r after the stem's convolution and each stage of ResNet-50, He et al. 2016, table 1: strides sit on the 3x3."""
    layers, ends = [*STEM], [1]
    for depth, stride in zip((3, 4, 6, 3), (1, 2, 2, 2), strict=True):
        for block in range(depth):
            layers += [(1, 1), (3, stride if block == 0 else 1), (1, 1)]
        ends.append(len(layers))
    sizes = field_sizes(layers)
    return [sizes[end - 1] for end in ends]


def ends_of_range() -> list[float]:
    """The smallest and the largest normalized value, by means and deviations of ImageNet's colours."""
    mu, sigma = 255 * torch.tensor([0.485, 0.456, 0.406]), 255 * torch.tensor([0.229, 0.224, 0.225])
    X = normalize(torch.tensor([[[0] * 3, [255] * 3]], dtype=torch.uint8), mu, sigma=sigma)
    return [X.min().item(), X.max().item()]


# The notes' words, our result and the notes' number.
WORKED: dict[str, tuple[Callable[[], object], object]] = {
    "2. values [0, 255] become ≈ [−2.5, +2.5]; with ImageNet's mu and sigma −2.12 to 2.64": (
        lambda: [round(value, 2) for value in ends_of_range()],
        [-2.12, 2.64],
    ),
    "3. input (32,3,224,224), kernel 7×7, 64 filters, stride 2, padding 3: output shape": (
        lambda: convolution_shape((32, 3, 224, 224), (64, 3, 7, 7), S=2, P=3),
        (32, 64, 112, 112),
    ),
    "3. the same, computed": (
        lambda: shape_of(
            lambda X, W: convolution(X, W, S=2, P=3),
            *((32, 3, 224, 224), (64, 3, 7, 7)),
        ),
        (32, 64, 112, 112),
    ),
    "3. params (7×7×3×64) + 64 = 9472": (lambda: convolution_parameters(3, 64, K=7), 9_472),
    "3. figure: 5×5 input X_pad, 3×3 kernel, 3×3 output": (lambda: output_size(5, 3), 3),
    "3. padding 1 gives 'same' output for K = 3": (lambda: output_size(224, 3, P=1), 224),
    "6. K=2, S=2 halves each spatial dim: (B,256,56,56) → (B,256,28,28)": (
        lambda: shape_of(pooled(2, S=2), (32, 256, 56, 56)),
        (32, 256, 28, 28),
    ),
    "6. figure: 1382 4210 5673 1249 max 2×2 output 4 8 6 9": (
        lambda: max_pool(torch.tensor([[FIGURE]]), 2, S=2).tolist(),
        [[[[4.0, 8.0], [6.0, 9.0]]]],
    ),
    "6. two stacked 3×3 convs (stride 1): r_1 = 3, r_2 = 5": (
        lambda: field_sizes([(3, 1)] * 2),
        [3, 5],
    ),
    "6. figure: r = 5, r = 7 (three 3×3 convs)": (
        lambda: field_sizes([(3, 1)] * 3)[1:],
        [5, 7],
    ),
    "6. add a stride-2 layer and the field jumps faster": (
        lambda: receptive_fields([(3, 2), (3, 1)]),
        [(3, 2), (7, 2)],
    ),
    "6. for K=3 and a large C_out, the ratio ≈ 1/9": (
        lambda: separable_ratio(10**9, 3),
        pytest.approx(1 / 9),
    ),
    "6. ~8–9× cheaper: 128 and 512 channels": (
        lambda: [round(standard_cost(C, C, K=3) / separable_cost(C, C, K=3), 2) for C in (128, 512)],
        [8.41, 8.84],
    ),
    "7. GAP (B,2048,7,7) → (B,2048)": (
        lambda: shape_of(global_average_pool, (32, 2048, 7, 7)),
        (32, 2048),
    ),
    "7. logits (B,2048)×(2048,C) → (B,C)": (
        lambda: shape_of(linear, (32, 2048), (2048, 1000)),
        (32, 1000),
    ),
    "7. params (ImageNet) 2048×1000 + 1000 = 2,049,000": (lambda: linear_parameters(2048, 1000), 2_049_000),
    "7. flattening (2048,7,7) gives a 100,352-d vector": (
        lambda: fully_connected_weights((2048, 7, 7), (1,)),
        100_352,
    ),
    "7. an FC layer to 1000 classes would need ~100 million parameters": (
        lambda: fully_connected_weights((2048, 7, 7), (1000,)) + 1000,
        100_353_000,
    ),
    "7. eliminating ~98% of head parameters": (
        lambda: round(1 - linear_parameters(2048, 1000) / linear_parameters(100_352, 1000), 4),
        0.9796,
    ),
    "8. after stem conv: 7×7 px": (lambda: bottlenecks()[0], 7),
    "8. after stage 2, ~35×35 px; after stage 3, ~91×91 px": (
        lambda: bottlenecks()[1:3],
        [35, 91],
    ),
    "8. linear layer: 512 → 1000 classes: (32, 1000)": (
        lambda: shape_of(lambda X, W: linear(global_average_pool(X), W), (32, 512, 7, 7), (512, 1000)),
        (32, 1000),
    ),
}


@pytest.mark.parametrize("quantity", WORKED)
def test_our_result_is_the_notes_number(quantity: str) -> None:
    compute, expected = WORKED[quantity]
    assert compute() == expected


def test_a_fully_connected_layer_is_five_times_as_large_as_in_the_notes() -> None:
    """Section 3: "≈ 24 billion parameters", "a reduction of over 2.5 million×". Over is right: it is 12.8 million."""
    weights = fully_connected_weights((3, 224, 224), (64, 112, 112))
    assert weights == (224 * 224 * 3) * (112 * 112 * 64) == 120_846_286_848
    assert weights / 24e9 == pytest.approx(5.04, abs=0.01)
    assert weights // convolution_parameters(3, 64, K=7) == 12_758_265
    assert round(24e9 / convolution_parameters(3, 64, K=7)) == 2_533_784  # their factor follows from the 24 billion


def test_the_stem_pooling_needs_a_padding_that_the_notes_omit() -> None:
    """Section 8: "MaxPool 3×3, stride 2" from 112 to 56. Section 6's equation, without padding, gives 55."""
    assert shape_of(pooled(3, S=2), (32, 64, 112, 112)) == (32, 64, 55, 55)
    assert shape_of(pooled(3, S=2, P=1), (32, 64, 112, 112)) == (32, 64, 56, 56)


def test_the_field_of_the_last_stage_exceeds_the_image() -> None:
    """Section 8: "After stage 4", "~224×224 px (global)". 35 and 91 before it are ResNet-50's, whose last is 427."""
    assert bottlenecks() == [7, 35, 91, 267, 427]


def test_the_fields_of_the_figures_two_convolutions_are_5_and_3() -> None:
    """Section 6's figure says "input r = 7, conv 3×3, r = 5, conv 3×3, 1 neuron"; its caption says 5 and 3."""
    assert field_sizes([(3, 1)] * 2)[::-1] == [5, 3]


@pytest.mark.parametrize("C_in", [1, 3, 64, 512])
@pytest.mark.parametrize("C_out", [1, 64, 1000])
@pytest.mark.parametrize("K", [1, 3, 5, 7])
def test_counts_are_those_of_torchs_layers(C_in: int, C_out: int, K: int) -> None:
    def count(*layers: nn.Module) -> int:
        return sum(parameter.numel() for layer in layers for parameter in layer.parameters())

    with torch.device("meta"):
        assert convolution_parameters(C_in, C_out, K=K) == count(nn.Conv2d(C_in, C_out, K))
        assert linear_parameters(C_in, C_out) == count(nn.Linear(C_in, C_out))
        assert standard_cost(C_in, C_out, K=K) == count(nn.Conv2d(C_in, C_out, K, bias=False))
        depthwise = nn.Conv2d(C_in, C_in, K, groups=C_in, bias=False)
        pointwise = nn.Conv2d(C_in, C_out, 1, bias=False)
        assert separable_cost(C_in, C_out, K=K) == count(depthwise, pointwise)
    ratio = Fraction(separable_cost(C_in, C_out, K=K), standard_cost(C_in, C_out, K=K))
    assert ratio == Fraction(1, C_out) + Fraction(1, K**2)
    assert separable_ratio(C_out, K) == pytest.approx(float(ratio), rel=1e-15)


@pytest.mark.parametrize(
    "layers", [[(3, 1), (3, 2), (5, 1)], [(7, 2), (3, 2), (1, 1), (3, 1)], [(2, 2), (2, 3), (4, 1)]]
)
def test_the_recurrence_agrees_with_the_gradient(layers: list[tuple[int, int]]) -> None:
    """Kernels of ones: the pixels on which an output and its neighbour depend, along a row of a large image."""
    X = torch.ones(1, 1, 150, 150, dtype=torch.float64, requires_grad=True)
    Y = X
    for (r, jump), (K, S) in zip(receptive_fields(layers), layers, strict=True):
        Y = convolution(Y, torch.ones(1, 1, K, K, dtype=torch.float64), S=S)
        reached = []
        for j in (2, 3):
            (gradient,) = torch.autograd.grad(Y[0, 0, 2, j], X, retain_graph=True)
            reached.append(gradient[0, 0].sum(0).nonzero().flatten().tolist())
        # A kernel narrower than its stride skips pixels; the field spans them.
        assert reached[0][-1] - reached[0][0] + 1 == r
        assert reached[1][0] - reached[0][0] == jump


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: output_size(3, 6, P=1), r"K=6 does not fit into 3 \+ 2 \* 1 pixels"),
        (lambda: convolution_shape((1, 4, 8, 8), (2, 3, 3, 3)), r"W has the shape \(2, 3, 3, 3\): an input of 4"),
        (lambda: convolution_shape((1, 3, 8, 8), (2, 3, 3, 5)), r"takes \(C_out, 3, K, K\)"),
        (lambda: convolution_sum(torch.ones(1, 4, 8, 8), torch.ones(2, 3, 3, 3)), "an input of 4 channels"),
        (
            lambda: depthwise(torch.ones(1, 4, 8, 8), torch.ones(8, 1, 3, 3)),
            r"4 channels take \(4, 1, K, K\)",
        ),
        (lambda: max_pool(torch.ones(1, 1, 8, 8), 2, S=2, P=2), "P=2 must be at most half of K=2"),
        (lambda: max_pool(torch.ones(1, 1, 8, 2), 3, S=2), "K=3 does not fit into 2"),
        (
            lambda: moving_averages(torch.ones(1, 2, 1, 1), torch.zeros(2), variance=torch.ones(2), momentum=0.1),
            r"\(1, 2, 1, 1\): batch norm trains on more than one value",
        ),
    ],
)
def test_impossible_shapes_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
