"""Fine-tuning: which parts of a network train, from when on, and with which learning rates."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from models.arguments import ArgumentError
from models.layers import ConvNet

HEAD = "head"


class RateGroup(NamedTuple):
    """Parameters with a common learning rate, which is `scale` times the recipe's."""

    parameters: list[nn.Parameter]
    decays: bool
    scale: float = 1.0
    waits: bool = False  # while the head trains alone

    @property
    def options(self) -> dict[str, object]:
        """The group as an optimizer takes it."""
        return {"params": self.parameters, **({} if self.decays else {"weight_decay": 0.0})}


def network_parts(net: nn.Module) -> dict[str, nn.Module]:
    """Return stem, stages and head by name, in the order of the forward pass; nothing for other networks."""
    return {"stem": net.stem, **dict(net.stages.named_children()), HEAD: net.head} if isinstance(net, ConvNet) else {}


def frozen_parts(net: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Return the parts of a network that do not train. Raises: ValueError for an unknown one, or the head."""
    parts = network_parts(net)
    body = [name for name in parts if name != HEAD]
    for name in names:
        if name not in body:
            listed = f"is not one of {', '.join(body)}" if body else "is no part of this network, which has no stages"
            raise ArgumentError(("freeze", name), f" {listed}")
    return [parts[name] for name in names]


def groups_by_part(net: nn.Module, decayed: Sequence[nn.Parameter], *, layer_decay: float) -> list[RateGroup]:
    """Return the trained parameters of each part, the head first, with and without weight decay.

    The rate of a part is `layer_decay` to the power of its distance from the head, 1 for the last stage: Howard & Ruder
    2018, section 3.2. Raises: ValueError for a network without parts.
    """
    parts, with_decay = network_parts(net), {*decayed}
    if not parts:
        raise ValueError("layer_decay and head_warmup need a network of stem, stages and head: set both to null")
    groups = []
    for distance, (name, part) in enumerate(reversed(parts.items())):
        trained = [one for one in part.parameters() if one.requires_grad]
        for decays in (True, False):
            chosen = [one for one in trained if (one in with_decay) == decays]
            groups.append(RateGroup(chosen, decays, layer_decay**distance, waits=name != HEAD))
    return [group for group in groups if group.parameters]
