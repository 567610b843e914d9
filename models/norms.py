"""Batch norms in short trainings."""

from torch import nn

from models.layers import batch_norms

LEAST_RATIO = 5  # of a training's batches to those that an average reaches back over
MAX_MOMENTUM = 0.5


def fit_momentum(net: nn.Module, num_batches: int, *, is_given: bool = False) -> str | None:
    """Raise the momentum of batch norms whose averages would lag behind the weights; return what changed, if anything.

    The averages that an evaluation uses are those of the last 1 / momentum batches, and begin at 0 and 1. MobileNetV3's
    momentum of 0.01 keeps two fifths of that beginning after 90 batches. A momentum that is given stays; then the
    share of the beginning is returned.
    """
    least = min(MAX_MOMENTUM, LEAST_RATIO / num_batches)
    norms = [(norm, norm.momentum) for norm in batch_norms(net) if norm.training]  # frozen ones keep their averages
    lagging = {norm: momentum for norm, momentum in norms if momentum is not None and momentum < least}
    if not lagging:
        return None
    before = min(lagging.values())
    if is_given:
        kept = (1 - before) ** num_batches
        return (
            f"momentum {before:g} as given; after all {num_batches:,} batches {kept:.1%} of an average is as it began"
        )
    for norm in lagging:
        norm.momentum = least
    return f"momentum {least:.2g} instead of {before:g}, for a training of {num_batches:,} batches"
