"""Averages of weights: the exponential moving average of a training, and the mean of several networks."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from models.arguments import require

WARMUP_POWER = 2 / 3  # timm's, by Crowson: after N updates the average reaches back over the last N^(2/3)
CHOSEN, NOT_CHOSEN = "state_dict_ema", "averages"  # keys of a checkpoint; the first one is timm's


@dataclass(frozen=True)
class Averaging:
    """The exponential moving average of a training: Polyak & Juditsky 1992; Szegedy et al. 2016, section 8.

    Every `every` optimizer steps the average moves by 1 - `decay` towards the weights. With `warmup` the N-th of these
    updates has a decay of at most 1 - N^(-2/3), as in timm's `ModelEmaV3`, so that the average does not remember the
    first weights. A training of fewer than `min_windows` averaging windows is not averaged. Raises: ValueError.
    """

    decay: float = 0.9998
    warmup: bool = True
    every: int = 1
    min_windows: float = 10.0

    def __post_init__(self) -> None:
        require(0 <= self.decay < 1, "must be at least 0 and less than 1, such as 0.9998", decay=self.decay)
        require(self.every >= 1, "must be a number of optimizer steps of at least 1", every=self.every)
        require(0 <= self.min_windows < math.inf, "must be a number of at least 0", min_windows=self.min_windows)

    def decay_at(self, update: int) -> float:
        """Return the decay of an update, counted from 1; the first one copies the weights, as in timm and torch."""
        if update <= 1:
            return 0.0
        return min(self.decay, 1 - update**-WARMUP_POWER) if self.warmup else self.decay

    def window(self, num_steps: int) -> float:
        """Return how many steps the average reaches back at the end of a training, 1 / (1 - decay) updates."""
        return self.every / (1 - self.decay_at(num_steps // self.every))

    def is_long_enough(self, num_steps: int) -> bool:
        """Whether a training has enough steps for an average."""
        return num_steps >= self.every and num_steps >= self.min_windows * self.window(num_steps)


class AveragedWeights:
    """The moving average of a network's state dict, on its device; a call runs the network with it.

    Tensors of floats are averaged, the statistics of batch norms too, as in timm and torchvision; counters are copied.
    The network's own tensors never change. All ranks have the same averages, except for batch norms. With `is_chosen`
    they are the weights of a checkpoint for everyone who reads weights from it (`models/weights/files.py`).
    """

    def __init__(self, net: nn.Module, averaging: Averaging, *, is_chosen: bool = False) -> None:
        self.net, self.averaging = net, averaging
        self.key = CHOSEN if is_chosen else NOT_CHOSEN
        self.tensors = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
        self._averages, self._weights = list[Tensor](), list[Tensor]()
        self._copies, self._counters = list[Tensor](), list[Tensor]()

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits. Shapes: (N, C, H, W) -> (N, K)."""
        logits: Tensor = functional_call(self.net, self.tensors, (images,), tie_weights=False)
        return logits

    @property
    def buffers(self) -> list[Tensor]:
        """The averages of the network's buffers, which differ between ranks."""
        return [self.tensors[name] for name, _ in self.net.named_buffers() if name in self.tensors]

    def follow(self) -> None:
        """Take device and type of the network's tensors, which stay the same ones until the end of the training."""
        state = self.net.state_dict()
        self.tensors = {name: tensor.to(state[name]) for name, tensor in self.tensors.items()}
        floats = [name for name, tensor in state.items() if tensor.is_floating_point()]
        counters = [name for name in state if name not in floats]
        self._averages, self._weights = ([tensors[name] for name in floats] for tensors in (self.tensors, state))
        self._copies, self._counters = ([tensors[name] for name in counters] for tensors in (self.tensors, state))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages after an optimizer step, counted from 1."""
        update, rest = divmod(step, self.averaging.every)
        if rest:
            return
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.averaging.decay_at(update))
        if self._copies:
            torch._foreach_copy_(self._copies, self._counters)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue with the averages of a checkpoint, before `follow`."""
        self.tensors = {name: tensors[name] for name in self.tensors}


def mean_of(states: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of several state dicts of one network, computed in float64; counters are those of the first one.

    Izmailov et al. 2018, section 3.2, for points of one training; Wortsman et al. 2022, section 2 (the uniform soup),
    for several trainings that start with the same weights.
    """
    sums, first, count = dict[str, Tensor](), dict[str, Tensor](), 0
    for state in states:
        first, count = first or dict(state), count + 1
        for name, tensor in state.items():
            if tensor.is_floating_point():
                sums[name] = sums.get(name, 0) + tensor.double()
    return {name: (sums[name] / count).to(one.dtype) if name in sums else one for name, one in first.items()}
