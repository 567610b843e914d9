"""Batch norms in short trainings."""

from torch import nn

from models.layers import batch_norms

WINDOWS = 5  # the least number of a norm's averaging windows in a training
MAX_MOMENTUM = 0.5


def shorten_windows(net: nn.Module, num_batches: int) -> str | None:
    """Raise the momentum of batch norms whose averages would lag behind the weights; return what changed, if anything.

    The averages that an evaluation uses are those of the last 1 / momentum batches, and begin at 0 and 1. MobileNetV3's
    momentum of 0.01 keeps two fifths of that beginning after 90 batches.
    """
    least, before = min(MAX_MOMENTUM, WINDOWS / num_batches), set()
    for norm in batch_norms(net):
        if norm.training and norm.momentum is not None and norm.momentum < least:  # frozen ones keep their averages
            before.add(norm.momentum)
            norm.momentum = least
    if not before:
        return None
    return f"momentum {least:.2g} instead of {min(before):g}, for a training of {num_batches:,} batches"
