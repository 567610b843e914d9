"""Shapes, parameter counts, costs and receptive fields: sections 3, 6 and 7 of the notes."""

import math
from collections.abc import Iterable, Sequence


def output_size(H_in: int, K: int, *, S: int = 1, P: int = 0) -> int:
    """H_out = floor((H_in + 2P - K) / S) + 1; section 3. Raises: ValueError when K exceeds the padded input."""
    if H_in + 2 * P < K:
        raise ValueError(f"K={K} does not fit into {H_in} + 2 * {P} pixels: take a smaller kernel or more padding")
    return (H_in + 2 * P - K) // S + 1


def convolution_shape(X: Sequence[int], W: Sequence[int], *, S: int = 1, P: int = 0) -> tuple[int, int, int, int]:
    """(B, C_out, H_out, W_out) of X (B, C_in, H_in, W_in) and W (C_out, C_in, K, K); section 3. Raises: ValueError."""
    B, C_in, H_in, W_in = X
    C_out, *kernel = W
    K = kernel[-1]
    if kernel != [C_in, K, K]:
        raise ValueError(f"W has the shape {tuple(W)}: an input of {C_in} channels takes (C_out, {C_in}, K, K)")
    return B, C_out, output_size(H_in, K, S=S, P=P), output_size(W_in, K, S=S, P=P)


def convolution_parameters(C_in: int, C_out: int, *, K: int) -> int:
    """K^2 C_in C_out weights and C_out biases; section 3."""
    return K * K * C_in * C_out + C_out


def fully_connected_weights(X: Sequence[int], Y: Sequence[int]) -> int:
    """One weight for every pair of an input and an output element, shapes without B and no biases; section 3."""
    return math.prod(X) * math.prod(Y)


def linear_parameters(C_in: int, C_out: int) -> int:
    """C_in C_out weights and C_out biases; section 7."""
    return C_in * C_out + C_out


def standard_cost(C_in: int, C_out: int, *, K: int) -> int:
    """K^2 C_in C_out: weights, and multiply-adds for each output position; section 6."""
    return K * K * C_in * C_out


def separable_cost(C_in: int, C_out: int, *, K: int) -> int:
    """K^2 C_in for the depthwise and C_in C_out for the pointwise convolution; section 6."""
    return K * K * C_in + C_in * C_out


def separable_ratio(C_out: int, K: int) -> float:
    """1 / C_out + 1 / K^2: the separable cost over the standard one, for any C_in; section 6."""
    return 1 / C_out + 1 / K**2


def receptive_fields(layers: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(r_l, j_l) after each layer (K_l, S_l): r_l = r_{l-1} + (K_l - 1) j_{l-1} and j_l = j_{l-1} S_l; section 6.

    r is the size of the field in pixels, j the distance between neighbouring fields (the jump); r_0 = j_0 = 1. Padding
    counts, so r may exceed the image.
    """
    fields = []
    r, j = 1, 1
    for K, S in layers:
        r, j = r + (K - 1) * j, j * S
        fields.append((r, j))
    return fields
