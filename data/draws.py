"""Counter-based random numbers: permutations and draws as stateless functions, the same on every machine.

A permutation is evaluated only at the requested positions: a billion samples cost no more than a thousand. It is a
Feistel network with cycle walking, as in Mitchell, Stokes, Frank & Holmes 2022, "Bandwidth-optimal random shuffling
for GPUs". Keys and draws apply the finaliser of SplitMix64 (Steele, Lea & Flood 2014) to a counter.
"""

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.int64]  # rows of a split's index
Words = NDArray[np.uint64]

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd
ROUNDS = 24  # as Mitchell et al.: 8 favour some of the 120 orders of five
# Purposes of draws, so that two uses of the same (seed, epoch) never share their bits.
SHARDS, WINDOW, AUGMENT, SPLIT, PACK, NETWORK, POLICY, ERASE, NOISE = 1, 2, 3, 4, 5, 6, 7, 8, 9


def mix(words: Words) -> Words:
    """Apply SplitMix64's finaliser: a bijection of 64-bit words in which every input bit affects every output bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def key(*numbers: int) -> np.uint64:
    """Fold integers into one 64-bit key; their order matters."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = mix(state + MULTIPLIER + np.uint64(number % 2**64))
    return np.uint64(state[0])


def uniform(samples: Samples, count: int, *, seed: int, epoch: int, purpose: int = AUGMENT) -> NDArray[np.float64]:
    """Draw `count` numbers in [0, 1) per sample, a function of (seed, epoch, sample) alone: (N,) -> (N, count)."""
    streams = mix(samples.astype(np.uint64) + key(purpose, seed, epoch))  # (N,)
    steps = np.arange(1, count + 1, dtype=np.uint64) * MULTIPLIER
    words = mix(streams[:, None] + steps)  # (N, count)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(positions: Samples, size: int, *, permutation: np.uint64) -> Samples:
    """Map positions in 0..size-1 through the bijection of 0..size-1 with the key `permutation`: (N,) -> (N,)."""
    bits = max(2, int(size - 1).bit_length())
    keys = mix(permutation + np.arange(1, ROUNDS + 1, dtype=np.uint64))
    permuted = np.empty(len(positions), np.int64)
    pending, values = np.arange(len(positions)), positions.astype(np.uint64)
    while len(pending):  # cycle walking: the network permutes 0..2^bits-1, so repeat it until the value is below size
        values = _feistel(values, keys, bits=bits)
        inside = values < np.uint64(size)
        permuted[pending[inside]] = values[inside]
        pending, values = pending[~inside], values[~inside]
    return permuted


def _feistel(words: Words, keys: Words, *, bits: int) -> Words:
    """Permute 0..2^bits-1: each round adds a hash of the low half to the high half and swaps the two."""
    low_bits = bits // 2
    for round_key in keys:
        high_bits = bits - low_bits
        low = words & np.uint64(2**low_bits - 1)
        # Multiply-shift hashing (Dietzfelbinger et al. 1997): the top bits of the product, as many as the high half.
        hashed = ((low + round_key) * MULTIPLIER) >> np.uint64(64 - high_bits)
        words = (low << np.uint64(high_bits)) | ((words >> np.uint64(low_bits)) ^ hashed)
        low_bits = high_bits  # halves of unequal width swap their widths too, so that any number of bits works
    return words
