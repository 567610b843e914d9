"""Answers of a model that is right more often than not."""

from __future__ import annotations

import numpy as np
from scipy.special import log_softmax

from pipeline.evaluate.metrics import Answers


def answers_of(count: int, num_classes: int, *, seed: int = 0, skill: float = 1.5) -> Answers:
    """Draw random logits, those of the right class `skill` higher."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(num_classes, size=count)
    logits = generator.normal(size=(count, num_classes))
    logits[np.arange(count), labels] += skill
    return Answers(log_softmax(logits, axis=1), labels)
